package index

import (
	"bufio"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"math/bits"

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
	l := layout{meta: alignUp(int64(sbOffset+sbSize+len(devices)*deviceSlot), nidUnit)}
	if err := l.plan(t.root); err != nil {
		return err
	}
	if l.root.nid > maxRootNid {
		return fmt.Errorf("the root inode lies at %d, past what EROFS can name", l.root.nid)
	}
	out := &imageWriter{w: bufio.NewWriterSize(w, 1<<20)}
	out.superblock(&l, devices)
	for _, p := range l.inodes {
		out.inode(p)
	}
	out.pad(l.dataStart)
	for _, p := range l.inodes {
		out.data(p)
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
	meta      int64 // where inodes begin
	next      int64
	dataStart int64 // where blocks of directories and long symlinks begin
	end       int64
	inodes    []*placed
	byInode   map[*inode]*placed
	root      *inode
}

// placed is an inode with its place and the bytes that belong to it.
type placed struct {
	in     *inode
	node   *node // of a directory: its name list
	parent *placed
	kids   []*node
	off    int64  // in the image
	xattrs []byte // the inline xattr area, a multiple of 4 bytes
	layout int
	inline int   // bytes that follow the inode
	size   int64 // i_size
	blocks int64 // full blocks in the data area
	block  int64 // number of the first of them
}

func (l *layout) plan(root *node) error {
	l.byInode = map[*inode]*placed{}
	l.next = l.meta
	l.root = root.inode
	p, err := l.place(root)
	if err != nil {
		return err
	}
	p.parent = p
	// Depth first, with a stack of our own: a tree may be 2,000 deep.
	for stack := []*placed{p}; len(stack) > 0; {
		dir := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		from := len(stack)
		for _, kid := range dir.kids {
			if l.byInode[kid.inode] != nil {
				continue // one more name of an inode that has its place
			}
			k, err := l.place(kid)
			if err != nil {
				return err
			}
			if kid.isDir() {
				k.parent = dir
				stack = append(stack, k)
			}
		}
		reverse(stack[from:])
	}
	l.dataStart = alignUp(l.next, BlockSize)
	block := l.dataStart / BlockSize
	for _, p := range l.inodes {
		p.block = block
		block += p.blocks
	}
	l.end = block * BlockSize
	return nil
}

func (l *layout) place(n *node) (*placed, error) {
	p := &placed{in: n.inode}
	e := n.inode.entry
	var err error
	if p.xattrs, err = encodeXattrs(e); err != nil {
		return nil, fmt.Errorf("%q: %w", clip(e.Name), err)
	}
	switch e.Type() {
	case unix.S_IFDIR:
		p.node, p.kids = n, n.sorted()
		p.size = dirSize(p.kids)
		p.blocks, p.inline = p.size/BlockSize, int(p.size%BlockSize)
		p.layout = layoutInline
	case unix.S_IFLNK:
		p.size, p.inline, p.layout = int64(len(e.Link)), len(e.Link), layoutInline
	case unix.S_IFREG:
		p.size = e.Size
		if e.Size > 0 {
			p.layout, p.inline = layoutChunks, chunkSize
		}
	}
	head := inodeSize + len(p.xattrs)
	if p.layout == layoutChunks {
		head = alignUp(head, chunkSize)
	}
	// The kernel wants an inline tail whole within one block; what would not fit
	// beside its inode gets a block of its own.
	if p.layout == layoutInline && head+p.inline > BlockSize || p.inline == 0 && p.layout == layoutInline {
		if p.inline > 0 {
			p.blocks++
		}
		p.layout, p.inline = layoutPlain, 0
	}
	at := l.next
	if over := at%BlockSize + int64(head+p.inline); over > BlockSize && head+p.inline <= BlockSize {
		at = alignUp(at, BlockSize)
	}
	p.off = at
	l.next = alignUp(at+int64(head+p.inline), nidUnit)
	n.inode.nid = uint64(at / nidUnit)
	l.byInode[n.inode] = p
	l.inodes = append(l.inodes, p)
	return p, nil
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
	var block []dirent
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
	for i, p := range l.inodes {
		b = binary.LittleEndian.AppendUint64(b, uint64(p.off))
		b = binary.LittleEndian.AppendUint64(b, uint64(p.size))
		b = append(append(b, p.in.entry.Name...), 0)
		if len(b) > 64<<10 || i == len(l.inodes)-1 {
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
	le.PutUint16(sb[14:], uint16(l.root.nid))
	le.PutUint64(sb[16:], uint64(len(l.inodes)))
	le.PutUint32(sb[36:], uint32(l.end/BlockSize))
	copy(sb[48:64], l.uuid())
	copy(sb[64:80], "varve")
	for _, p := range l.inodes {
		if len(p.xattrs) > 0 {
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
	for _, p := range l.inodes {
		if p.off >= BlockSize {
			break
		}
		first.inode(p)
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

func (o *imageWriter) inode(p *placed) {
	le := binary.LittleEndian
	e := p.in.entry
	var b [inodeSize]byte
	le.PutUint16(b[0:], uint16(1|p.layout<<1))
	if len(p.xattrs) > 0 {
		le.PutUint16(b[2:], uint16((len(p.xattrs)-xattrHeader)/4+1))
	}
	le.PutUint16(b[4:], uint16(e.Mode))
	le.PutUint64(b[8:], uint64(p.size))
	var chunk [chunkSize]byte
	switch {
	case p.layout == layoutChunks:
		// One chunk holds the whole file, since its bytes lie together.
		le.PutUint16(b[16:], chunkIndexes|uint16(max(blockBits, bits.Len64(uint64(p.size-1)))-blockBits))
		le.PutUint16(chunk[2:], uint16(p.in.layer+1))
		le.PutUint32(chunk[4:], uint32(e.Data/BlockSize))
	case e.Type() == unix.S_IFCHR || e.Type() == unix.S_IFBLK:
		le.PutUint32(b[16:], e.Rdev)
	default:
		le.PutUint32(b[16:], uint32(p.block))
	}
	le.PutUint32(b[20:], uint32(p.in.nid))
	le.PutUint32(b[24:], e.UID)
	le.PutUint32(b[28:], e.GID)
	le.PutUint64(b[32:], uint64(e.Mtime))
	le.PutUint32(b[40:], e.MtimeNs)
	le.PutUint32(b[44:], uint32(p.in.nlink))
	o.pad(p.off)
	o.write(b[:])
	o.write(p.xattrs)
	switch {
	case p.layout == layoutChunks:
		o.pad(alignUp(o.at, chunkSize))
		o.write(chunk[:])
	case p.inline > 0:
		o.write(p.tail())
	}
}

// data writes the blocks that did not fit beside the inode.
func (o *imageWriter) data(p *placed) {
	if p.blocks == 0 {
		return
	}
	o.pad(p.block * BlockSize)
	if p.kids == nil {
		o.write([]byte(p.in.entry.Link))
	} else {
		all := p.dirents()
		o.write(all[:min(int64(len(all)), p.blocks*BlockSize)])
	}
	o.pad((p.block + p.blocks) * BlockSize)
}

// tail gives the bytes that follow the inode.
func (p *placed) tail() []byte {
	if p.in.entry.Type() == unix.S_IFLNK {
		return []byte(p.in.entry.Link)
	}
	return p.dirents()[p.blocks*BlockSize:]
}

// dirents encodes a directory's entries, p.size bytes.
func (p *placed) dirents() []byte {
	le := binary.LittleEndian
	buf := make([]byte, 0, p.size)
	eachDirBlock(p.kids, func(block []dirent, used int) {
		buf = append(buf, zeroes[:alignUp(len(buf), BlockSize)-len(buf)]...)
		start := len(buf)
		name := len(block) * direntSize
		for _, d := range block {
			nid, ft := p.in.nid, uint8(ftDir)
			switch {
			case d.node != nil:
				nid, ft = d.node.inode.nid, fileType(d.node.inode.entry.Mode)
			case d.name == "..":
				nid = p.parent.in.nid
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

func reverse[T any](s []T) {
	for i, j := 0, len(s)-1; i < j; i, j = i+1, j-1 {
		s[i], s[j] = s[j], s[i]
	}
}
