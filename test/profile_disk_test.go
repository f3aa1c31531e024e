package test

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/varvefs/varve/bench/forms"
	"github.com/varvefs/varve/fs"
)

// TestProfileReadsDisk mounts an image whose start was read here before, when nothing
// of it is cached any more: the disk reads it before anybody asks.
func TestProfileReadsDisk(t *testing.T) {
	needRoot(t)
	p := newProfiled(t, forms.EStargz)
	h := p.recorded()
	paths, err := filepath.Glob(filepath.Join(h.root, "cache/layers/*/data"))
	must(t, err)
	if len(paths) != 1 {
		t.Fatalf("data files %q", paths)
	}
	data, err := os.Open(paths[0])
	must(t, err)
	defer data.Close()
	cached := func() uint64 {
		n, _, err := fs.Cached(int(data.Fd()))
		must(t, err)
		return n
	}
	must(t, data.Sync())
	must(t, fs.Forget(int(data.Fd())))
	if n := cached(); n != 0 {
		t.Fatalf("%d pages are still cached", n)
	}
	p.requests(p.img)
	dir := h.ok("mount", p.ref)
	want := uint64(len(p.reads)) * profiledSize / 4096
	for end := time.Now().Add(time.Minute); cached() < want; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d pages are cached, the start reads %d", cached(), want)
		}
	}
	if n := cached(); n > 3*want {
		t.Errorf("%d pages are cached, the start reads %d", n, want)
	}
	h.ok("umount", dir)
}
