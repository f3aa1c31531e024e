package fs

import (
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/fs/upper"
	"github.com/varvefs/varve/index"
)

func (u *Union) Lookup(cancel <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) (st fuse.Status) {
	defer u.ops.done(opLookup, time.Now(), &st)
	if len(name) > index.MaxName {
		return fuse.Status(unix.ENAMETOOLONG)
	}
	u.ns.RLock()
	defer u.ns.RUnlock()
	dir := u.node(h.NodeId)
	if dir != nil {
		return upperStatus(u.lookup(dir, name, out))
	}
	if !u.isLower(h.NodeId) {
		return fuse.Status(unix.ESTALE)
	}
	parent, err := u.low.inode(h.NodeId)
	if err != nil {
		return status(err)
	}
	nid, err := u.low.im.Lookup(&parent, name)
	if err == index.ErrNotExist {
		absent(out)
		return fuse.OK
	}
	var in index.Inode
	if err == nil {
		in, err = u.low.im.Inode(nid)
	}
	if err != nil {
		return status(err)
	}
	return upperStatus(u.lowerEntry(out, &in))
}

// absent says that a name is not there. The kernel asks again when it has made
// something.
func absent(out *fuse.EntryOut) {
	*out = fuse.EntryOut{}
	out.SetEntryTimeout(forever)
}

// lookup answers for a directory that the upper has a part of. Its caller holds
// ns.
func (u *Union) lookup(dir *node, name string, out *fuse.EntryOut) error {
	var st unix.Stat_t
	f, err := u.look(dir, name, &st)
	switch {
	case err != nil:
		return err
	case f.whiteout:
		absent(out)
		return nil
	case f.there:
		n := u.adopt(place{dir, name}, &st, f.lower)
		return u.entry(out, n, &st)
	}
	in, ok, err := u.lowerChild(dir, name)
	if err != nil {
		return lowerError{err}
	}
	if !ok {
		absent(out)
		return nil
	}
	return u.lowerEntry(out, &in)
}

// entry tells the kernel of a node.
func (u *Union) entry(out *fuse.EntryOut, n *node, st *unix.Stat_t) error {
	out.NodeId, out.Generation = n.id, 1
	out.SetEntryTimeout(forever)
	out.SetAttrTimeout(forever)
	return u.attr(&out.Attr, n, st)
}

// lowerEntry tells the kernel of an inode that the directory it is in has from
// the lower. Its caller holds ns.
func (u *Union) lowerEntry(out *fuse.EntryOut, in *index.Inode) error {
	if n := u.node(u.number(in.Nid)); n != nil {
		// Another of its names was copied up without this one, by a daemon that
		// was stopped between the two.
		var st unix.Stat_t
		if err := u.stat(n, &st); err != nil {
			return err
		}
		return u.entry(out, n, &st)
	}
	setEntry(out, in)
	var err error
	out.Nlink, err = u.linksLeft(in)
	return err
}

// attr fills in what a mount shows of a node's file.
func (u *Union) attr(out *fuse.Attr, n *node, st *unix.Stat_t) (err error) {
	out.Ino = n.ino()
	out.Size, out.Blocks, out.Blksize = uint64(st.Size), uint64(st.Blocks), uint32(st.Blksize)
	out.Atime, out.Atimensec = uint64(st.Atim.Sec), uint32(st.Atim.Nsec)
	out.Mtime, out.Mtimensec = uint64(st.Mtim.Sec), uint32(st.Mtim.Nsec)
	out.Ctime, out.Ctimensec = uint64(st.Ctim.Sec), uint32(st.Ctim.Nsec)
	out.Mode, out.Nlink, out.Uid, out.Gid = st.Mode, uint32(st.Nlink), st.Uid, st.Gid
	if t := st.Mode & unix.S_IFMT; t == unix.S_IFBLK || t == unix.S_IFCHR {
		out.Rdev = rdev(st.Rdev)
	}
	if n.lower != 0 && !n.dead {
		out.Nlink, err = u.mergedLinks(n)
	}
	return err
}

// rdev packs a device number as FUSE has it, in new_encode_dev's form.
func rdev(dev uint64) uint32 {
	major, minor := unix.Major(dev), unix.Minor(dev)
	return minor&0xff | major<<8 | (minor&^0xff)<<12
}

// unixDev undoes rdev.
func unixDev(rdev uint32) uint64 { return unix.Mkdev(index.Major(rdev), index.Minor(rdev)) }

// stat reads a node's file. Its caller holds ns.
func (u *Union) stat(n *node, st *unix.Stat_t) error {
	r, err := u.at(n)
	if err != nil {
		return err
	}
	defer r.done()
	return u.up.Stat(r.At, st)
}

// at says how to reach a node the shortest way: through a descriptor that is
// open for its users, if there is one. Its caller holds ns.
func (u *Union) at(n *node) (reach, error) {
	if fd, rw, ok := n.open.pin(); ok {
		return reach{At: upper.At{Dir: fd, Live: true}, open: &n.open, rw: rw}, nil
	}
	return u.reach(n)
}

func (u *Union) GetAttr(cancel <-chan struct{}, h *fuse.GetAttrIn, out *fuse.AttrOut) (st fuse.Status) {
	defer u.ops.done(opGetattr, time.Now(), &st)
	u.ns.RLock()
	defer u.ns.RUnlock()
	return upperStatus(u.getAttr(h.NodeId, out))
}

// getAttr answers for any inode. Its caller holds ns.
func (u *Union) getAttr(id uint64, out *fuse.AttrOut) error {
	out.SetTimeout(forever)
	n := u.node(id)
	if n != nil {
		var st unix.Stat_t
		if err := u.stat(n, &st); err != nil {
			return err
		}
		n.note(&st)
		return u.attr(&out.Attr, n, &st)
	}
	if !u.isLower(id) {
		return unix.ESTALE
	}
	in, err := u.low.inode(id)
	if err != nil {
		return lowerError{err}
	}
	setAttr(&out.Attr, &in)
	out.Nlink, err = u.linksLeft(&in)
	return err
}

func (u *Union) SetAttr(cancel <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) (st fuse.Status) {
	defer u.begin(opSetattr, &st)()
	size := int64(whole)
	if in.Valid&fuse.FATTR_SIZE != 0 {
		size = int64(in.Size)
	}
	n, err := u.own(in.NodeId, size)
	if err != nil {
		return upperStatus(err)
	}
	u.ns.RLock()
	defer u.ns.RUnlock()
	if err := u.setAttr(n, in); err != nil {
		return upperStatus(err)
	}
	return upperStatus(u.getAttr(in.NodeId, out))
}

// setAttr changes a node's file. Its caller holds ns.
func (u *Union) setAttr(n *node, in *fuse.SetAttrIn) error {
	r, err := u.at(n)
	if err != nil {
		return err
	}
	defer r.done()
	at := r.At
	const owner = fuse.FATTR_UID | fuse.FATTR_GID | fuse.FATTR_MODE
	// What asks for nothing is a chown of neither owner nor group, or a write: both
	// take set-ID bits away, of which the kernel leaves no trace in the request
	// (fuse_setattr in fs/fuse/dir.c, handle_killpriv_v2).
	nothing := in.Valid&(owner|fuse.FATTR_SIZE|fuse.FATTR_ATIME|fuse.FATTR_MTIME) == 0
	if in.Valid&owner != 0 || nothing && !n.isDir() {
		if err := u.setOwner(n, at, in); err != nil {
			return err
		}
	}
	if in.Valid&fuse.FATTR_SIZE != 0 {
		if err := r.truncate(int64(in.Size)); err != nil {
			return err
		}
		if in.Valid&fuse.FATTR_KILL_SUIDGID != 0 {
			if err := u.tame(n, at); err != nil {
				return err
			}
		}
	}
	if in.Valid&(fuse.FATTR_ATIME|fuse.FATTR_MTIME) == 0 {
		return nil
	}
	return at.Times(
		timespec(in.Valid, fuse.FATTR_ATIME, fuse.FATTR_ATIME_NOW, in.Atime, in.Atimensec),
		timespec(in.Valid, fuse.FATTR_MTIME, fuse.FATTR_MTIME_NOW, in.Mtime, in.Mtimensec))
}

func timespec(valid, set, now uint32, sec uint64, nsec uint32) unix.Timespec {
	switch {
	case valid&set == 0:
		return unix.Timespec{Nsec: unix.UTIME_OMIT}
	case valid&now != 0:
		return unix.Timespec{Nsec: unix.UTIME_NOW}
	}
	return unix.Timespec{Sec: int64(sec), Nsec: int64(nsec)}
}

// setOwner changes owner and mode. The kernel has said which bits a chown takes
// away only by leaving that to us (CAP_HANDLE_KILLPRIV_V2).
func (u *Union) setOwner(n *node, at upper.At, in *fuse.SetAttrIn) error {
	var st unix.Stat_t
	if u.up.Form == upper.Override {
		if err := u.up.Stat(at, &st); err != nil {
			return err
		}
	}
	if in.Valid&fuse.FATTR_MODE == 0 || in.Valid&(fuse.FATTR_UID|fuse.FATTR_GID) != 0 {
		uid, gid := -1, -1
		if in.Valid&fuse.FATTR_UID != 0 {
			uid = int(in.Uid)
		}
		if in.Valid&fuse.FATTR_GID != 0 {
			gid = int(in.Gid)
		}
		if err := u.chown(n, at, &st, uid, gid); err != nil {
			return err
		}
	}
	if in.Valid&fuse.FATTR_MODE != 0 {
		if u.up.Form == upper.Override {
			if err := u.up.Stat(at, &st); err != nil {
				return err
			}
		}
		if err := u.up.Chmod(at, &st, in.Mode); err != nil {
			return err
		}
		n.mode.Store(n.typ | in.Mode&0o7777)
	}
	return nil
}

// chown may put another file in the place of one that cannot say its owner
// itself, which keeps its number.
func (u *Union) chown(n *node, at upper.At, st *unix.Stat_t, uid, gid int) error {
	before := st.Ino
	n.mode.Store(upper.Tame(n.mode.Load()))
	if err := u.up.Chown(at, st, uid, gid); err != nil {
		return err
	}
	if u.up.Form != upper.Override || n.isDir() {
		return nil
	}
	if err := u.up.Stat(at, st); err != nil || st.Ino == before {
		return err
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if n.nid == 0 {
		// From now on it is one of those whose number the disk does not give.
		n.nid = n.id
	}
	delete(u.origins, before)
	u.origins[st.Ino] = n.nid
	return nil
}

// tame takes a program's set-ID bits away that was written to.
func (u *Union) tame(n *node, at upper.At) error {
	mode := n.mode.Load()
	if upper.Tame(mode) == mode {
		return nil
	}
	var st unix.Stat_t
	if err := u.up.Stat(at, &st); err != nil {
		return err
	}
	if err := u.up.Chmod(at, &st, upper.Tame(st.Mode)); err != nil {
		return err
	}
	n.mode.Store(upper.Tame(st.Mode))
	return nil
}

func (r *reach) truncate(size int64) error {
	if r.rw {
		return unix.Ftruncate(r.Dir, size)
	}
	fd, err := r.Open(unix.O_WRONLY | unix.O_NONBLOCK)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Ftruncate(fd, size)
}

func (u *Union) Readlink(cancel <-chan struct{}, h *fuse.InHeader) (_ []byte, st fuse.Status) {
	n := u.node(h.NodeId)
	if n == nil {
		return u.low.Readlink(cancel, h)
	}
	defer u.ops.done(opReadlink, time.Now(), &st)
	u.ns.RLock()
	defer u.ns.RUnlock()
	r, err := u.reach(n)
	if err != nil {
		return nil, upperStatus(err)
	}
	defer r.done()
	b, err := u.up.Readlink(r.At)
	return b, upperStatus(err)
}
