package fetch

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"slices"
	"sync"

	"github.com/varvefs/varve/index"
)

const (
	// wholeFrame is up to what compressed size a frame is read into memory, so
	// that it is decompressed beside the next one's transfer.
	wholeFrame = 16 << 20
	// maxSpan is the same for a span that is to be verified before it is
	// decompressed.
	maxSpan = 64 << 20
)

func (l *Layer) wholeFrame(n int) int64 {
	if l.byFrame {
		return maxSpan
	}
	return wholeFrame
}

// run brings frames that one request can bring, and lands each, come what may.
func (l *Layer) run(frames []int) {
	if l.frames.Frame(frames[0]).Kind == index.Stream {
		l.restream(frames)
		return
	}
	blob, err := l.blob()
	if err != nil {
		l.landAll(frames, err)
		return
	}
	first, last := l.frames.Frame(frames[0]), l.frames.Frame(frames[len(frames)-1])
	r := l.open(blob, first.Offset, last.Offset+last.Length)
	r.ranged = true
	left, err := l.read(r, frames)
	r.Close()
	if !errors.Is(err, errUnranged) {
		l.landAll(left, err)
		return
	}
	// The whole blob comes or nothing: then let it fill all it can.
	l.f.m.LazyFallbacks.WithLabelValues("no_range").Inc()
	l.f.log.Warn("the registry does not serve ranges: the layer is read whole", "layer", l.Digest)
	all := merge(left, l.claimRest(false))
	r = l.open(blob, 0, blob.Size())
	left, err = l.read(r, all)
	r.Close()
	l.landAll(left, err)
}

func (l *Layer) landAll(frames []int, err error) {
	for _, f := range frames {
		l.land(f, err)
	}
}

// read takes frames, in the order of the blob, out of one body, decompresses
// them on all cores and lands them. It gives back those that err kept from it.
func (l *Layer) read(r *reader, frames []int) (left []int, err error) {
	var wg sync.WaitGroup
	defer wg.Wait()
	var last []byte // the byte that was read last: a frame may begin in it
	for i, n := range frames {
		f := l.frames.Frame(n)
		if gap := f.Offset - r.off; gap > 0 {
			if _, err := io.CopyN(io.Discard, r, gap); err != nil {
				return frames[i:], err
			}
		}
		var shared []byte // with the frame before
		if f.Offset < r.off {
			shared = last
		}
		if f.Length > l.wholeFrame(n) {
			body := &ending{r: io.MultiReader(bytes.NewReader(shared), io.LimitReader(r, f.Length-int64(len(shared))))}
			derr := l.decode(n, body)
			if _, err := io.Copy(io.Discard, body); err != nil {
				return frames[i:], err
			}
			last = body.last
			l.landed(n, r.spoilt, derr)
			continue
		}
		buf := make([]byte, f.Length)
		if _, err := io.ReadFull(r, buf[copy(buf, shared):]); err != nil {
			return frames[i:], err
		}
		last = buf[len(buf)-1:]
		spoilt := r.spoilt
		l.f.cpu <- struct{}{}
		wg.Go(func() {
			defer func() { <-l.f.cpu }()
			l.landed(n, spoilt, l.decode(n, bytes.NewReader(buf)))
		})
	}
	return nil, nil
}

// ending keeps the last byte that was read.
type ending struct {
	r    io.Reader
	last []byte
}

func (e *ending) Read(p []byte) (int, error) {
	n, err := e.r.Read(p)
	if n > 0 {
		e.last = append(e.last[:0], p[n-1])
	}
	return n, err
}

// decode decompresses a frame into the data file.
func (l *Layer) decode(n int, r io.Reader) error {
	f := l.frames.Frame(n)
	pieces := l.frames.FramePieces(n)
	var point index.Point
	if f.Point > 0 {
		var err error
		if point, err = l.points.Point(f.Point - 1); err != nil {
			return err
		}
	}
	if l.byFrame {
		buf, ok := r.(*bytes.Reader)
		if !ok {
			return fmt.Errorf("%w: a span of %d bytes", index.ErrMalformed, f.Length)
		}
		h := sha256.New()
		buf.WriteTo(h)
		buf.Seek(0, io.SeekStart)
		if sum := sumOf(h); sum != point.Digest {
			return fmt.Errorf("%w: a span of %d bytes has sha256:%x, its index says sha256:%x", ErrVerify, f.Length, sum, point.Digest)
		}
	}
	sum, err := decode(r, f.Kind, point, pieces, l.data.File())
	if err == nil {
		l.data.SetSum(n, sum)
	}
	return err
}

// landed lands a frame that was read. One that does not verify is asked for once
// more, from another origin where there is one: a proxy may have spoilt it.
func (l *Layer) landed(n int, spoilt func(), err error) {
	if errors.Is(err, ErrVerify) {
		l.f.m.VerifyFailures.WithLabelValues("chunk").Inc()
		if l.ctx.Err() == nil {
			spoilt()
			if err = l.again(n); errors.Is(err, ErrVerify) {
				l.doubtIndex(err)
			}
		}
	}
	if err == nil {
		l.f.m.ReadBytes.WithLabelValues("registry").Add(float64(sizeOf(l.frames.FramePieces(n))))
	}
	l.land(n, err)
}

func (l *Layer) again(n int) error {
	blob, err := l.blob()
	if err != nil {
		return err
	}
	f := l.frames.Frame(n)
	r := l.open(blob, f.Offset, f.Offset+f.Length)
	defer r.Close()
	var in io.Reader = r
	if f.Length <= l.wholeFrame(n) {
		buf := make([]byte, f.Length)
		if _, err := io.ReadFull(r, buf); err != nil {
			return err
		}
		in = bytes.NewReader(buf)
	}
	if err := l.decode(n, in); r.err == nil {
		return err
	}
	return r.err
}

// open gives a reader of the blob that counts for this layer.
func (l *Layer) open(blob Blob, from, to int64) *reader {
	r := newReader(withReason(l.ctx, "demand"), blob, from, to, l.f.patience)
	if remote(blob) {
		r.count = func(n int) {
			l.data.AddFetched(int64(n))
			l.f.m.FetchBytes.WithLabelValues("demand").Add(float64(n))
		}
	}
	r.retry = l.f.m.FetchRetries.WithLabelValues("demand").Inc
	return r
}

// blob gives the blob as the open handles have it, the newest first.
func (l *Layer) blob() (anyOf, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.sources) == 0 {
		return nil, fmt.Errorf("%v: %w", l, ErrOffline)
	}
	blobs := make(anyOf, 0, len(l.sources))
	for _, h := range slices.Backward(l.sources) {
		blobs = append(blobs, h.blob)
	}
	return blobs, nil
}

// checkPiece compares a piece in a data file with its digest, or adds one without
// to a sum.
func checkPiece(f *os.File, p *index.Piece, rest *uint32) error {
	h := sha256.New()
	var to io.Writer = h
	if p.Digest == unknown {
		to = (*adding)(rest)
	}
	if n, err := io.CopyN(to, io.NewSectionReader(f, p.Data, p.Size), p.Size); err != nil {
		return fmt.Errorf("%w: %d of %d bytes: %w", ErrVerify, n, p.Size, err)
	}
	if sum := sumOf(h); sum != p.Digest && p.Digest != unknown {
		return mismatch(p, sum)
	}
	return nil
}

// adding is the sum of what is written to it.
type adding uint32

func (a *adding) Write(p []byte) (int, error) {
	*a = adding(crc32.Update(uint32(*a), castagnoli, p))
	return len(p), nil
}

// merge gives the union of two ascending lists.
func merge(a, b []int) []int {
	out := make([]int, 0, len(a)+len(b))
	for len(a) > 0 && len(b) > 0 {
		if a[0] < b[0] {
			out, a = append(out, a[0]), a[1:]
		} else {
			out, b = append(out, b[0]), b[1:]
		}
	}
	return append(append(out, a...), b...)
}
