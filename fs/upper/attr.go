package upper

import (
	"errors"

	"golang.org/x/sys/unix"
)

// Root is a descriptor of overlayfs' upperdir, which d keeps.
func (d *Dir) Root() int { return d.tree }

// Stat is stat(2) of a file as a mount shows it: with the owner, mode and type
// that an Override upper keeps aside.
func (d *Dir) Stat(at At, st *unix.Stat_t) error {
	if err := at.Lstat(st); err != nil {
		return err
	}
	return d.Show(at, st)
}

// Show turns a stat of what lies on disk into what a mount shows.
func (d *Dir) Show(at At, st *unix.Stat_t) error {
	if d.Form != Override {
		return nil
	}
	if st.Uid == d.UID {
		st.Uid = 0
	}
	if st.Gid == d.GID {
		st.Gid = 0
	}
	// Only these can have the attribute (xattr_permission in fs/xattr.c).
	if t := st.Mode & unix.S_IFMT; t != unix.S_IFREG && t != unix.S_IFDIR {
		return nil
	}
	o, ok, err := d.owner(at, st.Mode)
	if err != nil || !ok {
		return err
	}
	st.Mode, st.Uid, st.Gid = o.Mode, o.UID, o.GID
	switch o.Mode & unix.S_IFMT {
	case unix.S_IFBLK, unix.S_IFCHR:
		st.Rdev, st.Size = o.Rdev, 0
	}
	return nil
}

// owner reads a file's OverrideXattr.
func (d *Dir) owner(at At, mode uint32) (o Owner, ok bool, err error) {
	var b [128]byte
	n, err := at.getxattr(OverrideXattr, b[:])
	if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.EOPNOTSUPP) {
		return o, false, nil
	}
	if err != nil {
		return o, false, err
	}
	o, err = ParseOwner(string(b[:n]), mode)
	return o, err == nil, err
}

// private is what the owner must be able to do on disk in an Override upper,
// where it is that owner, and not root, who serves the mount.
func private(mode uint32) uint32 {
	if mode&unix.S_IFMT == unix.S_IFDIR {
		return 0o700
	}
	return 0o600
}

// Chmod sets permission bits. st is what [Dir.Stat] gave.
func (d *Dir) Chmod(at At, st *unix.Stat_t, mode uint32) error {
	if d.Form != Override {
		return at.chmod(mode & 0o7777)
	}
	return d.override(at, st, Owner{UID: st.Uid, GID: st.Gid, Mode: st.Mode&unix.S_IFMT | mode&0o7777, Rdev: st.Rdev})
}

// Chown sets the owner, -1 leaving it as it is. st is what [Dir.Stat] gave. Bits
// that give away privilege go, as chown(2) has it.
func (d *Dir) Chown(at At, st *unix.Stat_t, uid, gid int) error {
	if d.Form != Override {
		return at.chown(uid, gid)
	}
	o := Owner{UID: st.Uid, GID: st.Gid, Mode: st.Mode, Rdev: st.Rdev}
	if uid >= 0 {
		o.UID = uint32(uid)
	}
	if gid >= 0 {
		o.GID = uint32(gid)
	}
	if o.Mode&unix.S_IFMT != unix.S_IFDIR {
		o.Mode = Tame(o.Mode)
	}
	return d.override(at, st, o)
}

// Tame drops the bits that give a program its file's owner or group
// (setattr_should_drop_suidgid in fs/attr.c). What a set-group-ID bit without the
// group's x means has nothing to do with privilege, and stays.
func Tame(mode uint32) uint32 {
	mode &^= unix.S_ISUID
	if mode&unix.S_IXGRP != 0 {
		mode &^= unix.S_ISGID
	}
	return mode
}

// override keeps o for a file, in the mode on disk where that can say it, in the
// attribute where it cannot. st is the file as shown.
func (d *Dir) override(at At, st *unix.Stat_t, o Owner) error {
	t := o.Mode & unix.S_IFMT
	var disk unix.Stat_t
	if err := at.Lstat(&disk); err != nil {
		return err
	}
	if dt := disk.Mode & unix.S_IFMT; dt != unix.S_IFREG && dt != unix.S_IFDIR {
		// A symlink, FIFO or socket of root's. It cannot carry the attribute: with
		// another owner a regular file must stand for it.
		if o.UID == 0 && o.GID == 0 {
			if t == unix.S_IFLNK {
				return nil
			}
			return at.chmod(o.Mode & 0o7777)
		}
		return d.standIn(at, &disk, o)
	}
	standsIn := disk.Mode&unix.S_IFMT != t
	mode := o.Mode&0o7777 | private(o.Mode)
	if !standsIn && disk.Mode&0o7777 != mode {
		if err := at.chmod(mode); err != nil {
			return err
		}
	}
	if standsIn || o.UID != 0 || o.GID != 0 || o.Mode&0o7777 != mode {
		return at.setxattr(OverrideXattr, []byte(o.String()), 0)
	}
	err := at.removexattr(OverrideXattr)
	if errors.Is(err, unix.ENODATA) {
		return nil
	}
	return err
}

// standIn replaces a symlink, FIFO or socket by a regular file that says what it
// is, in one step.
func (d *Dir) standIn(at At, disk *unix.Stat_t, o Owner) error {
	if at.Name == "" || disk.Nlink > 1 {
		return unix.EPERM // its other names would stay behind
	}
	var link []byte
	if o.Mode&unix.S_IFMT == unix.S_IFLNK {
		b := make([]byte, unix.PathMax)
		n, err := unix.Readlinkat(at.Dir, at.Name, b)
		if err != nil {
			return err
		}
		link = b[:n]
	}
	s, err := d.stageRegular(0o600)
	if err != nil {
		return err
	}
	if _, err := unix.Pwrite(s.Fd, link, 0); err != nil {
		return errors.Join(err, s.Drop())
	}
	if err := s.self().setxattr(OverrideXattr, []byte(o.String()), 0); err != nil {
		return errors.Join(err, s.Drop())
	}
	if err := s.self().Times(disk.Atim, disk.Mtim); err != nil {
		return errors.Join(err, s.Drop())
	}
	// The directory's own contents stay what they were.
	dir := At{Dir: at.Dir}
	var was unix.Stat_t
	if err := dir.Lstat(&was); err != nil {
		return errors.Join(err, s.Drop())
	}
	if err := s.Into(at.Dir, at.Name); err != nil {
		return err
	}
	return dir.Times(was.Atim, was.Mtim)
}

// Readlink gives the target of what [Dir.Stat] calls a symlink.
func (d *Dir) Readlink(at At) ([]byte, error) {
	b := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(at.Dir, at.Name, b)
	if err == nil {
		return b[:n], nil
	}
	if d.Form != Override || !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return nil, err
	}
	fd, err := at.Open(unix.O_RDONLY | unix.O_NONBLOCK)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	if n, err = unix.Pread(fd, b, 0); err != nil {
		return nil, err
	}
	return b[:n], nil
}

// Getxattr reads an extended attribute by the name that a mount shows.
func (d *Dir) Getxattr(at At, name string, dest []byte) (int, error) {
	stored, ok := d.Form.Stored(name)
	if !ok {
		return 0, unix.ENODATA
	}
	return at.getxattr(stored, dest)
}

// Setxattr sets an extended attribute by the name that a mount shows.
func (d *Dir) Setxattr(at At, name string, value []byte, flags int) error {
	stored, ok := d.Form.Stored(name)
	if !ok {
		return unix.EPERM
	}
	return at.setxattr(stored, value, flags)
}

// Removexattr removes an extended attribute by the name that a mount shows.
func (d *Dir) Removexattr(at At, name string) error {
	stored, ok := d.Form.Stored(name)
	if !ok {
		return unix.ENODATA
	}
	return at.removexattr(stored)
}

// Listxattr gives the names of a file's extended attributes as a mount shows
// them, each ended by a zero byte.
func (d *Dir) Listxattr(at At) ([]byte, error) {
	var small [512]byte
	b := small[:]
	n, err := at.listxattr(b)
	for errors.Is(err, unix.ERANGE) {
		if n, err = at.listxattr(nil); err != nil {
			return nil, err
		}
		b = make([]byte, n+256)
		n, err = at.listxattr(b)
	}
	if err != nil || n == 0 {
		return nil, err
	}
	var out []byte
	for b = b[:n]; len(b) > 0; {
		end := 0
		for end < len(b) && b[end] != 0 {
			end++
		}
		if shown, ok := d.Form.Shown(string(b[:end])); ok {
			out = append(append(out, shown...), 0)
		}
		b = b[min(end+1, len(b)):]
	}
	return out, nil
}

// IsOpaque reports whether a directory hides what the lower has in its place. Of
// a directory that leads elsewhere it says so by an error: no upper of ours has
// one.
func (d *Dir) IsOpaque(at At) (bool, error) {
	var b [1]byte
	n, err := at.getxattr(d.Form.OpaqueXattr(), b[:])
	switch {
	case errors.Is(err, unix.ENODATA), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ERANGE):
		return false, nil
	case err != nil:
		return false, err
	}
	return n == 1 && b[0] == 'y', nil
}

// SetOpaque marks a directory opaque.
func (d *Dir) SetOpaque(at At) error {
	return at.setxattr(d.Form.OpaqueXattr(), []byte{'y'}, 0)
}
