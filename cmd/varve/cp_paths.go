package main

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/daemon"
)

// end is one end of a copy.
type end struct {
	of    string // a mount or an image; "" for the local filesystem
	path  string // "-" for a tar on standard input or output
	image bool   // of is of a form that only an image has
}

// rooted says whether the path is given from the root, as that in an image is.
func (e end) rooted() bool { return strings.HasPrefix(e.path, "/") }

// parseEnd reads an argument. One that begins with a slash or a dot is local, as
// docker has it; else what stands before the first ":/" is a mount or an image,
// or what stands before the first ":" is a mount.
func parseEnd(arg string) (end, error) {
	if arg == "-" || strings.HasPrefix(arg, "/") || strings.HasPrefix(arg, ".") {
		return end{path: arg}, nil
	}
	for _, scheme := range []string{"oci:", "docker-archive:"} {
		if rest, ok := strings.CutPrefix(arg, scheme); ok {
			i := strings.Index(rest, ":/")
			if i <= 0 {
				return end{}, usageError{fmt.Errorf("%s: the path in the image is missing: want %sPATH:/PATH", arg, scheme)}
			}
			return end{of: scheme + rest[:i], path: rest[i+1:], image: true}, nil
		}
	}
	of, p, ok := strings.Cut(arg, ":")
	if i := strings.Index(arg, ":/"); i >= 0 {
		of, p = arg[:i], arg[i+1:]
	}
	switch {
	case !ok || of == "":
		return end{path: arg}, nil
	case p == "":
		return end{}, usageError{fmt.Errorf("%s: the path is empty", arg)}
	}
	return end{of: of, path: p}, nil
}

// specifiesSelf says whether a path ends in "/.": what lies in the directory is
// meant, not the directory.
func specifiesSelf(p string) bool { return path.Base(p) == "." }

// assertsDir says whether a path can only be that of a directory.
func assertsDir(p string) bool { return strings.HasSuffix(p, "/") || specifiesSelf(p) }

// keepTrailing gives a clean path the "/" or "/." that it ended in before it was
// cleaned.
func keepTrailing(clean, p string) string {
	slash := strings.TrimSuffix(clean, "/") + "/"
	switch {
	case specifiesSelf(p):
		return slash + "."
	case strings.HasSuffix(p, "/"):
		return slash
	}
	return clean
}

func absolute(p string) (string, error) {
	abs, err := filepath.Abs(p)
	return keepTrailing(abs, p), err
}

// source is what is copied.
type source struct {
	dir      bool
	contents bool   // of the directory, without itself
	name     string // the last of its path
}

// target is what a destination names, or would name once it is there.
type target struct {
	path    string // as it was asked for
	dir     string // the directory: itself if it is one, else the one it lies in
	name    string // in dir; "" if it is a directory
	exists  bool
	isDir   bool
	regular bool
}

// plan gives the name that the source gets in the target's directory, "" if its
// contents go straight into it: the cases of docker's manual page of cp.
func (s source) plan(t target) (string, error) {
	switch {
	case t.isDir && s.dir && s.contents:
		return "", nil
	case t.isDir:
		return s.name, nil
	case t.exists && s.dir:
		return "", fmt.Errorf("cannot copy a directory to a file: %s", t.path)
	case !s.dir && assertsDir(t.path):
		return "", notFound("no such directory: %s", t.path)
	}
	return t.name, nil
}

func notFound(format string, args ...any) error {
	return &daemon.Error{Message: fmt.Sprintf(format, args...), Exit: daemon.ExitNotFound}
}

// notFoundIf gives an error of the local filesystem the exit code of what is
// missing, if it is that.
func notFoundIf(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return notFound("%v", err)
	}
	return err
}

// inRoot is how paths in a mount are resolved: as if its root were that of the
// system, so that neither ".." nor a symlink leads out of it.
const inRoot = unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS

// openIn opens a path in a directory. The kernel gives EAGAIN where it cannot
// prove that ".." stayed inside while something else was renamed, see
// openat2(2).
func openIn(at int, p string, flags, resolve uint64) (fd int, err error) {
	how := unix.OpenHow{Flags: flags | unix.O_CLOEXEC, Resolve: resolve}
	for range 1000 {
		fd, err = unix.Openat2(at, p, &how)
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if errors.Is(err, unix.EXDEV) {
		err = errLeadsOut
	}
	return fd, err
}

var errLeadsOut = errors.New("a symlink on the way leads out of the destination")

// noParentError says that the directory of a destination is not there.
type noParentError struct{ dir string }

func (e noParentError) Error() string { return "no such directory: " + e.dir }

// find finds a destination, which may be missing if its directory is there. The
// last name is followed if it is a symlink, also one that leads to what is not
// there yet.
func find(at int, p string, resolve uint64) (target, error) {
	const maxFollow = 40 // as the kernel's MAXSYMLINKS
	t := target{path: p}
	for range maxFollow {
		t.dir, t.name = splitLast(p)
		fd, err := openIn(at, p, unix.O_PATH|unix.O_NOFOLLOW, resolve)
		if errors.Is(err, unix.ENOENT) {
			return t, checkParent(at, t.dir, resolve)
		}
		if err != nil {
			return t, &os.PathError{Op: "open", Path: p, Err: err}
		}
		mode, link, err := lookAt(fd)
		unix.Close(fd)
		switch {
		case err != nil:
			return t, &os.PathError{Op: "stat", Path: p, Err: err}
		case mode == unix.S_IFDIR:
			t.dir, t.name, t.exists, t.isDir = p, "", true, true
			return t, nil
		case mode != unix.S_IFLNK:
			t.exists, t.regular = true, mode == unix.S_IFREG
			return t, nil
		case strings.HasPrefix(link, "/"):
			p = link
		default:
			// Not cleaned: ".." is that of where a symlink leads.
			p = t.dir + "/" + link
		}
	}
	return t, &os.PathError{Op: "open", Path: t.path, Err: unix.ELOOP}
}

// lookAt gives the type of what is open, and where a symlink leads.
func lookAt(fd int) (mode uint32, link string, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, "", err
	}
	if mode = st.Mode & unix.S_IFMT; mode != unix.S_IFLNK {
		return mode, "", nil
	}
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(fd, "", buf)
	if err != nil {
		return 0, "", err
	}
	return mode, string(buf[:n]), nil
}

func checkParent(at int, dir string, resolve uint64) error {
	fd, err := openIn(at, dir, unix.O_PATH|unix.O_DIRECTORY, resolve)
	switch {
	case err == nil:
		return unix.Close(fd)
	case errors.Is(err, unix.ENOENT):
		return noParentError{dir}
	}
	return &os.PathError{Op: "open", Path: dir, Err: err}
}

// splitLast cuts the last name off a path.
func splitLast(p string) (dir, name string) {
	p = strings.TrimRight(p, "/")
	i := strings.LastIndexByte(p, '/')
	dir, name = strings.TrimRight(p[:i+1], "/"), p[i+1:]
	switch {
	case dir != "":
	case strings.HasPrefix(p, "/") || p == "":
		dir = "/"
	default:
		dir = "."
	}
	return dir, name
}

// findLocal finds a destination in the local filesystem. Its refusals are
// docker's.
func findLocal(p string) (target, error) {
	t, err := find(unix.AT_FDCWD, p, 0)
	var missing noParentError
	switch {
	case errors.As(err, &missing):
		return t, notFound("invalid output path: directory %q does not exist", missing.dir)
	case err != nil:
		return t, err
	case t.exists && !t.isDir && !t.regular:
		return t, fmt.Errorf("invalid output path: %q must be a directory or a regular file", p)
	}
	return t, nil
}

// openMount opens the root of a mount. The caller closes it.
func openMount(dir string) (int, error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	// Unmounted behind the daemon's back, it is the directory below.
	var st unix.Statx_t
	err = unix.Statx(fd, "", unix.AT_EMPTY_PATH, 0, &st)
	if err == nil && st.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT != 0 && st.Attributes&unix.STATX_ATTR_MOUNT_ROOT == 0 {
		err = errors.New("nothing is mounted there any more")
	}
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("the mount at %s: %w", dir, err)
	}
	return fd, nil
}
