// Package index is the tree of an image: layer tables of contents merged into
// one EROFS filesystem that holds metadata only, read in place from an mmap,
// and the frame table that says which compressed range of a blob yields which
// pieces of a layer's data file.
//
// The package knows no network and no FUSE. Readers of the layer formats live
// below it and all give a [Layer].
package index

// BlockSize is the unit in which file contents are laid out in a data file and
// the block size of the EROFS index, in bytes.
const BlockSize = 4096

// Limits on what a layer may hold. They bound memory for hostile input and lie
// far above what real images have.
const (
	MaxEntries   = 2 << 20    // names in one layer
	MaxMeta      = 128 << 20  // bytes of names, link targets and extended attributes in one layer
	MaxImplicit  = 1 << 18    // directories of an image that no layer lists
	MaxDepth     = 1024       // directories in one another
	MaxPath      = 4095       // bytes of a path, as the kernel's PATH_MAX
	MaxName      = 255        // bytes of one component, as NAME_MAX
	MaxLink      = 4095       // bytes of a symlink's target
	MaxXattr     = 64<<10 - 1 // bytes of one extended attribute's value
	MaxXattrs    = 128 << 10  // bytes of all extended attributes of an entry
	MaxFileSize  = 1 << 43    // bytes of one file
	MaxDataSize  = 1 << 43    // bytes of one data file: 31 bits of blocks
	MaxTOCSize   = 256 << 20  // bytes of an uncompressed table of contents
	MaxTOCBlob   = 64 << 20   // bytes of a compressed one
	MaxBlobFrame = 1 << 40    // bytes of one compressed frame
)
