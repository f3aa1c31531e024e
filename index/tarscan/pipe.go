package tarscan

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"sync"
	"sync/atomic"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	digest "github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/varvefs/varve/index"
)

const (
	bufferSize = 128 << 10
	depth      = 8         // buffers in each channel
	maxWindow  = 128 << 20 // of a zstd frame, in bytes

	// maxUncompressed bounds the time a small blob can cost.
	maxUncompressed = index.MaxDataSize + index.MaxDataSize/4
)

// buffer is handed from stage to stage; the last to release it gives it back.
type buffer struct {
	b    []byte
	n    int
	refs atomic.Int32
}

var buffers = sync.Pool{New: func() any { return &buffer{b: make([]byte, bufferSize)} }}

func newBuffer(refs int32) *buffer {
	b := buffers.Get().(*buffer)
	b.refs.Store(refs)
	b.n = 0
	return b
}

func (b *buffer) release() {
	if b.refs.Add(-1) == 0 {
		buffers.Put(b)
	}
}

func (b *buffer) releaseIf(held bool) {
	if held {
		b.release()
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

// start begins the stages before the tar: reading, the blob's digest, and unless
// the blob is the tar itself, decompression and the diffID. res has what they
// found once g has been waited for.
func start(g *errgroup.Group, ctx context.Context, r io.Reader, c Compression, res *Result) <-chan *buffer {
	blob, blobSum := make(chan *buffer, depth), make(chan *buffer, depth)
	g.Go(func() error {
		n, err := pump(ctx, r, index.MaxBlobFrame, blob, blobSum)
		res.Size = n
		if err != nil {
			return fmt.Errorf("read blob at %d: %w", n, err)
		}
		return nil
	})
	g.Go(func() error {
		d, err := digestOf(ctx, blobSum)
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
		var n int64
		var err error
		if c == Gzip {
			n, err = pump(ctx, &gunzip{in: bufio.NewReaderSize(in, bufferSize)}, maxUncompressed, out, outSum)
		} else {
			n, err = unzstd(ctx, in, out, outSum)
		}
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
		case errors.Is(err, zstd.ErrWindowSizeExceeded) || errors.Is(err, zstd.ErrDecoderSizeExceeded):
			return fmt.Errorf("%w: zstd window is larger than %d bytes", index.ErrMalformed, maxWindow)
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

// pump reads r to its end into buffers for every channel, which it then closes.
// After an error they stay open, so that no stage takes it for the end.
func pump(ctx context.Context, r io.Reader, limit int64, to ...chan<- *buffer) (total int64, err error) {
	for {
		b := newBuffer(int32(len(to)))
		var err error
		for b.n < len(b.b) && err == nil {
			var n int
			n, err = r.Read(b.b[b.n:])
			b.n += n
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
}

func newStream(ctx context.Context, in <-chan *buffer) *stream { return &stream{ctx: ctx, in: in} }

func (s *stream) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for len(s.rest) == 0 {
		s.close()
		select {
		case b, ok := <-s.in:
			if !ok {
				return 0, io.EOF
			}
			s.cur, s.rest = b, b.b[:b.n]
		case <-s.ctx.Done():
			s.err = s.ctx.Err()
			return 0, s.err
		}
	}
	n := copy(p, s.rest)
	if len(s.first) < 16 {
		s.first = append(s.first, s.rest[:min(n, 16-len(s.first))]...)
	}
	s.rest = s.rest[n:]
	s.n += int64(n)
	return n, nil
}

func (s *stream) close() {
	if s.cur != nil {
		s.cur.release()
		s.cur, s.rest = nil, nil
	}
}

// unzstd decompresses frame after frame; skippable ones are skipped.
func unzstd(ctx context.Context, in io.Reader, to ...chan<- *buffer) (int64, error) {
	dec, err := zstd.NewReader(in, zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderMaxMemory(1<<62))
	if err != nil {
		return 0, err
	}
	defer dec.Close() // waits for the decoder's own goroutines
	return pump(ctx, dec, maxUncompressed, to...)
}

// gunzip reads the members of a gzip blob one after the other. Zeroes may follow
// the last, as gzip(1) allows; anything else is refused, since what readers that
// stop there see would not be what others see.
type gunzip struct {
	in     *bufio.Reader
	zr     *gzip.Reader
	begun  bool
	within bool // in a member
}

func (g *gunzip) Read(p []byte) (int, error) {
	for {
		if !g.within {
			if err := g.member(); err != nil {
				return 0, err
			}
		}
		n, err := g.zr.Read(p)
		if err == io.EOF {
			g.within, err = false, nil
		}
		if n > 0 || err != nil {
			return n, err
		}
	}
}

// member opens the next member, or gives io.EOF after the last.
func (g *gunzip) member() error {
	next, err := g.in.Peek(2)
	if len(next) == 0 {
		return err
	}
	if g.begun && next[0] == 0 {
		return g.padding()
	}
	if g.begun && string(next) != "\x1f\x8b" {
		return fmt.Errorf("%w: gzip has other data after its end: %x", index.ErrMalformed, next)
	}
	if g.zr == nil {
		g.zr, err = gzip.NewReader(g.in)
	} else {
		err = g.zr.Reset(g.in)
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return err
	}
	g.zr.Multistream(false)
	g.begun, g.within = true, true
	return nil
}

func (g *gunzip) padding() error {
	for {
		next, err := g.in.Peek(1)
		if len(next) == 0 {
			return err
		}
		next, _ = g.in.Peek(g.in.Buffered())
		if !isZero(next) {
			return fmt.Errorf("%w: gzip has other data after its zero padding", index.ErrMalformed)
		}
		if _, err := g.in.Discard(len(next)); err != nil {
			return err
		}
	}
}
