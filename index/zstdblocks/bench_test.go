package zstdblocks

import (
	"bytes"
	"fmt"
	"io"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/varvefs/varve/index"
)

// BenchmarkRead compares with the decompressor alone, in as many goroutines as it
// is used with here.
func BenchmarkRead(b *testing.B) {
	content := text(30, 32<<20)
	blob := encode(b, content)
	buf := make([]byte, maxBlock)
	run := func(name string, open func() (io.Reader, func())) {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(content)))
			for b.Loop() {
				r, end := open()
				for {
					if _, err := r.Read(buf); err == io.EOF {
						break
					} else if err != nil {
						b.Fatal(err)
					}
				}
				end()
			}
		})
	}
	run("alone", func() (io.Reader, func()) {
		d, err := zstd.NewReader(bytes.NewReader(blob), zstd.WithDecoderConcurrency(1))
		if err != nil {
			b.Fatal(err)
		}
		return d, d.Close
	})
	for _, span := range []int64{0, 4 << 20, 8 << 20, 16 << 20} {
		run(fmt.Sprintf("points=%dMiB", span>>20), func() (io.Reader, func()) {
			o := Options{Want: every(span), Point: func(index.Point) error { return nil }}
			if span == 0 {
				o = Options{}
			}
			z := NewReader(bytes.NewReader(blob), o)
			return z, func() { z.Close() }
		})
	}
}
