package zstdblocks

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/iotest"

	"github.com/klauspost/compress/zstd"

	"github.com/varvefs/varve/index"
)

// sample is a blob and what it holds.
type sample struct {
	name    string
	blob    []byte
	content []byte
	inside  bool // it has blocks behind the first of a frame
}

func skippable(kind byte, n int) []byte {
	b := append([]byte{0x50 | kind}, skipMagic...)
	return append(binary.LittleEndian.AppendUint32(b, uint32(n)), make([]byte, n)...)
}

// rawFrame gives a frame by hand: a window of 1 KiB, no content size, no checksum.
func rawFrame(blocks ...[]byte) []byte {
	b := append([]byte(frameMagic), 0, 0)
	for _, x := range blocks {
		b = append(b, x...)
	}
	return append(b, 1, 0, 0) // an empty raw block, the last
}

func samples(t testing.TB) []sample {
	t.Helper()
	big, small := text(1, 1_200_000), text(2, 150_000)
	// Stretches of one kind each, so that blocks are raw, RLE, of literals only
	// or of few sequences.
	var mixed []byte
	noise := rand.New(rand.NewPCG(3, 3))
	for i := range 3 {
		mixed = append(mixed, text(uint64(i), 100_000)...)
		mixed = append(mixed, bytes.Repeat([]byte{byte(i)}, 300_000)...)
		for range 200_000 {
			mixed = append(mixed, byte(noise.Uint32()))
		}
		for range 150_000 {
			mixed = append(mixed, "abcdefgh"[noise.IntN(8)])
		}
	}
	var records []byte // of one length, so that codes are few
	for i := range 40_000 {
		records = append(binary.BigEndian.AppendUint32(append(records, "record of many "...), uint32(i*7919)), 0, 0, 0)
	}
	var s []sample
	add := func(name string, blob, content []byte, inside bool) {
		if blob != nil {
			s = append(s, sample{name, blob, content, inside})
		}
	}
	for _, c := range []struct {
		name string
		b    []byte
	}{{"text", big}, {"mixed", mixed}, {"records", records}} {
		for _, l := range []zstd.EncoderLevel{zstd.SpeedFastest, zstd.SpeedDefault, zstd.SpeedBetterCompression, zstd.SpeedBestCompression} {
			add(fmt.Sprintf("klauspost %v, %s", l, c.name), encode(t, c.b, zstd.WithEncoderLevel(l)), c.b, true)
		}
		for _, args := range [][]string{{"-1"}, {"-3"}, {"-9"}, {"-16"}, {"-19"}, {"--fast=5"}} {
			add(fmt.Sprintf("zstd %v, %s", args, c.name), cli(t, c.b, args...), c.b, true)
		}
	}
	for _, args := range [][]string{{"--no-check"}, {"--long=25"}, {"-19", "--zstd=wlog=17"}, {"--zstd=wlog=10"}, {"-T2", "-B512K"}, {"--rsyncable"}, {fmt.Sprintf("--stream-size=%d", len(big))}} {
		add(fmt.Sprintf("zstd %v", args), cli(t, big, args...), big, true)
	}
	// Small windows, so that much lies where nothing refers to a point.
	for _, args := range [][]string{{"-3", "--zstd=wlog=16"}, {"-17", "--zstd=wlog=14"}, {"-1", "--zstd=wlog=17"}} {
		b := slices.Concat(mixed, make([]byte, 3<<20), big, bytes.Repeat([]byte("abcdefghi"), 300_000), records)
		add(fmt.Sprintf("zstd %v, all", args), cli(t, b, args...), b, true)
	}
	add("klauspost, small window, all", encode(t, slices.Concat(mixed, make([]byte, 3<<20), big), zstd.WithWindowSize(1<<17)), slices.Concat(mixed, make([]byte, 3<<20), big), true)
	add("zstd, window too large for points inside", cli(t, big, "--long=27"), big, false)
	for _, w := range []int{1 << 10, 4 << 10, 64 << 10} {
		add(fmt.Sprintf("klauspost, window %d", w), encode(t, small, zstd.WithWindowSize(w)), small, true)
	}
	add("no checksum", encode(t, big, zstd.WithEncoderCRC(false)), big, true)
	add("no entropy", encode(t, big, zstd.WithNoEntropyCompression(true)), big, true)
	w, err := zstd.NewWriter(nil, zstd.WithSingleSegment(true), zstd.WithEncoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	all := func(b []byte) []byte { return w.EncodeAll(b, nil) }
	add("one segment", all(big), big, true)
	for _, n := range []int{1, 2, 255, 256, 257, 1023, 1025, 65791} {
		add(fmt.Sprintf("one segment of %d", n), all(big[:n]), big[:n], false)
	}
	add("no bytes", nil, nil, false)
	s = append(s, sample{"empty blob", []byte{}, nil, false})
	add("empty frame", encode(t, nil, zstd.WithZeroFrames(true)), nil, false)
	add("only skippable frames", slices.Concat(skippable(0, 0), skippable(15, 5000)), nil, false)
	var many, content []byte
	for i := range 40 {
		many = append(many, all(big[i*1000:i*1000+i*i*20])...)
		content = append(content, big[i*1000:i*1000+i*i*20]...)
		many = append(many, rawFrame()...)
		many = append(many, skippable(byte(i&15), i*100)...)
	}
	add("many frames", many, content, false)
	add("frames with blocks", slices.Concat(skippable(1, 10), encode(t, big), skippable(1, 0), encode(t, mixed), encode(t, small)), slices.Concat(big, mixed, small), true)
	byHand := []byte{0, 1, 2, 3, 4, 5, 6, 7, 8, 9}
	add("raw and RLE blocks by hand", rawFrame(
		appendBlock(nil, blockRaw, 10, byHand), appendBlock(nil, blockRLE, 1000, []byte{7}), appendBlock(nil, blockRaw, 0, nil),
		appendRepeat(nil, 1003), appendBlock(nil, blockRaw, 3, byHand[:3]), appendRepeat(nil, 5),
		appendBlock(nil, blockCompressed, 3, []byte{literalsRLE | 20<<3, 9, 0}), appendRepeat(nil, 21),
	), slices.Concat(byHand, bytes.Repeat([]byte{7}, 1000), byHand[7:], byHand[:3], []byte{8, 9, 0}, bytes.Repeat([]byte{9}, 20), []byte{0, 9, 9}), true)
	return s
}

func TestPoints(t *testing.T) {
	for _, s := range samples(t) {
		for _, span := range []int64{0, 200_000} {
			t.Run(fmt.Sprintf("%s/%d", s.name, span), func(t *testing.T) {
				got, ps := points(t, s.blob, every(span))
				if !bytes.Equal(got, s.content) {
					t.Fatalf("%d bytes where %d are right", len(got), len(s.content))
				}
				inside := 0
				for i, p := range ps {
					if p.State != nil {
						inside++
					}
					// With a point at every block a sample is enough.
					if span == 0 && len(ps) > 40 && i%(len(ps)/20) != 0 {
						continue
					}
					r, err := rest(s.blob, p)
					if err != nil || !bytes.Equal(r, s.content[p.Out:]) {
						t.Fatalf("point %d at %d, %d: %d bytes, want %d: %v", i, p.In, p.Out, len(r), len(s.content)-int(p.Out), err)
					}
				}
				if s.inside != (inside > 0) && span == 0 {
					t.Errorf("%d of %d points are inside a frame", inside, len(ps))
				}
			})
		}
	}
}

// The samples must hold what there is to be followed.
func TestSamples(t *testing.T) {
	seen := map[string]int{}
	for _, s := range samples(t) {
		f := feed{r: bufio.NewReader(bytes.NewReader(s.blob))}
		for f.next() == nil {
			b := f.block
			if f.unit == nil || b == nil {
				continue
			}
			f.unit, f.block = nil, nil
			seen[fmt.Sprint("block ", b.kind)]++
			if b.kind != blockCompressed {
				continue
			}
			data := b.buf[lead+blockHeader : lead+blockHeader+b.n]
			l, err := parseLiterals(data)
			if err != nil {
				t.Fatal(err)
			}
			seen[fmt.Sprint("literals ", l.kind)]++
			count, n, err := sequenceCount(data[l.to:])
			if err != nil {
				t.Fatal(err)
			}
			if count == 0 {
				seen["no sequences"]++
				continue
			}
			for i := range fields {
				seen[fmt.Sprint("field ", i, " mode ", data[l.to+n]>>(6-2*i)&3)]++
			}
		}
	}
	want := []string{"block 0", "block 1", "block 2", "literals 0", "literals 1", "literals 2", "literals 3", "no sequences"}
	for i := range fields {
		for m := range 4 {
			want = append(want, fmt.Sprint("field ", i, " mode ", m))
		}
	}
	for _, w := range want {
		if seen[w] == 0 && cli(t, nil) != nil { // one encoder alone has not all of them
			t.Errorf("no sample has %s", w)
		}
	}
	t.Log(seen)
}

// A State is the beginning of a frame: any decoder takes up from it.
func TestStateIsZstd(t *testing.T) {
	b := text(5, 900_000)
	blob := encode(t, b, zstd.WithEncoderCRC(false))
	_, ps := points(t, blob, every(300_000))
	for _, p := range ps {
		got, err := plain(slices.Concat(p.State, blob[p.In:]))
		if err != nil || !bytes.HasSuffix(got, b[p.Out:]) {
			t.Errorf("point at %d: %d bytes: %v", p.Out, len(got), err)
		}
	}
}

func TestInputOffset(t *testing.T) {
	b := text(6, 700_000)
	blob := slices.Concat(skippable(0, 100), encode(t, b), encode(t, b))
	var ps []index.Point
	var at []int64
	z := NewReader(bytes.NewReader(blob), Options{Want: every(100_000), Point: func(p index.Point) error { ps = append(ps, p); return nil }})
	defer z.Close()
	for {
		if z.AtPoint() {
			at = append(at, z.InputOffset())
		}
		if _, err := z.Read(make([]byte, 3000)); err != nil {
			break
		}
	}
	var want []int64
	for _, p := range ps {
		want = append(want, p.In)
	}
	if !slices.Equal(at, want) || z.InputOffset() != int64(len(blob)) {
		t.Errorf("at %v, the points are at %v; %d of %d", at, want, z.InputOffset(), len(blob))
	}
}

// Where no points are wanted inside frames, small ones are not traced.
func TestUntraced(t *testing.T) {
	b := text(7, 3<<20)
	blob := slices.Concat(encode(t, b), encode(t, b), encode(t, b))
	n := 0
	z := NewReader(bytes.NewReader(blob), Options{
		Want:  func(_, _ int64, inFrame bool) bool { return !inFrame },
		Point: func(p index.Point) error { n++; return nil },
	})
	defer z.Close()
	got, err := io.ReadAll(z)
	if err != nil || len(got) != 9<<20 || n != 3 || z.watch.running {
		t.Errorf("%d bytes, %d points, traced %v: %v", len(got), n, z.watch.running, err)
	}
}

func TestErrors(t *testing.T) {
	b := text(8, 400_000)
	blob := encode(t, b)
	broken := errors.New("broken")
	always := func(_, _ int64, _ bool) bool { return true }
	t.Run("reader", func(t *testing.T) {
		z := NewReader(io.MultiReader(bytes.NewReader(blob[:len(blob)/2]), iotest.ErrReader(broken)), Options{})
		defer z.Close()
		if _, err := io.ReadAll(z); err != broken {
			t.Error(err)
		}
	})
	t.Run("point", func(t *testing.T) {
		z := NewReader(bytes.NewReader(blob), Options{Want: always, Point: func(index.Point) error { return broken }})
		defer z.Close()
		if _, err := io.ReadAll(z); err != broken {
			t.Error(err)
		}
	})
	t.Run("closed", func(t *testing.T) {
		z := NewReader(bytes.NewReader(blob), Options{Want: always, Point: func(index.Point) error { return nil }})
		if _, err := z.Read(make([]byte, 10)); err != nil {
			t.Error(err)
		}
		if err := errors.Join(z.Close(), z.Close()); err != nil {
			t.Error(err)
		}
		if _, err := z.Read(make([]byte, 10)); err == nil {
			t.Error("a closed reader reads")
		}
	})
	sum := bytes.Clone(blob)
	sum[len(sum)-1] ^= 1
	flags := func(b ...byte) []byte { return append([]byte(frameMagic), b...) }
	for name, bad := range map[string][]byte{
		"checksum":          sum,
		"other data":        append(bytes.Clone(blob), "other data"...),
		"dictionary":        flags(1, 0, 7, 1, 0, 0),
		"reserved flag":     flags(8, 0, 1, 0, 0),
		"window":            flags(0, 18<<3, 1, 0, 0),
		"one large segment": flags(0xa0, 1, 0, 0, 8, 1, 0, 0),
		"kind of block":     flags(0, 0, 7, 0, 0),
		"size of block":     flags(0, 0, 1, 0x80, 0),
	} {
		t.Run(name, func(t *testing.T) {
			z := NewReader(bytes.NewReader(bad), Options{})
			defer z.Close()
			if _, err := io.ReadAll(z); !errors.Is(err, index.ErrMalformed) {
				t.Error(err)
			}
		})
	}
	t.Run("window of 128 MiB", func(t *testing.T) {
		z := NewReader(bytes.NewReader(flags(0, 17<<3, 1, 0, 0)), Options{})
		defer z.Close()
		if _, err := io.ReadAll(z); err != nil {
			t.Error(err)
		}
	})
}

func TestTruncated(t *testing.T) {
	b := text(9, 9_000)
	blob := slices.Concat(encode(t, b[:5000], zstd.WithWindowSize(1<<10)), skippable(3, 30), encode(t, b[5000:]))
	for n := range len(blob) {
		var got bytes.Buffer
		z := NewReader(bytes.NewReader(blob[:n]), Options{Want: every(1), Point: func(index.Point) error { return nil }})
		_, err := io.Copy(&got, z)
		z.Close()
		if err == nil && got.Len() != 0 && got.Len() != 5000 || err != nil && !errors.Is(err, io.ErrUnexpectedEOF) || !bytes.HasPrefix(b, got.Bytes()) {
			t.Fatalf("%d bytes give %d: %v", n, got.Len(), err)
		}
	}
}

func TestMutated(t *testing.T) {
	r := rand.New(rand.NewPCG(4, 4))
	b := text(10, 30_000)
	blob := encode(t, b, zstd.WithWindowSize(4<<10))
	_, ps := points(t, blob, every(7000))
	for range 1500 {
		bad := bytes.Clone(blob)
		bad[r.IntN(len(bad))] ^= 1 << r.IntN(8)
		z := NewReader(bytes.NewReader(bad), Options{Want: every(1000), Point: func(index.Point) error { return nil }})
		_, err := io.Copy(io.Discard, z)
		z.Close()
		if err != nil && !documented(err) {
			t.Fatal(err)
		}
		p := ps[1+r.IntN(len(ps)-1)]
		p.State = bytes.Clone(p.State)
		p.State[r.IntN(len(p.State))] ^= 1 << r.IntN(8)
		if r.IntN(4) == 0 {
			p.State = p.State[:r.IntN(len(p.State))]
		}
		if _, err := rest(blob, p); err != nil && !documented(err) {
			t.Fatal(err)
		}
	}
}

// A State that unfolds to more than two windows is refused before it has.
func TestEndlessState(t *testing.T) {
	s := append([]byte(frameMagic), 0, windowByte(maxBlock))
	for range 1 << 20 {
		s = appendBlock(s, blockRLE, maxBlock, []byte{0})
	}
	if _, err := rest(nil, index.Point{State: s}); !errors.Is(err, index.ErrMalformed) {
		t.Error(err)
	}
}
