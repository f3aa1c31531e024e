package fs

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"

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
// EROFS reads its devices through their page cache, served data files too: the next
// mount of an image then finds there what this one has read, and asks nobody. What
// is cached twice is given up once it is at rest, see [Forget]. Direct has it read
// without, where the kernel knows how, for what must not stay if it turns out to be
// wrong. A second start then takes twice as long, and a cold walk of plain files
// three times; random reads cost the same.
//
// Beneath, if not 0, is the [MountID] of the mount at dir, beneath which it goes:
// when that one is unmounted, who is in it stays there, and every new path leads
// to this one. It is refused where something lies on that mount or in it, which
// would go out of sight too.
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
	if o.Beneath != 0 {
		if err := bare(dir, o.Beneath); err != nil {
			return nil, err
		}
		how |= moveBeneath
	}
	if err := unix.MoveMount(mnt, "", unix.AT_FDCWD, dir, how); err != nil {
		return nil, fmt.Errorf("mount %s: %w", dir, err)
	}
	return &Kernel{dir: dir, done: make(chan struct{})}, nil
}

// Adopt takes up a mount of the kernel's that another process made.
func Adopt(dir string) *Kernel { return &Kernel{dir: dir, done: make(chan struct{})} }

// moveBeneath is MOVE_MOUNT_BENEATH of include/uapi/linux/mount.h, Linux 6.5.
const moveBeneath = 0x200

// MountID gives the number by which /proc/self/mountinfo knows the mount that a
// path leads to. Nothing is asked of who serves it, which may be this process.
func MountID(dir string) (uint64, error) {
	var st unix.Statx_t
	flags := unix.AT_SYMLINK_NOFOLLOW | unix.AT_NO_AUTOMOUNT | unix.AT_STATX_DONT_SYNC
	if err := unix.Statx(unix.AT_FDCWD, dir, flags, unix.STATX_MNT_ID, &st); err != nil {
		return 0, fmt.Errorf("statx %s: %w", dir, err)
	}
	return st.Mnt_id, nil
}

// ErrCovered says that something is mounted on a mount, or in it.
var ErrCovered = errors.New("something else is mounted there")

// bare checks that a path leads to a mount on which nothing lies.
func bare(dir string, id uint64) error {
	top, err := MountID(dir)
	if err != nil {
		return err
	}
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	covered := top != id
	for line := range strings.Lines(string(b)) {
		var its, parent uint64
		if _, err := fmt.Sscan(line, &its, &parent); err == nil && parent == id {
			covered = true
		}
	}
	if covered {
		return fmt.Errorf("%s: %w", dir, ErrCovered)
	}
	return nil
}

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
