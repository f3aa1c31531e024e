package test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/bench/forms"
	"github.com/varvefs/varve/fs"
)

// TestProfileReadsDisk mounts an image whose start was read here before, when nothing
// of it is cached any more: the disk reads it before anybody asks.
func TestProfileReadsDisk(t *testing.T) {
	needRoot(t)
	t.Setenv("TMPDIR", "/var/tmp") // tmpfs, which another may be on, forgets nothing
	p := newProfiled(t, forms.EStargz)
	h := p.recorded()
	h.stop() // what is fetched along comes after what was asked for, and no more now
	paths, err := filepath.Glob(filepath.Join(h.root, "cache/layers/*/data"))
	must(t, err)
	if len(paths) != 1 {
		t.Fatalf("data files %q", paths)
	}
	data, err := os.Open(paths[0])
	must(t, err)
	defer data.Close()
	var on unix.Statfs_t
	must(t, unix.Fstatfs(int(data.Fd()), &on))
	need(t, on.Type != unix.TMPFS_MAGIC, "a disk under /var/tmp")
	_, _, err = fs.Cached(int(data.Fd()))
	need(t, !errors.Is(err, unix.ENOSYS), "cachestat(2), of Linux 6.5")
	cached := func() uint64 {
		n, _, err := fs.Cached(int(data.Fd()))
		must(t, err)
		return n
	}
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		must(t, data.Sync())
		must(t, fs.Forget(int(data.Fd())))
		n := cached()
		if n == 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%d pages are still cached", n)
		}
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
