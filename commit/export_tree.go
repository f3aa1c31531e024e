package commit

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/fs/upper"
	"github.com/varvefs/varve/index"
)

// merged is the tree that a mount of an image with an upper shows.
type merged struct {
	im   *index.Image
	up   *upper.Dir // nil for the image alone
	only string     // the subtree that is walked

	fn   func(it *leaf) error
	next func() (*upper.Change, error, bool)
	head *upper.Change // of the upper's walk, what comes next; nil at its end
}

// leaf is a name of the merged tree.
type leaf struct {
	change *upper.Change
	in     *index.Inode // where the image's shows; nil where the upper's does
	device int          // where the contents of a regular file of the image lie
	off    int64
}

// walk calls fn for each name of the subtree, in the order of their bytes, a
// directory before what lies in it.
func (m *merged) walk(ctx context.Context, fn func(it *leaf) error) error {
	m.fn = fn
	m.next = func() (*upper.Change, error, bool) { return nil, nil, false }
	if m.up != nil {
		// Both trees come in the same order: they are merged like two lists.
		next, stop := iter.Pull2(func(yield func(*upper.Change, error) bool) {
			err := m.up.Walk(ctx, func(c *upper.Change) error {
				if !yield(c, nil) {
					return errStopped
				}
				return nil
			})
			if err != nil && !errors.Is(err, errStopped) {
				yield(nil, err)
			}
		})
		defer stop()
		m.next = next
	}
	if err := m.advance(); err != nil {
		return err
	}
	root, err := m.im.Inode(m.im.Root())
	if err != nil {
		return err
	}
	return m.name("", &root, m.take(""))
}

var errStopped = errors.New("stopped")

func (m *merged) advance() error {
	c, err, ok := m.next()
	if err != nil {
		return fmt.Errorf("read the upper: %w", err)
	}
	if m.head = c; !ok {
		m.head = nil
	}
	return nil
}

// take gives what the upper has by a path, nil if nothing. It does not advance.
func (m *merged) take(path string) *upper.Change {
	if m.head != nil && m.head.Path == path {
		return m.head
	}
	return nil
}

// name walks one name: what the image has, what the upper has, either of them
// may be nil.
func (m *merged) name(path string, in *index.Inode, c *upper.Change) error {
	if c != nil {
		if err := m.advance(); err != nil {
			return err
		}
	}
	it := &leaf{change: c}
	switch {
	case c != nil && c.Whiteout:
		return nil
	case c == nil:
		var err error
		if it, err = m.fromImage(path, in); err != nil {
			return fmt.Errorf("%.200q in the image: %w", path, err)
		}
	}
	inside := within(path, m.only)
	if inside {
		if err := m.fn(it); err != nil {
			return err
		}
	}
	if !it.change.IsDir() {
		return nil
	}
	if in != nil && (!in.IsDir() || c != nil && c.Opaque) {
		in = nil
	}
	if !inside && !within(m.only, path) {
		if c == nil {
			return nil
		}
		in = nil // nothing of it is wanted, but the upper's walk goes through it
	}
	return m.dir(path, in, c != nil)
}

// dir walks what is in a directory.
func (m *merged) dir(path string, in *index.Inode, has bool) error {
	var lower []string
	if in != nil {
		var err error
		if lower, err = childNames(m.im, in); err != nil {
			return fmt.Errorf("%.200q in the image: %w", path, err)
		}
	}
	for {
		var c *upper.Change
		var name string
		if has && m.head != nil {
			if dir, base := splitName(m.head.Path); dir == path {
				c, name = m.head, base
			}
		}
		var kid *index.Inode
		switch {
		case len(lower) == 0 && c == nil:
			return nil
		case c == nil || len(lower) > 0 && lower[0] < name:
			c, name = nil, lower[0]
		}
		if len(lower) > 0 && lower[0] == name {
			lower = lower[1:]
			var err error
			if kid, err = m.inode(in, name); err != nil {
				return fmt.Errorf("%.200q in the image: %w", join(path, name), err)
			}
		}
		if err := m.name(join(path, name), kid, c); err != nil {
			return err
		}
	}
}

func (m *merged) inode(dir *index.Inode, name string) (*index.Inode, error) {
	nid, err := m.im.Lookup(dir, name)
	if err != nil {
		return nil, err
	}
	in, err := m.im.Inode(nid)
	return &in, err
}

// fromImage describes a name of the image as the upper would.
func (m *merged) fromImage(path string, in *index.Inode) (*leaf, error) {
	c := &upper.Change{
		Path: path, Mode: in.Mode, UID: in.UID, GID: in.GID, Nlink: in.Nlink, Ino: in.Nid,
		Mtime: unix.Timespec{Sec: in.Mtime, Nsec: int64(in.MtimeNs)},
	}
	it := &leaf{change: c, in: in}
	switch c.Type() {
	case unix.S_IFREG:
		c.Size = in.Size
		var err error
		if it.device, it.off, _, err = m.im.Extent(in); err != nil {
			return nil, err
		}
	case unix.S_IFLNK:
		link, err := m.im.Readlink(in)
		if err != nil {
			return nil, err
		}
		c.Link = string(link)
	case unix.S_IFCHR, unix.S_IFBLK:
		c.Rdev = unix.Mkdev(index.Major(in.Rdev), index.Minor(in.Rdev))
	}
	err := m.im.Xattrs(in, func(prefix string, rest, value []byte) bool {
		c.Xattrs = append(c.Xattrs, upper.Xattr{Name: prefix + string(rest), Value: value})
		return true
	})
	return it, err
}

// within reports whether a path is dir or lies in it.
func within(p, dir string) bool {
	return dir == "" || p == dir || len(p) > len(dir) && strings.HasPrefix(p, dir) && p[len(dir)] == '/'
}
