package upper

import (
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// An At is how a file of an upper is reached: by a single name in a directory's
// descriptor, or, where Name is empty, by the file's own descriptor, which may be
// an O_PATH one unless Live says that it is not. A symlink is never followed.
type At struct {
	Dir  int
	Name string
	Live bool // Dir is open for reading or writing: the shortest way
}

// path gives an At to the system calls that take neither descriptors nor flags.
// The last step through /proc/self/fd leads to the very file that is open, not
// to where its name leads now (proc(5)); what follows it is a single name.
func (a At) path() string {
	b := make([]byte, 0, 32+len(a.Name))
	b = strconv.AppendInt(append(b, "/proc/self/fd/"...), int64(a.Dir), 10)
	if a.Name != "" {
		b = append(append(b, '/'), a.Name...)
	}
	return string(b)
}

// Lstat is stat(2) of what lies on disk, see [Dir.Stat].
func (a At) Lstat(st *unix.Stat_t) error {
	if a.Name == "" {
		return unix.Fstat(a.Dir, st)
	}
	return again(func() error { return unix.Fstatat(a.Dir, a.Name, st, unix.AT_SYMLINK_NOFOLLOW) })
}

// Open opens the file. The caller closes the descriptor.
func (a At) Open(flags int) (fd int, err error) {
	flags |= unix.O_CLOEXEC
	err = again(func() error {
		if a.Name == "" {
			fd, err = unix.Open(a.path(), flags&^unix.O_NOFOLLOW, 0)
		} else {
			fd, err = unix.Openat(a.Dir, a.Name, flags|unix.O_NOFOLLOW, 0)
		}
		return err
	})
	if err != nil {
		return -1, err
	}
	return fd, nil
}

// Hold gives a descriptor that reaches the file whatever becomes of its names.
// The caller closes it.
func (a At) Hold() (fd int, err error) {
	if a.Name == "" {
		return unix.FcntlInt(uintptr(a.Dir), unix.F_DUPFD_CLOEXEC, 3)
	}
	return unix.Openat(a.Dir, a.Name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
}

// Dirfd opens a directory some names below another. Not one of them may be a
// symlink, or lead out.
func Dirfd(dir int, names string) (fd int, err error) {
	how := unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	}
	err = again(func() error {
		fd, err = unix.Openat2(dir, names, &how)
		return err
	})
	if err != nil {
		return -1, err
	}
	return fd, nil
}

// LinkTo makes one more name of the file.
func (a At) LinkTo(dir int, name string) error {
	if a.Name == "" {
		return unix.Linkat(unix.AT_FDCWD, a.path(), dir, name, unix.AT_SYMLINK_FOLLOW)
	}
	return unix.Linkat(a.Dir, a.Name, dir, name, 0)
}

// Times sets the times of access and change, which may be UTIME_NOW and
// UTIME_OMIT.
func (a At) Times(atime, mtime unix.Timespec) error {
	ts := []unix.Timespec{atime, mtime}
	if a.Live {
		// A name that is NULL, which package unix cannot say, means the descriptor.
		_, _, errno := unix.Syscall6(unix.SYS_UTIMENSAT, uintptr(a.Dir), 0, uintptr(unsafe.Pointer(&ts[0])), 0, 0, 0)
		if errno != 0 {
			return errno
		}
		return nil
	}
	if a.Name == "" {
		return unix.UtimesNanoAt(unix.AT_FDCWD, a.path(), ts, 0)
	}
	return unix.UtimesNanoAt(a.Dir, a.Name, ts, unix.AT_SYMLINK_NOFOLLOW)
}

// chmod changes the mode on disk. A symlink has none that could be changed.
func (a At) chmod(mode uint32) error {
	if a.Live {
		return unix.Fchmod(a.Dir, mode)
	}
	if a.Name == "" {
		return unix.Chmod(a.path(), mode)
	}
	err := unix.Fchmodat(a.Dir, a.Name, mode, unix.AT_SYMLINK_NOFOLLOW)
	if err != unix.EOPNOTSUPP {
		return err
	}
	// Kernels before 6.6 have no fchmodat2, and later ones say the same of a
	// symlink.
	fd, err := a.Hold()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Chmod(At{Dir: fd}.path(), mode)
}

func (a At) chown(uid, gid int) error {
	if a.Name == "" {
		return unix.Fchownat(a.Dir, "", uid, gid, unix.AT_EMPTY_PATH)
	}
	return unix.Fchownat(a.Dir, a.Name, uid, gid, unix.AT_SYMLINK_NOFOLLOW)
}

func (a At) getxattr(name string, dest []byte) (int, error) {
	if a.Live {
		return unix.Fgetxattr(a.Dir, name, dest)
	}
	if a.Name == "" {
		return unix.Getxattr(a.path(), name, dest)
	}
	return unix.Lgetxattr(a.path(), name, dest)
}

func (a At) setxattr(name string, value []byte, flags int) error {
	if a.Live {
		return unix.Fsetxattr(a.Dir, name, value, flags)
	}
	if a.Name == "" {
		return unix.Setxattr(a.path(), name, value, flags)
	}
	return unix.Lsetxattr(a.path(), name, value, flags)
}

func (a At) removexattr(name string) error {
	if a.Live {
		return unix.Fremovexattr(a.Dir, name)
	}
	if a.Name == "" {
		return unix.Removexattr(a.path(), name)
	}
	return unix.Lremovexattr(a.path(), name)
}

func (a At) listxattr(dest []byte) (int, error) {
	if a.Live {
		return unix.Flistxattr(a.Dir, dest)
	}
	if a.Name == "" {
		return unix.Listxattr(a.path(), dest)
	}
	return unix.Llistxattr(a.path(), dest)
}

// again calls what a signal may have broken off: Go's runtime sends them to
// threads at any time.
func again(call func() error) error {
	for {
		if err := call(); err != unix.EINTR {
			return err
		}
	}
}
