package zstdblocks

import (
	"fmt"

	"github.com/varvefs/varve/index"
)

const (
	// maxTraced is the largest window of a frame in which points are made: two of
	// them are kept.
	maxTraced = 32 << 20
	// backlog is how many blocks of a frame pass before it is traced though no
	// point has been wanted in it: 9 MiB at most, so that frames of 8 MiB, which
	// are points enough, cost nothing.
	backlog = 72
	// inFlight is how many blocks the tracer may be behind.
	inFlight = 16
	// maxWaiting is how many points in a frame may wait for their State.
	maxWaiting = 64
	// maxMarked bounds the bytes in the windows of all of them, of which each has
	// a bit.
	maxMarked = 256 << 20
)

// waiting is a point that has not been given yet.
type waiting struct {
	p     index.Point
	ready bool
	frame frame
	begin int64 // Out of its frame
}

// watcher makes the points: it asks for them where blocks begin, keeps the bytes
// before them, and lets a tracer find out the rest.
type watcher struct {
	o       Options
	hist    history
	frame   frame
	begin   int64    // Out of the frame
	held    []*block // of a frame that is not traced yet
	hold    bool
	tracing bool
	points  []waiting
	inside  int  // of points, those in a frame
	made    bool // a point lies where the next byte does

	blocks  int         // made so far
	free    chan *block // back from the tracer
	steps   chan step
	traces  chan *trace
	running bool
}

// step is what the tracer is told.
type step struct {
	block  *block // nil with one of the others
	window int64  // a frame begins
	point  bool   // a point lies at
	at     int64  // in the frame
	end    bool   // the frame ends
}

func newWatcher(o Options) *watcher {
	return &watcher{
		o:      o,
		free:   make(chan *block, backlog+inFlight+skimmed),
		traces: make(chan *trace, maxWaiting+1),
	}
}

// space gives a buffer for the next block.
func (w *watcher) space() *block {
	select {
	case b := <-w.free:
		return b
	default:
	}
	if w.blocks < cap(w.free) {
		w.blocks++
		return new(block)
	}
	return <-w.free
}

// beginFrame is told of the frame whose header is at in.
func (w *watcher) beginFrame(in int64, f frame) {
	w.frame, w.begin = f, w.hist.out
	if !w.made && w.o.Want(in, w.begin, false) {
		w.made = true
		w.points = append(w.points, waiting{p: index.Point{In: in, Out: w.begin}, ready: true})
	}
	w.hold = f.window <= maxTraced
}

// beginBlock is told of the block whose header is at in.
func (w *watcher) beginBlock(in int64, b *block, first bool) {
	if first || !w.hold && !w.tracing || b.kind != blockCompressed && b.size == 0 {
		return
	}
	if w.made || w.inside >= maxWaiting || int64(w.inside)*w.frame.window > maxMarked {
		return
	}
	if !w.o.Want(in, w.hist.out, true) {
		return
	}
	w.trace()
	w.steps <- step{point: true, at: w.hist.out - w.begin}
	w.made = true
	w.inside++
	w.points = append(w.points, waiting{p: index.Point{In: in, Out: w.hist.out}, frame: w.frame, begin: w.begin})
}

// follow is given a block that is not read any more.
func (w *watcher) follow(b *block) {
	switch {
	case w.tracing:
		w.steps <- step{block: b}
	case w.hold:
		w.held = append(w.held, b)
		if len(w.held) == backlog {
			w.trace()
		}
	default:
		w.free <- b
	}
}

// trace begins to trace the frame.
func (w *watcher) trace() {
	if w.tracing {
		return
	}
	if !w.running {
		w.running = true
		w.steps = make(chan step, inFlight)
		go run(w.steps, w.free, w.traces)
	}
	w.steps <- step{window: w.frame.window}
	for _, b := range w.held {
		w.steps <- step{block: b}
	}
	w.held = w.held[:0]
	w.tracing, w.hold = true, false
}

func (w *watcher) endFrame() {
	if w.tracing {
		w.steps <- step{end: true}
	}
	for _, b := range w.held {
		w.free <- b
	}
	w.held = w.held[:0]
	w.tracing, w.hold = false, false
}

// close ends the tracer.
func (w *watcher) close() {
	if w.running {
		close(w.steps)
		for range w.traces { // until it has gone
		}
		w.running = false
	}
}

// run traces what it is told of, until steps is closed. It never waits for traces
// to be taken: there are no more than have a place there.
func run(steps <-chan step, free chan<- *block, traces chan<- *trace) {
	defer close(traces)
	t := tracer{free: free}
	var failed bool
	for s := range steps {
		var err error
		switch {
		case failed && s.block != nil:
			free <- s.block
		case failed:
		case s.block != nil:
			err = t.block(s.block)
		case s.window > 0:
			t.reset(s.window)
		case s.point:
			err = t.mark(s.at)
		case s.end:
			t.drop()
		}
		if failed {
			continue
		}
		if err != nil {
			failed = true
			t.drop()
			traces <- &trace{err: err}
			continue
		}
		for p := t.done(s.end); p != nil; p = t.done(s.end) {
			traces <- p
		}
	}
}

// room gives where the next bytes are to be decompressed to. It waits for the
// tracer if that needs what is there.
func (w *watcher) room() ([]byte, error) {
	for {
		keep := w.hist.out
		if w.hold || w.tracing {
			keep = max(w.begin, w.hist.out-w.frame.window)
		}
		limit := 2*int64(minRoom) + 2*w.frame.window
		for _, p := range w.points {
			if !p.ready {
				keep = min(keep, max(p.begin, p.p.Out-p.frame.window))
				limit = max(limit, 2*int64(minRoom)+2*p.frame.window)
				break
			}
		}
		if b := w.hist.room(keep, limit); b != nil {
			return b, nil
		}
		if err := w.complete(<-w.traces); err != nil {
			return nil, err
		}
	}
}

// give gives the points that are known; all of them, if it is to wait.
func (w *watcher) give(wait bool) error {
	for {
		for len(w.points) > 0 && w.points[0].ready {
			if err := w.o.Point(w.points[0].p); err != nil {
				return err
			}
			w.points = w.points[1:]
		}
		if len(w.points) == 0 {
			return nil
		}
		var t *trace
		if wait {
			t = <-w.traces
		} else {
			select {
			case t = <-w.traces:
			default:
				return nil
			}
		}
		if err := w.complete(t); err != nil {
			return err
		}
	}
}

// complete makes the State of the first point that has none.
func (w *watcher) complete(t *trace) error {
	if t.err != nil {
		return fmt.Errorf("%w: zstd frame that begins at %d of the content: %w", index.ErrMalformed, w.begin, t.err)
	}
	for i := range w.points {
		p := &w.points[i]
		if p.ready {
			continue
		}
		if p.begin+t.at != p.p.Out {
			return fmt.Errorf("%w: zstd block at %d begins at %d of the content, not at %d", index.ErrMalformed, p.p.In, p.p.Out, p.begin+t.at)
		}
		var err error
		if p.p.State, err = makeState(&w.hist, p.frame, p.begin, t); err != nil {
			return fmt.Errorf("%w: the tables at %d: %w", index.ErrMalformed, p.p.In, err)
		}
		p.ready = true
		w.inside--
		return nil
	}
	return fmt.Errorf("%w: a point was traced that was not made", index.ErrMalformed)
}
