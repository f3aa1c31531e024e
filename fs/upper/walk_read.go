package upper

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// reader turns what a scan comes to into changes. Its buffers are used again.
type reader struct {
	names []byte // of extended attributes
	value []byte
	link  []byte
}

// marks are overlayfs' own attributes that say nothing of what a mount shows
// (fs/overlayfs/overlayfs.h, enum ovl_xattr). All others make an upper lean on
// something else: a redirect on another name of the lower, metacopy on the
// lower's contents, and whiteout is a form of deletion that no upper is written
// in.
var marks = []string{"opaque", "impure", "origin", "nlink", "upper", "uuid", "protattr"}

// change reads what a stat does not tell.
func (r *reader) change(d *Dir, n *node) (*Change, error) {
	if n.isWhiteout() {
		return &Change{Path: n.path, Whiteout: true}, nil
	}
	c := &Change{
		Path: n.path, Mode: uint32(n.st.Mode), UID: n.st.Uid, GID: n.st.Gid,
		Mtime: unix.Timespec{Sec: n.st.Mtime.Sec, Nsec: int64(n.st.Mtime.Nsec)},
		Ino:   n.st.Ino, Nlink: n.st.Nlink,
	}
	if t := c.Type(); t == unix.S_IFCHR || t == unix.S_IFBLK {
		c.Rdev = unix.Mkdev(n.st.Rdev_major, n.st.Rdev_minor)
	}
	if d.Form == Override {
		if c.UID == d.UID {
			c.UID = 0
		}
		if c.GID == d.GID {
			c.GID = 0
		}
	}
	owner, err := r.xattrs(d.Form, n, c)
	if err != nil {
		return nil, err
	}
	if owner != "" {
		if err := r.override(n, c, owner); err != nil {
			return nil, err
		}
	}
	switch c.Type() {
	case unix.S_IFREG:
		c.Size = int64(n.st.Size)
	case unix.S_IFLNK:
		if c.Link == "" {
			if c.Link, err = r.readlink(n); err != nil {
				return nil, err
			}
		}
		c.Size = int64(len(c.Link))
	}
	return c, nil
}

// override applies an [OverrideXattr].
func (r *reader) override(n *node, c *Change, value string) error {
	o, err := ParseOwner(value, c.Mode)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnsupported, err)
	}
	if o.Mode&unix.S_IFMT != c.Type() {
		// Only a regular file stands for something else.
		if c.Type() != unix.S_IFREG || o.Mode&unix.S_IFMT == unix.S_IFDIR {
			return fmt.Errorf("%w: %s says %.60q of something of another type", ErrUnsupported, OverrideXattr, value)
		}
		switch o.Mode & unix.S_IFMT {
		case unix.S_IFLNK:
			if c.Link, err = r.standIn(n); err != nil {
				return err
			}
		case unix.S_IFCHR:
			if o.Rdev == 0 {
				return fmt.Errorf("%w: a device 0:0 cannot be told from a deleted name", ErrUnsupported)
			}
		}
	}
	c.UID, c.GID, c.Mode, c.Rdev = o.UID, o.GID, o.Mode, o.Rdev
	if c.Type() == unix.S_IFLNK {
		c.Mode = unix.S_IFLNK | 0o777 // there are no others
	}
	return nil
}

// standIn reads the target of a symlink that is a regular file on disk.
func (r *reader) standIn(n *node) (string, error) {
	// Whatever is there now: not through a link, and not waiting for a FIFO.
	fd, err := openQuietly(n.dirfd, n.name, unix.O_NOFOLLOW|unix.O_NONBLOCK)
	if err != nil {
		return "", err
	}
	f := os.NewFile(uintptr(fd), n.name)
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxLink+1))
	if err != nil {
		return "", err
	}
	return target(b)
}

func (r *reader) readlink(n *node) (string, error) {
	if r.link == nil {
		r.link = make([]byte, maxLink+1)
	}
	size, err := unix.Readlinkat(n.dirfd, n.name, r.link)
	if err != nil {
		return "", err
	}
	return target(r.link[:size])
}

func target(b []byte) (string, error) {
	if len(b) == 0 || len(b) > maxLink || slices.Contains(b, 0) {
		return "", fmt.Errorf("%w: a symlink's target of %d bytes, or with a NUL byte in it", ErrUnsupported, len(b))
	}
	return string(b), nil
}

// xattrs reads the extended attributes into c, and gives that of [OverrideXattr].
func (r *reader) xattrs(form Form, n *node, c *Change) (owner string, err error) {
	// llistxattr has no form with a directory's descriptor before Linux 6.13; the
	// descriptor's magic link and a single name come to the same.
	var at string
	if n.fd < 0 {
		at = fmt.Sprintf("/proc/self/fd/%d/%s", n.dirfd, n.name)
	}
	list, err := grow(&r.names, func(b []byte) (int, error) {
		if n.fd >= 0 {
			return unix.Flistxattr(n.fd, b)
		}
		return unix.Llistxattr(at, b)
	})
	if errors.Is(err, unix.EOPNOTSUPP) || err == nil && len(list) == 0 {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("list extended attributes: %w", err)
	}
	total := 0
	for name := range strings.SplitSeq(strings.TrimSuffix(string(list), "\x00"), "\x00") {
		mark, own := strings.CutPrefix(name, form.prefix())
		own = own && !strings.HasPrefix(mark, "overlay.")
		if own && !slices.Contains(marks, mark) {
			return "", fmt.Errorf("%w: it has %s: this upper was written by an overlayfs mounted with other options than varve's", ErrUnsupported, name)
		}
		shown, ok := form.Shown(name)
		if !ok && name != form.OpaqueXattr() && name != OverrideXattr {
			continue
		}
		value, err := grow(&r.value, func(b []byte) (int, error) {
			if n.fd >= 0 {
				return unix.Fgetxattr(n.fd, name, b)
			}
			return unix.Lgetxattr(at, name, b)
		})
		if errors.Is(err, unix.ENODATA) {
			continue // gone since, or listed to those who may not read it
		}
		if err != nil {
			return "", fmt.Errorf("read extended attribute %q: %w", name, err)
		}
		switch {
		case ok:
			c.Xattrs = append(c.Xattrs, Xattr{Name: shown, Value: slices.Clone(value)})
		case name == OverrideXattr:
			owner = string(value)
		case string(value) == "x":
			return "", fmt.Errorf("%w: its deletions are extended attributes", ErrUnsupported)
		default:
			// Of the root overlayfs does not ask.
			c.Opaque = string(value) == "y" && n.fd >= 0 && n.path != ""
		}
		if total += len(name) + len(value); total > maxXattrs {
			return "", fmt.Errorf("%w: more than %d bytes of extended attributes", ErrUnsupported, maxXattrs)
		}
	}
	slices.SortFunc(c.Xattrs, func(a, b Xattr) int { return strings.Compare(a.Name, b.Name) })
	return owner, nil
}

// grow calls get with a buffer until it is large enough.
func grow(buf *[]byte, get func(b []byte) (int, error)) ([]byte, error) {
	const most = 64 << 10 // XATTR_LIST_MAX and XATTR_SIZE_MAX
	if *buf == nil {
		*buf = make([]byte, 4<<10)
	}
	for {
		n, err := get(*buf)
		if errors.Is(err, unix.ERANGE) && len(*buf) < most {
			*buf = make([]byte, most)
			continue
		}
		if err != nil {
			return nil, err
		}
		return (*buf)[:n], nil
	}
}
