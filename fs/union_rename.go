package fs

import (
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

func (u *Union) Rename(cancel <-chan struct{}, in *fuse.RenameIn, oldName, newName string) (st fuse.Status) {
	defer u.begin(opRename, &st)()
	if in.Flags&^(unix.RENAME_NOREPLACE|unix.RENAME_EXCHANGE) != 0 {
		return fuse.EINVAL // a whiteout is nothing that a user may make
	}
	if err := checkName(newName); err != nil {
		return upperStatus(err)
	}
	if in.Flags&unix.RENAME_EXCHANGE != 0 {
		if err := checkName(oldName); err != nil {
			return upperStatus(err)
		}
	}
	// What moves must lie in the upper. Copying it there may take long, and what
	// is there now may have changed when that is done.
	for {
		copy, err := u.renameOnce(in, oldName, newName)
		if err != nil || copy == 0 {
			return upperStatus(err)
		}
		if _, err := u.own(copy, whole); err != nil {
			return upperStatus(err)
		}
	}
}

// renameOnce renames, or gives the number of a file that must be copied up first.
func (u *Union) renameOnce(in *fuse.RenameIn, oldName, newName string) (copy uint64, err error) {
	from, err := u.own(in.NodeId, 0)
	if err != nil {
		return 0, err
	}
	to, err := u.own(in.Newdir, 0)
	if err != nil {
		return 0, err
	}
	u.ns.Lock()
	defer u.ns.Unlock()
	src, err := u.name(from, oldName)
	if err != nil {
		return 0, err
	}
	defer src.done()
	dst, err := u.name(to, newName)
	if err != nil {
		return 0, err
	}
	defer dst.done()
	exchange := in.Flags&unix.RENAME_EXCHANGE != 0
	switch {
	case !src.there() || exchange && !dst.there():
		return 0, unix.ENOENT
	case in.Flags&unix.RENAME_NOREPLACE != 0 && dst.there():
		return 0, unix.EEXIST
	}
	for _, m := range []*name{src, dst} {
		if m == dst && !exchange {
			break
		}
		if m.isDir() && (m.pure() || m.have.lower != 0) {
			return 0, unix.EXDEV // as overlayfs with redirect_dir=off
		}
		if m.pure() {
			return m.lower.Nid, nil
		}
	}
	if exchange {
		return 0, u.exchange(src, dst)
	}
	return 0, u.rename(src, dst)
}

// rename moves src over dst. Its caller holds ns for writing.
func (u *Union) rename(src, dst *name) error {
	if dst.there() {
		switch {
		case src.isDir() && !dst.isDir():
			return unix.ENOTDIR
		case !src.isDir() && dst.isDir():
			return unix.EISDIR
		case src.isDir():
			if err := u.empty(dst); err != nil {
				return err
			}
		}
		if same(src, dst) {
			return nil // two names of one file: rename(2) does nothing
		}
	}
	if src.isDir() && dst.shown {
		// Nothing of what the lower has there may show through.
		if err := u.up.SetOpaque(src.At); err != nil {
			return err
		}
	}
	left := dst.there() && !dst.pure()
	if left {
		if err := u.leave(dst); err != nil {
			return err
		}
	}
	if err := u.renameDisk(src, dst); err != nil {
		if left {
			u.back(dst)
		}
		return err
	}
	if dst.pure() {
		if err := u.unlinkLower(&dst.lower); err != nil {
			return err
		}
	}
	if src.isDir() {
		src.parent.subdirs.add(-1)
		if !dst.there() {
			dst.parent.subdirs.add(1)
		}
	}
	u.moved(src, dst)
	return nil
}

// same says whether two names are one file's.
func same(a, b *name) bool {
	return a.have.there && b.have.there && a.st.Ino == b.st.Ino
}

// renameDisk does on disk what rename does.
func (u *Union) renameDisk(src, dst *name) error {
	if src.isDir() && dst.have.there {
		// The kernel renames a directory over an empty one only: not over a whiteout,
		// nor over one that has whiteouts in it.
		if dst.have.whiteout {
			if err := u.up.Exchange(src.Dir, src.place.name, dst.Dir, dst.place.name); err != nil {
				return err
			}
			if src.shown {
				return nil // the whiteout is where it is wanted
			}
			return unix.Unlinkat(src.Dir, src.place.name, 0)
		}
		err := u.up.Rename(src.Dir, src.place.name, dst.Dir, dst.place.name, src.shown)
		if err != unix.ENOTEMPTY && err != unix.EEXIST {
			return err
		}
		if err := u.up.Bare(dst.Dir, dst.place.name); err != nil {
			return err
		}
	}
	return u.up.Rename(src.Dir, src.place.name, dst.Dir, dst.place.name, src.shown)
}

// exchange swaps what is under two names. Its caller holds ns for writing.
func (u *Union) exchange(src, dst *name) error {
	for _, m := range [][2]*name{{src, dst}, {dst, src}} {
		if m[0].isDir() && m[1].shown {
			if err := u.up.SetOpaque(m[0].At); err != nil {
				return err
			}
		}
	}
	if err := u.up.Exchange(src.Dir, src.place.name, dst.Dir, dst.place.name); err != nil {
		return err
	}
	if src.isDir() != dst.isDir() {
		k := 1
		if dst.isDir() {
			k = -1
		}
		src.parent.subdirs.add(-k)
		dst.parent.subdirs.add(k)
	}
	u.moved(src, dst)
	u.moved(dst, src)
	return nil
}

// moved has the node that was at one name be reached by another.
func (u *Union) moved(from, to *name) {
	from.parent.changes.Add(1)
	to.parent.changes.Add(1)
	n := from.node
	if n == nil {
		return
	}
	if n.place != from.place {
		u.dropMore(n, from.place)
		u.addPlace(n, to.place)
		return
	}
	u.move(n, to.place)
}
