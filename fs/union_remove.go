package fs

import (
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/fs/upper"
	"github.com/varvefs/varve/index"
)

// A name is one that is about to be taken away or replaced.
type name struct {
	reach
	place
	st    unix.Stat_t // of what the upper has there
	have  found
	lower index.Inode // what the lower has there
	shown bool        // the lower has something there
	node  *node       // of what the upper has there, where there is one
}

// there says whether a mount shows the name.
func (m *name) there() bool { return m.have.there && !m.have.whiteout || !m.have.there && m.shown }

// pure says whether what a mount shows there is the lower's alone.
func (m *name) pure() bool { return !m.have.there && m.shown }

func (m *name) isDir() bool {
	if m.have.there {
		return m.st.Mode&unix.S_IFMT == unix.S_IFDIR
	}
	return m.shown && m.lower.IsDir()
}

// name finds out all that there is about a name in a directory. Its caller holds
// ns, and calls done.
func (u *Union) name(dir *node, s string) (*name, error) {
	r, err := u.reachIn(dir, s)
	if err != nil {
		return nil, err
	}
	m := &name{reach: r, place: place{dir, s}}
	if m.have, err = u.look(dir, s, &m.st); err == nil {
		if m.lower, m.shown, err = u.lowerChild(dir, s); err != nil {
			err = lowerError{err}
		}
	}
	if err != nil {
		r.done()
		return nil, err
	}
	if m.have.there && !m.have.whiteout {
		m.node = u.nodeAt(m)
	}
	return m, nil
}

// nodeAt gives the node of what the upper has under a name, nil where the kernel
// knows none.
func (u *Union) nodeAt(m *name) *node {
	u.mu.RLock()
	defer u.mu.RUnlock()
	id := u.base + m.st.Ino
	if m.have.lower != 0 {
		id = u.number(m.have.lower)
	} else if nid, ok := u.origins[m.st.Ino]; ok {
		id = u.number(nid)
	}
	return u.nodes[id]
}

func (u *Union) Unlink(cancel <-chan struct{}, h *fuse.InHeader, name string) (st fuse.Status) {
	defer u.begin(opUnlink, &st)()
	return u.remove(h.NodeId, name, u.unlink)
}

// remove takes a name away from a directory.
func (u *Union) remove(id uint64, name string, by func(dir *node, name string) error) fuse.Status {
	dir, err := u.own(id, 0)
	if err != nil {
		return upperStatus(err)
	}
	u.ns.Lock()
	defer u.ns.Unlock()
	return upperStatus(by(dir, name))
}

// unlink takes away a name of what is no directory. Its caller holds ns for
// writing.
func (u *Union) unlink(dir *node, s string) error {
	m, err := u.name(dir, s)
	if err != nil {
		return err
	}
	defer m.done()
	switch {
	case !m.there():
		return unix.ENOENT
	case m.isDir():
		return unix.EISDIR
	case m.pure():
		if err := u.unlinkLower(&m.lower); err != nil {
			return err
		}
		err = u.up.Whiteout(m.Dir, s)
	default:
		if err := u.leave(m); err != nil {
			return err
		}
		if m.shown {
			err = u.up.Hide(m.Dir, s)
		} else {
			err = unix.Unlinkat(m.Dir, s, 0)
		}
		if err != nil {
			u.back(m)
		}
	}
	if err == nil {
		dir.changes.Add(1)
	}
	return err
}

// leave has the node of a name be reached without it, before it is taken away.
func (u *Union) leave(m *name) error {
	if m.node == nil {
		return nil
	}
	left := uint64(m.st.Nlink) - 1
	if m.isDir() {
		left = 0
	}
	return u.unplace(m.node, m.place, left)
}

// back undoes leave where the name could not be taken away.
func (u *Union) back(m *name) {
	if m.node != nil {
		u.addPlace(m.node, m.place)
	}
}

func (u *Union) Rmdir(cancel <-chan struct{}, h *fuse.InHeader, name string) (st fuse.Status) {
	defer u.begin(opUnlink, &st)()
	return u.remove(h.NodeId, name, u.rmdir)
}

// rmdir takes away the name of a directory in which nothing is shown. Its caller
// holds ns for writing.
func (u *Union) rmdir(dir *node, s string) error {
	m, err := u.name(dir, s)
	if err != nil {
		return err
	}
	defer m.done()
	switch {
	case !m.there():
		return unix.ENOENT
	case !m.isDir():
		return unix.ENOTDIR
	}
	if err := u.empty(m); err != nil {
		return err
	}
	if m.pure() {
		if err := u.unlinkLower(&m.lower); err != nil {
			return err
		}
		err = u.up.Whiteout(m.Dir, s)
	} else {
		if err := u.leave(m); err != nil {
			return err
		}
		if err = u.up.RemoveDir(m.Dir, s, m.shown); err != nil {
			u.back(m)
		}
	}
	if err == nil {
		dir.changes.Add(1)
		dir.subdirs.add(-1)
	}
	return err
}

// empty says by ENOTEMPTY where a mount shows names in a directory.
func (u *Union) empty(m *name) error {
	hidden := map[string]struct{}{}
	if m.have.there {
		fd, err := upper.Dirfd(m.Dir, m.place.name)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		var bad error
		err = upper.ReadDir(fd, func(e *upper.Dirent) bool {
			if isDots(e.Name) {
				return true
			}
			name := string(e.Name)
			if (e.Type == unix.DT_CHR || e.Type == unix.DT_UNKNOWN) && isWhiteout(upper.At{Dir: fd, Name: name}) {
				hidden[name] = struct{}{}
				return true
			}
			bad = unix.ENOTEMPTY
			return false
		})
		if err == nil {
			err = bad
		}
		if err != nil || m.have.lower == 0 {
			return err
		}
	}
	var bad error
	err := u.low.im.ReadDir(&m.lower, 0, func(d index.Dirent, _ uint64) bool {
		if _, ok := hidden[string(d.Name)]; !ok && !isDots(d.Name) {
			bad = unix.ENOTEMPTY
		}
		return bad == nil
	})
	if err != nil {
		return lowerError{err}
	}
	return bad
}
