package zstdblocks

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os/exec"
	"slices"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/varvefs/varve/index"
)

// text gives n bytes that compress as programs do: words, numbers, repeats from
// far and near, noise.
func text(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	words := make([][]byte, 400)
	for i := range words {
		words[i] = make([]byte, 2+r.IntN(12))
		for k := range words[i] {
			words[i][k] = byte('a' + r.IntN(26)*r.IntN(2))
		}
	}
	var b []byte
	for len(b) < n {
		switch k := r.IntN(100); {
		case k < 80:
			b = append(append(b, words[r.IntN(1+r.IntN(len(words)))]...), ' ')
		case k < 88:
			b = append(b, byte(len(b)>>8), byte(r.IntN(256)), 0, 0)
		case k < 95 && len(b) > 0:
			from := r.IntN(len(b))
			b = append(b, b[from:min(len(b), from+4+r.IntN(300))]...)
		case k < 98:
			b = append(b, make([]byte, r.IntN(40))...)
		default:
			for range r.IntN(60) {
				b = append(b, byte(r.IntN(256)))
			}
		}
	}
	return b[:n]
}

func encode(t testing.TB, b []byte, opts ...zstd.EOption) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := zstd.NewWriter(&out, append([]zstd.EOption{zstd.WithEncoderConcurrency(1)}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// cli compresses with zstd(1), nil where there is none.
func cli(t testing.TB, b []byte, args ...string) []byte {
	t.Helper()
	path, err := exec.LookPath("zstd")
	if err != nil {
		return nil
	}
	cmd := exec.Command(path, append([]string{"-q", "-c"}, args...)...)
	cmd.Stdin = bytes.NewReader(b)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("zstd %q: %v", args, err)
	}
	return out
}

// every wants a point wherever so many bytes have passed since the last.
func every(span int64) func(in, out int64, inFrame bool) bool {
	last := int64(-span)
	return func(_, out int64, _ bool) bool {
		if out-last < span {
			return false
		}
		last = out
		return true
	}
}

// points reads a blob to its end and gives its content and points. It checks that
// no Read crosses a point and that AtPoint knows them.
func points(t testing.TB, blob []byte, want func(in, out int64, inFrame bool) bool) ([]byte, []index.Point) {
	t.Helper()
	var asked, told []int64
	var ps []index.Point
	z := NewReader(bytes.NewReader(blob), Options{
		Want: func(in, out int64, inFrame bool) bool {
			ok := want(in, out, inFrame)
			if ok {
				asked = append(asked, out)
			}
			return ok
		},
		Point: func(p index.Point) error { ps = append(ps, p); return nil },
	})
	defer z.Close()
	var content []byte
	buf := make([]byte, 50_000)
	for {
		if z.AtPoint() {
			told = append(told, int64(len(content)))
		}
		n, err := z.Read(buf)
		for _, at := range asked {
			if at > int64(len(content)) && at < int64(len(content)+n) {
				t.Fatalf("a Read of %d bytes at %d crosses the point at %d", n, len(content), at)
			}
		}
		content = append(content, buf[:n]...)
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if len(ps) != len(asked) {
		t.Fatalf("%d points where %d were wanted", len(ps), len(asked))
	}
	for i, p := range ps {
		if p.Out != asked[i] || p.Out < int64(len(content)) && !slices.Contains(told, p.Out) {
			t.Fatalf("point %d at %d, asked for at %d, told of %v", i, p.Out, asked[i], told)
		}
	}
	return content, ps
}

// rest gives what a blob has behind a point.
func rest(blob []byte, p index.Point) ([]byte, error) {
	z, err := Resume(bytes.NewReader(blob[p.Start():]), p)
	if err != nil {
		return nil, err
	}
	defer z.Close()
	return io.ReadAll(z)
}

// plain gives a blob's content as the decompressor alone does.
func plain(blob []byte) ([]byte, error) {
	d, err := zstd.NewReader(bytes.NewReader(blob), zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderMaxMemory(1<<62), zstd.WithDecodeBuffersBelow(0))
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return io.ReadAll(d)
}

// documented says whether an error is one of those that are documented.
func documented(err error) bool {
	return errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, index.ErrMalformed)
}
