package image

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
)

// putBlob commits text as a layer.
func putBlob(t *testing.T, s *Store, text string) *BlobWriter {
	t.Helper()
	w, err := s.NewBlob()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(w, text); err != nil {
		t.Fatal(err)
	}
	if err := w.Commit(digest.FromString(text), int64(len(text))); err != nil {
		t.Fatal(err)
	}
	return w
}

func readBlobText(t *testing.T, s *Store, d digest.Digest) string {
	t.Helper()
	f, size, err := s.OpenBlob(d)
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	if err != nil || int64(len(b)) != size {
		t.Errorf("%d of %d bytes: %v", len(b), size, err)
	}
	return string(b)
}

// temps counts the files without a final name.
func temps(t *testing.T, dir string) int {
	t.Helper()
	n := 0
	err := filepath.WalkDir(dir, func(_ string, e os.DirEntry, err error) error {
		if err == nil && strings.HasPrefix(e.Name(), tempPrefix) {
			n++
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestLayerLivesByLeaseThenByManifest(t *testing.T) {
	dir := t.TempDir()
	s, err := OpenStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	m, c := testImage(t, "app:1", "the layer")
	d := m.Layers[0].Digest
	other, oc := testImage(t, "other:1", "another layer")
	if err := s.Put(other, oc); err != nil {
		t.Fatal(err)
	}
	sweep := func() {
		t.Helper()
		if err := s.Tag(other.Name, mustName(t, "gone")); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Remove(mustName(t, "gone")); err != nil {
			t.Fatal(err)
		}
	}

	if s.HasBlob(d) {
		t.Error("here before it was written")
	}
	if _, _, err := s.OpenBlob(d); !errors.Is(err, ErrNotFound) {
		t.Errorf("not here: %v", err)
	}
	half, err := s.NewBlob()
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(half, "the ")
	w := putBlob(t, s, "the layer")
	sweep()
	if !s.HasBlob(d) || temps(t, dir) != 1 {
		t.Error("a blob that is held, or on its way, was swept")
	}
	if err := s.Put(m, c); err != nil {
		t.Fatal(err)
	}
	w.Release()
	w.Release()
	w.Discard()
	sweep()
	if got := readBlobText(t, s, d); got != "the layer" {
		t.Error(got)
	}
	half.Release()
	if temps(t, dir) != 0 {
		t.Error("a released writer leaves its file")
	}
	gone, err := s.Remove(m.Name)
	if err != nil || len(gone) != 3 || s.HasBlob(d) {
		t.Errorf("removed with its image: %v, %v", gone, err)
	}
	// Nothing names it and nobody holds it.
	putBlob(t, s, "the layer").Release()
	if !s.HasBlob(d) {
		t.Error("gone before a sweep")
	}
	sweep()
	if s.HasBlob(d) {
		t.Error("kept for nobody")
	}
}

func TestDiscard(t *testing.T) {
	dir := t.TempDir()
	s, err := OpenStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	m, c := testImage(t, "app:1", "x")
	d := m.Layers[0].Digest
	a, b := putBlob(t, s, "x"), putBlob(t, s, "x")
	a.Discard()
	a.Discard()
	if !s.HasBlob(d) {
		t.Error("another holds it")
	}
	b.Discard()
	if s.HasBlob(d) {
		t.Error("left")
	}
	if err := s.Put(m, c); err != nil {
		t.Fatal(err)
	}
	putBlob(t, s, "x").Discard()
	if !s.HasBlob(d) {
		t.Error("a manifest names it")
	}
	w, err := s.NewBlob()
	if err != nil {
		t.Fatal(err)
	}
	w.Discard()
	if _, err := w.Write([]byte("x")); !errors.Is(err, os.ErrClosed) {
		t.Errorf("written after the end: %v", err)
	}
	if err := w.Commit(d, 1); !errors.Is(err, os.ErrClosed) {
		t.Errorf("committed after the end: %v", err)
	}
	if temps(t, dir) != 0 || len(s.held) != 0 {
		t.Errorf("left: %d files, leases %v", temps(t, dir), s.held)
	}
}

func TestCommitRefuses(t *testing.T) {
	dir := t.TempDir()
	s, err := OpenStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		d    digest.Digest
		size int64
	}{
		"short":     {digest.FromString("abc"), 4},
		"long":      {digest.FromString("abc"), 2},
		"malformed": {"sha256:../../x", 3},
		"sha512":    {digest.SHA512.FromString("abc"), 3},
		"empty":     {"", 3},
	} {
		w, err := s.NewBlob()
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(w, "abc")
		if err := w.Commit(tt.d, tt.size); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
		w.Release()
	}
	if temps(t, dir) != 0 || len(s.held) != 0 {
		t.Errorf("left: %d files, leases %v", temps(t, dir), s.held)
	}
}

func TestDamagedLayerIsRefusedAndReplaced(t *testing.T) {
	for name, fn := range replaced {
		t.Run(name, func(t *testing.T) {
			s, err := OpenStore(t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			d := digest.FromString("x")
			if err := fn(t, s.blobFile(d)); err != nil {
				t.Fatal(err)
			}
			inTime(t, func() {
				f, _, err := s.OpenBlob(d)
				if err == nil {
					f.Close()
				}
				if regular := name == "empty" || name == "zeroed"; regular != (err == nil) || !regular && !errors.Is(err, ErrMalformed) || regular != s.HasBlob(d) {
					t.Errorf("opened: %v", err)
				}
			})
			defer putBlob(t, s, "x").Release()
			if got := readBlobText(t, s, d); got != "x" {
				t.Error(got)
			}
		})
	}
}

func TestOpenStoreSweepsTemps(t *testing.T) {
	dir := t.TempDir()
	s, err := OpenStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	w := putBlob(t, s, "x")
	defer w.Release()
	for _, file := range []string{".tmp-1", "blobs/.tmp-2", "blobs/sha256/.tmp-3", "blobs/.tmp-4/full"} {
		putFile(t, filepath.Join(dir, file), "left by a killed daemon")
	}
	outside := putFile(t, filepath.Join(t.TempDir(), "precious"), "x")
	if err := os.Symlink(filepath.Dir(outside), filepath.Join(dir, "blobs", ".tmp-5")); err != nil {
		t.Fatal(err)
	}
	if s, err = OpenStore(dir); err != nil {
		t.Fatal(err)
	}
	if temps(t, dir) != 0 || !s.HasBlob(digest.FromString("x")) {
		t.Error("not swept, or too much")
	}
	if _, err := os.Stat(outside); err != nil {
		t.Error(err)
	}
}

// Many commit while others remove: no image ever lacks its layer.
func TestCommitAgainstSweep(t *testing.T) {
	s, err := OpenStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 6 {
		text := fmt.Sprint("layer ", i/2) // two make the same one
		m, c := testImage(t, fmt.Sprintf("x:%d", i), text)
		wg.Go(func() {
			for range 10 {
				w, err := s.NewBlob()
				if err != nil {
					t.Error(err)
					return
				}
				io.WriteString(w, text)
				err = w.Commit(digest.FromString(text), int64(len(text)))
				if err == nil {
					err = s.Put(m, c)
				}
				w.Release()
				if err != nil || !s.HasBlob(m.Layers[0].Digest) {
					t.Errorf("%s lost its layer: %v", m.Name, err)
				}
				if _, err := s.Remove(m.Name); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if len(s.held) != 0 {
		t.Errorf("leases left: %v", s.held)
	}
}

func names(t *testing.T, refs ...string) []Name {
	t.Helper()
	var list []Name
	for _, r := range refs {
		list = append(list, mustName(t, r))
	}
	return list
}

func TestSources(t *testing.T) {
	dir := t.TempDir()
	s, err := OpenStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	m, c := testImage(t, "mine/app:1", "x")
	sources := func(ref string) []Name {
		t.Helper()
		// What is asked is what is on disk.
		if s, err = OpenStore(dir); err != nil || s.Recovered() != nil {
			t.Fatal(err, s.Recovered())
		}
		m, _, err := s.Get(mustName(t, ref), "")
		if err != nil {
			t.Fatal(err)
		}
		return m.Sources
	}
	eq := func(what string, got []Name, want ...string) {
		t.Helper()
		if d := cmp.Diff(names(t, want...), got, cmp.Comparer(func(a, b Name) bool { return a == b })); d != "" {
			t.Errorf("%s: %s", what, d)
		}
	}
	// The image's own repository is no other, nor is one twice, nor is an ID one.
	if err := s.PutFrom(m, c, names(t, "debian:12", "debian:11", "mine/app:0", "oci:/a dir:x", m.Digest.String())); err != nil {
		t.Fatal(err)
	}
	eq("put", sources("mine/app:1"), "debian:12", "oci:/a dir:x")

	if err := s.Tag(m.Name, mustName(t, "reg.test/other:1")); err != nil {
		t.Fatal(err)
	}
	eq("tagged", sources("reg.test/other:1"), "debian:12", "oci:/a dir:x", "mine/app:1")
	eq("still", sources("mine/app:1"), "debian:12", "oci:/a dir:x")

	// Found again in its registry, which knows nothing of the sources.
	again, _ := testImage(t, "mine/app:2", "x")
	if err := s.Put(again, c); err != nil {
		t.Fatal(err)
	}
	eq("pulled", sources("mine/app:2"), "debian:12", "oci:/a dir:x")

	// The store's own answer put back.
	got, gc, err := s.Get(m.Name, "")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Put(got, gc); err != nil {
		t.Fatal(err)
	}
	eq("put back", sources("mine/app:1"), "debian:12", "oci:/a dir:x")

	// A name that moves leaves the layers where they were.
	plain, pc := testImage(t, "moves:1", "first")
	if err := s.Put(plain, pc); err != nil {
		t.Fatal(err)
	}
	eq("whole", sources("moves:1"))
	next, nc := testImage(t, "moves:1", "second")
	if err := s.Put(next, nc); err != nil {
		t.Fatal(err)
	}
	eq("nameless", sources(plain.Target.String()), "moves:1")
	list, err := s.List()
	if err != nil || !list[len(list)-1].Name.IsZero() {
		t.Fatal(list, err)
	}
	eq("listed", list[len(list)-1].Sources, "moves:1")

	raw, err := os.ReadFile(filepath.Join(dir, "blobs", "sha256", m.Digest.Encoded()))
	if err != nil || strings.Contains(string(raw), "debian") {
		t.Errorf("the manifest tells: %s, %v", raw, err)
	}
}

func TestSourcesAreBounded(t *testing.T) {
	s, err := OpenStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	m, c := testImage(t, "mine/app:1", "x")
	var many []Name
	for i := range maxSources + 1 {
		many = append(many, mustName(t, fmt.Sprintf("r.test/%d", i)))
	}
	if err := s.PutFrom(m, c, many); !errors.Is(err, ErrMalformed) {
		t.Errorf("%d sources: %v", len(many), err)
	}
	if err := s.PutFrom(m, c, names(t, "oci:/"+strings.Repeat("x", maxSourceBytes))); !errors.Is(err, ErrMalformed) {
		t.Errorf("a long one: %v", err)
	}
	if err := s.PutFrom(m, c, many[1:]); err != nil {
		t.Error(err)
	}
	for _, bad := range []string{
		"x", "{}", `["UPPER"]`, `[""]`, `["sha256:` + strings.Repeat("0", 64) + `"]`, `[1]`,
		"[" + strings.Repeat(`"a",`, maxSources) + `"a"]`, strings.Repeat(" ", maxSourceBytes) + "[]",
	} {
		if _, err := parseSources(bad); !errors.Is(err, ErrMalformed) {
			t.Errorf("%.40s: %v", bad, err)
		}
	}
}

func FuzzParseSources(f *testing.F) {
	f.Add(`["docker.io/library/debian:12","oci:/x"]`)
	f.Add(`[null]`)
	f.Fuzz(func(t *testing.T, s string) {
		list, err := parseSources(s)
		if err != nil {
			return
		}
		again, err := parseSources(formatSources(list))
		if err != nil || len(again) != len(list) {
			t.Errorf("%v, then %v: %v", list, again, err)
		}
	})
}

func TestLayerTypes(t *testing.T) {
	for _, mt := range layerTypes {
		d, ok := LayerType(mt, true)
		o, also := LayerType(mt, false)
		if !ok || !also || (mt != d && mt != o) || d == o {
			t.Errorf("%s: %q, %q", mt, d, o)
		}
		if b, _ := LayerType(d, false); b != o {
			t.Errorf("%s there and back: %s", o, b)
		}
		if was, is := (Layer{MediaType: d}), (Layer{MediaType: o}); was.Foreign() != is.Foreign() || was.Zstd() != is.Zstd() {
			t.Errorf("%s and %s differ", d, o)
		}
	}
	if mt, ok := LayerType("application/json", true); ok {
		t.Error(mt)
	}
}
