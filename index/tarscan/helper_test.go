package tarscan

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	digest "github.com/opencontainers/go-digest"

	"github.com/varvefs/varve/index"
	"github.com/varvefs/varve/index/indextest"
	"github.com/varvefs/varve/index/inflate"
	"github.com/varvefs/varve/index/zstdblocks"
)

func members() []indextest.Member {
	when := time.Unix(-3, 250_000_000)
	holed := make([]byte, 11<<20) // pieces: data, zeroes, data
	copy(holed[5000:], indextest.Noise(9000, 2))
	copy(holed[8<<20+130<<10:], indextest.Noise(70_000, 3))
	return []indextest.Member{
		{H: tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o755, ModTime: when}},
		{H: tar.Header{Name: "a/", Typeflag: tar.TypeDir, Mode: 0o1777, ModTime: when}},
		{H: tar.Header{Name: "a/su", Mode: 0o4755, ModTime: when, Uid: 4000000000, Gid: 7, PAXRecords: map[string]string{
			"SCHILY.xattr.security.capability": "\x01\x00\x00\x02\xff\x00",
			"LIBARCHIVE.xattr.user.x%20y":      "AP8",
			"LIBARCHIVE.creationtime":          "1",
		}}, Data: []byte("hello")},
		{H: tar.Header{Name: "big", Mode: 0o644, ModTime: when}, Data: indextest.Noise(9<<20+17, 1)},
		{H: tar.Header{Name: "piece", Mode: 0o644, ModTime: when}, Data: indextest.Noise(4<<20, 8)},
		{H: tar.Header{Name: "holed", Mode: 0o644, ModTime: when}, Data: holed},
		{H: tar.Header{Name: "zeros", Mode: 0o600, ModTime: when}, Data: make([]byte, 5<<20)},
		{H: tar.Header{Name: "empty", Mode: 0o600, ModTime: when}},
		{H: tar.Header{Name: "link", Typeflag: tar.TypeSymlink, Linkname: "../a/su", Mode: 0o777}},
		{H: tar.Header{Name: "hard", Typeflag: tar.TypeLink, Linkname: "./a/su", Mode: 0o4755}},
		{H: tar.Header{Name: "null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 300, Mode: 0o666}},
		{H: tar.Header{Name: "disk", Typeflag: tar.TypeBlock, Devmajor: 300, Devminor: 1, Mode: 0o660}},
		{H: tar.Header{Name: "pipe", Typeflag: tar.TypeFifo, Mode: 0o600}},
		{H: tar.Header{Name: "a/.wh.gone", Mode: 0o600}},
		{H: tar.Header{Name: "cont", Typeflag: tar.TypeCont, Mode: 0o600}, Data: []byte("old")},
	}
}

// gz compresses p as one member for every size bytes.
func gz(t testing.TB, p []byte, level, size int) []byte {
	t.Helper()
	var buf bytes.Buffer
	for first := true; first || len(p) > 0; first = false {
		n := min(size, len(p))
		w, err := gzip.NewWriterLevel(&buf, level)
		if err != nil {
			t.Fatal(err)
		}
		w.Name, w.Comment, w.Extra = "layer.tar", "a comment", []byte("BC\x02\x00\x00\x00")
		if _, err := w.Write(p[:n]); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		p = p[n:]
	}
	return buf.Bytes()
}

const skippable = "\x5a\x2a\x4d\x18\x03\x00\x00\x00abc"

// zst compresses p as one frame for every size bytes, with skippable frames
// around them.
func zst(t testing.TB, p []byte, size int) []byte {
	t.Helper()
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	out := []byte(skippable)
	for len(p) > 0 {
		n := min(size, len(p))
		out = append(enc.EncodeAll(p[:n], out), skippable...)
		p = p[n:]
	}
	return out
}

// memory is a sink that knows which blocks were written.
type memory struct {
	data   []byte
	blocks map[int64]bool
	err    error
}

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	if m.err != nil {
		return 0, m.err
	}
	if need := int(off) + len(p); need > len(m.data) {
		m.data = append(m.data, make([]byte, need-len(m.data))...)
	}
	copy(m.data[off:], p)
	if m.blocks == nil {
		m.blocks = map[int64]bool{}
	}
	for at := off; at < off+int64(len(p)); at += index.BlockSize {
		m.blocks[at/index.BlockSize] = true
	}
	return len(p), nil
}

func (m *memory) at(off, n int64) []byte {
	p := make([]byte, n)
	if off < int64(len(m.data)) {
		copy(p, m.data[off:])
	}
	return p
}

// check scans blob and compares with what archive/tar says of its tar.
func check(t *testing.T, blob, tarball []byte, c Compression) *index.Layer {
	t.Helper()
	if got := Detect(blob); got != c {
		t.Errorf("detected %v", got)
	}
	var l *index.Layer
	spans := []int64{0, 100, 70_000}
	if len(tarball) > 1<<20 { // of the tiny ones there would be too many
		spans = []int64{0, 300_000}
	}
	for _, span := range spans {
		l = checkSpan(t, blob, tarball, c, span)
	}
	return l
}

// checkSpan scans with spans of one size. Every frame is then decompressed by
// itself, and the tar made again of skeleton and contents.
func checkSpan(t *testing.T, blob, tarball []byte, c Compression, span int64) *index.Layer {
	t.Helper()
	sink, skeleton, passed := &memory{}, &bytes.Buffer{}, &passing{}
	l, res, err := Scan(context.Background(), bytes.NewReader(blob), c, sink, Options{Span: span, DigestSpan: 3 * span, Skeleton: skeleton, Passing: passed})
	if err != nil {
		t.Fatal(err)
	}
	want := Result{digest.FromBytes(blob), digest.FromBytes(tarball), int64(len(blob)), int64(len(tarball))}
	if res != want {
		t.Errorf("got %+v, want %+v", res, want)
	}
	if err := l.Frames.Verify(); err != nil {
		t.Fatal(err)
	}
	frames, pieces, size := l.Frames.Len()
	for i := range pieces {
		p := l.Frames.Piece(i)
		if b := sink.at(p.Data, p.Size); sha256.Sum256(b) != p.Digest || len(bytes.Trim(b, "\x00")) == 0 {
			t.Errorf("piece %+v differs, or is all zeroes", p)
		}
	}
	for i := range frames {
		checkFrame(t, l, i, blob, c)
	}
	checkDigests(t, l, blob)
	if !slices.EqualFunc(passed.entries, l.Entries, func(a, b index.Entry) bool { return a.Name == b.Name && a.Data == b.Data }) || passed.off > size {
		t.Errorf("%d entries and %d bytes passed", len(passed.entries), passed.off)
	}
	{
		again, err := OpenSkeleton(bytes.NewReader(skeleton.Bytes()), bytes.NewReader(append(sink.data, make([]byte, size-int64(len(sink.data)))...)))
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(again)
		if err != nil || !bytes.Equal(got, tarball) {
			t.Errorf("the tar made again differs: %v", err)
		}
		again.Close()
	}
	for b := range sink.blocks {
		if isZero(sink.at(b*index.BlockSize, index.BlockSize)) {
			t.Errorf("block %d of zeroes was written", b)
		}
	}
	compare(t, l, sink, tarball)
	return l
}

// checkFrame decompresses a frame from its own range of the blob.
func checkFrame(t *testing.T, l *index.Layer, i int, blob []byte, c Compression) {
	t.Helper()
	f, ps := l.Frames.Frame(i), l.Frames.FramePieces(i)
	if f.Kind == index.Stream {
		if c != Plain && !strings.Contains(t.Name(), "Sparse") {
			t.Errorf("frame %d is none", i)
		}
		return
	}
	point, err := l.Points.Point(f.Point - 1)
	if err != nil {
		t.Fatal(err)
	}
	in := bytes.NewReader(blob[f.Offset : f.Offset+f.Length])
	var r io.Reader = in
	switch f.Kind {
	case index.Deflate:
		r, err = inflate.Resume(in, point)
	case index.Blocks:
		r, err = zstdblocks.Resume(in, point)
	}
	if err != nil {
		t.Fatal(err)
	}
	var at int64
	for _, p := range ps {
		if _, err := io.CopyN(io.Discard, r, p.Inner-at); err != nil {
			t.Fatalf("frame %d: %v", i, err)
		}
		h := sha256.New()
		if _, err := io.CopyN(h, r, p.Size); err != nil || [sha256.Size]byte(h.Sum(nil)) != p.Digest {
			t.Fatalf("frame %d, %+v: piece %+v differs: %v", i, f, p, err)
		}
		at = p.Inner + p.Size
	}
}

// checkDigests checks that the digests of the points cover the blob.
func checkDigests(t *testing.T, l *index.Layer, blob []byte) {
	t.Helper()
	if l.Points == nil {
		return
	}
	end := int64(len(blob))
	n := 0
	for i := l.Points.Len() - 1; i >= 0; i-- {
		p := l.Points.At(i)
		if p.Digest == ([sha256.Size]byte{}) {
			continue
		}
		if n++; sha256.Sum256(blob[p.Start():end]) != p.Digest {
			t.Errorf("the digest of point %d, %d to %d, differs", i, p.Start(), end)
		}
		end = p.In
	}
	if zstd := Detect(blob) == Zstd; zstd != (n == 0) {
		t.Errorf("%d digests", n)
	}
}

type passing struct {
	entries []index.Entry
	off     int64
}

func (p *passing) Entry(e index.Entry) error { p.entries = append(p.entries, e); return nil }
func (p *passing) Passed(off int64)          { p.off = off }

func compare(t *testing.T, l *index.Layer, sink *memory, tarball []byte) {
	t.Helper()
	tr := tar.NewReader(bytes.NewReader(tarball))
	i := 0
	for {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		e := l.Entries[i]
		i++
		if name, _ := index.Clean(h.Name); e.Name != name || e.UID != uint32(h.Uid) || e.GID != uint32(h.Gid) ||
			!time.Unix(e.Mtime, int64(e.MtimeNs)).Equal(h.ModTime) || e.HardLink != (h.Typeflag == tar.TypeLink) ||
			!e.HardLink && e.Mode&0o7777 != uint32(h.Mode)&0o7777 || e.IsRegular() && e.Size != h.Size {
			t.Errorf("entry %+v, tar has %+v", e, h)
		}
		if !e.IsRegular() {
			continue
		}
		want, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		if e.Data%index.BlockSize != 0 || !bytes.Equal(want, sink.at(e.Data, e.Size)) {
			t.Errorf("%q: contents differ", e.Name)
		}
		// What no piece has must be zeroes.
		from, to := l.Frames.PiecesIn(e.Data, e.Size)
		for k := from; k < to && e.Size > 0; k++ {
			p := l.Frames.Piece(k)
			clear(want[p.Data-e.Data : p.Data-e.Data+p.Size])
		}
		if len(bytes.Trim(want, "\x00")) > 0 {
			t.Errorf("%q: bytes in no piece", e.Name)
		}
	}
	if i != len(l.Entries) {
		t.Errorf("%d entries, tar has %d", len(l.Entries), i)
	}
}

func readFile(t testing.TB, path string) []byte {
	t.Helper()
	p, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return p
}
