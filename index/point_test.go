package index

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"math/rand/v2"
	"reflect"
	"slices"
	"testing"
)

func somePoints(r *rand.Rand, n int) (ps []Point) {
	var p Point
	for range n {
		p.In += r.Int64N(1 << 20)
		p.Out += r.Int64N(1 << 20)
		if p.Bits = 0; p.In > 0 {
			p.Bits = uint8(r.UintN(8))
		}
		if p.State = nil; r.IntN(3) > 0 {
			p.State = make([]byte, 1+r.IntN(1<<r.IntN(16)))
			for i := range p.State {
				p.State[i] = byte(r.UintN(4))
			}
		}
		if p.Digest = ([sha256.Size]byte{}); r.IntN(2) > 0 {
			p.Digest = sha256.Sum256(p.State)
		}
		ps = append(ps, p)
	}
	return ps
}

func pack(t testing.TB, ps []Point) *Points {
	t.Helper()
	var w PointsWriter
	for i, p := range ps {
		d := p.Digest
		p.Digest = [sha256.Size]byte{}
		if err := w.Add(p); err != nil {
			t.Fatal(err)
		}
		w.Digest(i, d)
	}
	if w.Len() != len(ps) || w.Bytes() < int64(len(ps)*pointSize) {
		t.Fatalf("%d points in %d bytes", w.Len(), w.Bytes())
	}
	return w.Points()
}

func TestPoints(t *testing.T) {
	if p := pack(t, nil); p != nil {
		t.Errorf("no points are %+v", p)
	}
	r := rand.New(rand.NewPCG(1, 2))
	for n := 1; n < 40; n += 3 {
		want := somePoints(r, n)
		p := pack(t, want)
		var buf bytes.Buffer
		if n, err := p.WriteTo(&buf); err != nil || n != int64(buf.Len()) {
			t.Fatalf("%d bytes of %d: %v", n, buf.Len(), err)
		}
		q, err := ParsePoints(buf.Bytes())
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range []*Points{p, q} {
			if p.Len() != n {
				t.Fatalf("%d points, want %d", p.Len(), n)
			}
			for i := range want {
				got, err := p.Point(i)
				if err != nil || !reflect.DeepEqual(got, want[i]) {
					t.Errorf("point %d differs, %v", i, err)
				}
				short := want[i]
				short.State = nil
				if got := p.At(i); !reflect.DeepEqual(got, short) {
					t.Errorf("point %d without its state: %+v", i, got)
				}
			}
		}
	}
}

func TestPointsWriterRefuses(t *testing.T) {
	var w PointsWriter
	if err := w.Add(Point{In: 10, Out: 20}); err != nil {
		t.Fatal(err)
	}
	for _, p := range []Point{{In: -1, Out: 30}, {In: 11, Out: 19}, {In: 0, Bits: 1, Out: 30}, {In: 11, Bits: 8, Out: 30}} {
		if err := w.Add(p); !errors.Is(err, ErrMalformed) {
			t.Errorf("%+v: %v", p, err)
		}
	}
	if w.Len() != 1 {
		t.Errorf("%d points", w.Len())
	}
}

// summed makes points that were changed match their sum.
func summed(raw []byte) []byte {
	n := int(binary.LittleEndian.Uint32(raw[8:]))
	binary.LittleEndian.PutUint32(raw[12:], crc32.Checksum(raw[pointsHeader:pointsHeader+n*pointSize], castagnoli))
	return raw
}

func TestHostilePoints(t *testing.T) {
	state := bytes.Repeat([]byte("state"), 100)
	var buf bytes.Buffer
	if _, err := pack(t, []Point{{In: 10, State: state}, {In: 100, Bits: 3, Out: 1000, State: state}, {In: 200, Out: 1000}}).WriteTo(&buf); err != nil {
		t.Fatal(err)
	}
	const second = pointsHeader + pointSize
	put := func(at int, v uint64) func([]byte) []byte {
		return func(b []byte) []byte { binary.LittleEndian.PutUint64(b[at:], v); return summed(b) }
	}
	put32 := func(at int, v uint32) func([]byte) []byte {
		return func(b []byte) []byte { binary.LittleEndian.PutUint32(b[at:], v); return summed(b) }
	}
	for name, test := range map[string]struct {
		change func([]byte) []byte
		later  bool // it is known when the second one is read
	}{
		"empty":             {func([]byte) []byte { return nil }, false},
		"header cut":        {func(b []byte) []byte { return b[:pointsHeader-1] }, false},
		"records cut":       {func(b []byte) []byte { return b[:second+pointSize] }, false},
		"states cut":        {func(b []byte) []byte { return b[:len(b)-1] }, false},
		"magic":             {func(b []byte) []byte { b[0]++; return b }, false},
		"record":            {func(b []byte) []byte { b[second]++; return b }, false},
		"too many":          {func(b []byte) []byte { binary.LittleEndian.PutUint32(b[8:], 1<<32-1); return b }, false},
		"In backwards":      {put(second, 9), false},
		"In negative":       {put(second, 1<<63), false},
		"Out backwards":     {put(pointsHeader+8, 1001), false},
		"Out negative":      {put(second+8, 1<<63|5), false},
		"bits":              {func(b []byte) []byte { b[second+16] = 8; return summed(b) }, false},
		"before the blob":   {func(b []byte) []byte { b[pointsHeader+16] = 1; return put(pointsHeader, 0)(b) }, false},
		"state elsewhere":   {put(second+49, 1<<40), false},
		"state before":      {put(second+49, 1<<63), false},
		"state long":        {put32(second+57, 1<<31), false},
		"state large":       {put32(second+61, MaxState+1), false},
		"state of other":    {put(second+49, 0), false}, // the same bytes: it is right
		"state shorter":     {put32(second+57, 5), true},
		"state not so long": {put32(second+61, 499), true},
		"state longer":      {put32(second+61, 501), true},
		"state's sum":       {put32(second+65, 1), true},
		"state's bytes":     {func(b []byte) []byte { b[len(b)-3] ^= 0x55; return b }, true},
	} {
		t.Run(name, func(t *testing.T) {
			p, err := ParsePoints(test.change(slices.Clone(buf.Bytes())))
			if name == "state of other" || test.later {
				if err != nil {
					t.Fatal(err)
				}
				_, err = p.Point(1)
			}
			if name == "state of other" {
				if err != nil {
					t.Error(err)
				}
			} else if !errors.Is(err, ErrMalformed) {
				t.Errorf("got %v", err)
			}
			if test.later {
				if _, err := p.Point(0); err != nil {
					t.Errorf("another point: %v", err)
				}
			}
		})
	}
}

// FuzzPoints reads anything as points: what is taken is in order, within bounds, and
// has no more state than it says.
func FuzzPoints(f *testing.F) {
	r := rand.New(rand.NewPCG(3, 4))
	for _, n := range []int{1, 2, 7} {
		var buf bytes.Buffer
		if _, err := pack(f, somePoints(r, n)).WriteTo(&buf); err != nil {
			f.Fatal(err)
		}
		f.Add(buf.Bytes())
	}
	f.Add([]byte(pointsMagic))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if len(raw) >= pointsHeader {
			if n := binary.LittleEndian.Uint32(raw[8:]); int64(n)*pointSize <= int64(len(raw)-pointsHeader) {
				raw = summed(slices.Clone(raw)) // else nothing gets past the sum
			}
		}
		p, err := ParsePoints(raw)
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Errorf("got %v", err)
			}
			return
		}
		var before Point
		for i := range p.Len() {
			q := p.At(i)
			if q.In < before.In || q.Out < before.Out || q.Start() < 0 || q.Bits > 7 {
				t.Errorf("%+v after %+v", q, before)
			}
			before = q
			if _, _, size, _ := p.state(i); size > 1<<20 {
				continue
			} else if q, err := p.Point(i); err != nil && !errors.Is(err, ErrMalformed) || err == nil && int64(len(q.State)) != size {
				t.Errorf("point %d: %d bytes of state of %d, %v", i, len(q.State), size, err)
			}
		}
	})
}
