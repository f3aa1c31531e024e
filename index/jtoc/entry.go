package jtoc

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"math"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/index"
)

// entry is one element of "entries" as both formats write it: estargz.TOCEntry
// and containers/storage's minimal.FileMetadata. Names of users, access and
// change times are left where they are.
type entry struct {
	Type        string            `json:"type"`
	Name        string            `json:"name"`
	LinkName    string            `json:"linkName"`
	Mode        int64             `json:"mode"` // tar.Header.Mode in both: POSIX bits, setuid is 04000
	Size        int64             `json:"size"`
	UID         int64             `json:"uid"`
	GID         int64             `json:"gid"`
	ModTime     string            `json:"modtime"`
	DevMajor    int64             `json:"devMajor"`
	DevMinor    int64             `json:"devMinor"`
	Xattrs      map[string][]byte `json:"xattrs"`
	Digest      string            `json:"digest"`
	Offset      int64             `json:"offset"`
	InnerOffset int64             `json:"innerOffset"`
	EndOffset   int64             `json:"endOffset"`
	ChunkOffset int64             `json:"chunkOffset"`
	ChunkSize   int64             `json:"chunkSize"`
	ChunkDigest string            `json:"chunkDigest"`
	ChunkType   string            `json:"chunkType"`

	lastTime string // of the entry before, which most share: see [plain]
}

func (e *entry) reset() {
	x := e.Xattrs
	clear(x)
	*e = entry{Xattrs: x, lastTime: e.lastTime}
}

// converter turns entries into those of a builder. A regular file is held back
// until the chunks that follow it are known.
type converter struct {
	b *index.Builder
	o Options

	name    string // of the last entry that was not a chunk, as the TOC has it
	open    bool   // a regular file is held back in file and chunks
	skipped bool   // chunks belong to an entry that was skipped
	file    index.Entry
	digest  string // of the whole file
	end     int64  // endOffset of the whole file
	chunks  []index.Chunk
	proof   []string // the chunks' digests, "" where the TOC has none
	total   int      // chunks of all files
}

func (c *converter) take(e *entry) error {
	if e.Type == "chunk" {
		return c.chunk(e)
	}
	if err := c.finish(); err != nil {
		return err
	}
	c.name, c.skipped = e.Name, false
	out, err := convert(e)
	if err != nil {
		return err
	}
	if c.o.Skip != nil && c.o.Skip(out.Name, e.Offset) {
		c.skipped = true
		return nil
	}
	if !out.IsRegular() || out.Size == 0 {
		return c.b.Add(out)
	}
	c.open, c.file, c.digest, c.end = true, out, e.Digest, e.EndOffset
	return c.add(e)
}

// chunk takes a further chunk of the file before it.
func (c *converter) chunk(e *entry) error {
	if c.skipped {
		return nil
	}
	if !c.open {
		return fmt.Errorf("%w: %.80q: chunk of no file", index.ErrMalformed, e.Name)
	}
	if e.Name != "" && e.Name != c.name {
		return fmt.Errorf("%w: chunk of %.80q follows %.80q", index.ErrMalformed, e.Name, c.name)
	}
	return c.add(e)
}

// add checks the place of one chunk. That chunks follow each other in the file
// is checked by the builder.
func (c *converter) add(e *entry) error {
	if c.total++; c.total > maxChunks {
		return fmt.Errorf("%w: more than %d chunks in one layer", index.ErrMalformed, maxChunks)
	}
	k := index.Chunk{
		File: e.ChunkOffset, Size: e.ChunkSize,
		Blob: e.Offset, End: e.EndOffset, Inner: e.InnerOffset,
	}
	if k.Size == 0 && k.File >= 0 && k.File < c.file.Size { // to the end of the file
		k.Size = c.file.Size - k.File
	}
	switch e.ChunkType {
	case "":
	case "zeros":
		k.Hole = true
	default:
		return fmt.Errorf("%w: %.80q: chunk of unknown type %.80q", index.ErrMalformed, c.name, e.ChunkType)
	}
	if k.Blob < 0 || k.Blob >= c.o.DataEnd && !k.Hole || k.End < 0 || k.End > c.o.DataEnd || k.Inner < 0 {
		return fmt.Errorf("%w: %.80q: chunk at %d lies at %d to %d of the blob, whose data ends at %d",
			index.ErrMalformed, c.name, k.File, k.Blob, k.End, c.o.DataEnd)
	}
	c.chunks = append(c.chunks, k)
	c.proof = append(c.proof, e.ChunkDigest)
	return nil
}

// finish hands the file held back to the builder.
func (c *converter) finish() error {
	if !c.open {
		return nil
	}
	c.open = false
	defer func() { c.chunks, c.proof = c.chunks[:0], c.proof[:0] }()
	for i := range c.chunks {
		k := &c.chunks[i]
		if k.Hole {
			continue
		}
		d := c.proof[i]
		if d == "" && len(c.chunks) == 1 {
			d = c.digest
		}
		if d == "" {
			return fmt.Errorf("%w: %.80q: chunk at %d has no digest", index.ErrMalformed, c.name, k.File)
		}
		var err error
		if k.Digest, err = parseDigest(d); err != nil {
			return fmt.Errorf("%.80q: %w", c.name, err)
		}
	}
	if err := c.ends(); err != nil {
		return err
	}
	return c.b.AddFile(c.file, c.chunks)
}

// ends sets where each chunk's frame ends, where the TOC tells. containers/storage
// writes endOffset on the entry of the file only, where it is the end of the
// file's last chunk; each chunk is a frame and the next begins where it ends
// (compressor.go, writeZstdChunkedStream). Runs of zeroes are frames like others.
func (c *converter) ends() error {
	if c.end == 0 {
		return nil
	}
	for i := range c.chunks {
		k := &c.chunks[i]
		if i == 0 || k.End == 0 {
			k.End = c.end
		}
		if i+1 < len(c.chunks) {
			next := c.chunks[i+1].Blob
			if next < k.Blob {
				return fmt.Errorf("%w: %.80q: chunk at %d of the blob follows one at %d", index.ErrMalformed, c.name, next, k.Blob)
			}
			if next > k.Blob {
				k.End = min(k.End, next)
			}
		}
		if k.End <= k.Blob && !k.Hole {
			return fmt.Errorf("%w: %.80q: chunk at %d of the blob ends at %d", index.ErrMalformed, c.name, k.Blob, k.End)
		}
	}
	return nil
}

// convert turns the metadata of an entry that is not a chunk.
func convert(e *entry) (index.Entry, error) {
	var out index.Entry
	fail := func(format string, args ...any) (index.Entry, error) {
		return out, fmt.Errorf("%w: %.80q: %s", index.ErrMalformed, e.Name, fmt.Sprintf(format, args...))
	}
	name, err := index.Clean(e.Name)
	if err != nil {
		return out, err
	}
	out.Name = name
	if e.UID < 0 || e.UID > math.MaxUint32 || e.GID < 0 || e.GID > math.MaxUint32 {
		return fail("owner %d:%d does not fit 32 bits", e.UID, e.GID)
	}
	out.UID, out.GID = uint32(e.UID), uint32(e.GID)
	if e.ModTime != "" {
		t, err := time.Parse(time.RFC3339, e.ModTime)
		if err != nil {
			return fail("modification time %.80q", e.ModTime)
		}
		if !t.IsZero() { // older containers/storage writes year 1 for none
			out.Mtime, out.MtimeNs = t.Unix(), uint32(t.Nanosecond())
		}
	}
	if len(e.Xattrs) > 0 {
		m := make(map[string]string, len(e.Xattrs))
		for k, v := range e.Xattrs {
			m[k] = string(v)
		}
		if out.Xattrs, err = index.SortXattrs(m); err != nil {
			return out, fmt.Errorf("%.80q: %w", e.Name, err)
		}
	}
	out.Mode = uint32(e.Mode) & 0o7777
	switch e.Type {
	case "dir":
		out.Mode |= unix.S_IFDIR
	case "reg":
		out.Mode |= unix.S_IFREG
		out.Size = e.Size
		if e.Size < 0 || e.Size > index.MaxFileSize {
			return fail("size of %d bytes", e.Size)
		}
	case "symlink":
		out.Mode |= unix.S_IFLNK
		out.Link = e.LinkName
	case "hardlink":
		out.Mode, out.HardLink = 0, true
		if out.Link, err = index.Clean(e.LinkName); err != nil {
			return out, fmt.Errorf("%.80q: hard link: %w", e.Name, err)
		}
	case "char":
		out.Mode |= unix.S_IFCHR
	case "block":
		out.Mode |= unix.S_IFBLK
	case "fifo":
		out.Mode |= unix.S_IFIFO
	default:
		return fail("unknown type %.80q", e.Type)
	}
	if e.Type == "char" || e.Type == "block" {
		if out.Rdev, err = index.Mkdev(e.DevMajor, e.DevMinor); err != nil {
			return out, fmt.Errorf("%.80q: %w", e.Name, err)
		}
	}
	return out, nil
}

// parseDigest reads "sha256:" and 64 hexadecimal digits.
func parseDigest(s string) (sum [sha256.Size]byte, err error) {
	h, ok := strings.CutPrefix(s, "sha256:")
	if !ok || len(h) != 2*sha256.Size {
		return sum, fmt.Errorf("%w: digest %.80q is no sha256", index.ErrMalformed, s)
	}
	if _, err := hex.Decode(sum[:], []byte(h)); err != nil {
		return sum, fmt.Errorf("%w: digest %.80q is no sha256", index.ErrMalformed, s)
	}
	return sum, nil
}
