package fs

import (
	"strings"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/fs/upper"
	"github.com/varvefs/varve/index"
)

// checkName refuses names that no layer could hold.
func checkName(name string) error {
	switch {
	case len(name) > index.MaxName:
		return unix.ENAMETOOLONG
	case strings.HasPrefix(name, ".wh."): // image-spec, layer.md, "Whiteouts"
		return unix.EINVAL
	}
	return nil
}

// inherit has a new file take from its directory what Unix has it take.
func (u *Union) inherit(dir *node, at upper.At, nw *upper.New) {
	nw.Setgid, nw.DirGID = dir.mode.Load()&unix.S_ISGID != 0, dir.gid.Load()
	if u.up.Form == upper.Override {
		return
	}
	if dir.acl.Load() == aclUnknown {
		var acl uint32 = aclNone
		if k, err := u.up.Getxattr(upper.At{Dir: at.Dir}, aclDefaultName, nil); err == nil && k > 0 {
			acl = aclDefault
		}
		dir.acl.Store(acl)
	}
	nw.ACL = dir.acl.Load() == aclDefault
}

// make makes a file. fd is one of a regular file, which is the caller's to close.
func (u *Union) make(h *fuse.InHeader, name string, nw *upper.New, out *fuse.EntryOut) (n *node, fd int, err error) {
	fd = -1
	if err := checkName(name); err != nil {
		return nil, fd, err
	}
	nw.UID, nw.GID = h.Uid, h.Gid
	dir, err := u.own(h.NodeId, 0)
	if err != nil {
		return nil, fd, err
	}
	u.ns.RLock()
	defer u.ns.RUnlock()
	r, err := u.reachIn(dir, name)
	if err != nil {
		return nil, fd, err
	}
	defer r.done()
	u.inherit(dir, r.At, nw)
	over, err := u.over(dir, r.At)
	if err != nil {
		return nil, fd, err
	}
	if nw.Mode&unix.S_IFMT == unix.S_IFDIR && dir.lower != 0 {
		// Counted before it becomes one more, or it would be counted twice.
		if _, err := u.mergedLinks(dir); err != nil {
			return nil, fd, err
		}
	}
	var st unix.Stat_t
	if over {
		fd, st, err = u.up.Replace(r.Dir, name, nw)
	} else if fd, st, err = u.up.Make(r.Dir, name, nw); err == unix.EEXIST && isWhiteout(r.At) {
		fd, st, err = u.up.Replace(r.Dir, name, nw)
	}
	if err != nil {
		return nil, fd, err
	}
	dir.changes.Add(1)
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		dir.subdirs.add(1)
	}
	n = u.adopt(place{dir, name}, &st, 0)
	n.plain.Store(!nw.ACL)
	return n, fd, u.entry(out, n, &st)
}

// over says whether a new file goes where a whiteout hides a name of the lower.
// Its caller holds ns.
func (u *Union) over(dir *node, at upper.At) (bool, error) {
	_, shown, err := u.lowerChild(dir, at.Name)
	if err != nil {
		return false, lowerError{err}
	}
	if shown && !isWhiteout(at) {
		return false, unix.EEXIST
	}
	return shown, nil
}

func isWhiteout(at upper.At) bool {
	var st unix.Stat_t
	return at.Lstat(&st) == nil && upper.IsWhiteout(&st)
}

func (u *Union) Create(cancel <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) (st fuse.Status) {
	defer u.begin(opMake, &st)()
	nw := upper.New{Mode: unix.S_IFREG | in.Mode&0o7777, Umask: in.Umask}
	n, fd, err := u.make(&in.InHeader, name, &nw, &out.EntryOut)
	if err != nil {
		return upperStatus(err)
	}
	u.take(n, fd, &out.OpenOut)
	return fuse.OK
}

// take has a file that was just made be open.
func (u *Union) take(n *node, fd int, out *fuse.OpenOut) {
	n.open.mu.Lock()
	defer n.open.mu.Unlock()
	if n.open.fd >= 0 {
		n.open.old = append(n.open.old, n.open.fd)
	}
	n.open.fd = fd
	u.admit(n, out)
}

func (u *Union) Mknod(cancel <-chan struct{}, in *fuse.MknodIn, name string, out *fuse.EntryOut) (st fuse.Status) {
	defer u.begin(opMake, &st)()
	if in.Mode&unix.S_IFMT == unix.S_IFCHR && in.Rdev == 0 {
		return fuse.EPERM // it would be a whiteout
	}
	nw := upper.New{Mode: in.Mode, Umask: in.Umask, Rdev: unixDev(in.Rdev)}
	if nw.Mode&unix.S_IFMT == 0 {
		nw.Mode |= unix.S_IFREG // mknod(2)
	}
	_, fd, err := u.make(&in.InHeader, name, &nw, out)
	if fd >= 0 {
		unix.Close(fd)
	}
	return upperStatus(err)
}

func (u *Union) Mkdir(cancel <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) (st fuse.Status) {
	defer u.begin(opMake, &st)()
	nw := upper.New{Mode: unix.S_IFDIR | in.Mode&0o7777, Umask: in.Umask}
	_, _, err := u.make(&in.InHeader, name, &nw, out)
	return upperStatus(err)
}

func (u *Union) Symlink(cancel <-chan struct{}, h *fuse.InHeader, target, name string, out *fuse.EntryOut) (st fuse.Status) {
	defer u.begin(opMake, &st)()
	nw := upper.New{Mode: unix.S_IFLNK | 0o777, Link: target}
	_, _, err := u.make(h, name, &nw, out)
	return upperStatus(err)
}

func (u *Union) Tmpfile(cancel <-chan struct{}, in *fuse.CreateIn, out *fuse.CreateOut) (st fuse.Status) {
	defer u.begin(opMake, &st)()
	dir, err := u.own(in.NodeId, 0)
	if err != nil {
		return upperStatus(err)
	}
	u.ns.RLock()
	defer u.ns.RUnlock()
	r, err := u.reachIn(dir, ".")
	if err != nil {
		return upperStatus(err)
	}
	defer r.done()
	nw := upper.New{Mode: unix.S_IFREG | in.Mode&0o7777, Umask: in.Umask, UID: in.Uid, GID: in.Gid}
	u.inherit(dir, r.At, &nw)
	fd, stat, err := u.up.Tmpfile(r.Dir, &nw)
	if err != nil {
		return upperStatus(err)
	}
	hold, err := upper.At{Dir: fd}.Hold()
	if err != nil {
		unix.Close(fd)
		return upperStatus(err)
	}
	n := u.adopt(place{dir, ""}, &stat, 0)
	n.fd, n.dead = hold, true // nobody else knows of it yet
	n.plain.Store(!nw.ACL)
	u.take(n, fd, &out.OpenOut)
	return upperStatus(u.entry(&out.EntryOut, n, &stat))
}

func (u *Union) Link(cancel <-chan struct{}, in *fuse.LinkIn, name string, out *fuse.EntryOut) (st fuse.Status) {
	defer u.begin(opLink, &st)()
	if err := checkName(name); err != nil {
		return upperStatus(err)
	}
	n, err := u.own(in.Oldnodeid, whole)
	if err != nil {
		return upperStatus(err)
	}
	dir, err := u.own(in.NodeId, 0)
	if err != nil {
		return upperStatus(err)
	}
	u.ns.Lock()
	defer u.ns.Unlock()
	return upperStatus(u.link(n, dir, name, out))
}

// link makes one more name of a node. Its caller holds ns for writing.
func (u *Union) link(n, dir *node, name string, out *fuse.EntryOut) error {
	from, err := u.reach(n)
	if err != nil {
		return err
	}
	defer from.done()
	to, err := u.reachIn(dir, name)
	if err != nil {
		return err
	}
	defer to.done()
	over, err := u.over(dir, to.At)
	if err != nil {
		return err
	}
	if !over {
		if err = from.LinkTo(to.Dir, name); err == unix.EEXIST && isWhiteout(to.At) {
			over = true
		}
	}
	if over {
		err = u.up.LinkOver(from.At, to.Dir, name)
	}
	if err != nil {
		return err
	}
	dir.changes.Add(1)
	u.addPlace(n, place{dir, name})
	var st unix.Stat_t
	if err := u.stat(n, &st); err != nil {
		return err
	}
	u.mu.Lock()
	n.lookups++
	u.mu.Unlock()
	return u.entry(out, n, &st)
}
