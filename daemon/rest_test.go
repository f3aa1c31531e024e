package daemon

import (
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/varvefs/varve/fs"
)

// TestRest gives up pages that are at rest, and no others.
func TestRest(t *testing.T) {
	// Where the tests' directory is on tmpfs nothing ever reaches a disk.
	dir, err := os.MkdirTemp("/var/tmp", "rest-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	f, err := os.Create(filepath.Join(dir, "data"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	page := make([]byte, 4096)
	write := func(pages int) {
		t.Helper()
		for range pages {
			if _, err := f.Write(page); err != nil {
				t.Fatal(err)
			}
		}
	}
	cached := func() (pages, dirty uint64) {
		t.Helper()
		pages, dirty, err := fs.Cached(int(f.Fd()))
		if err != nil {
			t.Skip("the kernel does not tell what it caches:", err)
		}
		return pages, dirty
	}
	layers := map[string]fs.Data{"layer": &probeData{file: f}}
	r := rest{}

	// The kernel may bring them to the disk at any moment: then it is tried again.
	for dirty, end := uint64(0), time.Now().Add(time.Minute); dirty == 0; {
		if time.Now().After(end) {
			t.Fatal("what is written reaches the disk at once")
		}
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			t.Fatal(err)
		}
		write(16)
		r.forget(layers, func(_ string, d fs.Data) { fs.Forget(d.Fd()) })
		r.forget(layers, func(_ string, d fs.Data) { fs.Forget(d.Fd()) })
		var n uint64
		if n, dirty = cached(); dirty > 0 && n != 16 {
			t.Errorf("%d pages of 16 that had not reached the disk", n)
		}
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	write(1)
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	r.forget(layers, func(_ string, d fs.Data) { fs.Forget(d.Fd()) })
	if n, _ := cached(); n != 17 {
		t.Errorf("%d pages of 17, to which one had come", n)
	}
	r.forget(layers, func(_ string, d fs.Data) { fs.Forget(d.Fd()) })
	if n, _ := cached(); n != 0 {
		t.Errorf("%d pages are left of those at rest", n)
	}
	r.forget(nil, nil)
	if len(r) != 0 {
		t.Errorf("what is remembered of layers that nobody reads: %v", r)
	}
}
