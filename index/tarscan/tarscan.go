// Package tarscan reads layers that bring no table of contents: one pass over
// the blob, from its first byte to its last, gives the entries, fills the data
// file, and proves the digests of blob and contents on the way.
package tarscan

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"

	digest "github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/varvefs/varve/index"
)

// PieceSize is how much of a file one piece proves, in bytes. A file's last
// piece is shorter.
const PieceSize = 4 << 20

// Compression is how a blob is compressed as a whole.
type Compression uint8

// The compressions of layers.
const (
	Plain Compression = iota
	Gzip
	Zstd
)

func (c Compression) String() string {
	switch c {
	case Plain:
		return "plain"
	case Gzip:
		return "gzip"
	case Zstd:
		return "zstd"
	}
	return fmt.Sprintf("compression %d", uint8(c))
}

// Detect tells the compression of a blob from its first bytes, of which four are
// enough. Media types are not to be trusted for it: images in the field name
// others than they have.
func Detect(first []byte) Compression {
	switch {
	case len(first) >= 3 && first[0] == 0x1f && first[1] == 0x8b && first[2] == 8:
		return Gzip
	case len(first) < 4:
		return Plain
	case string(first[:4]) == "\x28\xb5\x2f\xfd":
		return Zstd
	case first[0]&0xf0 == 0x50 && string(first[1:4]) == "\x2a\x4d\x18": // a skippable frame
		return Zstd
	}
	return Plain
}

// Sink is the data file. What is not written to it reads as zeroes; its size is
// that of the layer's frame table.
type Sink interface {
	WriteAt(p []byte, off int64) (int, error)
}

// Passing is told of a layer while it passes, in the order of the tar. Its methods
// are called from one goroutine, and hold up the pass.
type Passing interface {
	// Entry comes before the contents of a file do, which will lie at its Data.
	Entry(e index.Entry) error
	// Passed says that the data file holds everything before off.
	Passed(off int64)
}

// Options say what a pass makes beside the layer. The zero value will do.
type Options struct {
	Span       int64     // bytes of the decompressed blob between points, 0 for DefaultSpan
	DigestSpan int64     // bytes of it that a point's digest covers, 0 for DefaultDigestSpan
	Skeleton   io.Writer // is given the tar without its contents, see [OpenSkeleton]; nil: not wanted
	Passing    Passing   // nil: nobody
}

// Result is what a pass proves of a blob. The caller compares it with what the
// image promises, and drops the layer and the data file if they differ.
type Result struct {
	Digest       digest.Digest // of the blob
	DiffID       digest.Digest // of the decompressed blob
	Size         int64         // of the blob, in bytes
	Uncompressed int64         // of the decompressed blob, in bytes
}

// Scan reads the blob in r to its end. The contents of its regular files go to
// sink at the offsets of their entries, except for blocks of zeroes; runs of
// zeroes that fill a piece are left out of the frame table as well. A compressed
// blob is cut into frames at points that are made on the way, from which each can
// be decompressed by itself.
//
// r is read until Scan returns and no longer. What ctx ends is more than reading: a
// small blob can decompress for long. Errors wrap [index.ErrMalformed]
// unless r, sink or what is in o failed.
func Scan(ctx context.Context, r io.Reader, c Compression, sink Sink, o Options) (*index.Layer, Result, error) {
	if c > Zstd {
		return nil, Result{}, fmt.Errorf("scan layer: %s", c)
	}
	g, ctx := errgroup.WithContext(ctx)
	s := &scanner{
		ctx: ctx, sink: sink, c: c, b: index.NewBuilder(index.Stream), passing: o.Passing,
		proofs: make(chan proof, depth),
	}
	if o.Skeleton != nil {
		var err error
		if s.gaps, err = newSkeletonWriter(o.Skeleton); err != nil {
			return nil, Result{}, err
		}
	}
	sp := newSpans(ctx, c, o)
	s.named = func(n int64) { sp.named.Add(n) }
	var res Result
	tarBufs := start(g, ctx, r, c, sp, &res)
	g.Go(func() error {
		defer close(s.proofs)
		return s.scan(tarBufs)
	})
	g.Go(func() error { return prove(ctx, s.proofs) })
	err := g.Wait()
	if err == nil && s.gaps != nil {
		err = s.gaps.close()
	}
	if err != nil {
		return nil, Result{}, fmt.Errorf("scan layer: %w", err)
	}
	if c == Plain {
		res.DiffID, res.Uncompressed = res.Digest, res.Size
	}
	points := sp.end()
	s.frames(points, res.Size)
	// The frames say themselves where they lie: nothing is bounded by the end.
	l, err := s.b.Layer(res.Size)
	if err != nil {
		return nil, Result{}, fmt.Errorf("scan layer: %w", err)
	}
	l.Points = points
	return l, res, nil
}

// scanner is the part of a pass that knows of tar and files.
type scanner struct {
	ctx     context.Context // ends when another part of the pass fails
	sink    Sink
	c       Compression
	b       *index.Builder
	gaps    *skeletonWriter // nil where nobody wants a skeleton
	passing Passing         // nil where nobody is told
	named   func(n int64)   // told what a zTOC has for each entry
	in      *stream
	proofs  chan proof
	sparse  int64      // bytes of sparse files so far
	pieces  []*pending // those that are not all zeroes, in the order of the data file
}

// pending is a piece that waits for its digest.
type pending struct {
	piece index.Piece // its digest is set by prove; Inner counts from the span's beginning
	span  int         // the span that it comes from, -1 where it lies in none by itself
}

// frames gives the pieces their frames, the spans between two points. What can
// only be had by another pass comes last.
func (s *scanner) frames(points *index.Points, size int64) {
	n := 0
	if points != nil {
		n = points.Len()
	}
	kind := [...]index.Kind{Plain: index.Raw, Gzip: index.Deflate, Zstd: index.Blocks}[s.c]
	for i := range n {
		p, end := points.At(i), size
		if i+1 < n {
			end = points.At(i + 1).In
		}
		s.b.AddFrame(index.Frame{Offset: p.Start(), Length: end - p.Start(), Kind: kind, Point: i + 1})
	}
	for _, p := range s.pieces {
		p.piece.Frame = p.span
		if p.span < 0 || p.span >= n {
			p.piece.Inner = 0
			p.piece.Frame = s.b.AddFrame(index.Frame{Kind: index.Stream})
		}
		s.b.AddPiece(p.piece)
	}
}

// scan reads the tar and then what follows it, which belongs to the diffID.
func (s *scanner) scan(bufs <-chan *buffer) error {
	s.in = newStream(s.ctx, bufs)
	s.in.gaps = s.gaps
	defer s.in.close()
	tr := tar.NewReader(s.in)
	for n := 0; ; n++ {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		// Whether a path is insecure is for [index.Clean] to say.
		if err != nil && (h == nil || !errors.Is(err, tar.ErrInsecurePath)) {
			return s.bad(n, err)
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		e, err := convert(h)
		if err != nil {
			return err
		}
		full := e.IsRegular() && e.Size > 0
		if full {
			if e.Data, err = s.b.Reserve(e.Size); err != nil {
				return fmt.Errorf("%.80q: %w", h.Name, err)
			}
		}
		if err := s.b.Add(e); err != nil {
			return fmt.Errorf("%.80q: %w", h.Name, err)
		}
		s.named(int64(ztocEntry + len(e.Name) + len(e.Link)))
		if s.passing != nil {
			if err := s.passing.Entry(e); err != nil {
				return err
			}
		}
		if full {
			if err := s.contents(tr, h, &e); err != nil {
				return err
			}
		}
	}
	n, err := io.Copy(io.Discard, io.LimitReader(s.in, maxTrailing+1))
	if n > maxTrailing {
		return fmt.Errorf("%w: more than %d bytes follow the end of the tar", index.ErrMalformed, int64(maxTrailing))
	}
	return err
}

// maxTrailing bounds what may follow a tar's end. Writers pad to a record, of some
// KiB mostly.
const maxTrailing = 64 << 20

// bad says what is wrong with a tar after n entries.
func (s *scanner) bad(n int, err error) error {
	switch {
	case s.in.err != nil:
		return s.in.err
	case errors.Is(err, tar.ErrHeader) && n == 0:
		return fmt.Errorf("%w: layer is not a tar archive: first bytes %x", index.ErrMalformed, s.in.first)
	case errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("%w: tar is truncated after %d entries and %d bytes: first bytes %x", index.ErrMalformed, n, s.in.n, s.in.first)
	}
	return fmt.Errorf("%w: tar after %d entries, at %d bytes: %w", index.ErrMalformed, n, s.in.n, err)
}
