package index

import (
	"cmp"
	"crypto/sha256"
	"fmt"
	"slices"
)

// Layer is what a reader of any format makes of one layer: its names in the
// order of the tar, and how its contents are had from its blob.
type Layer struct {
	Entries []Entry
	Frames  *Frames
	Points  *Points // nil where its frames need none
}

// Chunk is a part of a file as a TOC names it: where its frame begins in the
// blob and where in that frame, decompressed, its bytes lie.
type Chunk struct {
	File   int64 // offset in the file
	Size   int64 // bytes, decompressed
	Blob   int64 // offset of the frame in the blob
	End    int64 // where the frame ends in the blob, 0 if the TOC does not say
	Inner  int64 // offset of the chunk in the decompressed frame
	Digest [sha256.Size]byte
	Hole   bool // zeroes that the blob does not hold
}

// A Builder gathers the entries of one layer. The zero value is not usable; see
// [NewBuilder]. It is not safe for concurrent use.
type Builder struct {
	kind    Kind
	entries []Entry
	files   []pendingFile
	pieces  []Piece
	frames  []Frame
	meta    int64 // bytes of names, link targets and extended attributes
	next    int64 // end of the data file so far, a multiple of BlockSize
}

type pendingFile struct {
	entry  int
	chunks []Chunk
}

// NewBuilder starts a layer whose TOC's frames are of the given kind.
func NewBuilder(kind Kind) *Builder { return &Builder{kind: kind} }

// Add appends an entry that brings no chunks: anything but a regular file, an
// empty file, or one whose contents the caller placed with [Builder.Reserve].
// The name must come from [Clean].
func (b *Builder) Add(e Entry) error {
	if len(b.entries) >= MaxEntries {
		return fmt.Errorf("%w: more than %d entries in one layer", ErrMalformed, MaxEntries)
	}
	if err := e.check(); err != nil {
		return err
	}
	b.meta += int64(len(e.Name) + len(e.Link))
	for _, x := range e.Xattrs {
		b.meta += int64(len(x.Name) + len(x.Value))
	}
	if b.meta > MaxMeta {
		return fmt.Errorf("%w: more than %d bytes of names and extended attributes in one layer", ErrMalformed, MaxMeta)
	}
	b.entries = append(b.entries, e)
	return nil
}

// AddFile appends a regular file with its chunks in the order of the file. They
// must cover it from the first byte to the last without gap or overlap.
func (b *Builder) AddFile(e Entry, chunks []Chunk) error {
	var at int64
	for _, c := range chunks {
		switch {
		case c.File != at || c.Size <= 0 || c.Size > e.Size-at:
			return fmt.Errorf("%w: %q: chunk of %d bytes at %d does not follow %d of %d", ErrMalformed, clip(e.Name), c.Size, c.File, at, e.Size)
		case !c.Hole && (c.Blob < 0 || c.Inner < 0 || c.Inner > MaxFileSize || c.End != 0 && c.End <= c.Blob):
			return fmt.Errorf("%w: %q: chunk at %d lies at %d+%d of the blob", ErrMalformed, clip(e.Name), c.File, c.Blob, c.Inner)
		}
		at += c.Size
	}
	if at != e.Size {
		return fmt.Errorf("%w: %q: chunks cover %d of %d bytes", ErrMalformed, clip(e.Name), at, e.Size)
	}
	if e.Size > 0 {
		b.files = append(b.files, pendingFile{len(b.entries), chunks})
	}
	return b.Add(e)
}

// Reserve gives size bytes of the data file to the caller, who streams a layer
// and so meets contents in the blob's own order.
func (b *Builder) Reserve(size int64) (off int64, err error) {
	if size < 0 || size > MaxDataSize-b.next {
		return 0, fmt.Errorf("%w: a file of %d bytes after %d bytes of data, the limit is %d", ErrMalformed, size, b.next, int64(MaxDataSize))
	}
	off = b.next
	b.next = alignUp(off+size, BlockSize)
	return off, nil
}

// Grow makes room for so many more entries and pieces.
func (b *Builder) Grow(entries, pieces int) {
	b.entries = slices.Grow(b.entries, entries)
	b.pieces = slices.Grow(b.pieces, pieces)
}

// AddFrame records a frame and gives its number. Frames come in the order of the
// blob.
func (b *Builder) AddFrame(f Frame) int {
	b.frames = append(b.frames, f)
	return len(b.frames) - 1
}

// AddPiece records a piece, at a reserved place, of a frame that was added.
// Pieces come in the order of the data file.
func (b *Builder) AddPiece(p Piece) { b.pieces = append(b.pieces, p) }

// Reserved is the number of bytes of the data file that are given away.
func (b *Builder) Reserved() int64 { return b.next }

// Layer ends the building. dataEnd is where the blob's file contents end (the
// offset of the TOC, or the blob's size) and bounds the last frame.
func (b *Builder) Layer(dataEnd int64) (*Layer, error) {
	if err := b.place(dataEnd); err != nil {
		return nil, err
	}
	return &Layer{Entries: b.entries, Frames: newFrames(b.frames, b.pieces, b.next)}, nil
}

// place lays the pending files into the data file in the order of the blob, so
// that neighbours in the image are neighbours on disk, and derives the frames.
func (b *Builder) place(dataEnd int64) error {
	if len(b.files) == 0 {
		return nil
	}
	first := func(p pendingFile) (off, inner int64) {
		for _, c := range p.chunks {
			if !c.Hole {
				return c.Blob, c.Inner
			}
		}
		return 0, 0
	}
	slices.SortStableFunc(b.files, func(x, y pendingFile) int {
		xo, xi := first(x)
		yo, yi := first(y)
		return cmp.Or(cmp.Compare(xo, yo), cmp.Compare(xi, yi))
	})
	ends := map[int64]int64{} // frame offset to its end, 0 where the TOC does not say
	for _, p := range b.files {
		for _, c := range p.chunks {
			if !c.Hole {
				ends[c.Blob] = max(ends[c.Blob], c.End)
			}
		}
	}
	offsets := make([]int64, 0, len(ends))
	for off := range ends {
		offsets = append(offsets, off)
	}
	slices.Sort(offsets)
	number := make(map[int64]int, len(offsets))
	for i, off := range offsets {
		limit := dataEnd
		if i+1 < len(offsets) {
			limit = offsets[i+1]
		}
		end := ends[off]
		if end == 0 {
			end = limit
		}
		if off >= end || end > limit || end-off > MaxBlobFrame {
			return fmt.Errorf("%w: frame at %d ends at %d, past %d", ErrMalformed, off, end, limit)
		}
		number[off] = i
		b.frames = append(b.frames, Frame{Offset: off, Length: end - off, Kind: b.kind})
	}
	for _, p := range b.files {
		e := &b.entries[p.entry]
		off, err := b.Reserve(e.Size)
		if err != nil {
			return fmt.Errorf("%q: %w", clip(e.Name), err)
		}
		e.Data = off
		for _, c := range p.chunks {
			if c.Hole {
				continue
			}
			b.pieces = append(b.pieces, Piece{
				Data: off + c.File, Size: c.Size, Frame: number[c.Blob], Inner: c.Inner, Digest: c.Digest,
			})
		}
	}
	return nil
}

func alignUp[T int | int64](n, to T) T { return (n + to - 1) / to * to }
