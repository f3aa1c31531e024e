package index

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
	"sort"
)

// Kind says how a frame's bytes are had from its blob.
type Kind uint8

const (
	Raw     Kind = iota + 1 // as they lie in the blob
	Gzip                    // gzip members, decompressed from the frame's offset
	Zstd                    // zstd frames, decompressed from the frame's offset
	Stream                  // only by decompressing the blob from its start
	Deflate                 // blocks of a gzip blob, decompressed from the frame's point
	Blocks                  // blocks of a zstd blob, decompressed from the frame's point
)

func (k Kind) String() string {
	switch k {
	case Raw:
		return "raw"
	case Gzip:
		return "gzip"
	case Zstd:
		return "zstd"
	case Stream:
		return "stream"
	case Deflate:
		return "deflate"
	case Blocks:
		return "zstd blocks"
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// Frame is a compressed range of a blob that can be decompressed on its own.
type Frame struct {
	Offset int64 // in the blob
	Length int64 // bytes in the blob
	Kind   Kind
	Point  int // one more than the number of its point among the layer's [Points]; 0 where it has none
}

// Piece is what a frame gives to the data file, with the digest that proves it:
// zero where only the digest of the frame's point proves it.
type Piece struct {
	Data   int64 // offset in the data file
	Size   int64 // bytes
	Frame  int   // the frame that holds it
	Inner  int64 // offset in the decompressed frame
	Digest [sha256.Size]byte
}

// Frames is the frame table of a layer in the form it has on disk: fixed-size
// records, read in place, so that an open table costs no heap per file. It is
// immutable and safe for concurrent use.
//
// The records are: pieces in the order of the data file; frames in the order of
// the blob, each with the range of byFrame that lists its pieces; byFrame, the
// pieces in the order of (frame, inner); byDigest, in the order of digests.
type Frames struct {
	raw      []byte
	pieces   []byte
	frames   []byte
	byFrame  []byte
	byDigest []byte
	nPieces  int
	nFrames  int
	dataSize int64
}

const (
	framesMagic  = "varvefr3"
	framesHeader = 8 + 4 + 4 + 8 + 8 // magic, pieces, frames, data size, CRC-32C of the rest
	pieceSize    = 8 + 8 + 4 + 8 + sha256.Size
	frameSize    = 8 + 8 + 4 + 4 + 4 + 1
)

// newFrames encodes a table. Pieces must lie in the order of the data file.
func newFrames(frames []Frame, pieces []Piece, dataSize int64) *Frames {
	buf := framesBuffer(len(frames), len(pieces))
	for i := range pieces {
		buf = appendPiece(buf, &pieces[i])
	}
	return sealFrames(buf, frames, len(pieces), dataSize)
}

// framesBuffer gives the room that a table takes, with that of its header in use.
func framesBuffer(frames, pieces int) []byte {
	return make([]byte, framesHeader, framesHeader+pieces*(pieceSize+8)+frames*frameSize)
}

func appendPiece(buf []byte, p *Piece) []byte {
	le := binary.LittleEndian
	buf = le.AppendUint64(buf, uint64(p.Data))
	buf = le.AppendUint64(buf, uint64(p.Size))
	buf = le.AppendUint32(buf, uint32(p.Frame))
	buf = le.AppendUint64(buf, uint64(p.Inner))
	return append(buf, p.Digest[:]...)
}

// sealFrames makes a table of a buffer that so many pieces were appended to.
func sealFrames(buf []byte, frames []Frame, nPieces int, dataSize int64) *Frames {
	le := binary.LittleEndian
	pieces := buf[framesHeader:]
	frameOf := func(i uint32) int { return int(le.Uint32(pieces[int(i)*pieceSize+16:])) }
	inner := func(i uint32) int64 { return int64(le.Uint64(pieces[int(i)*pieceSize+20:])) }
	// By frame first, which is counting, then each frame's few.
	order := make([]uint32, nPieces)
	ends := make([]uint32, len(frames)+1)
	for i := range order {
		ends[frameOf(uint32(i))+1]++
	}
	for i := range frames {
		ends[i+1] += ends[i]
	}
	for i := range order {
		at := &ends[frameOf(uint32(i))]
		order[*at] = uint32(i)
		*at++
	}
	for i, from := 0, uint32(0); i < len(frames); i++ {
		slices.SortFunc(order[from:ends[i]], func(a, b uint32) int {
			return cmp.Or(cmp.Compare(inner(a), inner(b)), cmp.Compare(a, b))
		})
		from = ends[i]
	}
	at := 0
	for i, f := range frames {
		from := at
		for at < len(order) && frameOf(order[at]) == i {
			at++
		}
		buf = le.AppendUint64(buf, uint64(f.Offset))
		buf = le.AppendUint64(buf, uint64(f.Length))
		buf = le.AppendUint32(buf, uint32(from))
		buf = le.AppendUint32(buf, uint32(at-from))
		buf = le.AppendUint32(buf, uint32(f.Point))
		buf = append(buf, byte(f.Kind))
	}
	for _, i := range order {
		buf = le.AppendUint32(buf, i)
	}
	byDigest(pieces, order)
	for _, i := range order {
		buf = le.AppendUint32(buf, i)
	}
	copy(buf, framesMagic)
	le.PutUint32(buf[8:], uint32(nPieces))
	le.PutUint32(buf[12:], uint32(len(frames)))
	le.PutUint64(buf[16:], uint64(dataSize))
	le.PutUint64(buf[24:], uint64(crc32.Checksum(buf[framesHeader:], castagnoli)))
	t, err := ParseFrames(buf)
	if err != nil {
		panic(err) // the encoder and the decoder disagree
	}
	return t
}

// byDigest fills order with the numbers of encoded pieces in the order of their
// digests, which begin as random numbers do.
func byDigest(pieces []byte, order []uint32) {
	type key struct {
		first uint64
		i     uint32
	}
	digest := func(i uint32) []byte { return pieces[int(i)*pieceSize+28 : (int(i)+1)*pieceSize] }
	keys := make([]key, len(order))
	for i := range keys {
		keys[i] = key{binary.BigEndian.Uint64(digest(uint32(i))), uint32(i)}
	}
	slices.SortFunc(keys, func(a, b key) int {
		if a.first != b.first {
			return cmp.Compare(a.first, b.first)
		}
		return cmp.Or(bytes.Compare(digest(a.i), digest(b.i)), cmp.Compare(a.i, b.i))
	})
	for i, k := range keys {
		order[i] = k.i
	}
}

// Proven gives a table of what lies before contents in the data file, with
// digests of its pieces in the place of none. The data file keeps its size.
func (t *Frames) Proven(contents int64, digest func(Piece) ([sha256.Size]byte, error)) (*Frames, error) {
	frames := make([]Frame, t.nFrames)
	for i := range frames {
		frames[i] = t.Frame(i)
	}
	var pieces []Piece
	for i := range t.nPieces {
		p := t.Piece(i)
		if p.Data >= contents {
			break
		}
		if p.Digest == ([sha256.Size]byte{}) {
			var err error
			if p.Digest, err = digest(p); err != nil {
				return nil, err
			}
		}
		pieces = append(pieces, p)
	}
	return newFrames(frames, pieces, t.dataSize), nil
}

// ParseFrames reads a frame table from its bytes, which it keeps and which must
// not change. It checks sizes and references, not the sum: see [Frames.Verify].
func ParseFrames(raw []byte) (*Frames, error) {
	le := binary.LittleEndian
	if len(raw) < framesHeader || string(raw[:8]) != framesMagic {
		return nil, fmt.Errorf("%w: not a frame table", ErrMalformed)
	}
	t := &Frames{
		raw:      raw,
		nPieces:  int(le.Uint32(raw[8:])),
		nFrames:  int(le.Uint32(raw[12:])),
		dataSize: int64(le.Uint64(raw[16:])),
	}
	want := int64(framesHeader) + int64(t.nPieces)*(pieceSize+8) + int64(t.nFrames)*frameSize
	if int64(len(raw)) != want || t.dataSize < 0 || t.dataSize > MaxDataSize {
		return nil, fmt.Errorf("%w: frame table of %d bytes, want %d", ErrMalformed, len(raw), want)
	}
	rest := raw[framesHeader:]
	take := func(n int) (b []byte) { b, rest = rest[:n:n], rest[n:]; return b }
	t.pieces = take(t.nPieces * pieceSize)
	t.frames = take(t.nFrames * frameSize)
	t.byFrame = take(t.nPieces * 4)
	t.byDigest = take(t.nPieces * 4)
	return t, nil
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Verify checks the table against the sum in its header, and every reference in
// it, so that afterwards its methods cannot fail. The sum is against damage: a
// table is made here and lies where its owner alone writes, and it is summed
// whenever its layer is opened, when SHA-256 would take most of a mount's time.
func (t *Frames) Verify() error {
	if uint64(crc32.Checksum(t.raw[framesHeader:], castagnoli)) != binary.LittleEndian.Uint64(t.raw[24:]) {
		return fmt.Errorf("%w: frame table does not match its sum", ErrMalformed)
	}
	var end int64
	for i := range t.nPieces {
		p := t.Piece(i)
		if p.Frame >= t.nFrames || p.Data < end || p.Size <= 0 || p.Size > t.dataSize-p.Data || p.Inner < 0 {
			return fmt.Errorf("%w: frame table: piece %d", ErrMalformed, i)
		}
		end = p.Data + p.Size
		le := binary.LittleEndian
		if le.Uint32(t.byFrame[4*i:]) >= uint32(t.nPieces) || le.Uint32(t.byDigest[4*i:]) >= uint32(t.nPieces) {
			return fmt.Errorf("%w: frame table: order of piece %d", ErrMalformed, i)
		}
	}
	for i := range t.nFrames {
		f := t.Frame(i)
		from, n := t.frameRange(i)
		if f.Offset < 0 || f.Length < 0 || from > t.nPieces || n > t.nPieces-from {
			return fmt.Errorf("%w: frame table: frame %d", ErrMalformed, i)
		}
	}
	return nil
}

// Len gives the number of frames, of pieces, and the bytes of the data file.
func (t *Frames) Len() (frames, pieces int, dataSize int64) { return t.nFrames, t.nPieces, t.dataSize }

// WriteTo writes the table as [ParseFrames] reads it.
func (t *Frames) WriteTo(w io.Writer) (int64, error) {
	n, err := w.Write(t.raw)
	return int64(n), err
}

// Frame gives frame i.
func (t *Frames) Frame(i int) Frame {
	r := t.frames[i*frameSize : (i+1)*frameSize]
	le := binary.LittleEndian
	return Frame{Offset: int64(le.Uint64(r)), Length: int64(le.Uint64(r[8:])), Point: int(le.Uint32(r[24:])), Kind: Kind(r[28])}
}

func (t *Frames) frameRange(i int) (from, n int) {
	r := t.frames[i*frameSize+16:]
	return int(binary.LittleEndian.Uint32(r)), int(binary.LittleEndian.Uint32(r[4:]))
}

// Piece gives piece i, in the order of the data file.
func (t *Frames) Piece(i int) Piece {
	r := t.pieces[i*pieceSize : (i+1)*pieceSize]
	le := binary.LittleEndian
	return Piece{
		Data: int64(le.Uint64(r)), Size: int64(le.Uint64(r[8:])),
		Frame: int(le.Uint32(r[16:])), Inner: int64(le.Uint64(r[20:])),
		Digest: [sha256.Size]byte(r[28:]),
	}
}

// FramePieces gives the pieces of frame i in the order in which they come out of
// it.
func (t *Frames) FramePieces(i int) []Piece {
	from, n := t.frameRange(i)
	ps := make([]Piece, n)
	for k := range ps {
		ps[k] = t.Piece(int(binary.LittleEndian.Uint32(t.byFrame[4*(from+k):])))
	}
	return ps
}

// IsProven reports whether the table is one that Proven gave: every piece lies
// before contents and has a digest.
func (t *Frames) IsProven(contents int64) bool {
	for i := range t.nPieces {
		if p := t.Piece(i); p.Data >= contents || p.Digest == ([sha256.Size]byte{}) {
			return false
		}
	}
	return true
}

// Holds reports whether frame i has a piece before an offset of the data file.
func (t *Frames) Holds(i int, before int64) bool {
	from, n := t.frameRange(i)
	for k := range n {
		at := int(binary.LittleEndian.Uint32(t.byFrame[4*(from+k):]))
		if int64(binary.LittleEndian.Uint64(t.pieces[at*pieceSize:])) < before {
			return true
		}
	}
	return false
}

// PiecesIn gives the half-open range of pieces that have bytes in
// [off, off+n) of the data file. Bytes in no piece are zeroes by right: holes,
// and what lies between a file's end and its last block's.
func (t *Frames) PiecesIn(off, n int64) (from, to int) {
	at := func(i int) (data, size int64) {
		r := t.pieces[i*pieceSize:]
		return int64(binary.LittleEndian.Uint64(r)), int64(binary.LittleEndian.Uint64(r[8:]))
	}
	from = sort.Search(t.nPieces, func(i int) bool { d, s := at(i); return d+s > off })
	to = from
	for to < t.nPieces {
		if d, _ := at(to); d >= off+n {
			break
		}
		to++
	}
	return from, to
}

// FrameOf gives the frame of piece i, without decoding the rest of it.
func (t *Frames) FrameOf(i int) int {
	return int(binary.LittleEndian.Uint32(t.pieces[i*pieceSize+16:]))
}

// Find gives a piece with this digest, if the layer has one.
func (t *Frames) Find(digest [sha256.Size]byte) (Piece, bool) {
	order := func(k int) int { return int(binary.LittleEndian.Uint32(t.byDigest[4*k:])) }
	k, found := sort.Find(t.nPieces, func(k int) int {
		i := order(k)
		return bytes.Compare(digest[:], t.pieces[i*pieceSize+28:(i+1)*pieceSize])
	})
	if !found {
		return Piece{}, false
	}
	return t.Piece(order(k)), true
}
