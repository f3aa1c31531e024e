package commit

import (
	"archive/tar"
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"maps"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/varvefs/varve/index"
)

// Compression names the form of a layer's blob.
type Compression string

// The forms a layer can be packed in. The empty string means [EStargz].
const (
	EStargz     Compression = "estargz"      // gzip whose files can be fetched one by one
	Gzip        Compression = "gzip"         // plain gzip
	Zstd        Compression = "zstd"         // plain zstd
	ZstdChunked Compression = "zstd:chunked" // zstd whose chunks can be fetched one by one, as Podman writes it
)

// ErrChanged says that a file had other than the promised number of bytes.
var ErrChanged = errors.New("changed while it was read")

var compressions = []Compression{EStargz, Gzip, Zstd, ZstdChunked}

// ParseCompression reads the name of a compression; the empty string is
// [EStargz]. The error names what is possible.
func ParseCompression(s string) (Compression, error) {
	if s == "" {
		return EStargz, nil
	}
	if c := Compression(s); slices.Contains(compressions, c) {
		return c, nil
	}
	names := make([]string, len(compressions))
	for i, c := range compressions {
		names[i] = string(c)
	}
	return "", fmt.Errorf("unknown compression %q: choose one of %s", s, strings.Join(names, ", "))
}

const dockerGzip = "application/vnd.docker.image.rootfs.diff.tar.gzip"

// MediaType gives the media type of a layer in OCI's or docker's family. Docker's
// has none for zstd.
func (c Compression) MediaType(docker bool) (string, error) {
	c, err := ParseCompression(string(c))
	if err != nil {
		return "", err
	}
	switch {
	case c == Zstd || c == ZstdChunked:
		if docker {
			return "", fmt.Errorf("docker's image format has no layers of %s: choose the OCI format, or gzip", c)
		}
		return ocispec.MediaTypeImageLayerZstd, nil
	case docker:
		return dockerGzip, nil
	}
	return ocispec.MediaTypeImageLayerGzip, nil
}

// PackOptions configure a [Packer].
type PackOptions struct {
	Compression Compression // "" is EStargz
	Workers     int         // that compress, 0 for GOMAXPROCS; more than maxWorkers are not used
}

// Packed describes a layer that was packed.
type Packed struct {
	Digest       digest.Digest // of the blob
	DiffID       digest.Digest // of the tar in it
	Size         int64         // bytes of the blob
	Uncompressed int64         // bytes of the tar
	Compression  Compression
	Annotations  map[string]string // for the layer's descriptor, nil for none
}

// Packer writes the blob of one layer, entry by entry, in one pass: the tar is
// hashed, cut into frames, compressed on all cores and written in order. The
// bytes depend on the entries and the compression alone, not on the number of
// workers or the machine.
//
// What is in flight is bounded, see [inFlight]; beside it, the two compressions
// with a table of contents hold that, some 400 bytes a file.
//
// A Packer is for one goroutine. After an error it takes no more entries.
// [Packer.Close] must be called in every case.
type Packer struct {
	compression Compression
	tar         *tar.Writer
	cut         cutter // where the tar goes
	line        *line  // where its frames go
	toc         toc    // nil without one
	buf         []byte // what is read of a file
	closed      bool
}

// toc gathers a table of contents. Its check is called by the goroutine that
// adds, its entry by the one that writes, its end after both.
type toc interface {
	// check refuses a header that the table cannot hold.
	check(h *tar.Header) error
	// entry is given an entry, in order, once its contents have their place in
	// the blob.
	entry(e *entry) error
	// end gives what follows the last member in the blob and what of that is
	// of the tar, and the descriptor's annotations. off is the blob's size so
	// far, size the tar's.
	end(off, size int64) (tail, tarred []byte, annotations map[string]string, err error)
}

// NewPacker starts a layer that is written to w. It does not close w.
func NewPacker(w io.Writer, o PackOptions) *Packer {
	p := &Packer{buf: make([]byte, 256<<10)}
	c, err := ParseCompression(string(o.Compression))
	p.compression = c
	f := gzipForm
	switch c {
	case EStargz:
		f, p.toc = stargzForm, newStargz()
	case ZstdChunked:
		split := newTarSplit()
		f, p.toc, p.cut.split = chunkedForm, newChunked(split), split
	case Zstd:
		f = zstdForm
	}
	workers := o.Workers
	if workers <= 0 {
		workers = runtime.GOMAXPROCS(0)
	}
	p.line = newLine(w, f, p.toc, min(workers, maxWorkers))
	p.cut.form, p.cut.line = f, p.line
	p.tar = tar.NewWriter(&p.cut)
	p.line.fail(err)
	if c == EStargz {
		if err := p.add(context.Background(), asWritten(stargzLandmark()), strings.NewReader(landmarkContent)); err != nil {
			p.line.fail(err)
		}
	}
	return p
}

// Add packs one entry with its content, of which r must give exactly h.Size
// bytes, else the error is [ErrChanged]; r is nil for what has none. The header is
// written as archive/tar writes it. When ctx ends, Add fails with its error. An
// error may also be that of writing what was added before.
func (p *Packer) Add(ctx context.Context, h *tar.Header, r io.Reader) error {
	if p.closed {
		return errors.New("pack layer: packer is closed")
	}
	if p.line.failed() == nil {
		c := asWritten(h)
		err := p.check(c)
		if err == nil {
			err = p.add(ctx, c, r)
		}
		if err != nil {
			p.line.fail(fmt.Errorf("%s: %w", h.Name, err))
		}
	}
	return p.failed()
}

func (p *Packer) failed() error {
	if err := p.line.failed(); err != nil {
		return fmt.Errorf("pack layer: %w", err)
	}
	return nil
}

func (p *Packer) check(h *tar.Header) error {
	if h.Size < 0 || h.Size > 0 && h.Typeflag != tar.TypeReg {
		return fmt.Errorf("size of %d bytes for an entry of type %q", h.Size, h.Typeflag)
	}
	if h.Size > index.MaxFileSize {
		return fmt.Errorf("a file of %d bytes, of which a mount could show %d", h.Size, int64(index.MaxFileSize))
	}
	if p.toc == nil {
		return nil
	}
	return p.toc.check(h)
}

// Check refuses what [Packer.Add] would refuse of a header, before anything is
// read.
func (p *Packer) Check(h *tar.Header) error {
	if err := p.check(asWritten(h)); err != nil {
		return fmt.Errorf("pack layer: %s: %w", h.Name, err)
	}
	return nil
}

// add packs an entry. It keeps h.
func (p *Packer) add(ctx context.Context, h *tar.Header, r io.Reader) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	p.cut.ctx = ctx
	defer func() { p.cut.ctx = nil }()
	if err := p.tar.WriteHeader(h); err != nil {
		return err
	}
	if err := p.cut.begin(h, h.Size); err != nil {
		return err
	}
	if err := p.content(ctx, r, h.Size); err != nil {
		return err
	}
	return p.tar.Flush()
}

// content copies size bytes of r, which must be all of it.
func (p *Packer) content(ctx context.Context, r io.Reader, size int64) error {
	var at int64
	for r != nil {
		// One byte more than there should be finds a file that has grown.
		n, err := r.Read(p.buf[:min(int64(len(p.buf)), size-at+1)])
		if at += int64(n); at > size {
			return fmt.Errorf("%w: it has more than the %d bytes it had", ErrChanged, size)
		}
		if n > 0 {
			if _, err := p.tar.Write(p.buf[:n]); err != nil {
				return err
			}
		}
		if err == io.EOF {
			break
		}
		if err == nil {
			err = cmp.Or(ctx.Err(), p.line.failed())
		}
		if err != nil {
			return err
		}
	}
	if at < size {
		return fmt.Errorf("%w: it has %d bytes instead of %d", ErrChanged, at, size)
	}
	return nil
}

// Close ends the layer, and waits for all that the packer started, also after an
// error, which it then gives again. It waits for the writer's last Write, so who
// cancels sees to it that it returns.
func (p *Packer) Close() (*Packed, error) {
	if p.closed {
		return nil, errors.New("pack layer: packer is closed")
	}
	p.closed = true
	if p.line.failed() == nil {
		p.line.fail(p.end())
	}
	p.line.wait()
	if err := p.failed(); err != nil {
		return nil, err
	}
	l := p.line
	out := &Packed{Compression: p.compression}
	if p.toc != nil {
		tail, tarred, annotations, err := p.toc.end(l.written, l.size)
		if err != nil {
			return nil, fmt.Errorf("pack layer: table of contents: %w", err)
		}
		hashBoth(l.diffID, tarred, l.digest, tail)
		l.size += int64(len(tarred))
		if err := l.write(tail); err != nil {
			return nil, fmt.Errorf("pack layer: %w", err)
		}
		out.Annotations = annotations
	}
	out.Digest = digest.NewDigest(digest.SHA256, l.digest)
	out.DiffID = digest.NewDigest(digest.SHA256, l.diffID)
	out.Size, out.Uncompressed = l.written, l.size
	return out, nil
}

// end hands on what is left of the tar.
func (p *Packer) end() error {
	p.cut.ctx = context.Background()
	if p.compression != EStargz { // whose tar ends after its table of contents
		if err := p.tar.Close(); err != nil {
			return err
		}
	}
	p.cut.flush()
	return nil
}

func hashBoth(a hash.Hash, p []byte, b hash.Hash, q []byte) {
	var wg sync.WaitGroup
	wg.Go(func() { a.Write(p) })
	b.Write(q)
	wg.Wait()
}

// asWritten gives a copy of a header with the type and times that archive/tar
// writes for it, as a table of contents must have them too.
func asWritten(h *tar.Header) *tar.Header {
	c := *h
	c.PAXRecords = maps.Clone(h.PAXRecords)
	if c.Typeflag == 0 {
		c.Typeflag = tar.TypeReg
		if strings.HasSuffix(c.Name, "/") {
			c.Typeflag = tar.TypeDir
		}
	}
	if c.Format == tar.FormatUnknown {
		c.ModTime = c.ModTime.Round(time.Second)
		c.AccessTime, c.ChangeTime = time.Time{}, time.Time{}
	}
	if c.ModTime.IsZero() {
		c.ModTime = time.Unix(0, 0)
	}
	return &c
}
