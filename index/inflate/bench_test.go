package inflate

import (
	"bytes"
	stdgzip "compress/gzip"
	"fmt"
	"io"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"

	"github.com/varvefs/varve/index"
)

// corpus is a blob to measure with: the file that INFLATE_BLOB names, or text and
// noise by turns. It gives its decompressed size too.
func corpus(b *testing.B) ([]byte, int64) {
	b.Helper()
	blob, err := os.ReadFile(os.Getenv("INFLATE_BLOB"))
	if err != nil {
		blob = compress(b, mixed(8<<20), stdgzip.DefaultCompression)
	}
	n, err := io.Copy(io.Discard, NewReader(bytes.NewReader(blob), Options{}))
	if err != nil {
		b.Fatal(err)
	}
	return blob, n
}

// every makes points at least span apart.
func every(span int64, points *[]index.Point) Options {
	next := int64(0)
	return Options{
		Want: func(_ int64, _ uint8, out int64) bool {
			if out < next {
				return false
			}
			next = out + span
			return true
		},
		Point: func(p index.Point) error {
			*points = append(*points, p)
			return nil
		},
	}
}

func benchmark(b *testing.B, read func(io.Reader) io.Reader) {
	blob, size := corpus(b)
	b.SetBytes(size)
	b.ReportAllocs()
	buf := make([]byte, 128<<10)
	before := cpu(b)
	for b.Loop() {
		n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{read(bytes.NewReader(blob))}, buf)
		if err != nil || n != size {
			b.Fatal(n, err)
		}
	}
	b.ReportMetric(float64(size)*float64(b.N)/1e6/(cpu(b)-before).Seconds(), "MB/cpu-s")
}

// cpu is what the process has used so far, which says more than the time where
// the machine has other work too.
func cpu(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func BenchmarkPlain(b *testing.B) {
	z := new(Reader)
	benchmark(b, func(r io.Reader) io.Reader { z.Reset(r, Options{}); return z })
}

func BenchmarkPoints(b *testing.B) {
	for _, span := range []int64{256 << 10, 1 << 20, 4 << 20} {
		b.Run(fmt.Sprintf("%dKiB", span>>10), func(b *testing.B) {
			z := new(Reader)
			var points []index.Point
			benchmark(b, func(r io.Reader) io.Reader {
				points = points[:0]
				z.Reset(r, every(span, &points))
				return z
			})
			state := 0
			for _, p := range points {
				state += len(p.State)
			}
			b.ReportMetric(float64(len(points)), "points")
			b.ReportMetric(float64(state)/float64(len(points)), "state-B/point")
		})
	}
}

func BenchmarkKlauspost(b *testing.B) {
	z := new(gzip.Reader)
	benchmark(b, func(r io.Reader) io.Reader {
		if err := z.Reset(r); err != nil {
			b.Fatal(err)
		}
		return z
	})
}

func BenchmarkStdlib(b *testing.B) {
	z := new(stdgzip.Reader)
	benchmark(b, func(r io.Reader) io.Reader {
		if err := z.Reset(r); err != nil {
			b.Fatal(err)
		}
		return z
	})
}
