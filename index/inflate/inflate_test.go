package inflate

import (
	"bytes"
	"compress/flate"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os/exec"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/varvefs/varve/index"
	"github.com/varvefs/varve/index/indextest"
)

// shape is a blob and what it decompresses to.
type shape struct {
	name string
	blob []byte
	want []byte
}

// flushed compresses p as one member whose blocks end at every size bytes.
func flushed(t testing.TB, p []byte, level, size int) []byte {
	t.Helper()
	var buf bytes.Buffer
	w, err := gzip.NewWriterLevel(&buf, level)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(p); i += size {
		if _, err := w.Write(p[i:min(i+size, len(p))]); err != nil {
			t.Fatal(err)
		}
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// blocked compresses p as bgzip does: members of at most 64 KiB that have their
// size in an extra field, and an empty one.
func blocked(t testing.TB, p []byte) []byte {
	t.Helper()
	var blob []byte
	for last := false; !last; {
		n := min(len(p), 0xff00)
		last = n == 0
		blob = append(blob, member(t, p[:n], true)...)
		p = p[n:]
	}
	return blob
}

func member(t testing.TB, p []byte, extra bool) []byte {
	t.Helper()
	var buf bytes.Buffer
	w, err := flate.NewWriter(&buf, 6)
	if err != nil {
		t.Fatal(err)
	}
	w.Write(p)
	w.Close()
	h := []byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff}
	if extra {
		h[3] = hasExtra
		h = append(h, 6, 0, 'B', 'C', 2, 0)
		h = binary.LittleEndian.AppendUint16(h, uint16(len(h)+2+buf.Len()+8-1))
	}
	return seal(h, buf.Bytes(), p)
}

// seal puts a member together.
func seal(header, deflate, p []byte) []byte {
	b := append(bytes.Clone(header), deflate...)
	b = binary.LittleEndian.AppendUint32(b, crc32.ChecksumIEEE(p))
	return binary.LittleEndian.AppendUint32(b, uint32(len(p)))
}

// tool compresses p with a program, if it is there.
func tool(t testing.TB, p []byte, name string, args ...string) ([]byte, bool) {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Logf("without %s, which is not installed", name)
		return nil, false
	}
	c := exec.Command(path, args...)
	c.Stdin = bytes.NewReader(p)
	out, err := c.Output()
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return out, true
}

func shapes(t testing.TB) []shape {
	t.Helper()
	data := mixed(700_000)
	var s []shape
	add := func(name string, blob, want []byte) { s = append(s, shape{name, blob, want}) }
	for _, level := range []int{gzip.HuffmanOnly, gzip.NoCompression, 1, 2, 6, 9} {
		add(fmt.Sprintf("level %d", level), compress(t, data, level), data)
	}
	for _, n := range []int{0, 1, 2, 257, 258, 259, history - 1, history, history + 1, windowSize - slack, windowSize, windowSize + 1} {
		add(fmt.Sprintf("%d bytes", n), compress(t, data[:n], 6), data[:n])
	}
	add("zeroes", compress(t, make([]byte, 1<<20), 6), make([]byte, 1<<20))
	noise := indextest.Noise(300_000, 9)
	add("noise", compress(t, noise, 6), noise)
	for d := 1; d < 40; d++ {
		p := bytes.Repeat(noise[:d], 2000/d)
		add(fmt.Sprintf("every %d", d), compress(t, p, 9), p)
	}
	add("flushed", flushed(t, data, 6, 777), data)
	add("flushed stored", flushed(t, data, 0, 777), data)
	add("flushed fixed", flushed(t, data[:9000], 6, 9), data[:9000])
	add("blocked", blocked(t, data), data)
	add("members", bytes.Join([][]byte{
		compress(t, data[:100_000], 6), compress(t, nil, 6), compress(t, data[100_000:100_001], 1), flushed(t, data[100_001:200_000], 9, 5000), compress(t, data[200_000:], 0),
	}, nil), data)
	add("padded", append(compress(t, data, 6), make([]byte, 100_000)...), data)
	var named bytes.Buffer
	w := gzip.NewWriter(&named)
	w.Name, w.Comment, w.Extra = strings.Repeat("n", maxName-1), strings.Repeat("c", maxName-1), make([]byte, 0xffff)
	w.Write(data)
	w.Close()
	add("full header", named.Bytes(), data)
	summed := []byte{0x1f, 0x8b, 8, hasSum | hasName, 1, 2, 3, 4, 0, 3, 'a', 0}
	summed = binary.LittleEndian.AppendUint16(summed, uint16(crc32.ChecksumIEEE(summed)))
	add("header with a sum", append(summed, compress(t, data, 6)[10:]...), data)
	empty := bytes.Repeat([]byte{0, 0, 0, 0xff, 0xff}, 3000) // stored blocks of nothing
	add("empty blocks", seal(named.Bytes()[:0:0], append(append(append([]byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0}, empty...), 0, 3, 0, 0xfc, 0xff, 'a', 'b', 'c'), append(empty, 3, 0)...), []byte("abc")), []byte("abc"))
	for _, level := range []string{"-1", "-2", "-3", "-4", "-5", "-6", "-7", "-8", "-9"} {
		if blob, ok := tool(t, data, "gzip", level); ok {
			add("gzip "+level, blob, data)
		}
	}
	for _, args := range [][]string{{"-p", "4", "-b", "128"}, {"-p", "4", "-b", "128", "-i"}, {"-p", "1", "-0"}, {"-p", "2", "-R"}, {"-11"}} {
		p := data
		if args[0] == "-11" {
			p = data[:100_000]
		}
		if blob, ok := tool(t, p, "pigz", args...); ok {
			add("pigz "+strings.Join(args, " "), blob, p)
		}
	}
	return s
}

// parts reads all of z, in pieces between which it asks whether a point lies
// there.
func parts(z *Reader, size int) (all []byte, at []int64, err error) {
	buf := make([]byte, size)
	for {
		if z.AtPoint() {
			at = append(at, int64(len(all)))
		}
		n, err := z.Read(buf)
		all = append(all, buf[:n]...)
		if err == io.EOF {
			return all, at, nil
		}
		if err != nil {
			return all, at, err
		}
	}
}

func TestRead(t *testing.T) {
	z := new(Reader)
	for _, s := range shapes(t) {
		t.Run(s.name, func(t *testing.T) {
			for name, r := range map[string]io.Reader{
				"plain":        bytes.NewReader(s.blob),
				"byte by byte": iotest.OneByteReader(bytes.NewReader(s.blob)),
				"data and EOF": iotest.DataErrReader(bytes.NewReader(s.blob)),
			} {
				z.Reset(r, Options{})
				got, err := io.ReadAll(z)
				if err != nil || !bytes.Equal(got, s.want) {
					t.Fatalf("%s: %d bytes, %v; want %d", name, len(got), err, len(s.want))
				}
				if z.InputOffset() != int64(len(s.blob)) {
					t.Errorf("%s: %d of %d bytes read", name, z.InputOffset(), len(s.blob))
				}
			}
		})
	}
}

// TestResume reads on from every point that there can be.
func TestResume(t *testing.T) {
	for _, s := range shapes(t) {
		t.Run(s.name, func(t *testing.T) {
			for _, span := range []int64{0, 50_000} {
				resumeAll(t, s.blob, s.want, span)
			}
		})
	}
}

// resumeAll makes points every span bytes and reads on from up to some hundred of
// them.
func resumeAll(t testing.TB, blob, want []byte, span int64) {
	t.Helper()
	var points []index.Point
	z := NewReader(bytes.NewReader(blob), every(span, &points))
	got, at, err := parts(z, 10_000)
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%d bytes, %v; want %d", len(got), err, len(want))
	}
	var outs []int64
	for _, p := range points {
		outs = append(outs, p.Out)
	}
	if fmt.Sprint(outs) != fmt.Sprint(at) {
		t.Fatalf("points at %v, read at %v", outs, at)
	}
	if len(points) == 0 && len(want) > 0 {
		t.Fatal("no points")
	}
	step := 1 + len(points)/100
	last := index.Point{In: -1, Out: -1}
	for i, p := range points {
		if p.Out <= last.Out || p.In < last.In || p.Bits > 7 || len(p.State) > history {
			t.Fatalf("point %d at %d/%d/%d behind %d/%d", i, p.In, p.Bits, p.Out, last.In, last.Out)
		}
		last = p
		if i%step != 0 {
			continue
		}
		rest := blob[p.Start():]
		if err := z.Resume(bytes.NewReader(rest), p); err != nil {
			t.Fatal(err)
		}
		got, at, err := parts(z, 64<<10)
		if err != nil || !bytes.Equal(got, want[p.Out:]) || len(at) > 0 {
			t.Fatalf("from point %d at %d/%d/%d: %d bytes, %v; want %d", i, p.In, p.Bits, p.Out, len(got), err, len(want)-int(p.Out))
		}
		if z.InputOffset() != int64(len(blob)) {
			t.Errorf("from point %d: read to %d of %d", i, z.InputOffset(), len(blob))
		}
	}
}

// TestState holds that a state has what is used and zeroes for the rest.
func TestState(t *testing.T) {
	noise := indextest.Noise(60_000, 5)
	// The second block repeats 100 bytes that lie 20,000 before it.
	p := append(bytes.Clone(noise[:40_000]), noise[20_000:20_100]...)
	var buf bytes.Buffer
	w, _ := gzip.NewWriterLevel(&buf, 9)
	w.Write(p[:40_000])
	w.Flush()
	w.Write(p[40_000:])
	w.Close()
	var points []index.Point
	if _, err := io.Copy(io.Discard, NewReader(&buf, every(39_000, &points))); err != nil {
		t.Fatal(err)
	}
	q := points[len(points)-1]
	if q.Out != 40_000 || len(points) != 2 || points[0].State != nil || points[0].In != 10 || points[0].Out != 0 {
		t.Fatalf("points %v", points)
	}
	if want := append(bytes.Clone(noise[20_000:20_100]), make([]byte, 19_900)...); !bytes.Equal(q.State, want) {
		t.Errorf("a state of %d bytes, not the 20,000 from the first that is used, 100 of them not zero", len(q.State))
	}

	// What is stored uses nothing, nor does what follows in another member.
	points = nil
	blob := append(flushed(t, noise, 0, 10_000), compress(t, noise, 0)...)
	if _, err := io.Copy(io.Discard, NewReader(bytes.NewReader(blob), every(0, &points))); err != nil {
		t.Fatal(err)
	}
	if len(points) < 6 {
		t.Errorf("%d points", len(points))
	}
	for _, p := range points {
		if p.State != nil {
			t.Errorf("a state of %d bytes at %d", len(p.State), p.Out)
		}
	}
}

// TestBits holds that points lie at every bit.
func TestBits(t *testing.T) {
	var points []index.Point
	if _, err := io.Copy(io.Discard, NewReader(bytes.NewReader(compress(t, mixed(4<<20), 6)), every(0, &points))); err != nil {
		t.Fatal(err)
	}
	var seen [8]int
	for _, p := range points {
		seen[p.Bits]++
	}
	for b, n := range seen {
		if n == 0 {
			t.Errorf("of %d points none has %d bits", len(points), b)
		}
	}
}

func TestWantOncePerOut(t *testing.T) {
	asked, made := map[int64]int{}, 0
	blob := flushed(t, []byte("abc"), 6, 1)
	blob = append(blob[:10:10], append(bytes.Repeat([]byte{0, 0, 0, 0xff, 0xff}, 1000), blob[10:]...)...)
	z := NewReader(bytes.NewReader(blob), Options{
		Want:  func(_ int64, _ uint8, out int64) bool { asked[out]++; return true },
		Point: func(index.Point) error { made++; return nil },
	})
	got, err := io.ReadAll(z)
	if err != nil || string(got) != "abc" {
		t.Fatalf("%q, %v", got, err)
	}
	if asked[0] != 1 || made != 3 {
		t.Errorf("asked %v, made %d", asked, made)
	}
}

func TestPointError(t *testing.T) {
	broken := errors.New("broken")
	n := 0
	z := NewReader(bytes.NewReader(compress(t, mixed(1<<20), 6)), Options{
		Want: func(_ int64, _ uint8, out int64) bool { return true },
		Point: func(index.Point) error {
			if n++; n == 2 {
				return broken
			}
			return nil
		},
	})
	if _, err := io.Copy(io.Discard, z); err != broken || n != 2 {
		t.Errorf("%v after %d points", err, n)
	}
	if _, err := z.Read(make([]byte, 1)); err != broken {
		t.Errorf("then %v", err)
	}
}

func TestReadError(t *testing.T) {
	broken := errors.New("broken")
	data := mixed(300_000)
	blob := compress(t, data, 6)
	for _, n := range []int{0, 1, 5, 10, 11, 100, len(blob) / 2, len(blob) - 8, len(blob) - 1, len(blob)} {
		z := NewReader(io.MultiReader(bytes.NewReader(blob[:n]), iotest.ErrReader(broken)), Options{})
		got, err := io.ReadAll(z)
		if err != broken || !bytes.HasPrefix(data, got) {
			t.Errorf("after %d bytes: %v", n, err)
		}
	}
	z := NewReader(idle{}, Options{})
	if _, err := z.Read(make([]byte, 1)); err != io.ErrNoProgress {
		t.Errorf("idle: %v", err)
	}
}

type idle struct{}

func (idle) Read([]byte) (int, error) { return 0, nil }

func TestTruncated(t *testing.T) {
	data := mixed(3000)
	for _, level := range []int{gzip.HuffmanOnly, 0, 6} {
		one := flushed(t, data, level, 1000)
		two := append(bytes.Clone(one), blocked(t, data)...)
		fixed := compress(t, data[:40], 6)
		for _, blob := range [][]byte{one, two, fixed} {
			for n := range blob {
				got, err := io.ReadAll(NewReader(bytes.NewReader(blob[:n]), Options{}))
				if n == len(one) && err == nil && len(blob) == len(two) {
					continue // between members
				}
				if _, oracle := io.ReadAll(mustStd(blob[:n])); oracle == nil {
					if err != nil {
						t.Errorf("level %d, %d of %d bytes: %v", level, n, len(blob), err)
					}
					continue
				}
				if !errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, index.ErrMalformed) {
					t.Errorf("level %d, %d of %d bytes: %d bytes, %v", level, n, len(blob), len(got), err)
				}
			}
		}
	}
}

// mustStd is Go's own reader, or one of its error.
func mustStd(blob []byte) io.Reader {
	z, err := gzip.NewReader(bytes.NewReader(blob))
	if err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return iotest.ErrReader(err)
	}
	return z
}

// TestReuse holds that nothing of a blob is left for the next.
func TestReuse(t *testing.T) {
	data := mixed(500_000)
	blob := compress(t, data, 6)
	z := new(Reader)
	for range 3 {
		var points, want []index.Point
		z.Reset(bytes.NewReader(blob), every(40_000, &points))
		if _, err := io.Copy(io.Discard, z); err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, NewReader(bytes.NewReader(blob), every(40_000, &want))); err != nil {
			t.Fatal(err)
		}
		if fmt.Sprint(points) != fmt.Sprint(want) {
			t.Fatal("other points the second time")
		}
		// One that fails in the middle, and a distance into the blob before.
		z.Reset(bytes.NewReader(blob[:len(blob)/2]), every(1000, &points))
		if _, err := io.Copy(io.Discard, z); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatal(err)
		}
	}
	allocs := testing.AllocsPerRun(5, func() {
		z.Reset(bytes.NewReader(blob), Options{})
		io.Copy(struct{ io.Writer }{io.Discard}, z)
	})
	if allocs > 10 {
		t.Errorf("%v allocations", allocs)
	}
}
