package fetch

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"sync"
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

// calm waits until nothing of a layer is on its way.
func calm(t testing.TB, h *Handle) {
	t.Helper()
	for range 3 { // what was asked for may have to begin first
		for busy := true; busy; time.Sleep(time.Millisecond) {
			h.mu.Lock()
			busy = len(h.flights) > 0
			h.mu.Unlock()
			busy = busy || h.f.schedule.waiting(ReadAhead) > 0 || h.f.schedule.urgentNow()
		}
		time.Sleep(20 * time.Millisecond)
	}
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
	if err := h.Ensure(w.Off, w.N); err != nil {
		t.Fatal(err)
	}
	calm(t, h)
	n := total(t, s.ranges())
	if full := m.schedule.full(); n < full/2 || n > 2*full+20_000 {
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
	calm(t, h)
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
	calm(t, h)
	if h.Unread() != 0 || len(s.ranges()) != 1 {
		t.Errorf("%d bytes came besides: %v", h.Unread(), s.ranges())
	}
	h.Known(false)
	checkFile(t, h, find(t, l, "f020"))
	calm(t, h)
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
		calm(t, h)
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
	s.Reset()
	var mu sync.Mutex
	now, most := 0, 0
	s.SetFault(func(r *http.Request) *link.Fault {
		mu.Lock()
		now++
		most = max(most, now)
		mu.Unlock()
		time.Sleep(20 * time.Millisecond)
		mu.Lock()
		now--
		mu.Unlock()
		return nil
	})
	e := entry(t, h, "large")
	const half = 8 << 20
	for off := int64(0); off < half; off += 128 << 10 {
		if err := h.Ensure(e.Data+off, 128<<10); err != nil {
			t.Fatal(err)
		}
	}
	calm(t, h)
	if most < 2 {
		t.Error("never were two requests on the wire")
	}
	rs := s.ranges()
	if len(rs) > 30 {
		t.Errorf("%d requests for 128 reads", len(rs))
	}
	seen := map[int64]bool{}
	for _, r := range rs {
		from, end := bounds(t, r)
		for at := from; at < end; at++ {
			if at%4096 == 0 {
				if seen[at] {
					t.Fatalf("byte %d came twice: %v", at, rs)
				}
				seen[at] = true
			}
		}
	}
	if m.count(t, "fetch_requests_total", "readahead") == 0 {
		t.Error("nothing was asked for as read-ahead")
	}
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
	calm(t, h)
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
