package upper

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// newDir makes an empty upper.
func newDir(t *testing.T, form Form) *Dir {
	t.Helper()
	if form == Trusted && os.Geteuid() != 0 {
		t.Skip("needs root: trusted.* is the administrator's")
	}
	d, err := Create(filepath.Join(t.TempDir(), "upper"), About{Image: "test", Form: form}, Attr{Mode: unix.S_IFDIR | 0o755})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// makeTest makes a file in the upper's root.
func (d *Dir) makeTest(t *testing.T, name string, n New) unix.Stat_t {
	t.Helper()
	fd, st, err := d.Make(d.tree, name, &n)
	must(t, err)
	if fd >= 0 {
		unix.Close(fd)
	}
	return st
}

func TestMakeAgainstStat(t *testing.T) {
	for _, form := range []Form{Trusted, Override} {
		t.Run(string(form), func(t *testing.T) {
			d := newDir(t, form)
			for _, test := range []struct {
				name string
				n    New
				want Owner
			}{
				{"file", New{Mode: unix.S_IFREG | 0o666, Umask: 0o022}, Owner{Mode: unix.S_IFREG | 0o644}},
				{"closed", New{Mode: unix.S_IFREG}, Owner{Mode: unix.S_IFREG}},
				{"dir", New{Mode: unix.S_IFDIR | 0o777, Umask: 0o002}, Owner{Mode: unix.S_IFDIR | 0o775}},
				{"closed dir", New{Mode: unix.S_IFDIR | 0o055}, Owner{Mode: unix.S_IFDIR | 0o055}},
				{"link", New{Mode: unix.S_IFLNK | 0o777, Link: "/etc/passwd"}, Owner{Mode: unix.S_IFLNK | 0o777}},
				{"pipe", New{Mode: unix.S_IFIFO | 0o606}, Owner{Mode: unix.S_IFIFO | 0o606}},
				{"inherits", New{Mode: unix.S_IFREG | 0o640, Setgid: true, DirGID: 7}, Owner{GID: 7, Mode: unix.S_IFREG | 0o640}},
				{"hands on", New{Mode: unix.S_IFDIR | 0o750, Setgid: true, DirGID: 7}, Owner{GID: 7, Mode: unix.S_IFDIR | unix.S_ISGID | 0o750}},
			} {
				made := d.makeTest(t, test.name, test.n)
				var st unix.Stat_t
				must(t, d.Stat(At{Dir: d.tree, Name: test.name}, &st))
				for _, s := range []unix.Stat_t{made, st} {
					if diff := cmp.Diff(test.want, Owner{UID: s.Uid, GID: s.Gid, Mode: s.Mode}); diff != "" {
						t.Errorf("%s (-want +got):\n%s", test.name, diff)
					}
				}
				if made != st {
					t.Errorf("%s: made as %+v, is %+v", test.name, made, st)
				}
			}
		})
	}
}

// TestOverride has what a plain user cannot set be kept aside, and be shown.
func TestOverride(t *testing.T) {
	d := newDir(t, Override)
	for _, n := range []New{
		{Mode: unix.S_IFREG | 0o755}, {Mode: unix.S_IFDIR | 0o755},
		{Mode: unix.S_IFLNK | 0o777, Link: "somewhere"}, {Mode: unix.S_IFIFO | 0o644}, {Mode: unix.S_IFSOCK | 0o644},
	} {
		name := Owner{Mode: n.Mode}.String()
		d.makeTest(t, name, n)
		at := At{Dir: d.tree, Name: name}
		for _, want := range []Owner{
			{UID: 1000, GID: 100, Mode: n.Mode},
			{UID: 1000, GID: 0, Mode: n.Mode &^ 0o777},
			{UID: 0, GID: 0, Mode: n.Mode},
		} {
			if n.Mode&unix.S_IFMT == unix.S_IFLNK {
				want.Mode = n.Mode
			}
			var st unix.Stat_t
			must(t, d.Stat(at, &st))
			must(t, d.Chown(at, &st, int(want.UID), int(want.GID)))
			must(t, d.Stat(at, &st))
			if n.Mode&unix.S_IFMT != unix.S_IFLNK {
				must(t, d.Chmod(at, &st, want.Mode))
			}
			must(t, d.Stat(at, &st))
			if diff := cmp.Diff(want, Owner{UID: st.Uid, GID: st.Gid, Mode: st.Mode}); diff != "" {
				t.Errorf("%s (-want +got):\n%s", name, diff)
			}
			var disk unix.Stat_t
			must(t, at.Lstat(&disk))
			if disk.Uid != d.UID || disk.Mode&0o600 != 0o600 && disk.Mode&unix.S_IFMT != unix.S_IFIFO && disk.Mode&unix.S_IFMT != unix.S_IFSOCK {
				t.Errorf("%s lies on disk with owner %d and mode %o", name, disk.Uid, disk.Mode)
			}
			if n.Link != "" {
				target, err := d.Readlink(at)
				if err != nil || string(target) != n.Link {
					t.Errorf("the symlink leads to %q, %v", target, err)
				}
			}
			names, err := d.Listxattr(at)
			if err != nil || strings.Contains(string(names), "containers") {
				t.Errorf("%s shows %q, %v", name, names, err)
			}
		}
	}
}

func TestChownDropsSetID(t *testing.T) {
	d := newDir(t, Override)
	d.makeTest(t, "f", New{Mode: unix.S_IFREG | 0o6755})
	at := At{Dir: d.tree, Name: "f"}
	var st unix.Stat_t
	must(t, d.Stat(at, &st))
	must(t, d.Chown(at, &st, 5, -1))
	must(t, d.Stat(at, &st))
	if st.Mode != unix.S_IFREG|0o755 || st.Uid != 5 {
		t.Errorf("mode %o, owner %d", st.Mode, st.Uid)
	}
}

// ls gives the names in a directory and what they are.
func (d *Dir) ls(t *testing.T, dir int) map[string]string {
	t.Helper()
	all := map[string]string{}
	must(t, ReadDir(dir, func(e *Dirent) bool {
		name := string(e.Name)
		if name == "." || name == ".." {
			return true
		}
		at := At{Dir: dir, Name: name}
		var st unix.Stat_t
		must(t, d.Stat(at, &st))
		opaque := false
		if st.Mode&unix.S_IFMT == unix.S_IFDIR {
			var err error
			opaque, err = d.IsOpaque(at)
			must(t, err)
		}
		switch {
		case IsWhiteout(&st):
			all[name] = "whiteout"
		case opaque:
			all[name] = "opaque"
		case st.Mode&unix.S_IFMT == unix.S_IFDIR:
			all[name] = "dir"
		default:
			all[name] = "file"
		}
		return true
	}))
	return all
}

func TestWhiteouts(t *testing.T) {
	for _, form := range []Form{Trusted, Override} {
		t.Run(string(form), func(t *testing.T) {
			d := newDir(t, form)
			file, dir := New{Mode: unix.S_IFREG | 0o644}, New{Mode: unix.S_IFDIR | 0o755}
			check := func(want map[string]string) {
				t.Helper()
				if diff := cmp.Diff(want, d.ls(t, d.tree)); diff != "" {
					t.Errorf("(-want +got):\n%s", diff)
				}
				if left := d.ls(t, d.staging); len(left) > 0 {
					t.Errorf("in staging there stays %v", left)
				}
			}
			must(t, d.Whiteout(d.tree, "a"))
			d.makeTest(t, "b", file)
			must(t, d.Hide(d.tree, "b"))
			check(map[string]string{"a": "whiteout", "b": "whiteout"})

			fd, _, err := d.Replace(d.tree, "a", &file)
			must(t, err)
			unix.Close(fd)
			_, _, err = d.Replace(d.tree, "b", &dir)
			must(t, err)
			check(map[string]string{"a": "file", "b": "opaque"})

			b, err := Dirfd(d.tree, "b")
			must(t, err)
			defer unix.Close(b)
			must(t, d.Whiteout(b, "x"))
			must(t, d.Bare(d.tree, "b"))
			d.makeTest(t, "c", dir)
			must(t, d.Rename(d.tree, "c", d.tree, "b", true))
			check(map[string]string{"a": "file", "b": "dir", "c": "whiteout"})

			b2, err := Dirfd(d.tree, "b")
			must(t, err)
			defer unix.Close(b2)
			must(t, d.Whiteout(b2, "x"))
			must(t, d.RemoveDir(d.tree, "b", true))
			must(t, d.LinkOver(At{Dir: d.tree, Name: "a"}, d.tree, "c"))
			check(map[string]string{"a": "file", "b": "whiteout", "c": "file"})
		})
	}
}

func TestStage(t *testing.T) {
	src, err := os.CreateTemp(t.TempDir(), "")
	must(t, err)
	defer src.Close()
	content := make([]byte, 9<<20) // more than a piece, and with a hole
	copy(content[5000:], "here")
	copy(content[len(content)-5:], "there")
	must(t, src.Truncate(4096+int64(len(content))))
	for _, at := range []int{5000, len(content) - 5} {
		_, err := src.WriteAt(content[at:at+5], 4096+int64(at))
		must(t, err)
	}
	for _, form := range []Form{Trusted, Override} {
		t.Run(string(form), func(t *testing.T) {
			d := newDir(t, form)
			f := &File{Attr: Attr{Mode: unix.S_IFREG | 0o4711, UID: 3, GID: 4, Mtime: unix.Timespec{Sec: 1e9, Nsec: 6}, Xattrs: map[string]string{"user.k": "v"}}}
			s, err := d.Stage(f)
			must(t, err)
			asked := int64(0)
			must(t, s.Copy(int(src.Fd()), 4096, int64(len(content)), func(off, n int64) error {
				if off != 4096+asked {
					t.Errorf("asks for %d at %d", n, off)
				}
				asked += n
				return nil
			}))
			must(t, s.Finish(f))
			must(t, s.Into(d.tree, "f"))
			var st unix.Stat_t
			at := At{Dir: d.tree, Name: "f"}
			must(t, d.Stat(at, &st))
			if st.Mode != f.Mode || st.Uid != 3 || st.Gid != 4 || st.Mtim != f.Mtime || st.Size != int64(len(content)) || st.Blocks*512 > 1<<20 {
				t.Errorf("the copy is %+v", st)
			}
			got, err := os.ReadFile(filepath.Join(d.Tree(), "f"))
			if err != nil || string(got) != string(content) {
				t.Errorf("the copy differs, %v", err)
			}
			b := make([]byte, 9)
			if n, err := d.Getxattr(at, "user.k", b); err != nil || string(b[:n]) != "v" {
				t.Errorf("user.k is %q, %v", b[:n], err)
			}
		})
	}
}

// TestPlantedSymlinks has every operation meet a symlink where it expects a file
// or a directory.
func TestPlantedSymlinks(t *testing.T) {
	d := newDir(t, Override)
	out := t.TempDir()
	victim := filepath.Join(out, "victim")
	must(t, os.WriteFile(victim, []byte("untouched"), 0o640))
	must(t, os.Symlink(victim, filepath.Join(d.Tree(), "f")))
	must(t, os.Symlink(out, filepath.Join(d.Tree(), "d")))
	must(t, os.Mkdir(filepath.Join(d.Tree(), "real"), 0o755))
	must(t, os.Symlink("../real", filepath.Join(d.Tree(), "real", "up")))
	var before, after unix.Stat_t
	must(t, unix.Stat(victim, &before))
	for _, names := range []string{"d", "real/up", "..", "real/../..", "/etc", "real/up/up"} {
		if fd, err := Dirfd(d.tree, names); err == nil {
			unix.Close(fd)
			t.Errorf("%s is opened", names)
		}
	}
	at := At{Dir: d.tree, Name: "f"}
	if fd, err := at.Open(unix.O_RDWR); !errors.Is(err, unix.ELOOP) {
		t.Errorf("open: %d, %v", fd, err)
	}
	var st unix.Stat_t
	must(t, d.Stat(at, &st))
	d.Chmod(at, &st, 0o777)
	d.Setxattr(at, "user.x", []byte("y"), 0)
	must(t, at.Times(unix.Timespec{}, unix.Timespec{}))
	must(t, at.LinkTo(d.tree, "g"))
	must(t, d.Hide(d.tree, "g"))
	n := New{Mode: unix.S_IFREG | 0o644}
	if _, _, err := d.Make(d.tree, "f", &n); !errors.Is(err, syscall.EEXIST) {
		t.Errorf("make: %v", err)
	}
	must(t, d.Chown(at, &st, 5, 5)) // another file stands for it then
	must(t, unix.Stat(victim, &after))
	before.Atim, after.Atim = unix.Timespec{}, unix.Timespec{}
	if before != after {
		t.Errorf("what a symlink leads to was changed:\n%+v\n%+v", before, after)
	}
}
