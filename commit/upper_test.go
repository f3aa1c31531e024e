package commit

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/fs/upper"
	"github.com/varvefs/varve/index"
)

// scratch gives a directory on a filesystem that may be an overlay's upper.
func scratch(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "varve-commit-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting overlayfs needs root")
	}
}

// overlay mounts the kernel's overlayfs with a new upper over a directory, and
// gives where, and the upper. The upper stays open when it is unmounted.
func overlay(t *testing.T, form upper.Form, lower string) (merged string, up *upper.Dir) {
	t.Helper()
	needRoot(t)
	dir := scratch(t)
	var st unix.Stat_t
	ok(t, unix.Stat(lower, &st))
	up, err := upper.Create(filepath.Join(dir, "up"), upper.About{Form: form}, upper.Attr{Mode: st.Mode, UID: st.Uid, GID: st.Gid, Mtime: st.Mtim})
	ok(t, err)
	t.Cleanup(func() { up.Close() })
	merged = filepath.Join(dir, "merged")
	ok(t, os.Mkdir(merged, 0o755))
	options := "redirect_dir=nofollow,metacopy=off,index=off"
	if form == upper.User {
		options = "userxattr,index=off"
	}
	options += ",lowerdir=" + lower + ",upperdir=" + up.Tree() + ",workdir=" + up.Work()
	ok(t, unix.Mount("overlay", merged, "overlay", 0, options))
	t.Cleanup(func() { unix.Unmount(merged, unix.MNT_DETACH) })
	return merged, up
}

// seen is what there is to see of a name.
type seen struct {
	mode, uid, gid uint32
	rdev           uint64
	mtime          int64
	size           int64
	data, xattrs   string
	group          string // the first of its hard links
}

// look reads a tree.
func look(t *testing.T, root string) map[string]seen {
	t.Helper()
	tree := map[string]seen{}
	first := map[uint64]string{}
	ok(t, filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, path)
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		s := seen{mode: st.Mode, uid: st.Uid, gid: st.Gid, mtime: st.Mtim.Sec}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			s.size, s.data = st.Size, fmt.Sprintf("%.6x", sha256.Sum256(b))
		case unix.S_IFLNK:
			s.data, _ = os.Readlink(path)
		case unix.S_IFCHR, unix.S_IFBLK:
			s.rdev = st.Rdev
		}
		if rel == "." {
			s.mtime = 0
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			if first[st.Ino] == "" {
				first[st.Ino] = rel
			}
			s.group = first[st.Ino]
		}
		for _, x := range listXattrs(t, path) {
			s.xattrs += fmt.Sprintf("%s=%x ", x.Name, x.Value)
		}
		tree[rel] = s
		return nil
	}))
	return tree
}

func listXattrs(t *testing.T, path string) []upper.Xattr {
	t.Helper()
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, buf)
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		t.Fatal(path, err)
	}
	var all []upper.Xattr
	for _, name := range strings.Split(strings.Trim(string(buf[:max(n, 0)]), "\x00"), "\x00") {
		if name == "" {
			continue
		}
		v := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(path, name, v)
		if err != nil {
			t.Fatal(path, name, err)
		}
		all = append(all, upper.Xattr{Name: name, Value: v[:n]})
	}
	slices.SortFunc(all, func(a, b upper.Xattr) int { return strings.Compare(a.Name, b.Name) })
	return all
}

func sameTrees(t *testing.T, what string, want, got map[string]seen) {
	t.Helper()
	if d := cmp.Diff(want, got, cmp.AllowUnexported(seen{})); d != "" {
		t.Errorf("%s (-want +got):\n%s", what, d)
	}
}

// file is the data of the one layer of imageOf.
type file struct {
	*os.File
	asked atomic.Int64
}

func (f *file) Hold(_, n int64) error { f.asked.Add(n); return nil }
func (f *file) Release()              {}
func (f *file) Fd() int               { return int(f.File.Fd()) }

// imageOf makes the index and the data of an image that has a directory's tree.
func imageOf(t *testing.T, root string) (*index.Image, []Data) {
	t.Helper()
	dir := scratch(t)
	data, err := os.Create(filepath.Join(dir, "data"))
	ok(t, err)
	t.Cleanup(func() { data.Close() })
	tree := look(t, root)
	var entries []index.Entry
	var end int64
	for _, rel := range slices.Sorted(maps.Keys(tree)) {
		s := tree[rel]
		path := filepath.Join(root, rel)
		var st unix.Stat_t
		ok(t, unix.Lstat(path, &st))
		e := index.Entry{Mode: s.mode, UID: s.uid, GID: s.gid, Mtime: st.Mtim.Sec, MtimeNs: uint32(st.Mtim.Nsec), Size: s.size}
		if rel != "." {
			e.Name = rel
		}
		for _, x := range listXattrs(t, path) {
			e.Xattrs = append(e.Xattrs, index.Xattr(x))
		}
		switch s.mode & unix.S_IFMT {
		case unix.S_IFLNK:
			e.Link = s.data
		case unix.S_IFCHR, unix.S_IFBLK:
			e.Rdev, err = index.Mkdev(int64(unix.Major(s.rdev)), int64(unix.Minor(s.rdev)))
			ok(t, err)
		}
		if s.group != "" && s.group != rel {
			e = index.Entry{Name: rel, HardLink: true, Link: s.group}
		} else if s.size > 0 {
			b, err := os.ReadFile(path)
			ok(t, err)
			e.Data = end
			_, err = data.WriteAt(b, end)
			ok(t, err)
			end = (end + s.size + index.BlockSize - 1) / index.BlockSize * index.BlockSize
		}
		entries = append(entries, e)
	}
	merged, err := index.Merge([][]index.Entry{entries})
	ok(t, err)
	path := filepath.Join(dir, "index.erofs")
	f, err := os.Create(path)
	ok(t, err)
	defer f.Close()
	ok(t, merged.WriteTo(f, []index.Device{{Tag: strings.Repeat("a", 64), Size: end}}))
	im, err := index.Open(path)
	ok(t, err)
	t.Cleanup(func() { im.Close() })
	return im, []Data{&file{File: data}}
}

// fill makes the lower of the tests that change at random.
func fill(t *testing.T, root string, r *rand.Rand, regular bool) {
	t.Helper()
	needRoot(t)
	ok(t, os.MkdirAll(root, 0o755))
	c := changer{t: t, root: root, r: r, regular: regular}
	for range 80 {
		c.create()
	}
	for range 20 {
		c.attribute()
	}
}

// changer changes a tree at random.
type changer struct {
	t    *testing.T
	root string
	r    *rand.Rand
	n    int

	// Hard links of regular files alone: tar keeps no others but a symlink's, and
	// overlayfs with userxattr, which can mark no others, may show two inodes.
	regular bool
}

func (c *changer) paths(dirs bool) []string {
	var all []string
	filepath.WalkDir(c.root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && (dirs && d.IsDir() || !dirs && path != c.root) {
			all = append(all, path)
		}
		return err
	})
	return all
}

func (c *changer) pick(dirs bool) string {
	all := c.paths(dirs)
	if len(all) == 0 {
		return c.root
	}
	return all[c.r.IntN(len(all))]
}

// name gives a name that may be there already.
func (c *changer) name() string {
	names := []string{"a", "a.b", "a-b", "b", "c", "ä", "lib", "lib.d", "x y", "Z", strings.Repeat("long", 26)}
	c.n++
	if c.r.IntN(3) == 0 {
		return fmt.Sprintf("n%d", c.n)
	}
	return names[c.r.IntN(len(names))]
}

func (c *changer) create() {
	path := filepath.Join(c.pick(true), c.name())
	if _, err := os.Lstat(path); err == nil {
		return
	}
	switch c.r.IntN(10) {
	case 0, 1, 2, 3:
		ok(c.t, os.WriteFile(path, []byte(strings.Repeat(path, c.r.IntN(200))), 0o644))
	case 4, 5, 6:
		ok(c.t, os.Mkdir(path, 0o755))
	case 7:
		ok(c.t, os.Symlink(c.name(), path))
	case 8:
		if c.r.IntN(2) == 0 {
			ok(c.t, unix.Mkfifo(path, 0o600))
		} else {
			ok(c.t, unix.Mknod(path, unix.S_IFCHR|0o600, int(unix.Mkdev(1, uint32(3+c.r.IntN(300))))))
		}
	case 9:
		from := c.pick(false)
		st, err := os.Lstat(from)
		ok(c.t, err)
		if from != c.root && (!c.regular || st.Mode().IsRegular()) {
			if err := os.Link(from, path); err != nil && !errors.Is(err, unix.EPERM) {
				c.t.Fatal(err) // EPERM: a directory
			}
		}
	}
}

func (c *changer) attribute() {
	path := c.pick(false)
	st, err := os.Lstat(path)
	if err != nil || path == c.root {
		return
	}
	link := st.Mode()&os.ModeSymlink != 0
	switch c.r.IntN(5) {
	case 0:
		if !link {
			mode := []uint32{0o700, 0o4755, 0o1777, 0o2750, 0}[c.r.IntN(5)]
			if st.IsDir() {
				mode &^= unix.S_ISGID // tar forgets that new directories inherit it
			}
			ok(c.t, unix.Chmod(path, mode))
		}
	case 1:
		ok(c.t, os.Lchown(path, c.r.IntN(70000), c.r.IntN(3)))
	case 2:
		ok(c.t, unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{{Sec: 1}, {Sec: int64(c.r.IntN(2e9)) - 1e6, Nsec: 123456789}}, unix.AT_SYMLINK_NOFOLLOW))
	case 3:
		if st.Mode().IsRegular() || st.IsDir() {
			ok(c.t, unix.Setxattr(path, "user."+c.name(), []byte("\x00\xff"+path), 0))
		}
	case 4:
		if st.Mode().IsRegular() {
			ok(c.t, unix.Setxattr(path, "security.capability", []byte("\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), 0))
		}
	}
}

func (c *changer) change() {
	path := c.pick(false)
	st, err := os.Lstat(path)
	if err != nil || path == c.root {
		return
	}
	switch c.r.IntN(9) {
	case 0, 1, 2:
		c.create()
	case 3:
		ok(c.t, os.RemoveAll(path))
	case 4: // replaced by what is of another kind, or again of the same
		ok(c.t, os.RemoveAll(path))
		if c.r.IntN(2) == 0 {
			ok(c.t, os.Mkdir(path, 0o755))
			ok(c.t, os.WriteFile(filepath.Join(path, c.name()), []byte("in a new directory"), 0o600))
		} else {
			ok(c.t, os.WriteFile(path, []byte("in its place"), 0o600))
		}
	case 5:
		if st.Mode().IsRegular() {
			f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
			ok(c.t, err)
			f.WriteString("more")
			f.Close()
		}
	case 6:
		to := filepath.Join(c.pick(true), c.name())
		if err := os.Rename(path, to); err != nil {
			return // a directory of the lower, or into itself
		}
	default:
		c.attribute()
	}
}

// seed gives a source of randomness and says how to have it again.
func seed(t *testing.T, n uint64) *rand.Rand {
	t.Logf("seed %d", n)
	return rand.New(rand.NewPCG(n, 1))
}
