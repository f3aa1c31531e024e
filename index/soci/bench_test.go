package soci

import (
	"archive/tar"
	"bytes"
	"fmt"
	"testing"
	"time"

	"github.com/varvefs/varve/index"
	"github.com/varvefs/varve/index/indextest"
)

// BenchmarkRead reads the zTOC of a layer of 100,000 entries and 1 GB, nine in ten
// of them files, with spans of 4 MiB.
func BenchmarkRead(b *testing.B) {
	const n = 100_000
	s := layerOf(b, n, 10_000)
	ztoc := write(b, s)
	b.SetBytes(int64(len(ztoc)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Read(ztoc, s.Compressed); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(len(ztoc)-len(s.Points)*(checkpointSize+84))/n, "B/entry")
}

func BenchmarkWrite(b *testing.B) {
	s := layerOf(b, 100_000, 10_000)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.Tar.Seek(0, 0); err != nil {
			b.Fatal(err)
		}
		if err := Write(&bytes.Buffer{}, s); err != nil {
			b.Fatal(err)
		}
	}
}

// layerOf describes a layer of n entries with files of the given size, whose
// contents are not there.
func layerOf(b *testing.B, n int, size int64) Source {
	b.Helper()
	t := &hollow{}
	tw := tar.NewWriter(t)
	when := time.Unix(1_700_000_000, 0)
	for i := range n {
		h := tar.Header{Name: fmt.Sprintf("usr/lib/python3/dist-packages/dir%04d/module_%06d.py", i/10, i), Mode: 0o644, Size: size, ModTime: when, Typeflag: tar.TypeReg}
		if i%10 == 0 {
			h.Typeflag, h.Mode, h.Size = tar.TypeDir, 0o755, 0
			h.Name = fmt.Sprintf("usr/lib/python3/dist-packages/dir%04d/", i/10)
		}
		if err := tw.WriteHeader(&h); err != nil {
			b.Fatal(err)
		}
		if h.Size == 0 {
			continue
		}
		t.skip(blocks(h.Size))
		tw = tar.NewWriter(t) // the one before waits for the contents
	}
	if err := tw.Close(); err != nil {
		b.Fatal(err)
	}
	s := Source{Tar: t, Uncompressed: t.size, Compressed: t.size / 3, Gzip: true, SpanSize: 4 << 20, Tool: "bench"}
	for at := int64(0); at < t.size; at += s.SpanSize {
		state := indextest.Noise(windowSize, uint64(at))
		for i := range state { // so that it compresses to a half, as code does
			state[i] &= 0x0f
		}
		s.Points = append(s.Points, index.Point{In: at/3 + 10, Out: at, State: state, Digest: [32]byte{1}})
	}
	return s
}

// hollow is a tar of which only the headers are kept.
type hollow struct {
	parts []part
	size  int64
	at    int64
	next  int // the part at or behind at
}

type part struct {
	off int64
	b   []byte
}

func (h *hollow) Write(p []byte) (int, error) {
	h.parts = append(h.parts, part{h.size, bytes.Clone(p)})
	h.size += int64(len(p))
	return len(p), nil
}

func (h *hollow) skip(n int64) { h.size += n }

func (h *hollow) Seek(off int64, whence int) (int64, error) {
	if whence == 0 {
		h.at, h.next = 0, 0
	}
	h.at += off
	return h.at, nil
}

func (h *hollow) Read(p []byte) (int, error) {
	for h.next < len(h.parts) && h.parts[h.next].off+int64(len(h.parts[h.next].b)) <= h.at {
		h.next++
	}
	clear(p)
	if h.next < len(h.parts) {
		if q := h.parts[h.next]; q.off <= h.at {
			n := copy(p, q.b[h.at-q.off:])
			h.at += int64(n)
			return n, nil
		}
	}
	n := 1
	h.at++
	return n, nil
}
