package image

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
)

// Limits on a tar that holds images.
const (
	maxMembers = 100_000
	maxHops    = 16 // symlinks to follow
)

// members is where a layout or archive has its files: a directory or a tar.
type members interface {
	// open gives a member's bytes and their number. They may be read until
	// Close. A member that is not there is an os.ErrNotExist.
	open(name string) (io.ReaderAt, int64, error)
	Close() error
}

// tarfile is an uncompressed tar whose members are read in place.
type tarfile struct {
	file  *os.File
	where map[string]member // by cleaned name
}

type member struct {
	off, size int64
	link      string // cleaned name of what it stands for, "" for a file
}

// openTar opens a tar and finds its members by their headers alone.
func openTar(file string) (*tarfile, error) {
	// A pipe would keep open waiting for its writer.
	if info, err := os.Stat(file); err == nil && !info.Mode().IsRegular() {
		return nil, malformed("%s is not a regular file", file)
	}
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	t, err := scanTar(f)
	if err != nil {
		f.Close()
		return nil, err
	}
	return t, nil
}

func scanTar(f *os.File) (*tarfile, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if kind, how := compression(f); kind != "" {
		return nil, malformed("is compressed with %s, which cannot be read in place: run %q first", kind, how)
	}
	where, err := scanMembers(f, info.Size())
	if err != nil {
		return nil, err
	}
	return &tarfile{file: f, where: where}, nil
}

func scanMembers(r io.ReadSeeker, size int64) (map[string]member, error) {
	where := map[string]member{}
	tr := tar.NewReader(r)
	for n := 0; ; n++ {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return where, nil
		}
		if err != nil {
			return nil, failf(ErrMalformed, err, "not a complete tar: %s", err)
		}
		if n >= maxMembers {
			return nil, malformed("tar with more than %d members", maxMembers)
		}
		name, err := inside(h.Name)
		if err != nil {
			return nil, err
		}
		switch h.Typeflag {
		case tar.TypeReg:
			for k := range h.PAXRecords {
				if strings.HasPrefix(k, "GNU.sparse.") {
					return nil, malformed("tar member %q is sparse", clip(h.Name))
				}
			}
			off, err := r.Seek(0, io.SeekCurrent)
			if err != nil {
				return nil, err
			}
			if h.Size < 0 || h.Size > size-off {
				return nil, malformed("tar ends in the middle of %q", clip(h.Name))
			}
			where[name] = member{off: off, size: h.Size}
		case tar.TypeSymlink, tar.TypeLink:
			to := h.Linkname
			if h.Typeflag == tar.TypeSymlink {
				if path.IsAbs(to) {
					return nil, malformed("tar member %q is a link out of the tar", clip(h.Name))
				}
				to = path.Dir(name) + "/" + to
			}
			if to, err = inside(to); err != nil {
				return nil, malformed("tar member %q is a link out of the tar", clip(h.Name))
			}
			where[name] = member{link: to}
		case tar.TypeDir, tar.TypeXGlobalHeader:
		default:
			return nil, malformed("tar member %q is of type %q", clip(h.Name), string(h.Typeflag))
		}
	}
}

// inside cleans a member's name and refuses one that leads out.
func inside(name string) (string, error) {
	c := path.Clean(name)
	if path.IsAbs(c) || c == ".." || strings.HasPrefix(c, "../") || strings.IndexByte(c, 0) >= 0 {
		return "", malformed("%q leads out of the archive", clip(name))
	}
	return c, nil
}

func (t *tarfile) open(name string) (io.ReaderAt, int64, error) {
	name, err := inside(name)
	if err != nil {
		return nil, 0, err
	}
	for range maxHops {
		m, ok := t.where[name]
		if !ok {
			return nil, 0, fmt.Errorf("%s: %w", clip(name), os.ErrNotExist)
		}
		if m.link == "" {
			return io.NewSectionReader(t.file, m.off, m.size), m.size, nil
		}
		name = m.link
	}
	return nil, 0, malformed("%q is a chain of too many links", clip(name))
}

func (t *tarfile) Close() error { return t.file.Close() }

// compression names what the bytes are compressed with, and the command that
// undoes it.
func compression(r io.ReaderAt) (kind, how string) {
	var head [6]byte
	n, _ := r.ReadAt(head[:], 0)
	switch b := head[:n]; {
	case bytes.HasPrefix(b, []byte{0x1f, 0x8b}):
		return "gzip", "gunzip"
	case bytes.HasPrefix(b, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		return "zstd", "unzstd"
	case bytes.HasPrefix(b, []byte("BZh")):
		return "bzip2", "bunzip2"
	case bytes.HasPrefix(b, []byte{0xfd, '7', 'z', 'X', 'Z', 0}):
		return "xz", "unxz"
	}
	return "", ""
}

// readMember reads a whole small member.
func readMember(ms members, name string, most int64) ([]byte, error) {
	r, size, err := ms.open(name)
	if err != nil {
		return nil, err
	}
	if size > most {
		return nil, malformed("%s has %d bytes, the limit is %d", clip(name), size, most)
	}
	b := make([]byte, size)
	if _, err := io.ReadFull(io.NewSectionReader(r, 0, size), b); err != nil {
		return nil, fmt.Errorf("read %s: %w", clip(name), err)
	}
	return b, nil
}
