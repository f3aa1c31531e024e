package index

import (
	"bufio"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"math/bits"
	"slices"

	"golang.org/x/sys/unix"
)

// Device is an extra device of an EROFS index: the data file of one layer.
type Device struct {
	Tag  string // at most 64 bytes; here the hex of the layer's digest
	Size int64  // bytes of the data file
}

// WriteTo writes the tree as an EROFS image of metadata only. devices has one
// element a layer; the contents of layer i lie on device i+1. The same tree
// gives the same bytes.
func (t *Tree) WriteTo(w io.Writer, devices []Device) error {
	if len(devices) > maxDevices {
		return fmt.Errorf("an image of %d layers, the limit is %d", len(devices), maxDevices)
	}
	t.count()
	l := layout{tree: t, meta: alignUp(int64(sbOffset+sbSize+len(devices)*deviceSlot), nidUnit), order: make([]*node, 0, t.nodes)}
	l.plan()
	if t.root.inode.nid > maxRootNid {
		return fmt.Errorf("the root inode lies at %d, past what EROFS can name", t.root.inode.nid)
	}
	out := &imageWriter{w: bufio.NewWriterSize(w, 64<<10)}
	out.superblock(&l, devices)
	for _, n := range l.order {
		out.inode(n)
	}
	out.pad(l.dataStart)
	for _, n := range l.order {
		out.data(n)
	}
	out.pad(l.end)
	if out.err != nil {
		return out.err
	}
	return out.w.Flush()
}

// layout decides where everything lies before a byte is written. Inodes come
// directory by directory, the children of one in the order of their names: a
// walk reads the image from front to back.
type layout struct {
	tree      *Tree
	meta      int64 // where inodes begin
	next      int64
	dataStart int64 // where blocks of directories and long symlinks begin
	end       int64
	order     []*node // the first name of each inode, as they are written
}

func (l *layout) plan() {
	l.tree.written++
	l.next = l.meta
	root := l.tree.root
	l.place(root, root)
	// Depth first, with a stack of our own: a tree may be 2,000 deep.
	for stack := []*node{root}; len(stack) > 0; {
		dir := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		from := len(stack)
		for _, kid := range dir.kids.sorted() {
			if kid.inode.round == l.tree.written {
				continue // one more name of an inode that has its place
			}
			l.place(kid, dir)
			if kid.isDir() {
				stack = append(stack, kid)
			}
		}
		slices.Reverse(stack[from:])
	}
	l.dataStart = alignUp(l.next, BlockSize)
	block := l.dataStart / BlockSize
	for _, n := range l.order {
		if f := n.inode.form(); f.layout != layoutChunks {
			n.inode.at = block
			block += f.blocks
		}
	}
	l.end = block * BlockSize
}

// place gives an inode its place. Those before it have theirs.
func (l *layout) place(n, parent *node) {
	in := n.inode
	if n.isDir() {
		if n.kids == nil {
			n.kids = &names{}
		}
		n.kids.parent = parent.inode
		in.size = dirSize(n.kids.sorted())
	}
	f := in.form()
	at, size := l.next, int64(f.head+f.inline)
	if at%BlockSize+size > BlockSize && size <= BlockSize {
		at = alignUp(at, BlockSize)
	}
	l.next = alignUp(at+size, nidUnit)
	in.nid, in.round = uint64(at/nidUnit), l.tree.written
	l.order = append(l.order, n)
}

// form is how an inode lies in the image, which its type and sizes say.
type form struct {
	layout int
	head   int   // bytes before what follows the inode
	inline int   // bytes that follow the inode
	blocks int64 // full blocks in the data area
}

func (in *inode) form() (f form) {
	switch in.mode & unix.S_IFMT {
	case unix.S_IFDIR:
		f.layout, f.blocks, f.inline = layoutInline, in.size/BlockSize, int(in.size%BlockSize)
	case unix.S_IFLNK:
		f.layout, f.inline = layoutInline, int(in.size)
	case unix.S_IFREG:
		if in.size > 0 {
			f.layout, f.inline = layoutChunks, chunkSize
		}
	}
	f.head = inodeSize + len(in.xattrs())
	if f.layout == layoutChunks {
		f.head = alignUp(f.head, chunkSize)
	}
	// The kernel wants an inline tail whole within one block; what would not fit
	// beside its inode gets a block of its own.
	if f.layout == layoutInline && (f.inline == 0 || f.head+f.inline > BlockSize) {
		if f.inline > 0 {
			f.blocks++
		}
		f.layout, f.inline = layoutPlain, 0
	}
	return f
}

// dirSize gives the bytes of a directory's entries, "." and ".." with them:
// whole blocks, and the last as long as it is.
func dirSize(kids []*node) (size int64) {
	eachDirBlock(kids, func(_ []dirent, used int) { size = alignUp(size, BlockSize) + int64(used) })
	return size
}

type dirent struct {
	name string
	node *node // nil for "." and ".."
}

// eachDirBlock packs a directory's names into blocks, as many as fit in each.
func eachDirBlock(kids []*node, emit func(block []dirent, used int)) {
	block := make([]dirent, 0, min(len(kids)+2, BlockSize/direntSize))
	used := 0
	add := func(d dirent) {
		need := direntSize + len(d.name)
		if used+need > BlockSize {
			emit(block, used)
			block, used = block[:0], 0
		}
		block = append(block, d)
		used += need
	}
	// "." and ".." sort among the names by their bytes, not before them.
	dots := []dirent{{name: "."}, {name: ".."}}
	for _, k := range kids {
		for len(dots) > 0 && dots[0].name < k.name {
			add(dots[0])
			dots = dots[1:]
		}
		add(dirent{k.name, k})
	}
	for _, d := range dots {
		add(d)
	}
	emit(block, used)
}

func encodeXattrs(e *Entry) ([]byte, error) {
	var buf []byte
	for _, x := range e.Xattrs {
		index, rest, ok := splitXattr(x.Name)
		if !ok {
			// A name space that the kernel has no handler for is dropped, as
			// unpacking drops what setxattr answers with EOPNOTSUPP.
			continue
		}
		if buf == nil {
			buf = make([]byte, xattrHeader)
		}
		buf = append(buf, uint8(len(rest)), index)
		buf = binary.LittleEndian.AppendUint16(buf, uint16(len(x.Value)))
		buf = append(buf, rest...)
		buf = append(buf, x.Value...)
		for len(buf)%4 != 0 {
			buf = append(buf, 0)
		}
	}
	if len(buf) > xattrHeader+4*(1<<16-2) {
		return nil, fmt.Errorf("%w: %d bytes of extended attributes", ErrMalformed, len(buf))
	}
	return buf, nil
}

// imageWriter writes the image from front to back and keeps the first error.
type imageWriter struct {
	w   *bufio.Writer
	buf [inodeSize + chunkSize]byte // of the inode that is written
	at  int64
	err error
}

func (o *imageWriter) write(b []byte) {
	if o.err == nil {
		_, o.err = o.w.Write(b)
	}
	o.at += int64(len(b))
}

var zeroes [BlockSize]byte

func (o *imageWriter) pad(to int64) {
	for o.at < to {
		o.write(zeroes[:min(BlockSize, to-o.at)])
	}
}

// uuid tells images apart in which a number stands for another file: overlayfs
// remembers by it what it copied up (ovl_lower_uuid_ok in fs/overlayfs/super.c).
func (l *layout) uuid() []byte {
	h := sha256.New()
	var b []byte
	for i, n := range l.order {
		b = binary.LittleEndian.AppendUint64(b, n.inode.nid*nidUnit)
		b = binary.LittleEndian.AppendUint64(b, uint64(n.inode.size))
		b = append(l.tree.appendPath(b, n), 0)
		if len(b) > 64<<10 || i == len(l.order)-1 {
			h.Write(b)
			b = b[:0]
		}
	}
	id := h.Sum(nil)[:16]
	id[6], id[8] = id[6]&0x0f|0x80, id[8]&0x3f|0x80 // version 8 (RFC 9562)
	return id
}

func (o *imageWriter) superblock(l *layout, devices []Device) {
	le := binary.LittleEndian
	head := make([]byte, max(BlockSize, l.meta))
	sb := head[sbOffset:]
	le.PutUint32(sb[0:], sbMagic)
	le.PutUint32(sb[8:], compatChksum|compatMtime)
	sb[12] = blockBits
	le.PutUint16(sb[14:], uint16(l.tree.root.inode.nid))
	le.PutUint64(sb[16:], uint64(len(l.order)))
	le.PutUint32(sb[36:], uint32(l.end/BlockSize))
	copy(sb[48:64], l.uuid())
	copy(sb[64:80], "varve")
	for _, n := range l.order {
		if len(n.inode.xattrs()) > 0 {
			sb[64+15] = hasXattrs
			break
		}
	}
	incompat := uint32(incompatChunked)
	if len(devices) > 0 {
		incompat |= incompatDevices
	}
	le.PutUint32(sb[80:], incompat)
	le.PutUint16(sb[86:], uint16(len(devices)))
	le.PutUint16(sb[88:], (sbOffset+sbSize)/deviceSlot)
	for i, d := range devices {
		slot := head[sbOffset+sbSize+i*deviceSlot:]
		copy(slot[:64], d.Tag)
		le.PutUint32(slot[64:], uint32(d.Size/BlockSize))
	}
	// The checksum is over the rest of the superblock's block, which inodes
	// share: they are written into head here and skipped when their turn comes.
	var first imageWriter
	var rest sliceWriter
	first.w = bufio.NewWriter(&rest)
	first.at = l.meta
	for _, n := range l.order {
		if n.inode.nid*nidUnit >= BlockSize {
			break
		}
		first.inode(n)
	}
	first.w.Flush()
	block := append(head[:l.meta:l.meta], rest...)
	for len(block) < BlockSize {
		block = append(block, 0)
	}
	le.PutUint32(block[sbOffset+4:], 0)
	crc := ^crc32.Checksum(block[sbOffset:BlockSize], castagnoli)
	le.PutUint32(head[sbOffset+4:], crc)
	o.write(head[:l.meta])
}

type sliceWriter []byte

func (s *sliceWriter) Write(b []byte) (int, error) { *s = append(*s, b...); return len(b), nil }

func (o *imageWriter) inode(n *node) {
	le := binary.LittleEndian
	in := n.inode
	f, xattrs := in.form(), in.xattrs()
	clear(o.buf[:])
	b, chunk := o.buf[:inodeSize], o.buf[inodeSize:]
	le.PutUint16(b[0:], uint16(1|f.layout<<1))
	if len(xattrs) > 0 {
		le.PutUint16(b[2:], uint16((len(xattrs)-xattrHeader)/4+1))
	}
	le.PutUint16(b[4:], uint16(in.mode))
	le.PutUint64(b[8:], uint64(in.size))
	switch {
	case f.layout == layoutChunks:
		// One chunk holds the whole file, since its bytes lie together.
		le.PutUint16(b[16:], chunkIndexes|uint16(max(blockBits, bits.Len64(uint64(in.size-1)))-blockBits))
		le.PutUint16(chunk[2:], uint16(in.layer+1))
		le.PutUint32(chunk[4:], uint32(in.at/BlockSize))
	case in.isType(unix.S_IFCHR) || in.isType(unix.S_IFBLK):
		if in.more != nil {
			le.PutUint32(b[16:], in.more.rdev)
		}
	default:
		le.PutUint32(b[16:], uint32(in.at))
	}
	le.PutUint32(b[20:], uint32(in.nid))
	le.PutUint32(b[24:], in.uid)
	le.PutUint32(b[28:], in.gid)
	le.PutUint64(b[32:], uint64(in.mtime))
	le.PutUint32(b[40:], in.mtimeNs)
	le.PutUint32(b[44:], in.nlink)
	o.pad(int64(in.nid) * nidUnit)
	o.write(b)
	o.write(xattrs)
	switch {
	case f.layout == layoutChunks:
		o.pad(alignUp(o.at, chunkSize))
		o.write(chunk)
	case f.inline > 0:
		o.write(n.contents()[f.blocks*BlockSize:])
	}
}

// data writes the blocks that did not fit beside the inode.
func (o *imageWriter) data(n *node) {
	blocks := n.inode.form().blocks
	if blocks == 0 {
		return
	}
	o.pad(n.inode.at * BlockSize)
	all := n.contents()
	o.write(all[:min(int64(len(all)), blocks*BlockSize)])
	o.pad((n.inode.at + blocks) * BlockSize)
}

// contents gives the bytes of a directory or symlink.
func (n *node) contents() []byte {
	if n.isDir() {
		return n.dirents()
	}
	return []byte(n.inode.link())
}

// dirents encodes a directory's entries, as many bytes as its size says.
func (n *node) dirents() []byte {
	le := binary.LittleEndian
	buf := make([]byte, 0, n.inode.size)
	eachDirBlock(n.kids.sorted(), func(block []dirent, used int) {
		buf = append(buf, zeroes[:alignUp(len(buf), BlockSize)-len(buf)]...)
		start := len(buf)
		name := len(block) * direntSize
		for _, d := range block {
			nid, ft := n.inode.nid, uint8(ftDir)
			switch {
			case d.node != nil:
				nid, ft = d.node.inode.nid, fileType(d.node.inode.mode)
			case d.name == "..":
				nid = n.kids.parent.nid
			}
			buf = le.AppendUint64(buf, nid)
			buf = le.AppendUint16(buf, uint16(name))
			buf = append(buf, ft, 0)
			name += len(d.name)
		}
		for _, d := range block {
			buf = append(buf, d.name...)
		}
		if len(buf)-start != used {
			panic("a directory block is not as long as planned")
		}
	})
	return buf
}

func fileType(mode uint32) uint8 {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return ftReg
	case unix.S_IFDIR:
		return ftDir
	case unix.S_IFCHR:
		return ftChr
	case unix.S_IFBLK:
		return ftBlk
	case unix.S_IFIFO:
		return ftFifo
	case unix.S_IFSOCK:
		return ftSock
	}
	return ftLnk
}
