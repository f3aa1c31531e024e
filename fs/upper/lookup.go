package upper

import (
	"fmt"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// Lookup reads one name of the upper, as [Dir.Walk] gives it. No symlink is
// followed on the way to it. ENOENT or ENOTDIR is wrapped where there is nothing.
func (d *Dir) Lookup(name string) (*Change, error) {
	c, err := d.lookup(name)
	if err != nil {
		return nil, fmt.Errorf("%s in the upper: %w", clip(name), err)
	}
	return c, nil
}

func (d *Dir) lookup(name string) (*Change, error) {
	n := node{path: strings.Trim(name, "/"), name: ".", fd: -1}
	dir := "."
	if n.path != "" {
		dir, n.name = path.Split(n.path)
		dir = "./" + dir
	}
	how := unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV,
	}
	fd, err := retry(func() (int, error) { return unix.Openat2(d.tree, dir, &how) })
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	n.dirfd = fd
	if err := unix.Statx(fd, n.name, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, statxMask, &n.st); err != nil {
		return nil, err
	}
	if n.typ() == unix.S_IFDIR {
		if err := n.openDir(); err != nil {
			return nil, err
		}
		defer unix.Close(n.fd)
	}
	var r reader
	return r.change(d, &n)
}
