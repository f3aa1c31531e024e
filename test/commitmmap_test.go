package test

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/bench/forms"
)

// TestCommitWhileMapped commits while somebody stores to pages that were dirty
// before, of which no file's time tells.
func TestCommitWhileMapped(t *testing.T) {
	needRoot(t)
	l, _ := small(t, 3, 10_000)
	_, ref := serve(t, forms.EStargz, l)
	h := newHost(t)
	dir := h.writable("kernel", "w", ref)
	put(t, filepath.Join(dir, "etc/m"), string(noise(9, 32<<20))) // lies between the two
	var pages [2][]byte
	for i, name := range []string{"etc/a", "etc/z"} {
		f, err := os.Create(filepath.Join(dir, name))
		must(t, err)
		must(t, f.Truncate(4096))
		pages[i], err = unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		must(t, err)
		must(t, f.Close())
	}
	stop := make(chan struct{})
	var writer sync.WaitGroup
	end := sync.OnceFunc(func() {
		close(stop)
		writer.Wait()
		must(t, errors.Join(unix.Munmap(pages[0]), unix.Munmap(pages[1])))
	})
	defer end()
	writer.Go(func() {
		for n := uint64(1); ; n++ {
			select {
			case <-stop:
				return
			default:
			}
			for _, p := range pages {
				binary.LittleEndian.PutUint64(p, n)
			}
		}
	})
	r := h.run("commit", "--compression", "gzip", "w", "app:1")
	end()
	if r.code == 7 && strings.Contains(r.err, "--no-pause") {
		h.ok("umount", "w")
		return
	}
	if r.code != 0 {
		t.Fatal(r)
	}
	entries := tarOf(t, string(topLayers(t, h.made(isDigest(t, strings.TrimSpace(r.out))), 1)[0]))
	a, z := binary.LittleEndian.Uint64(entries["etc/a"].content), binary.LittleEndian.Uint64(entries["etc/z"].content)
	if a-z > 1 {
		t.Errorf("a moment at which a was at %d and z at %d", a, z)
	}
	h.ok("umount", "w")
}
