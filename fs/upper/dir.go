package upper

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// The names in an upper's directory.
const (
	treeName  = "fs"         // overlayfs' upperdir
	workName  = "work"       // overlayfs' workdir
	aboutName = "varve.json" // an About
	lockName  = "lock"       // held by who has it open

	// stagingName lies below work and is where this package makes what is not
	// whole yet. overlayfs leaves it alone.
	stagingName = "staging"
)

// About says what an upper was made for.
type About struct {
	Version int    `json:"version"`
	Image   string `json:"image"` // digest of the manifest whose tree it changes
	Form    Form   `json:"form"`
	UID     uint32 `json:"uid"` // who owns it on disk, see Override
	GID     uint32 `json:"gid"`
}

const aboutVersion = 1

// ErrInUse says that somebody else has the upper open.
var ErrInUse = errors.New("in use")

// ErrNone says that a directory is missing or empty: that an upper can be made
// there.
var ErrNone = errors.New("no upper")

// A Dir is an upper that is open for this process alone. Its methods are safe
// for concurrent use.
type Dir struct {
	About
	path    string
	tree    int // O_PATH descriptors of fs and work/staging
	staging int
	lock    *os.File
	temps   atomic.Uint64 // names given in staging
}

// Attr is what the root of a new upper takes from the tree below it: overlayfs
// shows the upper's.
type Attr struct {
	Mode, UID, GID uint32 // st_mode and real owners
	Mtime          unix.Timespec
	Xattrs         map[string]string // as a mount shows them
}

// Create makes an upper in a directory that is empty or missing.
func Create(path string, about About, top Attr) (*Dir, error) {
	if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, err
	}
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	names, err := readNames(root, ".")
	if err != nil {
		return nil, err
	}
	if len(names) > 0 {
		return nil, fmt.Errorf("%s is not empty and no upper of varve's (there is %q): choose an empty directory", path, names[0])
	}
	if err := root.Chmod(".", 0o700); err != nil {
		return nil, err
	}
	about.Version, about.UID, about.GID = aboutVersion, uint32(os.Geteuid()), uint32(os.Getegid())
	for _, name := range []string{treeName, workName} {
		if err := root.Mkdir(name, 0o755); err != nil {
			return nil, err
		}
	}
	if err := top.apply(root, about.Form); err != nil {
		return nil, fmt.Errorf("upper %s: %w", path, err)
	}
	b, err := json.Marshal(about)
	if err != nil {
		return nil, err
	}
	// Written last: without it the directory is no upper.
	if err := root.WriteFile(aboutName+".tmp", b, 0o600); err != nil {
		return nil, err
	}
	if err := root.Rename(aboutName+".tmp", aboutName); err != nil {
		return nil, err
	}
	return Open(path)
}

// apply gives the new upper's root its attributes.
func (a Attr) apply(root *os.Root, form Form) error {
	fd, err := openDir(root, treeName)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	path := fmt.Sprintf("/proc/self/fd/%d", fd)
	for name, value := range a.Xattrs {
		stored, ok := form.Stored(name)
		if !ok {
			continue
		}
		// Who may not set it (trusted.* and security.* of a plain user) could not
		// write it through the mount either.
		if err := unix.Setxattr(path, stored, []byte(value), 0); err != nil && !errors.Is(err, unix.EPERM) {
			return fmt.Errorf("extended attribute %s: %w", name, err)
		}
	}
	owner := Owner{UID: a.UID, GID: a.GID, Mode: a.Mode}
	if form == Override {
		if owner.UID != 0 || owner.GID != 0 || a.Mode&0o700 != 0o700 {
			if err := unix.Setxattr(path, OverrideXattr, []byte(owner.String()), 0); err != nil {
				return err
			}
		}
		a.Mode |= 0o700
	} else if err := unix.Chown(path, int(a.UID), int(a.GID)); err != nil {
		return err
	}
	if err := unix.Chmod(path, a.Mode&^unix.S_IFMT); err != nil {
		return err
	}
	return unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{{Nsec: unix.UTIME_OMIT}, a.Mtime}, 0)
}

// Open opens an upper and clears what a daemon that was killed left in work. It
// refuses by name what is not its own. ErrNone is wrapped where there is nothing.
func Open(path string) (_ *Dir, err error) {
	root, err := os.OpenRoot(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w", path, ErrNone)
	}
	if err != nil {
		return nil, err
	}
	defer root.Close()
	if names, err := readNames(root, "."); err == nil && len(names) == 0 {
		return nil, fmt.Errorf("%s: %w", path, ErrNone)
	}
	d := &Dir{path: path, tree: -1, staging: -1}
	defer func() {
		if err != nil {
			d.Close()
		}
	}()
	for _, name := range []string{treeName, workName, aboutName, lockName} {
		// os.Root follows links that stay within it.
		if st, err := root.Lstat(name); err == nil && st.Mode()&os.ModeSymlink != 0 {
			return nil, fmt.Errorf("upper %s: %s is a symlink, which none of varve's is", path, name)
		}
	}
	if d.About, err = readAbout(root); err != nil {
		return nil, fmt.Errorf("upper %s: %w", path, err)
	}
	if d.lock, err = root.OpenFile(lockName, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600); err != nil {
		return nil, fmt.Errorf("upper %s: %w", path, err)
	}
	if err := unix.Flock(int(d.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = fmt.Errorf("another mount has it: %w", ErrInUse)
		}
		return nil, fmt.Errorf("upper %s: %w", path, err)
	}
	if err := d.clearWork(root); err != nil {
		return nil, fmt.Errorf("upper %s: %w", path, err)
	}
	if d.tree, err = openDir(root, treeName); err != nil {
		return nil, fmt.Errorf("upper %s: %w", path, err)
	}
	if d.staging, err = openDir(root, workName+"/"+stagingName); err != nil {
		return nil, fmt.Errorf("upper %s: %w", path, err)
	}
	var tree, staging unix.Stat_t
	if err := errors.Join(unix.Fstat(d.tree, &tree), unix.Fstat(d.staging, &staging)); err != nil {
		return nil, err
	}
	if tree.Dev != staging.Dev {
		return nil, fmt.Errorf("upper %s: %s and %s lie on two filesystems", path, treeName, workName)
	}
	return d, nil
}

func readAbout(root *os.Root) (a About, err error) {
	f, err := root.OpenFile(aboutName, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, os.ErrNotExist) {
		return a, fmt.Errorf("there is no %s: it is no upper of varve's", aboutName)
	}
	if err != nil {
		return a, err
	}
	defer f.Close()
	dec := json.NewDecoder(io.LimitReader(f, 1<<16))
	if err := dec.Decode(&a); err != nil {
		return a, fmt.Errorf("%s is damaged (%w): it says which image the upper is of, so put it back, or save what is in %s and remove the mount", aboutName, err, treeName)
	}
	switch {
	case a.Version != aboutVersion:
		return a, fmt.Errorf("%s is of version %d, this varve knows %d", aboutName, a.Version, aboutVersion)
	case a.Form != Trusted && a.Form != User && a.Form != Override:
		return a, fmt.Errorf("%s: form %.20q is not known", aboutName, a.Form)
	}
	return a, nil
}

// clearWork removes what was staged and never finished. overlayfs clears work/work
// by itself when it mounts.
func (d *Dir) clearWork(root *os.Root) error {
	names, err := readNames(root, workName)
	if err != nil {
		return err
	}
	for _, name := range names {
		switch name {
		case stagingName:
			if err := root.RemoveAll(workName + "/" + name); err != nil {
				return err
			}
		case "work", "index": // overlayfs' own
		default:
			return fmt.Errorf("%s/%.80q is not varve's: remove it, or choose another directory", workName, name)
		}
	}
	return root.Mkdir(workName+"/"+stagingName, 0o700)
}

func readNames(root *os.Root, name string) ([]string, error) {
	f, err := root.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return f.Readdirnames(-1)
}

func openDir(root *os.Root, name string) (int, error) {
	f, err := root.OpenFile(name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return -1, err
	}
	defer f.Close()
	return unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
}

// Path is where the upper lies, Tree overlayfs' upperdir and Work its workdir.
func (d *Dir) Path() string { return d.path }

// Tree is overlayfs' upperdir.
func (d *Dir) Tree() string { return filepath.Join(d.path, treeName) }

// Work is overlayfs' workdir.
func (d *Dir) Work() string { return filepath.Join(d.path, workName) }

// Close lets others open it.
func (d *Dir) Close() error {
	var errs []error
	for _, fd := range []int{d.tree, d.staging} {
		if fd >= 0 {
			errs = append(errs, unix.Close(fd))
		}
	}
	if d.lock != nil {
		errs = append(errs, d.lock.Close())
	}
	return errors.Join(errs...)
}

// Remove deletes the upper, its directory too if nothing else is in that, and
// closes d.
func (d *Dir) Remove() error {
	var errs []error
	for _, name := range []string{treeName, workName, aboutName, lockName} {
		errs = append(errs, RemoveAll(filepath.Join(d.path, name)))
	}
	err := os.Remove(d.path)
	if errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EBUSY) || errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	return errors.Join(append(errs, err, d.Close())...)
}

// RemoveAll is os.RemoveAll for a tree whose directories may lack the owner's
// own permissions, which stop anybody but root.
func RemoveAll(path string) error {
	err := os.RemoveAll(path)
	if err == nil || !errors.Is(err, os.ErrPermission) {
		return err
	}
	root, rerr := os.OpenRoot(filepath.Dir(path))
	if rerr != nil {
		return errors.Join(err, rerr)
	}
	defer root.Close()
	unlock(root, filepath.Base(path))
	return os.RemoveAll(path)
}

func unlock(root *os.Root, name string) {
	root.Chmod(name, 0o700)
	f, err := root.Open(name)
	if err != nil {
		return
	}
	defer f.Close()
	entries, _ := f.ReadDir(-1)
	for _, e := range entries {
		if e.IsDir() {
			unlock(root, strings.TrimSuffix(name, "/")+"/"+e.Name())
		}
	}
}
