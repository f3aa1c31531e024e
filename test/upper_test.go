package test

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/bench/forms"
)

// TestUpperElsewhere keeps changes in a directory of the user's.
func TestUpperElsewhere(t *testing.T) { withBoth(t, upperElsewhere) }

func upperElsewhere(t *testing.T, overlay string) {
	l, names := small(t, 3, 10_000)
	_, ref := serve(t, forms.EStargz, l)
	h := newHost(t)
	up := filepath.Join(t.TempDir(), "my, upper:1") // what mount options take for their own
	dir := h.writable(overlay, "n", ref, "--upper", up)
	if m := h.inspect("n"); m.Upper != up || m.UpperBytes == 0 {
		t.Errorf("inspect: upper %q of %d bytes", m.Upper, m.UpperBytes)
	}
	appendTo(t, filepath.Join(dir, names[0]), "more")
	if n := h.uppers(); n != 0 {
		t.Errorf("%d uppers in the state directory", n)
	}
	h.fails(7, "mount", "--rw", "--overlay", overlay, "--upper", up, ref)
	h.fails(7, "mount", "--rw", "--overlay", overlay, "--upper", filepath.Join(up, "fs"), ref)
	h.ok("umount", dir)
	// It is still the first mount's.
	if line := h.fails(7, "mount", "--rw", "--overlay", overlay, "--upper", up, "--name", "thief", ref); !strings.Contains(line, `"n"`) {
		t.Errorf("whose it is is not said: %s", line)
	}
	if line := h.fails(7, "mount", "--name", "n", "--rw", "--upper", up+"2", ref); !strings.Contains(line, up) {
		t.Errorf("another upper for the same mount: %s", line)
	}
	missing(t, up+"2")
	missing(t, filepath.Join(h.root, "run/mnt/thief"))

	// Another store, or this one after it forgot the mount, takes it as it is.
	h2 := newHost(t)
	dir2 := h2.writable(overlay, "second", ref, "--upper", up)
	holds(t, filepath.Join(dir2, names[0]), string(content(names[0], 10_000))+"more")
	put(t, filepath.Join(dir2, "new"), "new")
	if line := h.fails(7, "mount", "--name", "n"); !strings.Contains(line, up) {
		t.Errorf("an upper that another daemon has: %s", line)
	}
	h2.ok("umount", dir2)
	h.ok("mount", "--name", "n")
	holds(t, filepath.Join(dir, "new"), "new")
	h.ok("umount", dir)
	h.ok("rm", "n")
	missing(t, up)
	h2.ok("rm", "second") // whose upper somebody else has deleted
}

// TestUpperRefused asks for uppers that cannot be taken. Each is refused by its
// name, and left as it was; nothing stays mounted.
func TestUpperRefused(t *testing.T) { withBoth(t, upperRefused) }

func upperRefused(t *testing.T, overlay string) {
	l, _ := small(t, 2, 1000)
	r, ref := serve(t, forms.EStargz, l)
	other := r.push("test/other:1", build(t, forms.EStargz, func() []byte { l, _ := small(t, 2, 5); return l }()))
	h := newHost(t)
	top := t.TempDir()
	at := func(name string) string { return filepath.Join(top, name) }
	used := func(name, image string) string { // an upper that was made and is nobody's now
		t.Helper()
		h2 := newHost(t)
		put(t, filepath.Join(h2.writable(overlay, "n", image, "--upper", at(name)), "file"), "x")
		h2.ok("umount", "n")
		return at(name)
	}
	must(t, os.Mkdir(at("full"), 0o755))
	put(t, at("full/file"), "mine")
	put(t, at("plain"), "")
	must(t, os.Mkdir(at("mnt"), 0o755))
	swap := func(dir, name, target string) {
		t.Helper()
		must(t, os.Rename(filepath.Join(dir, name), filepath.Join(dir, name+"-kept")))
		must(t, os.Symlink(target, filepath.Join(dir, name)))
	}
	canary := newCanary(t)
	for name, c := range map[string]struct{ dir, names string }{
		"in the state directory": {filepath.Join(h.root, "state/up"), "state"},
		"in the cache":           {filepath.Join(h.root, "cache/up"), "cache"},
		"around the store":       {filepath.Dir(h.root), h.root},
		"without a parent":       {at("no/such"), at("no")},
		"not empty":              {at("full"), "full"},
		"a file":                 {at("plain"), "plain"},
		"in the mountpoint":      {at("mnt/up"), at("mnt")},
		"around the mountpoint":  {top, at("mnt")},
		"of another image":       {used("other", other), at("other")},
		"stray file under work": {func() string {
			up := used("stray", ref)
			put(t, filepath.Join(up, "work/stray file"), "mine")
			return up
		}(), "stray file"},
		"fs is a symlink": {func() string {
			up := used("linked", ref)
			swap(up, "fs", canary.dir)
			return up
		}(), "fs"},
		"fs is a symlink within": {func() string {
			up := used("linked2", ref)
			swap(up, "fs", "fs-kept")
			return up
		}(), "fs"},
		"work is a symlink": {func() string {
			up := used("linked3", ref)
			swap(up, "work", canary.dir)
			return up
		}(), "work"},
		"work is a symlink within": {func() string {
			up := used("linked4", ref)
			swap(up, "work", "fs")
			return up
		}(), "work"},
		"staging is a symlink": {func() string {
			up := used("linked5", ref)
			must(t, os.RemoveAll(filepath.Join(up, "work/staging")))
			must(t, os.Symlink(canary.dir, filepath.Join(up, "work/staging")))
			return up
		}(), ""},
		"varve.json is a symlink": {func() string {
			up := used("linked6", ref)
			swap(up, "varve.json", "varve.json-kept")
			return up
		}(), "varve.json"},
		"varve.json is no JSON": {func() string {
			up := used("json", ref)
			put(t, filepath.Join(up, "varve.json"), "{")
			return up
		}(), "varve.json"},
		"varve.json is of a later version": {func() string {
			up := used("version", ref)
			b, err := os.ReadFile(filepath.Join(up, "varve.json"))
			must(t, err)
			put(t, filepath.Join(up, "varve.json"), strings.Replace(string(b), `"version":1`, `"version":99`, 1))
			return up
		}(), "99"},
		"no varve.json": {func() string {
			up := used("bare", ref)
			must(t, os.Remove(filepath.Join(up, "varve.json")))
			return up
		}(), "varve.json"},
	} {
		t.Run(name, func(t *testing.T) {
			h := *h
			h.t = t
			mounts := len(h.mounts())
			var before tree
			if st, err := os.Stat(c.dir); err == nil && st.IsDir() && c.dir != top && !strings.HasPrefix(h.root, c.dir) {
				before = readTree(t, c.dir)
			}
			if name == "staging is a symlink" { // it is ours, so it is made anew
				h.ok("mount", "--rw", "--overlay", overlay, "--name", "fine", "--upper", c.dir, ref)
				h.ok("umount", "--rm", "fine")
				return
			}
			r := h.run("mount", "--rw", "--overlay", overlay, "--upper", c.dir, ref, at("mnt"))
			if r.code == 0 {
				h.ok("umount", "-f", at("mnt"))
			}
			if r.code != 1 || r.out != "" || strings.Count(r.err, "\n") != 1 || !strings.Contains(r.err, c.names) {
				t.Errorf("want exit 1 and a line that names %q: %s", c.names, r)
			}
			if n := len(h.mounts()); n != mounts {
				t.Errorf("%d mounts, %d before", n, mounts)
			}
			if before != nil {
				after := readTree(t, c.dir)
				for _, p := range []string{"work", "work/staging", "lock"} { // taking the lock is no change
					delete(before, p)
					delete(after, p)
				}
				sameTree(t, before, after)
			}
		})
	}
	canary.untouched(t)
	if out := h.ok("ps", "-aq"); out != "" {
		t.Errorf("something is listed: %q", out)
	}
}

// canary is a directory that no operation may come to.
type canary struct {
	dir    string
	before tree
}

const secret = "the canary's own secret"

func newCanary(t *testing.T) *canary {
	t.Helper()
	c := &canary{dir: t.TempDir()}
	must(t, os.Mkdir(filepath.Join(c.dir, "sub"), 0o755))
	put(t, filepath.Join(c.dir, "secret"), secret)
	put(t, filepath.Join(c.dir, "sub/secret"), secret)
	c.before = readTree(t, c.dir)
	return c
}

func (c *canary) untouched(t *testing.T) {
	t.Helper()
	sameTree(t, c.before, readTree(t, c.dir))
}

// TestPlantedSymlinks puts symlinks in the place of what lies in an upper. They
// are symlinks to whoever looks, and lead no operation of varve's out of it.
func TestPlantedSymlinks(t *testing.T) { withBoth(t, plantedSymlinks) }

func plantedSymlinks(t *testing.T, overlay string) {
	l := newLayer(t)
	l.dir("dir", "dir/sub", "other")
	l.file("dir/secret", []byte("the image's"))
	l.file("dir/sub/secret", []byte("the image's"))
	l.file("file", []byte("the image's"))
	l.file("other/file", content("other", 5000))
	_, ref := serve(t, forms.EStargz, l.bytes())
	h := newHost(t)
	c := newCanary(t)
	dir := h.writable(overlay, "n", ref)
	put(t, filepath.Join(dir, "dir/new"), "new")
	put(t, filepath.Join(dir, "file"), "changed")
	fs := filepath.Join(h.inspect("n").Upper, "fs")
	h.ok("umount", "n")
	must(t, os.RemoveAll(filepath.Join(fs, "dir")))
	must(t, os.Symlink(c.dir, filepath.Join(fs, "dir")))
	must(t, os.Remove(filepath.Join(fs, "file")))
	must(t, os.Symlink(filepath.Join(c.dir, "secret"), filepath.Join(fs, "file")))
	must(t, os.Symlink(strings.Repeat("../", 20)+c.dir[1:], filepath.Join(fs, "up")))

	check := func() {
		t.Helper()
		if out := h.ok("diff", "n"); out != "C /dir\nC /file\nA /up" {
			t.Errorf("diff: %q", out)
		}
		if out := h.ok("commit", "--dry-run", "n"); !strings.Contains(out, "C /dir") || strings.Contains(out, "secret") {
			t.Errorf("commit --dry-run: %q", out)
		}
		want := map[string]string{"dir": c.dir, "file": filepath.Join(c.dir, "secret"), "up": strings.Repeat("../", 20) + c.dir[1:]}
		seen := 0
		for name, e := range tarOf(t, h.ok("export", "n")+"\n") {
			if target, ok := want[name]; ok {
				seen++
				if e.header.Typeflag != tar.TypeSymlink || e.header.Linkname != target {
					t.Errorf("export: %s is %c to %q", name, e.header.Typeflag, e.header.Linkname)
				}
			}
			if strings.HasPrefix(name, "dir/") || bytes.Contains(e.content, []byte(secret)) {
				t.Errorf("export has %s", name)
			}
		}
		if seen != len(want) {
			t.Errorf("export has %d of the symlinks", seen)
		}
		for _, path := range []string{"/dir/secret", "/dir/sub", "/up/secret", "/dir/.", "/dir/"} {
			if r := h.run("cp", "n:"+path, "-"); r.code == 0 || strings.Contains(r.out, secret) {
				t.Errorf("cp out of %s: %s", path, r)
			}
		}
		if r := h.run("cp", "-L", "n:/file", "-"); r.code == 0 || strings.Contains(r.out, secret) {
			t.Errorf("cp -L: %s", r)
		}
		c.untouched(t)
	}
	check() // of a mount that is down

	h.ok("mount", "--name", "n")
	check()
	mine := filepath.Join(h.root, "mine")
	put(t, mine, "mine")
	for _, to := range []string{"n:/dir/", "n:/dir/sub/", "n:/up/", "n:/dir/secret", "n:/file"} {
		h.run("cp", mine, to)
		c.untouched(t)
	}
	for path, target := range map[string]string{"dir": c.dir} {
		if got, err := os.Readlink(filepath.Join(dir, path)); err != nil || got != target {
			t.Errorf("%s leads to %q: %v", path, got, err)
		}
	}
	must(t, os.Lchown(filepath.Join(dir, "up"), 7, 7))
	must(t, os.Rename(filepath.Join(dir, "up"), filepath.Join(dir, "renamed")))
	must(t, os.Link(filepath.Join(dir, "renamed"), filepath.Join(dir, "hard")))
	must(t, os.Remove(filepath.Join(dir, "dir")))
	must(t, os.Mkdir(filepath.Join(dir, "dir"), 0o755))
	put(t, filepath.Join(dir, "dir/secret"), "inside")
	if list, _ := os.ReadDir(filepath.Join(dir, "dir")); len(list) != 1 {
		t.Errorf("the new directory holds %v", list)
	}
	c.untouched(t)
	must(t, os.Remove(filepath.Join(dir, "dir/secret")))
	must(t, os.Remove(filepath.Join(dir, "dir")))
	must(t, os.Symlink(c.dir, filepath.Join(dir, "dir")))
	h.ok("umount", "n")
	h.ok("rm", "n") // and what is deleted is the link
	c.untouched(t)
}

// TestSwappedUnderMount puts symlinks in the place of directories of an upper
// while the daemon serves it and a process is in one of them.
func TestSwappedUnderMount(t *testing.T) {
	needRoot(t)
	l := newLayer(t)
	l.dir("a", "a/b", "a/c")
	l.file("a/b/lower", content("lower", 5000))
	l.file("a/b/secret", content("lower", 5000))
	_, ref := serve(t, forms.EStargz, l.bytes())
	h := newHost(t)
	c := newCanary(t)
	dir := h.writable("fuse", "n", ref)
	put(t, filepath.Join(dir, "a/b/upper"), "upper")
	put(t, filepath.Join(dir, "a/c/new"), "c")
	in, err := unix.Open(filepath.Join(dir, "a/b"), unix.O_PATH|unix.O_DIRECTORY, 0)
	must(t, err)
	fs := filepath.Join(h.inspect("n").Upper, "fs")
	must(t, os.Rename(filepath.Join(fs, "a/b"), filepath.Join(fs, "a/b-away")))
	must(t, os.Symlink(c.dir, filepath.Join(fs, "a/b")))
	must(t, os.RemoveAll(filepath.Join(fs, "a/c")))
	must(t, os.Symlink(c.dir, filepath.Join(fs, "a/c")))

	// What becomes of each does not matter: what the daemon serves was taken from
	// under it. It must not happen elsewhere.
	try := func(dirfd int) {
		t.Helper()
		if fd, err := unix.Openat(dirfd, "made", unix.O_CREAT|unix.O_WRONLY, 0o644); err == nil {
			unix.Write(fd, []byte("x"))
			unix.Close(fd)
		}
		for _, name := range []string{"secret", "lower", "sub"} {
			if fd, err := unix.Openat(dirfd, name, unix.O_RDWR|unix.O_TRUNC, 0); err == nil {
				unix.Write(fd, []byte("x"))
				unix.Close(fd)
			}
			unix.Fchmodat(dirfd, name, 0o600, 0)
			unix.Fchownat(dirfd, name, 5, 5, unix.AT_SYMLINK_NOFOLLOW)
			unix.UtimesNanoAt(dirfd, name, []unix.Timespec{{Sec: 1}, {Sec: 1}}, unix.AT_SYMLINK_NOFOLLOW)
			unix.Linkat(dirfd, name, dirfd, name+"-link", 0)
			unix.Renameat(dirfd, name, dirfd, name+"-renamed")
			unix.Unlinkat(dirfd, name, 0)
			unix.Unlinkat(dirfd, name, unix.AT_REMOVEDIR)
		}
		unix.Mkdirat(dirfd, "dir", 0o755)
		unix.Symlinkat("x", dirfd, "link")
		unix.Mknodat(dirfd, "fifo", unix.S_IFIFO|0o644, 0)
		c.untouched(t)
	}
	try(in)
	if fd, err := unix.Open(filepath.Join(dir, "a/c"), unix.O_PATH|unix.O_DIRECTORY, 0); err == nil {
		// The kernel may have asked again, and followed the link for us.
		var st unix.Stat_t
		if unix.Fstat(fd, &st); st.Dev != func() uint64 { unix.Stat(c.dir, &st); return st.Dev }() {
			try(fd)
		}
		unix.Close(fd)
	}
	h.run("diff", "n")
	h.run("commit", "--dry-run", "n")
	if r := h.run("export", "n"); strings.Contains(r.out, secret) {
		t.Error("export left the upper")
	}
	h.run("cp", "n:/a/b/secret", "-")
	c.untouched(t)
	must(t, unix.Close(in))
	h.ok("umount", "n")
	h.ok("rm", "n")
	c.untouched(t)
}

// TestPlantedMarks puts into an upper what overlayfs would take for a pointer to
// other places. Nothing is led there, and who reads the upper says what it is.
func TestPlantedMarks(t *testing.T) { withBoth(t, plantedMarks) }

func plantedMarks(t *testing.T, overlay string) {
	for _, mark := range []string{"redirect", "metacopy"} {
		t.Run(mark, func(t *testing.T) {
			l := newLayer(t)
			l.dir("dir", "private")
			l.file("dir/file", []byte("the image's"))
			l.file("private/file", []byte("elsewhere"))
			_, ref := serve(t, forms.EStargz, l.bytes())
			h := newHost(t)
			dir := h.writable(overlay, "n", ref)
			put(t, filepath.Join(dir, "dir/file"), "changed")
			fs := filepath.Join(h.inspect("n").Upper, "fs")
			h.ok("umount", "n")
			path, value := filepath.Join(fs, "dir"), "/private"
			if mark == "metacopy" {
				path, value = filepath.Join(fs, "dir/file"), ""
			}
			must(t, unix.Setxattr(path, "trusted.overlay."+mark, []byte(value), 0))
			for _, verb := range []string{"diff", "commit", "export"} {
				if r := h.run(verb, "n"); r.code == 0 || !strings.Contains(r.err, mark) || !strings.Contains(r.err, "dir") {
					t.Errorf("%s: %s", verb, r)
				}
			}
			// A mount may refuse it, or its reader be refused; the lower that it
			// points at is never shown.
			if r := h.run("mount", "--name", "n"); r.code == 0 {
				if mark == "redirect" {
					if b, err := os.ReadFile(filepath.Join(dir, "dir/file")); err == nil && string(b) == "elsewhere" {
						t.Error("the redirect was followed")
					}
				} else if b, err := os.ReadFile(filepath.Join(dir, "dir/file")); err == nil && string(b) == "the image's" {
					t.Error("the lower's data was shown in the place of the upper's")
				}
				h.ok("umount", "n")
			}
			h.ok("rm", "n")
		})
	}
}

// tarEntry is an entry of a tar that was read.
type tarEntry struct {
	header  tar.Header
	content []byte
}

// tarOf gives the entries of a tar by their names, without slashes around them.
func tarOf(t *testing.T, s string) map[string]tarEntry {
	t.Helper()
	out := map[string]tarEntry{}
	r := tar.NewReader(strings.NewReader(s))
	for {
		e, err := r.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		must(t, err)
		b, err := io.ReadAll(r)
		must(t, err)
		out[strings.Trim(strings.TrimPrefix(e.Name, "./"), "/")] = tarEntry{*e, b}
	}
}
