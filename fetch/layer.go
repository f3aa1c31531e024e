package fetch

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/fetch/store"
	"github.com/varvefs/varve/index"
)

// About is what is known of how a layer is read, kept beside it.
type About struct {
	Format string // estargz, zstd:chunked, tar+gzip, tar+zstd, tar
	Index  string // what made it lazy: toc, varve, soci, or, where it was read whole, checkpoints
	Why    string // in a few words
	DiffID string // known once the layer was read whole
	Size   int64  // bytes of the blob
	// Landmark is where in the blob ends what its builder wants to be fetched ahead;
	// 0 where it says nothing, or nothing.
	Landmark int64 `json:",omitempty"`

	// Of a layer whose index others made, until it is proven.
	Unproven     bool  `json:",omitempty"`
	ByFrame      bool  `json:",omitempty"` // its pieces have no digests, its frames have
	Contents     int64 `json:",omitempty"` // bytes of the data file before the rest of the tar
	Uncompressed int64 `json:",omitempty"` // bytes of the tar
}

// Layer is an open layer: its data file, the table that says which frames fill
// it, and the blob they come from. One Layer serves all mounts of its digest.
// It is safe for concurrent use.
type Layer struct {
	f      *Fetcher
	Key    string // its name in the store: the digest, and what vouches for its names
	Digest string // of the blob
	about  atomic.Pointer[About]

	frames  *index.Frames
	points  *index.Points // nil where no frame needs one
	byFrame bool          // see About
	ahead   ahead         // what is fetched besides what is asked for
	windows windows       // that a kernel asked for
	hollows int           // frames without contents, of a layer that is not proven
	maps    [][]byte      // the mappings that frames and points read from
	data    *store.Data
	wrong   atomic.Pointer[error] // why nothing of it may be read any more
	proving atomic.Bool           // someone proves it, or has tried

	recordings recordings
	ctx        context.Context // ends when the layer is closed
	cancel     context.CancelFunc
	runs       sync.WaitGroup

	// Gates are held by who reads the data file, and all of them by who drops
	// frames: the layer's own, and those of its passes. steady is held for longer, by
	// who needs all frames, and by who drops some: it is the first to be taken, then
	// mu, then the gates. mu is taken under no gate. life is held by who uses the
	// tables, and by who closes them: it is taken before all of these. A mount that
	// somebody is still in reads until the daemon is gone.
	life    sync.RWMutex
	closed  atomic.Bool
	steady  sync.Mutex
	gate    sync.RWMutex
	gates   []*sync.RWMutex // of passes; never changed once the layer can be found
	mu      sync.Mutex      // guards what follows
	flights map[int]*flight // frames on their way
	failed  map[int]failure // frames that failed a moment ago
	sources []*Handle       // who lets the network be asked, the newest last
	handles int             // that are open
	// unwanted is told when the layer was removed, which it is to be; gone says that
	// it was. See [Fetcher.Remove].
	unwanted func(error)
	gone     bool
}

// Handle is a layer as one mount holds it. While it is open its blob may be
// asked for what the layer misses.
type Handle struct {
	*Layer
	blob    Blob
	diffID  func() (string, error)
	noAhead bool // see Request
	known   bool // see Known; guarded by the layer's mu, as is
	ended   bool
}

// About says how the layer is read.
func (l *Layer) About() About { return *l.about.Load() }

// Known says whether it is known what will be read of the layer by this one, and is
// being brought: then nothing else comes besides what is asked for, unless that turns
// out to be something else.
func (h *Handle) Known(known bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.known = known
	h.ahead.mu.Lock()
	defer h.ahead.mu.Unlock()
	h.ahead.strange = 0
}

// Close takes the handle's blob away from the layer.
func (h *Handle) Close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.sources = slices.DeleteFunc(h.sources, func(o *Handle) bool { return o == h })
	if h.ended {
		return
	}
	h.ended = true
	if h.handles--; h.handles == 0 && h.unwanted != nil {
		go h.f.removeUnwanted(h.Layer)
	}
}

// Fd gives the data file's descriptor. It belongs to the layer and stays open
// until that is removed or the Fetcher closed.
func (l *Layer) Fd() int { return l.data.Fd() }

// Path gives the data file's path.
func (l *Layer) Path() string { return l.data.Path() }

// Size gives the bytes of the data file.
func (l *Layer) Size() int64 { _, _, n := l.frames.Len(); return n }

// Whole reports whether every frame is present, so that the data file may be
// read without asking.
func (l *Layer) Whole() bool { return l.data.Missing() == 0 }

// Fetched gives the bytes that the network has brought for this layer.
func (l *Layer) Fetched() int64 { return l.data.Fetched() }

// Local gives the compressed bytes of the frames that are present.
func (l *Layer) Local() (n int64) {
	frames, _, _ := l.frames.Len()
	if l.Whole() {
		return l.About().Size
	}
	for i := range frames {
		if l.data.Present(i) {
			n += l.frames.Frame(i).Length
		}
	}
	return n
}

// Ensure returns nil when [off, off+n) of the data file holds what the layer has
// there. It fetches what is missing, once for all who wait. Only the layer's own
// life ends a fetch: a reader that is interrupted does not, or a program that
// signals itself, as every Go program does, could never be read.
func (l *Layer) Ensure(off, n int64) error {
	if wrong := l.wrong.Load(); wrong != nil {
		return *wrong
	}
	l.life.RLock()
	defer l.life.RUnlock()
	if l.closed.Load() {
		return fmt.Errorf("%v: %w", l, os.ErrClosed)
	}
	l.recordings.note(off, n)
	from, to := l.frames.PiecesIn(off, n)
	missing, unseen := false, false
	for i := from; i < to; i++ {
		f := l.frames.FrameOf(i)
		missing = missing || !l.data.Present(f)
		unseen = unseen || !l.ahead.asked.has(f)
	}
	var besides []int
	if unseen {
		besides = l.see(from, to, missing)
	}
	if missing {
		return l.fetch(from, to, besides)
	}
	return nil
}

// Hold is Ensure for who then reads: until Release nothing of the range is
// dropped.
func (l *Layer) Hold(off, n int64) error { return l.hold(&l.gate, off, n) }

// Release ends what Hold began.
func (l *Layer) Release() { l.gate.RUnlock() }

func (l *Layer) hold(gate *sync.RWMutex, off, n int64) error {
	for {
		if err := l.Ensure(off, n); err != nil {
			return err
		}
		gate.RLock()
		if l.has(off, n) {
			return nil
		}
		gate.RUnlock() // dropped meanwhile
	}
}

func (l *Layer) has(off, n int64) bool {
	if l.closed.Load() {
		return false
	}
	from, to := l.frames.PiecesIn(off, n)
	for i := from; i < to; i++ {
		if !l.data.Present(l.frames.FrameOf(i)) {
			return false
		}
	}
	return true
}

// bytes gives how much of the blob frames are.
func (l *Layer) bytes(frames []int) (n int64) {
	for _, f := range frames {
		n += l.frames.Frame(f).Length
	}
	return n
}

// elsewhere lands those of claimed frames that this machine has, and gives the
// others, those last that only a scan of the blob brings, wherever it lies.
func (l *Layer) elsewhere(claimed []int) []int {
	claimed = slices.DeleteFunc(claimed, func(f int) bool {
		ok := l.fromDisk(f)
		if ok {
			l.land(nil, f)
		}
		return ok
	})
	slices.SortStableFunc(claimed, func(a, b int) int {
		return cmp.Compare(l.frames.Frame(a).Kind, l.frames.Frame(b).Kind)
	})
	return claimed
}

// split gives the runs of frames that one request can bring, with gaps of at most
// so many bytes in it.
func (l *Layer) split(frames []int, gap int64) iter.Seq[[]int] {
	return func(yield func([]int) bool) {
		for len(frames) > 0 {
			n := l.adjacent(frames, gap)
			if !yield(frames[:n]) {
				return
			}
			frames = frames[n:]
		}
	}
}

// adjacent counts the frames at the head of the list that one request can bring.
func (l *Layer) adjacent(frames []int, gap int64) int {
	f := l.frames.Frame(frames[0])
	for i, n := range frames[1:] {
		next := l.frames.Frame(n)
		between := next.Offset - (f.Offset + f.Length)
		// A frame may begin in the byte that ends the one before it.
		shared := between == -1 && f.Length <= wholeFrame
		if f.Kind != next.Kind || f.Kind != index.Stream && !shared && (between < 0 || between > gap) {
			return i + 1
		}
		f = next
	}
	return len(frames)
}

// fromDisk fills a frame without the network: its own bytes where they were
// only doubted, or those of another layer with the same digest.
func (l *Layer) fromDisk(frame int) bool {
	pieces := l.frames.FramePieces(frame)
	if l.data.Doubted(frame) {
		if l.holds(frame, pieces) {
			l.f.m.ReadBytes.WithLabelValues("cache").Add(float64(sizeOf(pieces)))
			return true
		}
		l.data.Drop(frame)
	}
	if len(pieces) == 0 {
		return true
	}
	for i := range pieces {
		if pieces[i].Digest == unknown || !l.f.copyLocal(l, &pieces[i]) {
			return false
		}
	}
	l.f.m.ReadBytes.WithLabelValues("local").Add(float64(sizeOf(pieces)))
	return true
}

func (l *Layer) holds(frame int, pieces []index.Piece) bool {
	var sum uint32
	summed := false
	for i := range pieces {
		if err := checkPiece(l.data.File(), &pieces[i], &sum); err != nil {
			return false
		}
		summed = summed || pieces[i].Digest == unknown
	}
	return !summed || sum == l.data.Sum(frame)
}

func sizeOf(pieces []index.Piece) (n int64) {
	for i := range pieces {
		n += pieces[i].Size
	}
	return n
}

// end ends what is on its way. It may still read from other layers.
func (l *Layer) end() {
	l.mu.Lock()
	l.cancel()
	l.mu.Unlock()
	l.runs.Wait()
}

// close closes the files, when every layer has ended. Who has just been reading is
// waited for.
func (l *Layer) close() error {
	l.life.Lock()
	defer l.life.Unlock()
	l.gate.Lock()
	defer l.gate.Unlock()
	for _, g := range l.gates {
		g.Lock()
		defer g.Unlock()
	}
	l.closed.Store(true)
	return errors.Join(l.data.Close(), l.unmap())
}

func (l *Layer) unmap() (err error) {
	for _, m := range l.maps {
		err = errors.Join(err, unix.Munmap(m))
	}
	l.maps = nil
	return err
}

// String names the layer in errors.
func (l *Layer) String() string { return fmt.Sprintf("layer %.19s", l.Digest) }
