package forms

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const xattrRecord = "SCHILY.xattr."

// Pack writes the tree at root as a PAX tar: sorted by name, all types but
// sockets, extended attributes, hard links by inode, times to the nanosecond,
// owners by number. The same tree gives the same bytes. It stays on the file
// system of root: a mount point inside is packed as an empty directory.
func Pack(ctx context.Context, root string, w io.Writer) error {
	top, err := os.Stat(root)
	if err != nil {
		return fmt.Errorf("pack %s: %w", root, err)
	}
	p := &packer{
		root:  root,
		dev:   top.Sys().(*syscall.Stat_t).Dev,
		tar:   tar.NewWriter(w),
		links: map[uint64]string{},
		buf:   make([]byte, 1<<20),
	}
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return err
		}
		return p.add(path)
	})
	if err == nil {
		err = p.tar.Close()
	}
	if err != nil {
		return fmt.Errorf("pack %s: %w", root, err)
	}
	return nil
}

type packer struct {
	root  string
	dev   uint64
	tar   *tar.Writer
	links map[uint64]string // inode to the name it was packed under
	buf   []byte
}

func (p *packer) add(path string) error {
	name, err := filepath.Rel(p.root, path)
	if err != nil {
		return err
	}
	follow := name == "." // root itself may be named by a symbolic link
	var info fs.FileInfo
	if follow {
		info, err = os.Stat(path)
	} else {
		info, err = os.Lstat(path)
	}
	if err != nil {
		return err
	}
	if info.Mode()&fs.ModeSocket != 0 {
		return nil // tar has no form for it
	}
	h, err := p.header(path, name, info)
	if err != nil {
		return err
	}
	if err := p.tar.WriteHeader(h); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if h.Typeflag == tar.TypeReg && h.Size > 0 {
		if err := p.content(path, h.Size); err != nil {
			return err
		}
	}
	if info.IsDir() && info.Sys().(*syscall.Stat_t).Dev != p.dev {
		return fs.SkipDir
	}
	return nil
}

func (p *packer) header(path, name string, info fs.FileInfo) (*tar.Header, error) {
	st := info.Sys().(*syscall.Stat_t)
	target := ""
	if info.Mode()&fs.ModeSymlink != 0 {
		var err error
		if target, err = os.Readlink(path); err != nil {
			return nil, err
		}
	}
	h, err := tar.FileInfoHeader(info, target)
	if err != nil {
		return nil, err
	}
	h.Name = name
	if info.IsDir() {
		h.Name = name + "/"
	}
	h.Format = tar.FormatPAX
	h.Uname, h.Gname = "", ""
	h.AccessTime, h.ChangeTime = time.Time{}, time.Time{}
	if !info.IsDir() && st.Nlink > 1 {
		if first, ok := p.links[st.Ino]; ok {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
			return h, nil
		}
		p.links[st.Ino] = name
	}
	h.PAXRecords, err = xattrs(path, name == ".")
	return h, err
}

func (p *packer) content(path string, size int64) error {
	// A named pipe put in the file's place must not hang us.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	n, err := io.CopyBuffer(struct{ io.Writer }{p.tar}, io.LimitReader(f, size), p.buf)
	if err == nil && n < size {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// xattrs reads the extended attributes of path as PAX records, nil for none.
func xattrs(path string, follow bool) (map[string]string, error) {
	list, get := unix.Llistxattr, unix.Lgetxattr
	if follow {
		list, get = unix.Listxattr, unix.Getxattr
	}
	names, err := grow(func(b []byte) (int, error) { return list(path, b) })
	if errors.Is(err, unix.ENOTSUP) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list xattrs of %s: %w", path, err)
	}
	var records map[string]string
	for name := range strings.SplitSeq(strings.TrimSuffix(string(names), "\x00"), "\x00") {
		if name == "" {
			continue
		}
		value, err := grow(func(b []byte) (int, error) { return get(path, name, b) })
		if err != nil {
			return nil, fmt.Errorf("get xattr %s of %s: %w", name, path, err)
		}
		if records == nil {
			records = map[string]string{}
		}
		records[xattrRecord+name] = string(value)
	}
	return records, nil
}

// grow asks with larger buffers until the answer fits.
func grow(ask func([]byte) (int, error)) ([]byte, error) {
	for size := 1 << 10; ; size *= 4 {
		b := make([]byte, size)
		n, err := ask(b)
		if errors.Is(err, unix.ERANGE) && size < 1<<20 {
			continue
		}
		if err != nil {
			return nil, err
		}
		return b[:n], nil
	}
}
