package soci

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strings"
	"time"

	flatbuffers "github.com/google/flatbuffers/go"

	"github.com/varvefs/varve/index"
)

// ErrUnfit says that a layer has something for which a zTOC has no form: a
// sparse file, a global header, a time past the year 9999.
var ErrUnfit = errors.New("no zTOC can describe the layer")

// Source is what a zTOC is made of.
type Source struct {
	Tar          io.ReadSeeker // the decompressed layer; contents of files are skipped by seeking, so they may read as anything
	Compressed   int64         // bytes of the blob
	Uncompressed int64         // bytes of the tar
	Gzip         bool          // else the blob is the tar
	SpanSize     int64         // bytes of the tar; of a plain tar, a span has so many but for the last
	Points       []index.Point // one a span, with its digest; the states are the last bytes before Out, at most 32 KiB
	Tool         string        // what made it
}

// Write writes the zTOC of a layer, as SOCI's own builder describes it. The same
// source gives the same bytes.
func Write(w io.Writer, s Source) error {
	if err := s.check(); err != nil {
		return fmt.Errorf("write zTOC: %w", err)
	}
	fw := &writer{Builder: flatbuffers.NewBuilder(1 << 16)}
	toc, err := fw.entries(s.Tar, s.Uncompressed)
	if err != nil {
		return fmt.Errorf("write zTOC: %w", err)
	}
	info, err := fw.info(&s)
	if err != nil {
		return fmt.Errorf("write zTOC: %w", err)
	}
	v, tool := fw.CreateString(version), fw.CreateString(s.Tool)
	fw.StartObject(ztocFields)
	fw.PrependUOffsetTSlot(ztocVersion, v, 0)
	fw.PrependUOffsetTSlot(ztocTool, tool, 0)
	fw.PrependInt64Slot(ztocCompressed, s.Compressed, 0)
	fw.PrependInt64Slot(ztocUncompressed, s.Uncompressed, 0)
	fw.PrependUOffsetTSlot(ztocTOC, toc, 0)
	fw.PrependUOffsetTSlot(ztocInfo, info, 0)
	fw.Finish(fw.EndObject())
	if _, err := w.Write(fw.FinishedBytes()); err != nil {
		return fmt.Errorf("write zTOC: %w", err)
	}
	return nil
}

func (s *Source) check() error {
	sp := spans{kind: index.Deflate, blob: s.Compressed, size: s.Uncompressed, at: s.Points}
	if len(s.Points) == 0 || len(s.Points) > index.MaxPoints || s.SpanSize <= 0 {
		return fmt.Errorf("%d spans of %d bytes", len(s.Points), s.SpanSize)
	}
	if err := sp.check(); err != nil {
		return err
	}
	for i, p := range s.Points {
		if p.Digest == [sha256.Size]byte{} || len(p.State) > windowSize {
			return fmt.Errorf("point %d has a state of %d bytes and the digest %x", i, len(p.State), p.Digest)
		}
		if !s.Gzip && (p.In != int64(i)*s.SpanSize || p.Out != p.In || p.Bits != 0) {
			return fmt.Errorf("point %d of a tar lies at %d, with spans of %d bytes", i, p.In, s.SpanSize)
		}
	}
	if !s.Gzip && (s.Compressed != s.Uncompressed || int64(len(s.Points)) != (s.Compressed-1)/s.SpanSize+1) {
		return fmt.Errorf("%d spans of %d bytes of a tar of %d, blob of %d", len(s.Points), s.SpanSize, s.Uncompressed, s.Compressed)
	}
	return nil
}

// writer builds the flatbuffer, from its end to its start.
type writer struct{ *flatbuffers.Builder }

// fits refuses what [Read] would not read. n more bytes are to come.
func (w *writer) fits(n int64) error {
	if int64(w.Offset())+n > index.MaxTOCSize {
		return fmt.Errorf("%w: more than %d bytes", ErrUnfit, int64(index.MaxTOCSize))
	}
	return nil
}

func (w *writer) entries(r io.ReadSeeker, size int64) (flatbuffers.UOffsetT, error) {
	in := &counter{r: r}
	tr := tar.NewReader(in)
	var files []flatbuffers.UOffsetT
	for {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		// Whether a path is insecure is for [index.Clean] to say, when it is read.
		if err != nil && (h == nil || !errors.Is(err, tar.ErrInsecurePath)) {
			return 0, fmt.Errorf("tar after %d entries, at %d bytes: %w", len(files), in.at, err)
		}
		// archive/tar does not read ahead of a file's first byte.
		f, err := w.file(h, in.at)
		if err != nil {
			return 0, fmt.Errorf("%.80q: %w", h.Name, err)
		}
		files = append(files, f)
		if err := w.fits(4 * int64(len(files))); err != nil || len(files) > index.MaxEntries {
			return 0, fmt.Errorf("%w: %d entries", ErrUnfit, len(files))
		}
	}
	if in.at > size {
		return 0, fmt.Errorf("tar ends at %d bytes, not at %d", in.at, size)
	}
	metadata := w.CreateVectorOfTables(files)
	w.StartObject(tocFields)
	w.PrependUOffsetTSlot(tocMetadata, metadata, 0)
	return w.EndObject(), nil
}

// file writes the entry of a header whose contents begin at off. Fields that are
// empty are left out.
func (w *writer) file(h *tar.Header, off int64) (flatbuffers.UOffsetT, error) {
	typ, size := "", int64(0)
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeCont:
		typ, size = "reg", h.Size
	case tar.TypeDir:
		typ = "dir"
	case tar.TypeSymlink:
		typ = "symlink"
	case tar.TypeLink:
		typ = "hardlink"
	case tar.TypeChar:
		typ = "char"
	case tar.TypeBlock:
		typ = "block"
	case tar.TypeFifo:
		typ = "fifo"
	default:
		return 0, fmt.Errorf("%w: tar header type %q", ErrUnfit, h.Typeflag)
	}
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, sparse) {
			return 0, fmt.Errorf("%w: sparse", ErrUnfit)
		}
	}
	if h.Uid < 0 || int64(h.Uid) > math.MaxUint32 || h.Gid < 0 || int64(h.Gid) > math.MaxUint32 {
		return 0, fmt.Errorf("%w: owner %d:%d does not fit 32 bits", ErrUnfit, h.Uid, h.Gid)
	}
	when := h.ModTime.UTC()
	if y := when.Year(); y < 0 || y > 9999 {
		return 0, fmt.Errorf("%w: time %s", ErrUnfit, when)
	}
	mtime := w.CreateSharedString(when.Format(time.RFC3339Nano))
	kind := w.CreateSharedString(typ)
	uname, gname, link := w.shared(h.Uname), w.shared(h.Gname), w.shared(h.Linkname)
	pax := w.records(h.PAXRecords)
	name := w.CreateString(h.Name)
	w.StartObject(fileFields)
	w.PrependInt64Slot(fileOffset, off, 0)
	w.PrependInt64Slot(fileSize, size, 0)
	w.PrependInt64Slot(fileMode, h.Mode, 0)
	w.PrependInt64Slot(fileDevmajor, h.Devmajor, 0)
	w.PrependInt64Slot(fileDevminor, h.Devminor, 0)
	w.PrependUOffsetTSlot(fileName, name, 0)
	w.PrependUOffsetTSlot(fileType, kind, 0)
	w.PrependUOffsetTSlot(fileLink, link, 0)
	w.PrependUint32Slot(fileUID, uint32(h.Uid), 0)
	w.PrependUint32Slot(fileGID, uint32(h.Gid), 0)
	w.PrependUOffsetTSlot(fileUname, uname, 0)
	w.PrependUOffsetTSlot(fileGname, gname, 0)
	w.PrependUOffsetTSlot(fileModTime, mtime, 0)
	w.PrependUOffsetTSlot(filePAX, pax, 0)
	return w.EndObject(), nil
}

// shared writes a string that others may have as well, 0 for "".
func (w *writer) shared(s string) flatbuffers.UOffsetT {
	if s == "" {
		return 0
	}
	return w.CreateSharedString(s)
}

func (w *writer) records(m map[string]string) flatbuffers.UOffsetT {
	if len(m) == 0 {
		return 0
	}
	offs := make([]flatbuffers.UOffsetT, 0, len(m))
	for _, k := range slices.Sorted(maps.Keys(m)) {
		key, value := w.CreateSharedString(k), w.CreateSharedString(m[k])
		w.StartObject(paxFields)
		w.PrependUOffsetTSlot(paxKey, key, 0)
		w.PrependUOffsetTSlot(paxValue, value, 0)
		offs = append(offs, w.EndObject())
	}
	return w.CreateVectorOfTables(offs)
}

func (w *writer) info(s *Source) (flatbuffers.UOffsetT, error) {
	perSpan := int64(digestSize + 16)
	if s.Gzip {
		perSpan += checkpointSize
	}
	if err := w.fits(perSpan * int64(len(s.Points))); err != nil {
		return 0, err
	}
	digests := make([]flatbuffers.UOffsetT, len(s.Points))
	for i, p := range s.Points {
		digests[i] = w.CreateString(digestPrefix + hex.EncodeToString(p.Digest[:]))
	}
	list := w.CreateVectorOfTables(digests) // of strings: both are offsets
	algorithm := int8(algorithmGzip)
	var points flatbuffers.UOffsetT
	if s.Gzip {
		points = w.checkpoints(s)
	} else {
		algorithm = algorithmUncompressed
		points = w.CreateByteVector(tarinfo(s))
	}
	w.StartObject(infoFields)
	w.PrependInt8Slot(infoAlgorithm, algorithm, algorithmGzip)
	w.PrependInt32Slot(infoMaxSpan, int32(len(s.Points)-1), 0)
	w.PrependUOffsetTSlot(infoDigests, list, 0)
	w.PrependUOffsetTSlot(infoCheckpoints, points, 0)
	return w.EndObject(), nil
}

// checkpoints writes the points in the second layout, in place: they take many
// times what all else does.
func (w *writer) checkpoints(s *Source) flatbuffers.UOffsetT {
	n := checkpointHeader + len(s.Points)*checkpointSize
	w.StartVector(1, n, 1)
	w.Pad(n)
	b := w.Bytes[w.Head():][:n]
	le := binary.LittleEndian
	le.PutUint32(b, uint32(len(s.Points)))
	le.PutUint64(b[4:], uint64(s.SpanSize))
	for i, p := range s.Points {
		r := b[checkpointHeader+i*checkpointSize:][:checkpointSize]
		le.PutUint64(r, uint64(p.In))
		le.PutUint64(r[8:], uint64(p.Out))
		r[16] = p.Bits
		copy(r[checkpointSize-len(p.State):], p.State)
	}
	return w.EndVector(n)
}

// tarinfo is what a plain tar has in place of points.
func tarinfo(s *Source) []byte {
	b := flatbuffers.NewBuilder(64)
	b.StartObject(tarinfoFields)
	b.PrependInt32Slot(tarinfoVersion, tarinfoCurrent, 0)
	b.PrependInt64Slot(tarinfoSpanSize, s.SpanSize, 0)
	b.PrependInt64Slot(tarinfoSize, s.Compressed, 0)
	b.Finish(b.EndObject())
	return b.FinishedBytes()
}

// counter knows how far a tar has been read. archive/tar seeks over contents
// where it can.
type counter struct {
	r  io.ReadSeeker
	at int64 // from where it began
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.at += int64(n)
	return n, err
}

func (c *counter) Seek(offset int64, whence int) (int64, error) {
	from, err := c.r.Seek(0, io.SeekCurrent)
	if err != nil || whence == io.SeekCurrent && offset == 0 {
		return from, err
	}
	to, err := c.r.Seek(offset, whence)
	if err == nil {
		c.at += to - from
	}
	return to, err
}
