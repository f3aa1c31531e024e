package index

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrMalformed is wrapped by every error that says foreign bytes (a TOC, a tar,
// an index) are not what they should be.
var ErrMalformed = errors.New("malformed")

// Entry is one name of a layer, in the order of its tar. Whiteouts are entries
// like any other; [Merge] gives them their meaning.
type Entry struct {
	Name     string // as [Clean] gives it: relative, "" is the root
	Mode     uint32 // st_mode: type and permission bits; 0 for a hard link
	UID, GID uint32
	Rdev     uint32 // device number as [Mkdev] gives it
	Mtime    int64  // seconds since 1970, negative before
	MtimeNs  uint32 // nanoseconds, below 1e9
	Size     int64  // bytes of a regular file
	Data     int64  // where they begin in the data file, a multiple of BlockSize
	Link     string // target of a symlink (verbatim) or of a hard link (cleaned)
	HardLink bool
	Xattrs   []Xattr // sorted by name
}

// Xattr is one extended attribute with its full name, "user.x".
type Xattr struct {
	Name  string
	Value []byte
}

// Type gives the S_IFMT bits.
func (e *Entry) Type() uint32 { return e.Mode & unix.S_IFMT }

// IsRegular reports whether e is a regular file with contents of its own.
func (e *Entry) IsRegular() bool { return !e.HardLink && e.Type() == unix.S_IFREG }

// Clean turns a name of a tar or TOC into the path from the root it means:
// "./a//b/" and "/a/b" are "a/b", the root is "". Bytes are kept as bytes; a
// name that climbs out of the root, is empty, or is longer than the kernel can
// name is refused.
func Clean(name string) (string, error) {
	if name == "" {
		return "", fmt.Errorf("%w: empty name", ErrMalformed)
	}
	if strings.IndexByte(name, 0) >= 0 {
		return "", fmt.Errorf("%w: name %q has a NUL byte", ErrMalformed, clip(name))
	}
	// As most tars and TOCs write names: these are clean but for their ends.
	if c := strings.TrimSuffix(strings.TrimPrefix(name, "./"), "/"); isClean(c) {
		return c, nil
	}
	c := path.Clean(strings.TrimLeft(name, "/"))
	if c == "." || c == "/" {
		return "", nil
	}
	if c == ".." || strings.HasPrefix(c, "../") {
		return "", fmt.Errorf("%w: name %q climbs out of the root", ErrMalformed, clip(name))
	}
	if len(c) > MaxPath {
		return "", fmt.Errorf("%w: path of %d bytes (%q), the limit is %d", ErrMalformed, len(c), clip(c), MaxPath)
	}
	if depth := strings.Count(c, "/") + 1; depth > MaxDepth {
		return "", fmt.Errorf("%w: path of %d names (%q), the limit is %d", ErrMalformed, depth, clip(c), MaxDepth)
	}
	for rest := c; rest != ""; {
		var part string
		part, rest, _ = strings.Cut(rest, "/")
		if len(part) > MaxName {
			return "", fmt.Errorf("%w: name of %d bytes (%q), the limit is %d", ErrMalformed, len(part), clip(part), MaxName)
		}
	}
	return c, nil
}

// clip keeps a hostile name from filling a log line.
func clip(s string) string {
	const most = 80
	if len(s) > most {
		return s[:most] + "…"
	}
	return s
}

// SortXattrs checks a set of extended attributes against the limits and gives
// them in the order of their names.
func SortXattrs(m map[string]string) ([]Xattr, error) {
	if len(m) == 0 {
		return nil, nil
	}
	xs := make([]Xattr, 0, len(m))
	total := 0
	for name, value := range m {
		if name == "" || len(name) > MaxName || strings.IndexByte(name, 0) >= 0 {
			return nil, fmt.Errorf("%w: extended attribute name %q", ErrMalformed, clip(name))
		}
		if len(value) > MaxXattr {
			return nil, fmt.Errorf("%w: extended attribute %q of %d bytes, the limit is %d", ErrMalformed, name, len(value), MaxXattr)
		}
		total += len(name) + len(value)
		xs = append(xs, Xattr{Name: name, Value: []byte(value)})
	}
	if total > MaxXattrs {
		return nil, fmt.Errorf("%w: %d bytes of extended attributes, the limit is %d", ErrMalformed, total, MaxXattrs)
	}
	slices.SortFunc(xs, func(a, b Xattr) int { return strings.Compare(a.Name, b.Name) })
	return xs, nil
}

// Mkdev packs a device number as the kernel's new_encode_dev does: 12 bits of
// major and 20 of minor (include/linux/kdev_t.h), the form EROFS stores.
func Mkdev(major, minor int64) (uint32, error) {
	if major < 0 || major >= 1<<12 || minor < 0 || minor >= 1<<20 {
		return 0, fmt.Errorf("%w: device number %d:%d, the kernel has 12 and 20 bits", ErrMalformed, major, minor)
	}
	ma, mi := uint32(major), uint32(minor)
	return mi&0xff | ma<<8 | (mi&^0xff)<<12, nil
}

// Major and Minor undo [Mkdev].
func Major(rdev uint32) uint32 { return rdev >> 8 & 0xfff }

// Minor gives the minor number of a packed device number.
func Minor(rdev uint32) uint32 { return rdev&0xff | rdev>>12&^0xff }

// check refuses what no filesystem could hold.
func (e *Entry) check() error {
	switch {
	case e.MtimeNs >= 1e9:
		return fmt.Errorf("%w: %q has %d nanoseconds", ErrMalformed, clip(e.Name), e.MtimeNs)
	case e.HardLink:
		return nil
	case e.Size < 0 || e.Size > MaxFileSize:
		return fmt.Errorf("%w: %q has a size of %d bytes", ErrMalformed, clip(e.Name), e.Size)
	case e.Type() == unix.S_IFLNK && (e.Link == "" || len(e.Link) > MaxLink || strings.IndexByte(e.Link, 0) >= 0):
		return fmt.Errorf("%w: symlink %q has a target of %d bytes", ErrMalformed, clip(e.Name), len(e.Link))
	}
	switch e.Type() {
	case unix.S_IFREG, unix.S_IFDIR, unix.S_IFLNK, unix.S_IFCHR, unix.S_IFBLK, unix.S_IFIFO, unix.S_IFSOCK:
		return nil
	}
	return fmt.Errorf("%w: %q is of no known type (mode %o)", ErrMalformed, clip(e.Name), e.Mode)
}
