package fetch

import (
	"sync"
	"sync/atomic"

	"github.com/varvefs/varve/index"
)

// What is read of an image has neighbours that are read soon: files of a package, the
// next pages of a library. A round trip for each would take longer than their bytes.
// So a miss brings what lies around it. How much is a matter of economy: every read
// that finds its bytes here saves a round trip, which is worth as many bytes as the
// link would have brought meanwhile; what is brought and not read costs its own. And
// who reads on and on in one place has wide ranges fetched before him. Most of a
// layer asked for is as good as all of it.
const (
	usualAround  = 1.0 // of what fills the link
	leastAround  = 0.25
	mostAround   = 3.0
	firstStretch = 512 << 10 // bytes of the blob before a sequential reader
	mostStretch  = 16 << 20
	longRead     = 256 << 10 // bytes in sequence that make a reader sequential
	steps        = 3         // and reads: a large frame is none
	maxStreams   = 8
	tooStrange   = 4        // misses that a known start has not, if it is that start
	nearby       = 32 << 10 // a gap that one request takes along
)

// ahead is what a layer knows of how it is read.
type ahead struct {
	asked  bitmap // frames that somebody asked for
	unread bitmap // frames that were fetched ahead of need, and nobody asked for yet
	plan   bitmap // frames that somebody has brought ahead of need, or will
	waste  atomic.Int64

	mu      sync.Mutex // guards what follows
	bytes   int64      // compressed, of the frames that were asked for
	around  float64    // how much a miss brings besides, in what fills the link
	brought int64      // bytes that came so of late
	used    int64      // of those, what was read
	hits    int64      // reads that found their bytes here because of them
	streams [maxStreams]stream
	at      int
	all     bool // everything is on its way
	strange int  // misses of what nobody had announced, since a start was known
}

// stream is a reader that goes from frame to frame.
type stream struct {
	next    int   // the frame it will ask for
	end     int   // the first that was not asked for ahead of it
	steps   int   // reads so far
	read    int64 // compressed bytes of them
	stretch int64 // how far ahead of it is fetched
}

// Unread gives the compressed bytes of the layer that were fetched ahead of need and
// that nobody has asked for yet.
func (l *Layer) Unread() int64 { return l.ahead.waste.Load() }

// unread counts a frame that came ahead of need, unless it was asked for meanwhile.
func (l *Layer) unread(f int) {
	n := l.frames.Frame(f).Length
	l.f.m.AheadBytes.WithLabelValues("fetched").Add(float64(n))
	if l.ahead.asked.has(f) {
		l.f.m.AheadBytes.WithLabelValues("read").Add(float64(n))
		return
	}
	if l.ahead.unread.add(f) {
		l.ahead.waste.Add(n)
	}
}

// forget has a frame of so many bytes of the blob count as never seen.
func (a *ahead) forget(f int, n int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.asked.remove(f) {
		a.bytes -= n
	}
	if a.unread.remove(f) {
		a.waste.Add(-n)
	}
	a.all = false
}

// see notes that pieces [from, to) are asked for, some for the first time. It gives
// the frames that are best fetched in the same request if some of them are missing,
// and has others fetched ahead.
func (l *Layer) see(from, to int, miss bool) (besides []int) {
	a := &l.ahead
	may, known := l.mayAhead() // its lock is taken before this one
	a.mu.Lock()
	first, last := -1, -1
	var n, found int64
	for i := from; i < to; i++ {
		f := l.frames.FrameOf(i)
		if !a.asked.add(f) {
			continue
		}
		if last = max(last, f); first < 0 || f < first {
			first = f
		}
		length := l.frames.Frame(f).Length
		n += length
		if a.unread.remove(f) {
			a.waste.Add(-length)
			found += length
			l.f.m.AheadBytes.WithLabelValues("read").Add(float64(length))
		}
	}
	a.bytes += n
	if known && miss && first >= 0 && !a.plan.has(first) {
		a.strange++
	}
	if first < 0 || !may || known && a.strange < tooStrange {
		a.mu.Unlock()
		return nil
	}
	var wide []int
	s := a.follow(first)
	if s.stretch == 0 && found > 0 {
		a.used += found
		if !miss {
			a.hits++
		}
	}
	s.read += n
	s.steps++
	s.next = last + 1
	s.end = max(s.end, s.next)
	switch frames, _, _ := l.frames.Len(); {
	case 2*a.bytes > l.About().Size && !a.all:
		a.all = true
		a.mu.Unlock()
		l.pull()
		return nil
	case a.all:
	case s.read >= longRead && s.steps >= steps:
		left := l.between(s.next, s.end)
		if s.stretch == 0 {
			s.stretch = firstStretch
		} else if left >= s.stretch/2 {
			break
		} else {
			s.stretch = min(2*s.stretch, mostStretch)
		}
		to := s.end
		for ; to < frames && left < s.stretch; to++ {
			left += l.frames.Frame(to).Length
		}
		wide = l.missingIn(s.end, to)
		s.end = to
	case miss:
		around := a.adapt(l.f.schedule.full())
		high := l.reach(last+1, 1, around*2/3)
		besides = l.missingIn(last+1, high)
		wide = l.missingIn(l.reach(first-1, -1, around/3)+1, first)
		s.end = max(s.end, high)
		a.brought += l.bytes(besides) + l.bytes(wide)
	}
	a.mu.Unlock()
	if len(wide) > 0 {
		l.fetchAhead(wide)
	}
	return besides
}

// reach gives the first frame, from one on and in steps of by, that is not among
// those of so many bytes of the blob.
func (l *Layer) reach(f, by int, bytes int64) int {
	for n, _, _ := l.frames.Len(); f >= 0 && f < n; f += by {
		if bytes -= l.frames.Frame(f).Length; bytes < 0 {
			break
		}
	}
	return f
}

// adapt gives how many bytes of the blob shall come with a miss, where so many fill
// the link: more while that saves time, fewer while it costs some.
func (a *ahead) adapt(full int64) int64 {
	if a.around == 0 {
		a.around = usualAround
	}
	if window := int64(a.around * float64(full)); a.brought < 4*window {
		return window
	}
	switch saved, lost := a.hits*full, a.brought-a.used; {
	case saved > lost:
		a.around = min(2*a.around, mostAround)
	case 4*saved < lost:
		a.around = max(a.around/2, leastAround)
	}
	a.brought, a.used, a.hits = a.brought/2, a.used/2, a.hits/2
	return int64(a.around * float64(full))
}

// follow gives the stream that a read of frame f goes on, else a new one in the
// place of the oldest.
func (a *ahead) follow(f int) *stream {
	for i := range a.streams {
		if s := &a.streams[i]; s.steps > 0 && f >= s.next && f <= s.next+1 {
			return s
		}
	}
	a.at = (a.at + 1) % maxStreams
	a.streams[a.at] = stream{next: f, end: f}
	return &a.streams[a.at]
}

// between gives the compressed bytes of frames [from, to).
func (l *Layer) between(from, to int) (n int64) {
	for f := from; f < to; f++ {
		n += l.frames.Frame(f).Length
	}
	return n
}

// missingIn gives those of frames [from, to) that are missing and that a range brings.
func (l *Layer) missingIn(from, to int) (frames []int) {
	for f := from; f < to; f++ {
		if !l.data.Present(f) && l.frames.Frame(f).Kind != index.Stream {
			frames = append(frames, f)
		}
	}
	return frames
}

// mayAhead reports whether one who has the layer open, by a network, is served by
// more than what is asked for, and whether of all of those it is known what they
// will ask for.
func (l *Layer) mayAhead() (may, known bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	known = true
	for _, h := range l.sources {
		if !h.noAhead && remote(h.blob) {
			may, known = true, known && h.known
		}
	}
	return may, known
}
