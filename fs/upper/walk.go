package upper

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Limits of what a walk goes through. They are the index's: what is larger could
// be committed, but not be mounted again.
const (
	maxNames  = 2 << 20   // names in one upper
	maxDepth  = 1024      // directories in one another
	maxPath   = 4095      // bytes of a path
	maxLink   = 4095      // bytes of a symlink's target
	maxXattrs = 128 << 10 // bytes of a file's extended attributes
)

// ErrUnsupported is wrapped by errors about what an upper holds and no writer of
// ours can have left: a redirect, a mount point, names without end.
var ErrUnsupported = errors.New("cannot be read as an upper of varve's")

// Xattr is one extended attribute with its full name as a mount shows it.
type Xattr struct {
	Name  string
	Value []byte
}

// Change is one name of an upper, as a mount would show it.
type Change struct {
	Path     string // relative to the root, "" is the root
	Whiteout bool   // the name is deleted; nothing but Path is set beside it
	Opaque   bool   // a directory below which nothing of the lower shows

	Mode     uint32 // st_mode
	UID, GID uint32
	Rdev     uint64 // of a device, as stat(2) gives it
	Size     int64  // bytes of a regular file or of a symlink's target, else 0
	Mtime    unix.Timespec
	Link     string  // a symlink's target
	Xattrs   []Xattr // sorted by name; none of overlayfs' or ours

	Ino   uint64 // of the file in the upper: names that share it are hard links
	Nlink uint32 // of the file in the upper, so it counts names outside of the tree as well
}

// Type gives the S_IFMT bits.
func (c *Change) Type() uint32 { return c.Mode & unix.S_IFMT }

// IsDir reports whether the name is a directory.
func (c *Change) IsDir() bool { return c.Type() == unix.S_IFDIR }

// Walk calls fn for everything in the upper, the root first, a directory before
// what it holds, siblings in the order of their bytes. fn may keep what it is
// given. It holds a descriptor and the names of each directory on the way down,
// and nothing else.
//
// A name that goes while Walk is on its way to it is left out; whether the
// upper stood still is what [Dir.Stamp] tells.
func (d *Dir) Walk(ctx context.Context, fn func(c *Change) error) error {
	var r reader
	return d.scan(ctx, func(n *node) error {
		c, err := r.change(d, n)
		if err != nil {
			if errors.Is(err, unix.ENOENT) && n.fd < 0 {
				return nil
			}
			return fmt.Errorf("%s: %w", clip(n.path), err)
		}
		return fn(c)
	})
}

// Open opens the contents of a regular file of the upper. No symlink is followed
// on the way to it, no filesystem but the upper's own is entered, and nothing but
// a regular file is opened at all: a device may do things when it is. The caller
// closes it.
//
// In an upper of the form Override a symlink of the mount is a regular file here
// ([Change.Link] has its target).
func (d *Dir) Open(name string) (*os.File, error) {
	how := unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV,
	}
	fd, err := retry(func() (int, error) { return unix.Openat2(d.tree, name, &how) })
	if err != nil {
		return nil, fmt.Errorf("open %s in the upper: %w", clip(name), err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("open %s in the upper: %w", clip(name), err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fmt.Errorf("open %s in the upper: %w: not a regular file", clip(name), unix.EINVAL)
	}
	file, err := openQuietly(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("open %s in the upper: %w", clip(name), err)
	}
	return os.NewFile(uintptr(file), path.Base(name)), nil
}

// openQuietly opens for reading without leaving a trace in the access time where
// that is allowed: to root and to the owner.
func openQuietly(dirfd int, name string, flags int) (int, error) {
	flags |= unix.O_RDONLY | unix.O_CLOEXEC
	fd, err := retry(func() (int, error) { return unix.Openat(dirfd, name, flags|unix.O_NOATIME, 0) })
	if errors.Is(err, unix.EPERM) {
		fd, err = retry(func() (int, error) { return unix.Openat(dirfd, name, flags, 0) })
	}
	return fd, err
}

// retry repeats what a signal interrupted, or what openat2 could not prove while
// somebody renamed (EAGAIN, openat2(2)).
func retry(open func() (int, error)) (int, error) {
	for range 100 {
		fd, err := open()
		if !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.EAGAIN) {
			return fd, err
		}
	}
	return -1, unix.EAGAIN
}

// node is a name that a scan has come to.
type node struct {
	path  string
	dirfd int    // of its directory, and
	name  string // its name there; of the root "."
	fd    int    // of a directory its own, else -1
	st    unix.Statx_t
}

func (n *node) typ() uint32 { return uint32(n.st.Mode) & unix.S_IFMT }

func (n *node) isWhiteout() bool {
	return n.typ() == unix.S_IFCHR && n.st.Rdev_major == 0 && n.st.Rdev_minor == 0
}

// scanner goes through the names of an upper.
type scanner struct {
	ctx   context.Context
	visit func(n *node) error
	dev   [2]uint32 // the device the upper lies on
	names int
	buf   []byte // for getdents
}

const statxMask = unix.STATX_BASIC_STATS

// scan calls visit for every name, in the order that [Dir.Walk] promises.
func (d *Dir) scan(ctx context.Context, visit func(n *node) error) error {
	s := scanner{ctx: ctx, visit: visit, buf: make([]byte, 64<<10)}
	fd, err := openQuietly(d.tree, ".", unix.O_DIRECTORY|unix.O_NOFOLLOW)
	if err != nil {
		return fmt.Errorf("open the upper: %w", err)
	}
	defer unix.Close(fd)
	root := node{dirfd: fd, name: ".", fd: fd}
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, statxMask, &root.st); err != nil {
		return fmt.Errorf("stat the upper: %w", err)
	}
	s.dev = [2]uint32{root.st.Dev_major, root.st.Dev_minor}
	if err := visit(&root); err != nil {
		return err
	}
	return s.dir(&root, 0)
}

// dir goes through a directory that has been visited itself.
func (s *scanner) dir(parent *node, depth int) error {
	if err := s.ctx.Err(); err != nil {
		return err
	}
	if depth > maxDepth {
		return fmt.Errorf("%s: %w: more than %d directories in one another", clip(parent.path), ErrUnsupported, maxDepth)
	}
	names, err := s.list(parent)
	if err != nil {
		return fmt.Errorf("read directory %s: %w", clip(parent.path), err)
	}
	for _, name := range names {
		if err := s.entry(parent, name, depth); err != nil {
			return err
		}
	}
	return nil
}

// list gives the names of a directory, sorted.
func (s *scanner) list(dir *node) ([]string, error) {
	var names []string
	for {
		n, err := retry(func() (int, error) { return unix.ReadDirent(dir.fd, s.buf) })
		if err != nil {
			return nil, err
		}
		if n == 0 {
			break
		}
		_, found, more := unix.ParseDirent(s.buf[:n], -1, names)
		if s.names += found; s.names > maxNames {
			return nil, fmt.Errorf("%w: more than %d names", ErrUnsupported, maxNames)
		}
		names = more
	}
	slices.Sort(names)
	return names, nil
}

// entry visits a name, and what is below it.
func (s *scanner) entry(parent *node, name string, depth int) error {
	n := node{path: name, dirfd: parent.fd, name: name, fd: -1}
	if parent.path != "" {
		n.path = parent.path + "/" + name
	}
	if len(n.path) > maxPath {
		return fmt.Errorf("%s: %w: a path of %d bytes, the limit is %d", clip(n.path), ErrUnsupported, len(n.path), maxPath)
	}
	const flags = unix.AT_SYMLINK_NOFOLLOW | unix.AT_NO_AUTOMOUNT
	err := unix.Statx(parent.fd, name, flags, statxMask, &n.st)
	if err == nil && n.typ() == unix.S_IFDIR {
		err = n.openDir()
	}
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read %s in the upper: %w", clip(n.path), err)
	}
	if n.fd >= 0 {
		defer unix.Close(n.fd)
	}
	// What is mounted there is no part of the upper, and no commit's. A bind mount
	// from the same filesystem has its device number.
	if n.st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0 || s.dev != [2]uint32{n.st.Dev_major, n.st.Dev_minor} {
		return fmt.Errorf("%s: %w: something is mounted there inside the upper: unmount it", clip(n.path), ErrUnsupported)
	}
	if err := s.visit(&n); err != nil {
		return err
	}
	if n.fd < 0 {
		return nil
	}
	return s.dir(&n, depth+1)
}

// openDir opens a directory and takes its attributes from what was opened.
func (n *node) openDir() (err error) {
	if n.fd, err = openQuietly(n.dirfd, n.name, unix.O_DIRECTORY|unix.O_NOFOLLOW); err != nil {
		n.fd = -1
		return err
	}
	if err = unix.Statx(n.fd, "", unix.AT_EMPTY_PATH, statxMask, &n.st); err != nil {
		unix.Close(n.fd)
		n.fd = -1
	}
	return err
}

// clip keeps a hostile name from filling a message.
func clip(name string) string {
	if name == "" {
		return "the root"
	}
	if len(name) > 200 {
		name = name[:200] + "…"
	}
	return fmt.Sprintf("%q", strings.ToValidUTF8(name, "\uFFFD"))
}
