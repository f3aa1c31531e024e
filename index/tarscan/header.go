package tarscan

import (
	"archive/tar"
	"fmt"
	"math"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/index"
)

// convert turns a header into the entry it means.
func convert(h *tar.Header) (index.Entry, error) {
	var e index.Entry
	var err error
	if e.Name, err = index.Clean(h.Name); err != nil {
		return e, err
	}
	if h.Uid < 0 || int64(h.Uid) > math.MaxUint32 || h.Gid < 0 || int64(h.Gid) > math.MaxUint32 {
		return e, fmt.Errorf("%w: %.80q: owner %d:%d does not fit 32 bits", index.ErrMalformed, h.Name, h.Uid, h.Gid)
	}
	e.UID, e.GID = uint32(h.Uid), uint32(h.Gid)
	// Unix rounds down and Nanosecond counts up, before 1970 as well.
	e.Mtime, e.MtimeNs = h.ModTime.Unix(), uint32(h.ModTime.Nanosecond())
	e.Mode = uint32(h.Mode) & 0o7777
	if e.Xattrs, err = index.PAXXattrs(h.PAXRecords); err != nil {
		return e, fmt.Errorf("%.80q: %w", h.Name, err)
	}
	switch h.Typeflag {
	case tar.TypeReg, typeRegA, tar.TypeCont, tar.TypeGNUSparse:
		e.Mode |= unix.S_IFREG
		e.Size = h.Size
	case tar.TypeDir:
		e.Mode |= unix.S_IFDIR
	case tar.TypeSymlink:
		e.Mode |= unix.S_IFLNK
		e.Link = h.Linkname
	case tar.TypeLink:
		e.Mode, e.HardLink = 0, true
		if e.Link, err = index.Clean(h.Linkname); err != nil {
			return e, fmt.Errorf("%.80q: hard link: %w", h.Name, err)
		}
	case tar.TypeChar:
		e.Mode |= unix.S_IFCHR
	case tar.TypeBlock:
		e.Mode |= unix.S_IFBLK
	case tar.TypeFifo:
		e.Mode |= unix.S_IFIFO
	default:
		return e, fmt.Errorf("%w: %.80q: unhandled tar header type %d (%q)", index.ErrMalformed, h.Name, h.Typeflag, h.Typeflag)
	}
	if h.Typeflag == tar.TypeChar || h.Typeflag == tar.TypeBlock {
		if e.Rdev, err = index.Mkdev(h.Devmajor, h.Devminor); err != nil {
			return e, fmt.Errorf("%.80q: %w", h.Name, err)
		}
	}
	return e, nil
}

// isSparse reports whether archive/tar gives more bytes than the tar holds.
func isSparse(h *tar.Header) bool {
	if h.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// typeRegA is a regular file in tars older than POSIX.
const typeRegA = 0
