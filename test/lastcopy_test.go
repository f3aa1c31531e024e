package test

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/bench/forms"
	"github.com/varvefs/varve/daemon"
)

const (
	lastSize = 100_000 // of a file
	plain    = "reads the layers' own files"
)

// lazy mounts an image so that nothing is fetched ahead of need, and nobody waits
// until its start has gone quiet.
func (h *host) lazy(args ...string) string {
	h.t.Helper()
	return h.ok(append([]string{"mount", "--prefetch", "none", "--record-for", "0"}, args...)...)
}

// plainSoon waits until the kernel reads the layers of a mount by itself.
func (h *host) plainSoon(name string) daemon.Mount {
	h.t.Helper()
	m := h.until(name, func(m daemon.Mount) bool { return strings.Contains(m.FaceReason, plain) })
	for _, l := range m.Layers {
		if !l.Whole || l.Unproven {
			h.t.Errorf("read in place: %+v", l)
		}
	}
	return m
}

// readAll checks the files of [small].
func readAll(t *testing.T, dir string, names []string) {
	t.Helper()
	for _, name := range names {
		holds(t, filepath.Join(dir, name), string(content(name, lastSize)))
	}
}

// readWhole reads everything that [small] has.
func readWhole(t *testing.T, dir string, names []string) {
	t.Helper()
	readAll(t, dir, names)
	holds(t, filepath.Join(dir, "etc/hostname"), "varve\n")
}

func stat(t *testing.T, path string) (st unix.Stat_t) {
	t.Helper()
	must(t, unix.Lstat(path, &st))
	return st
}

// at gives the mounts at a directory.
func (h *host) at(dir string) (lines []string) {
	h.t.Helper()
	for _, line := range h.mounts() {
		if strings.Fields(line)[4] == dir {
			lines = append(lines, line)
		}
	}
	return lines
}

// TestChangeOver has a mount become one of plain files while programs are in it.
func TestChangeOver(t *testing.T) {
	needRoot(t)
	l, names := small(t, 40, lastSize)
	_, ref := serve(t, forms.EStargz, l)
	h := newHost(t)
	dir := h.lazy("--face", "kernel", ref)
	if m := h.inspect(dir); m.Face != "kernel" || !strings.Contains(m.FaceReason, "of 1, 1 are not whole") {
		t.Errorf("at first: face %s: %s", m.Face, m.FaceReason)
	}
	before := h.at(dir)
	old := map[string]unix.Stat_t{}
	for _, name := range append([]string{"", "files", "etc/hostname"}, names...) {
		old[name] = stat(t, filepath.Join(dir, name))
	}

	held := hold(t, filepath.Join(dir, names[0]))
	in := exec.Command("/bin/sh", "-c", "read x; cat 0001 ../etc/hostname")
	in.Dir = filepath.Join(dir, "files")
	stdin := mustGet[io.WriteCloser](t)(in.StdinPipe())
	inside := later(func() string { b, _ := in.Output(); return string(b) })
	f := mustGet[*os.File](t)(os.Open(filepath.Join(dir, names[2])))
	defer f.Close()
	mapped := mustGet[[]byte](t)(unix.Mmap(int(f.Fd()), 0, lastSize, unix.PROT_READ, unix.MAP_PRIVATE))
	defer unix.Munmap(mapped)
	h.until(dir, func(daemon.Mount) bool { return in.Process != nil })

	readWhole(t, dir, names)
	forget(t, dir, names[:3]) // what they read now is read after
	m := h.plainSoon(dir)
	if m.Face != "kernel" || m.State != "mounted" {
		t.Errorf("changed over: %+v", m)
	}
	if after := h.at(dir); len(after) != 1 || strings.Fields(after[0])[0] == strings.Fields(before[0])[0] || !strings.Contains(after[0], " - erofs ") {
		t.Errorf("mounts: %v, before %v", after, before)
	}
	for name, was := range old {
		is := stat(t, filepath.Join(dir, name))
		if is.Dev == was.Dev {
			t.Errorf("%q is still of the old mount", name)
		}
		if was.Dev = is.Dev; is != was {
			t.Errorf("%q: %+v, before %+v", name, is, was)
		}
	}

	fmt.Fprintln(stdin)
	if got := <-inside; got != string(content(names[1], lastSize))+"varve\n" {
		t.Errorf("who was in a directory read %d bytes", len(got))
	}
	if string(mapped) != string(content(names[2], lastSize)) {
		t.Error("a file that was mapped has other bytes")
	}
	if out := h.ok("store", "drop", ref); !strings.Contains(out, "kept: ") {
		t.Errorf("store drop: %s", out)
	}
	if got := held.read(t); got != sumOf(content(names[0], lastSize)) {
		t.Errorf("a file that was open: digest %s", got)
	}
	if n := strings.Count(h.logText(), "changed over"); n != 1 {
		t.Errorf("it changed over %d times", n)
	}

	// Nothing of ours is in the way.
	pid := h.pid()
	must(t, syscall.Kill(pid, syscall.SIGSTOP))
	readAll(t, dir, names)
	must(t, syscall.Kill(pid, syscall.SIGCONT))
	h.kill()
	readAll(t, dir, names)

	// What a daemon left that was killed is hashed once more before that.
	if m := h.inspect(dir); m.Layers[0].Whole || strings.Contains(m.FaceReason, plain) {
		t.Errorf("after a kill: %s: %+v", m.FaceReason, m.Layers[0])
	}
	readWhole(t, dir, names)
	h.plainSoon(dir)
	h.ok("umount", dir)
	gone(t, h, dir)
}

// TestChangeOverBusy unmounts what changed over, while the old and the new mount
// are in use. A layer that the old one reads in place stays as it is.
func TestChangeOverBusy(t *testing.T) {
	needRoot(t)
	l, names := small(t, 20, lastSize)
	top := newLayer(t)
	top.file("top", content("top", lastSize))
	r := newRegistry(t)
	img := build(t, forms.EStargz, l, top.bytes())
	ref := r.push("last/image:1", img)
	digests, _ := blobs(t, img)
	h := newHost(t)
	dir := h.lazy("--face", "kernel", ref)
	readWhole(t, dir, names)
	h.until(dir, func(m daemon.Mount) bool { return m.Layers[0].Whole })
	h.ok("umount", dir)
	dir = h.lazy("--face", "kernel", ref)
	if m := h.inspect(dir); !m.Layers[0].Whole || m.Layers[1].Whole || !strings.Contains(m.FaceReason, "of 2, 1 are not whole") {
		t.Fatalf("one layer is whole: %+v", m)
	}
	inOld := hold(t, filepath.Join(dir, names[0]))
	readAll(t, dir, []string{"top"})
	h.plainSoon(dir)
	inNew := hold(t, filepath.Join(dir, names[0]))
	if line := h.fails(7, "umount", dir); !strings.Contains(line, fmt.Sprint(inNew.pid())) || strings.Contains(line, fmt.Sprint(inOld.pid())) {
		t.Errorf("who keeps it, %d and not %d: %s", inNew.pid(), inOld.pid(), line)
	}
	if got := inNew.read(t); got != sumOf(content(names[0], lastSize)) {
		t.Errorf("a file of the new mount: digest %s", got)
	}
	h.ok("umount", dir)
	gone(t, h, dir)
	out := h.ok("store", "drop", ref)
	if !strings.Contains(out, digests[0]+": kept: ") || strings.Contains(out, digests[1]+": kept: ") {
		t.Errorf("store drop: %s", out)
	}
	if got := inOld.read(t); got != sumOf(content(names[0], lastSize)) {
		t.Errorf("a file of the old mount: digest %s", got)
	}
}

// TestChangeOverCovered waits for what users mounted in a mount, which would go out
// of sight with the old one.
func TestChangeOverCovered(t *testing.T) {
	needRoot(t)
	l, names := small(t, 10, lastSize)
	_, ref := serve(t, forms.EStargz, l)
	h := newHost(t)
	dir := h.lazy("--face", "kernel", ref)
	over := filepath.Join(dir, "etc")
	holds(t, filepath.Join(over, "hostname"), "varve\n")
	must(t, unix.Mount("tmpfs", over, "tmpfs", 0, ""))
	mounted := true
	defer func() {
		if mounted {
			unix.Unmount(over, unix.MNT_DETACH)
		}
	}()
	must(t, os.WriteFile(filepath.Join(over, "mine"), []byte("mine"), 0o644))
	readAll(t, dir, names)
	h.until(dir, func(m daemon.Mount) bool { return strings.Contains(m.FaceReason, "something else is mounted there") })
	holds(t, filepath.Join(over, "mine"), "mine")
	must(t, unix.Unmount(over, 0))
	mounted = false
	h.plainSoon(dir)
	holds(t, filepath.Join(over, "hostname"), "varve\n")
	h.ok("umount", dir)
}

// TestChangeOverProven reads a layer by an index that others made through the
// daemon until it is proven.
func TestChangeOverProven(t *testing.T) {
	needRoot(t)
	l, names := small(t, 20, lastSize)
	_, ref := serve(t, forms.Gzip, l)
	newHost(t).ok("index", "--push", ref)
	h := newHost(t)
	dir := h.lazy("--face", "kernel", ref)
	if m := h.inspect(dir); !m.Layers[0].Unproven {
		t.Fatalf("at first: %+v", m.Layers[0])
	}
	readWhole(t, dir, names)
	h.plainSoon(dir)
	readWhole(t, dir, names)
	h.ok("umount", dir)
}

// TestChangeOverWritable leaves what overlayfs lies on as it is until the next
// start.
func TestChangeOverWritable(t *testing.T) {
	needRoot(t)
	l, names := small(t, 10, lastSize)
	_, ref := serve(t, forms.EStargz, l)
	h := newHost(t)
	dir := h.lazy("--rw", "--overlay", "kernel", "--face", "kernel", ref)
	must(t, os.WriteFile(filepath.Join(dir, "mine"), []byte("mine"), 0o644))
	readWhole(t, dir, names)
	h.until(dir, func(m daemon.Mount) bool {
		return strings.Contains(m.FaceReason, "until no writable mount of the image is up")
	})
	h.stop()
	h.ok("ps")
	h.plainSoon(dir)
	readAll(t, dir, names)
	holds(t, filepath.Join(dir, "mine"), "mine")
	h.ok("umount", "--rm", dir)
}

// TestReadFar has the kernel read far ahead through the FUSE face once all is here,
// and not before: what it reads ahead would have to be fetched.
func TestReadFar(t *testing.T) {
	needRoot(t)
	l, names := small(t, 10, lastSize)
	_, ref := serve(t, forms.EStargz, l)
	h := newHost(t)
	for _, args := range [][]string{{"--name", "ro"}, {"--name", "rw", "--rw", "--overlay", "fuse"}} {
		dir := h.lazy(append(args, "--face", "fuse", ref)...)
		ahead := func() string {
			t.Helper()
			dev := stat(t, dir).Dev
			b, err := os.ReadFile(fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", unix.Major(dev), unix.Minor(dev)))
			must(t, err)
			return strings.TrimSpace(string(b))
		}
		if kb := ahead(); kb != "128" {
			t.Errorf("%v: read ahead before all is here: %s KiB", args, kb)
		}
		readWhole(t, dir, names)
		h.until(dir, func(daemon.Mount) bool { return ahead() == "1016" })
		readAll(t, dir, names)
		h.ok("umount", dir)
		h.ok("store", "drop", ref)
	}
}
