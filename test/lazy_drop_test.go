package test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/bench/forms"
	"github.com/varvefs/varve/daemon"
)

// TestStoreDrop gives up what is here of an image while it is mounted: what is read
// comes back, by range, and no more.
func TestStoreDrop(t *testing.T) {
	needRoot(t)
	const size = 200_000 // of a file
	for _, form := range []forms.Form{forms.Gzip, forms.Tar, forms.EStargz, forms.ZstdChunked} {
		t.Run(string(form), func(t *testing.T) {
			l, names := small(t, 40, size)
			r := newRegistry(t)
			img := build(t, form, l)
			ref := r.push("drop/image:1", img)
			digests, sizes := blobs(t, img)
			h := newHost(t)
			dir := h.ok("mount", "--wait", "--prefetch", "none", "--face", "fuse", ref)
			check := func(dir string) {
				t.Helper()
				for _, name := range names {
					holds(t, filepath.Join(dir, name), string(content(name, size)))
				}
			}
			check(dir)
			held := hold(t, filepath.Join(dir, names[3]))
			used := func() int64 {
				t.Helper()
				var total int64
				datas, err := filepath.Glob(filepath.Join(h.root, "cache/layers/*/data"))
				must(t, err)
				for _, path := range datas {
					var st syscall.Stat_t
					must(t, syscall.Stat(path, &st))
					total += st.Blocks * 512
				}
				return total
			}
			if n := used(); n < 40*size {
				t.Errorf("%d bytes are used before", n)
			}
			r.settled()
			r.requests(img)
			if out := h.ok("store", "drop", ref); !strings.HasPrefix(out, digests[0]+": ") || strings.Contains(out, "kept") {
				t.Errorf("store drop: %s", out)
			}
			if n := used(); n > 64<<10 {
				t.Errorf("%d bytes are used after", n)
			}
			if l := h.inspect(dir).Layers[0]; l.Whole || l.Local > 1000 {
				t.Errorf("dropped: %+v", l)
			}
			if got, _ := r.requests(img); len(got) != 0 {
				t.Errorf("store drop asked for %v", got)
			}

			// The kernel may still have a file that was read, but not for a reader
			// that comes after it gave that up.
			forget(t, dir, names)
			holds(t, filepath.Join(dir, names[20]), string(content(names[20], size)))
			r.settled()
			_, ranges := r.requests(img)
			n, whole := blobBytes(ranges)
			if n == 0 || n > twoGroups || whole != 0 {
				t.Errorf("a file of %d bytes took %d", size, n)
			}
			h.until(dir, func(m daemon.Mount) bool { return m.Layers[0].Local > n-1000 && m.Layers[0].Local < n+1000 })
			if got := held.read(t); got != sumOf(content(names[3], size)) {
				t.Errorf("a file that was open: digest %s", got)
			}
			check(dir)
			r.settled()
			_, ranges = r.requests(img)
			more, _ := blobBytes(ranges)
			if n+more > sizes[0]+int64(len(ranges))+1 {
				t.Errorf("%d bytes came of a layer of %d", n+more, sizes[0])
			}

			// By the layer's digest, and again while the registry is away.
			h.ok("store", "drop", digests[0])
			forget(t, dir, names)
			holds(t, filepath.Join(dir, names[5]), string(content(names[5], size)))
			h.ok("umount", dir)
			dir = h.ok("mount", "--offline", "--face", "fuse", ref)
			holds(t, filepath.Join(dir, names[5]), string(content(names[5], size)))
			if _, err := os.ReadFile(filepath.Join(dir, names[30])); !errors.Is(err, syscall.EIO) {
				t.Errorf("a file that was dropped, offline: %v, want EIO", err)
			}
			h.fails(5, "cat", "--offline", ref, names[30])
			h.ok("umount", dir)
			dir = h.ok("mount", ref)
			check(dir)
			h.ok("umount", dir)
		})
	}
}

// forget has the kernel give up what it has of files.
func forget(t *testing.T, dir string, names []string) {
	t.Helper()
	for _, name := range names {
		f, err := os.Open(filepath.Join(dir, name))
		must(t, err)
		must(t, unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
		f.Close()
	}
}

// TestStoreDropKernel keeps what the kernel reads in place, until it does not.
func TestStoreDropKernel(t *testing.T) {
	needRoot(t)
	l, names := small(t, 40, 100_000)
	r := newRegistry(t)
	img := build(t, forms.Gzip, l)
	ref := r.push("drop/image:1", img)
	digests, sizes := blobs(t, img)
	h := newHost(t)
	h.fails(3, "store", "drop", ref)
	h.fails(3, "store", "drop", digests[0])
	h.fails(2, "store", "drop", "lower/UPPER")
	dir := h.ok("mount", "--wait", "--face", "kernel", ref)
	second := h.ok("mount", "--name", "second", ref)
	kept := func() {
		t.Helper()
		if out := h.ok("store", "drop", ref); out != digests[0]+": kept: the kernel reads it in place for a mount: unmount that first" {
			t.Errorf("store drop: %s", out)
		}
		if l := h.inspect("second").Layers[0]; !l.Whole || l.Local != sizes[0] {
			t.Errorf("kept: %+v", l)
		}
	}
	kept()
	h.ok("umount", dir)
	kept()
	held := hold(t, filepath.Join(second, names[0]))
	h.ok("umount", "-f", "second") // who is in it reads on, in place
	if out := h.ok("store", "drop", ref); !strings.Contains(out, "kept: ") {
		t.Errorf("store drop: %s", out)
	}
	if got := held.read(t); got != sumOf(content(names[0], 100_000)) {
		t.Errorf("a file that was open: digest %s", got)
	}
	h.stop()
	h.ok("ps")
	if out := h.ok("store", "drop", ref); strings.Contains(out, "kept") {
		t.Errorf("store drop by another daemon: %s", out)
	}

	// A mount whose layer is not whole asks for what it reads.
	r.requests(img)
	dir = h.ok("mount", "--prefetch", "none", "--face", "kernel", ref)
	got, _ := r.requests(img)
	asked(t, "mount", got, nothing)
	holds(t, filepath.Join(dir, names[5]), string(content(names[5], 100_000)))
	r.settled()
	_, ranges := r.requests(img)
	if n, whole := blobBytes(ranges); n == 0 || n > twoGroups || whole != 0 {
		t.Errorf("a file took %d bytes of %d", n, sizes[0])
	}
	if out := h.ok("store", "drop", ref); strings.Contains(out, "kept") {
		t.Errorf("store drop under a mount that asks: %s", out)
	}
	for _, name := range names {
		holds(t, filepath.Join(dir, name), string(content(name, 100_000)))
	}
	h.ok("umount", dir)
}
