package commit

import (
	"archive/tar"
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"hash"
	"hash/crc64"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"
	digest "github.com/opencontainers/go-digest"
	"github.com/vbatts/tar-split/tar/storage"
)

// chunkedForm is that of containers/storage: each chunk of a file is a frame of
// its own, cut where its content says so.
var chunkedForm = form{frame: mib, chunk: maxChunk, roll: true, codec: newZstd}

// containers/storage, pkg/chunked/internal/minimal/compression.go. Podman trusts
// the parts of a layer when it can make the tar of them again, which takes the
// tar-split.
const (
	chunkedPrefix   = "io.github.containers.zstd-chunked."
	chunkedChecksum = chunkedPrefix + "manifest-checksum" // of the compressed bytes
	chunkedPosition = chunkedPrefix + "manifest-position"
	chunkedTarSplit = chunkedPrefix + "tarsplit-position"

	skippableMagic  = 0x184d2a50
	skippableHeader = 8
	chunkedMagic    = "GNUlInUx"
	chunkedType     = 1
	maxChunkedTOC   = 150 * mib // storage_linux.go refuses more
)

// chunkedEntry is minimal.FileMetadata.
type chunkedEntry struct {
	Type        string            `json:"type"`
	Name        string            `json:"name"`
	Linkname    string            `json:"linkName,omitempty"`
	Mode        int64             `json:"mode,omitempty"`
	Size        int64             `json:"size,omitempty"`
	UID         int               `json:"uid,omitempty"`
	GID         int               `json:"gid,omitempty"`
	ModTime     *time.Time        `json:"modtime,omitempty"`
	AccessTime  *time.Time        `json:"accesstime,omitempty"`
	ChangeTime  *time.Time        `json:"changetime,omitempty"`
	Devmajor    int64             `json:"devMajor,omitempty"`
	Devminor    int64             `json:"devMinor,omitempty"`
	Xattrs      map[string]string `json:"xattrs,omitempty"` // values in base64
	Digest      string            `json:"digest,omitempty"`
	Offset      int64             `json:"offset,omitempty"`
	EndOffset   int64             `json:"endOffset,omitempty"`
	ChunkSize   int64             `json:"chunkSize,omitempty"`
	ChunkOffset int64             `json:"chunkOffset,omitempty"`
	ChunkDigest string            `json:"chunkDigest,omitempty"`
	ChunkType   string            `json:"chunkType,omitempty"` // "zeros" for a hole
}

// chunked gathers the table of contents of zstd:chunked.
type chunked struct {
	list  jsonList
	split *tarSplit
}

func newChunked(split *tarSplit) *chunked {
	return &chunked{list: newJSONList(`{"version":1,"entries":[`, maxChunkedTOC), split: split}
}

func (*chunked) check(h *tar.Header) error { return checkHeader(h) }

func (c *chunked) entry(e *entry) error {
	h := e.head
	m := chunkedEntry{
		Type: tocType(h.Typeflag), Name: h.Name, Linkname: h.Linkname, Mode: h.Mode,
		UID: h.Uid, GID: h.Gid, Devmajor: h.Devmajor, Devminor: h.Devminor,
		ModTime: known(h.ModTime), AccessTime: known(h.AccessTime), ChangeTime: known(h.ChangeTime),
	}
	for k, v := range h.PAXRecords {
		if name, ok := strings.CutPrefix(k, xattrRecord); ok {
			if m.Xattrs == nil {
				m.Xattrs = map[string]string{}
			}
			m.Xattrs[name] = base64.StdEncoding.EncodeToString([]byte(v))
		}
	}
	if len(e.chunks) == 0 {
		return c.list.add(&m)
	}
	m.Size, m.Digest = h.Size, hexDigest(e.sum)
	m.Offset, m.EndOffset = e.chunks[0].blob, e.chunks[len(e.chunks)-1].end
	if len(e.chunks) == 1 { // the file is its only chunk, and says so by silence
		return c.list.add(&m)
	}
	for i, k := range e.chunks {
		if i > 0 {
			m = chunkedEntry{Type: "chunk", Name: h.Name, Offset: k.blob, ChunkOffset: k.at}
		}
		m.ChunkSize, m.ChunkDigest = k.size, hexDigest(k.sum)
		if m.ChunkType = ""; k.hole {
			m.ChunkType = "zeros"
		}
		if err := c.list.add(&m); err != nil {
			return err
		}
	}
	return nil
}

func known(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	u := t.UTC()
	return &u
}

// end gives three frames that readers of zstd skip: the table, the tar-split, and
// a footer that says where they are.
func (c *chunked) end(off, _ int64) (tail, tarred []byte, annotations map[string]string, err error) {
	split, splitSize, err := c.split.end()
	if err != nil {
		return nil, nil, nil, err
	}
	doc := c.list.end(fmt.Sprintf(`],"tarSplitDigest":%q}`, digest.FromBytes(split)))
	z, err := newZstd()
	if err != nil {
		return nil, nil, nil, err
	}
	toc, err := z.member(nil, doc)
	if err != nil {
		return nil, nil, nil, err
	}
	tail = appendSkippable(nil, toc)
	tocAt, splitAt := off+skippableHeader, off+int64(len(tail))+skippableHeader
	tail = appendSkippable(tail, split)
	footer := make([]byte, 0, 64)
	for _, v := range []int64{
		tocAt, int64(len(toc)), int64(len(doc)), chunkedType,
		splitAt, int64(len(split)), splitSize,
	} {
		footer = binary.LittleEndian.AppendUint64(footer, uint64(v))
	}
	tail = appendSkippable(tail, append(footer, chunkedMagic...))
	return tail, nil, map[string]string{
		chunkedChecksum: digest.FromBytes(toc).String(),
		chunkedPosition: fmt.Sprintf("%d:%d:%d:%d", tocAt, len(toc), len(doc), chunkedType),
		chunkedTarSplit: fmt.Sprintf("%d:%d:%d", splitAt, len(split), splitSize),
	}, nil
}

func appendSkippable(dst, p []byte) []byte {
	dst = binary.LittleEndian.AppendUint32(dst, skippableMagic)
	dst = binary.LittleEndian.AppendUint32(dst, uint32(len(p)))
	return append(dst, p...)
}

// tarSplit keeps, compressed, what of the tar is no file's content, so that the
// same tar can be made of the files again.
type tarSplit struct {
	z    bytes.Buffer
	w    *zstd.Encoder
	pack storage.Packer
	size int64 // before compression
	gap  []byte
	sum  hash.Hash64
	next storage.Entry // whose content comes
	err  error
}

func newTarSplit() *tarSplit {
	t := &tarSplit{sum: crc64.New(storage.CRCTable)}
	t.w, t.err = zstd.NewWriter(&t.z, zstd.WithEncoderLevel(zstd.SpeedDefault), zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(mib))
	t.pack = storage.NewJSONPacker(t)
	return t
}

// Write takes JSON from the packer.
func (t *tarSplit) Write(p []byte) (int, error) {
	n, err := t.w.Write(p)
	t.size += int64(n)
	return n, err
}

// head takes bytes of headers and padding.
func (t *tarSplit) head(p []byte) { t.gap = append(t.gap, p...) }

// file takes the entry of the header before, of which size bytes come.
func (t *tarSplit) file(h *tar.Header, size int64) error {
	t.segment()
	t.next = storage.Entry{Type: storage.FileType, Size: h.Size}
	t.next.SetName(h.Name)
	t.sum.Reset()
	if size == 0 {
		t.add(t.next)
	}
	return t.err
}

// body takes content; last says that it ends with p.
func (t *tarSplit) body(p []byte, last bool) {
	t.sum.Write(p)
	if last {
		t.next.Payload = t.sum.Sum(nil)
		t.add(t.next)
	}
}

func (t *tarSplit) segment() {
	if len(t.gap) > 0 {
		t.add(storage.Entry{Type: storage.SegmentType, Payload: t.gap})
		t.gap = t.gap[:0]
	}
}

func (t *tarSplit) add(e storage.Entry) {
	if t.err == nil {
		_, t.err = t.pack.AddEntry(e)
	}
}

// end gives the compressed bytes, and how many they are uncompressed.
func (t *tarSplit) end() ([]byte, int64, error) {
	t.segment()
	if err := t.w.Close(); t.err == nil {
		t.err = err
	}
	return t.z.Bytes(), t.size, t.err
}
