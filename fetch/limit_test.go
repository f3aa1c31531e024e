package fetch

import (
	"context"
	"errors"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"github.com/varvefs/varve/bench/forms"
	"github.com/varvefs/varve/bench/link"
)

// crawl is a limit at which nothing in a test would ever end.
const crawl = 1

// asking makes a site tell when it is asked.
func asking(s *site) (asked chan struct{}) {
	asked = make(chan struct{}, 1000)
	s.SetFault(func(*http.Request) *link.Fault { asked <- struct{}{}; return nil })
	return asked
}

// crawling has all of a layer brought as slowly as may be; slow says how that ended.
func crawling(t *testing.T) (m *machine, h *Handle, l *layer, slow <-chan error) {
	t.Helper()
	l = makeLayer(t, forms.EStargz, small(20, 20_000, 1))
	s := serve(t, l)
	m = on(t, t.TempDir(), quick)
	h = m.open(t, l, s.origin(l))
	asked, ended := asking(s), make(chan error, 1)
	go func() {
		ended <- m.Bring(context.Background(), everything(h), Bringing{Class: Profile, Rate: crawl})
	}()
	<-asked
	return m, h, l, ended
}

// TestReaderHurriesALimit reads what a limit lets through a byte a second.
func TestReaderHurriesALimit(t *testing.T) {
	_, h, l, slow := crawling(t)
	checkAll(t, h, l)
	if err := <-slow; err != nil {
		t.Error(err)
	}
}

// TestFasterJoinsALimit has the same brought with a limit and without.
func TestFasterJoinsALimit(t *testing.T) {
	m, h, _, slow := crawling(t)
	if err := m.Bring(t.Context(), everything(h), Bringing{Class: Profile}); err != nil || !h.Whole() {
		t.Errorf("%v, whole: %v", err, h.Whole())
	}
	if err := <-slow; err != nil {
		t.Error(err)
	}
}

// TestLimitIsGivenUp cancels what would go on for days.
func TestLimitIsGivenUp(t *testing.T) {
	l := makeLayer(t, forms.EStargz, small(20, 20_000, 1))
	s := serve(t, l)
	m := on(t, t.TempDir(), quick)
	h := m.open(t, l, s.origin(l))
	asked, slow := asking(s), make(chan error)
	ctx, cancel := context.WithCancel(context.Background())
	go func() { slow <- m.Bring(ctx, everything(h), Bringing{Class: Background, Rate: crawl}) }()
	<-asked
	cancel()
	if err := <-slow; !errors.Is(err, context.Canceled) {
		t.Errorf("it says %v", err)
	}
	checkAll(t, h, l)
}

// TestClosedInTheMiddleOfALimit ends the Fetcher while a limit has all of a layer on
// the wire.
func TestClosedInTheMiddleOfALimit(t *testing.T) {
	l := makeLayer(t, forms.EStargz, small(20, 20_000, 1))
	s := serve(t, l)
	m := on(t, t.TempDir(), quick)
	h := m.open(t, l, s.origin(l))
	asked, slow := asking(s), make(chan error)
	go func() {
		slow <- m.Bring(context.Background(), everything(h), Bringing{Class: Background, Rate: crawl})
	}()
	<-asked
	m.close(t)
	if err := <-slow; err == nil {
		t.Error("it says that all of it is here")
	}
}

// large are files whose frames take some megabytes of memory each.
func large(n int, seed uint64) (fs []file) {
	for i := range n {
		fs = append(fs, file{string(rune('a' + i)), noise(3<<20, seed+uint64(i))})
	}
	return fs
}

// TestLimitHoldsNoMemory has all memory that is not a reader's taken by what comes a
// byte a second: a burst gets some.
func TestLimitHoldsNoMemory(t *testing.T) {
	slow, fast := makeChunked(t, forms.EStargz, large(3, 1), 4<<20), makeChunked(t, forms.EStargz, large(3, 9), 4<<20)
	s := serve(t, slow, fast)
	m := on(t, t.TempDir(), quick)
	h, other := m.open(t, slow, s.origin(slow)), m.open(t, fast, s.origin(fast))
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	for _, f := range slow.files {
		go func() {
			ended <- m.Bring(ctx, []Want{want(t, h, f.name)}, Bringing{Class: Background, Rate: crawl})
		}()
	}
	for m.memory.used.Load() <= defaultMemory/4 { // more than leaves room for another
		time.Sleep(time.Millisecond)
	}
	if err := m.Bring(t.Context(), everything(other), Bringing{Class: Profile}); err != nil {
		t.Error(err)
	}
	checkAll(t, other, fast)
	cancel()
	for range slow.files {
		if err := <-ended; err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}
	checkAll(t, h, slow)
}

// TestReaderTakesItsOwnMemory reads what a burst waits for memory for.
func TestReaderTakesItsOwnMemory(t *testing.T) {
	l := makeChunked(t, forms.EStargz, large(2, 1), 4<<20)
	s := serve(t, l)
	m := on(t, t.TempDir(), quick)
	h := m.open(t, l, s.origin(l))
	others, err := m.memory.take(t.Context(), Background, defaultMemory/2)
	if err != nil {
		t.Fatal(err)
	}
	burst := make(chan error)
	go func() { burst <- m.Bring(context.Background(), everything(h), Bringing{Class: Profile}) }()
	for m.memory.pressed.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	checkAll(t, h, l)
	others()
	if err := <-burst; err != nil {
		t.Error(err)
	}
	if n := m.memory.used.Load(); n != 0 {
		t.Errorf("%d bytes are still held", n)
	}
}

// TestSilentRegistryHoldsNoMemory has more readers wait for a registry that does not
// answer than there is memory for: one of another registry gets on.
func TestSilentRegistryHoldsNoMemory(t *testing.T) {
	l, ok := makeChunked(t, forms.EStargz, large(8, 1), 4<<20), makeChunked(t, forms.EStargz, large(1, 20), 4<<20)
	s, other := serve(t, l), serve(t, ok)
	m := on(t, t.TempDir(), quick)
	h, fine := m.open(t, l, s.origin(l)), m.open(t, ok, other.origin(ok))
	hold := make(chan struct{})
	var asked atomic.Int64
	s.SetFault(func(*http.Request) *link.Fault { asked.Add(1); <-hold; return nil })
	read := make(chan error)
	for _, f := range l.files {
		go func() { w := want(t, h, f.name); read <- h.Ensure(w.Off, w.N) }()
	}
	for asked.Load() < int64(len(l.files)) {
		time.Sleep(time.Millisecond)
	}
	checkAll(t, fine, ok)
	close(hold)
	for range l.files {
		if err := <-read; err != nil {
			t.Error(err)
		}
	}
	checkAll(t, h, l)
}

// TestAllIsTriedAgain has the rest of a layer fail to come, as most of it was read.
func TestAllIsTriedAgain(t *testing.T) {
	l := makeLayer(t, forms.EStargz, small(20, 20_000, 1))
	s := serve(t, l)
	m := on(t, t.TempDir(), quick) // a refusal needs no patience
	h := m.open(t, l, s.origin(l))
	h.ahead.all = true
	s.always(link.Fault{Status: http.StatusNotFound})
	h.pull()
	h.runs.Wait()
	if h.ahead.all {
		t.Error("nothing would ever come ahead of a reader again")
	}
	s.SetFault(nil)
	checkAll(t, h, l)
}

// TestRecordOfAnEndlessLayer records one whose manifest says that it is of any size.
func TestRecordOfAnEndlessLayer(t *testing.T) {
	for _, size := range []int64{1 << 20, 1 << 40, 1 << 60, 1<<63 - 1} {
		r := &Recorder{start: time.Now(), layers: make([]*recording, 3), room: maxRecorded}
		ps := []*Pass{{size: size}, {size: size}, {size: 1 << 10}}
		words := 0
		for i, p := range ps {
			r.Follow(i, p)
			words += len(r.layers[i].blocks)
		}
		if words > maxRecorded/4096/64+3 {
			t.Errorf("%d bytes: %d bytes of memory", size, 8*words)
		}
		ps[0].recordings.note(0, 1)
		ps[0].recordings.note(1<<62, 1)
		if uses := r.Stop(); len(uses) != 1 {
			t.Errorf("%d bytes: %v", size, uses)
		}
	}
}
