package fetch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"time"
)

// Patience is how long a read waits for the network. The zero value is the
// defaults; tests shorten them.
type Patience struct {
	Stall time.Duration // without a byte before an attempt is given up, default 20 s
	Total time.Duration // without progress over all attempts, default 60 s
	Base  time.Duration // first pause between attempts, default 100 ms
}

func (p Patience) orDefault() Patience {
	if p.Stall == 0 {
		p.Stall = 20 * time.Second
	}
	if p.Total == 0 {
		p.Total = 60 * time.Second
	}
	if p.Base == 0 {
		p.Base = 100 * time.Millisecond
	}
	return p
}

// brief is the patience for what nobody waits for: who comes to wait for it tries
// for himself.
func (p Patience) brief() Patience {
	p.Stall, p.Total = p.Stall/4, p.Total/4
	return p
}

// reader reads a range of a blob and hides what goes wrong on the way: a
// connection that breaks, stalls or ends early is made again from where it
// stopped. It gives up when there was no progress for Patience.Total.
type reader struct {
	ctx    context.Context
	blob   Blob
	wait   Patience
	count  func(n int) // bytes that came over the network
	retry  func()
	ranged bool // refuse a body that begins elsewhere
	trip   *trip

	off, end int64
	body     *body // nil between attempts
	progress time.Time
	tries    int
	refused  bool   // since the last progress
	spoilt   func() // makes the next attempt begin with another origin
	err      error  // why it gave up
}

// body is what one attempt gave.
type body struct {
	io.ReadCloser
	ctx      context.Context // ended by the watch, or by cancel
	cancel   context.CancelCauseFunc
	watch    *time.Timer
	from, at int64 // where in the blob it began and stands
}

// newReader prepares to read [off, end). Close it.
func newReader(ctx context.Context, blob Blob, off, end int64, wait Patience) *reader {
	return &reader{
		ctx: ctx, blob: blob, wait: wait.orDefault(), off: off, end: end, progress: time.Now(),
		count: func(int) {}, retry: func() {}, spoilt: func() {},
	}
}

func (r *reader) Read(p []byte) (int, error) {
	if r.off >= r.end {
		return 0, io.EOF
	}
	if r.err != nil {
		return 0, r.err
	}
	p = p[:min(int64(len(p)), r.end-r.off)]
	r.progress = time.Now() // its caller may have kept it waiting
	for {
		n, err := r.attempt(p)
		if n > 0 {
			r.progress, r.tries, r.refused = time.Now(), 0, false
			return n, nil
		}
		if r.again(err); r.err != nil {
			return 0, r.err
		}
	}
}

// ready waits until an answer begins, so that no memory is held for one that does
// not.
func (r *reader) ready() error {
	r.progress = time.Now()
	for r.body == nil && r.err == nil && r.off < r.end {
		if err := r.open(); err != nil {
			r.again(err)
		}
	}
	return r.err
}

// again waits before the next attempt, or sets err where there shall be none.
func (r *reader) again(cause error) {
	if r.err = cause; !errors.Is(cause, errUnranged) {
		r.err = r.pause(cause)
	}
}

// attempt reads once, from a body that it opens where there is none.
func (r *reader) attempt(p []byte) (int, error) {
	if r.body == nil {
		if err := r.open(); err != nil {
			return 0, err
		}
	}
	for r.body.at < r.off { // a whole blob was given: let pass what comes before
		n, err := r.read(p[:min(int64(len(p)), r.off-r.body.at)])
		if n == 0 {
			return 0, r.broken(err)
		}
	}
	n, err := r.read(p)
	if n == 0 {
		return 0, r.broken(err)
	}
	r.off += int64(n)
	return n, nil
}

func (r *reader) read(p []byte) (int, error) {
	r.trip.pace(r.ctx)
	r.body.watch.Reset(r.wait.Stall)
	n, err := r.body.Read(p)
	r.body.watch.Stop()
	r.body.at += int64(n)
	r.count(n)
	r.trip.came(r.ctx, n)
	return n, err
}

func (r *reader) open() error {
	ctx, cancel := context.WithCancelCause(r.ctx)
	watch := time.AfterFunc(r.wait.Stall, func() { cancel(errStalled) })
	asked := time.Now()
	rc, at, err := r.blob.Open(ctx, r.off, r.end-r.off)
	if err == nil {
		r.trip.answered(time.Since(asked))
	}
	if err == nil && at != r.off && r.ranged {
		rc.Close()
		err = errUnranged
	}
	if err != nil {
		watch.Stop()
		err = stalled(ctx, err)
		cancel(nil)
		return err
	}
	r.body = &body{ReadCloser: rc, ctx: ctx, cancel: cancel, watch: watch, from: at, at: at}
	r.spoilt = func() {}
	if s, ok := rc.(*served); ok {
		r.spoilt = s.spoilt
	}
	return nil
}

// broken ends a body that gives no more. An origin that gave nothing at all is
// not the first to be asked again.
func (r *reader) broken(err error) error {
	if r.body.at == r.body.from {
		r.spoilt()
	}
	err = stalled(r.body.ctx, err)
	r.drop()
	if err == nil || err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// stalled tells an attempt that the watch ended from one that somebody canceled.
func stalled(ctx context.Context, err error) error {
	if context.Cause(ctx) == errStalled {
		return fmt.Errorf("%w (%v)", errStalled, err)
	}
	return err
}

func (r *reader) drop() {
	if r.body != nil {
		r.body.watch.Stop()
		r.body.cancel(nil)
		r.body.Close()
		r.body = nil
	}
}

// pause waits before the next attempt, or gives up with the reason of the last.
func (r *reader) pause(cause error) error {
	if r.ctx.Err() != nil {
		return context.Cause(r.ctx)
	}
	left := r.wait.Total - time.Since(r.progress)
	refused := !temporary(cause)
	if refused && r.refused || left <= 0 {
		return fmt.Errorf("%w: %w", ErrUnavailable, cause)
	}
	r.refused = r.refused || refused
	d := r.wait.Base << min(r.tries, 6)
	d = d/2 + rand.N(d)
	var se *StatusError
	if errors.As(cause, &se) {
		if se.RetryAfter > 0 {
			d = se.RetryAfter
		}
		if se.Temporary() {
			r.trip.refused(d)
		}
	}
	r.tries++
	r.retry()
	t := time.NewTimer(min(d, left))
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-r.ctx.Done():
		return context.Cause(r.ctx)
	}
}

func (r *reader) Close() error {
	r.drop()
	return nil
}

// temporary reports whether trying again may help. An answer that refuses, or is
// none to what was asked, is tried once more, since a token or a signature may
// just have run out; what is no answer at all is.
func temporary(err error) bool {
	if errors.Is(err, errAnswer) {
		return false
	}
	var se *StatusError
	if errors.As(err, &se) {
		return se.Temporary()
	}
	return true
}
