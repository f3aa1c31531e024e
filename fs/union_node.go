package fs

import (
	"sync/atomic"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/fs/upper"
)

// A node is an inode that the upper has a part of.
type node struct {
	id    uint64 // the number, as the kernel knows it
	nid   uint64 // of the image, where it comes from there
	typ   uint32 // S_IFMT bits
	lower uint64 // of a directory: the nid of the one that shows through, or 0

	// How it is reached: by a name in a directory, or, after that was taken away,
	// by a descriptor. A file may have further names. Guarded by ns.
	place
	more []place
	fd   int
	dead bool // it has no names any more

	lookups uint64 // how often the kernel was told the number; guarded by mu
	kids    int    // nodes whose parent it is; guarded by mu
	dir     *dirFD // guarded by dirs.mu

	// What the daemon, as the only writer, may remember of the file.
	mode, gid atomic.Uint32
	acl       atomic.Uint32 // of a directory, whether it has a default ACL: see aclUnknown
	plain     atomic.Bool   // it has no extended attributes
	changes   atomic.Uint64 // of a directory's names, to tell a stale listing

	subdirs subdirs
	open    openFile
}

// A place is a name in a directory.
type place struct {
	parent *node
	name   string
}

const (
	aclUnknown = iota
	aclNone
	aclDefault
)

func newNode(id uint64, typ uint32) *node {
	n := &node{id: id, typ: typ, fd: -1}
	n.open.fd = -1
	return n
}

// note remembers what a stat said.
func (n *node) note(st *unix.Stat_t) {
	n.mode.Store(st.Mode)
	n.gid.Store(st.Gid)
}

func (n *node) isDir() bool { return n.typ == unix.S_IFDIR }

// ino is the inode number that users see.
func (n *node) ino() uint64 {
	if n.nid != 0 {
		return n.nid
	}
	return n.id
}

// number is the node id of a lower inode.
func (u *Union) number(nid uint64) uint64 {
	if nid == u.low.im.Root() {
		return fuse.FUSE_ROOT_ID
	}
	return nid
}

// node gives the node of a number, nil for an inode that only the lower has.
func (u *Union) node(id uint64) *node {
	u.mu.RLock()
	n := u.nodes[id]
	u.mu.RUnlock()
	return n
}

// isLower says whether a number without a node is an inode of the image.
func (u *Union) isLower(id uint64) bool { return id < u.base }

// adopt gives the node of a file of the upper that was found at a place, and
// counts that the kernel is told of it. lower is the directory of the image that
// shows through it, or 0. Its caller holds ns.
func (u *Union) adopt(at place, st *unix.Stat_t, lower uint64) *node {
	u.mu.Lock()
	id := u.base + st.Ino
	nid, known := lower, lower != 0
	if !known {
		nid, known = u.origins[st.Ino]
	}
	if known {
		id = u.number(nid)
	} else if n := u.nodes[id]; n != nil && n.nid == id {
		// The number is that of a file in whose place another was put: see chown.
		u.spare++
		id = 1<<62 + u.spare
		nid, u.origins[st.Ino] = id, id
	}
	n := u.nodes[id]
	if n == nil {
		n = newNode(id, st.Mode&unix.S_IFMT)
		n.nid, n.lower, n.place = nid, lower, at
		at.parent.kids++
		u.nodes[id] = n
	}
	n.lookups++
	u.mu.Unlock()
	n.note(st)
	return n
}

// Forget lets go of what the kernel does. Nodes of the image's inodes stay: how
// often the kernel was told of them before they had a node is not known, nor may
// a copied file lose its number.
func (u *Union) Forget(id, count uint64) {
	u.mu.Lock()
	defer u.mu.Unlock()
	n := u.nodes[id]
	if n == nil {
		return
	}
	n.lookups -= min(count, n.lookups)
	if n.nid != 0 && n.dead {
		n.lookups = 0 // no name leads there, so the kernel will not be told again
	}
	u.settle(n)
}

// settle drops a node that nobody needs, and those that only it needed. Its
// caller holds mu.
func (u *Union) settle(n *node) {
	if n.lookups > 0 || n.kids > 0 || n.nid != 0 && !n.dead {
		return
	}
	delete(u.nodes, n.id)
	u.release(n)
	if n.parent != nil {
		n.parent.kids--
		u.settle(n.parent)
	}
	for _, p := range n.more {
		p.parent.kids--
		u.settle(p.parent)
	}
}

// release closes what a forgotten node has. Its caller holds mu.
func (u *Union) release(n *node) {
	if n.fd >= 0 {
		if n.nid != 0 {
			var st unix.Stat_t
			if unix.Fstat(n.fd, &st) == nil && u.origins[st.Ino] == n.nid {
				delete(u.origins, st.Ino) // the number may go to another file now
			}
		}
		unix.Close(n.fd)
	}
	u.dirs.forget(n)
}

// reach is how a file of the upper is reached for the length of an operation.
type reach struct {
	upper.At
	dir  *dirFD
	u    *Union
	open *openFile // whose descriptor At is
	rw   bool      // and it may be written to
}

func (r *reach) done() {
	if r.open != nil {
		r.open.unpin()
	}
	if r.dir != nil {
		r.u.dirs.put(r.dir)
	}
}

// reach says how to reach a node. Its caller holds ns until done is called.
func (u *Union) reach(n *node) (reach, error) {
	if n.fd >= 0 {
		return reach{At: upper.At{Dir: n.fd}}, nil
	}
	if n.isDir() {
		d, err := u.dirs.get(n)
		if err != nil {
			return reach{}, err
		}
		return reach{At: upper.At{Dir: d.fd}, dir: d, u: u}, nil
	}
	return u.reachIn(n.parent, n.name)
}

// reachIn says how to reach a name in a directory, whether it is there or not.
func (u *Union) reachIn(dir *node, name string) (reach, error) {
	if dir.dead {
		return reach{}, unix.ENOENT
	}
	d, err := u.dirs.get(dir)
	if err != nil {
		return reach{}, err
	}
	return reach{At: upper.At{Dir: d.fd, Name: name}, dir: d, u: u}, nil
}

// unplace takes one name of a node away, before that is done on disk: the node
// is reached by another one then, or by a descriptor. left is how many names
// stay. Its caller holds ns for writing.
func (u *Union) unplace(n *node, gone place, left uint64) error {
	if n.place != gone {
		u.dropMore(n, gone)
		return nil
	}
	if len(n.more) > 0 {
		next := n.more[0]
		u.dropMore(n, next)
		u.move(n, next)
		return nil
	}
	if n.fd < 0 {
		r, err := u.reach(n)
		if err != nil {
			return err
		}
		n.fd, err = r.Hold()
		r.done()
		if err != nil {
			n.fd = -1
			return err
		}
	}
	n.dead = left == 0
	return nil
}

func (u *Union) dropMore(n *node, gone place) {
	for i, p := range n.more {
		if p == gone {
			n.more = append(n.more[:i:i], n.more[i+1:]...)
			u.mu.Lock()
			p.parent.kids--
			u.mu.Unlock()
			return
		}
	}
}

// move has a node reached by a name from now on. Its caller holds ns for writing.
func (u *Union) move(n *node, to place) {
	u.mu.Lock()
	old := n.parent
	to.parent.kids++
	n.place = to
	if old != nil {
		old.kids--
	}
	u.mu.Unlock()
	if n.fd >= 0 {
		unix.Close(n.fd)
		n.fd = -1
	}
	n.dead = false
}

// addPlace has a node be reached by one more name, which matters when the one
// it is reached by goes away. Its caller holds ns for writing.
func (u *Union) addPlace(n *node, at place) {
	if n.fd >= 0 {
		u.move(n, at)
		return
	}
	if n.place == at {
		return
	}
	for _, p := range n.more {
		if p == at {
			return
		}
	}
	u.mu.Lock()
	at.parent.kids++
	u.mu.Unlock()
	n.more = append(n.more, at)
}
