package index

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/klauspost/compress/zstd"
)

// Point is a place in a compressed blob where decompression can begin: at a
// block of a gzip member or of a zstd frame.
type Point struct {
	In   int64 // offset in the blob of the first byte that lies wholly behind the point
	Bits uint8 // gzip: how many bits of the byte before In lie behind it, the high ones; 0 to 7
	Out  int64 // offset in the decompressed blob

	// State is what the decompressor must know: of gzip the end of what comes
	// before Out, at most 32 KiB, with zeroes for what is not referred to again;
	// of zstd what its reader made of it. nil where nothing need be known.
	State []byte
	// Digest is the sha256 of the blob's bytes from Start to the In of the next
	// point that has a digest, or to the blob's end; zero where it is not known.
	Digest [sha256.Size]byte
}

// Start is the offset in the blob of the first byte that must be read.
func (p *Point) Start() int64 {
	if p.Bits > 0 {
		return p.In - 1
	}
	return p.In
}

// Limits on points, far above what is made here or by others.
const (
	MaxPoints = 1 << 20
	MaxState  = 160 << 20 // a zstd window of 128 MiB and its tables
)

// Points are the points of a layer in the form they have on disk: records of a
// fixed size, then their states, each compressed. They are immutable and safe for
// concurrent use.
type Points struct {
	raw     []byte
	records []byte
	states  []byte
	n       int
}

const (
	pointsMagic  = "varvept1"
	pointsHeader = 8 + 4 + 4                               // magic, points, CRC-32C of the records
	pointSize    = 8 + 8 + 1 + sha256.Size + 8 + 4 + 4 + 4 // In, Out, Bits, digest, where the state is, its bytes there and as it is, its CRC-32C
)

// PointsWriter gathers points. The zero value is ready.
type PointsWriter struct {
	records []byte
	states  []byte
	enc     *zstd.Encoder
	last    int64
}

// Add appends a point, of which it keeps no memory. They come in the order of the
// blob.
func (w *PointsWriter) Add(p Point) error {
	if p.In < 0 || p.Start() < 0 || p.Out < w.last || p.Bits > 7 || len(p.State) > MaxState || w.Len() >= MaxPoints {
		return fmt.Errorf("%w: point %d at %d of the blob, %d of the decompressed", ErrMalformed, w.Len(), p.In, p.Out)
	}
	w.last = p.Out
	le := binary.LittleEndian
	from := len(w.states)
	if len(p.State) > 0 {
		if w.enc == nil {
			var err error
			if w.enc, err = zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedDefault), zstd.WithEncoderCRC(false), zstd.WithSingleSegment(true)); err != nil {
				return err
			}
		}
		w.states = w.enc.EncodeAll(p.State, w.states)
	}
	r := w.records
	r = le.AppendUint64(r, uint64(p.In))
	r = le.AppendUint64(r, uint64(p.Out))
	r = append(r, p.Bits)
	r = append(r, p.Digest[:]...)
	r = le.AppendUint64(r, uint64(from))
	r = le.AppendUint32(r, uint32(len(w.states)-from))
	r = le.AppendUint32(r, uint32(len(p.State)))
	w.records = le.AppendUint32(r, crc32.Checksum(p.State, castagnoli))
	return nil
}

// Digest sets the digest of point i, which is known later than its state.
func (w *PointsWriter) Digest(i int, d [sha256.Size]byte) { copy(w.records[i*pointSize+17:], d[:]) }

// Len is the number of points so far.
func (w *PointsWriter) Len() int { return len(w.records) / pointSize }

// Bytes is what the points so far take.
func (w *PointsWriter) Bytes() int64 { return int64(len(w.records) + len(w.states)) }

// Points ends the gathering; nil if there are none.
func (w *PointsWriter) Points() *Points {
	if w.Len() == 0 {
		return nil
	}
	le := binary.LittleEndian
	raw := make([]byte, 0, pointsHeader+len(w.records)+len(w.states))
	raw = append(raw, pointsMagic...)
	raw = le.AppendUint32(raw, uint32(w.Len()))
	raw = le.AppendUint32(raw, crc32.Checksum(w.records, castagnoli))
	raw = append(append(raw, w.records...), w.states...)
	p, err := ParsePoints(raw)
	if err != nil {
		panic(err) // the encoder and the decoder disagree
	}
	return p
}

// ParsePoints reads points from their bytes, which it keeps and which must not
// change.
func ParsePoints(raw []byte) (*Points, error) {
	le := binary.LittleEndian
	if len(raw) < pointsHeader || string(raw[:8]) != pointsMagic {
		return nil, fmt.Errorf("%w: not a layer's points", ErrMalformed)
	}
	n := int64(le.Uint32(raw[8:]))
	if n > MaxPoints || n*pointSize > int64(len(raw)-pointsHeader) {
		return nil, fmt.Errorf("%w: %d points in %d bytes", ErrMalformed, n, len(raw))
	}
	p := &Points{raw: raw, n: int(n)}
	p.records, p.states = raw[pointsHeader:pointsHeader+n*pointSize], raw[pointsHeader+n*pointSize:]
	if crc32.Checksum(p.records, castagnoli) != le.Uint32(raw[12:]) {
		return nil, fmt.Errorf("%w: the points do not match their sum", ErrMalformed)
	}
	var in, out int64
	for i := range p.n {
		q := p.At(i)
		off, length, size, _ := p.state(i)
		if q.In < in || q.Start() < 0 || q.Out < out || q.Bits > 7 || off < 0 || off > int64(len(p.states)) || length > int64(len(p.states))-off || size > MaxState {
			return nil, fmt.Errorf("%w: point %d at %d of the blob, %d of the decompressed", ErrMalformed, i, q.In, q.Out)
		}
		in, out = q.In, q.Out
	}
	return p, nil
}

// Len is the number of points.
func (p *Points) Len() int { return p.n }

// At gives point i without its state.
func (p *Points) At(i int) Point {
	r := p.records[i*pointSize : (i+1)*pointSize]
	le := binary.LittleEndian
	return Point{In: int64(le.Uint64(r)), Out: int64(le.Uint64(r[8:])), Bits: r[16], Digest: [sha256.Size]byte(r[17:])}
}

func (p *Points) state(i int) (off, length, size int64, sum uint32) {
	r := p.records[i*pointSize+17+sha256.Size : (i+1)*pointSize]
	le := binary.LittleEndian
	return int64(le.Uint64(r)), int64(le.Uint32(r[8:])), int64(le.Uint32(r[12:])), le.Uint32(r[16:])
}

// Point gives point i with its state, which belongs to the caller.
func (p *Points) Point(i int) (Point, error) {
	q := p.At(i)
	off, length, size, sum := p.state(i)
	if size == 0 {
		return q, nil
	}
	var err error
	if q.State, err = expand(p.states[off:off+length], size); err != nil {
		return q, fmt.Errorf("%w: the state of point %d: %w", ErrMalformed, i, err)
	}
	if crc32.Checksum(q.State, castagnoli) != sum {
		return q, fmt.Errorf("%w: the state of point %d does not match its sum", ErrMalformed, i)
	}
	return q, nil
}

// WriteTo writes the points as [ParsePoints] reads them.
func (p *Points) WriteTo(w io.Writer) (int64, error) {
	n, err := w.Write(p.raw)
	return int64(n), err
}

// expand decompresses what must be size bytes.
func expand(b []byte, size int64) ([]byte, error) {
	d := expanders.Get().(*zstd.Decoder)
	defer expanders.Put(d)
	var h zstd.Header
	if err := h.Decode(b); err != nil {
		return nil, err
	}
	if !h.HasFCS || int64(h.FrameContentSize) != size {
		return nil, fmt.Errorf("%d bytes where %d are wanted", h.FrameContentSize, size)
	}
	out, err := d.DecodeAll(b, make([]byte, 0, size))
	if err == nil && int64(len(out)) != size {
		err = fmt.Errorf("%d bytes where %d are wanted", len(out), size)
	}
	return out, err
}
