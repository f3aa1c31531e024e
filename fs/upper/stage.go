package upper

import (
	"errors"
	"strconv"

	"golang.org/x/sys/unix"
)

// temp gives a name that is free in staging, which nobody else writes.
func (d *Dir) temp() string { return strconv.FormatUint(d.temps.Add(1), 36) }

// A File is what a copy takes from the lower besides its contents.
type File struct {
	Attr
	Rdev uint64
	Link string // target of a symlink
}

// A Staged is a file that is being made in staging, where no mount shows it.
// It ends with Into or Drop.
type Staged struct {
	Fd   int // of a regular file or what stands for another type, else -1
	d    *Dir
	name string
	dir  bool
}

func (d *Dir) stageRegular(mode uint32) (*Staged, error) {
	s := &Staged{d: d, name: d.temp()}
	var err error
	s.Fd, err = unix.Openat(d.staging, s.name, unix.O_CREAT|unix.O_EXCL|unix.O_RDWR|unix.O_NOFOLLOW|unix.O_CLOEXEC, mode)
	if err != nil {
		return nil, err
	}
	return s, nil
}

// Stage makes a file like f. A regular one is empty yet: the caller writes its
// contents to Fd, then calls Finish.
func (d *Dir) Stage(f *File) (*Staged, error) {
	if d.Form == Override && d.needsStandIn(f) {
		s, err := d.stageRegular(0o600)
		if err != nil {
			return nil, err
		}
		if _, err := unix.Pwrite(s.Fd, []byte(f.Link), 0); err != nil {
			return nil, errors.Join(err, s.Drop())
		}
		return s, nil
	}
	s := &Staged{d: d, name: d.temp(), Fd: -1}
	var err error
	switch t := f.Mode & unix.S_IFMT; t {
	case unix.S_IFREG:
		return d.stageRegular(0o600)
	case unix.S_IFDIR:
		s.dir = true
		err = unix.Mkdirat(d.staging, s.name, 0o700)
	case unix.S_IFLNK:
		err = unix.Symlinkat(f.Link, d.staging, s.name)
	default:
		err = unix.Mknodat(d.staging, s.name, t|0o600, int(f.Rdev))
	}
	if err != nil {
		return nil, err
	}
	return s, nil
}

// needsStandIn says whether a plain user can not make f itself.
func (d *Dir) needsStandIn(f *File) bool {
	switch f.Mode & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFDIR:
		return false
	case unix.S_IFLNK, unix.S_IFIFO, unix.S_IFSOCK:
		return f.UID != 0 || f.GID != 0
	}
	return true
}

// self reaches the file.
func (s *Staged) self() At {
	if s.Fd >= 0 {
		return At{Dir: s.Fd, Live: true}
	}
	return At{Dir: s.d.staging, Name: s.name}
}

// Finish gives the file f's owner, mode, extended attributes and times, and a
// regular file's contents to the disk, so that a crash after [Staged.Into] finds
// it whole.
func (s *Staged) Finish(f *File) error {
	at, d := s.self(), s.d
	regular := s.Fd >= 0
	symlink := !regular && f.Mode&unix.S_IFMT == unix.S_IFLNK
	if d.Form != Override {
		if err := at.chown(int(f.UID), int(f.GID)); err != nil {
			return err
		}
	}
	// After the owner: a change of that drops file capabilities.
	for name, value := range f.Xattrs {
		stored, ok := d.Form.Stored(name)
		if !ok || d.Form == Override && isACL(name) {
			continue
		}
		err := at.setxattr(stored, []byte(value), 0)
		// Who may not set it could not write it through the mount either.
		if err != nil && !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EOPNOTSUPP) {
			return err
		}
	}
	switch {
	case symlink:
	case d.Form != Override:
		if err := at.chmod(f.Mode & 0o7777); err != nil {
			return err
		}
	default:
		st := unix.Stat_t{Mode: f.Mode}
		if err := d.override(at, &st, Owner{UID: f.UID, GID: f.GID, Mode: f.Mode, Rdev: f.Rdev}); err != nil {
			return err
		}
	}
	if err := at.Times(f.Mtime, f.Mtime); err != nil {
		return err
	}
	if regular {
		return again(func() error { return unix.Fsync(s.Fd) })
	}
	return nil
}

// isACL says whether an extended attribute is an ACL. The numbers in one of the
// lower are the image's, and nothing to the filesystem of a plain user.
func isACL(name string) bool { return name == aclAccess || name == defaultACL }

const aclAccess = "system.posix_acl_access"

// Link makes another name for the file in staging, for a lower file of several.
func (s *Staged) Link() (*Staged, error) {
	o := &Staged{d: s.d, name: s.d.temp(), Fd: -1}
	if err := unix.Linkat(s.d.staging, s.name, s.d.staging, o.name, 0); err != nil {
		return nil, err
	}
	return o, nil
}

// Into moves the file to where mounts show it, over what is there.
func (s *Staged) Into(dir int, name string) error {
	if err := unix.Renameat(s.d.staging, s.name, dir, name); err != nil {
		return errors.Join(err, s.Drop())
	}
	s.close()
	return nil
}

// Detach takes away the only name and gives the caller a descriptor of the file.
func (s *Staged) Detach() (fd int, err error) {
	if fd, err = (At{Dir: s.d.staging, Name: s.name}).Hold(); err != nil {
		return -1, errors.Join(err, s.Drop())
	}
	return fd, s.Drop()
}

// Lstat is stat(2) of the file.
func (s *Staged) Lstat(st *unix.Stat_t) error { return s.self().Lstat(st) }

// Drop removes the file.
func (s *Staged) Drop() error {
	s.close()
	flags := 0
	if s.dir {
		flags = unix.AT_REMOVEDIR
	}
	return unix.Unlinkat(s.d.staging, s.name, flags)
}

func (s *Staged) close() {
	if s.Fd >= 0 {
		unix.Close(s.Fd)
		s.Fd = -1
	}
}

// Copy writes size bytes of src from an offset on to the file's beginning, as
// many at a time as ensure is asked for. What are holes in src become holes.
func (s *Staged) Copy(src int, from, size int64, ensure func(off, n int64) error) error {
	const piece = 8 << 20
	if err := unix.Ftruncate(s.Fd, size); err != nil {
		return err
	}
	for at := int64(0); at < size; at += piece {
		n := min(piece, size-at)
		if err := ensure(from+at, n); err != nil {
			return err
		}
		if err := s.copyData(src, from+at, at, n); err != nil {
			return err
		}
	}
	return nil
}

// copyData copies the stretches of src that are no holes.
func (s *Staged) copyData(src int, from, to, n int64) error {
	for end := from + n; from < end; {
		data, err := unix.Seek(src, from, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) || err == nil && data >= end {
			return nil
		}
		if err != nil {
			data = from // a filesystem that does not say has data everywhere
		}
		hole, err := unix.Seek(src, data, unix.SEEK_HOLE)
		if err != nil || hole > end {
			hole = end
		}
		to += data - from
		if err := copyRange(src, data, s.Fd, to, hole-data); err != nil {
			return err
		}
		to += hole - data
		from = hole
	}
	return nil
}

// copyRange copies bytes within the kernel, or, where it can not, by way of
// memory.
func copyRange(src int, from int64, dst int, to, n int64) error {
	for n > 0 {
		k, err := unix.CopyFileRange(src, &from, dst, &to, int(n), 0)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return copyBytes(src, from, dst, to, n)
		case k == 0:
			return unix.EIO // src ends where its bytes were promised
		default:
			n -= int64(k)
		}
	}
	return nil
}

func copyBytes(src int, from int64, dst int, to, n int64) error {
	b := make([]byte, min(n, 1<<20))
	for n > 0 {
		k, err := unix.Pread(src, b[:min(n, int64(len(b)))], from)
		if err == nil && k == 0 {
			err = unix.EIO
		}
		if err != nil {
			return err
		}
		for done := 0; done < k; {
			w, err := unix.Pwrite(dst, b[done:k], to+int64(done))
			if err != nil {
				return err
			}
			done += w
		}
		from, to, n = from+int64(k), to+int64(k), n-int64(k)
	}
	return nil
}
