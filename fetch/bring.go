package fetch

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/time/rate"
)

// Want is a range of a layer's data file.
type Want struct {
	Layer  *Handle
	Off, N int64
}

// Bringing says how ranges are brought.
type Bringing struct {
	Class Class // Profile, or Background
	// Waste is how many percent of bytes may come besides, where that joins requests.
	// What comes besides is kept.
	Waste int
	Rate  int64 // bytes a second, 0 for what the class has
	// Progress is told how many compressed bytes of the frames that were missing are
	// here by now; several goroutines may call it. nil tells nobody.
	Progress func(done, total int64)
}

// Bring fetches what is missing of ranges, in their order, in few large requests.
// It returns when all of it is here, or could not be had, or ctx is over. What is
// here already costs nothing: calling it again goes on where it was stopped.
func (f *Fetcher) Bring(ctx context.Context, wants []Want, o Bringing) error {
	p := f.plan(wants, o.Waste)
	b := bringing{Bringing: o, f: f, limit: limiter(o.Rate), total: p.bytes}
	var wg sync.WaitGroup
	var err error
	for _, part := range p.parts {
		if b.away() {
			break
		}
		if err = b.part(ctx, &wg, part); err != nil {
			break
		}
		if b.limit != nil {
			wg.Wait() // more at a time would not be faster
		}
	}
	wg.Wait()
	if errors.Is(err, b.err) {
		return err
	}
	return errors.Join(err, b.err)
}

type bringing struct {
	Bringing
	f     *Fetcher
	limit *rate.Limiter
	total int64
	done  atomic.Int64

	mu  sync.Mutex
	err error // the first that a frame had, or that of the context
}

// away reports whether something was not to be had: who is away for one is so for the
// rest, and to find that out for each takes as long as patience lasts.
func (b *bringing) away() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return errors.Is(b.err, ErrUnavailable)
}

func (b *bringing) failed(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.err = cmp.Or(b.err, err)
}

// part waits for a part's turn and has it brought.
func (b *bringing) part(ctx context.Context, wg *sync.WaitGroup, p part) error {
	l := p.layer.Layer
	if !l.hasRoom(p.frames) {
		return fmt.Errorf("%v: %w", l, ErrNoRoom)
	}
	var t *trip
	blob, err := l.blob()
	if err != nil {
		return err
	}
	if remote(blob) {
		if t, err = b.f.schedule.begin(ctx, b.Class, l.bytes(p.frames), b.limit); err != nil {
			return err
		}
	} else if err := ctx.Err(); err != nil {
		return err
	}
	waits, claimed, err := l.claimAhead(p.frames, t)
	if err != nil {
		t.end()
		return err
	}
	if len(claimed) > 0 {
		go l.bring(claimed, p.gap, t) // the layer waits for it when it is closed
	} else {
		t.end()
	}
	wg.Go(func() {
		for _, w := range waits {
			select {
			case <-w.done:
			case <-ctx.Done():
				b.failed(context.Cause(ctx))
				if t != nil && t.limit != nil {
					t.raise() // nobody is left to be slow for
				}
				return
			}
			if w.err != nil {
				b.failed(w.err)
			}
		}
		if b.Progress != nil {
			b.Progress(b.done.Add(p.bytes), b.total)
		}
	})
	return nil
}

// claimAhead claims frames that nobody waits for, for a trip, and joins the flights
// of those that are on their way. The caller brings what was claimed.
func (l *Layer) claimAhead(frames []int, t *trip) (waits []*flight, claimed []int, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ctx.Err() != nil {
		return nil, nil, os.ErrClosed
	}
	claimed = l.claimFree(frames, t)
	for _, f := range frames {
		if w := l.flights[f]; w != nil {
			if w.trip != t {
				w.trip.join(t)
			}
			waits = append(waits, w)
		}
	}
	if len(claimed) > 0 {
		l.runs.Add(1)
	}
	return waits, claimed, nil
}

// bring brings what claimAhead claimed, and ends the trip.
func (l *Layer) bring(claimed []int, gap int64, t *trip) {
	defer l.runs.Done()
	defer t.end()
	for run := range l.split(l.elsewhere(claimed), gap) {
		l.run(run, t)
	}
}

// fetchAhead has frames brought before a reader comes to them. When much is asked
// for already it does not.
func (l *Layer) fetchAhead(frames []int) {
	const enough = 64
	if l.f.schedule.waiting(ReadAhead) > enough || !l.hasRoom(frames) {
		return
	}
	size := l.f.schedule.portion()
	for len(frames) > 0 {
		n, bytes := 1, l.frames.Frame(frames[0]).Length
		for ; n < len(frames) && bytes < size; n++ {
			bytes += l.frames.Frame(frames[n]).Length
		}
		mine := frames[:n]
		frames = frames[n:]
		go func() {
			t, err := l.f.schedule.begin(l.ctx, ReadAhead, bytes, nil)
			if err != nil {
				return
			}
			_, claimed, err := l.claimAhead(mine, t)
			if err != nil || len(claimed) == 0 {
				t.end()
				return
			}
			l.bring(claimed, nearby, t)
		}()
	}
}

// hasRoom reports whether there is room on the disk for frames that nobody waits for.
// What is on its way, and not on the disk yet, has its place there.
func (l *Layer) hasRoom(frames []int) bool {
	var n int64
	l.mu.Lock()
	for _, f := range frames {
		if l.flights[f] == nil && !l.data.Present(f) {
			n += sizeOf(l.frames.FramePieces(f))
		}
	}
	l.mu.Unlock()
	if n == 0 {
		return true
	}
	coming := l.f.coming.Load() // first: what lands meanwhile counts twice rather than not
	return n <= l.f.store.Room()-coming
}

// pull brings all that is missing, as the background of a reader that takes most of
// the layer.
func (l *Layer) pull() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ctx.Err() != nil {
		return
	}
	var h *Handle
	for _, s := range l.sources {
		h = s
	}
	if h == nil {
		return
	}
	l.runs.Go(func() {
		err := l.f.Bring(l.ctx, []Want{{h, 0, l.Size()}}, Bringing{Class: ReadAhead})
		if errors.Is(err, ErrUnavailable) || errors.Is(err, ErrOffline) {
			l.ahead.mu.Lock()
			defer l.ahead.mu.Unlock()
			l.ahead.all = false // the next read tries again
		}
	})
}

// Missing gives the compressed bytes of the frames that are not here.
func (l *Layer) Missing() (n int64) {
	frames, _, _ := l.frames.Len()
	if l.Whole() {
		return 0
	}
	for f := range frames {
		if !l.data.Present(f) {
			n += l.frames.Frame(f).Length
		}
	}
	return n
}

// plan is what requests a bringing takes.
type plan struct {
	parts []part
	bytes int64 // compressed, of all that was wanted and missing
}

// part is what one request brings: frames of a layer, ascending, those between them
// that are missing too.
type part struct {
	layer  *Handle
	frames []int
	gap    int64 // the largest between two
	bytes  int64 // of those that were wanted
	use    int   // when the first of them was wanted
}

// wanted is a frame that is missing.
type wanted struct {
	layer      int // place in a list of layers
	frame, use int
	from, end  int64 // in the blob
}

// plan sorts what is missing of ranges into requests: neighbours join, the nearest
// first, until waste percent would come besides; what is too long is cut; the order
// is that of first use.
func (f *Fetcher) plan(wants []Want, waste int) (p plan) {
	var layers []*Handle
	places := map[*Layer]int{}
	var all []wanted
	seen := map[*Layer]bitmap{}
	for use, w := range wants {
		l := w.Layer.Layer
		if _, ok := places[l]; !ok {
			n, _, _ := l.frames.Len()
			places[l], seen[l] = len(layers), newBitmap(n)
			layers = append(layers, w.Layer)
		}
		from, to := l.frames.PiecesIn(w.Off, w.N)
		for i := from; i < to; i++ {
			if n := l.frames.FrameOf(i); !l.data.Present(n) && seen[l].add(n) {
				fr := l.frames.Frame(n)
				l.ahead.plan.add(n)
				all = append(all, wanted{places[l], n, use, fr.Offset, fr.Offset + fr.Length})
				p.bytes += fr.Length
			}
		}
	}
	slices.SortFunc(all, func(a, b wanted) int {
		return cmp.Or(cmp.Compare(a.layer, b.layer), cmp.Compare(a.frame, b.frame))
	})
	gap := widest(all, p.bytes*int64(waste)/100)
	most := f.schedule.portion()
	for len(all) > 0 {
		n, bytes := 1, all[0].end-all[0].from
		for n < len(all) && all[n].layer == all[0].layer && all[n].from-all[n-1].end <= gap && bytes < most {
			bytes += all[n].end - all[n].from
			n++
		}
		p.parts = append(p.parts, partOf(layers[all[0].layer], all[:n], bytes, gap))
		all = all[n:]
	}
	slices.SortStableFunc(p.parts, func(a, b part) int { return cmp.Compare(a.use, b.use) })
	return p
}

// widest gives how far apart frames may lie so that all that come between the joined
// ones are of at most so many bytes.
func widest(all []wanted, bytes int64) (gap int64) {
	const always = 4 << 10 // less than a request costs
	var gaps []int64
	for i := 1; i < len(all); i++ {
		if g := all[i].from - all[i-1].end; all[i].layer == all[i-1].layer && g > always {
			gaps = append(gaps, g)
		}
	}
	slices.Sort(gaps)
	gap = always
	for _, g := range gaps {
		if bytes -= g; bytes < 0 {
			break
		}
		gap = g
	}
	return gap
}

func partOf(h *Handle, ws []wanted, bytes, gap int64) part {
	p := part{layer: h, gap: gap, bytes: bytes, use: ws[0].use}
	for i, w := range ws {
		p.use = min(p.use, w.use)
		if i > 0 {
			p.frames = append(p.frames, h.missingIn(ws[i-1].frame+1, w.frame)...)
		}
		p.frames = append(p.frames, w.frame)
	}
	return p
}
