package fetch

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/index"
	"github.com/varvefs/varve/index/soci"
)

func readAll(t testing.TB, h *Handle) {
	t.Helper()
	if err := h.Ensure(0, h.Size()); err != nil && !errors.Is(err, ErrVerify) {
		t.Fatal(err)
	}
}

// proof waits until a layer of which all is local is proven or found wrong.
func proof(t testing.TB, h *Handle) error {
	t.Helper()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if wrong := h.wrong.Load(); wrong != nil {
			for h.proving.Load() && !h.gone() { // it is about to be taken from the store
				time.Sleep(time.Millisecond)
			}
			return *wrong
		}
		if !h.About().Unproven {
			h.runs.Wait()
			return nil
		}
	}
	t.Fatal("it is not proven")
	return nil
}

// gone reports whether the layer is in the store no more.
func (h *Handle) gone() bool {
	h.f.mu.Lock()
	defer h.f.mu.Unlock()
	return h.f.layers[h.Key] != h.Layer
}

// again makes the store of a closed machine believe that the machine has started
// since, and gives it a new daemon.
func (m *machine) again(t testing.TB, key string) *machine {
	t.Helper()
	path := filepath.Join(m.dir, "layers", strings.Replace(key, ":", "-", 1), "present")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	copy(b[40:], "00000000-0000-0000-0000-000000000000") // store's bootAt
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return on(t, m.dir, quick)
}

// TestProven reads all of a layer by the index that another made.
func TestProven(t *testing.T) {
	for name, l := range indexedLayers(t) {
		t.Run(name, func(t *testing.T) {
			s := serve(t, l.layer)
			m := on(t, t.TempDir(), quick)
			h := m.must(t, m.with(l.layer, s, l.Found))
			checkFile(t, h, find(t, l.layer, "volume0"))

			// What is there of it survives a start of the machine, unproven as it is.
			key := h.Key
			m.close(t)
			m = m.again(t, key)
			q := m.request(l.layer)
			q.Key = key
			checkFile(t, m.must(t, q), find(t, l.layer, "volume0"))
			h = m.must(t, m.with(l.layer, s, l.Found))
			if h.Whole() || !h.About().Unproven {
				t.Errorf("whole: %v, %+v", h.Whole(), h.About())
			}
			readAll(t, h)
			if err := proof(t, h); err != nil {
				t.Fatal(err)
			}
			about := h.About()
			if about.DiffID != l.diffID || about.ByFrame || about.Contents == 0 || about.Contents >= h.Size() {
				t.Errorf("%+v of %d bytes", about, h.Size())
			}
			if n := blocks(t, h.Layer); n > about.Contents {
				t.Errorf("%d bytes on the disk for contents of %d", n, about.Contents)
			}
			checkAll(t, h, l.layer)
			if total := m.count(t, "verify_failures_total", ""); total != 0 {
				t.Errorf("%d failures", total)
			}
			m.close(t)

			// With nothing but the store it is read as what was read whole.
			s.Reset()
			m = m.again(t, key)
			q = m.request(l.layer)
			q.Key = key
			h = m.must(t, q)
			_, n, _ := h.frames.Len()
			for i := range n {
				if p := h.frames.Piece(i); p.Digest == unknown || p.Data+p.Size > about.Contents {
					t.Errorf("%+v", p)
				}
			}
			if a := h.About(); a != about || h.byFrame {
				t.Errorf("%+v, was %+v", a, about)
			}
			if doc, err := m.store.Document(key, skeletonDocument); err != nil || len(doc) == 0 {
				t.Errorf("a skeleton of %d bytes, %v", len(doc), err)
			}
			checkAll(t, h, l.layer)
			if rs := s.ranges(); len(rs) != 0 {
				t.Errorf("asked for %q", rs)
			}
			h = m.must(t, m.with(l.layer, s, l.Found))
			if err := h.Ensure(0, h.Size()); err != nil {
				t.Fatal(err)
			}
			dropAll(t, h)
			s.Reset()
			want := span(t, h, "volume2")
			checkFile(t, h, find(t, l.layer, "volume2"))
			if rs := s.ranges(); !slices.Equal(rs, []string{want}) {
				t.Errorf("asked for %q, want %q", rs, want)
			}
			checkAll(t, h, l.layer)
		})
	}
}

// zTOC describes a layer by a tar, which may be another than it has.
func zTOC(t testing.TB, l *layer, tarball []byte, gzip bool) []byte {
	t.Helper()
	b, err := index.ReadBundle(sharedOf(t, l).Bundle)
	if err != nil {
		t.Fatal(err)
	}
	var points []index.Point
	for i := range b.Points.Len() {
		p, err := b.Points.Point(i)
		if err != nil {
			t.Fatal(err)
		}
		if p.Digest != unknown {
			points = append(points, p)
		}
	}
	var z bytes.Buffer
	err = soci.Write(&z, soci.Source{
		Tar: bytes.NewReader(tarball), Compressed: l.Size, Uncompressed: int64(len(tarball)), Gzip: gzip,
		SpanSize: 256 << 10, Points: points, Tool: "test",
	})
	if err != nil {
		t.Fatal(err)
	}
	return z.Bytes()
}

// retar makes a tar with headers that are changed on the way.
func retar(t testing.TB, fs []file, change func(h *tar.Header) bool) []byte {
	t.Helper()
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, f := range fs {
		h := &tar.Header{Name: f.name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(f.data)), ModTime: time.Unix(1700000000, 0)}
		if !change(h) {
			continue
		}
		data := append(slices.Clone(f.data), make([]byte, 512)...)[:h.Size]
		if err := errors.Join(tw.WriteHeader(h), second(tw.Write(data))); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func second(_ int, err error) error { return err }

// rebuilt gives a bundle with its pieces changed: what change answers takes the
// place of each.
func rebuilt(t testing.TB, doc []byte, change func(i int, p index.Piece) (index.Piece, bool)) []byte {
	t.Helper()
	b, err := index.ReadBundle(doc)
	if err != nil {
		t.Fatal(err)
	}
	frames, pieces, size := b.Frames.Len()
	build := index.NewBuilder(index.Raw)
	if _, err := build.Reserve(size); err != nil {
		t.Fatal(err)
	}
	for i := range frames {
		build.AddFrame(b.Frames.Frame(i))
	}
	for i := range pieces {
		if p, ok := change(i, b.Frames.Piece(i)); ok {
			build.AddPiece(p)
		}
	}
	l, err := build.Layer(b.Size)
	if err != nil {
		t.Fatal(err)
	}
	b.Frames = l.Frames
	return bundle(t, b)
}

// TestIndexLies reads all of layers by indexes that look right and are not: nothing
// is read from them any more, nothing of them is kept, and the layer is read whole.
func TestIndexLies(t *testing.T) {
	fs := volumes(3, 300_000)
	tarball := makeTar(t, fs)
	g, p := packLayer(t, tarball, fs, gz), packLayer(t, tarball, fs, raw)
	good := sharedOf(t, p).Bundle
	edited := func(change func(b *index.Bundle)) []byte {
		b, err := index.ReadBundle(good)
		if err != nil {
			t.Fatal(err)
		}
		change(b)
		return bundle(t, b)
	}
	changed := func(change func(h *tar.Header) bool) []byte { return retar(t, fs, change) }
	volume := func(h *tar.Header) bool { return h.Name == "volume1" }
	// A piece of a plain tar that another takes the place of must be proven by what
	// it has there.
	at := func(b *index.Bundle, p index.Piece) []byte {
		off := b.Points.At(p.Frame).Out + p.Inner
		return tarball[off : off+p.Size]
	}
	plain, err := index.ReadBundle(good)
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		l *layer
		x Found
	}{
		"mode": {g, published(KindSOCI, zTOC(t, g, changed(func(h *tar.Header) bool {
			if volume(h) {
				h.Mode = 0o4755
			}
			return true
		}), true))},
		"owner": {p, published(KindSOCI, zTOC(t, p, changed(func(h *tar.Header) bool {
			if volume(h) {
				h.Uid = 1
			}
			return true
		}), false))},
		"name": {g, published(KindSOCI, zTOC(t, g, changed(func(h *tar.Header) bool {
			if volume(h) {
				h.Name = "volumeX"
			}
			return true
		}), true))},
		"size within a block": {g, published(KindSOCI, zTOC(t, g, changed(func(h *tar.Header) bool {
			if volume(h) {
				h.Size++
			}
			return true
		}), true))},
		"mode in a bundle":       {p, published(KindBundle, edited(func(b *index.Bundle) { b.Entries[1].Mode |= 0o4000 }))},
		"time in a bundle":       {p, published(KindBundle, edited(func(b *index.Bundle) { b.Entries[1].MtimeNs++ }))},
		"attribute in a bundle":  {p, published(KindBundle, edited(func(b *index.Bundle) { b.Entries[1].Xattrs = []index.Xattr{{Name: "user.a"}} }))},
		"name in a bundle":       {p, published(KindBundle, edited(func(b *index.Bundle) { b.Entries[1].Name = "other" }))},
		"size in a bundle":       {p, published(KindBundle, edited(func(b *index.Bundle) { b.Entries[1].Size-- }))},
		"missing entry":          {p, published(KindBundle, edited(func(b *index.Bundle) { b.Entries = slices.Delete(b.Entries, 1, 2) }))},
		"one entry more":         {p, published(KindBundle, edited(func(b *index.Bundle) { b.Entries = append(b.Entries, index.Entry{Name: "more", Mode: unix.S_IFREG}) }))},
		"two files change place": {p, published(KindBundle, edited(func(b *index.Bundle) { b.Entries[1].Data, b.Entries[2].Data = b.Entries[2].Data, b.Entries[1].Data }))},
		"contents shifted": {p, published(KindBundle, rebuilt(t, good, func(i int, p index.Piece) (index.Piece, bool) {
			if i == 0 {
				p.Inner -= 512
				p.Digest = sha256.Sum256(at(plain, p))
			}
			return p, true
		}))},
		"hole that is none": {p, published(KindBundle, rebuilt(t, good, func(i int, p index.Piece) (index.Piece, bool) { return p, i != 1 }))},
		"diffID": {func() *layer { l := *p; l.diffID = g.diffID[:len(g.diffID)-1] + "0"; return &l }(), published(KindBundle, edited(func(b *index.Bundle) {
			b.DiffID = g.diffID[:len(g.diffID)-1] + "0"
		}))},
	} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, test.l)
			m := on(t, t.TempDir(), quick)
			h := m.must(t, m.with(test.l, s, test.x))
			if !h.About().Unproven {
				t.Fatalf("%+v", h.About())
			}
			readAll(t, h)
			err := proof(t, h)
			if !errors.Is(err, ErrVerify) || !errors.Is(err, errIndex) {
				t.Fatalf("got %v", err)
			}
			if err := h.Ensure(0, 1); !errors.Is(err, ErrVerify) {
				t.Errorf("got %v", err)
			}
			if err := h.Hold(0, 1); !errors.Is(err, ErrVerify) {
				t.Errorf("got %v", err)
			}
			if !m.store.Refused(h.Key) || m.count(t, "lazy_fallbacks_total", "index_mismatch") != 1 || m.count(t, "verify_failures_total", "index") != 1 {
				t.Error("it is not refused, or not counted")
			}
			m.empty(t)
			if name == "diffID" {
				if _, err := m.Open(context.Background(), m.with(test.l, s, test.x)); !errors.Is(err, ErrVerify) {
					t.Errorf("got %v", err)
				}
				return
			}
			q := m.with(test.l, s, test.x)
			q.Key = h.Key
			h = m.must(t, q)
			if a := h.About(); a.Index != "checkpoints" || h.Key != test.l.Digest || m.count(t, "lazy_fallbacks_total", "index_refused") != 1 {
				t.Errorf("%q: %+v", h.Key, a)
			}
			checkAll(t, h, test.l)
		})
	}
}

// TestTarIsPadded proves a layer of which the zTOC does not count what lies behind
// the tar's end: so SOCI's own builder makes them.
func TestTarIsPadded(t *testing.T) {
	fs := volumes(2, 300_000)
	tarball := makeTar(t, fs)
	for _, padding := range []int{0, 512, 10240 - len(tarball)%10240, 64 << 10} {
		for form, pack := range map[string]func(testing.TB, []byte) []byte{"gzip": gz, "tar": raw} {
			t.Run(fmt.Sprintf("%d, %s", padding, form), func(t *testing.T) {
				l := packLayer(t, append(slices.Clone(tarball), make([]byte, padding)...), fs, pack)
				said := tarball
				if form == "tar" {
					said = l.blob
				}
				s := serve(t, l)
				m := on(t, t.TempDir(), quick)
				h := m.must(t, m.with(l, s, published(KindSOCI, zTOC(t, l, said, form == "gzip"))))
				readAll(t, h)
				if err := proof(t, h); err != nil {
					t.Fatal(err)
				}
				checkAll(t, h, l)
			})
		}
	}
	// Zeroes are tried, but nothing else, and not for ever.
	in := &padded{r: io.LimitReader(zeroReader{}, 1000), sum: sha256.New(), want: "sha256:none"}
	if n, err := io.Copy(io.Discard, in); n != 1000 || err != nil {
		t.Errorf("%d bytes, %v", n, err)
	}
}

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// TestImagesDisagree has two images say what a layer's diffID is. One of them lies,
// and which is not known.
func TestImagesDisagree(t *testing.T) {
	fs := volumes(2, 300_000)
	l := packLayer(t, makeTar(t, fs), fs, gz)
	x := published(KindSOCI, sharedOf(t, l).ZTOC)
	s := serve(t, l)
	for _, first := range []bool{true, false} {
		m := on(t, t.TempDir(), quick)
		honest, lying := m.with(l, s, x), m.with(l, s, x)
		lying.DiffID = func() (string, error) { return "sha256:" + strings.Repeat("0", 64), nil }
		qs := []Request{lying, honest}
		if !first {
			slices.Reverse(qs)
		}
		h := m.must(t, qs[0])
		m.must(t, qs[1])
		readAll(t, h)
		if err := proof(t, h); !errors.Is(err, ErrVerify) {
			t.Errorf("got %v", err)
		}
	}
}

// TestDropBesideReaders drops frames while they are read: who reads sees what the
// layer has, and never what is left of it.
func TestDropBesideReaders(t *testing.T) {
	fs := volumes(3, 1<<20)
	l := packLayer(t, makeTar(t, fs), fs, gz)
	m := on(t, t.TempDir(), quick)
	p, b := m.start(t, l)
	defer p.Close()
	es := watch(p)
	var stop, readers sync.WaitGroup
	over := make(chan struct{})
	entries := func() []index.Entry { return slices.Clone(es.until(0)) }
	read := func(d interface {
		Hold(off, n int64) error
		Release()
		Fd() int
	}, seed uint64) {
		r := rand.New(rand.NewPCG(seed, 1))
		for {
			select {
			case <-over:
				return
			default:
			}
			k := r.IntN(len(fs))
			if known := entries(); k >= len(known) || len(fs[k].data) == 0 {
				continue
			} else if from, n := r.IntN(len(fs[k].data)), 1+r.IntN(200_000); true {
				want := fs[k].data[from:min(from+n, len(fs[k].data))]
				at := known[k].Data + int64(from)
				if err := d.Hold(at, int64(len(want))); err != nil {
					t.Errorf("%q: %v", fs[k].name, err)
					return
				}
				got := make([]byte, len(want))
				_, err := unix.Pread(d.Fd(), got, at)
				d.Release()
				if err != nil || !bytes.Equal(got, want) {
					t.Errorf("%q: %d bytes at %d differ, %v", fs[k].name, len(got), from, err)
					return
				}
			}
		}
	}
	// Some read from the pass, and go on when it is over and the layer is dropped.
	for i := range 3 {
		readers.Go(func() { read(p, uint64(i)) })
	}
	dropped := 0
	stop.Go(func() {
		for {
			select {
			case <-over:
				return
			default:
			}
			for _, l := range m.Layers(l.Digest) {
				if n, err := l.Drop(); err != nil {
					t.Error(err)
				} else if n > 0 {
					dropped++
				}
			}
		}
	})
	b.allow(len(l.blob))
	h := m.openFile(t, l)
	for i := range 3 {
		readers.Go(func() { read(h, uint64(10+i)) })
	}
	time.Sleep(time.Second)
	close(over)
	readers.Wait()
	stop.Wait()
	if dropped < 3 {
		t.Errorf("dropped %d times", dropped)
	}
	checkAll(t, h, l)
}

// TestDropWhileProving takes frames away from who compares all of them.
func TestDropWhileProving(t *testing.T) {
	fs := volumes(3, 1<<20)
	l := packLayer(t, makeTar(t, fs), fs, gz)
	x := published(KindSOCI, sharedOf(t, l).ZTOC)
	for range 3 {
		m := on(t, t.TempDir(), quick)
		q := m.with(l, nil, x)
		q.Blob = File{bytes.NewReader(l.blob), l.Size}
		h := m.must(t, q)
		for range 5 {
			readAll(t, h)
			if _, err := h.Drop(); err != nil {
				t.Fatal(err)
			}
		}
		readAll(t, h)
		checkAll(t, h, l)
		if err := proof(t, h); err != nil {
			t.Error(err)
		}
		dropAll(t, h)
		checkAll(t, h, l)
	}
}

// TestCloseWhileProving ends a proof with the machine, and finds the layer as it
// was.
func TestCloseWhileProving(t *testing.T) {
	fs := volumes(3, 1<<20)
	l := packLayer(t, makeTar(t, fs), fs, gz)
	x := published(KindBundle, sharedOf(t, l).Bundle)
	m := on(t, t.TempDir(), quick)
	q := m.with(l, nil, x)
	q.Blob = File{bytes.NewReader(l.blob), l.Size}
	readAll(t, m.must(t, q))
	m.close(t)
	m = on(t, m.dir, quick)
	h := m.must(t, q)
	if err := proof(t, h); err != nil {
		t.Error(err)
	}
	checkAll(t, h, l)
}

// TestDoubtedSpans starts the machine anew while layers are neither whole nor
// proven. What of a span no digest proves is known by its sum.
func TestDoubtedSpans(t *testing.T) {
	for name, l := range indexedLayers(t) {
		t.Run(name, func(t *testing.T) {
			s := serve(t, l.layer)
			m := on(t, t.TempDir(), quick)
			h := m.must(t, m.with(l.layer, s, l.Found))
			checkFile(t, h, find(t, l.layer, "volume1"))
			e := entry(t, h, "volume1")
			k, _ := h.frames.PiecesIn(e.Data+e.Size/2, 1)
			f := h.frames.Frame(h.frames.FrameOf(k))
			key := h.Key
			m.close(t)

			path := filepath.Join(m.dir, "layers", strings.Replace(key, ":", "-", 1), "data")
			data, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			right := find(t, l.layer, "volume1").data[e.Size/2]
			if err := errors.Join(second(data.WriteAt([]byte{^right}, e.Data+e.Size/2)), data.Close()); err != nil {
				t.Fatal(err)
			}
			m = m.again(t, key)
			q := m.request(l.layer)
			q.Key = key
			h = m.must(t, q)
			if _, err := content(h, e); !errors.Is(err, ErrOffline) {
				t.Errorf("damaged, without a network: %v", err)
			}
			s.Reset()
			h = m.must(t, m.with(l.layer, s, l.Found))
			checkFile(t, h, find(t, l.layer, "volume1"))
			if rs, want := s.ranges(), asked(f.Offset, f.Offset+f.Length); !slices.Equal(rs, []string{want}) {
				t.Errorf("asked for %q, want %q", rs, want)
			}
			readAll(t, h)
			if err := proof(t, h); err != nil {
				t.Error(err)
			}
			checkAll(t, h, l.layer)
		})
	}
}
