package soci

import (
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/index"
)

const (
	tarBlock  = 512 // bytes to which everything in a tar is padded
	entrySize = 24  // bytes that an entry takes in a zTOC, at the least
)

// reader gathers the entries of a zTOC. Strings and tables of a flatbuffer may
// lie over one another, so that a small buffer could claim to hold very much:
// what is looked at is counted.
type reader struct {
	b       *index.Builder
	size    int64    // bytes of the tar
	end     int64    // of the tar so far
	files   []extent // contents of regular files, in the order of the tar
	bytes   int64    // of names, link targets and PAX records that may still be read
	records int      // PAX records that may still be read

	lastTime string // what the entry before had as its time
	seconds  int64
	nanos    uint32
}

// extent is where the contents of a file lie.
type extent struct {
	tar  int64 // offset in the tar
	size int64 // bytes
	data int64 // offset in the data file
}

func (r *reader) entries(toc table) error {
	list := toc.vector(tocMetadata)
	if list.n > index.MaxEntries {
		return fmt.Errorf("%w: %d entries in one layer, the limit is %d", index.ErrMalformed, list.n, index.MaxEntries)
	}
	if list.n*entrySize > len(toc.Bytes) {
		return fmt.Errorf("%w: %d entries in %d bytes", index.ErrMalformed, list.n, len(toc.Bytes))
	}
	r.files = make([]extent, 0, list.n)
	r.b.Grow(list.n, 0)
	for i := range list.n {
		t := list.table(i)
		e, err := r.entry(&t)
		if err != nil {
			return fmt.Errorf("entry %d: %w", i, err)
		}
		if err := r.contents(&t, &e); err != nil {
			return fmt.Errorf("entry %d: %.80q: %w", i, e.Name, err)
		}
		if err := r.b.Add(e); err != nil {
			return fmt.Errorf("entry %d: %w", i, err)
		}
	}
	return nil
}

// entry gives what a tar's header with these fields would.
func (r *reader) entry(t *table) (index.Entry, error) {
	var e index.Entry
	name, err := r.text(t, fileName)
	if err != nil {
		return e, err
	}
	if name, err = index.Clean(name); err != nil {
		return e, err
	}
	e.Name = strings.Clone(name)
	e.UID, e.GID = t.uint32(fileUID), t.uint32(fileGID)
	if e.Mtime, e.MtimeNs, err = r.time(t.text(fileModTime)); err != nil {
		return e, fmt.Errorf("%.80q: %w", e.Name, err)
	}
	e.Mode = uint32(t.int64(fileMode)) & 0o7777
	if list := t.vector(filePAX); list.n > 0 {
		if e.Xattrs, err = r.xattrs(&list); err != nil {
			return e, fmt.Errorf("%.80q: %w", e.Name, err)
		}
	}
	switch typ := t.text(fileType); typ {
	case "reg":
		e.Mode |= unix.S_IFREG
		e.Size = t.int64(fileSize)
	case "dir":
		e.Mode |= unix.S_IFDIR
	case "symlink", "hardlink":
		link, err := r.text(t, fileLink)
		if err != nil {
			return e, err
		}
		if typ == "hardlink" {
			e.Mode, e.HardLink = 0, true
			if link, err = index.Clean(link); err != nil {
				return e, fmt.Errorf("%.80q: hard link: %w", e.Name, err)
			}
		} else {
			e.Mode |= unix.S_IFLNK
			if len(link) > index.MaxLink {
				return e, fmt.Errorf("%w: symlink %.80q has a target of %d bytes", index.ErrMalformed, e.Name, len(link))
			}
		}
		e.Link = strings.Clone(link)
	case "char":
		e.Mode |= unix.S_IFCHR
	case "block":
		e.Mode |= unix.S_IFBLK
	case "fifo":
		e.Mode |= unix.S_IFIFO
	default:
		return e, fmt.Errorf("%w: %.80q: type %.20q", index.ErrMalformed, e.Name, typ)
	}
	if typ := e.Type(); typ == unix.S_IFCHR || typ == unix.S_IFBLK {
		if e.Rdev, err = index.Mkdev(t.int64(fileDevmajor), t.int64(fileDevminor)); err != nil {
			return e, fmt.Errorf("%.80q: %w", e.Name, err)
		}
	}
	return e, nil
}

// contents gives the contents of an entry their place in the data file. Every
// entry has a header before its contents, and they come in the order of the tar.
func (r *reader) contents(t *table, e *index.Entry) error {
	off := t.int64(fileOffset)
	if off < r.end+tarBlock || off > r.size {
		return fmt.Errorf("%w: contents at %d of a tar of %d bytes, with no room for a header after %d", index.ErrMalformed, off, r.size, r.end)
	}
	if !e.IsRegular() { // some tars give hard links the size of their target
		r.end = blocks(off)
		return nil
	}
	if e.Size < 0 || e.Size > r.size-off {
		return fmt.Errorf("%w: %d bytes at %d of a tar of %d", index.ErrMalformed, e.Size, off, r.size)
	}
	r.end = blocks(off + e.Size)
	if e.Size == 0 {
		return nil
	}
	var err error
	if e.Data, err = r.b.Reserve(e.Size); err != nil {
		return err
	}
	r.files = append(r.files, extent{off, e.Size, e.Data})
	return nil
}

func blocks(n int64) int64 { return (n + tarBlock - 1) / tarBlock * tarBlock }

// text reads a string that counts.
func (r *reader) text(t *table, field int) (string, error) {
	s := t.text(field)
	if r.bytes -= int64(len(s)); r.bytes < 0 {
		return "", fmt.Errorf("%w: more than %d bytes of names and PAX records", index.ErrMalformed, 2*index.MaxMeta)
	}
	return s, nil
}

// time parses a time of modification; most often it is that of the entry before.
// SOCI leaves it empty where the year has more than four digits.
func (r *reader) time(s string) (seconds int64, nanos uint32, err error) {
	if s != r.lastTime || s == "" {
		if len(s) > 64 {
			return 0, 0, fmt.Errorf("%w: time of %d bytes", index.ErrMalformed, len(s))
		}
		t, err := time.Parse(time.RFC3339Nano, s)
		if err != nil {
			return 0, 0, fmt.Errorf("%w: time %q", index.ErrMalformed, s)
		}
		r.lastTime, r.seconds, r.nanos = s, t.Unix(), uint32(t.Nanosecond())
	}
	return r.seconds, r.nanos, nil
}

const (
	sparse     = "GNU.sparse."
	maxRecords = 4 * index.MaxXattrs // bytes of an entry's PAX records that are extended attributes, encoded
)

// xattrs reads the extended attributes among an entry's PAX records.
func (r *reader) xattrs(list *vector) ([]index.Xattr, error) {
	if r.records -= list.n; r.records < 0 {
		return nil, fmt.Errorf("%w: more PAX records than there is room for", index.ErrMalformed)
	}
	var records map[string]string // aliases of the zTOC
	total := 0
	for i := range list.n {
		t := list.table(i)
		k, err := r.text(&t, paxKey)
		if err != nil {
			return nil, err
		}
		if strings.HasPrefix(k, sparse) {
			return nil, fmt.Errorf("%w: sparse, which no zTOC can say", index.ErrMalformed)
		}
		if !index.IsPAXXattr(k) {
			continue
		}
		v, err := r.text(&t, paxValue)
		if err != nil {
			return nil, err
		}
		if total += len(k) + len(v); total > maxRecords {
			return nil, fmt.Errorf("%w: more than %d bytes of extended attributes", index.ErrMalformed, maxRecords)
		}
		if records == nil {
			records = map[string]string{}
		}
		records[k] = v
	}
	return index.PAXXattrs(records)
}
