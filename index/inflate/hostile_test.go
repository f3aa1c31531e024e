package inflate

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"github.com/varvefs/varve/index"
)

// bitWriter writes deflate by hand.
type bitWriter struct {
	b []byte
	n int
}

// put writes n bits, the lowest first.
func (w *bitWriter) put(v uint, n int) *bitWriter {
	for i := range n {
		if w.n%8 == 0 {
			w.b = append(w.b, 0)
		}
		w.b[w.n/8] |= byte(v>>i&1) << (w.n % 8)
		w.n++
	}
	return w
}

// code writes a Huffman code of n bits, the highest first.
func (w *bitWriter) code(v uint, n int) *bitWriter {
	for i := n - 1; i >= 0; i-- {
		w.put(v>>i, 1)
	}
	return w
}

// dynamic begins a last block with the lengths of its codes. Each is written as it
// is, in four bits.
func dynamic(lit map[int]uint, dist ...uint) *bitWriter {
	nlit := 257
	for s := range lit {
		nlit = max(nlit, s+1)
	}
	w := new(bitWriter).put(5, 3).put(uint(nlit-257), 5).put(uint(len(dist)-1), 5).put(15, 4)
	for _, s := range order {
		if s < 16 {
			w.put(4, 3)
		} else {
			w.put(0, 3)
		}
	}
	for s := range nlit {
		w.code(lit[s], 4)
	}
	for _, n := range dist {
		w.code(n, 4)
	}
	return w
}

func fixedBlock() *bitWriter { return new(bitWriter).put(3, 3) }

// a is the fixed code of a literal.
func (w *bitWriter) a() *bitWriter { return w.code(0x30+'a', 8) }

func (w *bitWriter) eob() *bitWriter { return w.put(0, 7) }

func TestMalformed(t *testing.T) {
	head := []byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0}
	good := compress(t, []byte("hello"), 6)
	change := func(at int, to byte) []byte {
		b := bytes.Clone(good)
		b[at] = to
		return b
	}
	deflate := func(w *bitWriter) []byte { return append(append(bytes.Clone(head), w.b...), make([]byte, 64)...) }
	for name, blob := range map[string][]byte{
		"no magic":                  change(0, 0),
		"no second magic":           change(1, 0x8c),
		"method":                    change(2, 7),
		"long name":                 append(append(bytes.Clone(head[:3]), hasName, 0, 0, 0, 0, 0, 0), bytes.Repeat([]byte("n"), 5000)...),
		"long comment":              append(append(bytes.Clone(head[:3]), hasComment, 0, 0, 0, 0, 0, 0), bytes.Repeat([]byte("n"), 5000)...),
		"header sum":                append(append(bytes.Clone(head[:3]), hasSum, 0, 0, 0, 0, 0, 0, 1, 2), good[10:]...),
		"sum":                       change(len(good)-8, good[len(good)-8]+1),
		"size":                      change(len(good)-1, 1),
		"data behind the end":       append(bytes.Clone(good), "tail"...),
		"data behind the padding":   append(bytes.Clone(good), "\x00\x00\x1f\x8b"...),
		"other magic behind":        append(bytes.Clone(good), 0x1f, 0x8c, 8),
		"block of type 3":           deflate(new(bitWriter).put(7, 3)),
		"stored complement":         append(bytes.Clone(head), 1, 5, 0, 5, 0, 'h', 'e', 'l', 'l', 'o'),
		"too many literals":         deflate(new(bitWriter).put(5, 3).put(30, 5).put(0, 5).put(15, 4)),
		"too many distances":        deflate(new(bitWriter).put(5, 3).put(0, 5).put(30, 5).put(15, 4)),
		"lengths oversubscribed":    deflate(new(bitWriter).put(5, 3).put(0, 5).put(0, 5).put(0, 4).put(1, 3).put(1, 3).put(1, 3)),
		"lengths incomplete":        deflate(new(bitWriter).put(5, 3).put(0, 5).put(0, 5).put(0, 4).put(2, 3).put(2, 3).put(2, 3)),
		"no lengths":                deflate(new(bitWriter).put(5, 3).put(0, 5).put(0, 5).put(0, 4)),
		"nothing to repeat":         deflate(new(bitWriter).put(5, 3).put(0, 5).put(0, 5).put(0, 4).put(1, 3).put(1, 3).put(0, 9)),
		"too many lengths":          deflate(new(bitWriter).put(5, 3).put(0, 5).put(0, 5).put(0, 4).put(0, 6).put(1, 3).put(1, 3).put(1, 1).put(127, 7).put(1, 1).put(127, 7)),
		"no end of block":           deflate(dynamic(map[int]uint{'a': 1, 'b': 1}, 1)),
		"literals oversubscribed":   deflate(dynamic(map[int]uint{'a': 1, 'b': 1, 256: 1}, 1)),
		"literals incomplete":       deflate(dynamic(map[int]uint{'a': 2, 'b': 2, 256: 2}, 1)),
		"single code of two bits":   deflate(dynamic(map[int]uint{256: 2}, 1)),
		"distances oversubscribed":  deflate(dynamic(map[int]uint{'a': 1, 256: 1}, 1, 1, 1)),
		"distances incomplete":      deflate(dynamic(map[int]uint{'a': 1, 256: 1}, 1, 2)),
		"single distance, two bits": deflate(dynamic(map[int]uint{'a': 1, 256: 1}, 2)),
		"the other of one code":     deflate(dynamic(map[int]uint{256: 1}, 1).put(1, 1)),
		"no distances":              deflate(dynamic(map[int]uint{'a': 2, 'b': 2, 256: 2, 257: 2}, 0).code(0, 2).code(3, 2)),
		"the other of one distance": deflate(dynamic(map[int]uint{'a': 2, 'b': 2, 256: 2, 257: 2}, 1).code(0, 2).code(3, 2).put(1, 1)),
		"too far at once":           deflate(fixedBlock().code(1, 7).code(0, 5)),
		"too far by one":            deflate(fixedBlock().a().code(1, 7).code(1, 5)),
		"too far by much":           deflate(fixedBlock().a().code(1, 7).code(29, 5).put(0x1fff, 13)),
		"length 286":                deflate(fixedBlock().a().code(0xc6, 8).code(0, 5)),
		"length 287":                deflate(fixedBlock().a().code(0xc7, 8).code(0, 5)),
		"distance 30":               deflate(fixedBlock().a().code(1, 7).code(30, 5)),
		"distance 31":               deflate(fixedBlock().a().code(1, 7).code(31, 5)),
		"history of another member": append(bytes.Clone(good), deflate(fixedBlock().code(1, 7).code(0, 5))...),
	} {
		t.Run(name, func(t *testing.T) {
			for _, tail := range [][]byte{nil, make([]byte, 100)} { // by either loop
				_, err := io.ReadAll(NewReader(bytes.NewReader(append(bytes.Clone(blob), tail...)), Options{}))
				if !errors.Is(err, index.ErrMalformed) || errors.Is(err, io.ErrUnexpectedEOF) {
					t.Error(err)
				}
			}
		})
	}
}

// TestUnusual holds that what is rare and right is read.
func TestUnusual(t *testing.T) {
	head := []byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0}
	long := map[int]uint{256: 15, 'z': 15} // codes of every length
	for i := range 14 {
		long['a'+i] = uint(i + 1)
	}
	letters := dynamic(long, 0)
	for i := range 14 {
		letters.code(1<<(i+1)-2, i+1)
	}
	letters.code(1<<15-2, 15).code(1<<15-1, 15)
	for name, c := range map[string]struct {
		w    *bitWriter
		want string
	}{
		"a single code":         {dynamic(map[int]uint{256: 1}, 0).put(0, 1), ""},
		"no distances":          {dynamic(map[int]uint{'a': 1, 256: 1}, 0).code(0, 1).code(0, 1).code(1, 1), "aa"},
		"one distance":          {dynamic(map[int]uint{'a': 2, 'b': 2, 256: 2, 257: 2}, 1).code(0, 2).code(3, 2).put(0, 1).code(1, 2).code(2, 2), "aaaab"},
		"long codes":            {letters, "abcdefghijklmnz"},
		"258 both ways":         {fixedBlock().a().code(0xc4, 8).put(31, 5).code(0, 5).code(0xc5, 8).code(0, 5).eob(), string(bytes.Repeat([]byte("a"), 1+258+258))},
		"as far as can be":      {fixedBlock().a().a().code(1, 7).code(1, 5).eob(), "aaaaa"},
		"distance 2, length 11": {fixedBlock().a().code(0x30+'b', 8).code(9, 7).put(0, 1).code(1, 5).eob(), "abababababab" + "a"},
	} {
		t.Run(name, func(t *testing.T) {
			for _, pad := range []int{0, 100} {
				blob := append(seal(head, c.w.b, []byte(c.want)), make([]byte, pad)...)
				got, err := io.ReadAll(NewReader(bytes.NewReader(blob), Options{}))
				if err != nil || string(got) != c.want {
					t.Errorf("%q, %v; want %q", got, err, c.want)
				}
			}
		})
	}
}

func TestHostilePoint(t *testing.T) {
	data := mixed(200_000)
	blob := compress(t, data, 6)
	for _, p := range []index.Point{
		{In: 10, Bits: 8}, {In: 10, Bits: 255}, {In: -1}, {In: 0, Bits: 1}, {In: 10, Out: -1}, {In: 10, Out: 5, State: make([]byte, 6)}, {In: 10, Out: 1 << 20, State: make([]byte, history+1)},
	} {
		if z, err := Resume(bytes.NewReader(blob), p); !errors.Is(err, index.ErrMalformed) || z != nil {
			t.Errorf("%d/%d/%d: %v", p.In, p.Bits, p.Out, err)
		}
	}
	for in := range int64(40) {
		for bits := range uint8(8) {
			p := index.Point{In: 1 + in, Bits: bits, Out: 1 << 40, State: make([]byte, in*100)}
			z, err := Resume(bytes.NewReader(blob[p.Start():]), p)
			if err != nil {
				t.Fatal(err)
			}
			if n, err := io.Copy(io.Discard, z); err == nil && n != int64(len(data)) {
				t.Errorf("%d/%d: %d bytes", p.In, p.Bits, n)
			}
		}
	}
	// A state that is too short is told from one that has zeroes.
	var points []index.Point
	if _, err := io.Copy(io.Discard, NewReader(bytes.NewReader(blob), every(40_000, &points))); err != nil {
		t.Fatal(err)
	}
	p := points[1]
	p.State = p.State[1:]
	z, err := Resume(bytes.NewReader(blob[p.Start():]), p)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, z); !errors.Is(err, index.ErrMalformed) {
		t.Errorf("a state that lacks its first byte: %v", err)
	}
}
