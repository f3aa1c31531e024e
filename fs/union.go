package fs

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/fs/upper"
	"github.com/varvefs/varve/index"
	"github.com/varvefs/varve/metrics"
)

// Union shows an image's tree, the lower, and a writable directory over it, the
// upper. It keeps the upper in overlayfs' form, with redirect_dir, metacopy and
// index off: a directory of the image renames with EXDEV.
//
// An inode of the image has its EROFS nid for its number, for ever: copied up it
// keeps it, and a file that the kernel holds open goes on in the copy. An inode
// that only the upper has is numbered by that filesystem, past the last nid. What
// the upper has nothing of costs no memory; the rest has a node while the kernel
// knows it.
//
// Nobody else writes the upper, so the kernel may keep what it was told until it
// has itself asked for a change.
//
// Locks, in the order in which they are taken: hold, ns, open.mu of a node, mu,
// dirs.mu. Nothing of the lower's contents is waited for with any but hold.
type Union struct {
	fuse.RawFileSystem
	low    *Tree
	up     *upper.Dir
	ops    *ops
	count  *metrics.Metrics
	kernel kernel
	base   uint64 // numbers of the upper's own inodes begin here
	fresh  bool   // the upper was empty when it was mounted

	// hold is held for reading by all that writes, for writing by Hold.
	hold sync.RWMutex
	// ns guards how nodes are reached: parent, name, more and fd of every node.
	// It is held for reading by what reaches a file of the upper by a name or
	// makes one, for writing by what takes a name away or copies a file up.
	ns sync.RWMutex

	mu      sync.RWMutex             // guards what follows, and lookups and kids of nodes
	nodes   map[uint64]*node         // by number
	spare   uint64                   // numbers given to files whose own on disk were taken
	origins map[uint64]uint64        // upper's inode number to nid, of what was copied up
	links   map[uint64]uint32        // names left of a lower inode, where that is not what the index says
	opened  map[uint64]int           // open files of a lower inode
	copying map[uint64]chan struct{} // closed when the copy of a lower inode has ended

	dirs    dirFDs
	listing listings
	scan    lowerScan
}

// kernel is what a union knows of the connection it is served on.
type kernel struct {
	conn    *conn
	through atomic.Bool // the kernel may read and write the upper's files itself
	cached  bool        // the kernel gathers writes
}

// NewUnion makes a union of im, the contents of its device i read from layers[i],
// and up, which stays the caller's to close after the mount has ended.
func NewUnion(im *index.Image, layers []Data, up *upper.Dir, o Options) (*Union, error) {
	u := &Union{
		RawFileSystem: fuse.NewDefaultRawFileSystem(),
		low:           NewTree(im, layers, o), up: up, count: o.Metrics,
		nodes: map[uint64]*node{}, origins: map[uint64]uint64{}, links: map[uint64]uint32{},
		opened: map[uint64]int{}, copying: map[uint64]chan struct{}{},
	}
	u.ops = u.low.ops
	for u.base = 1 << 20; u.base < uint64(im.Bytes()); u.base <<= 1 { // a nid counts 32 bytes
	}
	root := newNode(fuse.FUSE_ROOT_ID, unix.S_IFDIR)
	root.nid = im.Root()
	opaque, err := up.IsOpaque(upper.At{Dir: up.Root()})
	if err != nil {
		return nil, err
	}
	if !opaque {
		root.lower = root.nid
	}
	var st unix.Stat_t
	if err := up.Stat(upper.At{Dir: up.Root()}, &st); err != nil {
		return nil, err
	}
	root.note(&st)
	root.dir = &dirFD{fd: up.Root(), refs: 1, n: root}
	u.nodes[root.id] = root
	u.fresh = true
	err = upper.ReadDir(up.Root(), func(e *upper.Dirent) bool {
		u.fresh = string(e.Name) == "." || string(e.Name) == ".."
		return u.fresh
	})
	return u, err
}

func (u *Union) String() string { return "varve union" }

// Hold waits until nothing is being written through the daemon, and keeps it so
// until release is called: files are neither made, changed nor opened for
// writing, reads go on. Who has a file open already where the kernel writes the
// upper's file itself is not stopped.
func (u *Union) Hold(ctx context.Context) (release func(), err error) {
	u.flush()
	held := make(chan struct{})
	go func() {
		u.hold.Lock()
		close(held)
	}()
	select {
	case <-held:
		return sync.OnceFunc(u.hold.Unlock), nil
	case <-ctx.Done():
		go func() {
			<-held
			u.hold.Unlock()
		}()
		return nil, ctx.Err()
	}
}

// flush has the kernel write what it has gathered of files that are open.
func (u *Union) flush() {
	if !u.kernel.cached || u.kernel.conn == nil {
		return
	}
	var ids []uint64
	u.mu.RLock()
	for id, n := range u.nodes {
		if n.open.users.Load() > 0 {
			ids = append(ids, id)
		}
	}
	u.mu.RUnlock()
	for _, id := range ids {
		// Dropping pages writes those that are dirty (fuse_launder_folio in
		// fs/fuse/file.c), through this daemon: no lock may be held.
		u.kernel.conn.forgetData(id)
	}
}

// OnUnmount closes what is still open: the kernel sends no FORGET then.
func (u *Union) OnUnmount() {
	u.mu.Lock()
	nodes := u.nodes
	u.nodes = map[uint64]*node{}
	u.mu.Unlock()
	for _, n := range nodes {
		n.open.close()
		if n.fd >= 0 {
			unix.Close(n.fd)
		}
		u.dirs.forget(n)
	}
}

func (u *Union) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	var st unix.Statfs_t
	if err := unix.Fstatfs(u.up.Root(), &st); err != nil {
		return upperStatus(err)
	}
	out.Blocks, out.Bfree, out.Bavail = st.Blocks, st.Bfree, st.Bavail
	out.Files, out.Ffree = st.Files, st.Ffree
	out.Bsize, out.Frsize, out.NameLen = uint32(st.Bsize), uint32(st.Frsize), index.MaxName
	return fuse.OK
}

// Access is not asked where the kernel checks permissions itself. Of a plain
// user's mount there is one user, who may do what root of the image may.
func (u *Union) Access(<-chan struct{}, *fuse.AccessIn) fuse.Status { return fuse.ENOSYS }

func (u *Union) Ioctl(<-chan struct{}, *fuse.IoctlIn, []byte, *fuse.IoctlOut, []byte) fuse.Status {
	return fuse.Status(unix.ENOTTY)
}

// begin is called by all that writes, and its answer when that is done.
func (u *Union) begin(i op, st *fuse.Status) func() {
	start := time.Now()
	u.hold.RLock()
	return func() {
		u.hold.RUnlock()
		u.ops.done(i, start, st)
	}
}
