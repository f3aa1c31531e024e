package index

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"sort"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrNotExist is what [Image.Lookup] gives for a name that a directory lacks.
var ErrNotExist = errors.New("no such file or directory")

// Image is an EROFS index read in place. Every method is safe for concurrent
// use, allocates nothing per file, and answers a damaged image with an error
// that wraps [ErrMalformed], never with a panic.
type Image struct {
	b       []byte
	root    uint64
	inodes  uint64
	devices []Device
	xattrs  bool
}

// Open maps the image at path. Close it when nothing reads from it any more.
func Open(path string) (*Image, error) {
	// Whatever lies there: not through a link, and not waiting for a FIFO.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENXIO) {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Size() < BlockSize || st.Size() > 1<<40 {
		return nil, fmt.Errorf("%w: %s: %d bytes", ErrMalformed, path, st.Size())
	}
	b, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %s: %w", path, err)
	}
	im, err := newImage(b)
	if err != nil {
		unix.Munmap(b)
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return im, nil
}

// Close unmaps the image.
func (im *Image) Close() error { return unix.Munmap(im.b) }

// newImage checks the superblock and the device table of an image in memory.
func newImage(b []byte) (*Image, error) {
	le := binary.LittleEndian
	if len(b) < BlockSize {
		return nil, fmt.Errorf("%w: an index of %d bytes", ErrMalformed, len(b))
	}
	sb := b[sbOffset : sbOffset+sbSize]
	if le.Uint32(sb) != sbMagic || sb[12] != blockBits {
		return nil, fmt.Errorf("%w: not an EROFS image of 4 KiB blocks", ErrMalformed)
	}
	block := append([]byte(nil), b[sbOffset:BlockSize]...)
	le.PutUint32(block[4:], 0)
	if ^crc32.Checksum(block, castagnoli) != le.Uint32(sb[4:]) {
		return nil, fmt.Errorf("%w: superblock checksum", ErrMalformed)
	}
	if int64(le.Uint32(sb[36:]))*BlockSize != int64(len(b)) {
		return nil, fmt.Errorf("%w: an index of %d bytes that says it has %d blocks", ErrMalformed, len(b), le.Uint32(sb[36:]))
	}
	im := &Image{b: b, root: uint64(le.Uint16(sb[14:])), inodes: le.Uint64(sb[16:])}
	n := int(le.Uint16(sb[86:]))
	at := int(le.Uint16(sb[88:])) * deviceSlot
	if n > maxDevices || at+n*deviceSlot > len(b) {
		return nil, fmt.Errorf("%w: device table of %d", ErrMalformed, n)
	}
	for i := range n {
		slot := b[at+i*deviceSlot:]
		tag := slot[:64]
		for len(tag) > 0 && tag[len(tag)-1] == 0 {
			tag = tag[:len(tag)-1]
		}
		im.devices = append(im.devices, Device{Tag: string(tag), Size: int64(le.Uint32(slot[64:])) * BlockSize})
	}
	im.xattrs = sb[64+15] == hasXattrs
	return im, nil
}

// hasXattrs stands in the last byte of the volume name of an image that has
// extended attributes: so that a reader need not walk it to know.
const hasXattrs = 'x'

// Root gives the nid of the root directory.
func (im *Image) Root() uint64 { return im.root }

// Inodes gives the number of inodes.
func (im *Image) Inodes() uint64 { return im.inodes }

// Devices gives the device table, the lowest layer first.
func (im *Image) Devices() []Device { return im.devices }

// HasXattrs reports whether any inode has extended attributes.
func (im *Image) HasXattrs() bool { return im.xattrs }

// Bytes gives the size of the image.
func (im *Image) Bytes() int64 { return int64(len(im.b)) }

// Inode is what the image says of an inode. It is a value; copying is cheap.
type Inode struct {
	Nid      uint64
	Mode     uint32
	UID, GID uint32
	Nlink    uint32
	Rdev     uint32 // as [Mkdev] packs it
	Size     int64
	Mtime    int64
	MtimeNs  uint32

	layout int
	u      uint32 // i_u: a block, a chunk format
	xattr  int64  // where the xattr area begins
	body   int64  // where what follows it begins
}

func (in *Inode) IsDir() bool { return in.Mode&unix.S_IFMT == unix.S_IFDIR }

// Inode reads the inode at nid.
func (im *Image) Inode(nid uint64) (in Inode, err error) {
	if nid >= uint64(len(im.b))/nidUnit {
		return in, fmt.Errorf("%w: inode %d lies past the index", ErrMalformed, nid)
	}
	b, err := im.at(int64(nid)*nidUnit, inodeSize)
	if err != nil {
		return in, err
	}
	le := binary.LittleEndian
	format := le.Uint16(b)
	if format&1 == 0 {
		return in, fmt.Errorf("%w: inode %d is not of the extended form", ErrMalformed, nid)
	}
	in = Inode{
		Nid: nid, Mode: uint32(le.Uint16(b[4:])), Size: int64(le.Uint64(b[8:])),
		UID: le.Uint32(b[24:]), GID: le.Uint32(b[28:]), Nlink: le.Uint32(b[44:]),
		Mtime: int64(le.Uint64(b[32:])), MtimeNs: le.Uint32(b[40:]),
		layout: int(format >> 1 & 7), u: le.Uint32(b[16:]),
		xattr: int64(nid)*nidUnit + inodeSize,
	}
	in.body = in.xattr
	if n := int64(le.Uint16(b[2:])); n > 0 {
		in.body += xattrHeader + (n-1)*xattrEntry
	}
	switch in.Mode & unix.S_IFMT {
	case unix.S_IFCHR, unix.S_IFBLK:
		in.Rdev = in.u
	}
	if in.Size < 0 || in.Size > MaxFileSize {
		return in, fmt.Errorf("%w: inode %d of %d bytes", ErrMalformed, nid, in.Size)
	}
	return in, nil
}

// at gives n bytes of the image at an offset, or an error where it has none.
func (im *Image) at(off int64, n int64) ([]byte, error) {
	if off < 0 || n < 0 || off > int64(len(im.b))-n {
		return nil, fmt.Errorf("%w: %d bytes at %d of an index of %d", ErrMalformed, n, off, len(im.b))
	}
	return im.b[off : off+n], nil
}

// Extent says where a regular file's bytes lie: on which device, counted from 0
// as the layers are, and from which offset of its data file on. A file lies in
// one stretch. An empty one has no extent: ok is false.
func (im *Image) Extent(in *Inode) (device int, off int64, ok bool, err error) {
	if in.Size == 0 {
		return 0, 0, false, nil
	}
	if in.layout != layoutChunks || in.u&chunkIndexes == 0 {
		return 0, 0, false, fmt.Errorf("%w: inode %d is not chunk-based", ErrMalformed, in.Nid)
	}
	b, err := im.at(alignUp(in.body, chunkSize), chunkSize)
	if err != nil {
		return 0, 0, false, err
	}
	le := binary.LittleEndian
	device, off = int(le.Uint16(b[2:]))-1, int64(le.Uint32(b[4:]))*BlockSize
	if device < 0 || device >= len(im.devices) || off+in.Size > alignUp(im.devices[device].Size, BlockSize) {
		return 0, 0, false, fmt.Errorf("%w: inode %d lies outside device %d", ErrMalformed, in.Nid, device)
	}
	return device, off, true, nil
}

// Next gives the inode that was written after in: the next of its directory in the
// order of names, or else the first of a directory that comes after. What follows
// the last is an error, or no inode that any directory names.
func (im *Image) Next(in *Inode) (next Inode, err error) {
	end := in.body
	switch in.layout {
	case layoutChunks:
		end = alignUp(end, chunkSize) + chunkSize
	case layoutInline:
		end += in.Size % BlockSize
	}
	at := alignUp(end, nidUnit)
	if next, err = im.Inode(uint64(at / nidUnit)); err != nil {
		next, err = im.Inode(uint64(alignUp(at, BlockSize) / nidUnit))
	}
	return next, err
}

// Readlink gives a symlink's target, in the image's memory.
func (im *Image) Readlink(in *Inode) ([]byte, error) {
	if in.Mode&unix.S_IFMT != unix.S_IFLNK || in.Size > MaxLink {
		return nil, fmt.Errorf("%w: inode %d is not a symlink", ErrMalformed, in.Nid)
	}
	return im.block(in, 0)
}

// block gives the bytes of a block of a directory or symlink.
func (im *Image) block(in *Inode, i int64) ([]byte, error) {
	n := min(BlockSize, in.Size-i*BlockSize)
	if i < 0 || n <= 0 {
		return nil, fmt.Errorf("%w: block %d of inode %d", ErrMalformed, i, in.Nid)
	}
	switch {
	case in.layout == layoutInline && i == in.Size/BlockSize:
		return im.at(in.body, n)
	case in.layout == layoutInline || in.layout == layoutPlain:
		return im.at((int64(in.u)+i)*BlockSize, n)
	}
	return nil, fmt.Errorf("%w: inode %d has layout %d", ErrMalformed, in.Nid, in.layout)
}

// Dirent is a name of a directory, in the image's memory.
type Dirent struct {
	Name []byte
	Nid  uint64
	Type uint8 // the kernel's FT_*
}

// ModeType turns a dirent's type into the S_IFMT bits.
func (d *Dirent) ModeType() uint32 {
	return [...]uint32{0, unix.S_IFREG, unix.S_IFDIR, unix.S_IFCHR, unix.S_IFBLK, unix.S_IFIFO, unix.S_IFSOCK, unix.S_IFLNK}[d.Type]
}

// direntAt decodes entry i of a directory block, n being the number it has.
func direntAt(b []byte, i, n int) (d Dirent, ok bool) {
	le := binary.LittleEndian
	r := b[i*direntSize:]
	from, to := int(le.Uint16(r[8:])), len(b)
	if i+1 < n {
		to = int(le.Uint16(r[direntSize+8:]))
	}
	if from < n*direntSize || from > to || to > len(b) || r[10] > ftLnk {
		return d, false
	}
	name := b[from:to]
	if i+1 == n {
		// Only the last name of a block may be followed by padding.
		for k, c := range name {
			if c == 0 {
				name = name[:k]
				break
			}
		}
	}
	return Dirent{Name: name, Nid: le.Uint64(r), Type: r[10]}, len(name) > 0
}

func direntCount(b []byte) (int, bool) {
	if len(b) < direntSize {
		return 0, false
	}
	first := int(binary.LittleEndian.Uint16(b[8:]))
	return first / direntSize, first >= direntSize && first%direntSize == 0 && first <= len(b)
}

// Lookup finds a name in a directory by two binary searches: for the block, by
// its first name, and within it.
func (im *Image) Lookup(dir *Inode, name string) (nid uint64, err error) {
	if !dir.IsDir() {
		return 0, fmt.Errorf("%w: inode %d is not a directory", ErrMalformed, dir.Nid)
	}
	var bad error
	entry := func(block int64, i int) (b []byte, n int, d Dirent) {
		b, err := im.block(dir, block)
		if err == nil {
			var ok bool
			if n, ok = direntCount(b); ok && i < n {
				if d, ok = direntAt(b, i, n); ok {
					return b, n, d
				}
			}
			err = fmt.Errorf("%w: directory %d, block %d", ErrMalformed, dir.Nid, block)
		}
		bad = err
		return nil, 0, d
	}
	blocks := int(alignUp(dir.Size, BlockSize) / BlockSize)
	k := sort.Search(blocks, func(k int) bool {
		_, _, d := entry(int64(k), 0)
		return string(d.Name) > name
	})
	if bad != nil || k == 0 {
		return 0, orNotExist(bad)
	}
	b, n, _ := entry(int64(k-1), 0)
	if bad != nil {
		return 0, bad
	}
	i := sort.Search(n, func(i int) bool {
		d, ok := direntAt(b, i, n)
		if !ok {
			bad = fmt.Errorf("%w: directory %d, entry %d", ErrMalformed, dir.Nid, i)
		}
		return string(d.Name) >= name
	})
	if bad == nil && i < n {
		if d, _ := direntAt(b, i, n); string(d.Name) == name {
			return d.Nid, nil
		}
	}
	return 0, orNotExist(bad)
}

func orNotExist(err error) error {
	if err != nil {
		return err
	}
	return ErrNotExist
}

// ReadDir gives a directory's entries from a cookie on, 0 for the first, in the
// order of their bytes, "." and ".." among them, until fn returns false. The
// cookie handed to fn is the one to go on from after that entry.
func (im *Image) ReadDir(dir *Inode, cookie uint64, fn func(d Dirent, next uint64) bool) error {
	const perBlock = BlockSize // more than a block can have entries
	if !dir.IsDir() {
		return fmt.Errorf("%w: inode %d is not a directory", ErrMalformed, dir.Nid)
	}
	block, i := int64(cookie/perBlock), int(cookie%perBlock)
	for ; block*BlockSize < dir.Size; block, i = block+1, 0 {
		b, err := im.block(dir, block)
		if err != nil {
			return err
		}
		n, ok := direntCount(b)
		if !ok {
			return fmt.Errorf("%w: directory %d, block %d", ErrMalformed, dir.Nid, block)
		}
		for ; i < n; i++ {
			d, ok := direntAt(b, i, n)
			if !ok {
				return fmt.Errorf("%w: directory %d, entry %d of block %d", ErrMalformed, dir.Nid, i, block)
			}
			next := uint64(block)*perBlock + uint64(i) + 1
			if !fn(d, next) {
				return nil
			}
		}
	}
	return nil
}

// Xattrs calls fn for each extended attribute, with its name's prefix and rest
// and its value in the image's memory, until fn returns false.
func (im *Image) Xattrs(in *Inode, fn func(prefix string, rest, value []byte) bool) error {
	if in.body == in.xattr {
		return nil
	}
	b, err := im.at(in.xattr, in.body-in.xattr)
	if err != nil {
		return err
	}
	for b = b[xattrHeader:]; len(b) >= xattrEntry; {
		name, value := int(b[0]), int(binary.LittleEndian.Uint16(b[2:]))
		prefix := xattrPrefix(b[1])
		end := alignUp(xattrEntry+name+value, 4)
		if end > len(b) || prefix == "" {
			return fmt.Errorf("%w: extended attributes of inode %d", ErrMalformed, in.Nid)
		}
		if !fn(prefix, b[xattrEntry:xattrEntry+name], b[xattrEntry+name:xattrEntry+name+value]) {
			return nil
		}
		b = b[end:]
	}
	return nil
}

// Walk finds the inode of a path from the root, as [Clean] gives paths. Symlinks
// are not followed.
func (im *Image) Walk(path string) (Inode, error) {
	in, err := im.Inode(im.root)
	for rest := path; rest != "" && err == nil; {
		var part string
		part, rest, _ = strings.Cut(rest, "/")
		if !in.IsDir() {
			return in, ErrNotExist
		}
		var nid uint64
		if nid, err = im.Lookup(&in, part); err == nil {
			in, err = im.Inode(nid)
		}
	}
	return in, err
}

// PathAt finds a file whose bytes lie at an offset of a device, by walking the
// whole tree: for the message about a read that failed.
func (im *Image) PathAt(device int, off int64) (path string, ok bool) {
	var walk func(path string, nid uint64, depth int) bool
	walk = func(at string, nid uint64, depth int) bool {
		in, err := im.Inode(nid)
		if err != nil || depth > MaxPath {
			return false
		}
		if !in.IsDir() {
			dev, from, has, err := im.Extent(&in)
			if err == nil && has && dev == device && off >= from && off < from+in.Size {
				path, ok = at, true
			}
			return ok
		}
		im.ReadDir(&in, 0, func(d Dirent, _ uint64) bool {
			name := string(d.Name)
			return name == "." || name == ".." || d.Type != ftDir && d.Type != ftReg || !walk(at+"/"+name, d.Nid, depth+1)
		})
		return ok
	}
	walk("", im.root, 0)
	return path, ok
}
