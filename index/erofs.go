package index

// The EROFS on-disk format, little-endian throughout, as far as an uncompressed
// image of metadata needs it. Source: fs/erofs/erofs_fs.h of the kernel.
const (
	sbOffset     = 1024
	sbSize       = 128
	sbMagic      = 0xE0F5E1E2
	deviceSlot   = 128 // bytes of a slot of the device table
	inodeSize    = 64  // the extended form: 32-bit owners, nanosecond times
	nidUnit      = 32  // an inode's nid is its offset in these
	direntSize   = 12
	chunkSize    = 8 // bytes of a chunk index
	xattrHeader  = 12
	xattrEntry   = 4
	blockBits    = 12
	maxRootNid   = 1<<16 - 1 // the superblock has 16 bits for it
	maxDevices   = 1 << 12
	compatChksum = 0x1
	compatMtime  = 0x2

	incompatChunked = 0x4
	incompatDevices = 0x8

	layoutPlain  = 0 // data in blocks of its own
	layoutInline = 2 // the last, partial block follows the inode
	layoutChunks = 4 // data named by chunk indexes, here on a device

	chunkIndexes = 0x20 // i_u of a chunked inode: indexes of 8 bytes
)

// File types of directory entries (the kernel's FT_*).
const (
	ftReg = iota + 1
	ftDir
	ftChr
	ftBlk
	ftFifo
	ftSock
	ftLnk
)

// xattrPrefixes are the name prefixes that EROFS stores as a number. A POSIX ACL
// is wholly its prefix. Order matters: the longest that fits comes first.
var xattrPrefixes = []struct {
	index  uint8
	prefix string
}{
	{2, "system.posix_acl_access"},
	{3, "system.posix_acl_default"},
	{1, "user."},
	{4, "trusted."},
	{6, "security."},
}

// splitXattr gives the prefix number and the rest of a name, false for one that
// no Linux filesystem of this kind stores.
func splitXattr(name string) (index uint8, rest string, ok bool) {
	for _, p := range xattrPrefixes {
		if len(name) >= len(p.prefix) && name[:len(p.prefix)] == p.prefix {
			rest = name[len(p.prefix):]
			acl := p.index == 2 || p.index == 3
			return p.index, rest, acl == (rest == "")
		}
	}
	return 0, "", false
}

func xattrPrefix(index uint8) string {
	for _, p := range xattrPrefixes {
		if p.index == index {
			return p.prefix
		}
	}
	return ""
}
