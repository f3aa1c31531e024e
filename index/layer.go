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
	entries slabs[Entry]
	files   slabs[pendingFile]
	chunks  slabs[pendingChunk] // of files, those of one together
	pieces  []Piece
	frames  []Frame
	meta    int64 // bytes of names, link targets and extended attributes
	next    int64 // end of the data file so far, a multiple of BlockSize
}

type pendingFile struct {
	entry  uint32
	chunks uint32 // the number of the first
	n      uint32 // how many
}

// pendingChunk is a [Chunk] that is no hole. The next of its file begins where it
// ends, but for holes.
type pendingChunk struct {
	file, size       int64
	blob, end, inner int64
	digest           [sha256.Size]byte
}

// NewBuilder starts a layer whose TOC's frames are of the given kind.
func NewBuilder(kind Kind) *Builder { return &Builder{kind: kind} }

// Add appends an entry that brings no chunks: anything but a regular file, an
// empty file, or one whose contents the caller placed with [Builder.Reserve].
// The name must come from [Clean].
func (b *Builder) Add(e Entry) error {
	if b.entries.n >= MaxEntries {
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
	b.entries.add(e)
	return nil
}

// AddFile appends a regular file with its chunks in the order of the file. They
// must cover it from the first byte to the last without gap or overlap. They stay
// the caller's.
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
	if e.Size == 0 {
		return b.Add(e)
	}
	f := pendingFile{entry: uint32(b.entries.n), chunks: uint32(b.chunks.n)}
	if err := b.Add(e); err != nil {
		return err
	}
	for i := range chunks {
		if c := &chunks[i]; !c.Hole {
			b.chunks.add(pendingChunk{c.File, c.Size, c.Blob, c.End, c.Inner, c.Digest})
			f.n++
		}
	}
	b.files.add(f)
	return nil
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
	b.entries.grow(entries)
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
	if b.files.n == 0 {
		return &Layer{Entries: b.entries.take(), Frames: newFrames(b.frames, b.pieces, b.next)}, nil
	}
	t, err := b.place(dataEnd)
	if err != nil {
		return nil, err
	}
	b.files, b.chunks = slabs[pendingFile]{}, slabs[pendingChunk]{}
	return &Layer{Entries: b.entries.take(), Frames: t}, nil
}

// place lays the pending files into the data file in the order of the blob, so
// that neighbours in the image are neighbours on disk, and derives the frames.
func (b *Builder) place(dataEnd int64) (*Frames, error) {
	files := b.files.take()
	first := func(f *pendingFile) (off, inner int64) {
		if f.n == 0 {
			return 0, 0
		}
		c := b.chunks.at(int(f.chunks))
		return c.blob, c.inner
	}
	slices.SortStableFunc(files, func(x, y pendingFile) int {
		xo, xi := first(&x)
		yo, yi := first(&y)
		return cmp.Or(cmp.Compare(xo, yo), cmp.Compare(xi, yi))
	})
	known := len(b.frames)
	if err := b.derive(dataEnd); err != nil {
		return nil, err
	}
	derived := b.frames[known:]
	buf := framesBuffer(len(b.frames), len(b.pieces)+b.chunks.n)
	for i := range b.pieces {
		buf = appendPiece(buf, &b.pieces[i])
	}
	for i := range files {
		f := &files[i]
		e := b.entries.at(int(f.entry))
		off, err := b.Reserve(e.Size)
		if err != nil {
			return nil, fmt.Errorf("%q: %w", clip(e.Name), err)
		}
		e.Data = off
		for k := range f.n {
			c := b.chunks.at(int(f.chunks + k))
			n, _ := slices.BinarySearchFunc(derived, c.blob, func(f Frame, off int64) int { return cmp.Compare(f.Offset, off) })
			buf = appendPiece(buf, &Piece{Data: off + c.file, Size: c.size, Frame: known + n, Inner: c.inner, Digest: c.digest})
		}
	}
	return sealFrames(buf, b.frames, len(b.pieces)+b.chunks.n, b.next), nil
}

// derive makes the frames that the pending chunks lie in.
func (b *Builder) derive(dataEnd int64) error {
	type span struct{ off, end int64 } // end is 0 where the TOC does not say
	spans := make([]span, b.chunks.n)
	for i := range spans {
		c := b.chunks.at(i)
		spans[i] = span{c.blob, c.end}
	}
	// The last of those that begin at one place is the one that ends last.
	slices.SortFunc(spans, func(x, y span) int { return cmp.Or(cmp.Compare(x.off, y.off), cmp.Compare(x.end, y.end)) })
	n := 0
	for i, s := range spans {
		if i+1 == len(spans) || spans[i+1].off != s.off {
			spans[n] = s
			n++
		}
	}
	spans = spans[:n]
	b.frames = slices.Grow(b.frames, n)
	for i, s := range spans {
		limit := dataEnd
		if i+1 < n {
			limit = spans[i+1].off
		}
		if s.end == 0 {
			s.end = limit
		}
		if s.off >= s.end || s.end > limit || s.end-s.off > MaxBlobFrame {
			return fmt.Errorf("%w: frame at %d ends at %d, past %d", ErrMalformed, s.off, s.end, limit)
		}
		b.frames = append(b.frames, Frame{Offset: s.off, Length: s.end - s.off, Kind: b.kind})
	}
	return nil
}

func alignUp[T int | int64](n, to T) T { return (n + to - 1) / to * to }
