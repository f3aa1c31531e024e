package fetch

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"reflect"

	"github.com/varvefs/varve/index"
	"github.com/varvefs/varve/index/tarscan"
)

// errIndex says that an index is not its layer's.
var errIndex = errors.New("the index does not match the layer")

// maxHollow is how many bytes of frames that nobody reads are fetched to prove a
// layer of which all else is here.
const maxHollow = 4 << 20

// hollow gives the frames that alone are missing and hold no contents, nil if
// others are missing too: nobody would ever read them.
func (l *Layer) hollow() (frames []int) {
	about := l.About()
	n, _, _ := l.frames.Len()
	var bytes int64
	if !about.Unproven || l.data.Missing() > l.hollows {
		return nil
	}
	for f := range n {
		if l.data.Present(f) || l.flights[f] != nil {
			continue
		}
		if bytes += l.frames.Frame(f).Length; bytes > maxHollow || l.frames.Holds(f, about.Contents) {
			return nil
		}
		frames = append(frames, f)
	}
	return frames
}

// countHollow counts the frames without contents.
func (l *Layer) countHollow() (count int) {
	about := l.About()
	n, _, _ := l.frames.Len()
	for f := range n {
		if about.Unproven && !l.frames.Holds(f, about.Contents) {
			count++
		}
	}
	return count
}

// proveSoon proves a layer that is read by an index which others made, once all of
// it is here. The caller holds mu.
func (l *Layer) proveSoon() {
	if frames := l.hollow(); len(frames) > 0 && len(l.sources) > 0 && l.ctx.Err() == nil {
		for _, f := range frames {
			l.flights[f] = &flight{done: make(chan struct{})}
		}
		l.runs.Add(1)
		l.start(frames)
		return
	}
	if !l.Whole() {
		return
	}
	if !l.about.Load().Unproven || l.ctx.Err() != nil || !l.proving.CompareAndSwap(false, true) {
		return
	}
	diffIDs := l.diffIDs()
	if len(diffIDs) == 0 {
		l.proving.Store(false) // nobody knows what it should be
		return
	}
	l.runs.Go(func() {
		err := l.prove(diffIDs)
		if err == nil {
			l.mu.Lock()
			diffIDs = l.diffIDs() // somebody may have opened it meanwhile
			l.mu.Unlock()
			_, err = agreed(append(diffIDs, func() (string, error) { return l.About().DiffID, nil }))
		}
		switch {
		case errors.Is(err, errIndex):
			l.refuse(err)
		case l.ctx.Err() != nil: // there will be time when it is opened again
		case err != nil:
			l.f.log.Warn("a layer could not be compared with its index", "layer", l.Digest, "err", err)
			l.proving.Store(false)
		default:
			l.f.log.Info("layer proven", "layer", l.Digest, "index", l.About().Index)
		}
	})
}

// diffIDs gives what the images that have the layer open say. The caller holds mu.
func (l *Layer) diffIDs() (fs []func() (string, error)) {
	for _, h := range l.sources {
		if h.diffID != nil {
			fs = append(fs, h.diffID)
		}
	}
	return fs
}

// agreed gives the diffID on which all agree, "" if nobody knows one. Where they do
// not, one of them would be given what another vouches for.
func agreed(diffIDs []func() (string, error)) (want string, err error) {
	for _, diffID := range diffIDs {
		id, err := diffID()
		if err != nil {
			return "", err
		}
		if want != "" && id != "" && id != want {
			return "", fmt.Errorf("%w: one image says that its diffID is %s, another %s", errIndex, want, id)
		}
		want = cmp.Or(want, id)
	}
	return want, nil
}

// prove compares the layer with its index: the whole tar has the diffID that the
// images' configs name, its entries are those of the index, one by one, and its
// contents those of the data file. What the tar holds beside contents is then
// given up.
func (l *Layer) prove(diffIDs []func() (string, error)) error {
	want, err := agreed(diffIDs)
	if err != nil || want == "" {
		return errors.Join(err, errors.New("its diffID is not known"))
	}
	l.steady.Lock() // nothing may be dropped meanwhile
	defer l.steady.Unlock()
	if !l.Whole() {
		return errors.New("frames of it were dropped")
	}
	about := l.About()
	in := &padded{r: index.Rebuild(l.frames, l.data.File()), sum: sha256.New(), want: want}
	var skeleton bytes.Buffer
	same := &comparing{ctx: l.ctx, data: l.data.File()}
	got, res, err := tarscan.Scan(l.ctx, in, tarscan.Plain, same, tarscan.Options{Skeleton: &skeleton})
	if errors.Is(err, index.ErrMalformed) {
		return fmt.Errorf("%w: %w", errIndex, err)
	}
	if err != nil {
		return err
	}
	if res.DiffID.String() != want {
		return fmt.Errorf("%w: the layer's diffID is %s, by the index it is %s", errIndex, want, res.DiffID)
	}
	entries, err := l.Entries()
	if err != nil {
		return err
	}
	if err := compareEntries(got.Entries, entries); err != nil {
		return err
	}
	if err := same.end(about.Contents); err != nil {
		return err
	}
	return l.proven(about, want, skeleton.Bytes())
}

// padded reads a tar and then the zeroes that it takes to have a digest: SOCI's own
// builder does not count what follows the tar's end.
type padded struct {
	r    io.Reader
	sum  hash.Hash
	want string
	left int // zeroes
	over bool
}

// maxPadding is how many zeroes are tried: that is far more than a record of tar.
const maxPadding = 4 << 20

func (p *padded) Read(b []byte) (int, error) {
	if !p.over {
		n, err := p.r.Read(b)
		p.sum.Write(b[:n])
		if err != io.EOF {
			return n, err
		}
		p.over, p.left = true, p.zeroes()
		if n > 0 {
			return n, nil
		}
	}
	if p.left == 0 {
		return 0, io.EOF
	}
	b = b[:min(len(b), p.left)]
	clear(b)
	p.left -= len(b)
	return len(b), nil
}

func (p *padded) zeroes() int {
	var block [512]byte
	for n := 0; n <= maxPadding; n += len(block) {
		if fmt.Sprintf("sha256:%x", p.sum.Sum(nil)) == p.want {
			return n
		}
		p.sum.Write(block[:])
	}
	return 0
}

// compareEntries compares what a tar holds with what an index says of it.
func compareEntries(got, said []index.Entry) error {
	if len(got) != len(said) {
		return fmt.Errorf("%w: the layer has %d entries, the index %d", errIndex, len(got), len(said))
	}
	for i := range got {
		if !reflect.DeepEqual(got[i], said[i]) {
			return fmt.Errorf("%w: %.80q: it is %+v, the index says %+v", errIndex, got[i].Name, got[i], said[i])
		}
	}
	return nil
}

// comparing compares contents with those that the data file has in the same
// place. What a scan passes over as zeroes must be zeroes there.
type comparing struct {
	ctx  context.Context
	data io.ReaderAt
	at   int64 // up to where it was compared
	buf  []byte
}

func (c *comparing) WriteAt(p []byte, off int64) (int, error) {
	if err := c.end(off); err != nil {
		return 0, err
	}
	c.buf = append(c.buf[:0], p...)
	if _, err := c.data.ReadAt(c.buf, off); err != nil {
		return 0, err
	}
	if !bytes.Equal(c.buf, p) {
		return 0, fmt.Errorf("%w: contents at %d of the data file differ", errIndex, off)
	}
	c.at = off + int64(len(p))
	return len(p), nil
}

// end compares what lies before off with zeroes.
func (c *comparing) end(off int64) error {
	const step = 1 << 20
	if err := c.ctx.Err(); err != nil {
		return err
	}
	for c.at < off {
		n := min(step, off-c.at)
		b := make([]byte, n)
		if _, err := c.data.ReadAt(b, c.at); err != nil && err != io.EOF {
			return err
		}
		for _, v := range b {
			if v != 0 {
				return fmt.Errorf("%w: zeroes at %d of the data file differ", errIndex, c.at)
			}
		}
		c.at += n
	}
	return nil
}

// proven keeps a layer that was found to be what its index says, with the digest
// of every piece, and clears the rest of the tar away.
func (l *Layer) proven(about About, diffID string, skeleton []byte) error {
	table, err := l.frames.Proven(about.Contents, func(p index.Piece) ([sha256.Size]byte, error) {
		h := sha256.New()
		_, err := io.Copy(h, io.NewSectionReader(l.data.File(), p.Data, p.Size))
		return sumOf(h), cmp.Or(l.ctx.Err(), err)
	})
	if err != nil {
		return err
	}
	rest := l.Size() - about.Contents
	at := about.Contents
	about.Unproven, about.ByFrame, about.DiffID = false, false, diffID
	for _, doc := range []struct {
		name  string
		write func(io.Writer) error
	}{
		{skeletonDocument, func(w io.Writer) error { _, err := w.Write(skeleton); return err }},
		{framesDocument, func(w io.Writer) error { _, err := table.WriteTo(w); return err }},
		{aboutDocument, func(w io.Writer) error { return json.NewEncoder(w).Encode(about) }},
	} {
		if err := l.f.store.Replace(l.Key, doc.name, doc.write); err != nil {
			return err
		}
	}
	l.about.Store(&about)
	if rest == 0 {
		return nil
	}
	return l.data.Punch(at, rest+index.BlockSize) // the last block too, of which it has a part
}

// doubtIndex has the next mount do without an index by which a frame does not verify
// wherever it comes from. What was verified through it is still read.
func (l *Layer) doubtIndex(err error) {
	if !l.About().Unproven || l.f.store.Refused(l.Key) {
		return
	}
	l.f.m.LazyFallbacks.WithLabelValues("index_mismatch").Inc()
	if rerr := l.f.store.Refuse(l.Key); rerr != nil {
		err = errors.Join(err, rerr)
	}
	l.f.log.Error("index refused: mount the image anew to have the layer read whole", "layer", l.Digest, "index", l.About().Index, "err", err)
}

// refuse gives up a layer whose index is wrong: nothing that was read through it
// is kept or read again, and the index is not used any more.
func (l *Layer) refuse(err error) {
	l.f.log.Error("index refused: mounts of the layer must be made anew", "layer", l.Digest, "index", l.About().Index, "err", err)
	l.f.m.VerifyFailures.WithLabelValues("index").Inc()
	l.f.m.LazyFallbacks.WithLabelValues("index_mismatch").Inc()
	err = fmt.Errorf("%v: %w: %w", l, ErrVerify, err)
	l.wrong.Store(&err)
	if err := errors.Join(l.f.store.Refuse(l.Key), l.f.forget(l)); err != nil {
		l.f.log.Error("refused index", "layer", l.Digest, "err", err)
	}
}
