package main

import (
	"archive/tar"
	"bufio"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// unpacker writes what a tar has into a directory. Names are resolved by the
// kernel, relative to a descriptor and as resolve says, whatever the tar or
// somebody else puts in the way.
type unpacker struct {
	root    int    // an O_PATH descriptor
	dir     string // in root, where names begin
	resolve uint64 // openat2's flags
	rename  func(string) (string, error)
	owner   func(*tar.Header) (uid, gid int) // nil: they belong to who unpacks them
	archive bool
	guard   bool // the tar is an image's, the directory the host's
	warn    func(string)

	parent   string // the directory that parentFD is, if that is not 0
	parentFD int
	dirs     map[string]*tar.Header // what they get at the end
	buf      []byte
}

func headerOwner(h *tar.Header) (uid, gid int) { return h.Uid, h.Gid }
func rootOwner(*tar.Header) (uid, gid int)     { return 0, 0 }

// unpack reads a tar to the end of r. A file is either whole or not there, or
// what it was before.
func (u *unpacker) unpack(r io.Reader) error {
	r = bufio.NewReaderSize(r, 1<<18)
	if u.rename == nil {
		u.rename = cleanName
	}
	u.buf, u.dirs = make([]byte, 1<<20), map[string]*tar.Header{}
	defer u.forget()
	err := u.entries(tar.NewReader(r))
	if err == nil {
		// What went wrong at the other end may come only after the tar's own end.
		_, err = io.Copy(io.Discard, r)
	}
	return errors.Join(err, u.finish(err == nil))
}

func (u *unpacker) entries(tr *tar.Reader) error {
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		name, err := u.rename(h.Name)
		if err != nil {
			return err
		}
		if name == "." || name == "" {
			continue // the directory itself stays as it is
		}
		if err := u.entry(tr, h, name); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
}

func (u *unpacker) entry(tr *tar.Reader, h *tar.Header, name string) error {
	dir, base := path.Split(name)
	at, err := u.open(path.Clean(dir))
	if err != nil {
		return err
	}
	var st unix.Stat_t
	err = unix.Fstatat(at, base, &st, unix.AT_SYMLINK_NOFOLLOW)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	exists, isDir := err == nil, st.Mode&unix.S_IFMT == unix.S_IFDIR
	switch {
	case h.Typeflag == tar.TypeDir:
		if exists && !isDir {
			return errors.New("cannot overwrite non-directory with directory")
		}
		u.dirs[name] = h
		if exists {
			return nil
		}
		return unix.Mkdirat(at, base, 0o700) // its own mode might not let us in
	case exists && isDir:
		return errors.New("cannot overwrite directory with non-directory")
	case (h.Typeflag == tar.TypeChar || h.Typeflag == tar.TypeBlock) && u.guard && !u.archive:
		u.warn(fmt.Sprintf("skipped the device file %s: -a copies them", name))
		return nil
	}
	as := base
	if exists {
		as = ".varve-" + rand.Text()
	}
	if err := u.make(at, as, tr, h); err != nil {
		return err
	}
	err = nil
	if exists {
		// Of two names of one file rename(2) leaves both.
		if err = unix.Renameat(at, as, at, base); err != nil || h.Typeflag == tar.TypeLink {
			unix.Unlinkat(at, as, 0)
		}
	}
	if h.Typeflag == tar.TypeSymlink {
		u.forget() // the directory that is open may be another by its name now
	}
	return err
}

// open gives the directory of a name, which is made if it is not there. It stays
// open until another is asked for.
func (u *unpacker) open(dir string) (int, error) {
	if u.parentFD != 0 && u.parent == dir {
		return u.parentFD, nil
	}
	fd, err := u.openDir(dir)
	if errors.Is(err, unix.ENOENT) && dir != "." {
		// The tar left it out: only the names of what lies in it say that it is.
		up, base := path.Split(dir)
		var at int
		if at, err = u.open(path.Clean(up)); err != nil {
			return -1, err
		}
		if err = unix.Mkdirat(at, base, 0o755); errors.Is(err, unix.EEXIST) {
			err = errors.New("a symlink on the way leads nowhere")
		}
		if err != nil {
			return -1, err
		}
		if u.owner != nil {
			u.dirs[dir] = &tar.Header{Typeflag: tar.TypeDir, Mode: 0o755, ModTime: time.Now()}
		}
		fd, err = u.openDir(dir)
	}
	if err != nil {
		return -1, err
	}
	u.forget()
	u.parent, u.parentFD = dir, fd
	return fd, nil
}

func (u *unpacker) openDir(dir string) (int, error) {
	return openIn(u.root, u.dir+"/"+dir, unix.O_PATH|unix.O_DIRECTORY, u.resolve)
}

func (u *unpacker) forget() {
	if u.parentFD != 0 {
		unix.Close(u.parentFD)
	}
	u.parentFD = 0
}

// make makes a new file of any type but a directory. It is not there if that
// fails.
func (u *unpacker) make(at int, name string, tr *tar.Reader, h *tar.Header) error {
	var err error
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		return u.write(at, name, tr, h)
	case tar.TypeLink:
		return u.link(at, name, h.Linkname)
	case tar.TypeSymlink:
		err = unix.Symlinkat(h.Linkname, at, name)
	case tar.TypeFifo:
		err = unix.Mknodat(at, name, unix.S_IFIFO|0o600, 0)
	case tar.TypeChar, tar.TypeBlock:
		kind := uint32(unix.S_IFCHR)
		if h.Typeflag == tar.TypeBlock {
			kind = unix.S_IFBLK
		}
		err = unix.Mknodat(at, name, kind|0o600, int(unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor))))
	default:
		return fmt.Errorf("the tar has an entry of the unknown type %q", h.Typeflag)
	}
	if err != nil {
		return err
	}
	if err = u.metaAt(at, name, h); err != nil {
		unix.Unlinkat(at, name, 0)
	}
	return err
}

func (u *unpacker) write(at int, name string, r io.Reader, h *tar.Header) error {
	fd, err := unix.Openat(at, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), name)
	// Only the Writer of f: its ReadFrom would take a smaller buffer.
	_, err = io.CopyBuffer(struct{ io.Writer }{f}, r, u.buf)
	if perr := (*os.PathError)(nil); errors.As(err, &perr) {
		err = perr.Err // the name may be one for the moment
	}
	if err == nil {
		err = u.meta(fd, h)
	}
	if err = errors.Join(err, f.Close()); err != nil {
		unix.Unlinkat(at, name, 0)
	}
	return err
}

// link gives a file that was unpacked before one more name.
func (u *unpacker) link(at int, name, to string) error {
	to, err := u.rename(to)
	if err != nil {
		return err
	}
	dir, base := path.Split(to)
	fd, err := u.openDir(path.Clean(dir))
	if err == nil {
		err = unix.Linkat(fd, base, at, name, 0)
		unix.Close(fd)
	}
	if err != nil {
		return fmt.Errorf("link to %s: %w", to, err)
	}
	return nil
}

// finish gives the directories what they were spared while they were filled, the
// deepest first. Of a copy that failed they get what they can get.
func (u *unpacker) finish(whole bool) error {
	u.forget()
	for _, name := range slices.Backward(slices.Sorted(maps.Keys(u.dirs))) {
		dir, base := path.Split(name)
		fd, err := u.openDir(path.Clean(dir))
		if err == nil {
			err = u.metaAt(fd, base, u.dirs[name])
			unix.Close(fd)
		}
		if err != nil && whole {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

func (u *unpacker) metaAt(at int, name string, h *tar.Header) error {
	fd, err := unix.Openat(at, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if h.Typeflag != tar.TypeSymlink {
		return u.meta(fd, h)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if err := u.chown(fd, &st, h); err != nil {
		return err
	}
	ts, err := times(h)
	if err == nil {
		err = unix.UtimesNanoAt(at, name, ts, unix.AT_SYMLINK_NOFOLLOW)
	}
	return err
}

// meta gives an open file that is not a symlink its owner, mode, times and
// extended attributes.
func (u *unpacker) meta(fd int, h *tar.Header) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFLNK || (st.Mode&unix.S_IFMT == unix.S_IFDIR) != (h.Typeflag == tar.TypeDir) {
		return errors.New("it was replaced while it was copied")
	}
	if err := u.chown(fd, &st, h); err != nil { // first: it takes set-id bits and capabilities away
		return err
	}
	self := "/proc/self/fd/" + strconv.Itoa(fd) // leads to the open file itself
	for key, value := range h.PAXRecords {
		attr, ok := strings.CutPrefix(key, xattrPrefix)
		if !ok || !carried(attr, u.archive || !u.guard, u.archive) {
			continue
		}
		err := unix.Setxattr(self, attr, []byte(value), 0)
		if err != nil && !errors.Is(err, unix.ENOTSUP) && !errors.Is(err, unix.EPERM) { // as cp -a has it
			return fmt.Errorf("set %s: %w", attr, err)
		}
	}
	mode := uint32(h.Mode) & 0o7777
	if u.guard && !u.archive && h.Typeflag != tar.TypeDir {
		mode &^= unix.S_ISUID | unix.S_ISGID
	}
	if err := unix.Chmod(self, mode); err != nil {
		return fmt.Errorf("chmod: %w", err)
	}
	ts, err := times(h)
	if err == nil {
		err = unix.UtimesNanoAt(unix.AT_FDCWD, self, ts, 0)
	}
	return err
}

func (u *unpacker) chown(fd int, st *unix.Stat_t, h *tar.Header) error {
	if u.owner == nil {
		return nil
	}
	uid, gid := u.owner(h)
	if int(st.Uid) == uid && int(st.Gid) == gid {
		return nil
	}
	err := unix.Fchownat(fd, "", uid, gid, unix.AT_EMPTY_PATH)
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("keep the owner %d:%d: %w (without --archive it is yours)", uid, gid, err)
	}
	if err != nil {
		return fmt.Errorf("chown to %d:%d: %w", uid, gid, err)
	}
	return nil
}

// times gives a file's times of access and of change. The first is not in every
// tar.
func times(h *tar.Header) ([]unix.Timespec, error) {
	atime := h.ModTime
	if h.AccessTime.After(atime) {
		atime = h.AccessTime
	}
	ts := make([]unix.Timespec, 2)
	for i, t := range []time.Time{atime, h.ModTime} {
		var err error
		if ts[i], err = unix.TimeToTimespec(t); err != nil {
			return nil, fmt.Errorf("time %v: %w", t, err)
		}
	}
	return ts, nil
}
