package fetch

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"github.com/varvefs/varve/bench/forms"
	"github.com/varvefs/varve/bench/link"
)

// openAhead opens a layer as who does not mind that more is fetched than is asked for.
func (m *machine) openAhead(t testing.TB, l *layer, o Origin) *Handle {
	t.Helper()
	q := m.request(l, o)
	q.NoAhead = false
	h, err := m.Open(t.Context(), q)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	return h
}

// TestMissBringsNeighbours reads one file in the middle: what lies around it comes
// too, counts as not read, and is not asked for when it is read.
func TestMissBringsNeighbours(t *testing.T) {
	l := makeLayer(t, forms.EStargz, small(200, 10_000, 1))
	s := serve(t, l)
	m := on(t, t.TempDir(), quick)
	h := m.openAhead(t, l, s.origin(l))
	s.Reset()
	w := want(t, h, "f100")
	full := m.schedule.full() // by what is known before
	if err := h.Ensure(w.Off, w.N); err != nil {
		t.Fatal(err)
	}
	calm(t)
	n := total(t, s.ranges())
	if n < full/2 || n > 2*full+20_000 {
		t.Errorf("%d bytes came, of a link of %d", n, full)
	}
	unread := h.Unread()
	if unread < 50_000 || unread > n || len(s.ranges()) > 3 {
		t.Errorf("%d of %d bytes are not read; requests %v", unread, n, s.ranges())
	}
	s.Reset()
	for _, name := range []string{"f101", "f102", "f099"} {
		checkFile(t, h, find(t, l, name))
	}
	if rs := s.ranges(); len(rs) != 0 {
		t.Errorf("neighbours were asked for: %v", rs)
	}
	if now := h.Unread(); now >= unread-25_000 {
		t.Errorf("%d bytes are not read, were %d", now, unread)
	}
	if f, r := m.count(t, "ahead_bytes_total", "fetched"), m.count(t, "ahead_bytes_total", "read"); int64(f-r) != h.Unread() {
		t.Errorf("%d bytes fetched ahead, %d read, %d not", f, r, h.Unread())
	}
}

// TestNothingAhead reads as who wants nothing but what is asked for.
func TestNothingAhead(t *testing.T) {
	l := makeLayer(t, forms.EStargz, small(100, 10_000, 1))
	s := serve(t, l)
	m := on(t, t.TempDir(), quick)
	h := m.open(t, l, s.origin(l))
	s.Reset()
	var exact int64
	for i := range 99 { // nearly all, in order
		e := entry(t, h, fmt.Sprintf("f%03d", i))
		checkFile(t, h, find(t, l, e.Name))
		f := h.frames.Frame(h.frames.FrameOf(i))
		exact += f.Length
	}
	calm(t)
	if n := total(t, s.ranges()); n != exact || len(s.ranges()) != 99 || h.Unread() != 0 {
		t.Errorf("%d bytes in %d requests, want %d in 99; %d unread", n, len(s.ranges()), exact, h.Unread())
	}
}

// TestKnownStart reads what a burst has announced: nothing comes besides, until it is
// over.
func TestKnownStart(t *testing.T) {
	l := makeLayer(t, forms.EStargz, small(100, 10_000, 1))
	s := serve(t, l)
	m := on(t, t.TempDir(), quick)
	h := m.openAhead(t, l, s.origin(l))
	h.Known(true)
	s.Reset()
	checkFile(t, h, find(t, l, "f050"))
	calm(t)
	if h.Unread() != 0 || len(s.ranges()) != 1 {
		t.Errorf("%d bytes came besides: %v", h.Unread(), s.ranges())
	}
	h.Known(false)
	checkFile(t, h, find(t, l, "f020"))
	calm(t)
	if h.Unread() == 0 {
		t.Error("nothing comes besides when the start is over")
	}
	// What is read is not what was announced: it is another start.
	dropAll(t, h)
	h.Known(true)
	for i := range tooStrange {
		if h.Unread() != 0 {
			t.Errorf("%d bytes came besides after %d misses", h.Unread(), i)
		}
		checkFile(t, h, find(t, l, fmt.Sprintf("f%03d", 15+20*i)))
		calm(t)
	}
	if h.Unread() == 0 {
		t.Error("nothing comes besides a start that is another")
	}
}

// TestSequentialReader reads a large file from its beginning: requests become wide,
// several at once, and no byte comes twice.
func TestSequentialReader(t *testing.T) {
	fs := append(small(300, 50_000, 7), file{"large", noise(16<<20, 1)}, file{"z", noise(10, 9)})
	l := makeChunked(t, forms.EStargz, fs, 64<<10)
	s := serve(t, l)
	m := on(t, t.TempDir(), quick)
	h := m.openAhead(t, l, s.origin(l))
	const read, half = 128 << 10, 8 << 20
	e := entry(t, h, "large")
	once := func() {
		t.Helper()
		seen := map[int64]bool{}
		for _, r := range s.ranges() {
			from, end := bounds(t, r)
			for at := (from + 4095) / 4096 * 4096; at < end; at += 4096 {
				if seen[at] {
					t.Fatalf("byte %d came twice: %v", at, s.ranges())
				}
				seen[at] = true
			}
		}
	}

	// The read that shows that they are in sequence asks for its own and has more asked
	// for ahead of it: its answer waits for that request. All others go on when nothing
	// is on its way, on a link of which nothing is known.
	s.Reset()
	var third atomic.Bool
	var asked atomic.Int64 // during it
	both := make(chan struct{})
	s.SetFault(func(*http.Request) *link.Fault {
		if !third.Load() {
			return nil
		}
		if asked.Add(1) == 2 {
			close(both)
		}
		select {
		case <-both:
			if len(running()) == 0 {
				t.Error("nobody is seen to bring what comes ahead")
			}
		case <-time.After(time.Minute):
			t.Error("never were two requests on the wire")
		}
		return nil
	})
	for off := int64(0); off < half; off += read {
		m.schedule.mu.Lock()
		m.schedule.wire = wire{}
		m.schedule.mu.Unlock()
		third.Store(off == (steps-1)*read)
		if err := h.Ensure(e.Data+off, read); err != nil {
			t.Fatal(err)
		}
		calm(t)
	}
	if n := len(s.ranges()); n > 30 {
		t.Errorf("%d requests for %d reads", n, half/read)
	}
	once()
	if m.count(t, "fetch_requests_total", "readahead") == 0 {
		t.Error("nothing was asked for as read-ahead")
	}

	// Beside what comes ahead of it, however far that is.
	dropAll(t, h)
	s.Reset()
	s.SetFault(func(*http.Request) *link.Fault { time.Sleep(20 * time.Millisecond); return nil })
	for off := int64(0); off < half; off += read {
		if err := h.Ensure(e.Data+off, read); err != nil {
			t.Fatal(err)
		}
	}
	calm(t)
	once()
	checkFile(t, h, find(t, l, "large"))
}

// TestMostOfALayer reads more than half of a layer, here and there: all of it comes.
func TestMostOfALayer(t *testing.T) {
	l := makeLayer(t, forms.EStargz, small(150, 20_000, 1))
	s := serve(t, l)
	m := on(t, t.TempDir(), quick)
	h := m.openAhead(t, l, s.origin(l))
	order := rand.New(rand.NewPCG(1, 2)).Perm(150)
	for _, i := range order[:90] {
		checkFile(t, h, find(t, l, fmt.Sprintf("f%03d", i)))
	}
	calm(t)
	if !h.Whole() {
		t.Errorf("%d frames are missing", h.data.Missing())
	}
	if n := total(t, s.ranges()); n > l.Size+1<<20 {
		t.Errorf("%d bytes came for a blob of %d", n, l.Size)
	}
	checkAll(t, h, l)
}

// TestEconomy shows what comes with a miss grow while it saves round trips, and
// shrink while it is not read.
func TestEconomy(t *testing.T) {
	const full = 300_000
	var good, bad ahead
	for range 40 {
		for a, hits := range map[*ahead]int64{&good: 5, &bad: 0} {
			a.brought += a.adapt(full)
			a.hits += hits
		}
	}
	if n := good.adapt(full); n != mostAround*full {
		t.Errorf("%d bytes come where all is read", n)
	}
	if n := bad.adapt(full); n != leastAround*full {
		t.Errorf("%d bytes come where nothing is read", n)
	}
}
