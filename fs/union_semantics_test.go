package fs

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/fs/upper"
)

func TestUnionSemantics(t *testing.T) {
	for _, f := range unionForms {
		t.Run(string(f.form), func(t *testing.T) {
			u := newUnionTest(t, f.form, f.uid, modelLower(false))
			u.mount(t, f.uid)
			inside(t, u, f.uid, "semantics")
		})
	}
}

func lstat(t *testing.T, path string) (st unix.Stat_t) {
	t.Helper()
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatalf("stat %s: %v", path, err)
	}
	return st
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// testSemantics is about what the image's files and the upper's are to each
// other, which other suites know nothing of.
func testSemantics(t *testing.T, mnt string) {
	at := func(name string) string { return filepath.Join(mnt, name) }
	t.Run("numbers", func(t *testing.T) {
		for _, name := range []string{"a/x", "a", "d/e/many3", "a/l", "."} {
			before := lstat(t, at(name))
			check(t, unix.UtimesNanoAt(unix.AT_FDCWD, at(name), []unix.Timespec{{Sec: 1}, {Sec: 2}}, unix.AT_SYMLINK_NOFOLLOW))
			after := lstat(t, at(name))
			if before.Ino != after.Ino || after.Mtim.Sec != 2 || before.Mode != after.Mode || before.Nlink != after.Nlink {
				t.Errorf("%s was %+v, is %+v", name, before, after)
			}
		}
	})
	t.Run("hard links", func(t *testing.T) {
		names := []string{"d/0", "a/h", "a/b/h"}
		before := lstat(t, at(names[0]))
		check(t, os.WriteFile(at(names[1]), []byte("changed"), 0))
		for _, name := range names {
			b, err := os.ReadFile(at(name))
			st := lstat(t, at(name))
			if err != nil || string(b) != "changed" || st.Ino != before.Ino || st.Nlink != 3 {
				t.Errorf("%s: %q, %v, %d links", name, b, err, st.Nlink)
			}
		}
		check(t, os.Remove(at(names[1])))
		if st := lstat(t, at(names[0])); st.Nlink != 2 {
			t.Errorf("%d links stay of 2", st.Nlink)
		}
	})
	t.Run("open before the copy", func(t *testing.T) {
		r, err := os.Open(at("d/e/many9"))
		check(t, err)
		defer r.Close()
		m, err := unix.Mmap(int(r.Fd()), 0, 900, unix.PROT_READ, unix.MAP_SHARED)
		check(t, err)
		defer unix.Munmap(m)
		w, err := os.OpenFile(at("d/e/many9"), os.O_RDWR, 0)
		check(t, err)
		defer w.Close()
		_, err = w.WriteAt([]byte("new"), 5)
		check(t, err)
		b := make([]byte, 10)
		_, err = r.ReadAt(b, 0)
		check(t, err)
		if want := "99999new99"; string(b) != want || !bytes.Equal(m[:10], []byte(want)) {
			t.Errorf("read %q, mapped %q, want %q", b, m[:10], want)
		}
	})
	t.Run("open and removed", func(t *testing.T) {
		r, err := os.Open(at("d/e/many8"))
		check(t, err)
		defer r.Close()
		check(t, os.Remove(at("d/e/many8")))
		var st unix.Stat_t
		check(t, unix.Fstat(int(r.Fd()), &st))
		if st.Nlink != 0 || st.Size != 800 {
			t.Errorf("%d links, %d bytes", st.Nlink, st.Size)
		}
		check(t, r.Chmod(0o600)) // of a file that has no name to copy it up to
		w, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", r.Fd()), os.O_RDWR, 0)
		check(t, err)
		defer w.Close()
		_, err = w.WriteAt([]byte("new"), 0)
		check(t, err)
		b := make([]byte, 5)
		_, err = r.ReadAt(b, 0)
		check(t, unix.Fstat(int(r.Fd()), &st))
		if err != nil || string(b) != "new88" || st.Mode != unix.S_IFREG|0o600 || st.Nlink != 0 {
			t.Errorf("read %q, %v, mode %o, %d links", b, err, st.Mode, st.Nlink)
		}
	})
	t.Run("a directory removed", func(t *testing.T) {
		fd, err := unix.Open(at("empty"), unix.O_RDONLY|unix.O_DIRECTORY, 0)
		check(t, err)
		defer unix.Close(fd)
		check(t, os.Remove(at("empty")))
		var st unix.Stat_t
		check(t, unix.Fstat(fd, &st))
		check(t, os.Mkdir(at("empty"), 0o755))
		if st.Nlink != 0 || lstat(t, at("empty")).Ino == st.Ino {
			t.Errorf("%d links, number %d", st.Nlink, st.Ino)
		}
		if _, err := unix.Openat(fd, "x", unix.O_CREAT|unix.O_WRONLY, 0o644); err != unix.ENOENT {
			t.Errorf("create in it: %v", err)
		}
	})
	t.Run("without a name", func(t *testing.T) {
		fd, err := unix.Open(at("d"), unix.O_TMPFILE|unix.O_RDWR, 0o644)
		check(t, err)
		defer unix.Close(fd)
		_, err = unix.Write(fd, []byte("here"))
		check(t, err)
		check(t, unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), unix.AT_FDCWD, at("d/named"), unix.AT_SYMLINK_FOLLOW))
		b, err := os.ReadFile(at("d/named"))
		if st := lstat(t, at("d/named")); err != nil || string(b) != "here" || st.Nlink != 1 {
			t.Errorf("read %q, %v, %d links", b, err, st.Nlink)
		}
	})
	t.Run("names", func(t *testing.T) {
		long := string(bytes.Repeat([]byte{'n'}, 256))
		for _, test := range []struct {
			name string
			want error
		}{{".wh.x", unix.EINVAL}, {".wh..wh..opq", unix.EINVAL}, {long, unix.ENAMETOOLONG}, {long[:255], nil}} {
			for what, do := range map[string]func() error{
				"mkdir":  func() error { return unix.Mkdir(at("d/"+test.name), 0o755) },
				"mknod":  func() error { return unix.Mknod(at("d/"+test.name), unix.S_IFREG|0o644, 0) },
				"rename": func() error { return unix.Rename(at("a/x"), at("d/"+test.name)) },
				"link":   func() error { return unix.Link(at("a/x"), at("d/"+test.name)) },
			} {
				if test.want == nil {
					continue
				}
				if err := do(); err != test.want {
					t.Errorf("%s %.20s: %v, want %v", what, test.name, err, test.want)
				}
			}
		}
		check(t, unix.Mkdir(at("d/"+long[:255]), 0o755))
		if err := unix.Renameat2(unix.AT_FDCWD, at("a/x"), unix.AT_FDCWD, at("a/y"), unix.RENAME_WHITEOUT); err != unix.EINVAL && err != unix.EPERM {
			t.Errorf("RENAME_WHITEOUT: %v", err)
		}
		if err := unix.Mknod(at("white"), unix.S_IFCHR, 0); err != unix.EPERM {
			t.Errorf("mknod of a whiteout: %v", err)
		}
	})
	t.Run("seekdir", func(t *testing.T) { testSeekDir(t, at("d/e")) })
	t.Run("data and holes", func(t *testing.T) {
		f, err := os.OpenFile(at("d/sparse"), os.O_CREATE|os.O_RDWR, 0o644)
		check(t, err)
		defer f.Close()
		_, err = f.WriteAt([]byte("data"), 1<<20)
		check(t, err)
		check(t, f.Sync())
		if off, err := unix.Seek(int(f.Fd()), 0, unix.SEEK_DATA); err != nil || off != 1<<20 {
			t.Errorf("data from %d, %v", off, err)
		}
	})
}

// testSeekDir removes names while a directory is read, which must not move the
// others.
func testSeekDir(t *testing.T, dir string) {
	check(t, os.WriteFile(filepath.Join(dir, "own"), nil, 0o644))
	want := map[string]bool{}
	entries, err := os.ReadDir(dir)
	check(t, err)
	for _, e := range entries {
		want[e.Name()] = true
	}
	f, err := os.Open(dir)
	check(t, err)
	defer f.Close()
	got := map[string]bool{}
	buf := make([]byte, 128)
	for {
		n, err := unix.Getdents(int(f.Fd()), buf)
		check(t, err)
		if n == 0 {
			break
		}
		_, _, names := unix.ParseDirent(buf[:n], -1, nil)
		for _, name := range names {
			if got[name] {
				t.Errorf("%s came twice", name)
			}
			got[name] = true
			if len(got)%3 == 0 {
				os.Remove(filepath.Join(dir, name))
			}
		}
	}
	for name := range want {
		if !got[name] {
			t.Errorf("%s did not come", name)
		}
	}
	_, err = f.Seek(0, 0)
	check(t, err)
	left, err := f.Readdirnames(-1)
	check(t, err)
	for _, name := range left {
		if _, err := os.Lstat(filepath.Join(dir, name)); err != nil {
			t.Errorf("after rewinding there is %v", err)
		}
	}
}

// TestUnionHold has writers wait and readers go on.
func TestUnionHold(t *testing.T) {
	u := newUnionTest(t, upper.Trusted, 0, modelLower(true))
	u.mount(t, 0)
	ask := func(want string) {
		fmt.Fprintln(u.in)
		buf := make([]byte, 32)
		if want == "" {
			return
		}
		if n, err := u.out.Read(buf); err != nil || string(buf[:n]) != want {
			t.Fatalf("the child says %q, %v", buf[:n], err)
		}
	}
	// Who makes a name holds the directory meanwhile: names in it that the kernel does
	// not know yet would wait for him.
	if _, err := os.Stat(filepath.Join(u.Dir, "a/0")); err != nil {
		t.Fatal(err)
	}
	ask("held <nil>\n")
	done := make(chan error, 1)
	go func() { done <- os.WriteFile(filepath.Join(u.Dir, "new"), nil, 0o644) }()
	if b, err := os.ReadFile(filepath.Join(u.Dir, "a/0")); err != nil || string(b) != "zero" {
		t.Errorf("read %q, %v", b, err)
	}
	select {
	case err := <-done:
		t.Errorf("a file was made while writers were held: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	ask("")
	check(t, <-done)
}
