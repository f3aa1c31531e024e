// Package estargz reads layers in the eStargz format: a gzip blob whose files
// are members of their own and whose table of contents is its last member but
// the footer.
//
// The caller fetches: the last [TailSize] bytes of the blob, which [Locate]
// reads, and the table of contents, most often already among them, which [Read]
// turns into a layer.
package estargz

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/klauspost/compress/gzip"
	digest "github.com/opencontainers/go-digest"

	"github.com/varvefs/varve/index"
	"github.com/varvefs/varve/index/jtoc"
)

// Annotations of a layer's descriptor.
const (
	AnnotationTOCDigest        = "containerd.io/snapshot/stargz/toc.digest"             // sha256 of the table's JSON
	AnnotationUncompressedSize = "io.containers.estargz.uncompressed-size"              // decimal bytes
	AnnotationLayerDigest      = "containerd.io/snapshot/stargz/layer.digest"           // in the image of external TOCs
	tocName                    = "stargz.index.json"                                    // the table's name in its tar
	prefetchLandmark           = ".prefetch.landmark"                                   // ends what to prefetch
	noPrefetchLandmark         = ".no.prefetch.landmark"                                // nothing to prefetch
	footerSize                 = 51                                                     // FooterSize of types.go there
	legacyFooterSize           = 47                                                     // of CRFS's stargz
	externalFooterSize         = 46                                                     // of externaltoc
	magic                      = "STARGZ"                                               // ends the extra field
	externalMagic              = "STARGZEXTERNALTOC"                                    // is the extra field
	flateEnd                   = "\x01\x00\x00\xff\xff\x00\x00\x00\x00\x00\x00\x00\x00" // an empty stored block, its CRC and size
)

// ErrExternalTOC says that the blob's table of contents lies in another image,
// tagged with the suffix -esgztoc, which is not read. It wraps
// [index.ErrMalformed], since the blob alone is not enough.
var ErrExternalTOC = fmt.Errorf("%w: eStargz blob with an external TOC", index.ErrMalformed)

// TOCDigest gives the digest which the annotations of a layer promise for its
// table of contents, if they do. A zstd:chunked layer may have it as well: look
// for that format first.
func TOCDigest(annotations map[string]string) (string, bool) {
	d := annotations[AnnotationTOCDigest]
	return d, d != ""
}

// TailSize gives how many of a blob's last bytes to fetch so that the table of
// contents is most likely among them. It takes some 0.6 % of a Debian layer; what
// is fetched in vain should not cost more time than a second round trip would.
func TailSize(blobSize int64) int64 {
	const least, most = 64 << 10, 1 << 20
	return max(0, min(blobSize, max(least, min(most, blobSize/128))))
}

// Locate reads the footer at the end of tail, which is the end of the blob, and
// gives where in the blob the compressed table of contents lies, in bytes. It is
// among tail's bytes if tocOffset >= blobSize-len(tail).
func Locate(tail []byte, blobSize int64) (tocOffset, tocLen int64, err error) {
	if int64(len(tail)) > blobSize {
		return 0, 0, fmt.Errorf("%w: eStargz: tail of %d bytes of a blob of %d", index.ErrMalformed, len(tail), blobSize)
	}
	last := func(n int) []byte { return tail[max(0, len(tail)-n):] }
	size := int64(footerSize)
	off, ok := footer(last(footerSize))
	if !ok {
		size = legacyFooterSize
		off, ok = legacyFooter(last(legacyFooterSize))
	}
	if !ok {
		if externalFooter(last(externalFooterSize)) {
			return 0, 0, ErrExternalTOC
		}
		return 0, 0, fmt.Errorf("%w: eStargz: blob of %d bytes has no footer", index.ErrMalformed, blobSize)
	}
	end := blobSize - size
	if off >= uint64(end) {
		return 0, 0, fmt.Errorf("%w: eStargz: footer puts the TOC at %d, blob has %d bytes", index.ErrMalformed, off, blobSize)
	}
	tocOffset, tocLen = int64(off), end-int64(off)
	if tocLen > index.MaxTOCSize {
		return 0, 0, fmt.Errorf("%w: eStargz: TOC of %d bytes, the limit is %d", index.ErrMalformed, tocLen, int64(index.MaxTOCSize))
	}
	return tocOffset, tocLen, nil
}

// extra gives the extra field of an empty gzip member of the footer's form.
func extra(p []byte, n int) (string, bool) {
	if len(p) != 12+n+len(flateEnd) || !bytes.HasPrefix(p, []byte{0x1f, 0x8b, 8, 4}) || int(binary.LittleEndian.Uint16(p[10:])) != n {
		return "", false
	}
	return string(p[12 : 12+n]), true
}

func footer(p []byte) (uint64, bool) {
	x, ok := extra(p, 26)
	if !ok || !strings.HasPrefix(x, "SG\x16\x00") {
		return 0, false
	}
	return offset(x[4:])
}

func legacyFooter(p []byte) (uint64, bool) {
	x, ok := extra(p, 22)
	if !ok {
		return 0, false
	}
	return offset(x)
}

func externalFooter(p []byte) bool {
	x, ok := extra(p, 21)
	return ok && x == "SG\x11\x00"+externalMagic
}

func offset(x string) (uint64, bool) {
	hex, ok := strings.CutSuffix(x, magic)
	if !ok {
		return 0, false
	}
	n, err := strconv.ParseUint(hex, 16, 64)
	return n, err == nil
}

// Landmark is what a blob's builder says about what is read at start-up.
type Landmark struct {
	Set bool  // the blob has a landmark
	End int64 // frames that begin before it are to be prefetched; 0 for none
}

// landmarks watches for the names that eStargz's builder adds to a layer. The
// zero value is ready to use.
type landmarks struct{ Landmark }

func (l *landmarks) skip(name string, off int64) bool {
	switch name {
	case prefetchLandmark:
		l.Landmark = Landmark{Set: true, End: off}
	case noPrefetchLandmark:
		l.Landmark = Landmark{Set: true}
	case tocName:
	default:
		return false
	}
	return true
}

// Read turns a table of contents into a layer. toc gives the bytes of the blob
// from tocOffset on, as [Locate] says; want is the annotated digest of the JSON
// in them, which must match. blobSize is the size of the blob in bytes.
func Read(toc io.Reader, want string, blobSize, tocOffset int64) (*index.Layer, Landmark, error) {
	l, mark, err := read(toc, want, blobSize, tocOffset)
	if err != nil {
		return nil, Landmark{}, fmt.Errorf("eStargz: %w", err)
	}
	return l, mark, nil
}

func read(toc io.Reader, want string, blobSize, tocOffset int64) (*index.Layer, Landmark, error) {
	if tocOffset < 0 || tocOffset >= blobSize {
		return nil, Landmark{}, fmt.Errorf("%w: TOC at %d of a blob of %d bytes", index.ErrMalformed, tocOffset, blobSize)
	}
	src := &source{r: toc}
	zr, err := gzip.NewReader(src)
	if err != nil {
		return nil, Landmark{}, src.blame("TOC is no gzip", err)
	}
	zr.Multistream(false)
	tr := tar.NewReader(zr)
	h, err := tr.Next()
	if err != nil && !(h != nil && errors.Is(err, tar.ErrInsecurePath)) {
		return nil, Landmark{}, src.blame("TOC is no tar", err)
	}
	if h.Name != tocName || h.Typeflag != tar.TypeReg {
		return nil, Landmark{}, fmt.Errorf("%w: TOC has the name %.80q, want %q", index.ErrMalformed, h.Name, tocName)
	}
	if h.Size > index.MaxTOCSize {
		return nil, Landmark{}, fmt.Errorf("%w: TOC of %d bytes, the limit is %d", index.ErrMalformed, h.Size, int64(index.MaxTOCSize))
	}
	b := index.NewBuilder(index.Gzip)
	var marks landmarks
	err = jtoc.Read(tr, digest.Digest(want), b, jtoc.Options{DataEnd: tocOffset, Skip: marks.skip})
	if err != nil {
		return nil, Landmark{}, src.blame("TOC", err)
	}
	l, err := b.Layer(tocOffset)
	if err != nil {
		return nil, Landmark{}, err
	}
	if marks.End > tocOffset {
		return nil, Landmark{}, fmt.Errorf("%w: landmark at %d, past %d", index.ErrMalformed, marks.End, tocOffset)
	}
	return l, marks.Landmark, nil
}

// source tells a failing reader from foreign bytes that are wrong.
type source struct {
	r   io.Reader
	err error
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil && err != io.EOF {
		s.err = err
	}
	return n, err
}

func (s *source) blame(what string, err error) error {
	switch {
	case s.err != nil:
		return fmt.Errorf("read TOC: %w", s.err)
	case errors.Is(err, index.ErrMalformed):
		return err
	case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("%w: %s: truncated", index.ErrMalformed, what)
	}
	return fmt.Errorf("%w: %s: %w", index.ErrMalformed, what, err)
}
