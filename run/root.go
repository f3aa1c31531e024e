package run

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// tree is a directory whose names mean what they mean to who has it for a root:
// links in it lead nowhere else.
type tree struct{ fd int }

func openTree(dir string) (*tree, error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	return &tree{fd}, nil
}

func (t *tree) Close() error { return unix.Close(t.fd) }

// at opens a name. The kernel asks for another try when something was renamed on
// the way (openat2(2)).
func (t *tree) at(name string, flags int) (int, error) {
	how := unix.OpenHow{Flags: uint64(flags) | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS}
	for range 128 {
		fd, err := unix.Openat2(t.fd, name, &how)
		if err != unix.EAGAIN && err != unix.EINTR {
			return fd, err
		}
	}
	return -1, unix.EAGAIN
}

// maxFile is the most that is read of a file of a root or of the host: users,
// groups, name servers.
const maxFile = 16 << 20

// open opens a regular file to read it, at most maxFile bytes of it. One that is
// not there is nil, as no users are.
func (t *tree) open(name string) (io.ReadCloser, error) {
	// Not O_RDONLY at once: opening a device or a FIFO does something.
	fd, err := t.at(name, unix.O_PATH)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return nil, nil
	} else if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, &os.PathError{Op: "stat", Path: name, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fmt.Errorf("%s of the image is not a regular file", name)
	}
	if st.Size > maxFile {
		return nil, fmt.Errorf("%s of the image has %d bytes, the limit is %d", name, st.Size, maxFile)
	}
	f, err := os.Open(procFD(fd))
	if err != nil {
		return nil, err
	}
	return struct {
		io.Reader
		io.Closer
	}{io.LimitReader(f, maxFile), f}, nil
}

// isTop reports whether a name leads to the tree's top.
func (t *tree) isTop(name string) (bool, error) {
	fd, err := t.at("."+name, unix.O_PATH)
	if err != nil { // of what cannot be reached who makes it says why
		return false, nil
	}
	defer unix.Close(fd)
	at, err := t.name(fd)
	return at == "", err
}

// procFD is a path to what a descriptor has open.
func procFD(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

// made is something that was put into a tree, by its real name.
type made struct {
	Path string `json:"path"` // below the root, without links
	Dir  bool   `json:"dir,omitempty"`
}

// make makes what of a name is missing, directories above it and at the end a
// directory or an empty file, and says what it made, upper ones first. What is
// there already may be of either type only if it is of the one that was wanted.
func (t *tree) make(name string, dir bool, mode uint32) ([]made, error) {
	var out []made
	parts := strings.FieldsFunc(path.Clean("/"+name), func(r rune) bool { return r == '/' })
	for i := range parts {
		part := strings.Join(parts[:i+1], "/")
		last := i == len(parts)-1
		fd, err := t.at(part, unix.O_PATH)
		if err == nil {
			err = isType(fd, dir || !last)
			unix.Close(fd)
			if err != nil {
				return out, &os.PathError{Op: "make", Path: "/" + part, Err: err}
			}
			continue
		}
		if err != unix.ENOENT {
			return out, &os.PathError{Op: "make", Path: "/" + part, Err: err}
		}
		m, err := t.makeOne(strings.Join(parts[:i], "/"), parts[i], dir || !last, mode)
		if err != nil {
			return out, &os.PathError{Op: "make", Path: "/" + part, Err: err}
		}
		out = append(out, m)
	}
	return out, nil
}

func isType(fd int, dir bool) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	isDir := st.Mode&unix.S_IFMT == unix.S_IFDIR
	switch {
	case dir && !isDir:
		return unix.ENOTDIR
	case !dir && isDir:
		return unix.EISDIR
	}
	return nil
}

// makeOne makes one name in a directory, whose times stay: the directory is to
// look as if nothing had been made in it.
func (t *tree) makeOne(parent, name string, dir bool, mode uint32) (made, error) {
	if parent == "" {
		parent = "."
	}
	fd, err := t.at(parent, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return made{}, err
	}
	defer unix.Close(fd)
	defer keepTimes(fd)()
	if dir {
		err = unix.Mkdirat(fd, name, mode)
	} else {
		var f int
		if f, err = unix.Openat(fd, name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, mode); err == nil {
			err = unix.Close(f)
		}
	}
	if err == unix.EEXIST {
		// A link that leads nowhere is there, and is not followed.
		return made{}, errors.New("a symbolic link to nothing is in the way")
	} else if err != nil {
		return made{}, err
	}
	if err := unix.Fchmodat(fd, name, mode, 0); err != nil { // the umask
		return made{}, err
	}
	real, err := t.name(fd)
	return made{Path: path.Join(real, name), Dir: dir}, err
}

// name is where below the tree's top an open directory is.
func (t *tree) name(fd int) (string, error) {
	top, err := os.Readlink(procFD(t.fd))
	if err != nil {
		return "", err
	}
	at, err := os.Readlink(procFD(fd))
	if err != nil {
		return "", err
	}
	if at == top {
		return "", nil
	}
	rest, ok := strings.CutPrefix(at, strings.TrimSuffix(top, "/")+"/")
	if !ok {
		return "", fmt.Errorf("%s is not below %s any more", at, top)
	}
	return rest, nil
}

// remove takes one of [made] away again if nobody put anything into it.
func (t *tree) remove(m made) error {
	parent, name := path.Split(m.Path)
	fd, err := t.at("./"+parent, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return ignore(err, unix.ENOENT, unix.ENOTDIR, unix.ELOOP)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return ignore(err, unix.ENOENT)
	}
	flags := 0
	if m.Dir {
		flags = unix.AT_REMOVEDIR
	} else if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size > 0 {
		return nil
	}
	defer keepTimes(fd)()
	return ignore(unix.Unlinkat(fd, name, flags), unix.ENOENT, unix.ENOTEMPTY, unix.ENOTDIR)
}

func ignore(err error, errs ...error) error {
	for _, e := range errs {
		if errors.Is(err, e) {
			return nil
		}
	}
	return err
}

// keepTimes notes a directory's times; what it gives sets them again. Where that
// fails the directory has changed in the eyes of a commit, and nothing worse.
func keepTimes(fd int) func() {
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil {
		return func() {}
	}
	return func() {
		unix.UtimesNanoAt(unix.AT_FDCWD, procFD(fd), []unix.Timespec{st.Atim, st.Mtim}, 0)
	}
}
