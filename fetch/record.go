package fetch

import (
	"slices"
	"sync"
	"time"

	"github.com/varvefs/varve/fetch/profile"
	"github.com/varvefs/varve/index"
)

// Recorder notes which ranges of layers are asked for, and when first, whoever asks:
// mounts that share a layer are not told apart.
type Recorder struct {
	start  time.Time
	layers []*recording // by place; nil where there is no layer to record

	mu   sync.Mutex // guards what follows
	uses []profile.Use
	last time.Time
	full bool
	over bool
}

// recording is a layer as one Recorder sees it.
type recording struct {
	r      *Recorder
	layer  *Layer
	place  int
	blocks bitmap // of the data file that were asked for
}

// Record begins to note what is asked for of layers. The caller stops it.
func (f *Fetcher) Record(layers []*Handle) *Recorder {
	r := &Recorder{start: time.Now(), layers: make([]*recording, len(layers))}
	for i, h := range layers {
		if h == nil || slices.ContainsFunc(r.layers[:i], func(o *recording) bool { return o != nil && o.layer == h.Layer }) {
			continue
		}
		rec := &recording{r: r, layer: h.Layer, place: i, blocks: newBitmap(int(h.Size()/index.BlockSize) + 1)}
		r.layers[i] = rec
		h.mu.Lock()
		h.setRecordings(append(slices.Clone(h.recorded()), rec))
		h.mu.Unlock()
	}
	return r
}

func (l *Layer) recorded() []*recording {
	if p := l.recordings.Load(); p != nil {
		return *p
	}
	return nil
}

func (l *Layer) setRecordings(recs []*recording) { l.recordings.Store(&recs) }

// note tells all who record the layer that [off, off+n) of its data file is asked
// for.
func (l *Layer) note(off, n int64) {
	for _, rec := range l.recorded() {
		rec.note(off, n)
	}
}

func (rec *recording) note(off, n int64) {
	from, to := int(off/index.BlockSize), int((off+n+index.BlockSize-1)/index.BlockSize)
	if from < 0 || to > 64*len(rec.blocks) || n <= 0 {
		return
	}
	began := -1
	for i := from; i <= to; i++ {
		if i < to && rec.blocks.add(i) {
			if began < 0 {
				began = i
			}
		} else if began >= 0 {
			rec.r.add(rec.place, int64(began)*index.BlockSize, int64(i-began)*index.BlockSize)
			began = -1
		}
	}
}

func (r *Recorder) add(place int, off, n int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.over || r.full {
		return
	}
	r.last = time.Now()
	if k := len(r.uses) - 1; k >= 0 && r.uses[k].Layer == place && r.uses[k].Off+r.uses[k].N == off {
		r.uses[k].N += n
		return
	}
	if r.full = len(r.uses) == profile.MaxUses; !r.full {
		r.uses = append(r.uses, profile.Use{Layer: place, Off: off, N: n, After: r.last.Sub(r.start)})
	}
}

// Uses gives what was asked for so far, in the order of first use.
func (r *Recorder) Uses() []profile.Use {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.uses)
}

// Last gives when something was asked for that had not been before, the zero time
// if nothing was.
func (r *Recorder) Last() time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.last
}

// Stop ends the recording and gives what was asked for.
func (r *Recorder) Stop() []profile.Use {
	for _, rec := range r.layers {
		if rec == nil {
			continue
		}
		l := rec.layer
		l.mu.Lock()
		l.setRecordings(slices.DeleteFunc(slices.Clone(l.recorded()), func(o *recording) bool { return o == rec }))
		l.mu.Unlock()
	}
	r.mu.Lock()
	r.over = true
	r.mu.Unlock()
	return r.Uses()
}
