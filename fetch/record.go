package fetch

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/varvefs/varve/fetch/profile"
	"github.com/varvefs/varve/index"
)

// Recorder notes which ranges of layers are asked for, and when first, whoever asks:
// mounts that share a layer are not told apart.
type Recorder struct {
	start  time.Time
	exact  bool         // see HoldFirst
	layers []*recording // by place; nil where nothing is recorded
	room   int64        // bytes of data files that more layers may have

	mu   sync.Mutex // guards what follows
	uses []profile.Use
	last time.Time
	full bool
	over bool
}

// maxRecorded is of how many bytes of data files a Recorder takes note, some 4 MiB
// of memory: an image may say of its layers that they are as long as it likes.
const maxRecorded = 128 << 30

// recording is a layer, or its pass, as one Recorder sees it.
type recording struct {
	r      *Recorder
	of     *recordings
	place  int
	blocks bitmap // of the data file that were asked for
}

// recordings are those of one layer.
type recordings struct {
	mu   sync.Mutex // held to change the list
	list atomic.Pointer[[]*recording]
}

func (rs *recordings) all() []*recording {
	if p := rs.list.Load(); p != nil {
		return *p
	}
	return nil
}

func (rs *recordings) change(by func([]*recording) []*recording) {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	list := by(slices.Clone(rs.all()))
	rs.list.Store(&list)
}

// note tells all who record that [off, off+n) of the data file is asked for.
func (rs *recordings) note(off, n int64) {
	for _, rec := range rs.all() {
		rec.note(off, n)
	}
}

// exact reports whether somebody records who is to miss nothing.
func (rs *recordings) exact() bool {
	return slices.ContainsFunc(rs.all(), func(rec *recording) bool { return rec.r.exact })
}

// Record begins to note what is asked for of layers: exactly, at the price of more
// reads, or with less regard for files that are small and near one another, see
// [Layer.HoldFirst]. The caller stops it.
func (f *Fetcher) Record(layers []*Handle, exact bool) *Recorder {
	r := &Recorder{start: time.Now(), exact: exact, layers: make([]*recording, len(layers)), room: maxRecorded}
	for i, h := range layers {
		if h != nil {
			r.follow(i, &h.recordings, h.Size())
		}
	}
	return r
}

// Follow has what is asked for of a layer that is still read noted too. place is its
// place among the layers.
func (r *Recorder) Follow(place int, p *Pass) {
	// Nobody knows how long its data file will be.
	const most = 20
	r.follow(place, &p.recordings, most*min(p.size, maxRecorded))
}

func (r *Recorder) follow(place int, of *recordings, size int64) {
	if slices.ContainsFunc(r.layers[:place], func(o *recording) bool { return o != nil && o.of == of }) {
		return // the same layer twice in an image
	}
	size = min(max(size, 0), r.room)
	r.room -= size
	rec := &recording{r: r, of: of, place: place, blocks: newBitmap(int(size/index.BlockSize) + 1)}
	r.layers[place] = rec
	of.change(func(list []*recording) []*recording { return append(list, rec) })
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
		if rec != nil {
			rec.of.change(func(list []*recording) []*recording {
				return slices.DeleteFunc(list, func(o *recording) bool { return o == rec })
			})
		}
	}
	r.mu.Lock()
	r.over = true
	r.mu.Unlock()
	return r.Uses()
}
