package fetch

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"
)

// going reports whether a trip has begun.
func going(t *trip) bool {
	select {
	case <-t.begin:
		return true
	default:
		return false
	}
}

// queued puts a request into the queue of a schedule and gives it.
func queued(t *testing.T, s *schedule, c Class, n int64) (*trip, func() (*trip, error)) {
	t.Helper()
	before := s.waiting(c)
	type result struct {
		*trip
		error
	}
	done := make(chan result, 1)
	go func() {
		tr, err := s.begin(t.Context(), c, n, nil)
		done <- result{tr, err}
	}()
	for {
		s.mu.Lock()
		q := slices.Clone(s.queue[c])
		s.mu.Unlock()
		if len(q) > before {
			return q[len(q)-1], func() (*trip, error) { r := <-done; return r.trip, r.error }
		}
		select {
		case r := <-done:
			done <- r
			return r.trip, func() (*trip, error) { r := <-done; return r.trip, r.error }
		default:
			time.Sleep(time.Millisecond)
		}
	}
}

func testSchedule(c Config) *schedule { return newSchedule(c, newBudget(0)) }

// TestMostUrgentGoesFirst has requests of all classes wait for a full link.
func TestMostUrgentGoesFirst(t *testing.T) {
	s := testSchedule(Config{})
	s.filled = time.Now().Add(time.Hour) // however long it takes, the background waits its turn
	full, err := s.begin(t.Context(), ReadAhead, leastWindow, nil)
	if err != nil {
		t.Fatal(err)
	}
	second, _ := queued(t, s, ReadAhead, leastWindow)
	profile, _ := queued(t, s, Profile, leastWindow)
	early, _ := queued(t, s, Background, 1)
	ahead, _ := queued(t, s, ReadAhead, leastWindow)
	demand, err := s.begin(t.Context(), Demand, 1<<40, nil)
	if err != nil || !going(demand) {
		t.Fatal("who is waited for does not go at once")
	}
	full.end()
	if going(second) {
		t.Error("more is on the wire than the link holds")
	}
	demand.end()
	for i, o := range []*trip{second, ahead, profile} {
		if !going(o) {
			t.Fatalf("request %d does not go when all before it have ended", i)
		}
		for _, later := range []*trip{ahead, profile, early}[min(i, 2):] {
			if later != o && going(later) {
				t.Errorf("a less urgent request goes beside %d", i)
			}
		}
		o.end()
	}
	s.mu.Lock()
	s.reader = time.Time{}
	s.dispatch()
	s.mu.Unlock()
	if !going(early) {
		t.Error("the background does not go when nothing else does")
	}
}

// TestBytesThatCameMakeRoom has a request begin while another still brings its last
// bytes: between them the link would be idle.
func TestBytesThatCameMakeRoom(t *testing.T) {
	s := testSchedule(Config{})
	a, _ := s.begin(t.Context(), Profile, 2*leastWindow, nil)
	b, _ := queued(t, s, Profile, 1)
	a.came(t.Context(), leastWindow-1)
	if going(b) {
		t.Error("it goes while the link is full")
	}
	a.came(t.Context(), 2)
	if !going(b) {
		t.Error("it does not go although the link is not full")
	}
}

// TestFillWaits shows that the background makes room for who is waited for, goes on
// when asked to hurry, and is never stopped for good.
func TestFillWaits(t *testing.T) {
	s := testSchedule(Config{})
	fill, err := s.begin(t.Context(), Background, 1<<20, nil)
	if err != nil {
		t.Fatal(err)
	}
	next, _ := queued(t, s, Background, 1<<10)
	if going(next) == false && s.away[Background] != 1 {
		t.Error("nothing of the background goes")
	}
	demand, _ := s.begin(t.Context(), Demand, 1<<20, nil)
	paced := make(chan struct{})
	begin := time.Now()
	go func() { fill.pace(t.Context()); close(paced) }()
	<-paced // after a while it may bring a little although somebody waits
	if d := time.Since(begin); d < grace/2 {
		t.Errorf("it went on after %v", d)
	}
	paced = make(chan struct{})
	go func() { fill.pace(t.Context()); close(paced) }()
	fill.raise()
	<-paced
	if fill.urgency() != Demand {
		t.Error("it is not urgent although somebody waits for it")
	}
	fill.end()
	demand.end()
	if s.urgent() {
		t.Error("a schedule without requests is busy")
	}
}

// TestFillAlwaysGetsOn keeps a demand on the wire for ever.
func TestFillAlwaysGetsOn(t *testing.T) {
	s := testSchedule(Config{})
	if _, err := s.begin(t.Context(), Demand, 1<<30, nil); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		fill, err := s.begin(t.Context(), Background, 1<<20, nil)
		if err != nil {
			t.Fatal(err)
		}
		if second, _ := queued(t, s, Background, 1); going(second) {
			t.Error("two of the background are on the wire beside a reader")
		} else {
			s.mu.Lock()
			s.queue[Background] = nil
			s.mu.Unlock()
		}
		fill.end()
	}
}

// TestScheduleForgets has requests given up while they wait and just as they may go.
func TestScheduleForgets(t *testing.T) {
	s := testSchedule(Config{})
	full, _ := s.begin(t.Context(), Profile, leastWindow, nil)
	ctx, cancel := context.WithCancel(t.Context())
	gone := make(chan error)
	for range 20 {
		go func() { tr, err := s.begin(ctx, Profile, 10, nil); tr.end(); gone <- err }()
	}
	go full.end()
	cancel()
	for range 20 {
		if err := <-gone; err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range classes {
		if len(s.queue[c]) != 0 || s.away[c] != 0 && c != Profile {
			t.Errorf("class %v: %d wait, %d on the wire", c, len(s.queue[c]), s.away[c])
		}
	}
}

// TestRegistryHasEnough holds back what nobody waits for while a registry asks for it.
func TestRegistryHasEnough(t *testing.T) {
	s := testSchedule(Config{})
	demand, _ := s.begin(t.Context(), Demand, 1, nil)
	demand.refused(time.Hour)
	demand.end()
	for c := ReadAhead; c < classes; c++ {
		if tr, _ := queued(t, s, c, 1); going(tr) {
			t.Errorf("class %v goes", c)
		}
	}
	if again, _ := s.begin(t.Context(), Demand, 1, nil); !going(again) {
		t.Error("who is waited for does not go")
	}
}

// TestHours reads hours and holds times against them.
func TestHours(t *testing.T) {
	at := func(s string) time.Time {
		d, err := time.Parse("15:04:05", s)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	for _, test := range []struct {
		hours    string
		in, out  []string
		wrong    bool
		previous Hours
	}{
		{hours: "", in: []string{"00:00:00", "12:00:00", "23:59:59"}},
		{hours: "22:00-06:00", in: []string{"22:00:00", "23:59:59", "00:00:00", "05:59:59"}, out: []string{"06:00:00", "12:00:00", "21:59:59"}},
		{hours: "01:30 - 5:00", in: []string{"01:30:00", "04:59:59"}, out: []string{"01:29:59", "05:00:00"}},
		{hours: "18:00-24:00", in: []string{"23:59:59"}, out: []string{"00:00:00", "17:59:59"}},
		{hours: "22:00", wrong: true},
		{hours: "22-6", wrong: true},
		{hours: "25:00-06:00", wrong: true},
		{hours: "06:00-06:00", wrong: true},
		{hours: "06:00-07:00-08:00", wrong: true},
	} {
		h, err := ParseHours(test.hours)
		if (err != nil) != test.wrong {
			t.Errorf("%q: %v", test.hours, err)
		}
		for _, s := range test.in {
			if !h.Contain(at(s)) {
				t.Errorf("%q does not contain %s", test.hours, s)
			}
		}
		for _, s := range test.out {
			if h.Contain(at(s)) {
				t.Errorf("%q contains %s", test.hours, s)
			}
		}
	}
}

// TestFillKeepsItsHours queues a fill outside its hours.
func TestFillKeepsItsHours(t *testing.T) {
	now := time.Duration(time.Now().Hour()) * time.Hour
	s := testSchedule(Config{BackgroundHours: Hours{(now + 10*time.Hour) % (24 * time.Hour), (now + 12*time.Hour) % (24 * time.Hour)}})
	s.filled = time.Time{} // it has waited for long
	if tr, _ := queued(t, s, Background, 1); going(tr) {
		t.Error("it goes")
	}
	if tr, _ := s.begin(t.Context(), Profile, 1, nil); !going(tr) {
		t.Error("what is not background does not go")
	}
}

// TestWire measures a link that brings 6 MB a second after 50 ms.
func TestWire(t *testing.T) {
	var w wire
	if w.full() != leastFull || w.window() != leastWindow || w.portion() != leastPortion {
		t.Errorf("a link of which nothing is known: %d, %d, %d", w.full(), w.window(), w.portion())
	}
	now := time.Unix(1e9, 0)
	w.answered(70*time.Millisecond, now)
	w.answered(50*time.Millisecond, now)
	w.answered(150*time.Millisecond, now)
	for range 500 {
		now = now.Add(5 * time.Millisecond)
		w.came(30_000, now)
	}
	if full := w.full(); full < 290_000 || full > 310_000 {
		t.Errorf("%d bytes fill it", full)
	}
	if p := w.portion(); p < 590_000 || p > 610_000 {
		t.Errorf("a portion is %d bytes", p)
	}
	// It becomes slower: what was measured long ago is forgotten.
	for range 1500 {
		now = now.Add(50 * time.Millisecond)
		w.came(30_000, now)
		w.answered(100*time.Millisecond, now)
	}
	if r := w.rate(); r < 590_000 || r > 610_000 {
		t.Errorf("%f bytes a second", r)
	}
	if rt := w.roundTrip(); rt != 100*time.Millisecond {
		t.Errorf("a round trip of %v", rt)
	}
}

// TestBudget has many take memory at once: never more than there is, and never so
// much for what nobody waits for that who is waited for finds none.
func TestBudget(t *testing.T) {
	b := newBudget(0)
	half, err := b.take(t.Context(), Background, b.size)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := b.take(ctx, Profile, 1); err == nil {
		t.Error("half of it is not kept for who is waited for")
	}
	demand, err := b.take(t.Context(), Demand, b.size/2)
	if err != nil {
		t.Fatal(err)
	}
	half()
	demand()
	if b.used.Load() != 0 || b.peak.Load() != b.size {
		t.Errorf("%d in use, at most %d of %d", b.used.Load(), b.peak.Load(), b.size)
	}
}

// TestCores gives a processor to who is waited for first.
func TestCores(t *testing.T) {
	c := &cores{free: 1}
	c.take(Background)
	order := make(chan Class, 2)
	for i, k := range []Class{Background, Demand} {
		go func() { c.take(k); order <- k }()
		for waiting := 0; waiting <= i; time.Sleep(time.Millisecond) {
			c.mu.Lock()
			waiting = len(c.waiting[Background]) + len(c.waiting[Demand])
			c.mu.Unlock()
		}
	}
	c.give()
	if k := <-order; k != Demand {
		t.Errorf("%v goes first", k)
	}
	c.give()
	<-order
	c.give()
	if c.free != 1 {
		t.Errorf("%d are free", c.free)
	}
}

// TestPassesLeaveRoom has many passes on the wire: others begin beside them.
func TestPassesLeaveRoom(t *testing.T) {
	s := testSchedule(Config{})
	var passes []*trip
	for range 2 * maxTrips {
		passes = append(passes, s.enter(Profile))
	}
	for _, c := range []Class{Profile, ReadAhead} {
		if tr, _ := queued(t, s, c, 1); !going(tr) {
			t.Errorf("class %v does not go beside passes", c)
		}
	}
	for _, p := range passes {
		p.raise()
		p.end()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.entered != [classes]int{} {
		t.Errorf("%v are counted when all have ended", s.entered)
	}
}
