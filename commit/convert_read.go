package commit

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"math"
	"os"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/varvefs/varve/image"
	"github.com/varvefs/varve/index"
)

// layerStream is the tar of a layer, decompressed while its blob is read. Nothing
// of it is proven before end.
type layerStream struct {
	ctx      context.Context
	layer    image.Layer
	diffID   digest.Digest
	src      io.ReadCloser
	tar      io.Reader
	done     func()
	progress func(int64) // told of the bytes of the blob that were read

	blobSum, tarSum hash.Hash
	read            int64
	err             error // of the source
}

// openLayer begins to read a layer. The caller closes it.
func openLayer(ctx context.Context, blobs Blobs, l image.Layer, diffID digest.Digest, progress func(int64)) (*layerStream, error) {
	src, err := blobs.Open(ctx, l, 0)
	if err != nil {
		return nil, err
	}
	s := &layerStream{
		ctx: ctx, layer: l, diffID: diffID, src: src, progress: progress,
		blobSum: sha256.New(), tarSum: sha256.New(),
	}
	progress(0)
	if s.tar, s.done, err = decompress(blobReader{s}); err != nil {
		src.Close()
		return nil, cmp.Or(s.err, err)
	}
	return s, nil
}

func (s *layerStream) close() {
	s.done()
	s.src.Close()
}

// Read gives the tar. Its errors are the source's, or wrap index.ErrMalformed.
func (s *layerStream) Read(p []byte) (int, error) {
	n, err := s.tar.Read(p)
	s.tarSum.Write(p[:n])
	switch {
	case err == nil || err == io.EOF:
	case s.err != nil:
		err = s.err
	case !errors.Is(err, index.ErrMalformed):
		err = fmt.Errorf("%w: %w", index.ErrMalformed, err)
	}
	return n, err
}

// blobReader reads the compressed bytes.
type blobReader struct{ *layerStream }

func (b blobReader) Read(p []byte) (int, error) {
	s := b.layerStream
	if s.err == nil {
		s.err = s.ctx.Err()
	}
	switch {
	case s.err != nil:
		return 0, s.err
	case s.read >= s.layer.Size:
		return 0, io.EOF
	}
	n, err := s.src.Read(p[:min(int64(len(p)), s.layer.Size-s.read)])
	s.blobSum.Write(p[:n])
	s.read += int64(n)
	s.progress(s.read)
	switch {
	case err == io.EOF && s.read < s.layer.Size:
		err = fmt.Errorf("%w: the blob ends after %d of its %d bytes", index.ErrMalformed, s.read, s.layer.Size)
		s.err = err
	case err != nil && err != io.EOF:
		err = fmt.Errorf("read: %w", err)
		s.err = err
	}
	return n, err
}

// asMalformed marks what archive/tar says of foreign bytes.
func asMalformed(err error) error {
	if !errors.Is(err, index.ErrMalformed) &&
		(errors.Is(err, tar.ErrHeader) || errors.Is(err, tar.ErrFieldTooLong) || errors.Is(err, io.ErrUnexpectedEOF)) {
		return fmt.Errorf("%w: %w", index.ErrMalformed, err)
	}
	return err
}

// end reads what follows the tar, which the digests cover too, and proves the
// layer.
func (s *layerStream) end() error {
	for _, r := range []io.Reader{s, blobReader{s}} {
		if _, err := io.Copy(io.Discard, r); err != nil {
			return err
		}
	}
	if got := digest.NewDigest(digest.SHA256, s.blobSum); got != s.layer.Digest {
		return fmt.Errorf("%w: the bytes have the digest %s, the blob is damaged or was tampered with", index.ErrMalformed, got)
	}
	if got := digest.NewDigest(digest.SHA256, s.tarSum); got != s.diffID {
		return fmt.Errorf("%w: it holds %s, the config says %s", index.ErrMalformed, got, s.diffID)
	}
	return nil
}

// spooled is a layer's tar in a file of its own.
type spooled struct {
	*os.File
	size int64
}

// reader gives the tar from its beginning. It can be sought, so that archive/tar
// passes over contents.
func (s *spooled) reader() *io.SectionReader { return io.NewSectionReader(s.File, 0, s.size) }

// maxSpool bounds a tar in a file: as much as a mount could show, and headers.
const maxSpool = index.MaxDataSize + index.MaxEntries<<12

// spool writes the tar to a file without a name in dir, and proves it. Zeroes take
// no room in it.
func (s *layerStream) spool(dir string) (_ *spooled, err error) {
	f, err := nameless(dir)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	var size int64
	buf, zeroes := make([]byte, 256<<10), make([]byte, 256<<10)
	for {
		n, err := io.ReadFull(s, buf)
		if !bytes.Equal(buf[:n], zeroes[:n]) {
			if _, err := f.WriteAt(buf[:n], size); err != nil {
				return nil, err
			}
		}
		if size += int64(n); size > maxSpool {
			return nil, fmt.Errorf("%w: a tar of more than %d bytes", index.ErrMalformed, int64(maxSpool))
		}
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			break
		}
		if err != nil {
			return nil, err
		}
	}
	if err := f.Truncate(size); err != nil {
		return nil, err
	}
	if err := s.end(); err != nil {
		return nil, err
	}
	return &spooled{File: f, size: size}, nil
}

// maxSparse bounds the bytes of a layer's sparse files, holes included: a header
// of a kilobyte gives out as many zeroes as it likes.
const maxSparse = 1 << 40

// layerReader gives the entries of a layer's tar as they are to be written again.
type layerReader struct {
	tr           *tar.Reader
	n            int // entries so far, those that are left out among them
	meta         int64
	data, sparse int64
}

// layerEntry is one of them. It is good until the next.
type layerEntry struct {
	head   *tar.Header
	name   string // as index.Clean gives it
	number int    // of the entry in the tar
	sparse bool   // its contents are not in one piece
}

func newLayerReader(r io.Reader) *layerReader { return &layerReader{tr: tar.NewReader(r)} }

// next gives the next entry, or io.EOF. What writers of lazy layers added is left
// out, and so are global headers, which readers of images pass over.
func (t *layerReader) next() (layerEntry, error) {
	for {
		h, err := t.tr.Next()
		if err == io.EOF {
			return layerEntry{}, err
		}
		// Whether a path is insecure is for index.Clean to say.
		if err != nil && (h == nil || !errors.Is(err, tar.ErrInsecurePath)) {
			return layerEntry{}, fmt.Errorf("tar after %d entries: %w", t.n, err)
		}
		if t.n++; t.n > index.MaxEntries {
			return layerEntry{}, fmt.Errorf("%w: more than %d entries", index.ErrMalformed, index.MaxEntries)
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		e := layerEntry{number: t.n, sparse: isSparse(h)}
		if e.name, err = index.Clean(h.Name); err != nil {
			return e, err
		}
		if slices.Contains(lazyNames, e.name) {
			continue
		}
		if e.name == "" && h.Typeflag != tar.TypeDir {
			return e, fmt.Errorf("%w: the root is not a directory", index.ErrMalformed)
		}
		if e.head, err = again(h); err != nil {
			return e, fmt.Errorf("%.80q: %w", h.Name, err)
		}
		return e, t.bound(&e)
	}
}

// bound holds a layer against what a mount could show.
func (t *layerReader) bound(e *layerEntry) error {
	t.meta += int64(len(e.head.Name) + len(e.head.Linkname))
	for k, v := range e.head.PAXRecords {
		t.meta += int64(len(k) + len(v))
	}
	t.data += e.head.Size
	if e.sparse {
		t.sparse += e.head.Size
	}
	switch {
	case t.meta > index.MaxMeta:
		return fmt.Errorf("%w: more than %d bytes of names and extended attributes", index.ErrMalformed, index.MaxMeta)
	case e.head.Size < 0 || e.head.Size > index.MaxFileSize || t.data > index.MaxDataSize:
		return fmt.Errorf("%w: %.80q: a file of %d bytes, the limit is %d for all", index.ErrMalformed, e.head.Name, e.head.Size, int64(index.MaxDataSize))
	case t.sparse > maxSparse:
		return fmt.Errorf("%w: %.80q: more than %d bytes in sparse files", index.ErrMalformed, e.head.Name, int64(maxSparse))
	}
	return nil
}

// again makes of a header that was read one that is written: the same file, in the
// form that archive/tar writes, with times as fine as they were. A sparse file
// becomes a plain one.
func again(h *tar.Header) (*tar.Header, error) {
	p := &tar.Header{
		Typeflag: h.Typeflag, Name: h.Name, Linkname: h.Linkname, Mode: h.Mode & 0o7777,
		Uid: h.Uid, Gid: h.Gid, Uname: h.Uname, Gname: h.Gname,
		ModTime: h.ModTime, AccessTime: h.AccessTime, ChangeTime: h.ChangeTime,
		Format: tar.FormatPAX,
	}
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		// Of an old type it may have a name as directories do.
		p.Typeflag, p.Size, p.Name = tar.TypeReg, h.Size, strings.TrimRight(h.Name, "/")
	case tar.TypeDir, tar.TypeSymlink, tar.TypeLink, tar.TypeFifo:
	case tar.TypeChar, tar.TypeBlock:
		p.Devmajor, p.Devminor = h.Devmajor, h.Devminor
		if _, err := index.Mkdev(h.Devmajor, h.Devminor); err != nil {
			return nil, err
		}
	default:
		return nil, fmt.Errorf("%w: unhandled tar header type %d (%q)", index.ErrMalformed, h.Typeflag, h.Typeflag)
	}
	if h.Uid < 0 || int64(h.Uid) > math.MaxUint32 || h.Gid < 0 || int64(h.Gid) > math.MaxUint32 {
		return nil, fmt.Errorf("%w: owner %d:%d does not fit 32 bits", index.ErrMalformed, h.Uid, h.Gid)
	}
	for k, v := range h.PAXRecords {
		// The first describe how the contents lay in the old tar, the others are
		// written for the fields of the header.
		if strings.HasPrefix(k, "GNU.sparse.") || index.IsPAXXattr(k) {
			continue
		}
		if p.PAXRecords == nil {
			p.PAXRecords = map[string]string{}
		}
		p.PAXRecords[k] = v
	}
	return p, setXattrs(p, h.PAXRecords)
}

// setXattrs writes extended attributes in the one form that tables of contents
// know, also those that stood in the old header only as libarchive writes them.
func setXattrs(p *tar.Header, records map[string]string) error {
	xattrs, err := index.PAXXattrs(records)
	if err != nil {
		return err
	}
	for _, x := range xattrs {
		if strings.ContainsAny(x.Name, "=\x00") {
			return unfit{fmt.Errorf("the extended attribute %.80q has a name that a PAX header cannot hold", x.Name)}
		}
		if p.PAXRecords == nil {
			p.PAXRecords = map[string]string{}
		}
		p.PAXRecords[paxXattr+x.Name] = string(x.Value)
	}
	return nil
}
