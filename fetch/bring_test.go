package fetch

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/bench/forms"
	"github.com/varvefs/varve/bench/link"
	"github.com/varvefs/varve/index"
)

// small gives n files of size bytes that do not compress.
func small(n, size int, seed uint64) (fs []file) {
	for i := range n {
		fs = append(fs, file{fmt.Sprintf("f%03d", i), noise(size, seed+uint64(i))})
	}
	return fs
}

// want names a file's range.
func want(t testing.TB, h *Handle, name string) Want {
	e := entry(t, h, name)
	return Want{h, e.Data, e.Size}
}

// everything is all of a layer.
func everything(h *Handle) []Want { return []Want{{h, 0, h.Size()}} }

// rangesOf lists the requests for a layer's blob.
func (s *site) rangesOf(l *layer) (rs []string) {
	for _, q := range s.Requests() {
		if strings.HasSuffix(q.Path, l.Digest) {
			rs = append(rs, q.Range)
		}
	}
	return rs
}

// total adds up what ranges ask for.
func total(t testing.TB, rs []string) (n int64) {
	for _, r := range rs {
		from, end := bounds(t, r)
		n += end - from
	}
	return n
}

// TestBringJoinsNeighbours brings files that lie near each other in one request, and
// others in the order in which they are used.
func TestBringJoinsNeighbours(t *testing.T) {
	a := makeLayer(t, forms.EStargz, small(100, 20_000, 1))
	b := makeLayer(t, forms.EStargz, small(100, 20_000, 1000))
	s := serve(t, a, b)
	m := on(t, t.TempDir(), quick)
	ha, hb := m.open(t, a, s.origin(a)), m.open(t, b, s.origin(b))
	s.Reset()
	var wants []Want
	for _, i := range []int{61, 60, 62, 64} { // 63 lies between
		wants = append(wants, want(t, ha, fmt.Sprintf("f%03d", i)))
	}
	wants = append(wants, want(t, hb, "f090"), want(t, ha, "f010"), want(t, hb, "f020"))
	var done, all atomic.Int64
	err := m.Bring(t.Context(), wants, Bringing{Class: Profile, Waste: 20, Progress: func(d, total int64) {
		all.Store(total)
		for was := done.Load(); d > was && !done.CompareAndSwap(was, d); was = done.Load() {
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	if ra, rb := len(s.rangesOf(a)), len(s.rangesOf(b)); ra != 2 || rb != 2 {
		t.Errorf("%d and %d requests: %v", ra, rb, s.ranges())
	}
	if done.Load() != all.Load() || all.Load() < 7*20_000 {
		t.Errorf("told of %d bytes of %d", done.Load(), all.Load())
	}
	if n := total(t, s.ranges()); float64(n) > 1.2*float64(all.Load()) {
		t.Errorf("%d bytes came for %d", n, all.Load())
	}
	s.Reset()
	for _, w := range wants {
		if err := w.Layer.Ensure(w.Off, w.N); err != nil {
			t.Error(err)
		}
	}
	if err := ha.Ensure(want(t, ha, "f063").Off, 1); err != nil { // came along, and is kept
		t.Error(err)
	}
	if err := m.Bring(t.Context(), wants, Bringing{Class: Profile}); err != nil {
		t.Error(err)
	}
	if rs := s.ranges(); len(rs) != 0 {
		t.Errorf("what is here was asked for: %v", rs)
	}
	checkAll(t, ha, a)
	checkAll(t, hb, b)
}

// TestBringIsBounded has nothing come along where that would be too much.
func TestBringIsBounded(t *testing.T) {
	l := makeLayer(t, forms.EStargz, small(100, 20_000, 1))
	s := serve(t, l)
	m := on(t, t.TempDir(), quick)
	h := m.open(t, l, s.origin(l))
	s.Reset()
	var wants []Want
	var exact int64
	for i := 0; i < 100; i += 10 {
		w := want(t, h, fmt.Sprintf("f%03d", i))
		wants = append(wants, w)
		from, to := h.frames.PiecesIn(w.Off, w.N)
		for k := from; k < to; k++ {
			exact += h.frames.Frame(h.frames.FrameOf(k)).Length
		}
	}
	if err := m.Bring(t.Context(), wants, Bringing{Class: Profile, Waste: 10}); err != nil {
		t.Fatal(err)
	}
	if n := total(t, s.ranges()); n != exact || len(s.ranges()) != 10 {
		t.Errorf("%d bytes in %d requests, want %d in 10", n, len(s.ranges()), exact)
	}
}

// TestBringEverything brings each byte of every form once, and in large requests.
func TestBringEverything(t *testing.T) {
	for _, form := range []forms.Form{forms.EStargz, forms.ZstdChunked, forms.ZstdChunkedContainers} {
		t.Run(string(form), func(t *testing.T) {
			fs := small(400, 10_000, 1)
			l := makeLayer(t, form, fs)
			s := serve(t, l)
			m := on(t, t.TempDir(), quick)
			h := m.open(t, l, s.origin(l))
			s.Reset()
			missing := h.Missing()
			if err := m.Bring(t.Context(), everything(h), Bringing{Class: Background}); err != nil {
				t.Fatal(err)
			}
			if n := total(t, s.ranges()); n < missing || n > l.Size || len(s.ranges()) > int(l.Size/leastPortion)+2 {
				t.Errorf("%d bytes in %d requests for %d of %d", n, len(s.ranges()), missing, l.Size)
			}
			if !h.Whole() || h.Missing() != 0 {
				t.Error("the layer is not whole")
			}
			s.Reset()
			checkAll(t, h, l)
			if len(s.ranges()) != 0 {
				t.Errorf("asked again for %v", s.ranges())
			}
		})
	}
}

// TestReaderBesideAFill stops the answers to a fill in the middle: a reader is served,
// and the fill asks for nothing more before the reader has what it wants.
func TestReaderBesideAFill(t *testing.T) {
	l := makeLayer(t, forms.EStargz, small(300, 20_000, 1))
	other := makeLayer(t, forms.EStargz, small(3, 20_000, 900))
	s := serve(t, l, other)
	m := on(t, t.TempDir(), quick)
	h, o := m.open(t, l, s.origin(l)), m.open(t, other, s.origin(other))
	s.Reset()
	reads := func() {
		m.schedule.mu.Lock()
		defer m.schedule.mu.Unlock()
		m.schedule.reader = time.Now().Add(time.Hour)
	}
	reads()
	hold := make(chan struct{})
	begun := make(chan struct{}, 100)
	s.SetFault(func(r *http.Request) *link.Fault {
		if strings.HasSuffix(r.URL.Path, l.Digest) {
			begun <- struct{}{}
			<-hold
		}
		return nil
	})
	filled := make(chan error)
	go func() { filled <- m.Bring(context.Background(), everything(h), Bringing{Class: Background}) }()
	<-begun
	for range 3 {
		if err := o.Ensure(0, o.Size()); err != nil {
			t.Fatal(err)
		}
		idle(t, m) // a request that ends says when somebody read
		reads()
		if n := len(begun); n != 0 {
			t.Errorf("%d more requests of the fill are on the wire beside a reader", n)
		}
		dropAll(t, o)
	}
	// A reader of what the fill has not asked for yet does not wait for it either.
	last := want(t, h, "f299")
	s.SetFault(func(r *http.Request) *link.Fault {
		if from, _ := bounds(t, r.Header.Get("Range")); strings.HasSuffix(r.URL.Path, l.Digest) && from < 3_000_000 {
			<-hold
		}
		return nil
	})
	if err := h.Ensure(last.Off, last.N); err != nil {
		t.Fatal(err)
	}
	close(hold)
	if err := <-filled; err != nil {
		t.Fatal(err)
	}
	checkAll(t, h, l)
}

// TestReaderJoinsAFill reads what a fill has on the wire: it comes once, and becomes
// urgent.
func TestReaderJoinsAFill(t *testing.T) {
	l := makeLayer(t, forms.EStargz, small(5, 20_000, 1))
	s := serve(t, l)
	m := on(t, t.TempDir(), quick)
	h := m.open(t, l, s.origin(l))
	s.Reset()
	hold, begun := make(chan struct{}), make(chan struct{}, 10)
	s.SetFault(func(*http.Request) *link.Fault { begun <- struct{}{}; <-hold; return nil })
	filled, read := make(chan error), make(chan error)
	go func() { filled <- m.Bring(context.Background(), everything(h), Bringing{Class: Background}) }()
	<-begun
	go func() { read <- h.Ensure(0, h.Size()) }()
	for !m.schedule.urgentNow() {
		time.Sleep(time.Millisecond)
	}
	close(hold)
	if err := errors.Join(<-read, <-filled); err != nil {
		t.Fatal(err)
	}
	if n := len(s.ranges()); n != 1 {
		t.Errorf("%d requests: %v", n, s.ranges())
	}
	idle(t, m)
}

// idle waits until no reader is on the wire: the last frame of a request lands, and
// who waited for it goes on, before the request itself has ended.
func idle(t *testing.T, m *machine) {
	t.Helper()
	for end := time.Now().Add(time.Minute); m.schedule.urgentNow(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the schedule is busy although nothing is on the wire")
		}
	}
}

func (s *schedule) urgentNow() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.urgent()
}

// TestLinkDiesInABurst has every answer to a burst break off: who reads tries for
// himself and is not told what the burst ran into.
func TestLinkDiesInABurst(t *testing.T) {
	l := makeLayer(t, forms.EStargz, small(50, 20_000, 1))
	s := serve(t, l)
	m := on(t, t.TempDir(), quick)
	h := m.open(t, l, s.origin(l))
	m.patience = hasty
	s.Reset()
	var dead atomic.Bool
	dead.Store(true)
	begun := make(chan struct{}, 1000)
	s.SetFault(func(*http.Request) *link.Fault {
		if dead.Load() {
			begun <- struct{}{}
			return &link.Fault{Break: link.StallBody}
		}
		return nil
	})
	burst := make(chan error, 1)
	go func() { burst <- m.Bring(context.Background(), everything(h), Bringing{Class: Profile}) }()
	select {
	case <-begun:
	case err := <-burst: // it gave up before the registry heard of it
		burst <- err
	}
	read := make(chan error)
	go func() { read <- h.Ensure(0, 1) }() // waits for the burst's
	if err := <-burst; !errors.Is(err, ErrUnavailable) {
		t.Errorf("the burst says %v", err)
	}
	dead.Store(false)
	if err := <-read; err != nil && !errors.Is(err, ErrUnavailable) {
		t.Errorf("a reader beside it says %v", err)
	}
	forgive(h)
	m.patience = quick
	checkAll(t, h, l)
	if err := m.Bring(t.Context(), everything(h), Bringing{Class: Profile}); err != nil {
		t.Error(err)
	}
}

// TestBurstFailsReaderDoesNot breaks the burst's requests only: nothing of it is
// remembered, and a reader that waited for it gets its bytes.
func TestBurstFailsReaderDoesNot(t *testing.T) {
	l := makeLayer(t, forms.EStargz, small(50, 20_000, 1))
	s := serve(t, l)
	m := on(t, t.TempDir(), quick)
	h := m.open(t, l, s.origin(l))
	s.Reset()
	var n atomic.Int64
	begun, hold := make(chan struct{}, 1000), make(chan struct{})
	s.SetFault(func(*http.Request) *link.Fault {
		if n.Add(1) <= 2 { // an answer that refuses is asked for once more
			begun <- struct{}{}
			<-hold
			return &link.Fault{Status: 404}
		}
		return nil
	})
	burst, read := make(chan error), make(chan error)
	go func() {
		burst <- m.Bring(context.Background(), []Want{want(t, h, "f000"), want(t, h, "f001")}, Bringing{Class: Profile})
	}()
	<-begun
	go func() { _, err := content(h, entry(t, h, "f000")); read <- err }()
	for !m.schedule.urgentNow() || m.schedule.class(Demand) == 0 {
		time.Sleep(time.Millisecond)
	}
	close(hold)
	if err := <-burst; !errors.Is(err, ErrUnavailable) {
		t.Errorf("the burst says %v", err)
	}
	if err := <-read; err != nil {
		t.Errorf("the reader says %v", err)
	}
	checkAll(t, h, l)
}

func (s *schedule) class(c Class) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.away[c]
}

// TestBringIsGivenUp cancels a bringing: nothing more is asked for, nothing is lost.
func TestBringIsGivenUp(t *testing.T) {
	l := makeLayer(t, forms.EStargz, small(300, 20_000, 1))
	s := serve(t, l)
	m := on(t, t.TempDir(), quick)
	h := m.open(t, l, s.origin(l))
	s.Reset()
	ctx, cancel := context.WithCancel(context.Background())
	var once sync.Once
	err := m.Bring(ctx, everything(h), Bringing{Class: Profile, Progress: func(done, _ int64) { once.Do(cancel) }})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("it says %v", err)
	}
	first := s.ranges()
	if h.Whole() || len(first) == 0 {
		t.Fatalf("after %v the layer is whole: %v", first, h.Whole())
	}
	s.Reset()
	if err := m.Bring(t.Context(), everything(h), Bringing{Class: Profile}); err != nil {
		t.Fatal(err)
	}
	if n, all := total(t, first)+total(t, s.ranges()), l.Size; n > all {
		t.Errorf("%d bytes in both for a blob of %d", n, all)
	}
	checkAll(t, h, l)
}

// TestRateIsKept brings half a megabyte at no more than a megabyte a second, most of
// which is more than the first moment lets through.
func TestRateIsKept(t *testing.T) {
	l := makeLayer(t, forms.EStargz, small(25, 20_000, 1))
	s := serve(t, l)
	m := on(t, t.TempDir(), quick)
	h := m.open(t, l, s.origin(l))
	begin := time.Now()
	if err := m.Bring(t.Context(), everything(h), Bringing{Class: Profile, Rate: 1_000_000}); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(begin); d < 300*time.Millisecond {
		t.Errorf("500 kB came within %v", d)
	}
}

// TestMemoryInFlight has forty large frames wanted at once by readers and by a
// burst: what is held for them stays within the budget, and all of them come.
func TestMemoryInFlight(t *testing.T) {
	fs := small(40, 2<<20, 1)
	l := makeChunked(t, forms.EStargz, fs, 4<<20)
	s := serve(t, l)
	m := on(t, t.TempDir(), quick)
	h := m.open(t, l, s.origin(l))
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := m.Bring(t.Context(), everything(h), Bringing{Class: Profile}); err != nil {
			t.Error(err)
		}
	})
	for i := range fs {
		wg.Go(func() {
			w := want(t, h, fs[len(fs)-1-i].name)
			if err := h.Ensure(w.Off, w.N); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if peak := m.memory.peak.Load(); peak > defaultMemory || peak < defaultMemory/2 || m.memory.used.Load() != 0 {
		t.Errorf("at most %d bytes were held, %d are, the limit is %d", peak, m.memory.used.Load(), defaultMemory)
	}
	checkAll(t, h, l)
}

// TestPlanOrder sorts requests by first use whatever lies first.
func TestPlanOrder(t *testing.T) {
	l := makeLayer(t, forms.EStargz, small(200, 30_000, 1))
	s := serve(t, l)
	m := on(t, t.TempDir(), quick)
	h := m.open(t, l, s.origin(l))
	var wants []Want
	for _, i := range []int{150, 20, 90, 91} {
		wants = append(wants, want(t, h, fmt.Sprintf("f%03d", i)))
	}
	p := m.plan(wants, 0)
	var uses []int
	for _, part := range p.parts {
		uses = append(uses, part.use)
		if !slices.IsSorted(part.frames) {
			t.Errorf("frames %v", part.frames)
		}
	}
	if !slices.Equal(uses, []int{0, 1, 2}) {
		t.Errorf("the requests begin with uses %v", uses)
	}
}

// TestRecord notes what is asked for, once and in order, and no more when it has
// ended.
func TestRecord(t *testing.T) {
	a := makeLayer(t, forms.EStargz, files())
	s := serve(t, a)
	m := on(t, t.TempDir(), quick)
	h := m.open(t, a, s.origin(a))
	r := m.Record([]*Handle{nil, h, h}, true)
	big, little := entry(t, h, "big"), entry(t, h, "small")
	for _, e := range []index.Entry{little, big, little, big} {
		if _, err := content(h, e); err != nil {
			t.Fatal(err)
		}
	}
	uses := r.Stop()
	var n int64
	for i, u := range uses {
		if u.Layer != 1 || u.Off%index.BlockSize != 0 || u.N%index.BlockSize != 0 || u.N <= 0 || i > 0 && u.After < uses[i-1].After {
			t.Errorf("use %d is %+v", i, u)
		}
		n += u.N
	}
	if len(uses) < 2 || uses[0].Off != little.Data/index.BlockSize*index.BlockSize {
		t.Errorf("uses %+v", uses)
	}
	if least := big.Size + little.Size; n < least || n > least+2*index.BlockSize {
		t.Errorf("%d bytes noted of %d", n, least)
	}
	last := r.Last()
	if err := h.Ensure(0, h.Size()); err != nil {
		t.Fatal(err)
	}
	if len(r.Uses()) != len(uses) || r.Last() != last || len(h.recordings.all()) != 0 {
		t.Error("it goes on after its end")
	}
}

// TestDiskNearlyFull keeps the store on a small disk: a burst that is larger stops
// before it is full, and readers still find room.
func TestDiskNearlyFull(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting a small disk needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("varve", dir, "tmpfs", 0, "size=20m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	l := makeLayer(t, forms.EStargz, small(80, 300_000, 1)) // 24 MB
	s := serve(t, l)
	m := on(t, dir, quick)
	h := m.open(t, l, s.origin(l))
	// A link that takes much at once to be full: what is on its way has its place too.
	s.SetFault(func(*http.Request) *link.Fault {
		m.schedule.mu.Lock()
		defer m.schedule.mu.Unlock()
		m.schedule.wire = wire{trip: time.Second, began: time.Now(), rates: [16]float64{8 << 20}}
		return &link.Fault{Delay: 20 * time.Millisecond}
	})
	if err := m.Bring(t.Context(), everything(h), Bringing{Class: Profile}); !errors.Is(err, ErrNoRoom) || errors.Is(err, unix.ENOSPC) {
		t.Fatalf("it says %v", err)
	}
	if n := m.coming.Load(); n != 0 {
		t.Errorf("%d bytes are still to come", n)
	}
	if n := h.Local(); n < 8_000_000 || n > 20_000_000 {
		t.Errorf("it stopped after %d bytes", n)
	}
	for _, name := range []string{"f000", "f079", "f078", "f077"} { // the last were not brought
		checkFile(t, h, find(t, l, name))
	}
}
