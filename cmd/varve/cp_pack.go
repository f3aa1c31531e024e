package main

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"
)

// packer writes a local file or directory as a tar.
type packer struct {
	source
	root    *os.Root // the directory, or that of the file
	from    string   // in root
	archive bool
	warn    func(string)
	bytes   int64 // of regular files, so far

	tw       *tar.Writer
	links    map[inode]string // the name of a file that has several
	avoiding []inode          // directories that the copy is written to
}

type inode struct{ dev, ino uint64 }

// newPacker looks at what is to be copied. The caller closes the root.
func newPacker(p string, follow bool) (*packer, error) {
	stat := os.Lstat // follows a symlink that a slash stands behind
	if follow {
		stat = os.Stat
	}
	st, err := stat(p)
	if err != nil {
		return nil, notFoundIf(err)
	}
	clean := filepath.Clean(p)
	k := &packer{
		source: source{dir: st.IsDir(), contents: specifiesSelf(p) || clean == "/", name: filepath.Base(clean)},
		from:   ".", links: map[inode]string{},
	}
	if !k.dir {
		if follow {
			if clean, err = filepath.EvalSymlinks(clean); err != nil {
				return nil, notFoundIf(err)
			}
		}
		p, k.from = filepath.Split(clean)
	}
	k.root, err = os.OpenRoot(p)
	return k, notFoundIf(err)
}

// avoid makes it an error to come by the directory that the copy is written to,
// or the root that is in: it would never end.
func (k *packer) avoid(root int, dir string) error {
	fd, err := openIn(root, dir, unix.O_PATH|unix.O_DIRECTORY, inRoot)
	if err != nil {
		return &os.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(fd)
	for _, fd := range []int{root, fd} {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return &os.PathError{Op: "stat", Path: dir, Err: err}
		}
		k.avoiding = append(k.avoiding, inode{st.Dev, st.Ino})
	}
	return nil
}

// pack writes the tar. The source has the given name in it; without one, what
// lies in the source is at the tar's root.
func (k *packer) pack(ctx context.Context, w io.Writer, name string) error {
	buf := bufio.NewWriterSize(w, 1<<18)
	k.tw = tar.NewWriter(buf)
	if err := k.add(ctx, k.from, name); err != nil {
		return err
	}
	return errors.Join(k.tw.Close(), buf.Flush())
}

func (k *packer) add(ctx context.Context, at, name string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	fi, err := k.root.Lstat(at)
	if err != nil {
		return err
	}
	st := fi.Sys().(*syscall.Stat_t)
	id := inode{st.Dev, st.Ino}
	h := &tar.Header{
		Format: tar.FormatPAX, Name: name, Mode: int64(st.Mode & 0o7777), ModTime: fi.ModTime(),
		Uid: int(st.Uid), Gid: int(st.Gid),
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		if slices.Contains(k.avoiding, id) {
			return fmt.Errorf("%s: cannot copy a directory into itself", filepath.Join(k.root.Name(), at))
		}
		return k.addDir(ctx, h, fi, at)
	case unix.S_IFREG:
		if st.Nlink > 1 {
			if first, ok := k.links[id]; ok {
				h.Typeflag, h.Linkname = tar.TypeLink, first
				return k.tw.WriteHeader(h)
			}
			k.links[id] = name
		}
		return k.addFile(h, fi, at)
	case unix.S_IFLNK:
		h.Typeflag = tar.TypeSymlink
		if h.Linkname, err = k.root.Readlink(at); err != nil {
			return err
		}
	case unix.S_IFIFO:
		h.Typeflag = tar.TypeFifo
	case unix.S_IFCHR, unix.S_IFBLK:
		h.Typeflag = tar.TypeChar
		if st.Mode&unix.S_IFMT == unix.S_IFBLK {
			h.Typeflag = tar.TypeBlock
		}
		h.Devmajor, h.Devminor = int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
	default: // of no use without who listens at it
		k.warn("skipped the socket " + filepath.Join(k.root.Name(), at))
		return nil
	}
	return k.tw.WriteHeader(h)
}

// open opens what was looked at, unless it was exchanged since.
func (k *packer) open(fi os.FileInfo, at string) (*os.File, error) {
	f, err := k.root.OpenFile(at, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	now, err := f.Stat()
	if err == nil && !os.SameFile(fi, now) {
		err = fmt.Errorf("%s was replaced while it was copied", f.Name())
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func (k *packer) addDir(ctx context.Context, h *tar.Header, fi os.FileInfo, at string) error {
	f, err := k.open(fi, at)
	if err != nil {
		return err
	}
	defer f.Close()
	if h.Name != "" {
		h.Typeflag, h.Name = tar.TypeDir, h.Name+"/"
		if err := k.xattrs(h, f); err != nil {
			return err
		}
		if err := k.tw.WriteHeader(h); err != nil {
			return err
		}
	}
	names, err := f.Readdirnames(-1)
	if err != nil {
		return err
	}
	slices.Sort(names)
	for _, name := range names {
		if err := k.add(ctx, filepath.Join(at, name), h.Name+name); err != nil {
			return err
		}
	}
	return nil
}

func (k *packer) addFile(h *tar.Header, fi os.FileInfo, at string) error {
	f, err := k.open(fi, at)
	if err != nil {
		return err
	}
	defer f.Close()
	h.Typeflag, h.Size = tar.TypeReg, fi.Size()
	if err := k.xattrs(h, f); err != nil {
		return err
	}
	if err := k.tw.WriteHeader(h); err != nil {
		return err
	}
	n, err := io.Copy(k.tw, io.LimitReader(f, h.Size))
	k.bytes += n
	if err == nil && n < h.Size {
		err = fmt.Errorf("%s became shorter while it was copied", f.Name())
	}
	return err
}

// xattrPrefix is how PAX headers name extended attributes.
const xattrPrefix = "SCHILY.xattr."

// carried says whether a copy has an extended attribute: a user's own always,
// those that give rights where rights are copied.
func carried(attr string, capabilities, acls bool) bool {
	switch attr {
	case "security.capability":
		return capabilities
	case "system.posix_acl_access", "system.posix_acl_default":
		return acls
	}
	return strings.HasPrefix(attr, "user.")
}

func (k *packer) xattrs(h *tar.Header, f *os.File) error {
	fd := int(f.Fd())
	names := make([]byte, 1<<16) // XATTR_LIST_MAX
	n, err := unix.Flistxattr(fd, names)
	if n == 0 || errors.Is(err, unix.ENOTSUP) {
		return nil
	}
	if err != nil {
		return &os.PathError{Op: "listxattr", Path: f.Name(), Err: err}
	}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(names[:n]), "\x00"), "\x00") {
		if !carried(name, true, k.archive) {
			continue
		}
		value := make([]byte, 1<<16) // XATTR_SIZE_MAX
		n, err := unix.Fgetxattr(fd, name, value)
		if errors.Is(err, unix.ENODATA) {
			continue // removed since
		}
		if err != nil {
			return &os.PathError{Op: "getxattr", Path: f.Name(), Err: err}
		}
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords[xattrPrefix+name] = string(value[:n])
	}
	return nil
}

// renamer gives what makes the names of the tar of a path into those of its
// copy: the last name of the path becomes another, or goes away. The tar of the
// root is of what lies in it.
func renamer(from, to string) func(string) (string, error) {
	base := filepath.Base(from)
	return func(name string) (string, error) {
		name, err := cleanName(name)
		if err != nil {
			return "", err
		}
		if base == "/" {
			return filepath.Join(to, name), nil
		}
		rest, ok := strings.CutPrefix(name, base)
		if !ok || rest != "" && rest[0] != '/' {
			return "", fmt.Errorf("the tar of %s has the name %q", from, name)
		}
		return filepath.Join(to, strings.TrimPrefix(rest, "/")), nil
	}
}

// cleanName makes a name of a tar relative. Those that lead up and out are
// refused.
func cleanName(name string) (string, error) {
	clean := filepath.Clean(strings.TrimLeft(name, "/"))
	if !filepath.IsLocal(clean) {
		return "", fmt.Errorf("the tar has the name %q, which leads out of where it is unpacked", name)
	}
	return clean, nil
}

// rebase copies a tar with other names.
func rebase(w io.Writer, r io.Reader, rename func(string) (string, error)) error {
	r = bufio.NewReaderSize(r, 1<<18)
	buf := bufio.NewWriterSize(w, 1<<18)
	tr, tw := tar.NewReader(r), tar.NewWriter(buf)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		h.Format = tar.FormatPAX // whatever it was: the new name may be longer
		if h.Name, err = rename(h.Name); err != nil {
			return err
		}
		if h.Typeflag == tar.TypeDir {
			h.Name += "/"
		}
		if h.Typeflag == tar.TypeLink {
			if h.Linkname, err = rename(h.Linkname); err != nil {
				return err
			}
		}
		if err := tw.WriteHeader(h); err != nil {
			return err
		}
		if _, err := io.Copy(tw, tr); err != nil {
			return err
		}
	}
	// What went wrong at the other end may come only after the tar's own end.
	if _, err := io.Copy(io.Discard, r); err != nil {
		return err
	}
	return errors.Join(tw.Close(), buf.Flush())
}

// decompress gives the tar in what may be a compressed one, as docker takes it.
func decompress(r io.Reader) (io.Reader, error) {
	buf := bufio.NewReaderSize(r, 1<<18)
	head, err := buf.Peek(6)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(head, []byte("\x1f\x8b")):
		return gzip.NewReader(buf)
	case bytes.HasPrefix(head, []byte("BZh")):
		return bzip2.NewReader(buf), nil
	case bytes.HasPrefix(head, []byte("\x28\xb5\x2f\xfd")):
		// With one goroutine it works in the reader's own, and needs no closing.
		return zstd.NewReader(buf, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(128<<20))
	case bytes.HasPrefix(head, []byte("\xfd7zXZ\x00")):
		return nil, errors.New("standard input is compressed with xz: decompress it first (xz -dc)")
	}
	return buf, nil
}
