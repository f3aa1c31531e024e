package forms

import (
	"bytes"
	"io"
	"math/rand/v2"
	"testing"
	"testing/iotest"
)

func noise(seed byte, n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

type piece struct {
	n    int
	hole bool
}

func cut(t testing.TB, r io.Reader, buf int) (data []byte, pieces []piece) {
	t.Helper()
	last := 0
	c := chunker{
		write: func(p []byte) error { data = append(data, p...); return nil },
		cut: func(hole bool) error {
			pieces = append(pieces, piece{len(data) - last, hole})
			if zeros := len(bytes.Trim(data[last:], "\x00")) == 0; hole && !zeros {
				t.Error("a hole that is not zeros")
			}
			last = len(data)
			return nil
		},
	}
	if err := c.run(r, make([]byte, buf)); err != nil {
		t.Fatal(err)
	}
	if last != len(data) {
		t.Errorf("%d bytes after the last cut", len(data)-last)
	}
	return data, pieces
}

func join(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

func TestChunkerHoles(t *testing.T) {
	z := func(n int) []byte { return make([]byte, n) }
	a, b := []byte("begin"), []byte("end")
	for name, test := range map[string]struct {
		in   []byte
		want []piece
	}{
		"empty":       {nil, nil},
		"one":         {a, []piece{{5, false}}},
		"zeros":       {z(5000), []piece{{5000, true}}},
		"few zeros":   {z(1023), []piece{{1023, false}}},
		"just a hole": {z(1024), []piece{{1024, true}}},
		"no hole":     {join(a, z(1023), b), []piece{{1031, false}}},
		"hole":        {join(a, z(1024), b), []piece{{5, false}, {1024, true}, {3, false}}},
		"ends in":     {join(a, z(9000)), []piece{{5, false}, {9000, true}}},
		"begins in":   {join(z(9000), b), []piece{{9000, true}, {3, false}}},
		"two":         {join(z(2000), a, z(2000), b), []piece{{2000, true}, {5, false}, {2000, true}, {3, false}}},
	} {
		for _, buf := range []int{1, 7, 1000, 64 << 10} {
			data, got := cut(t, bytes.NewReader(test.in), buf)
			if !bytes.Equal(data, test.in) {
				t.Errorf("%s: content changed with a buffer of %d", name, buf)
			}
			if len(got) != len(test.want) {
				t.Errorf("%s: %v with a buffer of %d, want %v", name, got, buf, test.want)
				continue
			}
			for i := range got {
				if got[i] != test.want[i] {
					t.Errorf("%s: %v with a buffer of %d, want %v", name, got, buf, test.want)
				}
			}
		}
	}
}

func TestChunkerCutsByContent(t *testing.T) {
	in := noise(7, 8<<20)
	data, pieces := cut(t, bytes.NewReader(in), 64<<10)
	if !bytes.Equal(data, in) {
		t.Fatal("content changed")
	}
	if n := len(pieces); n < 64 || n > 256 {
		t.Errorf("%d chunks of 8 MiB, want about 128", n)
	}
	_, moved := cut(t, bytes.NewReader(in[100_000:]), 64<<10)
	if a, b := pieces[len(pieces)-2], moved[len(moved)-2]; a != b {
		t.Errorf("the last chunks moved with the first bytes: %v, %v", a, b)
	}
}

func FuzzChunker(f *testing.F) {
	f.Add([]byte("abc"), uint16(2000), []byte("def"), uint8(3))
	f.Fuzz(func(t *testing.T, a []byte, zeros uint16, b []byte, buf uint8) {
		in := join(a, make([]byte, zeros), b)
		data, whole := cut(t, bytes.NewReader(in), 64<<10)
		if !bytes.Equal(data, in) {
			t.Fatal("content changed")
		}
		_, parts := cut(t, iotest.HalfReader(bytes.NewReader(in)), int(buf)+1)
		if len(parts) != len(whole) {
			t.Fatalf("cuts depend on the buffer: %v, %v", whole, parts)
		}
		for i := range parts {
			if parts[i] != whole[i] {
				t.Fatalf("cuts depend on the buffer: %v, %v", whole, parts)
			}
		}
	})
}
