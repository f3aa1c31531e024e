package fs

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/fs/upper"
)

// Handles of files carry no state but this: what is open is kept by node.
const (
	fhCached = 1 + iota
	fhPassed
)

// openFile is what is open of a regular file: one descriptor for all who have it
// open. The kernel allows either files that it caches or files that it passes
// through to be open of an inode at one time, not both (fuse_file_io_open in
// fs/fuse/iomode.c).
type openFile struct {
	users atomic.Int32 // cached and passed together

	mu      sync.Mutex // guards what follows
	fd      int        // -1 where nothing is open
	ro      bool       // fd is only good for reading
	old     []int      // descriptors that a better one took the place of
	pins    int        // operations that go by name and use fd
	cached  int
	passed  int
	backing int32 // the kernel's number of fd, while passed > 0
	stale   bool  // the kernel's cache may be older than the file
}

// pin gives the descriptor that is open, if one is, until unpin is called.
func (o *openFile) pin() (fd int, rw, ok bool) {
	if o.users.Load() == 0 {
		return -1, false, false
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.fd < 0 {
		return -1, false, false
	}
	o.pins++
	return o.fd, !o.ro, true
}

func (o *openFile) unpin() {
	o.mu.Lock()
	o.pins--
	o.settle()
	o.mu.Unlock()
}

// settle closes what nobody uses. Its caller holds mu.
func (o *openFile) settle() {
	if o.pins > 0 || o.cached+o.passed > 0 {
		return
	}
	if o.fd >= 0 {
		unix.Close(o.fd)
	}
	for _, fd := range o.old {
		unix.Close(fd)
	}
	o.fd, o.old, o.ro = -1, nil, false
}

// close closes everything, at the end of the mount.
func (o *openFile) close() {
	o.mu.Lock()
	o.pins, o.cached, o.passed = 0, 0, 0
	o.settle()
	o.mu.Unlock()
}

// file opens a node's file if it is not open, for writing wherever that is
// possible: others may come who want to. Its caller holds ns and open.mu.
func (u *Union) file(n *node, write bool) error {
	o := &n.open
	if o.fd >= 0 && !(write && o.ro) {
		return nil
	}
	r, err := u.reach(n)
	if err != nil {
		return err
	}
	defer r.done()
	ro := false
	fd, err := r.Open(unix.O_RDWR | unix.O_NONBLOCK)
	if err != nil && !write {
		// An immutable file, say, or one that is being executed on disk.
		ro = true
		fd, err = r.Open(unix.O_RDONLY | unix.O_NONBLOCK)
	}
	if err != nil {
		return err
	}
	if o.fd >= 0 {
		o.old = append(o.old, o.fd)
	}
	o.fd, o.ro = fd, ro
	return nil
}

// fd gives a descriptor of a file that the kernel has open. It stays open while
// the kernel waits for the answer.
func (u *Union) fd(n *node, write bool) (int, error) {
	o := &n.open
	o.mu.Lock()
	fd, ok := o.fd, o.fd >= 0 && !(write && o.ro)
	o.mu.Unlock()
	if ok {
		return fd, nil
	}
	u.ns.RLock()
	defer u.ns.RUnlock()
	o.mu.Lock()
	defer o.mu.Unlock()
	err := u.file(n, write)
	return o.fd, err
}

func (u *Union) Open(cancel <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) (st fuse.Status) {
	trunc := in.Flags&unix.O_TRUNC != 0
	if in.Flags&unix.O_ACCMODE == unix.O_RDONLY && !trunc {
		defer u.ops.done(opOpen, time.Now(), &st)
		if u.openLower(in.NodeId, out) {
			return fuse.OK
		}
		n := u.node(in.NodeId)
		if n == nil {
			return fuse.Status(unix.ESTALE)
		}
		return upperStatus(u.open(n, false, out))
	}
	defer u.begin(opOpen, &st)()
	size := int64(whole)
	if trunc {
		size = 0
	}
	n, err := u.own(in.NodeId, size)
	if err != nil {
		return upperStatus(err)
	}
	if err := u.open(n, true, out); err != nil || !trunc {
		return upperStatus(err)
	}
	err = u.openTrunc(n, in.Mode&fuse.OPEN_KILL_SUIDGID != 0)
	if err != nil {
		u.close(n, out.Fh)
	}
	return upperStatus(err)
}

func (u *Union) openTrunc(n *node, kill bool) error {
	fd, err := u.fd(n, true)
	if err != nil {
		return err
	}
	if err := unix.Ftruncate(fd, 0); err != nil || !kill {
		return err
	}
	return u.tame(n, upper.At{Dir: fd, Live: true})
}

// openLower opens a file that only the lower has, for reading.
func (u *Union) openLower(id uint64, out *fuse.OpenOut) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.nodes[id] != nil || !u.isLower(id) {
		return false
	}
	u.opened[id]++
	out.Fh, out.OpenFlags = fhCached, fuse.FOPEN_KEEP_CACHE|fuse.FOPEN_NOFLUSH
	return true
}

// open opens a file of the upper.
func (u *Union) open(n *node, write bool, out *fuse.OpenOut) error {
	u.ns.RLock()
	defer u.ns.RUnlock()
	n.open.mu.Lock()
	defer n.open.mu.Unlock()
	if err := u.file(n, write); err != nil {
		return err
	}
	u.admit(n, out)
	return nil
}

// admit counts one more who has a node's file open, and says how. Its caller
// holds open.mu.
func (u *Union) admit(n *node, out *fuse.OpenOut) {
	o := &n.open
	o.users.Add(1)
	if u.passThrough(n) {
		o.passed++
		o.stale = true
		out.Fh, out.OpenFlags, out.BackingID = fhPassed, fuse.FOPEN_PASSTHROUGH|fuse.FOPEN_NOFLUSH, o.backing
		return
	}
	o.cached++
	out.Fh, out.OpenFlags = fhCached, fuse.FOPEN_NOFLUSH
	if !o.stale {
		out.OpenFlags |= fuse.FOPEN_KEEP_CACHE
	}
	o.stale = false
}

// passThrough says whether the kernel is to read and write a file itself, and
// has it know the file. Its caller holds open.mu.
func (u *Union) passThrough(n *node) bool {
	o := &n.open
	switch {
	case o.passed > 0:
		return true
	case o.cached > 0 || !u.kernel.through.Load():
		return false
	case upper.Tame(n.mode.Load()) != n.mode.Load():
		// Whose bits a write must take away: the kernel leaves that to us, and
		// passing through it writes as the daemon, whom it lets keep them.
		return false
	}
	id, err := u.kernel.conn.backing(o.fd)
	if err != nil || id <= 0 {
		// Not this kernel, not this user, or not this filesystem: it will not come.
		u.kernel.through.Store(false)
		return false
	}
	o.backing = id
	return true
}

func (u *Union) Release(cancel <-chan struct{}, in *fuse.ReleaseIn) {
	st := fuse.OK
	defer u.ops.done(opRelease, time.Now(), &st)
	u.mu.Lock()
	n := u.nodes[in.NodeId]
	if n == nil {
		if u.opened[in.NodeId]--; u.opened[in.NodeId] <= 0 {
			delete(u.opened, in.NodeId)
		}
	}
	u.mu.Unlock()
	if n != nil {
		u.close(n, in.Fh)
	}
}

// close undoes open.
func (u *Union) close(n *node, fh uint64) {
	o := &n.open
	o.mu.Lock()
	defer o.mu.Unlock()
	if fh == fhPassed {
		// The kernel has let go of the file before it said so (fuse_file_put in
		// fs/fuse/file.c).
		if o.passed--; o.passed == 0 {
			u.kernel.conn.release(o.backing)
		}
	} else {
		o.cached--
	}
	o.users.Add(-1)
	o.settle()
}

// Flush has nothing to do: nothing is kept back here, and locks are the kernel's.
// It answers ENOSYS so as not to be called again.
func (u *Union) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status { return fuse.ENOSYS }
