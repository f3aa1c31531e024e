package fetch

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/docker/go-units"
	"golang.org/x/sync/singleflight"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/fetch/store"
	"github.com/varvefs/varve/index"
	"github.com/varvefs/varve/index/estargz"
	"github.com/varvefs/varve/index/zstdchunked"
	"github.com/varvefs/varve/metrics"
)

// The documents of a layer in the store.
const (
	tocDocument      = "toc"
	framesDocument   = "frames"
	pointsDocument   = "points"   // where frames need them
	skeletonDocument = "skeleton" // of a layer that was read whole or proven
	aboutDocument    = "about.json"
)

// Fetcher opens layers and shares what they have in common: the store, the
// cores, the open layers themselves. It is safe for concurrent use.
type Fetcher struct {
	store    *store.Store
	m        *metrics.Metrics
	log      *slog.Logger
	patience Patience
	schedule *schedule
	memory   *budget
	cores    *cores
	opening  singleflight.Group

	turns *turns

	coming atomic.Int64 // bytes of data files that are on their way ahead of need

	opened  sync.WaitGroup
	running sync.WaitGroup // passes

	mu        sync.Mutex // guards what follows; taken before a layer's mu
	layers    map[string]*Layer
	passes    map[string]*Pass
	forgotten []*Layer // open, and no longer in the store
	closed    bool
}

// Config is what a Fetcher needs. Patience may be left zero.
type Config struct {
	Store    *store.Store
	Metrics  *metrics.Metrics
	Log      *slog.Logger
	Patience Patience
	// BackgroundRate is how many bytes a second the background may bring, 0 for no
	// limit, and BackgroundHours when.
	BackgroundRate  int64
	BackgroundHours Hours
	// Memory is how many bytes of frames are held at a time, 24 MiB at least.
	Memory int64
}

// New gives a Fetcher. Close it.
func New(c Config) *Fetcher {
	memory := newBudget(c.Memory)
	f := &Fetcher{
		store: c.Store, m: c.Metrics, log: c.Log, patience: c.Patience,
		schedule: newSchedule(c, memory), memory: memory, cores: &cores{free: runtime.GOMAXPROCS(0)},
		turns: newTurns(), layers: map[string]*Layer{}, passes: map[string]*Pass{},
	}
	f.opened.Go(f.openAll)
	return f
}

// Request names a layer as its image's manifest does.
type Request struct {
	Digest      string
	Size        int64
	MediaType   string
	Annotations map[string]string
	// DiffID gives what the image's config says the uncompressed layer's digest
	// is. It may wait: it is asked when the layer has been read. nil and "" mean
	// that nobody knows.
	DiffID func() (string, error)
	// Progress, if not nil, is told what takes its time.
	Progress func(format string, args ...any)
	Blob     Blob // nil when the network may not be asked
	NoAhead  bool // nothing is fetched but what is asked for, by this one

	// Index says what may be used to read a layer that is not here: auto or "",
	// anything; none, nothing, so that it is read whole; require, anything but
	// reading it whole.
	Index string
	// Key is what the layer had in the store when it was last used for the same
	// image, "" if that is not known.
	Key string
	// Find gives the indexes that others made of the layer, the best first. It is
	// asked if nothing else makes the layer lazy. nil: there are none.
	Find func(ctx context.Context) ([]Found, error)
}

// key names a layer in the store: its digest, and for a layer that is read by its
// table of contents what that table's digest is. The table proves the contents
// against an image's manifest, not against the blob's digest: who vouches for
// another table, or for none, must not be given what this one says.
func (q *Request) key() (string, error) {
	if !strings.HasPrefix(q.Digest, "sha256:") {
		return "", fmt.Errorf("%w: the digest algorithm of %s is not supported", index.ErrMalformed, q.Digest)
	}
	position, chunked, err := zstdchunked.FromAnnotations(q.Annotations)
	if err != nil {
		return "", err
	}
	toc, star := estargz.TOCDigest(q.Annotations)
	if !chunked && !star || q.Index == "none" {
		return q.Digest, nil
	}
	sum := sha256.Sum256(fmt.Appendf(nil, "%+v %s %d", position, toc, q.Size))
	return fmt.Sprintf("%s+%x", q.Digest, sum[:16]), nil
}

// checkDiffID compares what a layer was found to be with what the config says.
func (q *Request) checkDiffID(got string) error {
	if q.DiffID == nil || got == "" {
		return nil
	}
	want, err := q.DiffID()
	if err != nil || want == "" || want == got {
		return err
	}
	return fmt.Errorf("%w: its diffID is %s, the image's config says %s", ErrVerify, got, want)
}

// Open gives a layer whose names and frames are known: from the store, by its
// table of contents, by an index that others made, or by reading it whole. The
// caller closes it.
func (f *Fetcher) Open(ctx context.Context, q Request) (*Handle, error) {
	for {
		h, p, err := f.Start(ctx, q)
		if p == nil {
			return h, err
		}
		err = p.Wait(ctx)
		key := p.Key()
		p.Close()
		if err != nil {
			return nil, err
		}
		if q.Progress != nil {
			q.Progress("%.19s: done", q.Digest)
		}
		h, err = f.acquire(key, q)
		if err == nil {
			return h, nil
		}
		if !errors.Is(err, store.ErrNotFound) {
			return nil, fmt.Errorf("layer %.19s: %w", q.Digest, err)
		}
	}
}

// Start is Open for who does not wait for a layer that must be read whole: it
// gives the pass instead.
func (f *Fetcher) Start(ctx context.Context, q Request) (*Handle, *Pass, error) {
	h, p, err := f.start(ctx, q)
	for err == errKept {
		h, p, err = f.start(ctx, q)
	}
	if err != nil {
		err = fmt.Errorf("layer %.19s: %w", q.Digest, err)
	}
	return h, p, err
}

func (f *Fetcher) start(ctx context.Context, q Request) (*Handle, *Pass, error) {
	key, err := q.key()
	if err != nil {
		return nil, nil, err
	}
	h, err := f.acquire(key, q)
	if !errors.Is(err, store.ErrNotFound) {
		return h, nil, err
	}
	reason, why := "no_index", "it has no index, so it was read whole once"
	switch {
	case key != q.Digest:
		if q.Blob == nil {
			return nil, nil, ErrOffline
		}
		h, err := f.prepared(ctx, key, q, nil)
		if !errors.Is(err, errUnranged) {
			return h, nil, err
		}
		reason, why = "no_range", "the registry does not serve ranges, so it was read whole once"
	case q.Index == "none":
		reason, why = "not_wanted", "indexes were not wanted (--index=none), so it was read whole once"
	default:
		h, refused, err := f.found(ctx, q)
		if h != nil || err != nil {
			return h, nil, err
		}
		if refused != nil {
			reason, why = refused.reason, refused.why+", so it was read whole once"
		}
	}
	if q.Blob == nil {
		return nil, nil, ErrOffline
	}
	if q.Index == "require" {
		return nil, nil, fmt.Errorf("%w (%s): make one (varve index --push IMAGE), or do not require it", ErrNoIndex, strings.TrimSuffix(why, ", so it was read whole once"))
	}
	p, err := f.join(key, &q, reason, why)
	if err == nil && q.Progress != nil {
		q.Progress("%.19s: reading all %s: %s", q.Digest, units.HumanSize(float64(q.Size)), strings.Replace(why, "so it was", "so it is", 1))
	}
	return nil, p, err
}

// prepared opens a layer that the store does not have, once it does. Who comes
// second waits for the first, whose context rules; if that one was canceled, the
// second goes on by itself.
func (f *Fetcher) prepared(ctx context.Context, key string, q Request, by *Found) (*Handle, error) {
	for {
		_, err, shared := f.opening.Do(key, func() (any, error) { return nil, f.prepare(ctx, key, q, by) })
		if err == nil {
			if h, err := f.acquire(key, q); !errors.Is(err, store.ErrNotFound) {
				return h, err
			}
			continue
		}
		if !shared || ctx.Err() != nil || !errors.Is(err, context.Canceled) {
			return nil, err
		}
	}
}

// acquire gives a handle of an open layer, or opens what the store has of it.
func (f *Fetcher) acquire(key string, q Request) (*Handle, error) {
	l, err := f.resident(key)
	if err != nil {
		return nil, err
	}
	h := &Handle{Layer: l, blob: q.Blob, diffID: q.DiffID, noAhead: q.NoAhead}
	l.mu.Lock()
	if l.gone { // a moment ago
		l.mu.Unlock()
		return f.acquire(key, q)
	}
	l.handles++
	l.unwanted = nil
	if q.Blob != nil {
		clear(l.failed) // this one may have what the others had not
		l.sources = append(l.sources, h)
		l.proveSoon()
	}
	l.mu.Unlock()
	// Only now: who proves the layer asks those that have it open.
	if err := q.checkDiffID(l.About().DiffID); err != nil {
		h.Close()
		return nil, err
	}
	return h, nil
}

// resident gives a layer that stays open until it is removed or the Fetcher closed.
func (f *Fetcher) resident(key string) (*Layer, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return nil, os.ErrClosed
	}
	if l := f.layers[key]; l != nil {
		return l, nil
	}
	l, err := f.load(key)
	if err == nil {
		if p := f.passes[key]; p != nil {
			p.kept(l)
		}
		f.layers[key] = l
	}
	return l, err
}

// openAll opens every layer of the store, so that what one holds need not be
// fetched for another.
func (f *Fetcher) openAll() {
	digests, err := f.store.Digests()
	if err != nil {
		f.log.Warn("the store cannot be listed", "err", err)
	}
	for _, d := range digests {
		if _, err := f.resident(d); err != nil {
			if errors.Is(err, os.ErrClosed) {
				return
			}
			f.log.Warn("layer in the store cannot be opened", "layer", d, "err", err)
		}
	}
}

// Close ends what is on its way and closes every layer. No mount may read any
// more.
func (f *Fetcher) Close() error {
	f.mu.Lock()
	layers := append(slices.Collect(maps.Values(f.layers)), f.forgotten...)
	f.layers, f.forgotten, f.closed = nil, nil, true
	for _, p := range f.passes {
		p.cancel()
	}
	f.mu.Unlock()
	f.opened.Wait()
	f.running.Wait()
	for _, l := range layers {
		l.end()
	}
	var errs []error
	for _, l := range layers {
		errs = append(errs, l.close())
	}
	return errors.Join(errs...)
}

// load opens a layer of the store. One that is damaged counts as not found, so
// that it is made again.
func (f *Fetcher) load(key string) (*Layer, error) {
	digest, _, indexed := strings.Cut(key, "+")
	if indexed && f.store.Refused(key) {
		return nil, errors.Join(store.ErrNotFound, f.store.Remove(key))
	}
	l := &Layer{f: f, Key: key, Digest: digest, flights: map[int]*flight{}, failed: map[int]failure{}}
	err := l.documents()
	if err != nil {
		l.unmap()
	}
	if errors.Is(err, store.ErrDamaged) || errors.Is(err, index.ErrMalformed) {
		return nil, fmt.Errorf("%w: %w", store.ErrNotFound, err)
	}
	if err != nil {
		return nil, err
	}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	return l, nil
}

// documents reads what the store has of the layer beside its data.
func (l *Layer) documents() error {
	raw, err := l.mapped(framesDocument)
	if err != nil {
		return err
	}
	if l.frames, err = index.ParseFrames(raw); err != nil {
		return err
	}
	if err := l.frames.Verify(); err != nil {
		return err
	}
	// Verifying touched every page; what reads need comes back by itself.
	unix.Madvise(raw, unix.MADV_DONTNEED)
	n, _, size := l.frames.Len()
	raw, err = l.mapped(pointsDocument)
	if err == nil {
		l.points, err = index.ParsePoints(raw)
	}
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return err
	}
	for i := range n {
		if p := l.frames.Frame(i).Point; p > 0 && (l.points == nil || p > l.points.Len()) {
			return fmt.Errorf("%w: frame %d begins at a point that is not there", index.ErrMalformed, i)
		}
	}
	doc, err := l.f.store.Document(l.Key, aboutDocument)
	if err != nil {
		return err
	}
	about := &About{}
	if err := json.Unmarshal(doc, about); err != nil {
		return fmt.Errorf("%w: %s: %w", index.ErrMalformed, aboutDocument, err)
	}
	if about.Unproven && l.frames.IsProven(about.Contents) {
		// The daemon was killed between writing that table and saying so, if the
		// skeleton is there, which is written before.
		if _, err := l.f.store.Document(l.Key, skeletonDocument); err == nil {
			about.Unproven, about.ByFrame = false, false
		}
	}
	l.about.Store(about)
	l.byFrame = about.ByFrame
	l.hollows = l.countHollow()
	l.ahead.asked, l.ahead.unread, l.ahead.plan = newBitmap(n), newBitmap(n), newBitmap(n)
	l.data, err = l.f.store.Open(l.Key, size, n)
	return err
}

// mapped maps a document for as long as the layer is open.
func (l *Layer) mapped(name string) ([]byte, error) {
	raw, err := l.f.store.Map(l.Key, name)
	if err == nil {
		l.maps = append(l.maps, raw)
	}
	return raw, err
}

// Stream reads a blob from an offset to its end as it lies in its registry,
// unverified. A connection that breaks or stalls is made again from where it
// stopped. The caller closes it.
func (f *Fetcher) Stream(ctx context.Context, b Blob, off int64) io.ReadCloser {
	const reason = "copy"
	r := newReader(withReason(ctx, reason), b, off, b.Size(), f.patience)
	if remote(b) {
		r.count = func(n int) { f.m.FetchBytes.WithLabelValues(reason).Add(float64(n)) }
		r.retry = f.m.FetchRetries.WithLabelValues(reason).Inc
	}
	return r
}

// Entries reads the layer's names. They are not kept in memory. If they are
// damaged, the next who opens the layer has it made again.
func (l *Layer) Entries() ([]index.Entry, error) {
	raw, err := l.f.store.Document(l.Key, tocDocument)
	var entries []index.Entry
	if err == nil {
		entries, err = index.ReadTOC(raw)
	}
	if errors.Is(err, store.ErrNotFound) || errors.Is(err, index.ErrMalformed) {
		return nil, fmt.Errorf("%v: %w", l, errors.Join(err, l.f.forget(l)))
	}
	return entries, err
}

// forget takes a layer from the store. Who has it open goes on with it.
func (f *Fetcher) forget(l *Layer) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.layers[l.Key] != l {
		return nil
	}
	delete(f.layers, l.Key)
	f.forgotten = append(f.forgotten, l)
	return f.store.Remove(l.Key)
}

// keep puts a layer into the store. data, where a layer was read whole, is the
// staging that holds its contents.
func (f *Fetcher) keep(g *store.Staging, l *index.Layer, about About, fetched int64, present bool) error {
	if err := g.Document(tocDocument, func(w io.Writer) error { return index.WriteTOC(w, l.Entries) }); err != nil {
		return err
	}
	if err := g.Document(framesDocument, func(w io.Writer) error { _, err := l.Frames.WriteTo(w); return err }); err != nil {
		return err
	}
	if l.Points != nil {
		if err := g.Document(pointsDocument, func(w io.Writer) error { _, err := l.Points.WriteTo(w); return err }); err != nil {
			return err
		}
	}
	if err := g.Document(aboutDocument, func(w io.Writer) error { return json.NewEncoder(w).Encode(about) }); err != nil {
		return err
	}
	n, _, size := l.Frames.Len()
	return g.Commit(size, n, fetched, present)
}
