package index

import (
	"cmp"
	"fmt"
	"io"
	"slices"
)

// A layer whose index somebody else made is read by it, and compared with what it
// is when all of it is here. For that the whole tar is needed: headers, padding,
// and what the index takes for holes. That is the rest; it lies in the data file
// behind the files' contents until then.

// WithRest adds pieces to a layer's table: all that its frames hold of the tar and
// its pieces do not name. They have no digest. Every frame must have a point, and
// size is the decompressed blob's. The data file grows by what it adds.
func WithRest(f *Frames, points *Points, size int64) (*Frames, error) {
	nf, np, contents := f.Len()
	if points == nil && nf > 0 || points != nil && nf != points.Len() {
		return nil, fmt.Errorf("%w: %d frames are not those of the points", ErrMalformed, nf)
	}
	if nf == 0 && size > 0 {
		return nil, fmt.Errorf("%w: no frame covers %d bytes", ErrMalformed, size)
	}
	frames := make([]Frame, nf)
	pieces := make([]Piece, np, np+nf)
	for i := range pieces {
		pieces[i] = f.Piece(i)
	}
	var rest []Piece
	next := contents
	for i := range frames {
		frames[i] = f.Frame(i)
		if frames[i].Point != i+1 {
			return nil, fmt.Errorf("%w: frame %d begins at point %d", ErrMalformed, i, frames[i].Point)
		}
		end := size
		if i+1 < nf {
			end = points.At(i + 1).Out
		}
		length := end - points.At(i).Out
		if length < 0 || i == 0 && points.At(0).Out != 0 {
			return nil, fmt.Errorf("%w: the points do not cover the layer", ErrMalformed)
		}
		var at int64
		gap := func(to int64) {
			if to > at {
				rest = append(rest, Piece{Data: next, Size: to - at, Frame: i, Inner: at})
				next += to - at
			}
		}
		for _, p := range f.FramePieces(i) {
			if p.Inner < at || p.Size > length-p.Inner {
				return nil, fmt.Errorf("%w: pieces of frame %d overlap or leave it", ErrMalformed, i)
			}
			gap(p.Inner)
			at = p.Inner + p.Size
		}
		gap(length)
	}
	if next > MaxDataSize {
		return nil, fmt.Errorf("%w: %d bytes of data, the limit is %d", ErrMalformed, next, int64(MaxDataSize))
	}
	return newFrames(frames, append(pieces, rest...), next), nil
}

// Rebuild gives the decompressed blob of a table with its rest, out of a data file
// in which all of it is present.
func Rebuild(f *Frames, data io.ReaderAt) io.Reader {
	frames, _, _ := f.Len()
	return &rebuilt{f: f, data: data, left: frames}
}

type rebuilt struct {
	f      *Frames
	data   io.ReaderAt
	frame  int
	left   int // frames
	pieces []Piece
}

func (r *rebuilt) Read(p []byte) (int, error) {
	for len(r.pieces) == 0 {
		if r.left == 0 {
			return 0, io.EOF
		}
		r.pieces = r.f.FramePieces(r.frame)
		slices.SortFunc(r.pieces, func(a, b Piece) int { return cmp.Compare(a.Inner, b.Inner) })
		r.frame++
		r.left--
	}
	q := &r.pieces[0]
	p = p[:min(int64(len(p)), q.Size)]
	n, err := r.data.ReadAt(p, q.Data)
	if n == len(p) {
		err = nil
	} else if err == nil || err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	q.Data += int64(n)
	if q.Size -= int64(n); q.Size == 0 {
		r.pieces = r.pieces[1:]
	}
	return n, err
}
