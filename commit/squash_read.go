package commit

import (
	"archive/tar"
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	digest "github.com/opencontainers/go-digest"

	"github.com/varvefs/varve/index"
)

// nameless gives a file of dir that has no name and so goes with its descriptor.
func nameless(dir string) (*os.File, error) {
	f, err := os.CreateTemp(dir, "tar-")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// unpackTar decompresses a layer into a file of dir that has no name.
func unpackTar(ctx context.Context, b Blob, dir string) (_ *os.File, err error) {
	f, err := nameless(dir)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	r, done, err := decompress(io.NewSectionReader(b.ReaderAt, 0, b.Size))
	if err != nil {
		return nil, err
	}
	defer done()
	sum := sha256.New()
	w := bufio.NewWriterSize(f, 1<<20)
	if _, err := io.Copy(io.MultiWriter(w, sum), stopping{ctx, r}); err != nil {
		return nil, err
	}
	if err := w.Flush(); err != nil {
		return nil, err
	}
	if got := digest.NewDigest(digest.SHA256, sum); got != b.DiffID {
		return nil, fmt.Errorf("%w: it holds %s instead of %s", index.ErrMalformed, got, b.DiffID)
	}
	return f, nil
}

// decompress knows a compression by how it begins.
func decompress(r io.Reader) (_ io.Reader, done func(), err error) {
	b := bufio.NewReaderSize(r, 1<<20)
	magic, err := b.Peek(4)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", index.ErrMalformed, err)
	}
	switch {
	case magic[0] == 0x1f && magic[1] == 0x8b:
		z, err := gzip.NewReader(b)
		if err != nil {
			return nil, nil, fmt.Errorf("%w: %w", index.ErrMalformed, err)
		}
		return z, func() { z.Close() }, nil
	case string(magic) == "\x28\xb5\x2f\xfd", magic[0]&0xf0 == 0x50 && string(magic[1:]) == "\x2a\x4d\x18":
		// More than this no writer of layers asks for.
		z, err := zstd.NewReader(b, zstd.WithDecoderMaxMemory(1<<30), zstd.WithDecoderConcurrency(1))
		if err != nil {
			return nil, nil, err
		}
		return z, z.Close, nil
	}
	return b, func() {}, nil
}

// stopping ends reading when its context does.
type stopping struct {
	ctx context.Context
	r   io.Reader
}

func (s stopping) Read(p []byte) (int, error) {
	if err := s.ctx.Err(); err != nil {
		return 0, err
	}
	return s.r.Read(p)
}

// lazyNames are what the writers of lazy layers add to their tars, which is of
// the blob and not of the image.
var lazyNames = []string{"stargz.index.json", ".prefetch.landmark", ".no.prefetch.landmark"}

// tarEntries lists a tar. The entries read their contents from it.
func tarEntries(ctx context.Context, f *os.File) ([]Entry, error) {
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, err
	}
	// archive/tar reads no further than a header's last block: what follows is
	// the contents, and it seeks past them.
	in := io.NewSectionReader(f, 0, size)
	tr := tar.NewReader(in)
	var all []Entry
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return all, nil
		}
		if err != nil {
			return nil, fmt.Errorf("%w: %w", index.ErrMalformed, err)
		}
		if h.Typeflag == tar.TypeXGlobalHeader || isLazyName(h.Name) {
			continue
		}
		if len(all) >= index.MaxEntries {
			return nil, fmt.Errorf("%w: more than %d entries", index.ErrMalformed, index.MaxEntries)
		}
		e := Entry{Header: plainHeader(h)}
		if e.Header.Typeflag == tar.TypeReg && h.Size > 0 {
			off, err := in.Seek(0, io.SeekCurrent)
			if err != nil {
				return nil, err
			}
			if isSparse(h) || off+h.Size > size {
				return nil, fmt.Errorf("%w: %.200q: its contents are not in one piece", index.ErrMalformed, h.Name)
			}
			e.open = func() (io.ReadCloser, error) { return io.NopCloser(io.NewSectionReader(f, off, h.Size)), nil }
		}
		all = append(all, e)
	}
}

func isLazyName(name string) bool {
	return slices.Contains(lazyNames, strings.TrimPrefix(name, "./"))
}

func isSparse(h *tar.Header) bool {
	if h.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// plainHeader keeps of a header what a layer of ours has.
func plainHeader(h *tar.Header) *tar.Header {
	p := &tar.Header{
		Typeflag: h.Typeflag, Name: h.Name, Linkname: h.Linkname, Size: h.Size, Mode: h.Mode & 0o7777,
		Uid: h.Uid, Gid: h.Gid, ModTime: h.ModTime.Truncate(time.Second).UTC(), Devmajor: h.Devmajor, Devminor: h.Devminor,
	}
	switch p.Typeflag {
	case tar.TypeReg:
	case tar.TypeCont, tar.TypeGNUSparse:
		p.Typeflag = tar.TypeReg
	default:
		p.Size = 0
	}
	for k, v := range h.PAXRecords {
		if strings.HasPrefix(k, paxXattr) {
			if p.PAXRecords == nil {
				p.PAXRecords = map[string]string{}
			}
			p.PAXRecords[k] = v
		}
	}
	return p
}
