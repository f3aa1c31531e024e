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

// wholeFrame is up to what compressed size a frame is read into memory, so that it
// is decompressed beside the next one's transfer. A larger one, which none of the
// known writers makes, is decompressed as it comes, or from a file where it must be
// verified first.
const wholeFrame = 4 << 20

// run brings frames that one request can bring, and lands each, come what may.
func (l *Layer) run(frames []int, t *trip) {
	if l.frames.Frame(frames[0]).Kind == index.Stream {
		l.restream(frames)
		return
	}
	blob, err := l.blob()
	if err != nil {
		l.land(err, frames...)
		return
	}
	first, last := l.frames.Frame(frames[0]), l.frames.Frame(frames[len(frames)-1])
	r := l.open(blob, first.Offset, last.Offset+last.Length, t)
	r.ranged = true
	left, err := l.read(r, frames)
	r.Close()
	if !errors.Is(err, errUnranged) {
		l.land(err, left...)
		return
	}
	// The whole blob comes or nothing: then let it fill all it can.
	l.f.m.LazyFallbacks.WithLabelValues("no_range").Inc()
	l.f.log.Warn("the registry does not serve ranges: the layer is read whole", "layer", l.Digest)
	all := merge(left, l.claimRest(false))
	r = l.open(blob, 0, blob.Size(), t)
	left, err = l.read(r, all)
	r.Close()
	l.land(err, left...)
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
		pieces := l.frames.FramePieces(n)
		if err := r.ready(); err != nil {
			return frames[i:], err
		}
		release, err := r.trip.hold(l.ctx, l.f.memory, weight(f, pieces))
		if err != nil {
			return frames[i:], err
		}
		if f.Length > wholeFrame {
			body := &ending{r: io.MultiReader(bytes.NewReader(shared), io.LimitReader(r, f.Length-int64(len(shared))))}
			derr := l.decode(f, pieces, n, body)
			_, err := io.Copy(io.Discard, body)
			release()
			if err != nil {
				return frames[i:], err
			}
			last = body.last
			l.landed(n, pieces, r.spoilt, derr)
			continue
		}
		mem := buffer(f.Length)
		buf := *mem
		if _, err := io.ReadFull(r, buf[copy(buf, shared):]); err != nil {
			giveBack(mem)
			release()
			return frames[i:], err
		}
		last = []byte{buf[len(buf)-1]}
		spoilt := r.spoilt
		l.f.cores.take(r.trip.urgency())
		wg.Go(func() {
			err := l.decode(f, pieces, n, bytes.NewReader(buf))
			giveBack(mem)
			l.f.cores.give()
			release()
			l.landed(n, pieces, spoilt, err)
		})
	}
	return nil, nil
}

// weight is how much memory a frame takes on its way: its bytes, and the piece of it
// that is decompressed.
func weight(f index.Frame, pieces []index.Piece) (n int64) {
	for i := range pieces {
		n = max(n, inMemory(&pieces[i]))
	}
	n = bufferSize(n)
	if f.Length <= wholeFrame {
		n += bufferSize(f.Length)
	}
	return n
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

// decode decompresses frame n into the data file.
func (l *Layer) decode(f index.Frame, pieces []index.Piece, n int, r io.Reader) error {
	var point index.Point
	if f.Point > 0 {
		var err error
		if point, err = l.points.Point(f.Point - 1); err != nil {
			return err
		}
	}
	if l.byFrame {
		in, done, err := l.again(r)
		if err != nil {
			return err
		}
		defer done()
		h := sha256.New()
		if _, err := io.Copy(h, in); err != nil {
			return err
		}
		if sum := sumOf(h); sum != point.Digest {
			return fmt.Errorf("%w: a span of %d bytes has sha256:%x, its index says sha256:%x", ErrVerify, f.Length, sum, point.Digest)
		}
		if _, err := in.Seek(0, io.SeekStart); err != nil {
			return err
		}
		r = in
	}
	sum, err := decode(r, f.Kind, point, pieces, l.data.File())
	if err == nil {
		l.data.SetSum(n, sum)
	}
	return err
}

// again gives what r brings so that it can be read twice: a span that is too large
// for memory by way of a file.
func (l *Layer) again(r io.Reader) (_ io.ReadSeeker, done func(), err error) {
	if in, ok := r.(io.ReadSeeker); ok {
		return in, func() {}, nil
	}
	f, err := l.f.store.Temp()
	if err != nil {
		return nil, nil, err
	}
	os.Remove(f.Name())
	if _, err = io.Copy(f, r); err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, func() { f.Close() }, nil
}

// landed lands a frame that was read. One that does not verify is asked for once
// more, from another origin where there is one: a proxy may have spoilt it.
func (l *Layer) landed(n int, pieces []index.Piece, spoilt func(), err error) {
	if errors.Is(err, ErrVerify) {
		l.f.m.VerifyFailures.WithLabelValues("chunk").Inc()
		if l.ctx.Err() == nil {
			spoilt()
			if err = l.retry(n, pieces); errors.Is(err, ErrVerify) {
				l.doubtIndex(err)
			}
		}
	}
	if err == nil {
		l.f.m.ReadBytes.WithLabelValues("registry").Add(float64(sizeOf(pieces)))
	}
	l.land(err, n)
}

func (l *Layer) retry(n int, pieces []index.Piece) error {
	blob, err := l.blob()
	if err != nil {
		return err
	}
	f := l.frames.Frame(n)
	release, err := l.f.memory.take(l.ctx, Demand, weight(f, pieces))
	if err != nil {
		return err
	}
	defer release()
	r := l.open(blob, f.Offset, f.Offset+f.Length, nil)
	defer r.Close()
	var in io.Reader = r
	if f.Length <= wholeFrame {
		buf := make([]byte, f.Length)
		if _, err := io.ReadFull(r, buf); err != nil {
			return err
		}
		in = bytes.NewReader(buf)
	}
	if err := l.decode(f, pieces, n, in); r.err == nil {
		return err
	}
	return r.err
}

// open gives a reader of the blob that counts for this layer and for a trip.
func (l *Layer) open(blob Blob, from, to int64, t *trip) *reader {
	reason := t.urgency().String()
	r := newReader(withReason(l.ctx, reason), blob, from, to, l.f.patience)
	if t.urgency() != Demand {
		r.wait = r.wait.brief()
	}
	r.trip = t
	if remote(blob) {
		r.count = func(n int) {
			l.data.AddFetched(int64(n))
			l.f.m.FetchBytes.WithLabelValues(reason).Add(float64(n))
		}
	}
	r.retry = l.f.m.FetchRetries.WithLabelValues(reason).Inc
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
