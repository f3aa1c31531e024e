package fs

import (
	"bufio"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/index"
)

// Growing is the FUSE face of an image of which some layers are still read. A
// node's id is that of the index.Growing. The kernel is told to keep nothing that
// has a name: every path is asked for again, so that listings grow and another
// mount can take the place of this one. What a file holds never changes and may be
// kept.
//
// A lookup waits until its name is settled, a read until its bytes are there.
// While a lookup waits the kernel has others of the same name wait for it, where
// nothing may kill them (d_wait_lookup in fs/dcache.c); and while one waits that
// is to create a file, it lets nobody into the directory for a name that it has
// not met (open_last_lookups in fs/namei.c).
type Growing struct {
	fuse.RawFileSystem
	g      *index.Growing
	layers []Data
	fault  Fault
	ops    *ops
}

// NewGrowing serves g, the contents of its layer i from layers[i]. The Options of
// its [Serve] have Xattrs set: nobody knows yet whether there are any. Where the
// mount is ended by force while lookups wait, [Served.Done] comes when they are
// settled: have g fail first.
func NewGrowing(g *index.Growing, layers []Data, o Options) *Growing {
	return &Growing{RawFileSystem: fuse.NewDefaultRawFileSystem(), g: g, layers: layers, fault: o.Fault, ops: newOps(o.Metrics)}
}

func (t *Growing) String() string { return "varve" }

// growingInode is a node as an index would say it.
func growingInode(n *index.GrowingNode) index.Inode {
	e := n.Entry
	in := index.Inode{
		Nid: n.ID, Mode: e.Mode & 0xffff, UID: e.UID, GID: e.GID, Nlink: n.Nlink,
		Mtime: e.Mtime, MtimeNs: e.MtimeNs,
	}
	switch e.Type() {
	case unix.S_IFREG:
		in.Size = e.Size
	case unix.S_IFLNK:
		in.Size = int64(len(e.Link))
	case unix.S_IFCHR, unix.S_IFBLK:
		in.Rdev = e.Rdev
	}
	return in
}

func (t *Growing) Lookup(cancel <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) (st fuse.Status) {
	defer t.ops.done(opLookup, time.Now(), &st)
	n, err := t.g.Lookup(cancel, h.NodeId, name)
	for err == index.ErrCanceled {
		// A program that handles signals would have to see an EINTR, which C
		// programs do not expect of stat(2). So only one that will see nothing
		// any more gets it. The kernel interrupts a request once: whether
		// another signal came is to be looked up.
		if dying(h.Pid) {
			return fuse.EINTR
		}
		later := make(chan struct{})
		timer := time.AfterFunc(dyingEvery, func() { close(later) })
		n, err = t.g.Lookup(later, h.NodeId, name)
		timer.Stop()
	}
	if err != nil {
		return status(err)
	}
	in := growingInode(&n)
	out.NodeId, out.Generation = n.ID, 1
	setAttr(&out.Attr, &in)
	return fuse.OK
}

// dyingEvery is how often a thread that was interrupted is looked at.
const dyingEvery = 200 * time.Millisecond

// dying reports whether a thread will not return to its program: a signal waits
// for it that ends it. One whose number the daemon cannot see (0) is not known to.
func dying(tid uint32) bool {
	if tid == 0 {
		return false
	}
	f, err := os.Open(fmt.Sprintf("/proc/%d/status", tid))
	if err != nil {
		return false
	}
	defer f.Close()
	sets := map[string]uint64{}
	for lines := bufio.NewScanner(f); lines.Scan(); {
		key, value, _ := strings.Cut(lines.Text(), ":")
		if strings.HasPrefix(key, "Sig") || key == "ShdPnd" {
			var set uint64
			fmt.Sscanf(strings.TrimSpace(value), "%x", &set)
			sets[key] = set
		}
	}
	const kill = 1 << (unix.SIGKILL - 1)
	if sets["SigPnd"]&kill != 0 {
		return true // the kernel turns what ends a process into this (complete_signal)
	}
	var harmless uint64
	for _, s := range []syscall.Signal{unix.SIGCHLD, unix.SIGCONT, unix.SIGSTOP, unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU, unix.SIGURG, unix.SIGWINCH} {
		harmless |= 1 << (s - 1)
	}
	return (sets["SigPnd"]|sets["ShdPnd"])&^(sets["SigBlk"]|sets["SigIgn"]|sets["SigCgt"]|harmless) != 0
}

func (t *Growing) GetAttr(_ <-chan struct{}, h *fuse.GetAttrIn, out *fuse.AttrOut) (st fuse.Status) {
	defer t.ops.done(opGetattr, time.Now(), &st)
	n, err := t.g.Node(h.NodeId)
	if err != nil {
		return status(err)
	}
	in := growingInode(&n)
	setAttr(&out.Attr, &in)
	return fuse.OK
}

func (t *Growing) Readlink(_ <-chan struct{}, h *fuse.InHeader) (_ []byte, st fuse.Status) {
	defer t.ops.done(opReadlink, time.Now(), &st)
	n, err := t.g.Node(h.NodeId)
	if err != nil {
		return nil, status(err)
	}
	if n.Entry.Type() != unix.S_IFLNK {
		return nil, fuse.EINVAL
	}
	return []byte(n.Entry.Link), fuse.OK
}

// Open and Flush answer ENOSYS as those of [Tree] do. OpenDir must not: the kernel would keep
// listings (fuse_file_open in fs/fuse/file.c sets FOPEN_CACHE_DIR).
func (t *Growing) Open(<-chan struct{}, *fuse.OpenIn, *fuse.OpenOut) fuse.Status { return fuse.ENOSYS }

func (t *Growing) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status { return fuse.ENOSYS }

func (t *Growing) OpenDir(_ <-chan struct{}, _ *fuse.OpenIn, _ *fuse.OpenOut) (st fuse.Status) {
	defer t.ops.done(opOpendir, time.Now(), &st)
	return fuse.OK
}

func (t *Growing) ReadDir(_ <-chan struct{}, h *fuse.ReadIn, out *fuse.DirEntryList) (st fuse.Status) {
	defer t.ops.done(opReaddir, time.Now(), &st)
	return t.readDir(h, out.AddDirEntry)
}

// ReadDirPlus gives names without nodes: that a name has passed does not say that
// it is settled.
func (t *Growing) ReadDirPlus(_ <-chan struct{}, h *fuse.ReadIn, out *fuse.DirEntryList) (st fuse.Status) {
	defer t.ops.done(opReaddirplus, time.Now(), &st)
	return t.readDir(h, func(d fuse.DirEntry) bool { return out.AddDirLookupEntry(d) != nil })
}

func (t *Growing) readDir(h *fuse.ReadIn, add func(fuse.DirEntry) bool) fuse.Status {
	for off := h.Offset; off < 2; off++ {
		if !add(fuse.DirEntry{Name: [...]string{".", ".."}[off], Ino: h.NodeId, Mode: unix.S_IFDIR, Off: off + 1}) {
			return fuse.OK
		}
	}
	return status(t.g.ReadDir(h.NodeId, h.Offset, func(name string, n index.GrowingNode, next uint64) bool {
		return add(fuse.DirEntry{Name: name, Ino: n.ID, Mode: n.Entry.Type(), Off: next})
	}))
}

// Read answers from the data file of the layer that has the file.
func (t *Growing) Read(_ <-chan struct{}, h *fuse.ReadIn, _ []byte) (_ fuse.ReadResult, st fuse.Status) {
	defer t.ops.done(opRead, time.Now(), &st)
	node, err := t.g.Node(h.NodeId)
	if err != nil {
		return nil, status(err)
	}
	n := min(int64(h.Size), node.Entry.Size-int64(h.Offset))
	if n <= 0 || node.Entry.Type() != unix.S_IFREG {
		return fuse.ReadResultData(nil), fuse.OK
	}
	data, off := t.layers[node.Layer], node.Entry.Data+int64(h.Offset)
	r, err := hold(data, off, n)
	if err != nil {
		t.fault(node.Layer, off, err)
		return nil, status(err)
	}
	return r, fuse.OK
}

func (t *Growing) GetXAttr(_ <-chan struct{}, h *fuse.InHeader, attr string, dest []byte) (_ uint32, st fuse.Status) {
	defer t.ops.done(opGetxattr, time.Now(), &st)
	node, err := t.g.Node(h.NodeId)
	if err != nil {
		return 0, status(err)
	}
	st = fuse.Status(syscall.ENODATA)
	n := 0
	node.Xattrs(func(name string, value []byte) bool {
		if name == attr {
			n, st = fill(dest, value)
		}
		return name != attr
	})
	return uint32(n), st
}

func (t *Growing) ListXAttr(_ <-chan struct{}, h *fuse.InHeader, dest []byte) (_ uint32, st fuse.Status) {
	defer t.ops.done(opListxattr, time.Now(), &st)
	node, err := t.g.Node(h.NodeId)
	if err != nil {
		return 0, status(err)
	}
	var names []byte
	node.Xattrs(func(name string, _ []byte) bool {
		if h.Uid == 0 || !strings.HasPrefix(name, "trusted.") { // as Tree.ListXAttr
			names = append(append(names, name...), 0)
		}
		return true
	})
	n, st := fill(dest, names)
	return uint32(n), st
}

// StatFs tells of the data files as long as they are by now.
func (t *Growing) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	for _, d := range t.layers {
		out.Blocks += uint64(d.Size()) / index.BlockSize
	}
	out.Bsize, out.Frsize, out.NameLen = index.BlockSize, index.BlockSize, index.MaxName
	return fuse.OK
}
