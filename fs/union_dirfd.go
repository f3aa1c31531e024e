package fs

import (
	"container/list"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/fs/upper"
)

// maxDirs is how many directories of an upper are kept open for the next
// operation in them. RLIMIT_NOFILE is often 1024.
const maxDirs = 256

// dirFDs keeps the directories of an upper open that were used last.
type dirFDs struct {
	mu   sync.Mutex // guards what follows, and dir of nodes
	used list.List  // of *dirFD, the last used first
}

// A dirFD is an O_PATH descriptor of a directory. Whoever got it may use it until
// it is put back.
type dirFD struct {
	fd   int
	refs int
	n    *node
	el   *list.Element // nil of the root, which is always open, and after eviction
	gone bool
}

// cached gives a node's directory if it is open.
func (c *dirFDs) cached(n *node) *dirFD {
	c.mu.Lock()
	defer c.mu.Unlock()
	d := n.dir
	if d != nil {
		d.refs++
		if d.el != nil {
			c.used.MoveToFront(d.el)
		}
	}
	return d
}

func (c *dirFDs) put(d *dirFD) {
	c.mu.Lock()
	d.refs--
	if d.gone && d.refs == 0 {
		unix.Close(d.fd)
	}
	c.mu.Unlock()
}

// get opens a node's directory, from the nearest one above it that is open. The
// caller holds ns, so that the names on the way stay.
func (c *dirFDs) get(n *node) (*dirFD, error) {
	if d := c.cached(n); d != nil {
		return d, nil
	}
	// openat2 takes a path of PATH_MAX bytes, zero byte and all.
	const most = unix.PathMax - 1 - 255 - 1
	names, above := n.name, n.parent
	var from *dirFD
	for from == nil {
		if from = c.cached(above); from != nil {
			break
		}
		if len(names) > most || above.parent == nil {
			var err error
			if from, err = c.get(above); err != nil {
				return nil, err
			}
			break
		}
		names, above = above.name+"/"+names, above.parent
	}
	fd, err := upper.Dirfd(from.fd, names)
	c.put(from)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if n.dir != nil { // somebody was faster
		unix.Close(fd)
		n.dir.refs++
		return n.dir, nil
	}
	d := &dirFD{fd: fd, refs: 1, n: n}
	d.el = c.used.PushFront(d)
	n.dir = d
	for el := c.used.Back(); c.used.Len() > maxDirs && el != nil; {
		old := el.Value.(*dirFD)
		el = el.Prev()
		if old.refs == 0 {
			c.evict(old)
		}
	}
	return d, nil
}

// evict closes a directory as soon as nobody uses it. The caller holds mu.
func (c *dirFDs) evict(d *dirFD) {
	if d.el == nil {
		return
	}
	c.used.Remove(d.el)
	d.el, d.n.dir = nil, nil
	if d.gone = true; d.refs == 0 {
		unix.Close(d.fd)
	}
}

// forget closes a node's directory.
func (c *dirFDs) forget(n *node) {
	c.mu.Lock()
	if n.dir != nil {
		c.evict(n.dir)
	}
	c.mu.Unlock()
}
