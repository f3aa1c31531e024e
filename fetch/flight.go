package fetch

import (
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/index"
)

// flight is a frame on its way: once however many wait for it.
type flight struct {
	done  chan struct{}
	trip  *trip // that brings it, nil where nobody can hurry it
	ahead bool  // nobody waited for it when it began
	err   error // set before done is closed
}

type failure struct {
	err   error
	until time.Time
}

// fetch brings the frames of pieces [from, to), and with them those of besides that
// nobody brings yet.
func (l *Layer) fetch(from, to int, besides []int) error {
	for {
		missing := l.missing(from, to)
		waits, claimed, err := l.claim(missing, besides)
		if err != nil {
			return err
		}
		if len(claimed) > 0 {
			l.start(claimed)
		}
		again := false
		for _, w := range waits {
			<-w.done
			if w.err != nil && !w.ahead {
				return w.err
			}
			again = again || w.err != nil // who fetched it ahead of need gave up
		}
		if !again {
			return nil
		}
		besides = nil
	}
}

// missing gives the frames of pieces [from, to) that are not here, ascending.
func (l *Layer) missing(from, to int) (missing []int) {
	for i := from; i < to; i++ {
		if f := l.frames.FrameOf(i); !l.data.Present(f) {
			missing = append(missing, f)
		}
	}
	slices.Sort(missing)
	return slices.Compact(missing)
}

// claim joins the flights of frames that are on their way and begins those of
// the others, which the caller must start.
//
// Frames that come besides are begun where nobody brings them yet; who asked does
// not wait for them.
func (l *Layer) claim(frames, besides []int) (waits []*flight, claimed []int, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ctx.Err() != nil {
		return nil, nil, os.ErrClosed
	}
	for _, f := range frames {
		if bad, ok := l.failed[f]; ok {
			if time.Now().Before(bad.until) {
				return nil, nil, bad.err
			}
			delete(l.failed, f)
		}
	}
	for _, f := range frames {
		w := l.flights[f]
		if w == nil {
			if l.data.Present(f) {
				continue // it came in before the lock was ours
			}
			w = &flight{done: make(chan struct{})}
			l.flights[f] = w
			claimed = append(claimed, f)
		}
		w.trip.raise()
		waits = append(waits, w)
	}
	if len(claimed) > 0 {
		claimed = append(claimed, l.claimFree(besides, nil)...)
		slices.Sort(claimed)
		l.runs.Add(1) // under the lock, so that close cannot have begun to wait
	}
	return waits, claimed, nil
}

// claimFree begins the flights of those of frames that are neither here nor on
// their way, and did not just fail: nobody waits for them. The caller holds mu.
func (l *Layer) claimFree(frames []int, t *trip) (claimed []int) {
	for _, f := range frames {
		if _, bad := l.failed[f]; !bad && l.flights[f] == nil && !l.data.Present(f) {
			l.flights[f] = l.flyAhead(f, t)
			claimed = append(claimed, f)
		}
	}
	return claimed
}

// flyAhead gives the flight of a frame that nobody waits for. It has its room on the
// disk from then on.
func (l *Layer) flyAhead(frame int, t *trip) *flight {
	l.f.coming.Add(sizeOf(l.frames.FramePieces(frame)))
	return &flight{done: make(chan struct{}), trip: t, ahead: true}
}

// claimRest claims every frame that is neither present nor on its way: a blob
// that comes whole gives all of them. Those that only a scan of it finds are
// among them where one is made.
func (l *Layer) claimRest(scan bool) (claimed []int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n, _, _ := l.frames.Len()
	for f := range n {
		if l.flights[f] == nil && !l.data.Present(f) && (scan || l.frames.Frame(f).Kind != index.Stream) {
			l.flights[f] = l.flyAhead(f, nil)
			claimed = append(claimed, f)
		}
	}
	return claimed
}

// land ends the flights of frames.
func (l *Layer) land(err error, frames ...int) {
	for _, f := range frames {
		if err == nil {
			l.data.SetPresent(f)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, f := range frames {
		w := l.flights[f]
		delete(l.flights, f)
		if w.ahead {
			l.f.coming.Add(-sizeOf(l.frames.FramePieces(f)))
		}
		switch {
		case err == nil && w.ahead:
			l.unread(f)
		case err != nil && !w.ahead:
			// A short memory keeps readers that try again and again from making a
			// storm of requests.
			if len(l.failed) > 1024 {
				clear(l.failed)
			}
			l.failed[f] = failure{err, time.Now().Add(time.Second)}
		}
		w.err = err
		close(w.done)
	}
	if err == nil && l.data.Missing() <= l.hollows {
		l.proveSoon()
	}
	if err == nil && l.Whole() {
		// Bringing all of it has touched every page of the tables, of which readers
		// need few by now.
		for _, m := range l.maps {
			unix.Madvise(m, unix.MADV_DONTNEED)
		}
	}
}

// start brings claimed frames in the background: from this machine where it has
// their contents, else from the blob, adjacent ones in one request.
func (l *Layer) start(claimed []int) {
	go func() {
		defer l.runs.Done()
		var wg sync.WaitGroup
		defer wg.Wait()
		for run := range l.split(l.elsewhere(claimed), 0) {
			wg.Go(func() {
				t := l.depart(run)
				defer t.end()
				l.run(run, t)
			})
		}
	}()
}

// depart begins a trip for frames that somebody waits for.
func (l *Layer) depart(frames []int) *trip {
	if blob, err := l.blob(); err != nil || !remote(blob) {
		return nil
	}
	t, _ := l.f.schedule.begin(l.ctx, Demand, l.bytes(frames), nil) // who is waited for does not wait
	return t
}
