package fetch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/fetch/store"
	"github.com/varvefs/varve/index"
	"github.com/varvefs/varve/index/tarscan"
)

// Pass is a layer that has no index, on its one way from the first byte to the
// last. It is a layer already, as far as it has passed: its names are told as they
// come, and reads of its data file wait for their bytes. What it gives is proven
// when it is over, and not before. One Pass serves all who want the layer; each
// closes it.
type Pass struct {
	f      *Fetcher
	key    string
	digest string
	size   int64 // of the blob
	about  About
	cancel context.CancelFunc
	read   atomic.Int64 // bytes of the blob
	data   *os.File     // the data file, open for as long as somebody has the pass
	fd     int
	done   chan struct{}
	gate   sync.RWMutex // see Layer.gates

	recordings recordings
	trip       *trip // nil where the blob needs no network

	layer atomic.Pointer[Layer] // that has the data file, set before anybody can drop frames of it

	refs  int  // guarded by Fetcher.mu
	ended bool // the same

	forgotten bool // guarded by turns.mu

	mu       sync.Mutex // guards what follows
	change   *sync.Cond
	entries  []index.Entry // that passed
	watching []func(index.Entry)
	passed   int64 // bytes of the data file
	over     bool
	err      error // set before done is closed
}

// errKept says that a layer came into the store meanwhile.
var errKept = errors.New("in the store by now")

// join gives the pass of a layer, which it begins if there is none.
func (f *Fetcher) join(key string, q *Request, reason, why string) (*Pass, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return nil, os.ErrClosed
	}
	if p := f.passes[key]; p != nil {
		p.refs++
		return p, nil
	}
	if f.layers[key] != nil {
		return nil, errKept
	}
	// What is left of a layer that is damaged would be in the way.
	if err := f.store.Remove(key); err != nil {
		return nil, err
	}
	g, err := f.store.Stage(key)
	if err != nil {
		return nil, err
	}
	p := &Pass{
		f: f, key: key, digest: q.Digest, size: q.Size, refs: 1, done: make(chan struct{}),
		about: About{Format: "being read", Why: why, Size: q.Size},
	}
	p.change = sync.NewCond(&p.mu)
	// The staging closes its own when it is done with the file.
	fd, err := unix.FcntlInt(g.File().Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		g.Discard()
		return nil, err
	}
	p.fd, p.data = fd, os.NewFile(uintptr(fd), "data")
	ctx, cancel := context.WithCancel(context.Background())
	p.cancel = cancel
	if remote(q.Blob) {
		p.trip = f.schedule.enter(Profile)
	}
	f.passes[key] = p
	f.m.LazyFallbacks.WithLabelValues(reason).Inc()
	f.running.Go(func() { p.run(ctx, g, q) })
	return p, nil
}

// Close gives the pass up. It ends when nobody has it any more.
func (p *Pass) Close() {
	p.f.mu.Lock()
	defer p.f.mu.Unlock()
	if p.refs--; p.refs > 0 {
		return
	}
	p.cancel()
	if p.f.passes[p.key] == p {
		delete(p.f.passes, p.key)
	}
	if p.ended { // else a reader that waits for the pass learns first that it did
		p.data.Close()
	}
}

// run reads the layer from its first byte to its last, checks what its manifest
// and config say of it, and keeps everything.
func (p *Pass) run(ctx context.Context, g *store.Staging, q *Request) {
	err := p.keep(ctx, g, q)
	p.trip.end()
	g.Discard()
	if err != nil {
		err = fmt.Errorf("layer %.19s: %w", p.digest, err)
	}
	p.f.turns.forget(p)
	p.f.mu.Lock()
	if p.f.passes[p.key] == p {
		delete(p.f.passes, p.key)
	}
	p.f.mu.Unlock()
	p.mu.Lock()
	p.over, p.err, p.watching = true, err, nil
	close(p.done)
	p.change.Broadcast()
	p.mu.Unlock()
	p.f.mu.Lock()
	defer p.f.mu.Unlock()
	if p.ended = true; p.refs == 0 {
		p.data.Close()
	}
}

func (p *Pass) keep(ctx context.Context, g *store.Staging, q *Request) error {
	pre := preparation{Fetcher: p.f, Request: *q, key: p.key, ctx: ctx}
	r := pre.reader(0, q.Size)
	r.trip = p.trip
	defer r.Close()
	var about About
	var l *index.Layer
	err := g.Document(skeletonDocument, func(w io.Writer) (err error) {
		l, about, err = pre.whole(&turn{ctx, p, r}, g, tarscan.Options{Skeleton: w, Passing: p})
		return err
	})
	if ctx.Err() != nil {
		err = context.Canceled // what else went wrong came of it
	}
	if err != nil {
		return err
	}
	about.Why = p.about.Why
	if err := p.f.keep(g, l, about, pre.fetched, true); err != nil {
		return err
	}
	_, err = p.f.resident(p.key)
	return err
}

// kept makes the pass one with the layer that it has become, if it has: another
// may have been faster. The caller holds Fetcher.mu.
func (p *Pass) kept(l *Layer) {
	ours, err := p.data.Stat()
	if err != nil {
		return
	}
	theirs, err := l.data.File().Stat()
	if err == nil && os.SameFile(ours, theirs) {
		l.gates = append(l.gates, &p.gate)
		p.layer.Store(l)
	}
}

// turn reads a pass's blob when it is its turn.
type turn struct {
	ctx context.Context
	p   *Pass
	r   io.Reader
}

func (t *turn) Read(b []byte) (int, error) {
	t.p.f.turns.wait(t.ctx, t.p)
	n, err := t.r.Read(b)
	t.p.read.Add(int64(n))
	return n, err
}

// Entry and Passed are told of what passes.
func (p *Pass) Entry(e index.Entry) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.entries = append(p.entries, e)
	for _, w := range p.watching {
		w(e)
	}
	return nil
}

func (p *Pass) Passed(off int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.passed = off
	p.change.Broadcast()
}

// Watch tells fn of the names that passed and of those that will, in the tar's
// order.
func (p *Pass) Watch(fn func(index.Entry)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, e := range p.entries {
		fn(e)
	}
	p.watching = append(p.watching, fn)
}

// Want lets the pass go before those that nobody waits for.
func (p *Pass) Want() (done func()) {
	p.trip.raise()
	return p.f.turns.want(p)
}

// Done is closed when the pass is over.
func (p *Pass) Done() <-chan struct{} { return p.done }

// Wait returns when the pass is over, with what went wrong, or when ctx is.
func (p *Pass) Wait(ctx context.Context) error {
	select {
	case <-p.done:
		return p.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Read gives the bytes of the blob that were read, and its size.
func (p *Pass) Read() (n, size int64) { return p.read.Load(), p.size }

// Digest is the blob's.
func (p *Pass) Digest() string { return p.digest }

// About says why the layer is read whole.
func (p *Pass) About() About { return p.about }

// Key is what the layer will have in the store.
func (p *Pass) Key() string { return p.key }

// Hold is [Layer.Hold] of a layer that still passes: it waits for bytes that have
// not.
func (p *Pass) Hold(off, n int64) error {
	p.recordings.note(off, n)
	if err := p.wait(off + n); err != nil {
		return err
	}
	p.gate.RLock()
	l := p.layer.Load()
	if l == nil || l.has(off, n) {
		return nil
	}
	p.gate.RUnlock() // dropped
	return l.hold(&p.gate, off, n)
}

// Release ends what Hold began.
func (p *Pass) Release() { p.gate.RUnlock() }

// wait returns when the data file has everything before end, or had: the pass is
// over.
func (p *Pass) wait(end int64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var wanted func()
	for p.passed < end && !p.over {
		if wanted == nil {
			p.mu.Unlock()
			wanted = p.Want()
			p.mu.Lock()
			continue
		}
		p.change.Wait()
	}
	if wanted != nil {
		defer wanted()
	}
	return p.err
}

// Fd gives the data file's descriptor, which stays open until Close.
func (p *Pass) Fd() int { return p.fd }

// Size is the length of the data file so far.
func (p *Pass) Size() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.passed
}
