package commit

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"path"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/containerd/stargz-snapshotter/estargz"
	digest "github.com/opencontainers/go-digest"

	"github.com/varvefs/varve/index"
)

// stargzForm begins a member at every chunk of a large file, and puts small files
// together while a member holds no more than 64 KiB of tar. With a member for each
// file, as eStargz was at first, a tree of sources is 7 % larger and takes a
// fifth longer to pack; with 128 KiB it is 0.7 % smaller. So much is less than a
// reader asks a registry for at once in any case. A file within a member has an
// innerOffset, which stargz-snapshotter knows since 0.13: MinChunkSize of
// [estargz.Writer] makes it write the same.
var stargzForm = form{frame: mib, chunk: maxChunk, group: 64 << 10, codec: newGzip}

const (
	landmarkContent = "\x0f" // estargz, build.go
	footerEnd       = "\x01\x00\x00\xff\xff\x00\x00\x00\x00\x00\x00\x00\x00"
	xattrRecord     = "SCHILY.xattr."
)

// stargzLandmark is the first entry of the tar: nothing is to be fetched before it
// is asked for, since nothing is known here of what a start reads first.
func stargzLandmark() *tar.Header {
	return &tar.Header{Typeflag: tar.TypeReg, Name: estargz.NoPrefetchLandmark, Size: int64(len(landmarkContent))}
}

// stargz gathers eStargz's table of contents, as [estargz.Writer] does.
type stargz struct {
	list         jsonList
	uname, gname map[int]string // last written for a number
}

func newStargz() *stargz {
	return &stargz{list: newJSONList(`{"version":1,"entries":[`, index.MaxTOCSize), uname: map[int]string{}, gname: map[int]string{}}
}

func (s *stargz) check(h *tar.Header) error {
	switch strings.TrimPrefix(path.Clean("/"+h.Name), "/") {
	case estargz.TOCTarName, estargz.NoPrefetchLandmark, estargz.PrefetchLandmark:
		return fmt.Errorf("the name is eStargz's own: rename it, or choose the compression gzip or zstd")
	}
	return checkHeader(h)
}

// checkHeader refuses what the JSON of a table of contents cannot hold.
func checkHeader(h *tar.Header) error {
	if tocType(h.Typeflag) == "" {
		return fmt.Errorf("no table of contents has tar's type %q: choose the compression gzip or zstd", h.Typeflag)
	}
	texts := []string{h.Name, h.Linkname, h.Uname, h.Gname}
	for k := range h.PAXRecords {
		texts = append(texts, k)
	}
	for _, s := range texts {
		if !utf8.ValidString(s) {
			return fmt.Errorf("%q is not UTF-8, which a table of contents must be: choose the compression gzip or zstd", s)
		}
	}
	return nil
}

// tocType gives the word for a type of tar; "" if there is none.
func tocType(flag byte) string {
	switch flag {
	case tar.TypeReg:
		return "reg"
	case tar.TypeLink:
		return "hardlink"
	case tar.TypeSymlink:
		return "symlink"
	case tar.TypeDir:
		return "dir"
	case tar.TypeChar:
		return "char"
	case tar.TypeBlock:
		return "block"
	case tar.TypeFifo:
		return "fifo"
	}
	return ""
}

func (s *stargz) entry(e *entry) error {
	h := e.head
	t := estargz.TOCEntry{
		Name: h.Name, Type: tocType(h.Typeflag), Mode: h.Mode, UID: h.Uid, GID: h.Gid,
		Uname: changed(s.uname, h.Uid, h.Uname), Gname: changed(s.gname, h.Gid, h.Gname),
	}
	// The fractions of a second, which the library would round, are as RFC 3339
	// has them, and as the tar.
	if !h.ModTime.Equal(time.Unix(0, 0)) {
		t.ModTime3339 = h.ModTime.UTC().Format(time.RFC3339Nano)
	}
	for k, v := range h.PAXRecords {
		if name, ok := strings.CutPrefix(k, xattrRecord); ok {
			if t.Xattrs == nil {
				t.Xattrs = map[string][]byte{}
			}
			t.Xattrs[name] = []byte(v)
		}
	}
	switch h.Typeflag {
	case tar.TypeLink, tar.TypeSymlink:
		t.LinkName = h.Linkname
	case tar.TypeChar, tar.TypeBlock:
		t.DevMajor, t.DevMinor = int(h.Devmajor), int(h.Devminor)
	case tar.TypeReg:
		t.Size, t.Digest = h.Size, hexDigest(e.sum)
	}
	if len(e.chunks) == 0 {
		return s.list.add(&t)
	}
	for i, c := range e.chunks {
		if i > 0 {
			t = estargz.TOCEntry{Name: h.Name, Type: "chunk"}
		}
		t.Offset, t.InnerOffset, t.ChunkOffset, t.ChunkDigest = c.blob, c.inner, c.at, hexDigest(c.sum)
		if c.size == maxChunk { // else the chunk goes on to the end of the file
			t.ChunkSize = c.size
		}
		if err := s.list.add(&t); err != nil {
			return err
		}
	}
	return nil
}

// end makes the table the last entry of the tar, in a member of its own, and
// then the footer: an empty member whose extra field says where the table is.
func (s *stargz) end(off, size int64) (tail, tarred []byte, annotations map[string]string, err error) {
	doc := s.list.end("]}")
	var t appender
	tw := tar.NewWriter(&t)
	if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: estargz.TOCTarName, Size: int64(len(doc))}); err != nil {
		return nil, nil, nil, err
	}
	if _, err := tw.Write(doc); err != nil {
		return nil, nil, nil, err
	}
	if err := tw.Close(); err != nil {
		return nil, nil, nil, err
	}
	c, err := newGzip()
	if err != nil {
		return nil, nil, nil, err
	}
	if tail, err = c.member(nil, t.b); err != nil {
		return nil, nil, nil, err
	}
	if len(tail) > index.MaxTOCBlob {
		return nil, nil, nil, fmt.Errorf("%d bytes, readers take %d: choose the compression gzip or zstd", len(tail), index.MaxTOCBlob)
	}
	tail = append(tail, "\x1f\x8b\x08\x04\x00\x00\x00\x00\x00\xff\x1a\x00SG\x16\x00"...)
	tail = fmt.Appendf(tail, "%016xSTARGZ", off)
	tail = append(tail, footerEnd...)
	return tail, t.b, map[string]string{
		estargz.TOCJSONDigestAnnotation:         digest.FromBytes(doc).String(),
		estargz.StoreUncompressedSizeAnnotation: strconv.FormatInt(size+int64(len(t.b)), 10),
	}, nil
}

// changed gives name unless it was the last for id, which readers remember.
func changed(last map[int]string, id int, name string) string {
	if name == "" || last[id] == name {
		return ""
	}
	last[id] = name
	return name
}

func hexDigest(sum [sha256.Size]byte) string { return "sha256:" + hex.EncodeToString(sum[:]) }

// jsonList is a growing document of JSON that ends in a list.
type jsonList struct {
	doc  []byte
	most int // bytes
	n    int
}

func newJSONList(start string, most int) jsonList { return jsonList{doc: []byte(start), most: most} }

func (l *jsonList) add(v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if l.n++; l.n > 1 {
		l.doc = append(l.doc, ',')
	}
	if l.doc = append(l.doc, b...); len(l.doc) > l.most {
		return fmt.Errorf("the table of contents is larger than the %d bytes that readers take: choose the compression gzip or zstd", l.most)
	}
	return nil
}

func (l *jsonList) end(s string) []byte { return append(l.doc, s...) }
