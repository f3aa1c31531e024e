// Package zstdchunked reads layers in both dialects of zstd:chunked: that of
// containers/storage (Podman, Buildah, Skopeo) and that of stargz-snapshotter
// (nerdctl, ctr-remote). Each chunk of a file is a zstd frame of its own; the
// table of contents lies in a skippable frame after them.
//
// Where the table lies and what its digest is, both dialects say in annotations
// of the layer. The checksum there is that of the table's COMPRESSED bytes in
// both: containers/storage, minimal.WriteZstdChunkedManifest; stargz-snapshotter,
// zstdchunked.Compressor.WriteTOCAndFooter. The second dialect's converter also
// writes eStargz's annotation with the digest of the uncompressed JSON, which is
// checked as well.
package zstdchunked

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/klauspost/compress/zstd"
	digest "github.com/opencontainers/go-digest"

	"github.com/varvefs/varve/index"
	"github.com/varvefs/varve/index/jtoc"
)

// Dialect names who wrote a layer.
type Dialect string

// The dialects.
const (
	Containers Dialect = "containers/storage"
	Stargz     Dialect = "stargz-snapshotter"
)

const (
	containersPrefix = "io.github.containers.zstd-chunked."
	stargzPrefix     = "io.containers.zstd-chunked."
	checksumSuffix   = "manifest-checksum"
	positionSuffix   = "manifest-position"
	jsonDigest       = "containerd.io/snapshot/stargz/toc.digest"

	typeCRFS    = 1 // the only type of table of contents there is
	frameHeader = 8 // bytes before the content of a skippable frame
	maxWindow   = 128 << 20
)

// Position says where in a blob the table of contents lies.
type Position struct {
	Offset       int64         // of its compressed bytes, after the header of their frame
	Length       int64         // bytes, compressed
	Uncompressed int64         // bytes of JSON
	Type         int64         // 1
	Digest       digest.Digest // of the compressed bytes
	JSONDigest   digest.Digest // of the JSON, empty if the annotations have none
	Dialect      Dialect
}

// FromAnnotations reads the annotations of a layer's descriptor. It reports
// false if they name no zstd:chunked table of contents. Annotations that could
// mean two tables are refused, since tools would see two images in one.
func FromAnnotations(annotations map[string]string) (Position, bool, error) {
	c, hasC, err := dialect(annotations, containersPrefix, Containers)
	if err != nil {
		return Position{}, false, err
	}
	s, hasS, err := dialect(annotations, stargzPrefix, Stargz)
	if err != nil {
		return Position{}, false, err
	}
	esgz := digest.Digest(annotations[jsonDigest])
	switch {
	case hasC && hasS:
		same := c
		same.Dialect = s.Dialect
		if same != s {
			return Position{}, false, fmt.Errorf("%w: layer has two zstd:chunked TOCs, %s of %s and %s of %s",
				index.ErrMalformed, c.Digest, Containers, s.Digest, Stargz)
		}
	case hasC && esgz != "": // as containers/storage, storage_linux.go
		return Position{}, false, fmt.Errorf("%w: layer has both a zstd:chunked TOC %s and an eStargz TOC %s", index.ErrMalformed, c.Digest, esgz)
	case hasC:
		return c, true, nil
	case !hasS:
		return Position{}, false, nil
	}
	if esgz != "" {
		if err := checkDigest(esgz); err != nil {
			return Position{}, false, err
		}
	}
	s.JSONDigest = esgz
	return s, true, nil
}

// dialect reads the annotations of one dialect.
func dialect(annotations map[string]string, prefix string, d Dialect) (Position, bool, error) {
	sum, pos := annotations[prefix+checksumSuffix], annotations[prefix+positionSuffix]
	if sum == "" && pos == "" {
		return Position{}, false, nil
	}
	p := Position{Digest: digest.Digest(sum), Dialect: d}
	if err := checkDigest(p.Digest); err != nil {
		return Position{}, false, fmt.Errorf("annotation %s: %w", prefix+checksumSuffix, err)
	}
	parts := strings.Split(pos, ":")
	fields := []*int64{&p.Offset, &p.Length, &p.Uncompressed, &p.Type}
	if len(parts) != len(fields) {
		return Position{}, false, fmt.Errorf("%w: annotation %s is %.80q", index.ErrMalformed, prefix+positionSuffix, pos)
	}
	for i, f := range fields {
		n, err := strconv.ParseUint(parts[i], 10, 63)
		if err != nil {
			return Position{}, false, fmt.Errorf("%w: annotation %s is %.80q", index.ErrMalformed, prefix+positionSuffix, pos)
		}
		*f = int64(n)
	}
	if p.Type != typeCRFS {
		return Position{}, false, fmt.Errorf("%w: zstd:chunked TOC of type %d, known is %d", index.ErrMalformed, p.Type, typeCRFS)
	}
	return p, true, nil
}

func checkDigest(d digest.Digest) error {
	if err := d.Validate(); err != nil || d.Algorithm() != digest.SHA256 {
		return fmt.Errorf("%w: digest %.80q is no sha256", index.ErrMalformed, d)
	}
	return nil
}

// Check compares the position with the size of the blob in bytes. [Read] does it
// too; a caller does it before it asks for the range.
func (p Position) Check(blobSize int64) error {
	switch {
	case p.Offset < frameHeader || p.Length <= 0 || p.Offset > blobSize || p.Length > blobSize-p.Offset:
		return fmt.Errorf("%w: zstd:chunked TOC of %d bytes at %d of a blob of %d", index.ErrMalformed, p.Length, p.Offset, blobSize)
	case p.Length > index.MaxTOCSize || p.Uncompressed <= 0 || p.Uncompressed > index.MaxTOCSize:
		return fmt.Errorf("%w: zstd:chunked TOC of %d bytes, %d uncompressed, the limit is %d",
			index.ErrMalformed, p.Length, p.Uncompressed, int64(index.MaxTOCSize))
	}
	return nil
}

// Read turns a table of contents into a layer. toc gives the p.Length bytes of
// the blob at p.Offset and no more; blobSize is the size of the blob in bytes.
func Read(toc io.Reader, p Position, blobSize int64) (*index.Layer, error) {
	l, err := read(toc, p, blobSize)
	if err != nil {
		return nil, fmt.Errorf("zstd:chunked: %w", err)
	}
	return l, nil
}

func read(toc io.Reader, p Position, blobSize int64) (*index.Layer, error) {
	if err := p.Check(blobSize); err != nil {
		return nil, err
	}
	if err := checkDigest(p.Digest); err != nil {
		return nil, err
	}
	src := &source{r: io.LimitReader(toc, p.Length)}
	sum := sha256.New()
	compressed := io.TeeReader(src, sum)
	// One goroutine: the hash is written by whoever reads.
	dec, err := zstd.NewReader(compressed, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow),
		zstd.WithDecoderMaxMemory(index.MaxTOCSize+1), zstd.WithDecoderLowmem(true))
	if err != nil {
		return nil, src.blame(err)
	}
	defer dec.Close()
	b := index.NewBuilder(index.Zstd)
	// The skippable frame's header is no content.
	dataEnd := p.Offset - frameHeader
	json := &counted{r: io.LimitReader(dec, p.Uncompressed+1)}
	o := jtoc.Options{DataEnd: dataEnd, Proved: true}
	if p.Dialect == Stargz {
		o.Skip = skip
	}
	tocErr := jtoc.Read(json, p.JSONDigest, b, o)
	// What the digest says comes first: of other bytes nothing else is of interest.
	if _, err := io.Copy(io.Discard, compressed); err != nil {
		return nil, src.blame(err)
	}
	if src.n != p.Length {
		return nil, fmt.Errorf("%w: TOC is truncated: %d of %d bytes", index.ErrMalformed, src.n, p.Length)
	}
	if got := digest.NewDigest(digest.SHA256, sum); got != p.Digest {
		return nil, fmt.Errorf("%w: compressed TOC has digest %s, want %s", index.ErrMalformed, got, p.Digest)
	}
	if tocErr != nil {
		return nil, src.blame(tocErr)
	}
	if json.n != p.Uncompressed {
		return nil, fmt.Errorf("%w: TOC of %d bytes, the annotation says %d", index.ErrMalformed, json.n, p.Uncompressed)
	}
	return b.Layer(dataEnd)
}

// skip hides what eStargz's builder adds to a layer, whatever its compression.
func skip(name string, _ int64) bool {
	return name == ".prefetch.landmark" || name == ".no.prefetch.landmark" || name == "stargz.index.json"
}

// source counts bytes and tells a failing reader from foreign bytes.
type source struct {
	r   io.Reader
	n   int64
	err error
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	s.n += int64(n)
	if err != nil && err != io.EOF {
		s.err = err
	}
	return n, err
}

func (s *source) blame(err error) error {
	switch {
	case s.err != nil:
		return fmt.Errorf("read TOC: %w", s.err)
	case errors.Is(err, index.ErrMalformed):
		return err
	case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("%w: TOC is truncated", index.ErrMalformed)
	case errors.Is(err, zstd.ErrWindowSizeExceeded) || errors.Is(err, zstd.ErrDecoderSizeExceeded):
		return fmt.Errorf("%w: TOC needs a zstd window above %d bytes", index.ErrMalformed, maxWindow)
	}
	return fmt.Errorf("%w: TOC: %w", index.ErrMalformed, err)
}

type counted struct {
	r io.Reader
	n int64
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}
