package fs

import (
	"time"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/fs/upper"
	"github.com/varvefs/varve/index"
)

// whole asks for a copy of all of a file's contents.
const whole = index.MaxFileSize

// own gives the node of an inode that is to be changed, copying it up first if
// only the lower has it: at most the first size bytes of its contents. Its caller
// holds hold, and not ns: the copy may wait for the network.
func (u *Union) own(id uint64, size int64) (*node, error) {
	if n := u.node(id); n != nil {
		return n, nil
	}
	if !u.isLower(id) {
		return nil, unix.ESTALE
	}
	in, err := u.low.inode(id)
	if err != nil {
		return nil, lowerError{err}
	}
	if in.IsDir() {
		return u.copyDir(&in)
	}
	for {
		u.mu.Lock()
		n, busy := u.nodes[id], u.copying[id]
		if n == nil && busy == nil {
			break
		}
		u.mu.Unlock()
		if n != nil {
			return n, nil
		}
		<-busy
	}
	done := make(chan struct{})
	u.copying[id] = done
	u.mu.Unlock()
	defer func() {
		u.mu.Lock()
		delete(u.copying, id)
		u.mu.Unlock()
		close(done)
	}()
	return u.copyFile(&in, min(size, in.Size))
}

// describe gives what a copy takes from the lower.
func (u *Union) describe(in *index.Inode) (*upper.File, error) {
	f := &upper.File{Attr: upper.Attr{
		Mode: in.Mode, UID: in.UID, GID: in.GID,
		Mtime: unix.Timespec{Sec: in.Mtime, Nsec: int64(in.MtimeNs)},
	}}
	switch in.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		b, err := u.low.im.Readlink(in)
		if err != nil {
			return nil, lowerError{err}
		}
		f.Link = string(b)
	case unix.S_IFCHR, unix.S_IFBLK:
		f.Rdev = unix.Mkdev(index.Major(in.Rdev), index.Minor(in.Rdev))
	}
	err := u.low.im.Xattrs(in, func(prefix string, rest, value []byte) bool {
		if f.Xattrs == nil {
			f.Xattrs = map[string]string{}
		}
		f.Xattrs[prefix+string(rest)] = string(value)
		return true
	})
	if err != nil {
		return nil, lowerError{err}
	}
	return f, nil
}

// copyDir gives a directory of the image a part in the upper, and those above it.
func (u *Union) copyDir(in *index.Inode) (*node, error) {
	id := u.number(in.Nid)
	if n := u.node(id); n != nil {
		return n, nil
	}
	names, err := u.lowerNames(in)
	if err != nil {
		return nil, lowerError{err}
	}
	above, err := u.low.im.Inode(names[0].dir)
	if err != nil {
		return nil, lowerError{err}
	}
	parent, err := u.copyDir(&above)
	if err != nil {
		return nil, err
	}
	f, err := u.describe(in)
	if err != nil {
		return nil, err
	}
	s, err := u.up.Stage(f)
	if err != nil {
		return nil, err
	}
	if err := s.Finish(f); err != nil {
		s.Drop()
		return nil, err
	}
	u.ns.Lock()
	defer u.ns.Unlock()
	if n := u.node(id); n != nil { // somebody was faster
		s.Drop()
		return n, nil
	}
	at := place{parent, names[0].name}
	var st unix.Stat_t
	have, err := u.look(parent, at.name, &st)
	if err == nil && (have.there && have.lower != in.Nid || parent.dead || parent.lower != names[0].dir) {
		err = unix.ENOENT // it was removed meanwhile
	}
	if err != nil || have.there {
		s.Drop()
	} else if err = u.put(s, at); err == nil {
		_, err = u.look(parent, at.name, &st)
	}
	if err != nil {
		return nil, err
	}
	return u.adopt(at, &st, in.Nid), nil
}

// put moves what was staged to its place. To the directory it is in nothing has
// changed, so its times stay (ovl_copy_up_one in fs/overlayfs/copy_up.c). The
// caller holds ns for writing.
func (u *Union) put(s *upper.Staged, at place) error {
	r, err := u.reachIn(at.parent, at.name)
	if err != nil {
		s.Drop()
		return err
	}
	defer r.done()
	dir := upper.At{Dir: r.Dir}
	var st unix.Stat_t
	if err := dir.Lstat(&st); err != nil {
		s.Drop()
		return err
	}
	if err := s.Into(r.Dir, at.name); err != nil {
		return err
	}
	at.parent.changes.Add(1)
	return dir.Times(st.Atim, st.Mtim)
}

// copyFile copies what is no directory, with all its names that can be seen, or
// with none if there is none: a file that somebody has open.
func (u *Union) copyFile(in *index.Inode, size int64) (*node, error) {
	start := time.Now()
	names, err := u.lowerNames(in)
	if err != nil {
		return nil, lowerError{err}
	}
	u.ns.RLock()
	names, err = u.visiblePlaces(names)
	u.ns.RUnlock()
	if err != nil {
		return nil, err
	}
	parents := make([]*node, len(names))
	for i, p := range names {
		dir, err := u.low.im.Inode(p.dir)
		if err != nil {
			return nil, lowerError{err}
		}
		if parents[i], err = u.copyDir(&dir); err != nil {
			return nil, err
		}
	}
	s, err := u.stage(in, size)
	if err != nil {
		return nil, err
	}
	n := newNode(u.number(in.Nid), in.Mode&unix.S_IFMT)
	n.nid = in.Nid
	if err := u.place(n, s, names, parents); err != nil {
		return nil, err
	}
	u.count.CopyUpBytes.Add(float64(size))
	u.count.CopyUpSeconds.Observe(time.Since(start).Seconds())
	return n, nil
}

// stage makes a copy that nobody sees yet.
func (u *Union) stage(in *index.Inode, size int64) (s *upper.Staged, err error) {
	f, err := u.describe(in)
	if err != nil {
		return nil, err
	}
	if s, err = u.up.Stage(f); err != nil {
		return nil, err
	}
	if in.Mode&unix.S_IFMT == unix.S_IFREG && size > 0 {
		var device int
		var off int64
		if device, off, _, err = u.low.im.Extent(in); err == nil {
			data := u.low.layers[device]
			release := func() {}
			err = s.Copy(data.Fd(), off, size, func(off, n int64) error {
				release()
				release = func() {}
				if err := data.Hold(off, n); err != nil {
					u.low.fault(device, off, err)
					return lowerError{err}
				}
				release = data.Release
				return nil
			})
			release()
		} else {
			err = lowerError{err}
		}
	}
	if err == nil {
		err = s.Finish(f)
	}
	if err != nil {
		s.Drop()
		return nil, err
	}
	return s, nil
}

// place shows a copy in the upper under its names, and has its node take over
// from the lower's inode.
func (u *Union) place(n *node, s *upper.Staged, names []lowerPlace, parents []*node) error {
	u.ns.Lock()
	defer u.ns.Unlock()
	var at []place
	for i, p := range names {
		if parents[i].dead || parents[i].lower != p.dir {
			continue // removed meanwhile
		}
		taken, err := u.taken(parents[i], p.name)
		if err != nil {
			s.Drop()
			return err
		}
		if !taken {
			at = append(at, place{parents[i], p.name})
		}
	}
	var err error
	if len(at) == 0 {
		n.dead = true
		if n.fd, err = s.Detach(); err != nil {
			return err
		}
		return u.publish(n)
	}
	// All links first: they may fail, and what is moved to its place stays there.
	more := make([]*upper.Staged, 0, len(at)-1)
	for range at[1:] {
		l, err := s.Link()
		if err != nil {
			for _, l := range append(more, s) {
				l.Drop()
			}
			return err
		}
		more = append(more, l)
	}
	if err := u.put(s, at[0]); err != nil {
		for _, l := range more {
			l.Drop()
		}
		return err
	}
	n.place = at[0]
	u.mu.Lock()
	n.parent.kids++
	u.mu.Unlock()
	for i, l := range more {
		if err == nil {
			if err = u.put(l, at[i+1]); err == nil {
				u.addPlace(n, at[i+1])
			}
		} else {
			l.Drop()
		}
	}
	if perr := u.publish(n); err == nil {
		err = perr
	}
	return err
}

// publish puts the node of a copy in the place of the lower's inode. Its caller
// holds ns for writing.
func (u *Union) publish(n *node) error {
	r, err := u.reach(n)
	if err != nil {
		return err
	}
	defer r.done()
	var st unix.Stat_t
	if err := u.up.Stat(r.At, &st); err != nil {
		return err
	}
	n.note(&st)
	u.mu.Lock()
	defer u.mu.Unlock()
	u.nodes[n.id] = n
	u.origins[st.Ino] = n.nid
	// Files that are open go on in the copy, through the kernel's cache.
	n.open.cached = u.opened[n.nid]
	n.open.users.Store(int32(n.open.cached))
	delete(u.opened, n.nid)
	return nil
}
