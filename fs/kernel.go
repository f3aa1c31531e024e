package fs

import (
	"errors"
	"fmt"
	"os"
	"os/exec"

	"golang.org/x/sys/unix"
)

// Kernel is a mount that the kernel's EROFS serves.
type Kernel struct {
	dir  string
	done chan struct{}
}

// MountKernel mounts an index at dir, its devices being the files at the given
// paths. It is not attached anywhere before it is complete.
//
// Direct has EROFS read its devices without their page cache, where the kernel
// knows how: then a read asks a served data file for what the reader wants and
// not for its neighbours in the layer, which would have to be fetched, and no
// byte is cached twice. Files that are wholly here are better read with it: a
// cold walk of small files is then two to three times as fast.
//
// Beneath puts it in the place of the mount that is at dir, which is taken out of
// sight: who is in that one stays there, every new path leads to this one.
func MountKernel(dir, index string, devices []string, o Options) (*Kernel, error) {
	fd, err := unix.Fsopen("erofs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("fsopen erofs: %w", err)
	}
	defer unix.Close(fd)
	set := func(key, value string) {
		if err == nil {
			if err = unix.FsconfigSetString(fd, key, value); err != nil {
				err = fmt.Errorf("erofs: %s=%s: %w", key, value, explain(fd, err))
			}
		}
	}
	// The kernel takes 255 bytes of a path here; a longer one goes by descriptor.
	var held []*os.File
	defer func() {
		for _, f := range held {
			f.Close()
		}
	}()
	short := func(path string) string {
		const most = 255
		if len(path) <= most || err != nil {
			return path
		}
		var f *os.File
		if f, err = os.Open(path); err != nil {
			return path
		}
		held = append(held, f)
		return fmt.Sprintf("/proc/self/fd/%d", f.Fd())
	}
	set("source", short(index))
	for _, d := range devices {
		set("device", short(d))
	}
	if err != nil {
		return nil, err
	}
	if err := unix.FsconfigSetFlag(fd, "ro"); err != nil {
		return nil, fmt.Errorf("erofs: ro: %w", explain(fd, err))
	}
	if o.Direct {
		// A kernel that does not know it refuses; the mount works without.
		if err := unix.FsconfigSetFlag(fd, "directio"); err != nil {
			o.Log.Debug("EROFS has no directio", "err", explain(fd, err))
		}
	}
	if err := unix.FsconfigCreate(fd); err != nil {
		return nil, fmt.Errorf("erofs: %w", explain(fd, err))
	}
	attrs := unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOATIME
	if !o.Setuid {
		attrs |= unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV
	}
	mnt, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, attrs)
	if err != nil {
		return nil, fmt.Errorf("erofs: fsmount: %w", err)
	}
	defer unix.Close(mnt)
	how := unix.MOVE_MOUNT_F_EMPTY_PATH
	if o.Beneath {
		how |= moveBeneath
	}
	if err := unix.MoveMount(mnt, "", unix.AT_FDCWD, dir, how); err != nil {
		return nil, fmt.Errorf("mount %s: %w", dir, err)
	}
	if o.Beneath {
		if err := detach(dir); err != nil {
			return nil, err
		}
	}
	return &Kernel{dir: dir, done: make(chan struct{})}, nil
}

// moveBeneath is MOVE_MOUNT_BENEATH of include/uapi/linux/mount.h, Linux 6.5.
const moveBeneath = 0x200

// explain adds what the kernel says beside the errno.
func explain(fd int, err error) error {
	buf := make([]byte, 512)
	if n, rerr := unix.Read(fd, buf); rerr == nil && n > 2 {
		return fmt.Errorf("%w (%s)", err, buf[2:n])
	}
	return err
}

// Unmount ends the mount, as [Served.Unmount] does.
func (k *Kernel) Unmount(lazy bool) error {
	err := already(unmount(k.dir, 0))
	if err == nil {
		close(k.done)
	}
	if lazy && errors.Is(err, ErrBusy) {
		return detach(k.dir)
	}
	return err
}

// Done is closed when the kernel reads no more. It does not say when the last
// has left a lazily unmounted tree, so that one is never done.
func (k *Kernel) Done() <-chan struct{} { return k.done }

// Detach takes whatever is mounted at dir out of sight: a mount whose daemon
// died. It is no error if nothing is.
func Detach(dir string) error {
	for range 16 { // mounts may lie on one another
		err := detach(dir)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func detach(dir string) error {
	if os.Geteuid() == 0 {
		return unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	}
	if out, err := exec.Command("fusermount3", "-u", "-z", "--", dir).CombinedOutput(); err != nil {
		return fmt.Errorf("unmount %s: %s: %w", dir, out, unix.EINVAL)
	}
	return nil
}
