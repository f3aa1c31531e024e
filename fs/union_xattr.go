package fs

import (
	"strings"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/fs/upper"
)

const (
	aclDefaultName = "system.posix_acl_default"
	aclPrefix      = "system.posix_acl_"
)

// refused says whether extended attributes of a name are not for this form. In
// an ACL of a plain user's upper the numbers would be the host's.
func (u *Union) refused(name string) bool {
	return u.up.Form == upper.Override && strings.HasPrefix(name, aclPrefix)
}

func (u *Union) GetXAttr(cancel <-chan struct{}, h *fuse.InHeader, attr string, dest []byte) (_ uint32, st fuse.Status) {
	n := u.node(h.NodeId)
	if n == nil {
		return u.low.GetXAttr(cancel, h, attr, dest)
	}
	defer u.ops.done(opGetxattr, time.Now(), &st)
	if n.plain.Load() || u.refused(attr) {
		return 0, fuse.Status(unix.ENODATA)
	}
	u.ns.RLock()
	defer u.ns.RUnlock()
	r, err := u.at(n)
	if err != nil {
		return 0, upperStatus(err)
	}
	defer r.done()
	k, err := u.up.Getxattr(r.At, attr, dest)
	if err == unix.ENODATA {
		// The kernel asks for file capabilities before every first write.
		if names, err := u.up.Listxattr(r.At); err == nil && len(names) == 0 {
			n.plain.Store(true)
		}
	}
	if err == unix.EOPNOTSUPP {
		err = unix.ENODATA // which is no reason never to ask again
	}
	return uint32(max(k, 0)), upperStatus(err)
}

func (u *Union) ListXAttr(cancel <-chan struct{}, h *fuse.InHeader, dest []byte) (_ uint32, st fuse.Status) {
	n := u.node(h.NodeId)
	if n == nil {
		return u.low.ListXAttr(cancel, h, dest)
	}
	defer u.ops.done(opListxattr, time.Now(), &st)
	if n.plain.Load() {
		return 0, fuse.OK
	}
	u.ns.RLock()
	defer u.ns.RUnlock()
	r, err := u.at(n)
	if err != nil {
		return 0, upperStatus(err)
	}
	defer r.done()
	names, err := u.up.Listxattr(r.At)
	if err != nil {
		return 0, upperStatus(err)
	}
	if h.Uid != 0 {
		names = withoutTrusted(names)
	}
	k, st := fill(dest, names)
	return uint32(k), st
}

// withoutTrusted drops names that only the administrator may read: the daemon is
// that one where its user is not.
func withoutTrusted(names []byte) []byte {
	var out []byte
	for _, name := range strings.SplitAfter(string(names), "\x00") {
		if !strings.HasPrefix(name, "trusted.") {
			out = append(out, name...)
		}
	}
	return out
}

func (u *Union) SetXAttr(cancel <-chan struct{}, in *fuse.SetXAttrIn, attr string, data []byte) (st fuse.Status) {
	defer u.begin(opSetxattr, &st)()
	if u.refused(attr) {
		return fuse.ENOTSUP
	}
	return upperStatus(u.change(in.NodeId, func(n *node, at upper.At) error {
		n.plain.Store(false)
		if err := u.up.Setxattr(at, attr, data, int(in.Flags)); err != nil {
			return err
		}
		return u.noteACL(n, at, attr, in.SetXAttrFlags&fuse.SETXATTR_ACL_KILL_SGID != 0)
	}))
}

func (u *Union) RemoveXAttr(cancel <-chan struct{}, h *fuse.InHeader, attr string) (st fuse.Status) {
	defer u.begin(opSetxattr, &st)()
	if u.refused(attr) {
		return fuse.ENOTSUP
	}
	return upperStatus(u.change(h.NodeId, func(n *node, at upper.At) error {
		if err := u.up.Removexattr(at, attr); err != nil {
			return err
		}
		return u.noteACL(n, at, attr, false)
	}))
}

// change does something to an inode's file in the upper.
func (u *Union) change(id uint64, do func(n *node, at upper.At) error) error {
	n, err := u.own(id, whole)
	if err != nil {
		return err
	}
	u.ns.RLock()
	defer u.ns.RUnlock()
	r, err := u.at(n)
	if err != nil {
		return err
	}
	defer r.done()
	return do(n, r.At)
}

// noteACL keeps up with what an ACL changes besides itself.
func (u *Union) noteACL(n *node, at upper.At, attr string, kill bool) error {
	if !strings.HasPrefix(attr, aclPrefix) {
		return nil
	}
	n.acl.Store(aclUnknown)
	var st unix.Stat_t
	if err := u.up.Stat(at, &st); err != nil {
		return err
	}
	if kill && st.Mode&unix.S_ISGID != 0 && !n.isDir() {
		st.Mode &^= unix.S_ISGID
		if err := u.up.Chmod(at, &st, st.Mode); err != nil {
			return err
		}
	}
	n.note(&st)
	return nil
}
