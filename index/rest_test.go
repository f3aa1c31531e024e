package index

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"testing"
)

// cutLayer is a layer with what it was made of: a tar in frames, parts of which are
// contents of files.
type cutLayer struct {
	tar    []byte
	layer  *Layer
	pieces []Piece
	data   []byte // the contents, where they lie
}

// cut makes a layer at random. Nothing of it is compressed: a frame is the part of
// the tar between two points.
func cut(t testing.TB, r *rand.Rand) *cutLayer {
	t.Helper()
	c := &cutLayer{tar: make([]byte, 1+r.IntN(20_000))}
	for i := range c.tar {
		c.tar[i] = byte(1 + r.UintN(255))
	}
	b := NewBuilder(Raw)
	var w PointsWriter
	outs := []int{0}
	for range r.IntN(6) {
		outs = append(outs, r.IntN(len(c.tar)))
	}
	slices.Sort(outs) // two may be at one place
	outs = append(outs, len(c.tar))
	for i := range len(outs) - 1 {
		in := int64(10 * i)
		if err := w.Add(Point{In: in, Out: int64(outs[i])}); err != nil {
			t.Fatal(err)
		}
		b.AddFrame(Frame{Offset: in, Length: 10, Kind: Raw, Point: i + 1})
		for at := outs[i]; at < outs[i+1]; {
			n := 1 + r.IntN(min(3000, outs[i+1]-at))
			if r.IntN(2) > 0 {
				p := Piece{Size: int64(n), Frame: i, Inner: int64(at - outs[i]), Digest: sha256.Sum256(c.tar[at : at+n])}
				c.pieces = append(c.pieces, p)
			}
			at += n
		}
	}
	// The data file need not have them in the order of the tar.
	r.Shuffle(len(c.pieces), func(i, k int) { c.pieces[i], c.pieces[k] = c.pieces[k], c.pieces[i] })
	for i := range c.pieces {
		p := &c.pieces[i]
		var err error
		if p.Data, err = b.Reserve(p.Size + int64(r.IntN(5000))); err != nil {
			t.Fatal(err)
		}
		c.data = append(c.data, make([]byte, p.Data+p.Size-int64(len(c.data)))...)
		from := int64(outs[p.Frame]) + p.Inner
		copy(c.data[p.Data:], c.tar[from:from+p.Size])
		b.AddPiece(*p)
	}
	var err error
	if c.layer, err = b.Layer(int64(10 * (len(outs) - 1))); err != nil {
		t.Fatal(err)
	}
	c.layer.Points = w.Points()
	return c
}

// coveredOnce checks that every byte of the tar lies in one piece, and every piece by
// itself in the data file.
func coveredOnce(t testing.TB, f *Frames, points *Points, size int64) {
	t.Helper()
	if err := f.Verify(); err != nil {
		t.Fatal(err)
	}
	n, np, _ := f.Len()
	for i := range n {
		end := size
		if i+1 < n {
			end = points.At(i + 1).Out
		}
		at := points.At(i).Out
		for _, p := range f.FramePieces(i) {
			if points.At(i).Out+p.Inner != at {
				t.Fatalf("frame %d: %+v does not begin at %d of the tar", i, p, at)
			}
			at += p.Size
		}
		if at != end {
			t.Fatalf("frame %d: its pieces end at %d of the tar, it at %d", i, at, end)
		}
	}
	var end int64
	for i := range np {
		p := f.Piece(i)
		if p.Data < end {
			t.Fatalf("%+v overlaps what ends at %d", p, end)
		}
		end = p.Data + p.Size
	}
}

func TestWithRest(t *testing.T) {
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 5))
		c := cut(t, r)
		f, err := WithRest(c.layer.Frames, c.layer.Points, int64(len(c.tar)))
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		coveredOnce(t, f, c.layer.Points, int64(len(c.tar)))
		_, np, contents := c.layer.Frames.Len()
		_, n, size := f.Len()
		data := make([]byte, size)
		copy(data, c.data)
		for i := range n {
			p := f.Piece(i)
			if i < np {
				if p != c.layer.Frames.Piece(i) {
					t.Fatalf("seed %d: %+v was %+v", seed, p, c.layer.Frames.Piece(i))
				}
				continue
			}
			if p.Data < contents || p.Digest != [sha256.Size]byte{} {
				t.Fatalf("seed %d: %+v, behind contents of %d bytes", seed, p, contents)
			}
			from := c.layer.Points.At(p.Frame).Out + p.Inner
			copy(data[p.Data:], c.tar[from:from+p.Size])
		}
		got, err := io.ReadAll(Rebuild(f, bytes.NewReader(data)))
		if err != nil || !bytes.Equal(got, c.tar) {
			t.Fatalf("seed %d: %d bytes of %d, %v", seed, len(got), len(c.tar), err)
		}
		if _, err := io.ReadAll(Rebuild(f, bytes.NewReader(data[:size/2]))); size > 1 && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("seed %d: half a data file: %v", seed, err)
		}

		// What is proven has contents only, each with its digest.
		asked := 0
		proven, err := f.Proven(contents, func(p Piece) ([sha256.Size]byte, error) { asked++; return [sha256.Size]byte{1}, nil })
		if err != nil {
			t.Fatal(err)
		}
		if err := proven.Verify(); err != nil {
			t.Fatal(err)
		}
		frames, pieces, dataSize := proven.Len()
		if frames != c.layer.Points.Len() || pieces != np || dataSize != size || asked != 0 {
			t.Fatalf("seed %d: %d frames, %d pieces of %d, %d bytes of %d, asked %d times", seed, frames, pieces, np, dataSize, size, asked)
		}
		for i := range pieces {
			if proven.Piece(i) != f.Piece(i) {
				t.Fatalf("seed %d: %+v was %+v", seed, proven.Piece(i), f.Piece(i))
			}
		}
	}
}

func TestWithRestRefuses(t *testing.T) {
	build := func(frames []Frame, pieces ...Piece) *Frames { return newFrames(frames, pieces, 1<<16) }
	points := func(outs ...int64) *Points {
		var w PointsWriter
		for i, out := range outs {
			if err := w.Add(Point{In: int64(10 * i), Out: out}); err != nil {
				t.Fatal(err)
			}
		}
		return w.Points()
	}
	one := []Frame{{Length: 10, Kind: Raw, Point: 1}}
	two := []Frame{{Length: 10, Kind: Raw, Point: 1}, {Offset: 10, Length: 10, Kind: Raw, Point: 2}}
	for name, test := range map[string]struct {
		f    *Frames
		p    *Points
		size int64
	}{
		"no points":                {build(one), nil, 100},
		"no frames":                {build(nil), nil, 100},
		"points without frames":    {build(nil), points(0), 100},
		"one point too few":        {build(two), points(0), 100},
		"a frame without a point":  {build([]Frame{{Length: 10, Kind: Stream}}), points(0), 100},
		"frames of others' points": {build([]Frame{two[1], two[0]}), points(0, 50), 100},
		"it begins later":          {build(one), points(1), 100},
		"it ends before":           {build(two), points(0, 101), 100},
		"negative size":            {build(one), points(0), -1},
		"more than can be":         {build(one), points(0), MaxDataSize + 1},
		"overlap":                  {build(one, Piece{Size: 20}, Piece{Data: 4096, Size: 20, Inner: 19}), points(0), 100},
		"twice the same":           {build(one, Piece{Size: 20}, Piece{Data: 4096, Size: 20}), points(0), 100},
		"leaves its frame":         {build(two, Piece{Size: 51}), points(0, 50), 100},
		"leaves the layer":         {build(two, Piece{Size: 2, Frame: 1, Inner: 49}), points(0, 50), 100},
		"begins behind it":         {build(one, Piece{Size: 1, Inner: 100}), points(0), 100},
	} {
		if f, err := WithRest(test.f, test.p, test.size); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %+v, %v", name, f, err)
		}
	}
	f, err := WithRest(build(nil), nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(Rebuild(f, bytes.NewReader(nil))); len(b) != 0 || err != nil {
		t.Errorf("nothing is %q, %v", b, err)
	}
}
