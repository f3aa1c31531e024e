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
	tocDocument    = "toc"
	framesDocument = "frames"
	aboutDocument  = "about.json"
)

// Fetcher opens layers and shares what they have in common: the store, the
// cores, the open layers themselves. It is safe for concurrent use.
type Fetcher struct {
	store    *store.Store
	m        *metrics.Metrics
	log      *slog.Logger
	patience Patience
	cpu      chan struct{} // one token for each core that decompresses
	opening  singleflight.Group

	opened sync.WaitGroup

	mu        sync.Mutex // guards what follows; taken before a layer's mu
	layers    map[string]*Layer
	forgotten []*Layer // open, and no longer in the store
	closed    bool
}

// Config is what a Fetcher needs. Patience may be left zero.
type Config struct {
	Store    *store.Store
	Metrics  *metrics.Metrics
	Log      *slog.Logger
	Patience Patience
}

// New gives a Fetcher. Close it.
func New(c Config) *Fetcher {
	f := &Fetcher{
		store: c.Store, m: c.Metrics, log: c.Log, patience: c.Patience,
		cpu: make(chan struct{}, runtime.GOMAXPROCS(0)), layers: map[string]*Layer{},
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
	if !chunked && !star {
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
// table of contents, or by reading it whole. The caller closes it.
func (f *Fetcher) Open(ctx context.Context, q Request) (*Handle, error) {
	key, err := q.key()
	if err != nil {
		return nil, fmt.Errorf("layer %.19s: %w", q.Digest, err)
	}
	for {
		h, err := f.acquire(key, q)
		if !errors.Is(err, store.ErrNotFound) {
			return h, err
		}
		if q.Blob == nil {
			return nil, fmt.Errorf("layer %.19s: %w", q.Digest, ErrOffline)
		}
		// Who comes second waits for the first, whose context rules; if that one
		// was canceled, the second goes on by itself.
		_, err, shared := f.opening.Do(key, func() (any, error) { return nil, f.prepare(ctx, key, q) })
		if err == nil {
			return f.acquire(key, q)
		}
		if !shared || ctx.Err() != nil || !errors.Is(err, context.Canceled) {
			return nil, fmt.Errorf("layer %.19s: %w", q.Digest, err)
		}
	}
}

// acquire gives a handle of an open layer, or opens what the store has of it.
func (f *Fetcher) acquire(key string, q Request) (*Handle, error) {
	l, err := f.resident(key)
	if err != nil {
		return nil, err
	}
	if err := q.checkDiffID(l.About.DiffID); err != nil {
		return nil, fmt.Errorf("layer %.19s: %w", q.Digest, err)
	}
	h := &Handle{Layer: l, blob: q.Blob}
	if q.Blob != nil {
		l.mu.Lock()
		clear(l.failed) // this one may have what the others had not
		l.sources = append(l.sources, h)
		l.mu.Unlock()
	}
	return h, nil
}

// resident gives a layer that stays open until the Fetcher is closed.
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
	f.mu.Unlock()
	f.opened.Wait()
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
	digest, _, _ := strings.Cut(key, "+")
	l := &Layer{f: f, Key: key, Digest: digest, flights: map[int]*flight{}, failed: map[int]failure{}}
	raw, err := f.store.Map(key, framesDocument)
	if err == nil {
		l.tableMap = raw
		if err = l.documents(raw); err != nil {
			unix.Munmap(raw)
		}
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
func (l *Layer) documents(raw []byte) (err error) {
	if l.frames, err = index.ParseFrames(raw); err != nil {
		return err
	}
	if err := l.frames.Verify(); err != nil {
		return err
	}
	// Verifying touched every page; what reads need comes back by itself.
	unix.Madvise(raw, unix.MADV_DONTNEED)
	about, err := l.f.store.Document(l.Key, aboutDocument)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(about, &l.About); err != nil {
		return fmt.Errorf("%w: %s: %w", index.ErrMalformed, aboutDocument, err)
	}
	n, _, size := l.frames.Len()
	if l.data, err = l.f.store.Open(l.Key, size, n); err != nil {
		return err
	}
	return nil
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

// copyLocal fills a piece from another layer of the store that has the same
// content.
func (f *Fetcher) copyLocal(to *Layer, p *index.Piece) bool {
	f.mu.Lock()
	others := slices.Collect(maps.Values(f.layers))
	f.mu.Unlock()
	return slices.ContainsFunc(others, func(o *Layer) bool { return o != to && o.give(p, to) })
}

// give copies a piece that l holds into another layer's data file, verified on
// the way as if it came from the network.
func (l *Layer) give(p *index.Piece, to *Layer) bool {
	own, ok := l.frames.Find(p.Digest)
	if !ok || own.Size != p.Size || !l.data.Present(own.Frame) {
		return false
	}
	err := decode(io.NewSectionReader(l.data.File(), own.Data, own.Size), index.Raw,
		[]index.Piece{{Data: p.Data, Size: p.Size, Digest: p.Digest}}, to.data.File())
	if errors.Is(err, ErrVerify) {
		l.f.log.Warn("frame in the store is damaged and fetched again", "layer", l.Digest, "frame", own.Frame)
		l.data.Drop(own.Frame)
	}
	return err == nil
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
	if err := g.Document(aboutDocument, func(w io.Writer) error { return json.NewEncoder(w).Encode(about) }); err != nil {
		return err
	}
	n, _, size := l.Frames.Len()
	return g.Commit(size, n, fetched, present)
}
