package fs

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/fs/upper"
)

// MountOverlay mounts the kernel's overlayfs at dir: the tree that is mounted at
// lower, and up over it. It is not attached anywhere before it is complete.
//
// The upper must stand for itself: nothing in it may point into the lower by
// anything but its own name, so that diff and commit can read it alone. Hence no
// redirects (a directory of the image renames with EXDEV, which mv answers by
// copying), no metadata without its data, and no index of hard links.
//
// Steady says that the lower is EROFS, whose superblock has a UUID: what overlayfs
// remembers of a copied file's origin can then not be taken for another file's
// when the upper comes to lie on another index.
func MountOverlay(dir, lower string, up *upper.Dir, o Options) (*Kernel, error) {
	fd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("fsopen overlay: %w", err)
	}
	defer unix.Close(fd)
	set := func(key, value string) {
		if err == nil {
			if err = unix.FsconfigSetString(fd, key, value); err != nil {
				err = fmt.Errorf("overlay: %s=%s: %w", key, value, explain(fd, err))
			}
		}
	}
	for _, p := range []struct{ key, path string }{{"lowerdir", lower}, {"upperdir", up.Tree()}, {"workdir", up.Work()}} {
		// A path that holds what overlayfs takes for its own punctuation, or is
		// longer than the kernel takes here, goes by descriptor.
		if len(p.path) > 255 || strings.ContainsAny(p.path, ":,\\") {
			f, err := os.OpenFile(p.path, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
			if err != nil {
				return nil, err
			}
			defer f.Close()
			p.path = fmt.Sprintf("/proc/self/fd/%d", f.Fd())
		}
		set(p.key, p.path)
	}
	set("source", "varve")
	if up.Form == upper.User {
		if err == nil {
			err = unix.FsconfigSetFlag(fd, "userxattr") // neither redirects nor metacopy go with it
		}
	} else {
		set("redirect_dir", "nofollow")
		set("metacopy", "off")
	}
	set("index", "off")
	if o.Steady {
		// A file then has one number for ever, also when it is copied up or has
		// more names.
		set("xino", "on")
	}
	if err != nil {
		return nil, err
	}
	if err := unix.FsconfigCreate(fd); err != nil {
		return nil, fmt.Errorf("overlay: %w", explain(fd, err))
	}
	attrs := 0
	if !o.Setuid {
		attrs = unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV
	}
	mnt, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, attrs)
	if err != nil {
		return nil, fmt.Errorf("overlay: fsmount: %w", err)
	}
	defer unix.Close(mnt)
	if err := unix.MoveMount(mnt, "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return nil, fmt.Errorf("mount %s: %w", dir, err)
	}
	return &Kernel{dir: dir, done: make(chan struct{})}, nil
}

// UpperInUse reports whether an overlayfs that is mounted somewhere, or that
// somebody is in, writes up. Two at a time have no defined outcome.
//
// It asks the kernel by a mount that cannot come to be: a work directory on another
// filesystem is refused, but only after an upper in use was, which is an error
// where index=on (ovl_get_upper and ovl_get_workdir in fs/overlayfs/super.c).
func UpperInUse(up *upper.Dir) (bool, error) {
	if up.Form == upper.Override {
		return false, nil // never the kernel's
	}
	fd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return false, nil // there is none
	}
	defer unix.Close(fd)
	tree, err := os.OpenFile(up.Tree(), unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return false, err
	}
	defer tree.Close()
	for _, p := range [][2]string{
		{"lowerdir", "/"}, {"upperdir", fmt.Sprintf("/proc/self/fd/%d", tree.Fd())}, {"workdir", "/proc"}, {"index", "on"},
	} {
		if err := unix.FsconfigSetString(fd, p[0], p[1]); err != nil {
			return false, nil // this kernel checks it otherwise
		}
	}
	err = unix.FsconfigCreate(fd)
	return errors.Is(err, unix.EBUSY), nil
}

// InUserNamespace reports whether this process's root is not the machine's.
func InUserNamespace() bool {
	b, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		return false
	}
	var inside, outside, n uint64
	_, err = fmt.Sscan(string(b), &inside, &outside, &n)
	return err != nil || inside != 0 || outside != 0 || n != 1<<32-1
}
