package fs

import (
	"fmt"
	"log/slog"
	"os"
	"strings"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/fs/upper"
)

// ServeUnion mounts u read-write at dir and serves it until [Served.Unmount].
func ServeUnion(dir string, u *Union, o Options) (*Served, error) {
	root := os.Geteuid() == 0
	override := u.up.Form == upper.Override
	opts := &fuse.MountOptions{
		FsName: "varve", Name: "varve",
		MaxWrite: maxRead, MaxBackground: 64,
		EnableSymlinkCaching:     true,
		ExplicitDataCacheControl: true,
		// Umasks are for the upper's filesystem to apply, which may have default
		// ACLs instead. Set-ID bits are for the daemon to take away: only then does
		// the kernel not ask for file capabilities before every write (SB_NOSEC).
		ExtraCapabilities: fuse.CAP_ATOMIC_O_TRUNC | fuse.CAP_DONT_MASK | fuse.CAP_HANDLE_KILLPRIV_V2 |
			fuse.CAP_SETXATTR_EXT | fuse.CAP_ASYNC_DIO,
		MaxStackDepth:     1,
		Logger:            slog.NewLogLogger(o.Log.Handler(), slog.LevelDebug),
		DirectMountStrict: root,
	}
	if root && !override && canPassThrough(u.up) {
		u.kernel.through.Store(true)
	} else {
		// The two exclude one another (process_init_reply in fs/fuse/inode.c).
		u.kernel.cached = true
		opts.ExtraCapabilities |= fuse.CAP_WRITEBACK_CACHE
		opts.DisabledCapabilities = fuse.CAP_PASSTHROUGH
	}
	if root {
		flags := uintptr(unix.MS_NOATIME)
		if !o.Setuid {
			flags |= unix.MS_NOSUID | unix.MS_NODEV
		}
		opts.DirectMountFlags = flags
		if !override && !o.Private {
			opts.AllowOther = true
		}
	}
	if !override {
		opts.EnableAcl = true
		opts.Options = []string{"default_permissions"}
	}
	c, err := connect(dir, opts)
	if err != nil {
		return nil, fmt.Errorf("mount %s: %w", dir, hint(err))
	}
	u.kernel.conn = c
	s := &Served{dir: dir, done: make(chan struct{})}
	go func() {
		defer close(s.done)
		newLoop(c, u, opts, opts.MaxWrite, o.Log).run()
		u.OnUnmount()
	}()
	if root {
		// What the kernel reads ahead may be changed once its INIT is answered:
		// who asks for anything waits for that.
		var st unix.Stat_t
		unix.Stat(dir, &st)
	}
	return s, nil
}

// canPassThrough says whether the kernel may be asked to read and write the
// upper's files itself: the initial user namespace, a kernel that knows how, and
// a filesystem that does not lie on others. Where that is wrong, registering the
// first file fails and the daemon does the work.
func canPassThrough(up *upper.Dir) bool {
	var st unix.Statfs_t
	if InUserNamespace() || unix.Fstatfs(up.Root(), &st) != nil {
		return false
	}
	switch st.Type {
	case unix.OVERLAYFS_SUPER_MAGIC, unix.ECRYPTFS_SUPER_MAGIC, unix.FUSE_SUPER_MAGIC:
		return false
	}
	var name unix.Utsname
	var major, minor int
	if unix.Uname(&name) != nil {
		return false
	}
	release, _, _ := strings.Cut(unix.ByteSliceToString(name.Release[:]), "-")
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err != nil {
		return false
	}
	return major > 6 || major == 6 && minor >= 9
}
