package commit

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/fs/upper"
	"github.com/varvefs/varve/index"
)

// below follows a walk of an upper through the image: it answers for each name
// what the image has there. It looks names up in the directories that the walk
// goes through, and in no others. Not safe for concurrent use.
type below struct {
	im    *index.Image
	stack []level
}

// level is a directory of the upper on the walk's way.
type level struct {
	path  string
	in    index.Inode // the image's directory of that name, if
	has   bool        // it has one
	shows bool        // and something of it can show through the upper's
}

// at is what the image has under a name.
type at struct {
	in    index.Inode
	has   bool // it has something there
	shows bool // which the mount would show, were the name not in the upper
}

func newBelow(im *index.Image) *below { return &below{im: im} }

// find answers for the next change of a walk, and goes down with it where it is a
// directory.
func (b *below) find(c *upper.Change) (at, error) {
	if c.Path == "" {
		in, err := b.im.Inode(b.im.Root())
		b.stack = append(b.stack[:0], level{in: in, has: true, shows: true})
		return at{in, true, true}, err
	}
	dir, name := splitName(c.Path)
	for len(b.stack) > 1 && b.stack[len(b.stack)-1].path != dir {
		b.stack = b.stack[:len(b.stack)-1]
	}
	parent := &b.stack[len(b.stack)-1]
	var a at
	if parent.has {
		nid, err := b.im.Lookup(&parent.in, name)
		if err == nil {
			a.in, err = b.im.Inode(nid)
			a.has, a.shows = err == nil, parent.shows
		}
		if err != nil && !errors.Is(err, index.ErrNotExist) {
			return a, fmt.Errorf("%q in the image: %w", c.Path, err)
		}
	}
	if !c.Whiteout && c.IsDir() {
		isDir := a.has && a.in.IsDir()
		b.stack = append(b.stack, level{path: c.Path, in: a.in, has: isDir, shows: isDir && a.shows && !c.Opaque})
	}
	return a, nil
}

func splitName(p string) (dir, base string) {
	i := strings.LastIndexByte(p, '/')
	return p[:max(i, 0)], p[i+1:]
}

// childNames gives the names that a directory of the image has, in the order of their
// bytes.
func childNames(im *index.Image, dir *index.Inode) ([]string, error) {
	var all []string
	err := im.ReadDir(dir, 0, func(d index.Dirent, _ uint64) bool {
		if s := string(d.Name); s != "." && s != ".." {
			all = append(all, s)
		}
		return true
	})
	return all, err
}

// sameAttrs reports whether the upper gives a name the attributes that the image
// does: type, mode, owner, device number, symlink's target, extended attributes.
// Times are not among them.
func (b *below) sameAttrs(c *upper.Change, in *index.Inode) (bool, error) {
	if c.Mode != in.Mode || c.UID != in.UID || c.GID != in.GID {
		return false, nil
	}
	switch c.Type() {
	case unix.S_IFCHR, unix.S_IFBLK:
		if unix.Major(c.Rdev) != index.Major(in.Rdev) || unix.Minor(c.Rdev) != index.Minor(in.Rdev) {
			return false, nil
		}
	case unix.S_IFLNK:
		link, err := b.im.Readlink(in)
		if err != nil || string(link) != c.Link {
			return false, err
		}
	}
	return b.sameXattrs(c, in)
}

func (b *below) sameXattrs(c *upper.Change, in *index.Inode) (bool, error) {
	ours := map[string][]byte{}
	for _, x := range c.Xattrs {
		if !leftOut(x.Name) {
			ours[x.Name] = x.Value
		}
	}
	same := true
	err := b.im.Xattrs(in, func(prefix string, rest, value []byte) bool {
		name := prefix + string(rest)
		if leftOut(name) {
			return true
		}
		v, ok := ours[name]
		same = ok && bytes.Equal(v, value)
		delete(ours, name)
		return same
	})
	return same && len(ours) == 0, err
}

// unchanged reports whether something of the upper provably is what the image has
// in its place. Of a regular file the upper alone cannot tell, unless it is
// empty: its contents may differ where all else is the same. The time of a
// directory's change is none of its own: see [Entries].
func (b *below) unchanged(c *upper.Change, in *index.Inode) (bool, error) {
	switch c.Type() {
	case unix.S_IFDIR:
		return b.sameAttrs(c, in)
	case unix.S_IFREG:
		if c.Size != 0 || in.Size != 0 {
			return false, nil
		}
	}
	if c.Nlink > 1 || in.Nlink > 1 || !sameTime(c, in) {
		return false, nil
	}
	return b.sameAttrs(c, in)
}

// sameTime compares as a layer would keep it: in seconds.
func sameTime(c *upper.Change, in *index.Inode) bool { return c.Mtime.Sec == in.Mtime }

// mtime is the time of a change as a layer keeps it.
func mtime(c *upper.Change) time.Time { return time.Unix(c.Mtime.Sec, 0).UTC() }

// leftOut reports whether an extended attribute has no place in a layer: what
// says something of the machine and its policy rather than of the file (labels
// that a security module gives every file, hashes made with the machine's own
// key, the forms in which network filesystems show what ACLs they have), and
// marks.
func leftOut(name string) bool {
	if rest, ok := strings.CutPrefix(name, "security."); ok {
		return rest == "selinux" || rest == "apparmor" || rest == "evm" || strings.HasPrefix(rest, "SMACK64")
	}
	if rest, ok := strings.CutPrefix(name, "system."); ok {
		return rest != "posix_acl_access" && rest != "posix_acl_default"
	}
	return isMark(name)
}

// isMark reports whether an extended attribute means something to overlayfs, or
// to a union like ours. To the mount it is a user's own, or it would not show it;
// but an unpacked layer is an upper's neighbour, where it would be taken for what
// it says.
func isMark(name string) bool {
	return strings.HasPrefix(name, "trusted.overlay.") || strings.HasPrefix(name, "user.overlay.") || name == upper.OverrideXattr
}
