package fs

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/metrics"
)

// Options are what every FUSE mount of ours needs to know.
type Options struct {
	Metrics *metrics.Metrics
	Log     *slog.Logger
	Fault   Fault // required by NewTree

	Direct  bool   // see MountKernel
	Beneath uint64 // see MountKernel
	Steady  bool   // see MountOverlay
	Private bool   // only the daemon's user and the kernel may look
	Xattrs  bool   // whether any file has extended attributes
	Setuid  bool   // honour setuid bits and device nodes: for root only
}

// maxRead is the largest read that still fits the pipe of splice with its header:
// a page short of what 1 MiB pipes can hold (fs/splice.c, pipe-max-size).
const maxRead = 1<<20 - 2*4096

// Served is a FUSE mount that is being served.
type Served struct {
	dir  string
	done chan struct{}
	tree *Tree // nil where it is something else
	far  bool  // see ReadFar; guarded by who calls it
}

// Serve mounts raw at dir and serves it until [Served.Unmount].
func Serve(dir string, raw fuse.RawFileSystem, o Options) (*Served, error) {
	root := os.Geteuid() == 0
	opts := &fuse.MountOptions{
		FsName: "varve", Name: "varve",
		MaxWrite: maxRead, MaxBackground: 64,
		DisableXAttrs:            !o.Xattrs,
		EnableSymlinkCaching:     true,
		ExplicitDataCacheControl: true,
		ExtraCapabilities:        fuse.CAP_NO_OPENDIR_SUPPORT,
		// With passthrough the mount would count as stacked, and neither EROFS
		// nor a nested overlay may lie on a stacked filesystem.
		DisabledCapabilities: fuse.CAP_PASSTHROUGH,
		Logger:               slog.NewLogLogger(o.Log.Handler(), slog.LevelDebug),
		DirectMountStrict:    root,
		Options:              []string{"ro"},
	}
	if root {
		flags := uintptr(unix.MS_RDONLY | unix.MS_NOATIME)
		if !o.Setuid {
			flags |= unix.MS_NOSUID | unix.MS_NODEV
		}
		opts.DirectMountFlags = flags
		opts.Options = nil
		if !o.Private {
			// Others see what the modes let them. A plain user's mount is seen by
			// that user alone, who could read the image anyway.
			opts.AllowOther = true
			opts.Options = []string{"default_permissions"}
		}
	}
	// go-fuse's own mount(2) leaves the connection to whatever we execute, and what of
	// that outlives us would keep it from ending.
	c, err := connect(dir, opts)
	if err != nil {
		return nil, fmt.Errorf("mount %s: %w", dir, hint(err))
	}
	if t, ok := raw.(*Tree); ok {
		return serveTree(dir, c, t, opts, o)
	}
	opts.DirectMountStrict = false
	server, err := fuse.NewServer(raw, fmt.Sprintf("/dev/fd/%d", c.fd), opts)
	if err != nil {
		unix.Close(c.fd)
		return nil, errors.Join(fmt.Errorf("mount %s: %w", dir, err), detach(dir))
	}
	s := &Served{dir: dir, done: make(chan struct{})}
	go func() {
		defer close(s.done)
		server.Serve()
	}()
	if err := server.WaitMount(); err != nil {
		return nil, errors.Join(fmt.Errorf("mount %s: %w", dir, err), s.Unmount(true))
	}
	return s, nil
}

// serveTree serves an image's tree by one thread, see [loop].
func serveTree(dir string, c *conn, t *Tree, opts *fuse.MountOptions, o Options) (*Served, error) {
	t.ahead.conn = c
	l := newLoop(c, t, opts, 0, o.Log)
	l.reads = t
	if err := l.init(); err != nil {
		unix.Close(c.fd)
		return nil, errors.Join(fmt.Errorf("mount %s: %w", dir, err), detach(dir))
	}
	s := &Served{dir: dir, tree: t, done: make(chan struct{})}
	go func() {
		defer close(s.done)
		l.run()
	}()
	return s, nil
}

// hint adds what to do about a mount that failed.
func hint(err error) error {
	switch {
	case unix.Access(fuseDevice, unix.F_OK) != nil:
		return fmt.Errorf("%w: there is no %s (modprobe fuse)", err, fuseDevice)
	case unix.Access(fuseDevice, unix.R_OK|unix.W_OK) != nil:
		return fmt.Errorf("%w: this user may not open %s (udev makes it 0666 where it runs; else: chmod 666 %[2]s as root)", err, fuseDevice)
	case os.Geteuid() != 0:
		if _, lerr := exec.LookPath("fusermount3"); lerr != nil {
			return fmt.Errorf("%w: fusermount3 is missing (apt-get install fuse3)", err)
		}
	}
	return err
}

const fuseDevice = "/dev/fuse"

// ReadFar has the kernel read ahead on the mount as far as it can, from the next
// open(2) on: without it no read is larger than 128 KiB, whatever the mount
// allows, which costs 1.6 times the CPU. It is for what is wholly here: where a
// mapped file is touched, the kernel asks for all that it may read ahead around
// the place, and would have it fetched. From then on small files are given to it
// before it asks, see [ahead].
func (s *Served) ReadFar() {
	if s.tree != nil {
		s.tree.ahead.on.Store(true)
	}
	if !s.far {
		s.far = true
		s.readAhead(maxRead >> 10)
	}
}

// ReadLittle has the kernel read less ahead on the mount than it is used to, from the
// next open(2) on. It is for data files that are not wholly here: what it reads besides
// are neighbours in the layer, see [DataFiles.Read].
func (s *Served) ReadLittle() { s.readAhead(little) }

// little is in KiB. With 16 a start takes twice as many reads, with 128 it fetches three
// percent more.
const little = 64

// readAhead is a wish: the mount works without.
func (s *Served) readAhead(kb int) {
	var st unix.Statx_t
	if os.Geteuid() != 0 || unix.Statx(unix.AT_FDCWD, s.dir, unix.AT_SYMLINK_NOFOLLOW|unix.AT_STATX_DONT_SYNC, 0, &st) != nil {
		return
	}
	path := fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", st.Dev_major, st.Dev_minor)
	os.WriteFile(path, fmt.Appendf(nil, "%d", kb), 0)
}

// Done is closed when nothing is served any more: a lazily unmounted tree is
// served until the last who is in it has left.
func (s *Served) Done() <-chan struct{} { return s.done }

// ErrBusy says that somebody is in the mount.
var ErrBusy = errors.New("busy")

// Unmount ends the mount. Where it is busy, lazy takes it out of sight at once
// and serves those who are in it until they leave; else ErrBusy is the answer.
func (s *Served) Unmount(lazy bool) error {
	select {
	case <-s.done: // umount(8) or fusermount3 was faster
		return nil
	default:
	}
	if lazy {
		return detach(s.dir)
	}
	// go-fuse's own Unmount tries again for a while, which a busy mount does not
	// deserve; a plain user needs fusermount3 for it.
	if os.Geteuid() == 0 {
		if err := already(unmount(s.dir, 0)); err != nil {
			return err
		}
	} else if out, err := exec.Command("fusermount3", "-u", "--", s.dir).CombinedOutput(); err != nil {
		return fmt.Errorf("unmount %s: %w: %s", s.dir, ErrBusy, bytes.TrimSpace(out))
	}
	select {
	case <-s.done:
	case <-time.After(10 * time.Second):
		return fmt.Errorf("unmount %s: the kernel does not let go", s.dir)
	}
	return nil
}

// already takes it for done where nothing is mounted any more.
func already(err error) error {
	if errors.Is(err, unix.EINVAL) {
		return nil
	}
	return err
}

func unmount(dir string, flags int) error {
	err := unix.Unmount(dir, flags)
	if errors.Is(err, unix.EBUSY) {
		err = ErrBusy
	}
	if err != nil {
		return fmt.Errorf("unmount %s: %w", dir, err)
	}
	return nil
}
