package forms

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash"
	"io"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/vbatts/tar-split/archive/tar"
	"github.com/vbatts/tar-split/tar/asm"
	"github.com/vbatts/tar-split/tar/storage"
)

// The format is that of go.podman.io/storage, pkg/chunked/internal/minimal:
// the tar as zstd frames, of which each chunk of a file has its own, then
// three skippable frames: TOC, tar-split and footer.
const (
	containersChecksum = "io.github.containers.zstd-chunked.manifest-checksum"
	containersPosition = "io.github.containers.zstd-chunked.manifest-position"
	containersTarSplit = "io.github.containers.zstd-chunked.tarsplit-position"

	skippableMagic  = 0x184d2a50
	skippableHeader = 8
	footerMagic     = "GNUlInUx"
	tocType         = 1
)

type containersTOC struct {
	Version        int               `json:"version"`
	Entries        []containersEntry `json:"entries"`
	TarSplitDigest string            `json:"tarSplitDigest,omitempty"`
}

type containersEntry struct {
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
	DevMajor    int64             `json:"devMajor,omitempty"`
	DevMinor    int64             `json:"devMinor,omitempty"`
	Xattrs      map[string]string `json:"xattrs,omitempty"` // values in base64
	Digest      string            `json:"digest,omitempty"`
	Offset      int64             `json:"offset,omitempty"`
	EndOffset   int64             `json:"endOffset,omitempty"`
	ChunkSize   int64             `json:"chunkSize,omitempty"`
	ChunkOffset int64             `json:"chunkOffset,omitempty"`
	ChunkDigest string            `json:"chunkDigest,omitempty"`
	ChunkType   string            `json:"chunkType,omitempty"` // "zeros" for a hole
}

var containersTypes = map[byte]string{
	tar.TypeReg:     "reg",
	tar.TypeLink:    "hardlink",
	tar.TypeChar:    "char",
	tar.TypeBlock:   "block",
	tar.TypeDir:     "dir",
	tar.TypeFifo:    "fifo",
	tar.TypeSymlink: "symlink",
}

// writeContainers writes the tar r and notes the annotations of its layer.
func writeContainers(out *counter, r io.Reader, annotations map[string]string) error {
	split, err := newSection()
	if err != nil {
		return err
	}
	// tar-split keeps what is no file's content, so that the tar can be made
	// again, bit for bit, from the files.
	stream, done, err := asm.NewInputTarStreamWithDone(r, storage.NewJSONPacker(split), nil)
	if err != nil {
		return err
	}
	w := &containersWriter{out: out, buf: make([]byte, 64<<10)}
	if w.zstd, err = newZstd(out); err != nil {
		stream.Close()
		<-done
		return err
	}
	err = w.all(stream)
	stream.Close()
	if derr := <-done; err == nil {
		err = derr
	}
	if err != nil {
		return err
	}
	if err := split.close(); err != nil {
		return err
	}

	w.toc.Version = 1
	w.toc.TarSplitDigest = split.digest()
	toc, err := newSection()
	if err != nil {
		return err
	}
	list, err := json.Marshal(w.toc) // nothing may follow it, not even a newline
	if err != nil {
		return err
	}
	if _, err := toc.Write(list); err != nil {
		return err
	}
	if err := toc.close(); err != nil {
		return err
	}
	if err := toc.place(out); err != nil {
		return err
	}
	if err := split.place(out); err != nil {
		return err
	}
	annotations[containersChecksum] = toc.digest()
	annotations[containersPosition] = fmt.Sprintf("%d:%d:%d:%d", toc.offset, toc.z.Len(), toc.size, tocType)
	annotations[containersTarSplit] = fmt.Sprintf("%d:%d:%d", split.offset, split.z.Len(), split.size)

	footer := make([]byte, 0, 64)
	for _, v := range []int64{
		toc.offset, int64(toc.z.Len()), toc.size, tocType,
		split.offset, int64(split.z.Len()), split.size,
	} {
		footer = binary.LittleEndian.AppendUint64(footer, uint64(v))
	}
	return writeSkippable(out, append(footer, footerMagic...))
}

// section is what stands compressed in a skippable frame.
type section struct {
	z      bytes.Buffer // compressed
	zstd   *zstd.Encoder
	size   int64 // before compression
	offset int64 // in the blob, after the frame's header
}

func newSection() (*section, error) {
	s := &section{}
	var err error
	s.zstd, err = newZstd(&s.z)
	return s, err
}

func (s *section) Write(p []byte) (int, error) {
	n, err := s.zstd.Write(p)
	s.size += int64(n)
	return n, err
}

func (s *section) close() error { return s.zstd.Close() }

// digest is of the compressed bytes.
func (s *section) digest() string {
	return fmt.Sprintf("sha256:%x", sha256.Sum256(s.z.Bytes()))
}

func (s *section) place(out *counter) error {
	s.offset = out.n + skippableHeader
	return writeSkippable(out, s.z.Bytes())
}

func writeSkippable(out *counter, data []byte) error {
	if len(data) > 1<<32-1 {
		return fmt.Errorf("%d bytes are too many for a skippable frame", len(data))
	}
	header := binary.LittleEndian.AppendUint32(nil, skippableMagic)
	header = binary.LittleEndian.AppendUint32(header, uint32(len(data)))
	if _, err := out.Write(header); err != nil {
		return err
	}
	_, err := out.Write(data)
	return err
}

// containersWriter writes the frames of a tar and lists its entries.
type containersWriter struct {
	out  *counter
	zstd *zstd.Encoder
	toc  containersTOC
	buf  []byte
}

func (w *containersWriter) all(stream io.Reader) error {
	tr := tar.NewReader(stream)
	tr.RawAccounting = true // RawBytes is what stands between the contents
	for {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		if _, err := w.zstd.Write(tr.RawBytes()); err != nil {
			return err
		}
		if err := w.entry(h, tr); err != nil {
			return fmt.Errorf("%s: %w", h.Name, err)
		}
	}
	if _, err := w.zstd.Write(tr.RawBytes()); err != nil {
		return err
	}
	if _, err := io.Copy(w.zstd, stream); err != nil { // padding of any length
		return err
	}
	return w.zstd.Close()
}

// nextFrame ends the present frame and says where the next one begins.
func (w *containersWriter) nextFrame() (int64, error) {
	if err := w.zstd.Close(); err != nil {
		return 0, err
	}
	w.zstd.Reset(w.out)
	return w.out.n, nil
}

func (w *containersWriter) entry(h *tar.Header, content io.Reader) error {
	e, listed := containersHeader(h)
	if !listed { // a global header is in the stream and in no list
		_, err := io.Copy(w.zstd, content)
		return err
	}
	if h.Typeflag != tar.TypeReg || h.Size == 0 {
		w.toc.Entries = append(w.toc.Entries, e)
		return nil
	}

	var err error
	if e.Offset, err = w.nextFrame(); err != nil {
		return err
	}
	var (
		chunks []containersEntry
		whole  = sha256.New()
		chunk  = sha256.New()
		begin  = e.Offset
		from   int64 // of the chunk, in the file
		size   int64 // of the file, so far
	)
	c := chunker{
		write: func(p []byte) error {
			whole.Write(p)
			chunk.Write(p)
			size += int64(len(p))
			_, err := w.zstd.Write(p)
			return err
		},
		cut: func(hole bool) error {
			k := containersEntry{
				Type: "chunk", Name: h.Name,
				Offset: begin, ChunkOffset: from, ChunkSize: size - from, ChunkDigest: digestOf(chunk),
			}
			if hole {
				k.ChunkType = "zeros"
			}
			chunks = append(chunks, k)
			from = size
			chunk.Reset()
			var err error
			begin, err = w.nextFrame()
			return err
		},
	}
	if err := c.run(content, w.buf); err != nil {
		return err
	}
	e.Digest, e.EndOffset = digestOf(whole), begin
	if len(chunks) == 1 { // the file is its only chunk, and says so by silence
		w.toc.Entries = append(w.toc.Entries, e)
		return nil
	}
	first := chunks[0]
	e.ChunkSize, e.ChunkDigest, e.ChunkType = first.ChunkSize, first.ChunkDigest, first.ChunkType
	w.toc.Entries = append(w.toc.Entries, e)
	w.toc.Entries = append(w.toc.Entries, chunks[1:]...)
	return nil
}

// containersHeader gives the entry of a tar header; false if the TOC has no
// word for its type.
func containersHeader(h *tar.Header) (containersEntry, bool) {
	e := containersEntry{
		Type:       containersTypes[h.Typeflag],
		Name:       h.Name,
		Linkname:   h.Linkname,
		Mode:       h.Mode,
		Size:       h.Size,
		UID:        h.Uid,
		GID:        h.Gid,
		ModTime:    known(h.ModTime),
		AccessTime: known(h.AccessTime),
		ChangeTime: known(h.ChangeTime),
		DevMajor:   h.Devmajor,
		DevMinor:   h.Devminor,
		Xattrs:     map[string]string{},
	}
	for k, v := range h.PAXRecords {
		if name, ok := strings.CutPrefix(k, xattrRecord); ok {
			e.Xattrs[name] = base64.StdEncoding.EncodeToString([]byte(v))
		}
	}
	return e, e.Type != ""
}

func known(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

func digestOf(h hash.Hash) string { return "sha256:" + hex.EncodeToString(h.Sum(nil)) }
