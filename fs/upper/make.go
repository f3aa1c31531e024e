package upper

import (
	"errors"

	"golang.org/x/sys/unix"
)

// A New is what a new file is to be.
type New struct {
	Mode     uint32 // type and permission bits, no umask taken off
	Umask    uint32 // of who makes it
	UID, GID uint32 // of who makes it
	Rdev     uint64
	Link     string // target of a symlink

	// What the directory says. In one with the set-group-ID bit, files belong to
	// its group DirGID. A default ACL stands in the umask's place.
	Setgid bool
	DirGID uint32
	ACL    bool
}

// mode is what to ask the kernel for. It takes the daemon's own umask off, and
// applies a default ACL.
func (n *New) mode(form Form) uint32 {
	mode := n.Mode & 0o7777
	if !n.ACL {
		mode &^= n.Umask
	}
	if form == Override {
		mode |= private(n.Mode)
	}
	return mode
}

// Make makes a file of any type under a free name, and tells what it became. fd
// is a descriptor of a regular file for reading and writing, which the caller
// closes, else -1.
func (d *Dir) Make(dir int, name string, n *New) (fd int, st unix.Stat_t, err error) {
	fd = -1
	at := At{Dir: dir, Name: name}
	mode := n.mode(d.Form)
	switch t := n.Mode & unix.S_IFMT; t {
	case unix.S_IFREG:
		err = again(func() error {
			fd, err = unix.Openat(dir, name, unix.O_CREAT|unix.O_EXCL|unix.O_RDWR|unix.O_NOFOLLOW|unix.O_CLOEXEC, mode)
			return err
		})
		at = At{Dir: fd, Live: true}
	case unix.S_IFDIR:
		err = unix.Mkdirat(dir, name, mode)
	case unix.S_IFLNK:
		err = unix.Symlinkat(n.Link, dir, name)
	default:
		err = unix.Mknodat(dir, name, t|mode, int(n.Rdev))
	}
	if err != nil {
		return -1, st, err
	}
	if err = at.Lstat(&st); err == nil {
		err = d.own(at, n, &st)
	}
	if err != nil {
		if fd >= 0 {
			unix.Close(fd)
		}
		return -1, st, errors.Join(err, remove(dir, name, n.Mode))
	}
	return fd, st, nil
}

// Tmpfile makes a regular file with no name. The caller closes fd.
func (d *Dir) Tmpfile(dir int, n *New) (fd int, st unix.Stat_t, err error) {
	fd, err = unix.Openat(dir, ".", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, n.mode(d.Form))
	if err != nil {
		return -1, st, err
	}
	at := At{Dir: fd, Live: true}
	if err = at.Lstat(&st); err == nil {
		err = d.own(at, n, &st)
	}
	if err != nil {
		unix.Close(fd)
		return -1, st, err
	}
	return fd, st, nil
}

// own gives a file that was just made its owner and mode, as far as the disk's
// filesystem has not done so already, which it mostly has. st is what lies on
// disk, and becomes what a mount shows.
func (d *Dir) own(at At, n *New, st *unix.Stat_t) error {
	want := *st
	want.Uid, want.Gid = n.UID, n.GID
	if n.Setgid {
		want.Gid = n.DirGID
	}
	symlink := n.Mode&unix.S_IFMT == unix.S_IFLNK
	if !n.ACL && !symlink {
		want.Mode = n.Mode&^n.Umask | n.Mode&unix.S_IFMT
	}
	if n.Setgid && n.Mode&unix.S_IFMT == unix.S_IFDIR {
		want.Mode |= unix.S_ISGID // mode_strip_sgid and inode_init_owner in fs/inode.c
	}
	if d.Form == Override {
		want.Uid = 0
		if !n.Setgid {
			want.Gid = 0
		}
		if want.Gid == 0 && (symlink || want.Mode&0o7777 == st.Mode&0o7777) {
			*st = want
			return nil
		}
		if err := d.override(at, st, Owner{GID: want.Gid, Mode: want.Mode, Rdev: n.Rdev}); err != nil {
			return err
		}
		return d.Stat(at, st)
	}
	changed := false
	if st.Uid != want.Uid || st.Gid != want.Gid {
		if err := at.chown(int(want.Uid), int(want.Gid)); err != nil {
			return err
		}
		changed = true
		if !symlink && st.Mode&unix.S_IFMT != unix.S_IFDIR {
			st.Mode = Tame(st.Mode)
		}
	}
	if !symlink && st.Mode != want.Mode {
		if err := at.chmod(want.Mode & 0o7777); err != nil {
			return err
		}
		changed = true
	}
	if !changed {
		return nil
	}
	return at.Lstat(st) // for the time of the change
}

func remove(dir int, name string, mode uint32) error {
	flags := 0
	if mode&unix.S_IFMT == unix.S_IFDIR {
		flags = unix.AT_REMOVEDIR
	}
	return unix.Unlinkat(dir, name, flags)
}

// Replace makes a file where a whiteout lies, in one step. A directory becomes
// opaque: what was deleted below it stays so.
func (d *Dir) Replace(dir int, name string, n *New) (fd int, st unix.Stat_t, err error) {
	stage := d.staging
	if n.ACL {
		// What is made elsewhere and moved in does not inherit. So it is made in a
		// directory that hands on the same.
		nest, err := d.nest(dir)
		if err != nil {
			return -1, st, err
		}
		defer nest.drop()
		stage = nest.fd
	}
	tmp := d.temp()
	fd, st, err = d.Make(stage, tmp, n)
	if err != nil {
		return -1, st, err
	}
	if n.Mode&unix.S_IFMT != unix.S_IFDIR {
		err = unix.Renameat(stage, tmp, dir, name)
	} else if err = d.SetOpaque(At{Dir: stage, Name: tmp}); err == nil {
		if err = unix.Renameat2(stage, tmp, dir, name, unix.RENAME_EXCHANGE); err == nil {
			return fd, st, unix.Unlinkat(stage, tmp, 0)
		}
	}
	if err != nil {
		if fd >= 0 {
			unix.Close(fd)
		}
		return -1, st, errors.Join(err, remove(stage, tmp, n.Mode))
	}
	return fd, st, nil
}

// nest is a directory in staging with another one's default ACL.
type nest struct {
	d    *Dir
	name string
	fd   int
}

const defaultACL = "system.posix_acl_default"

func (d *Dir) nest(like int) (*nest, error) {
	b := make([]byte, 1<<16)
	size, err := At{Dir: like}.getxattr(defaultACL, b)
	if err != nil {
		return nil, err
	}
	n := &nest{d: d, name: d.temp()}
	if err := unix.Mkdirat(d.staging, n.name, 0o700); err != nil {
		return nil, err
	}
	if n.fd, err = Dirfd(d.staging, n.name); err != nil {
		return nil, errors.Join(err, remove(d.staging, n.name, unix.S_IFDIR))
	}
	if err := (At{Dir: n.fd}).setxattr(defaultACL, b[:size], 0); err != nil {
		n.drop()
		return nil, err
	}
	return n, nil
}

func (n *nest) drop() {
	unix.Close(n.fd)
	remove(n.d.staging, n.name, unix.S_IFDIR) // what stays is cleared by Open
}
