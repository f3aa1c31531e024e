package upper

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// newUpper makes an upper where an overlay can have it.
func newUpper(t *testing.T, form Form) (up *Dir, at func(name string) string) {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "varve-upper-")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	up, err = Create(filepath.Join(dir, "up"), About{Form: form}, Attr{Mode: unix.S_IFDIR | 0o755})
	must(t, err)
	t.Cleanup(func() { up.Close() })
	return up, func(name string) string { return filepath.Join(up.Tree(), name) }
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting, and making devices, needs root")
	}
}

func walk(t *testing.T, up *Dir) []*Change {
	t.Helper()
	var all []*Change
	must(t, up.Walk(context.Background(), func(c *Change) error {
		all = append(all, c)
		return nil
	}))
	return all
}

func paths(all []*Change) []string {
	var out []string
	for _, c := range all {
		s := c.Path
		switch {
		case c.Whiteout:
			s += " gone"
		case c.Opaque:
			s += " opaque"
		case c.IsDir():
			s += "/"
		}
		out = append(out, s)
	}
	return out
}

// TestWalkOverlay reads what the kernel's overlayfs wrote.
func TestWalkOverlay(t *testing.T) {
	needRoot(t)
	for form, options := range map[Form]string{Trusted: "redirect_dir=nofollow,metacopy=off", User: "userxattr"} {
		t.Run(string(form), func(t *testing.T) {
			up, _ := newUpper(t, form)
			base := filepath.Dir(up.Path())
			lower, merged := filepath.Join(base, "lower"), filepath.Join(base, "merged")
			for _, dir := range []string{"keep", "gone", "again", "deep/er"} {
				must(t, os.MkdirAll(filepath.Join(lower, dir), 0o755))
				must(t, os.WriteFile(filepath.Join(lower, dir, "f"), []byte("lower"), 0o644))
			}
			must(t, os.Mkdir(merged, 0o755))
			must(t, unix.Mount("overlay", merged, "overlay", 0, options+",index=off,lowerdir="+lower+",upperdir="+up.Tree()+",workdir="+up.Work()))
			defer unix.Unmount(merged, unix.MNT_DETACH)
			at := func(name string) string { return filepath.Join(merged, name) }
			must(t, os.Chmod(at("deep/er/f"), 0o4711))
			must(t, os.Chown(at("deep/er/f"), 5, 6))
			must(t, os.RemoveAll(at("gone")))
			must(t, os.RemoveAll(at("again")))
			must(t, os.Mkdir(at("again"), 0o700))
			must(t, os.WriteFile(at("keep.x"), []byte("new"), 0o640))
			must(t, unix.Setxattr(at("keep.x"), "user.z", []byte("1"), 0))
			must(t, unix.Setxattr(at("keep.x"), "user.a", []byte("2\x00"), 0))
			must(t, unix.Setxattr(at("keep.x"), form.prefix()+"mine", []byte("3"), 0))
			must(t, os.Link(at("keep.x"), at("keep/x")))
			must(t, os.Symlink("where", at("keep/link")))
			all := walk(t, up)
			want := []string{"/", "again opaque", "deep/", "deep/er/", "deep/er/f", "gone gone", "keep/", "keep/link", "keep/x", "keep.x"}
			got := paths(all)
			if d := cmp.Diff(want, got); d != "" {
				t.Errorf("(-want +got):\n%s", d)
			}
			for _, c := range all {
				if c.Whiteout || c.Path == "" {
					continue
				}
				var st unix.Stat_t
				must(t, unix.Lstat(at(c.Path), &st))
				if c.Mode != st.Mode || c.UID != st.Uid || c.GID != st.Gid || c.Mtime != st.Mtim || !c.IsDir() && c.Size != st.Size {
					t.Errorf("%s: %+v, the mount shows %+v", c.Path, c, st)
				}
				switch c.Path {
				case "keep/link":
					if c.Link != "where" {
						t.Errorf("link to %q", c.Link)
					}
				case "keep.x", "keep/x":
					want := []Xattr{{form.prefix() + "mine", []byte("3")}, {"user.a", []byte("2\x00")}, {"user.z", []byte("1")}}
					slices.SortFunc(want, func(a, b Xattr) int { return strings.Compare(a.Name, b.Name) })
					if d := cmp.Diff(want, c.Xattrs); d != "" || c.Nlink != 2 {
						t.Errorf("%s: %d links, xattrs (-want +got):\n%s", c.Path, c.Nlink, d)
					}
				default:
					if len(c.Xattrs) > 0 {
						t.Errorf("%s: %q", c.Path, c.Xattrs)
					}
				}
			}
		})
	}
}

func TestWalkOverride(t *testing.T) {
	up, at := newUpper(t, Override)
	put := func(name, content, owner string) {
		must(t, os.WriteFile(at(name), []byte(content), 0o600))
		if owner != "" {
			must(t, unix.Setxattr(at(name), OverrideXattr, []byte(owner), 0))
		}
	}
	put("plain", "data", "")
	put("owned", "data", "1000:70000:04750")
	put("file", "data", "0:0:0000:file")
	put("link", "../to", "5:6:0777:symlink")
	put("fifo", "", "5:6:0600:pipe")
	put("dev", "", "0:6:0660:block-8-1")
	must(t, os.Mkdir(at("dir"), 0o700))
	must(t, unix.Setxattr(at("dir"), OverrideXattr, []byte("7:8:0000:dir"), 0))
	must(t, unix.Setxattr(at("dir"), "user.overlay.opaque", []byte("y"), 0))
	must(t, unix.Setxattr(at("dir"), "user.kept", []byte("v"), 0))
	want := map[string]string{
		"":      "40755 0:0 0 0 \"\" []",
		"dev":   "60660 0:6 801 0 \"\" []",
		"dir":   "40000 7:8 0 0 \"\" [{user.kept [118]}]",
		"fifo":  "10600 5:6 0 0 \"\" []",
		"file":  "100000 0:0 0 4 \"\" []",
		"link":  "120777 5:6 0 5 \"../to\" []",
		"owned": "104750 1000:70000 0 4 \"\" []",
		"plain": "100600 0:0 0 4 \"\" []",
	}
	got := map[string]string{}
	for _, c := range walk(t, up) {
		got[c.Path] = fmt.Sprintf("%o %d:%d %x %d %q %v", c.Mode, c.UID, c.GID, c.Rdev, c.Size, c.Link, c.Xattrs)
		if c.Opaque != (c.Path == "dir") {
			t.Errorf("%q: opaque %v", c.Path, c.Opaque)
		}
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	for name, owner := range map[string]string{
		"no number": "x:0:0600", "a directory from a file": "0:0:0755:dir", "a whiteout": "0:0:0600:char-0-0", "an empty link": "0:0:0777:symlink",
	} {
		put("bad", "", owner)
		if err := up.Walk(context.Background(), func(*Change) error { return nil }); !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), `"bad"`) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestWalkHostile(t *testing.T) {
	needRoot(t)
	tests := []struct {
		name string
		make func(t *testing.T, at func(string) string)
		want string // part of the message
	}{
		{"redirect", func(t *testing.T, at func(string) string) {
			must(t, os.Mkdir(at("d"), 0o755))
			must(t, unix.Setxattr(at("d"), "trusted.overlay.redirect", []byte("/etc"), 0))
		}, "trusted.overlay.redirect"},
		{"metacopy", func(t *testing.T, at func(string) string) {
			must(t, os.WriteFile(at("d"), nil, 0o644))
			must(t, unix.Setxattr(at("d"), "trusted.overlay.metacopy", nil, 0))
		}, "trusted.overlay.metacopy"},
		{"whiteouts of another form", func(t *testing.T, at func(string) string) {
			must(t, os.Mkdir(at("d"), 0o755))
			must(t, unix.Setxattr(at("d"), "trusted.overlay.opaque", []byte("x"), 0))
		}, "deletions"},
		{"a mount", func(t *testing.T, at func(string) string) {
			must(t, os.Mkdir(at("d"), 0o755))
			must(t, unix.Mount("tmpfs", at("d"), "tmpfs", 0, "size=4k"))
			t.Cleanup(func() { unix.Unmount(at("d"), unix.MNT_DETACH) })
		}, "mounted"},
		{"a bind mount of the same filesystem", func(t *testing.T, at func(string) string) {
			must(t, os.WriteFile(at("d"), nil, 0o644))
			must(t, os.WriteFile(at("other"), nil, 0o644))
			must(t, unix.Mount(at("other"), at("d"), "", unix.MS_BIND, ""))
			t.Cleanup(func() { unix.Unmount(at("d"), unix.MNT_DETACH) })
		}, "mounted"},
		{"too deep", func(t *testing.T, at func(string) string) {
			fd, err := unix.Open(at(""), unix.O_RDONLY, 0)
			must(t, err)
			for range maxDepth + 2 {
				must(t, unix.Mkdirat(fd, "d", 0o755))
				next, err := unix.Openat(fd, "d", unix.O_RDONLY, 0)
				must(t, err)
				unix.Close(fd)
				fd = next
			}
			unix.Close(fd)
		}, "directories in one another"},
		{"too long", func(t *testing.T, at func(string) string) {
			fd, err := unix.Open(at(""), unix.O_RDONLY, 0)
			must(t, err)
			name := strings.Repeat("n", 255)
			for range 17 {
				must(t, unix.Mkdirat(fd, name, 0o755))
				next, err := unix.Openat(fd, name, unix.O_RDONLY, 0)
				must(t, err)
				unix.Close(fd)
				fd = next
			}
			unix.Close(fd)
		}, "path of"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			up, at := newUpper(t, Trusted)
			tt.make(t, at)
			err := up.Walk(context.Background(), func(*Change) error { return nil })
			if !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), `"`) {
				t.Errorf("got %v", err)
			}
		})
	}
	t.Run("stopped", func(t *testing.T) {
		up, at := newUpper(t, Trusted)
		must(t, os.WriteFile(at("f"), nil, 0o644))
		stop := errors.New("stop")
		if err := up.Walk(context.Background(), func(*Change) error { return stop }); !errors.Is(err, stop) {
			t.Errorf("got %v", err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if err := up.Walk(ctx, func(*Change) error { return nil }); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	})
}

func TestOpenBeneath(t *testing.T) {
	needRoot(t)
	up, at := newUpper(t, Trusted)
	must(t, os.MkdirAll(at("d/e"), 0o755))
	must(t, os.WriteFile(at("d/e/f"), []byte("content"), 0o600))
	outside := filepath.Join(filepath.Dir(up.Path()), "outside")
	must(t, os.Mkdir(outside, 0o755))
	must(t, os.WriteFile(filepath.Join(outside, "f"), []byte("secret"), 0o600))
	must(t, os.Symlink(outside, at("link")))
	must(t, os.Symlink(filepath.Join(outside, "f"), at("f")))
	must(t, os.Symlink("d", at("inside")))
	must(t, unix.Mkfifo(at("fifo"), 0o600))
	must(t, unix.Mknod(at("null"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))))
	must(t, unix.Mknod(at("gone"), unix.S_IFCHR, 0))
	must(t, os.Mkdir(at("m"), 0o755))
	must(t, unix.Mount(outside, at("m"), "", unix.MS_BIND, ""))
	defer unix.Unmount(at("m"), unix.MNT_DETACH)
	past := time.Unix(1000, 0)
	must(t, os.Chtimes(at("d/e/f"), past, past))
	f, err := up.Open("d/e/f")
	must(t, err)
	defer f.Close()
	if b, err := io.ReadAll(f); err != nil || string(b) != "content" {
		t.Errorf("read %q, %v", b, err)
	}
	var st unix.Stat_t
	must(t, unix.Stat(at("d/e/f"), &st))
	if st.Atim.Sec != 1000 {
		t.Error("reading left a trace")
	}
	for _, name := range []string{"link/f", "f", "inside/e/f", "fifo", "null", "gone", "d", "", "../outside/f", "/etc/passwd", "m/f", "d/e/f/", "none"} {
		if f, err := up.Open(name); err == nil {
			t.Errorf("%q was opened", name)
			f.Close()
		}
	}
}

func TestStamp(t *testing.T) {
	up, at := newUpper(t, Override)
	must(t, os.MkdirAll(at("d"), 0o755))
	must(t, os.WriteFile(at("d/f"), []byte("one"), 0o644))
	stamp := func() [32]byte {
		t.Helper()
		s, err := up.Stamp(context.Background())
		must(t, err)
		return s
	}
	last := stamp()
	if last != stamp() {
		t.Fatal("nothing was changed")
	}
	st, err := os.Stat(at("d/f"))
	must(t, err)
	for name, change := range map[string]func() error{
		"contents, time set back": func() error {
			return errors.Join(os.WriteFile(at("d/f"), []byte("two"), 0o644), os.Chtimes(at("d/f"), st.ModTime(), st.ModTime()))
		},
		"mode":      func() error { return os.Chmod(at("d/f"), 0o600) },
		"attribute": func() error { return unix.Setxattr(at("d"), "user.x", nil, 0) },
		"new":       func() error { return os.WriteFile(at("d/g"), nil, 0o600) },
		"renamed":   func() error { return os.Rename(at("d/g"), at("d/h")) },
	} {
		if name == "renamed" {
			must(t, os.WriteFile(at("d/g"), nil, 0o600))
			last = stamp()
		}
		must(t, change())
		now := stamp()
		if now == last {
			t.Errorf("%s: it was not noticed", name)
		}
		last = now
	}
}

func TestUsage(t *testing.T) {
	up, at := newUpper(t, Override)
	must(t, os.WriteFile(at("f"), bytes.Repeat([]byte("x"), 100_000), 0o644))
	must(t, os.Link(at("f"), at("g")))
	must(t, os.Mkdir(at("d"), 0o755))
	n, inodes, err := up.Usage(context.Background())
	must(t, err)
	if inodes != 3 || n < 100_000 || n > 150_000 {
		t.Errorf("%d bytes, %d inodes", n, inodes)
	}
}

// BenchmarkWalk goes through 20,000 files.
func BenchmarkWalk(b *testing.B) {
	dir := b.TempDir()
	up, err := Create(filepath.Join(dir, "up"), About{Form: Override}, Attr{Mode: unix.S_IFDIR | 0o755})
	if err != nil {
		b.Fatal(err)
	}
	defer up.Close()
	for i := range 200 {
		sub := filepath.Join(up.Tree(), fmt.Sprintf("d%d", i))
		os.Mkdir(sub, 0o755)
		for k := range 100 {
			os.WriteFile(filepath.Join(sub, fmt.Sprintf("file%d", k)), []byte("x"), 0o644)
		}
	}
	for b.Loop() {
		n := 0
		if err := up.Walk(context.Background(), func(*Change) error { n++; return nil }); err != nil || n != 20201 {
			b.Fatal(n, err)
		}
	}
}
