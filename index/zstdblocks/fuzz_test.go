package zstdblocks

import (
	"bytes"
	"io"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/varvefs/varve/index"
)

// enough bounds what the fuzz targets let a blob unfold to.
const enough = 1 << 20

// FuzzRead reads any bytes beside the plain decompressor, and resumes from every
// point.
func FuzzRead(f *testing.F) {
	b := text(20, 20_000)
	f.Add([]byte{}, uint16(1))
	f.Add(skippable(1, 9), uint16(1))
	for _, w := range []int{1 << 10, 8 << 10} {
		f.Add(encode(f, b, zstd.WithWindowSize(w)), uint16(3000))
		f.Add(encode(f, b[:3000], zstd.WithWindowSize(w), zstd.WithEncoderCRC(false), zstd.WithEncoderLevel(zstd.SpeedBestCompression)), uint16(0))
	}
	f.Add(rawFrame(appendBlock(nil, blockRLE, 1000, []byte{7}), appendRepeat(nil, 1000), appendRepeat(nil, 5)), uint16(0))
	f.Fuzz(func(t *testing.T, blob []byte, span uint16) {
		// Large windows cost time and find nothing.
		for i := 0; i+6 < len(blob); i++ {
			if string(blob[i:i+4]) == frameMagic && (blob[i+4]&flagSingle != 0 && blob[i+4]>>6 > 1 || blob[i+5]>>3 > 8) {
				return
			}
		}
		d, err := zstd.NewReader(bytes.NewReader(blob), zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecodeBuffersBelow(0))
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		want, wantErr := io.ReadAll(io.LimitReader(d, enough))
		if len(want) == enough {
			return
		}
		var ps []index.Point
		z := NewReader(bytes.NewReader(blob), Options{
			Want:  every(int64(span)),
			Point: func(p index.Point) error { ps = append(ps, p); return nil },
		})
		defer z.Close()
		got, err := io.ReadAll(z)
		if (err == nil) != (wantErr == nil) {
			t.Fatalf("%v, but the plain decompressor: %v", err, wantErr)
		}
		if err != nil {
			if !documented(err) {
				t.Fatal(err)
			}
			return
		}
		if !bytes.Equal(got, want) {
			t.Fatalf("%d bytes, but the plain decompressor: %d", len(got), len(want))
		}
		for i, p := range ps {
			if i > 8 && i < len(ps)-8 {
				continue
			}
			if r, err := rest(blob, p); err != nil || !bytes.Equal(r, want[p.Out:]) {
				t.Fatalf("point %d at %d, %d: %d bytes: %v", i, p.In, p.Out, len(r), err)
			}
		}
	})
}

// FuzzResume makes blobs of any bytes, resumes from every point, and from one
// whose State was changed.
func FuzzResume(f *testing.F) {
	f.Add(text(21, 6000), uint8(0), uint8(0), uint16(100), uint32(77), uint8(1))
	f.Add(text(22, 30_000), uint8(1), uint8(3), uint16(3000), uint32(9), uint8(128))
	f.Add(bytes.Repeat(text(23, 700), 20), uint8(3), uint8(1), uint16(1), uint32(40), uint8(4))
	f.Add(text(24, 60_000), uint8(1), uint8(0), uint16(20_000), uint32(5), uint8(64)) // much of it skimmed
	f.Add(make([]byte, 5000), uint8(2), uint8(0), uint16(1), uint32(0), uint8(2))
	f.Fuzz(func(t *testing.T, b []byte, level, window uint8, span uint16, at uint32, with uint8) {
		blob := encode(t, b, zstd.WithEncoderLevel(zstd.EncoderLevel(1+level%4)), zstd.WithWindowSize(1<<(10+window%8)), zstd.WithEncoderCRC(level&4 == 0))
		got, ps := points(t, blob, every(int64(span)))
		if !bytes.Equal(got, b) {
			t.Fatal("the content differs")
		}
		for i, p := range ps {
			if i > 8 && i < len(ps)-8 {
				continue
			}
			if r, err := rest(blob, p); err != nil || !bytes.Equal(r, b[p.Out:]) {
				t.Fatalf("point %d at %d, %d: %d bytes, want %d: %v", i, p.In, p.Out, len(r), len(b)-int(p.Out), err)
			}
		}
		if len(ps) == 0 {
			return
		}
		p := ps[int(at)%len(ps)]
		if len(p.State) == 0 {
			return
		}
		p.State[int(at>>8)%len(p.State)] ^= with
		z, err := Resume(bytes.NewReader(blob[p.In:]), p)
		if err != nil {
			t.Fatal(err)
		}
		defer z.Close()
		// What a State makes of the blob is no more than the blob's blocks can be.
		n, err := io.Copy(io.Discard, z)
		if err != nil && !documented(err) {
			t.Fatal(err)
		}
		if limit := int64(len(blob)/blockHeader+1) * maxBlock; n > limit {
			t.Fatalf("%d bytes", n)
		}
	})
}
