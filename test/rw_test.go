package test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/bench/forms"
)

// overlays are who may write an upper.
var overlays = []string{"kernel", "fuse"}

func withBoth(t *testing.T, test func(t *testing.T, overlay string)) {
	needRoot(t)
	for _, overlay := range overlays {
		t.Run(overlay, func(t *testing.T) { test(t, overlay) })
	}
}

// writable mounts an image for writing and gives its directory.
func (h *host) writable(overlay, name, ref string, more ...string) string {
	h.t.Helper()
	return h.ok(append(append([]string{"mount", "--rw", "--overlay", overlay, "--name", name}, more...), ref)...)
}

// lowers counts the mounts that overlayfs mounts lie on.
func (h *host) lowers() (n int) {
	for _, line := range h.mounts() {
		if strings.HasPrefix(strings.Fields(line)[4], filepath.Join(h.root, "run/lower")+"/") {
			n++
		}
	}
	return n
}

func put(t *testing.T, path, text string) {
	t.Helper()
	must(t, os.WriteFile(path, []byte(text), 0o644))
}

func appendTo(t *testing.T, path, text string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	must(t, err)
	_, err = f.WriteString(text)
	must(t, errors.Join(err, f.Close()))
}

// holds compares a file's contents.
func holds(t *testing.T, path, want string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil || string(b) != want {
		t.Errorf("%s: %.80q (%d bytes, want %d) %v", path, b, len(b), len(want), err)
	}
}

func missing(t *testing.T, path string) {
	t.Helper()
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is there: %v", path, err)
	}
}

// TestWritable changes one of several mounts of an image, and looks at them all.
func TestWritable(t *testing.T) { withBoth(t, writable) }

func writable(t *testing.T, overlay string) {
	l, names := small(t, 6, 20_000)
	_, ref := serve(t, forms.EStargz, l)
	h := newHost(t)
	ro := h.ok("mount", "--wait", "--name", "ro", ref)
	a := h.writable(overlay, "a", ref)
	b := h.writable(overlay, "b", ref)
	image := readTree(t, ro)
	sameTree(t, image, readTree(t, a))

	if m := h.inspect("a"); !m.RW || m.Overlay != overlay || m.OverlayReason != "asked for" || m.Upper != filepath.Join(h.root, "state/uppers", m.ID) {
		t.Errorf("inspect: %+v", m)
	}
	if out := h.ok("ps", "--format", "{{.Names}} {{.Status}}"); strings.Count(out, ", rw)") != 2 || !strings.Contains(out, "ro Up") {
		t.Errorf("ps: %q", out)
	}
	want := map[string]int{"kernel": 1}[overlay]
	if n := h.lowers(); n != want {
		t.Errorf("%d mounts below run/lower, want %d", n, want)
	}

	was := func(i int) string { return string(content(names[i], 20_000)) }
	put(t, filepath.Join(a, "new"), "new\n")
	appendTo(t, filepath.Join(a, names[0]), "more")
	must(t, os.Remove(filepath.Join(a, names[1])))
	must(t, os.Rename(filepath.Join(a, names[2]), filepath.Join(a, "moved")))
	must(t, os.MkdirAll(filepath.Join(a, "dir/below"), 0o750))
	put(t, filepath.Join(a, "dir/below/file"), "deep")
	must(t, os.Symlink("new", filepath.Join(a, "link")))
	must(t, os.Link(filepath.Join(a, names[3]), filepath.Join(a, "second")))
	must(t, os.Truncate(filepath.Join(a, names[4]), 7))
	must(t, os.Chmod(filepath.Join(a, "etc"), 0o700))
	edited := func(dir string) {
		t.Helper()
		holds(t, filepath.Join(dir, "new"), "new\n")
		holds(t, filepath.Join(dir, "link"), "new\n")
		holds(t, filepath.Join(dir, names[0]), was(0)+"more")
		missing(t, filepath.Join(dir, names[1]))
		missing(t, filepath.Join(dir, names[2]))
		holds(t, filepath.Join(dir, "moved"), was(2))
		holds(t, filepath.Join(dir, "dir/below/file"), "deep")
		holds(t, filepath.Join(dir, "second"), was(3))
		holds(t, filepath.Join(dir, names[4]), was(4)[:7])
		holds(t, filepath.Join(dir, names[5]), was(5))
	}
	edited(a)
	put(t, filepath.Join(b, names[0]), "b's own")
	holds(t, filepath.Join(a, names[0]), was(0)+"more")
	must(t, os.Remove(filepath.Join(b, names[0])))
	must(t, os.Mkdir(filepath.Join(b, "dir"), 0o755))
	if list, _ := os.ReadDir(filepath.Join(b, "dir")); len(list) != 0 {
		t.Errorf("one mount shows what another wrote: %v", list)
	}
	edited(a)

	// The image is what it was, for those who have it and for those who come.
	sameTree(t, image, readTree(t, ro))
	later := h.ok("mount", "--wait", "--name", "later", ref)
	sameTree(t, image, readTree(t, later))
	for what, err := range map[string]error{
		"write":  os.WriteFile(filepath.Join(ro, names[0]), nil, 0),
		"create": os.WriteFile(filepath.Join(ro, "new"), nil, 0o644),
		"mkdir":  os.Mkdir(filepath.Join(ro, "dir"), 0o755),
		"remove": os.Remove(filepath.Join(ro, names[0])),
		"rename": os.Rename(filepath.Join(ro, names[0]), filepath.Join(ro, "x")),
		"chmod":  os.Chmod(filepath.Join(ro, names[0]), 0),
	} {
		if !errors.Is(err, unix.EROFS) {
			t.Errorf("%s in a mount that is not writable: %v", what, err)
		}
	}

	h.ok("umount", "a")
	if n := h.lowers(); n != want {
		t.Errorf("%d mounts below run/lower while one lies on it, want %d", n, want)
	}
	h.ok("umount", "b")
	if n := h.lowers(); n != 0 {
		t.Errorf("%d mounts below run/lower, though none lies on them", n)
	}
	edited(h.ok("mount", "--name", "a"))
	h.ok("umount", "-a")
}

// TestWhoWrites leaves the choice to varve.
func TestWhoWrites(t *testing.T) {
	needRoot(t)
	l, names := small(t, 3, 10_000)
	_, ref := serve(t, forms.EStargz, l)
	h := newHost(t)
	dir := h.ok("mount", "-w", ref)
	m := h.inspect(dir)
	if !m.RW || m.Overlay != "kernel" || !strings.Contains(m.OverlayReason, "overlayfs") {
		t.Errorf("auto took %q: %q", m.Overlay, m.OverlayReason)
	}
	var fst unix.Statfs_t
	must(t, unix.Statfs(dir, &fst))
	if fst.Type != unix.OVERLAYFS_SUPER_MAGIC {
		t.Errorf("the mount is of type %x", fst.Type)
	}
	appendTo(t, filepath.Join(dir, names[0]), "by the kernel")
	h.ok("umount", dir)

	// Who writes may change from one mount to the next: the form is the same.
	for _, overlay := range []string{"fuse", "kernel"} {
		if got := h.ok("mount", "--overlay", overlay, "--name", m.Name); got != dir {
			t.Errorf("mounted at %s, before at %s", got, dir)
		}
		if m := h.inspect(dir); m.Overlay != overlay {
			t.Errorf("%s was asked for, inspect says %s", overlay, m.Overlay)
		}
		holds(t, filepath.Join(dir, names[0]), string(content(names[0], 10_000))+"by the kernel")
		appendTo(t, filepath.Join(dir, names[1]), overlay)
		h.ok("umount", dir)
	}
	h.ok("mount", "--name", m.Name)
	holds(t, filepath.Join(dir, names[1]), string(content(names[1], 10_000))+"fusekernel")
	h.ok("umount", dir)

	h.fails(2, "mount", "--overlay", "kernel", ref)
	h.fails(2, "mount", "--upper", filepath.Join(h.root, "up"), ref)
	h.fails(2, "mount", "--rw", "--overlay", "sideways", ref)
	missing(t, filepath.Join(h.root, "up"))
}

// TestFaces lays both writers over both faces.
func TestWritableFaces(t *testing.T) {
	withBoth(t, func(t *testing.T, overlay string) {
		l, names := small(t, 3, 10_000)
		_, ref := serve(t, forms.EStargz, l)
		h := newHost(t)
		for _, face := range faces {
			dir := h.writable(overlay, face, ref, "--face", face)
			if m := h.inspect(dir); overlay == "kernel" && m.Face != face {
				t.Errorf("face %s was asked for, inspect says %s: %s", face, m.Face, m.FaceReason)
			}
			appendTo(t, filepath.Join(dir, names[0]), face)
			holds(t, filepath.Join(dir, names[0]), string(content(names[0], 10_000))+face)
			holds(t, filepath.Join(dir, names[1]), string(content(names[1], 10_000)))
			h.ok("umount", "--rm", dir)
		}
	})
}

// TestTemporaryFile makes a file without a name and gives it one.
func TestTemporaryFile(t *testing.T) {
	withBoth(t, func(t *testing.T, overlay string) {
		l, _ := small(t, 1, 10)
		_, ref := serve(t, forms.EStargz, l)
		h := newHost(t)
		dir := h.writable(overlay, "n", ref)
		fd, err := unix.Open(filepath.Join(dir, "etc"), unix.O_TMPFILE|unix.O_RDWR, 0o640)
		if errors.Is(err, unix.EOPNOTSUPP) {
			return // a clean refusal, which every user of it knows
		}
		must(t, err)
		_, err = unix.Write(fd, []byte("no name yet"))
		must(t, err)
		if list, _ := os.ReadDir(filepath.Join(dir, "etc")); len(list) != 1 {
			t.Errorf("it has a name: %v", list)
		}
		must(t, unix.Linkat(unix.AT_FDCWD, "/proc/self/fd/"+itoa(fd), unix.AT_FDCWD, filepath.Join(dir, "etc/named"), unix.AT_SYMLINK_FOLLOW))
		must(t, unix.Close(fd))
		holds(t, filepath.Join(dir, "etc/named"), "no name yet")
		h.ok("umount", dir)
		h.ok("mount", "--name", "n")
		holds(t, filepath.Join(dir, "etc/named"), "no name yet")
		h.ok("umount", dir)
	})
}

// TestWhiteoutNames makes what no layer can hold.
func TestWhiteoutNames(t *testing.T) {
	withBoth(t, func(t *testing.T, overlay string) {
		l, names := small(t, 2, 10)
		_, ref := serve(t, forms.EStargz, l)
		h := newHost(t)
		dir := h.writable(overlay, "n", ref)
		put(t, filepath.Join(dir, "plain"), "")
		bad := filepath.Join(dir, ".wh.bad")
		made := map[string]error{
			"create":  os.WriteFile(bad, nil, 0o644),
			"mkdir":   os.Mkdir(bad+"dir", 0o755),
			"symlink": os.Symlink("x", bad+"link"),
			"link":    os.Link(filepath.Join(dir, names[0]), bad+"hard"),
			"fifo":    unix.Mkfifo(bad+"fifo", 0o644),
			"rename":  os.Rename(filepath.Join(dir, "plain"), bad+"renamed"),
			"opaque":  os.WriteFile(filepath.Join(dir, "etc", ".wh..wh..opq"), nil, 0o644),
		}
		for what, err := range made {
			if overlay == "fuse" && !errors.Is(err, unix.EINVAL) || overlay == "kernel" && err != nil {
				t.Errorf("%s: %v", what, err)
			}
		}
		if overlay == "kernel" { // which nobody can stop, but no layer may get it
			if r := h.run("commit", "n"); r.code == 0 || !strings.Contains(r.err, ".wh.") || r.out != "" {
				t.Errorf("commit: %s", r)
			}
		}
		h.ok("umount", dir)
	})
}

// TestNoSpace fills the filesystem that an upper lies on. Who writes is told, what
// was acknowledged is kept, and the mount goes on.
func TestNoSpace(t *testing.T) { withBoth(t, noSpace) }

func noSpace(t *testing.T, overlay string) {
	l := newLayer(t)
	l.dir("d")
	l.file("d/large", content("large", 6<<20))
	l.file("d/small", content("small", 5000))
	_, ref := serve(t, forms.EStargz, l.bytes())
	h := newHost(t)
	disk := t.TempDir()
	must(t, unix.Mount("varve-test", disk, "tmpfs", 0, "size=4m"))
	defer unix.Unmount(disk, unix.MNT_DETACH)
	dir := h.writable(overlay, "n", ref, "--upper", filepath.Join(disk, "upper"))
	put(t, filepath.Join(dir, "d/before"), "before")

	// A copy-up for which there is no room leaves the file as it was.
	if _, err := os.OpenFile(filepath.Join(dir, "d/large"), os.O_WRONLY, 0); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("copy-up of what does not fit: %v", err)
	}
	if err := os.Chmod(filepath.Join(dir, "d/large"), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("chmod of what does not fit: %v", err)
	}
	if got := helper(t, "sum", filepath.Join(dir, "d/large")); got != sumOf(content("large", 6<<20)) {
		t.Errorf("the file has digest %s", got)
	}

	want := content("fill", 8<<20)
	f, err := os.Create(filepath.Join(dir, "d/fill"))
	must(t, err)
	acked := 0
	for err == nil && acked < len(want) {
		var n int
		n, err = f.Write(want[acked:min(acked+60_000, len(want))])
		acked += n
	}
	if !errors.Is(err, unix.ENOSPC) || acked < 1<<20 {
		t.Errorf("after %d bytes: %v", acked, err)
	}
	must(t, f.Close())
	kept := func() {
		t.Helper()
		holds(t, filepath.Join(dir, "d/before"), "before")
		if b, err := os.ReadFile(filepath.Join(dir, "d/fill")); err != nil || !bytes.Equal(b, want[:acked]) {
			t.Errorf("%d bytes were acknowledged, %d are there: %v", acked, len(b), err)
		}
		holds(t, filepath.Join(dir, "d/small"), string(content("small", 5000)))
	}
	kept()
	h.ok("umount", dir)
	h.ok("mount", "--name", "n")
	kept()
	must(t, os.Remove(filepath.Join(dir, "d/fill")))
	// The daemon hears a moment later that nobody has the file any more.
	for until := time.Now().Add(time.Minute); time.Now().Before(until); time.Sleep(time.Millisecond) {
		var st unix.Statfs_t
		must(t, unix.Statfs(disk, &st))
		if st.Bavail*uint64(st.Bsize) > 2<<20 {
			break
		}
	}
	appendTo(t, filepath.Join(dir, "d/small"), "goes on")
	holds(t, filepath.Join(dir, "d/small"), string(content("small", 5000))+"goes on")
	put(t, filepath.Join(dir, "d/after"), strings.Repeat("after", 100_000))
	h.ok("umount", "--rm", dir)
	if left, _ := os.ReadDir(disk); len(left) != 0 {
		t.Errorf("left on the disk: %v", left)
	}
}
