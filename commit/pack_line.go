package commit

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"sync"
	"sync/atomic"
)

// maxWorkers bounds the memory, which is some 10 MiB a worker before garbage is
// collected. So many compress about as fast as one goroutine reads files.
const maxWorkers = 10

// inFlight gives how many frames there are at most between the cutter and the
// writer: each worker has one, and another that waits to be taken or written.
func inFlight(workers int) int { return 2*workers + 2 }

// codec compresses, for one worker.
type codec interface {
	// member appends raw, compressed so that it can be decompressed alone, to
	// dst.
	member(dst, raw []byte) ([]byte, error)
}

// frame is a piece of the tar that one worker compresses at once.
type frame struct {
	raw     []byte // of the tar; its capacity is fixed
	out     []byte // compressed
	members []member
	items   []item
	holds   bool // the present member holds a chunk
	refs    atomic.Int32
	packed  chan struct{} // a worker is done with it
}

// member is a range of a frame that is compressed by itself.
type member struct {
	to  int // end in raw
	out int // end in out
}

// item is an entry of a table of contents, or a further chunk of the last one.
type item struct {
	head     *tar.Header // where an entry begins
	data     bool        // there is content
	hole     bool        // and it is zeroes
	last     bool        // no chunk of the entry follows
	from, to int         // in raw
	member   int
	at       int64 // offset in the file
	sum      [sha256.Size]byte
	whole    *whole // of a file of several chunks
}

// whole is the digest of a file of several chunks.
type whole struct {
	done chan struct{} // closed when sum is there
	sum  [sha256.Size]byte
}

// entry is what a table of contents says of a name.
type entry struct {
	head   *tar.Header
	sum    [sha256.Size]byte // of the content
	chunks []chunk           // none of an empty file
}

// chunk is a part of a file that can be had alone.
type chunk struct {
	at, size  int64 // in the file
	blob, end int64 // where its member lies in the blob
	inner     int64 // where it begins in the member, decompressed
	hole      bool
	sum       [sha256.Size]byte
}

// start gives where in raw the present member begins.
func (f *frame) start() int {
	if len(f.members) == 0 {
		return 0
	}
	return f.members[len(f.members)-1].to
}

func (f *frame) end() { f.endAt(len(f.raw)) }

func (f *frame) endAt(to int) {
	f.holds = false
	if to > f.start() {
		f.members = append(f.members, member{to: to})
	}
}

func (f *frame) last() *item { return &f.items[len(f.items)-1] }

// pack compresses the frame's members and hashes its chunks.
func (f *frame) pack(c codec) error {
	from := 0
	for i := range f.members {
		m := &f.members[i]
		var err error
		if f.out, err = c.member(f.out, f.raw[from:m.to]); err != nil {
			return err
		}
		from, m.out = m.to, len(f.out)
	}
	for i := range f.items {
		if it := &f.items[i]; it.data {
			it.sum = sha256.Sum256(f.raw[it.from:it.to])
		}
	}
	return nil
}

// chunk gives an item's place in a blob in which the frame begins at base.
func (f *frame) chunk(it *item, base int64) chunk {
	var before member
	if it.member > 0 {
		before = f.members[it.member-1]
	}
	return chunk{
		at: it.at, size: int64(it.to - it.from),
		blob: base + int64(before.out), end: base + int64(f.members[it.member].out),
		inner: int64(it.from - before.to), hole: it.hole, sum: it.sum,
	}
}

// line is what frames go through: hashed for the diffID, hashed for the digests of
// files of several chunks, compressed, each at its own pace; then, in order,
// hashed for the blob's digest and written.
//
// Each stage is a goroutine, the compressing one several; wait joins them. After
// a failure they go on to take frames, so that nothing waits, and do nothing.
// Sends never block, since the channels hold all frames there can be.
type line struct {
	w       io.Writer
	toc     toc // nil without one
	form    form
	diffID  hash.Hash
	digest  hash.Hash
	size    int64 // of the tar; the cutter's until wait
	written int64 // of the blob; the writing stage's until wait

	tarred, contents, jobs, order, blobs chan *frame
	running                              sync.WaitGroup

	free chan *frame // those to be had; nil for one that is yet to be made

	mu  sync.Mutex // guards err
	err error      // the first failure
}

func newLine(w io.Writer, f form, t toc, workers int) *line {
	l := &line{w: w, toc: t, form: f, diffID: sha256.New(), digest: sha256.New()}
	n := inFlight(workers)
	for _, c := range []*chan *frame{&l.tarred, &l.contents, &l.jobs, &l.order, &l.blobs, &l.free} {
		*c = make(chan *frame, n)
	}
	for range n {
		l.free <- nil
	}
	l.running.Go(l.hashTar)
	l.running.Go(l.hashContents)
	for range workers {
		l.running.Go(l.work)
	}
	l.running.Go(l.writeOut)
	l.running.Go(l.hashBlob)
	return l
}

// fail notes the first error there was.
func (l *line) fail(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err == nil {
		l.err = err
	}
}

func (l *line) failed() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// frame gives an empty frame, when others have left the line.
func (l *line) frame(ctx context.Context) (*frame, error) {
	select {
	case f := <-l.free:
		if f == nil {
			f = &frame{raw: make([]byte, 0, l.form.size()), packed: make(chan struct{}, 1)}
		}
		return f, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// drop ends one use of a frame. With the last, it is free.
func (l *line) drop(f *frame) {
	if f.refs.Add(-1) > 0 {
		return
	}
	clear(f.items)
	f.raw, f.out, f.members, f.items, f.holds = f.raw[:0], f.out[:0], f.members[:0], f.items[:0], false
	l.free <- f
}

// send hands on a frame that is complete.
func (l *line) send(f *frame) {
	l.size += int64(len(f.raw))
	hashed := false
	for i := range f.items {
		hashed = hashed || f.items[i].whole != nil
	}
	f.refs.Store(3) // tar, blob, and the one who writes
	if hashed {
		f.refs.Store(4)
		l.contents <- f
	}
	l.tarred <- f
	l.jobs <- f
	l.order <- f
}

// wait ends the line when all that was sent is through.
func (l *line) wait() {
	for _, c := range []chan *frame{l.tarred, l.contents, l.jobs, l.order} {
		close(c)
	}
	l.running.Wait()
}

func (l *line) hashTar() {
	for f := range l.tarred {
		l.diffID.Write(f.raw)
		l.drop(f)
	}
}

func (l *line) hashContents() {
	sum := sha256.New()
	for f := range l.contents {
		for i := range f.items {
			it := &f.items[i]
			if it.whole == nil {
				continue
			}
			sum.Write(f.raw[it.from:it.to])
			if it.last {
				sum.Sum(it.whole.sum[:0])
				sum.Reset()
				close(it.whole.done)
			}
		}
		l.drop(f)
	}
}

func (l *line) work() {
	c, err := l.form.codec()
	l.fail(err)
	for f := range l.jobs {
		if l.failed() == nil {
			l.fail(f.pack(c))
		}
		f.packed <- struct{}{}
	}
}

func (l *line) hashBlob() {
	for f := range l.blobs {
		l.digest.Write(f.out)
		l.drop(f)
	}
}

func (l *line) writeOut() {
	defer close(l.blobs)
	var e entry
	for f := range l.order {
		<-f.packed
		l.blobs <- f
		if l.failed() == nil {
			l.fail(l.place(f, &e))
		}
		if l.failed() == nil {
			l.fail(l.write(f.out))
		}
		l.drop(f)
	}
}

// place gives the frame's entries to the table of contents. e is the one that the
// frame before left unfinished.
func (l *line) place(f *frame, e *entry) error {
	if l.toc == nil {
		return nil
	}
	for i := range f.items {
		it := &f.items[i]
		if it.head != nil {
			*e = entry{head: it.head, chunks: e.chunks[:0]}
		}
		if it.data {
			e.chunks = append(e.chunks, f.chunk(it, l.written))
			e.sum = it.sum
		} else {
			e.sum = sha256.Sum256(nil)
		}
		if !it.last {
			continue
		}
		if it.whole != nil {
			<-it.whole.done
			e.sum = it.whole.sum
		}
		if err := l.toc.entry(e); err != nil {
			return fmt.Errorf("%s: %w", e.head.Name, err)
		}
	}
	return nil
}

func (l *line) write(p []byte) error {
	n, err := l.w.Write(p)
	l.written += int64(n)
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	if err != nil {
		return fmt.Errorf("write layer: %w", err)
	}
	return nil
}
