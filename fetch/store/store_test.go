package store

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const digest = "sha256:6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"

func open(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func stage(t *testing.T, s *Store) *Staging {
	t.Helper()
	g, err := s.Stage(digest)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(g.Discard)
	return g
}

// commit puts a layer of size bytes of text into the store.
func commit(t *testing.T, s *Store, text string, size int64, frames int, present bool) {
	t.Helper()
	g := stage(t, s)
	defer g.Discard()
	if _, err := g.WriteAt([]byte(text), 0); err != nil {
		t.Fatal(err)
	}
	if err := g.Document("about", func(w io.Writer) error { _, err := io.WriteString(w, text); return err }); err != nil {
		t.Fatal(err)
	}
	if err := g.Commit(size, frames, 7, present); err != nil {
		t.Fatal(err)
	}
}

func data(t *testing.T, s *Store, size int64, frames int) *Data {
	t.Helper()
	d, err := s.Open(digest, size, frames)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func closeData(t *testing.T, d *Data) {
	t.Helper()
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

// edit changes a file of the layer as no program should.
func edit(t *testing.T, dir, name string, change func([]byte) []byte) {
	t.Helper()
	path := filepath.Join(dir, "layers", "sha256-"+digest[len("sha256:"):], name)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, change(b), 0o600); err != nil {
		t.Fatal(err)
	}
}

// restart makes the store believe that the machine has started since.
func restart(t *testing.T, dir string) {
	t.Helper()
	edit(t, dir, presenceName, func(b []byte) []byte {
		copy(b[bootAt:], "00000000-0000-0000-0000-000000000000")
		return b
	})
}

func names(t *testing.T, dir string) (ns []string) {
	t.Helper()
	es, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range es {
		ns = append(ns, e.Name())
	}
	return ns
}

func descriptors(t *testing.T) int {
	t.Helper()
	return len(names(t, "/proc/self/fd"))
}

func mappings(t *testing.T, dir string) int {
	t.Helper()
	b, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Count(b, []byte(dir))
}

func TestStore(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	if _, err := s.Open(digest, 10, 1); !errors.Is(err, ErrNotFound) {
		t.Errorf("open before it was made: %v", err)
	}
	if _, err := s.Document(digest, "about"); !errors.Is(err, ErrNotFound) {
		t.Errorf("document before it was made: %v", err)
	}
	if _, err := s.Map(digest, "about"); !errors.Is(err, ErrNotFound) {
		t.Errorf("map before it was made: %v", err)
	}
	g := stage(t, s)
	if ds, err := s.Digests(); err != nil || len(ds) != 0 {
		t.Errorf("while staged there are %q, %v", ds, err)
	}
	g.Discard()
	g.Discard()
	if ns := names(t, filepath.Join(dir, "tmp")); len(ns) != 0 {
		t.Errorf("discarded, but there is %q", ns)
	}

	commit(t, s, "first", 10, 3, false)
	ds, err := s.Digests()
	if diff := cmp.Diff([]string{digest}, ds); err != nil || diff != "" {
		t.Errorf("%v %s", err, diff)
	}
	b, err := s.Document(digest, "about")
	if err != nil || string(b) != "first" {
		t.Errorf("document is %q, %v", b, err)
	}
	if s.Bytes() == 0 {
		t.Error("the store takes no bytes")
	}

	// Whoever commits second has made the same: the first stays.
	commit(t, s, "second", 20, 9, true)
	if b, _ := s.Document(digest, "about"); string(b) != "first" {
		t.Errorf("after a second commit the document is %q", b)
	}
	d := data(t, s, 10, 3)
	if d.Missing() != 3 || d.Fetched() != 7 {
		t.Errorf("%d frames missing, %d bytes fetched", d.Missing(), d.Fetched())
	}
	got := make([]byte, 10)
	if _, err := d.File().ReadAt(got, 0); err != nil || string(got) != "first\x00\x00\x00\x00\x00" {
		t.Errorf("data is %q, %v", got, err)
	}
	if err := s.Remove(digest); err != nil {
		t.Fatal(err)
	}
	if _, err := d.File().ReadAt(got, 0); err != nil {
		t.Errorf("an open layer was removed: %v", err)
	}
	closeData(t, d)
	if _, err := s.Open(digest, 10, 3); !errors.Is(err, ErrNotFound) {
		t.Errorf("open after it was removed: %v", err)
	}
	if ns := names(t, filepath.Join(dir, "tmp")); len(ns) != 0 {
		t.Errorf("left in tmp: %q", ns)
	}
}

func TestStoreIsPrivate(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "store")
	s := open(t, dir)
	commit(t, s, "x", 1, 1, true)
	err := filepath.Walk(dir, func(path string, info os.FileInfo, err error) error {
		if err == nil && info.Mode()&0o077 != 0 {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestOpenCleans(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	commit(t, s, "kept", 4, 1, true)
	if _, err := stage(t, s).WriteAt([]byte("half"), 0); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir)
	if ns := names(t, filepath.Join(dir, "tmp")); len(ns) != 0 {
		t.Errorf("left in tmp: %q", ns)
	}
	if ds, _ := s.Digests(); len(ds) != 1 {
		t.Errorf("there are %q", ds)
	}
}

func TestDocumentFails(t *testing.T) {
	g := stage(t, open(t, t.TempDir()))
	want := errors.New("no more")
	if err := g.Document("x", func(io.Writer) error { return want }); !errors.Is(err, want) {
		t.Errorf("got %v", err)
	}
}

func TestPresence(t *testing.T) {
	for _, frames := range []int{0, 1, 31, 32, 33, 64, 1000} {
		dir := t.TempDir()
		s := open(t, dir)
		commit(t, s, "", 0, frames, true)
		d := data(t, s, 0, frames)
		if d.Missing() != 0 {
			t.Errorf("%d frames: %d missing of a layer that was read whole", frames, d.Missing())
		}
		for i := range frames {
			if !d.Present(i) || d.Doubted(i) {
				t.Errorf("%d frames: frame %d is not present", frames, i)
			}
		}
		if frames > 0 {
			d.Drop(0)
			d.Drop(0)
			d.AddFetched(5)
		}
		closeData(t, d)

		restart(t, dir)
		d = data(t, s, 0, frames)
		if d.Missing() != frames {
			t.Errorf("%d frames: %d missing after a restart", frames, d.Missing())
		}
		for i := range frames {
			if d.Present(i) || d.Doubted(i) != (i > 0) {
				t.Errorf("%d frames: frame %d is present %v, doubted %v", frames, i, d.Present(i), d.Doubted(i))
			}
		}
		if frames > 1 {
			d.SetPresent(1)
			d.SetPresent(1)
			if d.Doubted(1) || !d.Present(1) || d.Missing() != frames-1 {
				t.Errorf("%d frames: %d missing after one was verified", frames, d.Missing())
			}
		}
		closeData(t, d)

		// A second restart before the rest was verified takes nothing back.
		restart(t, dir)
		d = data(t, s, 0, frames)
		for i := range frames {
			if d.Present(i) || d.Doubted(i) != (i > 0) {
				t.Errorf("%d frames: frame %d is present %v, doubted %v after two restarts", frames, i, d.Present(i), d.Doubted(i))
			}
			d.Drop(i)
			if d.Doubted(i) {
				t.Errorf("%d frames: frame %d was dropped and is doubted", frames, i)
			}
		}
		if want := int64(min(frames, 1)*5 + 7); d.Fetched() != want {
			t.Errorf("%d frames: %d bytes fetched, want %d", frames, d.Fetched(), want)
		}
		closeData(t, d)
	}
}

func TestSetPresentConcurrently(t *testing.T) {
	const frames = 999
	s := open(t, t.TempDir())
	commit(t, s, "", 0, frames, false)
	d := data(t, s, 0, frames)
	defer d.Close()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for i := range frames {
				d.SetPresent(i)
				if !d.Present(i) {
					t.Errorf("frame %d is not present", i)
				}
				d.AddFetched(1)
			}
		})
	}
	wg.Wait()
	if d.Missing() != 0 || d.Fetched() != 8*frames+7 {
		t.Errorf("%d missing, %d fetched", d.Missing(), d.Fetched())
	}
	for range 8 {
		wg.Go(func() {
			for i := range frames {
				d.Drop(i)
			}
		})
	}
	wg.Wait()
	if d.Missing() != frames {
		t.Errorf("%d missing", d.Missing())
	}
}

func TestDataWasCut(t *testing.T) {
	for name, change := range map[string]func([]byte) []byte{
		"shorter": func(b []byte) []byte { return b[:len(b)-1] },
		"empty":   func([]byte) []byte { return nil },
		"longer":  func(b []byte) []byte { return append(b, 'x') },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s := open(t, dir)
			commit(t, s, "0123456789", 10, 40, true)
			edit(t, dir, dataName, change)
			d := data(t, s, 10, 40)
			defer d.Close()
			if d.Missing() != 40 || d.Present(0) || d.Doubted(0) {
				t.Errorf("%d frames missing", d.Missing())
			}
			if st, err := d.File().Stat(); err != nil || st.Size() != 10 {
				t.Errorf("%v, %v", st, err)
			}
		})
	}
}

func TestDamaged(t *testing.T) {
	for name, test := range map[string]struct {
		change func([]byte) []byte
		want   error
	}{
		"empty":            {func([]byte) []byte { return nil }, ErrDamaged},
		"only the header":  {func(b []byte) []byte { return b[:presenceHeader] }, ErrDamaged},
		"cut":              {func(b []byte) []byte { return b[:len(b)-1] }, ErrDamaged},
		"longer":           {func(b []byte) []byte { return append(b, 0) }, ErrDamaged},
		"other magic":      {func(b []byte) []byte { b[0] ^= 1; return b }, ErrDamaged},
		"other frames":     {func(b []byte) []byte { b[8] ^= 1; return b }, ErrDamaged},
		"bits of no frame": {func(b []byte) []byte { b[presenceHeader+7] |= 0xf0; return b }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s := open(t, dir)
			commit(t, s, "0123456789", 10, 40, false)
			edit(t, dir, presenceName, test.change)
			fds := descriptors(t)
			d, err := s.Open(digest, 10, 40)
			if !errors.Is(err, test.want) {
				t.Fatalf("got %v, want %v", err, test.want)
			}
			if err == nil {
				if d.Missing() != 40 {
					t.Errorf("%d frames missing", d.Missing())
				}
				closeData(t, d)
			}
			if n := descriptors(t); n != fds {
				t.Errorf("%d descriptors, were %d", n, fds)
			}
			if n := mappings(t, dir); n != 0 {
				t.Errorf("%d mappings are left", n)
			}
		})
	}
	t.Run("gone", func(t *testing.T) {
		dir := t.TempDir()
		s := open(t, dir)
		commit(t, s, "0123456789", 10, 40, false)
		if err := os.Remove(filepath.Join(s.layerDir(digest), presenceName)); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Open(digest, 10, 40); !errors.Is(err, ErrDamaged) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("an empty document", func(t *testing.T) {
		dir := t.TempDir()
		s := open(t, dir)
		commit(t, s, "0123456789", 10, 40, false)
		edit(t, dir, "about", func([]byte) []byte { return nil })
		if _, err := s.Map(digest, "about"); !errors.Is(err, ErrDamaged) {
			t.Errorf("got %v", err)
		}
	})
}

func TestPunch(t *testing.T) {
	s := open(t, t.TempDir())
	commit(t, s, "0123456789", 10, 1, true)
	d := data(t, s, 10, 1)
	defer d.Close()
	if err := d.Punch(2, 3); errors.Is(err, errors.ErrUnsupported) {
		t.Skip("this filesystem cannot punch holes")
	} else if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 10)
	if _, err := d.File().ReadAt(got, 0); err != nil || string(got) != "01\x00\x00\x0056789" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestChangedByHand(t *testing.T) {
	for name, change := range map[string]func(t *testing.T, dir string){
		"data": func(t *testing.T, dir string) {
			f, err := os.OpenFile(filepath.Join(dir, dataName), os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if _, err := f.WriteAt([]byte("x"), 5); err != nil {
				t.Fatal(err)
			}
		},
		"presence": func(t *testing.T, dir string) {
			path := filepath.Join(dir, presenceName)
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			b[presenceHeader] ^= 2 // frame 1, which is not there
			if err := os.WriteFile(path, b, 0); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s := open(t, dir)
			commit(t, s, "", 4096, 3, false)
			d := data(t, s, 4096, 3)
			d.SetPresent(0)
			closeData(t, d)
			d = data(t, s, 4096, 3)
			if !d.Present(0) || d.Missing() != 2 {
				t.Error("what was closed in order is not trusted")
			}
			closeData(t, d)
			ds, err := s.Digests()
			if err != nil || len(ds) != 1 {
				t.Fatal(ds, err)
			}
			change(t, s.layerDir(ds[0]))
			d = data(t, s, 4096, 3)
			if d.Present(0) || !d.Doubted(0) || d.Present(1) {
				t.Error("files that were changed are trusted")
			}
			closeData(t, d)
		})
	}
}

func TestFollowsNoLink(t *testing.T) {
	for _, name := range []string{dataName, presenceName} {
		dir := t.TempDir()
		s := open(t, dir)
		commit(t, s, "", 4096, 1, true)
		ds, _ := s.Digests()
		victim := filepath.Join(dir, "victim")
		if err := os.WriteFile(victim, []byte("precious"), 0o600); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(s.layerDir(ds[0]), name)
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(victim, path); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Open(ds[0], 4096, 1); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s is a link: %v", name, err)
		}
		if b, _ := os.ReadFile(victim); string(b) != "precious" {
			t.Errorf("%s: the file it led to holds %q", name, b)
		}
	}
}
