package fs

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/fs/upper"
	"github.com/varvefs/varve/index"
)

// modelLower is an image with something of everything.
func modelLower(owners bool) []lowerFile {
	e := func(name string, mode uint32, content string) lowerFile {
		return lowerFile{index.Entry{Name: name, Mode: mode, Mtime: 1e9, MtimeNs: 5}, content}
	}
	files := []lowerFile{
		e("", unix.S_IFDIR|0o755, ""),
		e("a", unix.S_IFDIR|0o755, ""),
		e("a/b", unix.S_IFDIR|0o755, ""),
		e("a/b/c", unix.S_IFDIR|0o700, ""),
		e("d", unix.S_IFDIR|0o755, ""),
		e("d/e", unix.S_IFDIR|0o755, ""),
		e("empty", unix.S_IFDIR|0o755, ""),
		e("a/0", unix.S_IFREG|0o644, "zero"),
		e("a/1", unix.S_IFREG|0o4755, strings.Repeat("set-user-ID ", 1000)),
		e("a/b/0", unix.S_IFREG|0o600, strings.Repeat("x", 10000)),
		e("a/b/c/0", unix.S_IFREG|0o400, ""),
		e("d/0", unix.S_IFREG|0o644, "linked from elsewhere"),
		e("d/e/0", unix.S_IFREG|0o644, string(make([]byte, 20000))+"a hole before"),
		e("d/e/1", unix.S_IFIFO|0o644, ""),
	}
	for i := range 20 {
		files = append(files, e(fmt.Sprintf("d/e/many%d", i), unix.S_IFREG|0o644, strings.Repeat(fmt.Sprint(i), i*100)))
	}
	link := e("a/l", unix.S_IFLNK|0o777, "")
	link.Link = "../d/0"
	hard := lowerFile{Entry: index.Entry{Name: "a/h", HardLink: true, Link: "d/0"}}
	hard2 := lowerFile{Entry: index.Entry{Name: "a/b/h", HardLink: true, Link: "d/0"}}
	x := e("a/x", unix.S_IFREG|0o644, "attributed")
	x.Xattrs = []index.Xattr{{Name: "user.color", Value: []byte("blue")}}
	files = append(files, link, hard, hard2, x)
	for i := range files {
		if !owners && !files[i].HardLink {
			files[i].Mode |= 0o700 // as the model's chmod has it
		}
	}
	if owners {
		for i := range files {
			if i%3 == 2 && !files[i].HardLink {
				files[i].UID, files[i].GID = 1000, 100
			}
		}
	}
	return files
}

// unpack makes a plain directory of what an image has.
func unpack(t *testing.T, dir string, files []lowerFile, owners bool) {
	for _, f := range files {
		path := filepath.Join(dir, f.Name)
		var err error
		switch {
		case f.HardLink:
			err = os.Link(filepath.Join(dir, f.Entry.Link), path)
		case f.Name == "":
		case f.IsRegular():
			err = os.WriteFile(path, []byte(f.content), 0o600)
		case f.Type() == unix.S_IFDIR:
			err = os.Mkdir(path, 0o700)
		case f.Type() == unix.S_IFLNK:
			err = os.Symlink(f.Entry.Link, path)
		default:
			err = unix.Mknod(path, f.Mode, 0)
		}
		if err == nil && owners && !f.HardLink {
			err = os.Lchown(path, int(f.UID), int(f.GID))
		}
		for _, x := range f.Xattrs {
			if err == nil {
				err = unix.Lsetxattr(path, x.Name, x.Value, 0)
			}
		}
		if err == nil && !f.HardLink && f.Type() != unix.S_IFLNK {
			err = unix.Chmod(path, f.Mode&0o7777)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range slices.Backward(files) {
		if !f.HardLink {
			at := unix.Timespec{Sec: f.Mtime, Nsec: int64(f.MtimeNs)}
			if err := unix.UtimesNanoAt(unix.AT_FDCWD, filepath.Join(dir, f.Name), []unix.Timespec{at, at}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestUnionModel does the same random operations to a union and to a plain
// directory and compares the two, also after the union was mounted anew.
func TestUnionModel(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("VARVE_TEST_SEED"); s != "" {
		seed, _ = strconv.ParseUint(s, 10, 64)
	}
	t.Logf("VARVE_TEST_SEED=%d repeats this", seed)
	for _, f := range unionForms {
		t.Run(string(f.form), func(t *testing.T) {
			owners := f.form == upper.Trusted
			files := modelLower(owners)
			u := newUnionTest(t, f.form, f.uid, files)
			plain := filepath.Join(filepath.Dir(u.Dir), "plain")
			if err := os.Mkdir(plain, 0o755); err != nil {
				t.Fatal(err)
			}
			unpack(t, plain, files, owners)
			if f.uid != 0 {
				err := filepath.WalkDir(plain, func(path string, _ fs.DirEntry, err error) error {
					var st unix.Stat_t
					if err := unix.Lstat(path, &st); err != nil {
						return err
					}
					if err := os.Lchown(path, int(f.uid), int(f.uid)); err != nil || st.Mode&unix.S_IFMT == unix.S_IFLNK {
						return err
					}
					return unix.Chmod(path, st.Mode&0o7777) // which chown has changed
				})
				if err != nil {
					t.Fatal(err)
				}
			}
			for round := range uint64(3) {
				unmount := u.mount(t, f.uid)
				inside(t, u, f.uid, "model", "VARVE_TEST_PLAIN="+plain, fmt.Sprint("VARVE_TEST_SEED=", seed+round),
					fmt.Sprint("VARVE_TEST_OWNERS=", owners))
				unmount()
				if t.Failed() {
					return
				}
			}
			if f.form == upper.Trusted {
				compareOverlay(t, u, files, plain)
			}
		})
	}
}

// compareOverlay has the kernel's overlayfs read the upper that a union wrote.
func compareOverlay(t *testing.T, u *unionTest, files []lowerFile, plain string) {
	lower := filepath.Join(filepath.Dir(u.Dir), "lower")
	if err := os.Mkdir(lower, 0o755); err != nil {
		t.Fatal(err)
	}
	unpack(t, lower, files, true)
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s/fs,workdir=%s/work,redirect_dir=off,metacopy=off,index=off", lower, u.Upper, u.Upper)
	if err := unix.Mount("overlay", u.Dir, "overlay", unix.MS_RDONLY, options); err != nil {
		t.Fatalf("mount overlay: %v", err)
	}
	defer unix.Unmount(u.Dir, 0)
	m := &model{t: t, dirs: [2]string{u.Dir, plain}, owners: true, loose: true}
	m.compare()
}

// A model is a union, and a plain directory that has seen the same.
type model struct {
	*rand.Rand
	t       *testing.T
	dirs    [2]string // the union, the plain directory
	owners  bool
	loose   bool // nothing is said of links: overlayfs without an index breaks them
	handles [][2]*os.File
	last    string // what was done, for messages
	done    []string
}

func testModel(t *testing.T, dir string) {
	if os.Getenv("VARVE_TEST_PLAIN") == "" {
		return // it is not this one that is run
	}
	unix.Umask(0o022)
	seed, err := strconv.ParseUint(os.Getenv("VARVE_TEST_SEED"), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	m := &model{Rand: rand.New(rand.NewPCG(seed, 1)), t: t, dirs: [2]string{dir, os.Getenv("VARVE_TEST_PLAIN")}, owners: os.Getenv("VARVE_TEST_OWNERS") == "true"}
	m.compare()
	for i := range 1500 {
		m.step()
		if i%150 == 149 {
			m.compare()
		}
		if t.Failed() {
			tail := m.done[max(0, len(m.done)-40):]
			t.Fatalf("after %d operations, the last of them:\n%s", len(m.done), strings.Join(tail, "\n"))
		}
	}
	for _, h := range m.handles {
		h[0].Close()
		h[1].Close()
	}
}

// paths gives what there is, by the plain directory.
func (m *model) paths(want func(mode fs.FileMode) bool) (paths []string) {
	filepath.WalkDir(m.dirs[1], func(path string, d fs.DirEntry, err error) error {
		if rel, _ := filepath.Rel(m.dirs[1], path); err == nil && want(d.Type()) {
			paths = append(paths, rel)
		}
		return nil
	})
	return paths
}

func (m *model) pick(paths []string) string {
	if len(paths) == 0 {
		return "none"
	}
	return paths[m.IntN(len(paths))]
}

func anything(fs.FileMode) bool { return true }

func (m *model) some() string { return m.pick(m.paths(anything)[1:]) }
func (m *model) file() string { return m.pick(m.paths(fs.FileMode.IsRegular)) }
func (m *model) dir() string  { return m.pick(m.paths(fs.FileMode.IsDir)) }

// name gives one that may be there or not.
func (m *model) name() string { return filepath.Join(m.dir(), strconv.Itoa(m.IntN(4))) }

// both does something in both places and compares how that went.
func (m *model) both(what string, do func(root string) error) {
	m.last = what
	var errs [2]error
	for i, dir := range m.dirs {
		errs[i] = do(dir)
	}
	m.done = append(m.done, fmt.Sprintf("%s: %v", what, errs[1]))
	if a, b := errno(errs[0]), errno(errs[1]); a != b {
		m.t.Errorf("%s: the union says %v, the plain directory %v", what, errs[0], errs[1])
	}
}

func errno(err error) unix.Errno {
	var e unix.Errno
	if err != nil && !errors.As(err, &e) {
		return 9999
	}
	return e
}

func (m *model) step() {
	switch k := m.IntN(23); k {
	case 0, 1:
		name, mode := m.name(), uint32(m.IntN(0o1000))|0o200
		content := bytes.Repeat([]byte{byte(m.IntN(256))}, m.IntN(9000))
		m.both(fmt.Sprintf("create %s", name), func(root string) error {
			fd, err := unix.Open(filepath.Join(root, name), unix.O_CREAT|unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, mode|0o400)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			_, err = unix.Write(fd, content)
			return err
		})
	case 2:
		name := m.name()
		m.both("create new "+name, func(root string) error {
			fd, err := unix.Open(filepath.Join(root, name), unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, 0o640)
			if err == nil {
				unix.Close(fd)
			}
			return err
		})
	case 3, 4:
		name, off, n, flags := m.file(), m.IntN(12000), m.IntN(6000), m.IntN(3)
		flags = []int{0, unix.O_APPEND, unix.O_TRUNC}[flags]
		content := bytes.Repeat([]byte{byte(m.IntN(256))}, n)
		m.both(fmt.Sprintf("write %d at %d of %s, flags %#x", n, off, name, flags), func(root string) error {
			fd, err := unix.Open(filepath.Join(root, name), unix.O_WRONLY|unix.O_NOFOLLOW|flags, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			if flags == unix.O_APPEND {
				_, err = unix.Write(fd, content)
			} else {
				_, err = unix.Pwrite(fd, content, int64(off))
			}
			return err
		})
	case 5:
		name, size := m.file(), int64(m.IntN(15000))
		m.both(fmt.Sprintf("truncate %s to %d", name, size), func(root string) error {
			return unix.Truncate(filepath.Join(root, name), size)
		})
	case 6:
		name := m.name()
		m.both("mkdir "+name, func(root string) error { return unix.Mkdir(filepath.Join(root, name), 0o775) })
	case 7, 8, 9:
		m.rename()
	case 10:
		from, to := m.some(), m.name()
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(m.dirs[1], from), &st); !m.owners && (err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || upper.Tame(st.Mode) != st.Mode) {
			return // protected_hardlinks (proc_sys_fs(5)) stops who does not own such a file: root of the image does
		}
		m.both(fmt.Sprintf("link %s %s", from, to), func(root string) error {
			return unix.Link(filepath.Join(root, from), filepath.Join(root, to))
		})
	case 11, 12:
		name := m.some()
		m.both("unlink "+name, func(root string) error { return unix.Unlink(filepath.Join(root, name)) })
	case 13:
		name := m.dir()
		if name == "." {
			return
		}
		m.both("rmdir "+name, func(root string) error { return unix.Rmdir(filepath.Join(root, name)) })
	case 14:
		name, target := m.name(), m.some()
		m.both("symlink "+name, func(root string) error { return unix.Symlink(target, filepath.Join(root, name)) })
	case 15:
		name, mode := m.some(), uint32(m.IntN(0o10000))
		if !m.owners {
			mode |= 0o700 // the model's user is no root, who could go on without
		}
		m.both(fmt.Sprintf("chmod %s %o", name, mode), func(root string) error {
			if st, err := os.Lstat(filepath.Join(root, name)); err == nil && st.Mode()&fs.ModeSymlink != 0 {
				return nil
			}
			return unix.Chmod(filepath.Join(root, name), mode)
		})
	case 16:
		name, uid, gid := m.some(), m.IntN(3)-1, m.IntN(3)-1
		if !m.owners {
			return
		}
		m.both(fmt.Sprintf("chown %s %d:%d", name, uid, gid), func(root string) error {
			return unix.Lchown(filepath.Join(root, name), uid, gid)
		})
	case 17:
		name, at := m.some(), unix.Timespec{Sec: int64(m.IntN(1e9)), Nsec: int64(m.IntN(1e9))}
		m.both("utimens "+name, func(root string) error {
			return unix.UtimesNanoAt(unix.AT_FDCWD, filepath.Join(root, name), []unix.Timespec{{Nsec: unix.UTIME_OMIT}, at}, unix.AT_SYMLINK_NOFOLLOW)
		})
	case 18:
		name, attr, flags, remove := m.some(), fmt.Sprint("user.", m.IntN(3)), m.IntN(3), m.IntN(3) == 0
		m.both(fmt.Sprintf("xattr %s of %s, flags %d, remove %t", attr, name, flags, remove), func(root string) error {
			if remove {
				return unix.Lremovexattr(filepath.Join(root, name), attr)
			}
			return unix.Lsetxattr(filepath.Join(root, name), attr, []byte(name), flags)
		})
	case 19:
		name, off, n, mode := m.file(), int64(m.IntN(12000)), int64(m.IntN(9000)+1), uint32(m.IntN(3))
		mode = []uint32{0, unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_KEEP_SIZE | unix.FALLOC_FL_PUNCH_HOLE}[mode]
		m.both(fmt.Sprintf("fallocate %d at %d of %s, mode %d", n, off, name, mode), func(root string) error {
			fd, err := unix.Open(filepath.Join(root, name), unix.O_RDWR|unix.O_NOFOLLOW, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			return unix.Fallocate(fd, mode, off, n)
		})
	case 20:
		m.openHandle()
	default:
		m.useHandle()
	}
}

func (m *model) rename() {
	from, to := m.some(), m.name()
	if m.IntN(3) == 0 {
		to = m.some()
	}
	flags := uint([]int{0, 0, unix.RENAME_NOREPLACE, unix.RENAME_EXCHANGE}[m.IntN(4)])
	what := fmt.Sprintf("rename %s %s, flags %d", from, to, flags)
	do := func(root string) error {
		return unix.Renameat2(unix.AT_FDCWD, filepath.Join(root, from), unix.AT_FDCWD, filepath.Join(root, to), flags)
	}
	if err := do(m.dirs[0]); err != unix.EXDEV {
		first := true
		m.both(what, func(root string) error {
			if first {
				first = false
				return err
			}
			return do(root)
		})
		return
	}
	// A directory of the image. mv(1) copies it, if nothing is there yet; hard
	// links that lead out of it would break.
	linked := false
	filepath.WalkDir(filepath.Join(m.dirs[1], from), func(path string, d fs.DirEntry, err error) error {
		var st unix.Stat_t
		linked = linked || unix.Lstat(path, &st) == nil && !d.IsDir() && st.Nlink > 1
		return nil
	})
	_, err := os.Lstat(filepath.Join(m.dirs[1], to))
	if linked || err == nil || flags == unix.RENAME_EXCHANGE || strings.HasPrefix(to+"/", from+"/") || len(m.handles) > 0 {
		return
	}
	m.both("mv "+from+" "+to, func(root string) error {
		if root == m.dirs[1] {
			return do(root)
		}
		out, err := exec.Command("mv", filepath.Join(root, from), filepath.Join(root, to)).CombinedOutput()
		if err != nil {
			m.t.Errorf("mv: %s: %v", out, err)
		}
		return nil
	})
}

func (m *model) openHandle() {
	if len(m.handles) > 4 {
		m.handles[0][0].Close()
		m.handles[0][1].Close()
		m.handles = m.handles[1:]
	}
	name, flags := m.file(), []int{unix.O_RDONLY, unix.O_RDWR}[m.IntN(2)]
	var h [2]*os.File
	i := 0
	m.both(fmt.Sprintf("open %s %d", name, flags), func(root string) error {
		fd, err := unix.Open(filepath.Join(root, name), flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err == nil {
			h[i] = os.NewFile(uintptr(fd), name)
		}
		i++
		return err
	})
	if h[0] != nil && h[1] != nil {
		m.handles = append(m.handles, h)
	}
}

func (m *model) useHandle() {
	if len(m.handles) == 0 {
		return
	}
	h := m.handles[m.IntN(len(m.handles))]
	k, off, n := m.IntN(4), int64(m.IntN(12000)), m.IntN(5000)
	content := bytes.Repeat([]byte{byte(m.IntN(256))}, n)
	i := -1
	var read [2]string
	m.both(fmt.Sprintf("use %s: %d", h[1].Name(), k), func(root string) error {
		i++
		fd := int(h[i].Fd())
		switch k {
		case 0:
			_, err := unix.Pwrite(fd, content, off)
			return err
		case 1:
			return unix.Ftruncate(fd, off)
		case 2:
			return unix.Fchmod(fd, 0o600|uint32(n%64))
		}
		b := make([]byte, 30000)
		k, err := unix.Pread(fd, b, 0)
		var st unix.Stat_t
		if err == nil {
			err = unix.Fstat(fd, &st)
		}
		read[i] = fmt.Sprintf("%d links, size %d, mode %o, %q", st.Nlink, st.Size, st.Mode, b[:max(k, 0)])
		return err
	})
	if diff := cmp.Diff(read[1], read[0]); diff != "" {
		m.t.Errorf("open %s differs (-plain +union):\n%s", h[1].Name(), diff)
	}
}
