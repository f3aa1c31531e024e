package index

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"

	"github.com/klauspost/compress/zstd"
)

// ErrUnshared says that a layer has what no bundle can say.
var ErrUnshared = errors.New("the layer cannot be read by an index")

// Bundle is what is shared of a layer that was read whole, so that others need
// not: its names, its frames and their points, and what it was found to be.
type Bundle struct {
	Layer `json:"-"`

	Digest       string `json:"digest"` // of the blob
	DiffID       string `json:"diff_id"`
	Size         int64  `json:"size"`         // of the blob
	Uncompressed int64  `json:"uncompressed"` // bytes of the tar
	Format       string `json:"format"`       // tar+gzip, tar+zstd, tar
}

// A bundle is its magic, the length of its first part, that part compressed with
// zstd (what the layer is, as JSON; names; pieces), the digests of the pieces, and
// the points.
const (
	bundleMagic = "varvelx1"
	// MaxBundle bounds a bundle, in bytes.
	MaxBundle = 512 << 20
)

// WriteBundle writes a bundle as [ReadBundle] reads it. Every frame must have a
// point: what only another pass can bring, as parts of a sparse file, cannot be
// shared.
func WriteBundle(w io.Writer, b *Bundle) error {
	nf, np, size := b.Frames.Len()
	about, err := json.Marshal(b)
	if err != nil {
		return err
	}
	var toc bytes.Buffer
	if err := WriteTOC(&toc, b.Entries); err != nil {
		return err
	}
	head := binary.AppendUvarint(nil, uint64(len(about)))
	head = append(head, about...)
	head = binary.AppendUvarint(head, uint64(toc.Len()))
	head = append(head, toc.Bytes()...)
	head = binary.AppendUvarint(head, uint64(size))
	head = binary.AppendUvarint(head, uint64(np))
	digests := make([]byte, 0, np*sha256.Size)
	var data, frame int64
	for i := range np {
		p := b.Frames.Piece(i)
		if b.Frames.Frame(p.Frame).Point == 0 {
			return fmt.Errorf("%w: a frame of %v", ErrUnshared, b.Frames.Frame(p.Frame).Kind)
		}
		head = binary.AppendUvarint(head, uint64(p.Data-data))
		head = binary.AppendUvarint(head, uint64(p.Size))
		head = binary.AppendVarint(head, int64(p.Frame)-frame)
		head = binary.AppendUvarint(head, uint64(p.Inner))
		data, frame = p.Data+p.Size, int64(p.Frame)
		digests = append(digests, p.Digest[:]...)
	}
	kind := Raw
	if nf > 0 {
		kind = b.Frames.Frame(0).Kind
	}
	head = append(head, byte(kind))
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedBetterCompression), zstd.WithSingleSegment(true))
	if err != nil {
		return err
	}
	first := enc.EncodeAll(head, nil)
	out := append([]byte(bundleMagic), make([]byte, 8)...)
	binary.LittleEndian.PutUint64(out[8:], uint64(len(first)))
	for _, part := range [][]byte{out, first, digests} {
		if _, err := w.Write(part); err != nil {
			return err
		}
	}
	if b.Points != nil {
		_, err = b.Points.WriteTo(w)
	}
	return err
}

// ReadBundle reads a bundle that somebody else may have made. Everything in it is
// checked but whether it is true of the blob. Its points keep raw's memory.
func ReadBundle(raw []byte) (*Bundle, error) {
	b, err := readBundle(raw)
	if err != nil {
		return nil, fmt.Errorf("layer index: %w", err)
	}
	return b, nil
}

func readBundle(raw []byte) (*Bundle, error) {
	short := fmt.Errorf("%w: it ends early", ErrMalformed)
	if len(raw) < 16 || string(raw[:8]) != bundleMagic {
		return nil, fmt.Errorf("%w: it is none", ErrMalformed)
	}
	n := binary.LittleEndian.Uint64(raw[8:])
	raw = raw[16:]
	if n > uint64(len(raw)) {
		return nil, short
	}
	var h zstd.Header
	if err := h.Decode(raw[:n]); err != nil || !h.HasFCS || h.FrameContentSize > MaxTOCSize {
		return nil, fmt.Errorf("%w: its first part is larger than %d bytes, or does not say", ErrMalformed, MaxTOCSize)
	}
	head, err := expand(raw[:n], int64(h.FrameContentSize))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	raw = raw[n:]
	d := tocDecoder{s: inPlace(head)}
	b := &Bundle{}
	if err := json.Unmarshal([]byte(d.str()), b); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	if b.Size < 0 || b.Size > MaxBlobFrame || b.Uncompressed < 0 || b.Uncompressed > MaxDataSize+MaxDataSize/4 {
		return nil, fmt.Errorf("%w: a layer of %d bytes, decompressed %d", ErrMalformed, b.Size, b.Uncompressed)
	}
	if b.Format != "tar" && b.Format != "tar+gzip" && b.Format != "tar+zstd" {
		return nil, fmt.Errorf("%w: a layer of the format %.20q", ErrMalformed, b.Format)
	}
	toc := len(d.str())
	end := len(head) - len(d.s)
	entries, err := ReadTOC(head[end-toc : end])
	if err != nil {
		return nil, err
	}
	size, np := d.uint(), d.uint()
	if d.short || size > MaxDataSize || np > uint64(len(raw)/sha256.Size) {
		return nil, short
	}
	digests, rest := raw[:np*sha256.Size], raw[np*sha256.Size:]
	build := NewBuilder(Raw)
	if _, err := build.Reserve(int64(size)); err != nil {
		return nil, err
	}
	build.Grow(len(entries), int(np))
	for _, e := range entries {
		if !isClean(e.Name) || e.HardLink && !isClean(e.Link) {
			return nil, fmt.Errorf("%w: a file named %.80q", ErrMalformed, e.Name)
		}
		if err := checkXattrs(e.Xattrs); err != nil {
			return nil, fmt.Errorf("%.80q: %w", e.Name, err)
		}
		if e.Mode > math.MaxUint16 {
			return nil, fmt.Errorf("%w: %.80q has the mode %o", ErrMalformed, e.Name, e.Mode)
		}
		if e.IsRegular() && e.Size > 0 && (e.Data < 0 || e.Data%BlockSize != 0 || e.Size < 0 || e.Data > int64(size) || e.Size > int64(size)-e.Data) {
			return nil, fmt.Errorf("%w: %.80q: %d bytes at %d of a data file of %d", ErrMalformed, e.Name, e.Size, e.Data, size)
		}
		if err := build.Add(e); err != nil {
			return nil, err
		}
	}
	if len(rest) > 0 {
		if b.Points, err = ParsePoints(rest); err != nil {
			return nil, err
		}
	}
	if err := readPieces(build, &d, b, int64(size), int(np), digests); err != nil {
		return nil, err
	}
	l, err := build.Layer(b.Size)
	if err != nil {
		return nil, err
	}
	l.Points = b.Points
	b.Layer = *l
	return b, nil
}

// isClean reports whether a name is as [Clean] gives it, which it mostly is: then
// nothing need be allocated to see it.
func isClean(name string) bool {
	if name == "" { // the root
		return true
	}
	if len(name) > MaxPath {
		return false
	}
	depth, from := 0, 0
	for i := 0; i <= len(name); i++ {
		if i < len(name) && name[i] != '/' {
			if name[i] == 0 {
				return false
			}
			continue
		}
		part := name[from:i]
		if part == "" || part == "." || part == ".." || len(part) > MaxName {
			return false
		}
		depth++
		from = i + 1
	}
	return depth <= MaxDepth
}

// checkXattrs refuses what [SortXattrs] does not give: the tree has 8 bits for the
// length of a name, and 16 for that of a value.
func checkXattrs(xs []Xattr) error {
	if len(xs) == 0 {
		return nil
	}
	m := make(map[string]string, len(xs))
	for _, x := range xs {
		m[x.Name] = string(x.Value)
	}
	sorted, err := SortXattrs(m)
	if err == nil && !slices.EqualFunc(xs, sorted, func(a, b Xattr) bool { return a.Name == b.Name }) {
		err = fmt.Errorf("%w: extended attributes out of order", ErrMalformed)
	}
	return err
}

// readPieces reads the frames and pieces of a bundle.
func readPieces(build *Builder, d *tocDecoder, b *Bundle, size int64, np int, digests []byte) error {
	pieces := make([]Piece, np)
	var data, frame int64
	for i := range pieces {
		p := &pieces[i]
		gap, n := d.uint(), d.uint()
		frame += d.int()
		inner := d.uint()
		if d.short || gap > uint64(size) || n == 0 || n > uint64(size) || int64(gap) > size-data || int64(n) > size-data-int64(gap) || inner > math.MaxInt64/2 ||
			frame < 0 || b.Points == nil || frame >= int64(b.Points.Len()) {
			return fmt.Errorf("%w: piece %d", ErrMalformed, i)
		}
		*p = Piece{Data: data + int64(gap), Size: int64(n), Frame: int(frame), Inner: int64(inner), Digest: [sha256.Size]byte(digests[i*sha256.Size:])}
		data = p.Data + p.Size
		if p.Digest == ([sha256.Size]byte{}) {
			return fmt.Errorf("%w: piece %d has no digest", ErrMalformed, i)
		}
	}
	kind := Raw
	if len(d.s) > 0 {
		kind = Kind(d.s[0])
	}
	if kind != Raw && kind != Deflate && kind != Blocks {
		return fmt.Errorf("%w: frames of %v", ErrMalformed, kind)
	}
	if b.Points != nil {
		for i := range b.Points.Len() {
			p, end := b.Points.At(i), b.Size
			if i+1 < b.Points.Len() {
				end = b.Points.At(i + 1).In
			}
			if p.Start() >= end || end > b.Size {
				return fmt.Errorf("%w: frame %d ends at %d of a blob of %d", ErrMalformed, i, end, b.Size)
			}
			build.AddFrame(Frame{Offset: p.Start(), Length: end - p.Start(), Kind: kind, Point: i + 1})
		}
	}
	for _, p := range pieces {
		build.AddPiece(p)
	}
	return nil
}
