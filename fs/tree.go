package fs

import (
	"syscall"
	"time"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/varvefs/varve/index"
)

// forever is how long the kernel may keep what it was told: an image does not
// change. The kernel caps it at what its clock can hold.
const forever = 10 * 365 * 24 * time.Hour

// Tree is the FUSE face: an image's tree, read in place from its index. A node's
// id is its EROFS nid; nothing is kept for an inode that the kernel knows, so a
// mount of a million files costs what an empty one does. OPEN, OPENDIR
// and FLUSH are refused once and never come again.
type Tree struct {
	fuse.RawFileSystem
	im     *index.Image
	layers []Data // by device
	fault  Fault
	ops    *ops
	ahead  ahead
}

// NewTree serves im, the contents of its device i from layers[i].
func NewTree(im *index.Image, layers []Data, o Options) *Tree {
	return &Tree{RawFileSystem: fuse.NewDefaultRawFileSystem(), im: im, layers: layers, fault: o.Fault, ops: newOps(o.Metrics),
		ahead: ahead{im: im, layers: layers}}
}

func (t *Tree) String() string { return "varve" }

func (t *Tree) nid(id uint64) uint64 {
	if id == fuse.FUSE_ROOT_ID {
		return t.im.Root()
	}
	return id
}

func (t *Tree) inode(id uint64) (index.Inode, error) { return t.im.Inode(t.nid(id)) }

func setAttr(out *fuse.Attr, in *index.Inode) {
	out.Ino = in.Nid
	out.Size = uint64(in.Size)
	out.Blocks = (out.Size + 511) / 512
	out.Atime, out.Mtime, out.Ctime = uint64(in.Mtime), uint64(in.Mtime), uint64(in.Mtime)
	out.Atimensec, out.Mtimensec, out.Ctimensec = in.MtimeNs, in.MtimeNs, in.MtimeNs
	out.Mode, out.Nlink = in.Mode, in.Nlink
	out.Uid, out.Gid = in.UID, in.GID
	out.Rdev = in.Rdev
	out.Blksize = index.BlockSize
}

func setEntry(out *fuse.EntryOut, in *index.Inode) {
	out.NodeId, out.Generation = in.Nid, 1
	out.SetEntryTimeout(forever)
	out.SetAttrTimeout(forever)
	setAttr(&out.Attr, in)
}

func (t *Tree) Lookup(_ <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) (st fuse.Status) {
	defer t.ops.done(opLookup, time.Now(), &st)
	dir, err := t.inode(h.NodeId)
	if err != nil {
		return status(err)
	}
	nid, err := t.im.Lookup(&dir, name)
	if err == index.ErrNotExist {
		// A name that is not there never will be: node 0 with a timeout.
		out.SetEntryTimeout(forever)
		return fuse.OK
	}
	if err != nil {
		return status(err)
	}
	in, err := t.im.Inode(nid)
	if err != nil {
		return status(err)
	}
	setEntry(out, &in)
	return fuse.OK
}

func (t *Tree) GetAttr(_ <-chan struct{}, h *fuse.GetAttrIn, out *fuse.AttrOut) (st fuse.Status) {
	defer t.ops.done(opGetattr, time.Now(), &st)
	in, err := t.inode(h.NodeId)
	if err != nil {
		return status(err)
	}
	out.SetTimeout(forever)
	setAttr(&out.Attr, &in)
	return fuse.OK
}

func (t *Tree) Readlink(_ <-chan struct{}, h *fuse.InHeader) (_ []byte, st fuse.Status) {
	defer t.ops.done(opReadlink, time.Now(), &st)
	in, err := t.inode(h.NodeId)
	if err != nil {
		return nil, status(err)
	}
	b, err := t.im.Readlink(&in)
	return b, status(err)
}

// Open and OpenDir answer ENOSYS on purpose: with CAP_NO_OPEN_SUPPORT and
// CAP_NO_OPENDIR_SUPPORT the kernel then opens everything by itself and keeps
// its caches (fuse_file_open in fs/fuse/file.c).
func (t *Tree) Open(<-chan struct{}, *fuse.OpenIn, *fuse.OpenOut) fuse.Status { return fuse.ENOSYS }

func (t *Tree) OpenDir(<-chan struct{}, *fuse.OpenIn, *fuse.OpenOut) fuse.Status { return fuse.ENOSYS }

// Flush answers ENOSYS so that no close asks again (fuse_flush in fs/fuse/file.c).
func (t *Tree) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status { return fuse.ENOSYS }

func (t *Tree) ReadDir(_ <-chan struct{}, h *fuse.ReadIn, out *fuse.DirEntryList) (st fuse.Status) {
	defer t.ops.done(opReaddir, time.Now(), &st)
	dir, err := t.inode(h.NodeId)
	if err != nil {
		return status(err)
	}
	err = t.im.ReadDir(&dir, h.Offset, func(d index.Dirent, next uint64) bool {
		return out.AddDirEntry(dirEntry(d, next))
	})
	return status(err)
}

func (t *Tree) ReadDirPlus(_ <-chan struct{}, h *fuse.ReadIn, out *fuse.DirEntryList) (st fuse.Status) {
	defer t.ops.done(opReaddirplus, time.Now(), &st)
	dir, err := t.inode(h.NodeId)
	if err != nil {
		return status(err)
	}
	var bad error
	err = t.im.ReadDir(&dir, h.Offset, func(d index.Dirent, next uint64) bool {
		e := out.AddDirLookupEntry(dirEntry(d, next))
		if e == nil {
			return false
		}
		if string(d.Name) == "." || string(d.Name) == ".." {
			return true // the kernel takes no inode from these
		}
		var in index.Inode
		if in, bad = t.im.Inode(d.Nid); bad != nil {
			return false
		}
		setEntry(e, &in)
		return true
	})
	if err == nil {
		err = bad
	}
	return status(err)
}

func dirEntry(d index.Dirent, next uint64) fuse.DirEntry {
	// The name is copied into the answer before the image can be unmapped.
	name := unsafe.String(unsafe.SliceData(d.Name), len(d.Name))
	return fuse.DirEntry{Name: name, Ino: d.Nid, Mode: d.ModeType(), Off: next}
}

// Read answers from the data file of the layer that has the file.
func (t *Tree) Read(_ <-chan struct{}, h *fuse.ReadIn, _ []byte) (_ fuse.ReadResult, st fuse.Status) {
	defer t.ops.done(opRead, time.Now(), &st)
	in, err := t.inode(h.NodeId)
	if err != nil {
		return nil, status(err)
	}
	device, off, _, err := t.im.Extent(&in)
	if err != nil {
		return nil, status(err)
	}
	n := min(int64(h.Size), in.Size-int64(h.Offset))
	if n <= 0 {
		return fuse.ReadResultData(nil), fuse.OK
	}
	off += int64(h.Offset)
	r, err := hold(t.layers[device], off, n)
	if err != nil {
		t.fault(device, off, err)
		return nil, status(err)
	}
	if h.Offset == 0 {
		if c, ok := r.(*copied); ok {
			c.then = t.ahead.read(&in)
		} else {
			t.ahead.take(&in, false)
		}
	}
	return r, fuse.OK
}

// Local reports whether the layer that has a file is here.
func (t *Tree) Local(node uint64) bool {
	in, err := t.inode(node)
	if err != nil {
		return true // so is the error
	}
	device, _, has, err := t.im.Extent(&in)
	return err != nil || !has || allHere(t.layers[device])
}

func (t *Tree) GetXAttr(_ <-chan struct{}, h *fuse.InHeader, attr string, dest []byte) (_ uint32, st fuse.Status) {
	defer t.ops.done(opGetxattr, time.Now(), &st)
	in, err := t.inode(h.NodeId)
	if err != nil {
		return 0, status(err)
	}
	st = fuse.Status(syscall.ENODATA)
	n := 0
	err = t.im.Xattrs(&in, func(prefix string, rest, value []byte) bool {
		if len(attr) != len(prefix)+len(rest) || attr[:len(prefix)] != prefix || attr[len(prefix):] != string(rest) {
			return true
		}
		n, st = fill(dest, value)
		return false
	})
	if err != nil {
		return 0, status(err)
	}
	return uint32(n), st
}

func (t *Tree) ListXAttr(_ <-chan struct{}, h *fuse.InHeader, dest []byte) (_ uint32, st fuse.Status) {
	defer t.ops.done(opListxattr, time.Now(), &st)
	in, err := t.inode(h.NodeId)
	if err != nil {
		return 0, status(err)
	}
	var names []byte
	err = t.im.Xattrs(&in, func(prefix string, rest, _ []byte) bool {
		// As EROFS does: names that only the administrator may read are not
		// shown to others.
		if prefix == "trusted." && h.Uid != 0 {
			return true
		}
		names = append(append(append(names, prefix...), rest...), 0)
		return true
	})
	if err != nil {
		return 0, status(err)
	}
	n, st := fill(dest, names)
	return uint32(n), st
}

// fill copies a value as getxattr(2) does: an empty buffer asks for the size.
func fill(dest, value []byte) (int, fuse.Status) {
	if len(dest) == 0 {
		return len(value), fuse.OK
	}
	if len(value) > len(dest) {
		return len(value), fuse.ERANGE
	}
	return copy(dest, value), fuse.OK
}

func (t *Tree) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	blocks := uint64(t.im.Bytes()) / index.BlockSize
	for _, d := range t.im.Devices() {
		blocks += uint64(d.Size) / index.BlockSize
	}
	out.Blocks, out.Bsize, out.Frsize = blocks, index.BlockSize, index.BlockSize
	out.Files, out.NameLen = t.im.Inodes(), index.MaxName
	return fuse.OK
}
