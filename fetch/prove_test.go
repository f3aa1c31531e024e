package fetch

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
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
