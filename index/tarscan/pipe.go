package tarscan

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"sync"
	"sync/atomic"

	digest "github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/varvefs/varve/index"
	"github.com/varvefs/varve/index/inflate"
	"github.com/varvefs/varve/index/zstdblocks"
)

const (
	bufferSize = 128 << 10
	depth      = 8 // buffers in each channel

	// maxUncompressed bounds the time a small blob can cost.
	maxUncompressed = index.MaxDataSize + index.MaxDataSize/4
)

// buffer is handed from stage to stage; the last to release it gives it back.
type buffer struct {
	b     []byte
	n     int
	point bool // it begins at a point
	refs  atomic.Int32
}

var buffers = sync.Pool{New: func() any { return &buffer{b: make([]byte, bufferSize)} }}

func newBuffer(refs int32) *buffer {
	b := buffers.Get().(*buffer)
	b.refs.Store(refs)
	b.n, b.point = 0, false
	return b
}

func (b *buffer) release() {
	if b.refs.Add(-1) == 0 {
		buffers.Put(b)
	}
}

// send gives v to the next stage, unless the pass has failed.
func send[T any](ctx context.Context, to chan<- T, v T) error {
	select {
	case to <- v:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// decompressor is what reads a compressed blob and stops at its points.
type decompressor interface {
	io.Reader
	AtPoint() bool      // whether what Read gives next begins at a point
	InputOffset() int64 // in the blob
}

// start begins the stages before the tar: reading, the blob's digest, the digests
// of its spans, and unless the blob is the tar itself, decompression and the
// diffID. res has what they found once g has been waited for.
func start(g *errgroup.Group, ctx context.Context, r io.Reader, c Compression, sp *spans, res *Result) <-chan *buffer {
	blob, sum := make(chan *buffer, depth), make(chan *buffer, depth)
	to := []chan<- *buffer{blob, sum}
	if c != Zstd {
		spanSum := make(chan *buffer, depth)
		to = append(to, spanSum)
		if c == Gzip {
			sp.marks = make(chan mark, depth)
			g.Go(func() error { return sp.hash(spanSum) })
		} else {
			g.Go(func() error { return sp.hashPlain(spanSum) })
		}
	}
	atPoint := nowhere
	if c == Plain {
		e := &every{r: r, span: sp.span}
		r, atPoint = e, e.atPoint
	}
	g.Go(func() error {
		n, err := pump(ctx, r, atPoint, index.MaxBlobFrame, to...)
		res.Size = n
		if err != nil {
			return fmt.Errorf("read blob at %d: %w", n, err)
		}
		return nil
	})
	g.Go(func() error {
		d, err := digestOf(ctx, sum)
		res.Digest = d
		return err
	})
	if c == Plain {
		return blob
	}
	out, outSum := make(chan *buffer, depth), make(chan *buffer, depth)
	g.Go(func() error {
		in := newStream(ctx, blob)
		defer in.close()
		n, err := sp.decompress(in, c, out, outSum)
		res.Uncompressed = n
		switch {
		case err == nil:
			return nil
		case in.err != nil: // the stage before failed, or the pass
			return in.err
		case errors.Is(err, index.ErrMalformed) || errors.Is(err, context.Canceled):
			return err
		case errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF):
			return fmt.Errorf("%w: %s is truncated after %d bytes", index.ErrMalformed, c, in.n)
		}
		return fmt.Errorf("%w: %s at about %d bytes: %w", index.ErrMalformed, c, in.n, err)
	})
	g.Go(func() error {
		d, err := digestOf(ctx, outSum)
		res.DiffID = d
		return err
	})
	return out
}

// decompress reads a compressed blob to its end.
func (s *spans) decompress(in io.Reader, c Compression, to ...chan<- *buffer) (int64, error) {
	var d decompressor
	if c == Gzip {
		d = inflate.NewReader(in, inflate.Options{Want: s.want, Point: s.made})
		defer close(s.marks)
	} else {
		z := zstdblocks.NewReader(in, zstdblocks.Options{Want: s.wantBlock, Point: s.points.Add})
		defer z.Close()
		d = z
	}
	return pump(s.ctx, &marking{d: d, spans: s}, d.AtPoint, maxUncompressed, to...)
}

// marking reads a decompressor and lets what it has read be hashed.
type marking struct {
	d     decompressor
	spans *spans
}

func (p *marking) Read(b []byte) (int, error) {
	n, err := p.d.Read(b)
	if p.spans.marks != nil && n > 0 {
		// What was read of the last byte may belong to the next span as well.
		if err := send(p.spans.ctx, p.spans.marks, mark{upto: p.d.InputOffset() - 1}); err != nil {
			return n, err
		}
	}
	return n, err
}

func nowhere() bool { return false }

// pump reads r to its end into buffers for every channel, which it then closes.
// No buffer has bytes from both sides of a point. After an error they stay open,
// so that no stage takes it for the end.
func pump(ctx context.Context, r io.Reader, atPoint func() bool, limit int64, to ...chan<- *buffer) (total int64, err error) {
	for {
		b := newBuffer(int32(len(to)))
		b.point = atPoint()
		var err error
		for b.n < len(b.b) && err == nil && (b.n == 0 || !atPoint()) {
			var n int
			n, err = r.Read(b.b[b.n:])
			b.n += n
			if b.n == 0 {
				b.point = atPoint()
			}
		}
		total += int64(b.n)
		if total > limit {
			return total, fmt.Errorf("%w: more than %d bytes", index.ErrMalformed, limit)
		}
		if err != nil && err != io.EOF {
			return total, err
		}
		if b.n > 0 {
			for _, c := range to {
				if err := send(ctx, c, b); err != nil {
					return total, err
				}
			}
		}
		if err == io.EOF {
			for _, c := range to {
				close(c)
			}
			return total, nil
		}
	}
}

// digestOf hashes what it is sent.
func digestOf(ctx context.Context, in <-chan *buffer) (digest.Digest, error) {
	var sum hash.Hash = sha256.New()
	for {
		select {
		case b, ok := <-in:
			if !ok {
				return digest.NewDigest(digest.SHA256, sum), nil
			}
			sum.Write(b.b[:b.n])
			b.release()
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
}

// stream reads what a stage is sent.
type stream struct {
	ctx   context.Context
	in    <-chan *buffer
	cur   *buffer
	rest  []byte
	n     int64  // bytes read so far
	first []byte // the first of them
	err   error  // why there will be no more, other than the end

	fresh bool  // nothing of cur was read
	span  int   // in which span the byte before n lies, the first is 0; -1 before any
	begin int64 // where that span began
	gaps  *skeletonWriter
	mute  bool // what is read are a file's contents
}

func newStream(ctx context.Context, in <-chan *buffer) *stream {
	return &stream{ctx: ctx, in: in, span: -1}
}

func (s *stream) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if err := s.load(); err != nil {
		return 0, err
	}
	if s.fresh {
		s.fresh = false
		if s.cur.point {
			s.span, s.begin = s.span+1, s.n
		}
	}
	n := copy(p, s.rest)
	if s.gaps != nil && !s.mute {
		if err := s.gaps.add(p[:n]); err != nil {
			s.err = err
			return 0, err
		}
	}
	if len(s.first) < 16 {
		s.first = append(s.first, s.rest[:min(n, 16-len(s.first))]...)
	}
	s.rest = s.rest[n:]
	s.n += int64(n)
	return n, nil
}

// load makes sure that something is there to be read.
func (s *stream) load() error {
	for len(s.rest) == 0 {
		s.close()
		select {
		case b, ok := <-s.in:
			if !ok {
				return io.EOF
			}
			s.cur, s.rest, s.fresh = b, b.b[:b.n], true
		case <-s.ctx.Done():
			s.err = s.ctx.Err()
			return s.err
		}
	}
	return nil
}

// ahead tells how many bytes can be read that lie in one span, and whether they
// are the first of it.
func (s *stream) ahead() (n int, first bool, err error) {
	if err := s.load(); err != nil {
		return 0, false, err
	}
	return len(s.rest), s.fresh && s.cur.point, nil
}

func (s *stream) close() {
	if s.cur != nil {
		s.cur.release()
		s.cur, s.rest = nil, nil
	}
}
