package fetch

import (
	"context"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Class is why bytes are fetched, the most urgent first.
type Class uint8

const (
	Demand     Class = iota // a reader waits for them
	ReadAhead               // a reader is likely to come to them
	Profile                 // a start will need them, or somebody asked for them ahead of need
	Background              // they are missing
	classes
)

func (c Class) String() string {
	return [...]string{"demand", "readahead", "profile", "background", "unknown"}[min(c, classes)]
}

const (
	maxTrips = 16 // on the wire, of those that nobody waits for
	// patienceOfFill is how long the background waits while others are served,
	// before a little of it goes all the same.
	patienceOfFill = time.Second
	grace          = 250 * time.Millisecond
)

// schedule lets requests for blobs go, the most urgent first, for all layers of the
// daemon. Who is waited for goes at once. The others begin only while less is on
// the wire than the link needs to be full, so a reader that comes finds a short
// queue. The background goes when nothing else does, one request at a time where
// somebody has just been reading, and stops in the middle for who is waited for.
type schedule struct {
	fill   *rate.Limiter // of the background, nil is no limit
	hours  Hours         // of the background
	memory *budget

	mu      sync.Mutex // guards what follows
	wire    wire
	queue   [classes][]*trip
	entered [classes]int   // of those on the wire, the ones that did not wait in the queue
	away    [classes]int   // requests on the wire
	left    [classes]int64 // bytes that they will still bring
	calm    chan struct{}  // closed when nothing more urgent than the background is on the wire; nil then
	until   time.Time      // a registry asked for peace
	reader  time.Time      // when somebody last waited
	filled  time.Time      // when the background last began or was paused
	looking bool           // a timer looks at the queue
}

// trip is a request for a range of a blob, from its place in the queue to its last
// byte. A nil trip is one that needs no network.
type trip struct {
	s       *schedule
	limit   *rate.Limiter
	begin   chan struct{} // closed when it may
	entered int           // 1 where it did not wait for that

	class  Class // guarded by s.mu; it may become more urgent
	left   int64 // bytes that it will still bring; guarded by s.mu, as over is
	over   bool
	raised chan struct{} // closed when it has
}

func newSchedule(c Config, memory *budget) *schedule {
	return &schedule{fill: limiter(c.BackgroundRate), hours: c.BackgroundHours, memory: memory, filled: time.Now()}
}

// limiter lets bytesPerSecond through, nil for 0, which is no limit.
func limiter(bytesPerSecond int64) *rate.Limiter {
	if bytesPerSecond <= 0 {
		return nil
	}
	return rate.NewLimiter(rate.Limit(bytesPerSecond), int(min(max(bytesPerSecond/8, 4<<10), 1<<20)))
}

// begin waits until n bytes may be asked for. The caller ends the trip.
func (s *schedule) begin(ctx context.Context, c Class, n int64, limit *rate.Limiter) (*trip, error) {
	t := &trip{s: s, limit: limit, class: c, left: n, begin: make(chan struct{}), raised: make(chan struct{})}
	if c == Background && limit == nil {
		t.limit = s.fill
	}
	if t.limit != nil {
		t.left = 0 // it does not fill the link, and must keep nobody from doing so
	}
	s.mu.Lock()
	if c == Demand {
		s.start(t)
		s.mu.Unlock()
		return t, nil
	}
	s.queue[c] = append(s.queue[c], t)
	s.dispatch()
	s.mu.Unlock()
	select {
	case <-t.begin:
		return t, nil
	case <-ctx.Done():
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-t.begin: // just now
		s.finish(t)
	default:
		s.queue[c] = slices.DeleteFunc(s.queue[c], func(o *trip) bool { return o == t })
		s.dispatch()
	}
	return nil, context.Cause(ctx)
}

// enter begins a trip at once that has its own way of waiting its turn, such as a
// pass over a layer: the background makes room for it, and the link is measured by it.
func (s *schedule) enter(c Class) *trip {
	t := &trip{s: s, class: c, entered: 1, begin: make(chan struct{}), raised: make(chan struct{})}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.entered[c] += t.entered
	s.start(t)
	return t
}

// start lets a trip go. The caller holds mu, as for all that follows but for the
// methods of a trip.
func (s *schedule) start(t *trip) {
	now := time.Now()
	if t.class == Background {
		s.filled = now
	}
	s.count(t.class, 1)
	s.left[t.class] += t.left
	close(t.begin)
}

// count keeps how many are on the wire.
func (s *schedule) count(c Class, by int) {
	if s.away[c] += by; c == Demand {
		s.reader = time.Now()
	}
	switch urgent := s.urgent(); {
	case urgent && s.calm == nil:
		s.calm = make(chan struct{})
	case !urgent && s.calm != nil:
		close(s.calm)
		s.calm = nil
	}
}

// urgent reports whether something more urgent than the background is on the wire.
func (s *schedule) urgent() bool { return s.away[Demand]+s.away[ReadAhead]+s.away[Profile] > 0 }

func (s *schedule) finish(t *trip) {
	s.count(t.class, -1)
	s.entered[t.class] -= t.entered
	s.left[t.class] -= t.left
	t.left, t.over = 0, true
	s.dispatch()
}

// dispatch starts what may begin. While the more urgent waits the less does, but
// for a little of the background now and then.
func (s *schedule) dispatch() {
	now := time.Now()
	for c := ReadAhead; c < classes; c++ {
		for len(s.queue[c]) > 0 && s.may(c, now) {
			s.start(s.queue[c][0])
			s.queue[c] = s.queue[c][1:]
		}
		if len(s.queue[c]) > 0 && c < Background {
			break
		}
	}
	if len(s.queue[Background]) > 0 && s.away[Background] == 0 && now.Sub(s.filled) >= patienceOfFill && s.open(now) {
		s.start(s.queue[Background][0])
		s.queue[Background] = s.queue[Background][1:]
	}
	if !s.looking && (len(s.queue[Background]) > 0 || len(s.queue[Profile]) > 0 || len(s.queue[ReadAhead]) > 0) {
		s.looking = true // time alone may let them go
		time.AfterFunc(grace/2, func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.looking = false
			s.dispatch()
		})
	}
}

// open reports whether the background may go at all.
func (s *schedule) open(now time.Time) bool { return now.After(s.until) && s.hours.Contain(now) }

// may reports whether the first that waits in a class may begin.
func (s *schedule) may(c Class, now time.Time) bool {
	if c == Background && (s.urgent() || !s.open(now) || s.away[Background] > 0 && (s.fill != nil || now.Sub(s.reader) < patienceOfFill)) {
		return false // with a limit, more at a time would not be faster
	}
	trips, left := 0, s.left[Demand]
	for o := ReadAhead; o <= c; o++ { // what is less urgent holds nobody up
		trips += s.away[o] - s.entered[o]
		left += s.left[o]
	}
	return trips < maxTrips && left < s.wire.window() && now.After(s.until)
}

// portion is how large one request of those that nobody waits for should be.
func (s *schedule) portion() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.wire.portion()
}

// full is what the link brings in a round trip, in bytes.
func (s *schedule) full() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.wire.full()
}

// refused tells that a registry has enough for so long: nothing begins meanwhile
// that nobody waits for.
func (t *trip) refused(d time.Duration) {
	if t == nil {
		return
	}
	t.s.mu.Lock()
	defer t.s.mu.Unlock()
	if until := time.Now().Add(d); until.After(t.s.until) {
		t.s.until = until
	}
}

// waiting counts the requests of a class that may not begin yet.
func (s *schedule) waiting(c Class) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.queue[c])
}

// answered tells how long an answer took to begin.
func (t *trip) answered(d time.Duration) {
	if t == nil {
		return
	}
	t.s.mu.Lock()
	defer t.s.mu.Unlock()
	t.s.wire.answered(d, time.Now())
}

// came tells that n bytes came, and waits where they came too fast.
func (t *trip) came(ctx context.Context, n int) {
	if t == nil || n == 0 {
		return
	}
	s := t.s
	s.mu.Lock()
	s.wire.came(n, time.Now())
	had := min(int64(n), t.left) // of what is asked for again there may be more
	t.left -= had
	s.left[t.class] -= had
	s.dispatch()
	s.mu.Unlock()
	for t.limit != nil && n > 0 {
		part := min(n, t.limit.Burst())
		if !t.slow(ctx, part) {
			return
		}
		n -= part
	}
}

// slow waits until the limit lets n bytes through. It reports that there is no time
// for that where somebody waits for the trip, or for the memory that it holds: a
// limit can be so low that they would wait for hours.
func (t *trip) slow(ctx context.Context, n int) bool {
	r := t.limit.ReserveN(time.Now(), n)
	for {
		select {
		case <-t.raised:
			return false
		case <-ctx.Done():
			return false
		default:
		}
		d := r.Delay()
		if d <= 0 {
			return true
		}
		if t.s.memory.pressed.Load() > 0 {
			return false
		}
		timer := time.NewTimer(min(d, grace))
		select {
		case <-t.raised:
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
	}
}

// hold takes memory for n bytes of what the trip brings, as one that somebody waits
// for as soon as somebody does. The caller calls release, once.
func (t *trip) hold(ctx context.Context, b *budget, n int64) (release func(), err error) {
	c := t.urgency()
	if c < Background && (t == nil || t.limit == nil) {
		b.pressed.Add(1)
		defer b.pressed.Add(-1)
	}
	if c == Demand {
		return b.take(ctx, c, n)
	}
	calm, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-t.raised:
			cancel()
		case <-calm.Done():
		}
	}()
	if release, err = b.take(calm, c, n); err != nil && ctx.Err() == nil {
		return t.hold(ctx, b, n)
	}
	return release, err
}

// pace holds a fill while somebody waits for something else, though never for long
// at a time, nor while it has memory that others need.
func (t *trip) pace(ctx context.Context) {
	if t == nil {
		return
	}
	s := t.s
	s.mu.Lock()
	calm := s.calm
	if t.class != Background || calm == nil || s.memory.pressed.Load() > 0 {
		s.mu.Unlock()
		return
	}
	s.filled = time.Now()
	s.mu.Unlock()
	timer := time.NewTimer(grace)
	defer timer.Stop()
	select {
	case <-calm:
	case <-t.raised:
	case <-timer.C:
	case <-ctx.Done():
	}
}

// raise makes the trip one that somebody waits for.
func (t *trip) raise() {
	if t == nil {
		return
	}
	t.s.mu.Lock()
	defer t.s.mu.Unlock()
	if t.class == Demand || t.over {
		return
	}
	t.s.count(Demand, 1)
	t.s.count(t.class, -1)
	t.s.entered[Demand] += t.entered
	t.s.entered[t.class] -= t.entered
	t.s.left[Demand] += t.left
	t.s.left[t.class] -= t.left
	t.class = Demand
	close(t.raised)
}

// join has who makes another trip wait for this one, which must not be slower.
func (t *trip) join(other *trip) {
	if t != nil && (t.urgency() > other.urgency() || t.limit != nil && (other == nil || other.limit == nil)) {
		t.raise()
	}
}

// urgency gives the class that the trip has by now.
func (t *trip) urgency() Class {
	if t == nil {
		return Demand
	}
	t.s.mu.Lock()
	defer t.s.mu.Unlock()
	return t.class
}

func (t *trip) end() {
	if t == nil {
		return
	}
	t.s.mu.Lock()
	defer t.s.mu.Unlock()
	t.s.finish(t)
}
