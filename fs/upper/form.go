// Package upper is the writable directory of a mount in overlayfs' on-disk form,
// so that the kernel's overlayfs and the daemon's own union can write the same
// one, and diff, commit and export need not know who did.
//
// Whatever lies in an upper may have been planted there: everything is reached
// by directory descriptors and single names, or by openat2 with RESOLVE_BENEATH
// and RESOLVE_NO_SYMLINKS.
package upper

import (
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Form says how an upper keeps what a plain file cannot: which extended
// attributes carry overlayfs' marks, and whether owners are real.
type Form string

const (
	// Trusted is what overlayfs mounted by the host's root writes: marks in
	// trusted.overlay.*, owners, modes and devices are real.
	Trusted Form = "trusted"
	// User is what overlayfs mounted in a user namespace writes (userxattr):
	// marks in user.overlay.*, owners are real as far as the namespace maps them.
	User Form = "user"
	// Override is what the daemon of a plain user writes: marks in
	// user.overlay.*. What belongs to that user on disk belongs to root in the
	// image; every other owner, modes that would lock the user out, and types
	// that the user may not make, are kept in [OverrideXattr].
	Override Form = "override"
)

// OverrideXattr holds an [Owner] as containers/storage and fuse-overlayfs write
// it: "uid:gid:mode", or "uid:gid:mode:type" on a regular file that stands for
// something else.
const OverrideXattr = "user.containers.override_stat"

// prefix begins the names of overlayfs' own marks (fs/overlayfs/overlayfs.h,
// OVL_XATTR_TRUSTED_PREFIX and OVL_XATTR_USER_PREFIX).
func (f Form) prefix() string {
	if f == Trusted {
		return "trusted.overlay."
	}
	return "user.overlay."
}

// OpaqueXattr is "y" on a directory below which nothing of the lower shows.
func (f Form) OpaqueXattr() string { return f.prefix() + "opaque" }

// Shown gives the name by which a mount shows an extended attribute of the
// upper, or false for one that is overlayfs' or ours. A mark within a mark,
// trusted.overlay.overlay.x, is how overlayfs keeps a user's own
// trusted.overlay.x (Documentation/filesystems/overlayfs.rst, "Nesting
// overlayfs mounts").
func (f Form) Shown(stored string) (shown string, ok bool) {
	if f == Override && stored == OverrideXattr {
		return "", false
	}
	rest, own := strings.CutPrefix(stored, f.prefix())
	if !own {
		return stored, true
	}
	rest, escaped := strings.CutPrefix(rest, "overlay.")
	return f.prefix() + rest, escaped
}

// Stored undoes [Form.Shown]. It gives false for a name that no mount may set.
func (f Form) Stored(shown string) (stored string, ok bool) {
	if f == Override && shown == OverrideXattr {
		return "", false
	}
	if rest, own := strings.CutPrefix(shown, f.prefix()); own {
		return f.prefix() + "overlay." + rest, true
	}
	return shown, true
}

// IsWhiteout reports whether an entry of an upper stands for a deleted name.
func IsWhiteout(st *unix.Stat_t) bool {
	return st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0
}

// An Owner is what an [OverrideXattr] says of a file.
type Owner struct {
	UID, GID uint32
	Mode     uint32 // st_mode, type and permission bits
	Rdev     uint64 // of a device, as stat(2) gives it
}

var overrideTypes = []struct {
	name string
	mode uint32
}{
	{"file", unix.S_IFREG}, {"dir", unix.S_IFDIR}, {"symlink", unix.S_IFLNK}, {"pipe", unix.S_IFIFO},
	{"socket", unix.S_IFSOCK}, {"block", unix.S_IFBLK}, {"char", unix.S_IFCHR},
}

// String gives the attribute's value. The type is always named.
func (o Owner) String() string {
	s := fmt.Sprintf("%d:%d:0%o", o.UID, o.GID, o.Mode&^unix.S_IFMT)
	for _, t := range overrideTypes {
		if o.Mode&unix.S_IFMT == t.mode {
			s += ":" + t.name
		}
	}
	if t := o.Mode & unix.S_IFMT; t == unix.S_IFBLK || t == unix.S_IFCHR {
		s += fmt.Sprintf("-%d-%d", unix.Major(o.Rdev), unix.Minor(o.Rdev))
	}
	return s
}

// ParseOwner reads the attribute of a file whose own st_mode is mode: what has no
// type keeps that one's.
func ParseOwner(value string, mode uint32) (Owner, error) {
	bad := fmt.Errorf("%s: %.60q is not uid:gid:mode", OverrideXattr, value)
	parts := strings.SplitN(value, ":", 4)
	if len(parts) < 3 {
		return Owner{}, bad
	}
	uid, uerr := strconv.ParseUint(parts[0], 10, 32)
	gid, gerr := strconv.ParseUint(parts[1], 10, 32)
	perm, merr := strconv.ParseUint(parts[2], 8, 12)
	if uerr != nil || gerr != nil || merr != nil {
		return Owner{}, bad
	}
	o := Owner{UID: uint32(uid), GID: uint32(gid), Mode: mode&unix.S_IFMT | uint32(perm)}
	if len(parts) == 3 {
		return o, nil
	}
	name, device, isDevice := strings.Cut(parts[3], "-")
	for _, t := range overrideTypes {
		if t.name != name || (t.mode == unix.S_IFBLK || t.mode == unix.S_IFCHR) != isDevice {
			continue
		}
		o.Mode = o.Mode&^unix.S_IFMT | t.mode
		if !isDevice {
			return o, nil
		}
		major, minor, _ := strings.Cut(device, "-")
		ma, aerr := strconv.ParseUint(major, 10, 32)
		mi, ierr := strconv.ParseUint(minor, 10, 32)
		if aerr != nil || ierr != nil {
			return Owner{}, bad
		}
		o.Rdev = unix.Mkdev(uint32(ma), uint32(mi))
		return o, nil
	}
	return Owner{}, bad
}
