package fetch

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/bench/forms"
	"github.com/varvefs/varve/index"
)

// paced is a blob that gives no more than it is told to.
type paced struct {
	data []byte

	mu     sync.Mutex // guards what follows
	change *sync.Cond
	upto   int
	opened int
	broken int // bodies opened so far that give no more
}

func pace(data []byte) *paced {
	p := &paced{data: data}
	p.change = sync.NewCond(&p.mu)
	return p
}

func (p *paced) allow(upto int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.upto = min(upto, len(p.data))
	p.change.Broadcast()
}

// breakOff ends the bodies that there are.
func (p *paced) breakOff() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.broken = p.opened
	p.change.Broadcast()
}

// begun reports whether somebody reads it.
func (p *paced) begun() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.opened > 0
}

func (p *paced) Size() int64 { return int64(len(p.data)) }

func (p *paced) Open(ctx context.Context, off, n int64) (io.ReadCloser, int64, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.opened++
	stop := context.AfterFunc(ctx, p.change.Broadcast)
	return &pacedBody{p, p.opened, ctx, stop, int(off), int(off + n)}, off, nil
}

type pacedBody struct {
	p       *paced
	number  int
	ctx     context.Context
	stop    func() bool
	at, end int
}

func (b *pacedBody) Read(buf []byte) (int, error) {
	b.p.mu.Lock()
	defer b.p.mu.Unlock()
	for b.at >= b.p.upto && b.ctx.Err() == nil && b.number > b.p.broken {
		b.p.change.Wait()
	}
	if b.ctx.Err() != nil {
		return 0, b.ctx.Err()
	}
	if b.number <= b.p.broken {
		return 0, io.ErrUnexpectedEOF
	}
	n := copy(buf, b.p.data[b.at:min(b.p.upto, b.end)])
	b.at += n
	return n, nil
}

func (b *pacedBody) Close() error { b.stop(); return nil }

// start begins a pass over the layer at its own pace.
func (m *machine) start(t testing.TB, l *layer) (*Pass, *paced) {
	t.Helper()
	b := pace(l.blob)
	q := m.request(l)
	q.Blob = b
	h, p, err := m.Start(context.Background(), q)
	if err != nil || h != nil || p == nil {
		t.Fatalf("got %v, %v, %v", h, p, err)
	}
	return p, b
}

// seen is what a watcher was told.
type seen struct {
	mu      sync.Mutex
	entries []index.Entry
	more    chan struct{}
}

func watch(p *Pass) *seen {
	s := &seen{more: make(chan struct{}, 1000)}
	p.Watch(func(e index.Entry) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.entries = append(s.entries, e)
		s.more <- struct{}{}
	})
	return s
}

func (s *seen) until(n int) []index.Entry {
	for range n {
		<-s.more
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.entries
}

// passing reads a file from a pass.
func passing(p *Pass, e index.Entry) ([]byte, error) {
	if err := p.Hold(e.Data, e.Size); err != nil {
		return nil, err
	}
	defer p.Release()
	b := make([]byte, e.Size)
	_, err := unix.Pread(p.Fd(), b, e.Data)
	return b, err
}

// empty checks that nothing is in the store, nor half of it.
func (m *machine) empty(t testing.TB) {
	t.Helper()
	for _, d := range []string{"layers", "tmp"} {
		if es, err := os.ReadDir(filepath.Join(m.dir, d)); err != nil || len(es) != 0 {
			t.Errorf("left in %s: %v, %v", d, es, err)
		}
	}
}

func TestPass(t *testing.T) {
	for name, pack := range map[string]func(testing.TB, []byte) []byte{"tar": raw, "gzip": gz, "zstd": manyFrames} {
		t.Run(name, func(t *testing.T) {
			fs := volumes(6, 1<<20)
			l := packLayer(t, makeTar(t, fs), fs, pack)
			m := on(t, t.TempDir(), quick)
			p, b := m.start(t, l)
			defer p.Close()
			early := watch(p)
			if n, size := p.Read(); n != 0 || size != l.Size || p.Size() != 0 || p.Digest() != l.Digest || p.Key() != l.Digest {
				t.Errorf("%d of %d bytes read, a data file of %d", n, size, p.Size())
			}
			b.allow(len(l.blob) / 2)
			es := early.until(3)
			if got, err := passing(p, es[1]); err != nil || !bytes.Equal(got, fs[1].data) {
				t.Errorf("%q: %d bytes differ, %v", es[1].Name, len(got), err)
			}
			late := watch(p)
			select {
			case <-p.Done():
				t.Fatal("it is over")
			default:
			}

			// Who wants the last waits.
			var wg sync.WaitGroup
			waiting := make(chan error, 1)
			last := make(chan index.Entry, 1)
			wg.Go(func() {
				for i := 0; ; i++ {
					if es := early.until(0); len(es) == len(fs) {
						last <- es[len(es)-1]
						return
					}
					<-early.more
				}
			})
			wg.Go(func() { waiting <- p.Hold(0, 1<<40) })
			select {
			case err := <-waiting:
				t.Errorf("there is nothing, but %v", err)
			case <-time.After(50 * time.Millisecond):
			}
			b.allow(len(l.blob))
			if err := p.Wait(context.Background()); err != nil {
				t.Fatal(err)
			}
			if err := <-waiting; err != nil {
				t.Error(err)
			} else {
				p.Release()
			}
			wg.Wait()
			if n, _ := p.Read(); n != l.Size || b.opened != 1 {
				t.Errorf("%d bytes read in %d requests", n, b.opened)
			}
			got, err := passing(p, <-last)
			if f := fs[len(fs)-1]; err != nil || !bytes.Equal(got, f.data) {
				t.Errorf("%q: %q, %v", f.name, got, err)
			}
			h := m.open(t, l)
			want, err := h.Entries()
			if err != nil {
				t.Fatal(err)
			}
			for who, s := range map[string]*seen{"early": early, "late": late, "after": watch(p)} {
				if diff := cmp.Diff(want, s.until(0)); diff != "" {
					t.Errorf("%s: %s", who, diff)
				}
			}
			checkAll(t, h, l)
			if h, p, err := m.Start(context.Background(), m.request(l)); err != nil || p != nil {
				t.Errorf("a pass over what is in the store: %v", err)
			} else {
				h.Close()
			}
		})
	}
}

// TestPassIsJoined has several want a layer at once: one pass serves them all, for
// as long as one of them is left.
func TestPassIsJoined(t *testing.T) {
	fs := volumes(2, 1<<20)
	l := packLayer(t, makeTar(t, fs), fs, gz)
	m := on(t, t.TempDir(), quick)
	p, b := m.start(t, l)
	again, unread := m.start(t, l)
	if p != again {
		t.Fatal("there are two passes")
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			h, err := m.Open(context.Background(), m.request(l, Origin{URL: "http://127.0.0.1:1"}))
			if err != nil {
				t.Error(err)
				return
			}
			h.Close()
		})
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := m.Open(ctx, m.request(l, Origin{URL: "http://127.0.0.1:1"})); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	b.allow(len(l.blob) / 2)
	p.Close()
	b.allow(len(l.blob))
	if err := again.Wait(context.Background()); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	again.Close()
	if b.opened != 1 || unread.opened != 0 {
		t.Errorf("%d and %d requests", b.opened, unread.opened)
	}
	checkAll(t, m.open(t, l), l)
	if n := m.count(t, "lazy_fallbacks_total", "no_index"); n != 1 {
		t.Errorf("%d passes are counted", n)
	}
}

// TestPassTurns holds back what nobody waits for while somebody waits for another.
func TestPassTurns(t *testing.T) {
	fs := volumes(8, 1<<20)
	a, b := packLayer(t, makeTar(t, fs), fs, raw), packLayer(t, makeTar(t, fs[1:]), fs[1:], raw)
	m := on(t, t.TempDir(), quick)
	pa, ba := m.start(t, a)
	defer pa.Close()
	pb, bb := m.start(t, b)
	defer pb.Close()
	ba.allow(1 << 20)
	if !soon(bb.begun) { // it gets what it asks for before another is waited for
		t.Fatal("it does not begin")
	}
	waiting := make(chan error)
	go func() { waiting <- pa.Hold(3<<20, 4096) }()
	for m.turns.waited(pa) == 0 {
		time.Sleep(time.Millisecond)
	}
	bb.allow(len(b.blob))
	if !soon(func() bool { n, _ := pb.Read(); return n > 0 }) {
		t.Fatal("it does not get what it asked for")
	}
	before, _ := pb.Read()
	time.Sleep(100 * time.Millisecond)
	if n, size := pb.Read(); n != before || n > size/4 {
		t.Errorf("the other went on from %d to %d of %d", before, n, size)
	}
	// Two that are wanted go beside each other.
	if err := pb.Hold(1<<20, 4096); err != nil {
		t.Error(err)
	} else {
		pb.Release()
	}
	select {
	case err := <-waiting:
		t.Fatalf("it has not passed: %v", err)
	default:
	}
	// When nobody waits any more, all go on.
	ba.allow(5 << 20)
	if err := <-waiting; err != nil {
		t.Error(err)
	} else {
		pa.Release()
	}
	if err := pb.Wait(context.Background()); err != nil {
		t.Error(err)
	}
	select {
	case <-pa.Done():
		t.Error("it is over")
	default:
	}
	ba.allow(len(a.blob))
	if err := pa.Wait(context.Background()); err != nil {
		t.Error(err)
	}
	// A pass that is over holds up nobody, whoever still wants it.
	defer pa.Want()()
	c := packLayer(t, makeTar(t, fs[2:]), fs[2:], raw)
	checkAll(t, m.openFile(t, c), c)
}

func (t *turns) waited(p *Pass) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.wanted[p]
}

// openFile opens a layer whose blob lies in a file.
func (m *machine) openFile(t testing.TB, l *layer) *Handle {
	t.Helper()
	q := m.request(l)
	q.Blob = File{bytes.NewReader(l.blob), l.Size}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	h, err := m.Open(ctx, q)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	return h
}

// TestPassWaitsLongForItsTurn loses its connection meanwhile: that is no reason to
// give up.
func TestPassWaitsLongForItsTurn(t *testing.T) {
	fs := volumes(4, 1<<20)
	a, b := packLayer(t, makeTar(t, fs), fs, raw), packLayer(t, makeTar(t, fs[1:]), fs[1:], raw)
	m := on(t, t.TempDir(), Patience{Stall: time.Minute, Total: time.Second, Base: 1})
	pb, bb := m.start(t, b)
	defer pb.Close()
	bb.allow(1 << 20)
	for n, _ := pb.Read(); n < 1<<20; n, _ = pb.Read() {
		time.Sleep(time.Millisecond)
	}
	pa, _ := m.start(t, a)
	done := pa.Want()
	bb.allow(1<<20 + 4096)              // it may have asked before its turn was over
	time.Sleep(1500 * time.Millisecond) // more than its patience
	bb.breakOff()
	bb.allow(len(b.blob))
	done()
	pa.Close()
	if err := pb.Wait(context.Background()); err != nil {
		t.Error(err)
	}
	if bb.opened != 2 {
		t.Errorf("%d requests", bb.opened)
	}
}

// TestPassGivenUp ends with the last who wanted it.
func TestPassGivenUp(t *testing.T) {
	fs := volumes(4, 1<<20)
	l := packLayer(t, makeTar(t, fs), fs, gz)
	m := on(t, t.TempDir(), quick)
	p, b := m.start(t, l)
	other, _ := m.start(t, l)
	b.allow(len(l.blob) / 2)
	waiting := make(chan error)
	go func() { waiting <- p.Hold(0, 1<<40) }()
	p.Close()
	select {
	case <-p.Done():
		t.Error("it is over, though another wants it")
	case <-time.After(20 * time.Millisecond):
	}
	other.Close()
	if err := other.Wait(context.Background()); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if err := <-waiting; !errors.Is(err, context.Canceled) {
		t.Errorf("who waited got %v", err)
	}
	m.empty(t)
	if _, err := m.Open(context.Background(), m.request(l)); !errors.Is(err, ErrOffline) {
		t.Errorf("got %v", err)
	}
	checkAll(t, m.openFile(t, l), l)
	// A pass closes its file a little after who waits for it knows that it is over.
	if !soon(func() bool { return resources(t).opened(m.dir) == 1 }) {
		t.Errorf("%d descriptors", resources(t).opened(m.dir))
	}
}

// TestPassFoundWrong is known only at the end. Nothing of it is kept.
func TestPassFoundWrong(t *testing.T) {
	fs := volumes(2, 1<<20)
	good := packLayer(t, makeTar(t, fs), fs, gz)
	other := packLayer(t, makeTar(t, fs[1:]), fs[1:], gz)
	for name, change := range map[string]func(l *layer){
		"digest": func(l *layer) { l.Digest = other.Digest },
		"diffID": func(l *layer) { l.diffID = other.diffID },
		"tar":    func(l *layer) { l.blob = gz(t, makeTar(t, fs)[:1<<20]); l.Size = int64(len(l.blob)) },
	} {
		t.Run(name, func(t *testing.T) {
			l := *good
			change(&l)
			m := on(t, t.TempDir(), quick)
			p, b := m.start(t, &l)
			defer p.Close()
			joined, _ := m.start(t, &l)
			defer joined.Close()
			b.allow(len(l.blob) / 2)
			if got, err := passing(p, watch(p).until(1)[0]); err != nil || !bytes.Equal(got, fs[0].data) {
				t.Errorf("%q, %v", got, err)
			}
			errs := make(chan error)
			go func() { errs <- p.Hold(0, 1<<40) }()
			go func() { errs <- joined.Wait(context.Background()) }()
			go func() {
				_, err := m.Open(context.Background(), m.request(&l, Origin{}))
				errs <- err
			}()
			for m.joined(&l) < 3 {
				time.Sleep(time.Millisecond)
			}
			b.allow(len(l.blob))
			for range 3 {
				if err := <-errs; !errors.Is(err, ErrVerify) && !errors.Is(err, index.ErrMalformed) {
					t.Errorf("got %v", err)
				}
			}
			if err := p.Hold(0, 1); err == nil {
				t.Error("it can still be read")
			}
			m.empty(t)
		})
	}
}

// joined counts who has the pass of a layer.
func (m *machine) joined(l *layer) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	if p := m.passes[l.Digest]; p != nil {
		return p.refs
	}
	return 0
}

func TestCloseWhilePassing(t *testing.T) {
	fs := volumes(3, 1<<20)
	m := on(t, t.TempDir(), quick)
	var ps []*Pass
	errs := make(chan error, 100)
	n := 0
	for i, pack := range []func(testing.TB, []byte) []byte{raw, gz, zst, manyFrames} {
		l := packLayer(t, makeTar(t, fs[i:]), fs[i:], pack)
		p, b := m.start(t, l)
		ps = append(ps, p)
		b.allow(len(l.blob) * i / 4)
		for _, wait := range []func() error{
			func() error { return p.Hold(0, 1<<40) },
			func() error { return p.Wait(context.Background()) },
			func() error { _, err := m.Open(context.Background(), m.request(l, Origin{})); return err },
		} {
			n++
			go func() { errs <- wait() }()
		}
		for m.joined(l) < 2 {
			time.Sleep(time.Millisecond)
		}
	}
	m.close(t)
	for range n {
		if err := <-errs; !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	}
	for _, p := range ps {
		p.Close()
	}
	if r := resources(t); r.opened(m.dir) != 0 || r.mapped(m.dir) != 0 {
		t.Errorf("left: %d descriptors, %d mappings", r.opened(m.dir), r.mapped(m.dir))
	}
	calm(t)
	m.empty(t)
	if _, _, err := m.Start(context.Background(), m.request(makeLayer(t, forms.Gzip, fs), Origin{})); !errors.Is(err, os.ErrClosed) {
		t.Errorf("got %v", err)
	}
}

// TestPassIsReadOn reads from a pass whose layer is in the store by now, and whose
// frames were dropped.
func TestPassIsReadOn(t *testing.T) {
	fs := volumes(4, 1<<20)
	l := packLayer(t, makeTar(t, fs), fs, gz)
	m := on(t, t.TempDir(), quick)
	p, b := m.start(t, l)
	b.allow(len(l.blob))
	es := watch(p)
	if err := p.Wait(context.Background()); err != nil {
		t.Fatal(err)
	}
	h := m.openFile(t, l)
	dropAll(t, h)
	for i, e := range es.until(0) {
		if got, err := passing(p, e); e.Size > 0 && (err != nil || !bytes.Equal(got, fs[i].data)) {
			t.Errorf("%q: %v", e.Name, err)
		}
	}
	p.Close()
	checkAll(t, h, l)
}
