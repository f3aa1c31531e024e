package fetch

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"

	"github.com/varvefs/varve/bench/link"
	"github.com/varvefs/varve/index"
)

// text is what compresses as files do, so that points of it take little.
func text(n int, seed uint64) []byte {
	words := strings.Fields("a varve is a thin layer of sediment laid down one season at time and what lies below it was there before")
	b := make([]byte, 0, n+20)
	for len(b) < n {
		seed = seed*6364136223846793005 + 1442695040888963407
		b = append(append(b, words[seed>>32%uint64(len(words))]...), ' ')
		b = append(strconv.AppendUint(b, seed>>56, 10), ' ')
	}
	return b[:n]
}

// volumes are files that several frames hold, and one that a frame holds.
func volumes(n, size int) []file {
	fs := []file{{"first", text(1000, 100)}}
	for i := range n {
		fs = append(fs, file{fmt.Sprintf("volume%d", i), text(size, uint64(i))})
	}
	return append(fs, file{"zeroes", make([]byte, 300_000)}, file{"last", text(1000, 200)})
}

// manyFrames is zstd in frames of 64 KiB.
func manyFrames(t testing.TB, p []byte) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest))
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	var b []byte
	for part := range slices.Chunk(p, 64<<10) {
		b = w.EncodeAll(part, b)
	}
	return b
}

// cutForms are layers without an index, each cut into several frames.
func cutForms(t testing.TB) map[string]*layer {
	t.Helper()
	fs, large := volumes(5, 1<<20), volumes(5, 4<<20)
	return map[string]*layer{
		"gzip":             packLayer(t, makeTar(t, fs), fs, gz),
		"zstd, one frame":  packLayer(t, makeTar(t, large), large, zst),
		"zstd, many":       packLayer(t, makeTar(t, fs), fs, manyFrames),
		"tar":              packLayer(t, makeTar(t, fs), fs, raw),
		"gzip, two blobs":  packLayer(t, makeTar(t, fs), fs, twice(gz)),
		"zstd, two frames": packLayer(t, makeTar(t, large), large, twice(zst)),
	}
}

// twice packs each half by itself.
func twice(pack func(testing.TB, []byte) []byte) func(testing.TB, []byte) []byte {
	return func(t testing.TB, p []byte) []byte {
		return append(pack(t, p[:len(p)/2]), pack(t, p[len(p)/2:])...)
	}
}

// blocks gives what a layer's data file takes on the disk, in bytes.
func blocks(t testing.TB, l *Layer) int64 {
	t.Helper()
	var st syscall.Stat_t
	if err := syscall.Stat(l.Path(), &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

func dropAll(t testing.TB, h *Handle) {
	t.Helper()
	_, n, _ := h.frames.Len()
	var want int64
	for i := range n {
		a, p := h.About(), h.frames.Piece(i)
		if h.data.Present(p.Frame) && (a.Unproven || a.Contents == 0 || p.Data < a.Contents) {
			want += p.Size
		}
	}
	if got, err := h.Drop(); err != nil || got != want {
		t.Fatalf("dropped %d bytes of %d: %v", got, want, err)
	}
	if frames, _, _ := h.frames.Len(); h.data.Missing() != frames || h.Local() != 0 {
		t.Fatalf("%d of %d frames are missing, %d bytes local", h.data.Missing(), frames, h.Local())
	}
	if n := blocks(t, h.Layer); n > 0 {
		t.Errorf("%d bytes are left on the disk", n)
	}
}

func TestLayersWithoutIndex(t *testing.T) {
	for name, l := range cutForms(t) {
		t.Run(name, func(t *testing.T) {
			t.Run("dropped", func(t *testing.T) { readAfterDrop(t, l) })
			t.Run("corrupt", func(t *testing.T) { corruptSpan(t, l) })
			t.Run("unranged", func(t *testing.T) { unrangedAfterDrop(t, l) })
			t.Run("shared", func(t *testing.T) { shareBundle(t, l) })
		})
	}
}

// readAfterDrop reads a layer whole once, and after its frames are dropped only
// the ranges of those that a file lies in.
func readAfterDrop(t *testing.T, l *layer) {
	s := serve(t, l)
	m := on(t, t.TempDir(), quick)
	h := m.open(t, l, s.origin(l))
	if diff := cmp.Diff([]string{asked(0, l.Size)}, s.ranges()); diff != "" {
		t.Fatal(diff)
	}
	if a := h.About(); a.Index != "checkpoints" || a.DiffID != l.diffID || a.Unproven || !h.Whole() {
		t.Errorf("%+v, whole: %v", a, h.Whole())
	}
	frames, _, _ := h.frames.Len()
	if frames < 2 {
		t.Fatalf("%d frames", frames)
	}
	if n, err := m.Layers(l.Digest)[0].Drop(); err != nil || n == 0 {
		t.Fatalf("dropped %d bytes: %v", n, err)
	}
	for _, name := range []string{"volume2", "last"} {
		if _, err := h.Drop(); err != nil {
			t.Fatal(err)
		}
		s.Reset()
		before := h.Fetched()
		want := span(t, h, name)
		checkFile(t, h, find(t, l, name))
		checkFile(t, h, find(t, l, name))
		if diff := cmp.Diff([]string{want}, s.ranges()); diff != "" {
			t.Error(diff)
		}
		from, end := bounds(t, want)
		if got := h.Fetched() - before; got != end-from || got >= l.Size {
			t.Errorf("%q: %d bytes of a blob of %d came for frames of %d", name, got, l.Size, end-from)
		}
		for i := range frames {
			f := h.frames.Frame(i)
			if in := f.Offset >= from && f.Offset+f.Length <= end; h.data.Present(i) != in {
				t.Errorf("frame %d is present: %v", i, !in)
			}
		}
	}
	s.Reset()
	checkFile(t, h, find(t, l, "zeroes"))
	checkAll(t, h, l)
	total := s.Totals()[link.Blob]
	if total.Bytes > l.Size {
		t.Errorf("%d bytes came for what was missing of %d", total.Bytes, l.Size)
	}
	dropAll(t, h)

	// The next daemon has no more of it than this one, and no network.
	checkFile(t, h, find(t, l, "first"))
	m.close(t)
	m = on(t, m.dir, quick)
	h = m.open(t, l)
	checkFile(t, h, find(t, l, "first"))
	if _, err := content(h, entry(t, h, "last")); !errors.Is(err, ErrOffline) {
		t.Errorf("got %v", err)
	}
	m.open(t, l, s.origin(l))
	checkAll(t, h, l)
}

// TestFramesShareAByte reads two frames, the second of which begins in the last
// byte of the first.
func TestFramesShareAByte(t *testing.T) {
	fs := volumes(6, 1<<20)
	l := packLayer(t, makeTar(t, fs), fs, gz)
	s := serve(t, l)
	m := on(t, t.TempDir(), quick)
	h := m.open(t, l, s.origin(l))
	frames, _, _ := h.frames.Len()
	shared := 0
	for i := range frames - 1 {
		a, b := h.frames.Frame(i), h.frames.Frame(i+1)
		if b.Offset != a.Offset+a.Length-1 {
			continue
		}
		shared++
		dropAll(t, h)
		s.Reset()
		ps := append(h.frames.FramePieces(i), h.frames.FramePieces(i+1)...)
		first, last := ps[0], ps[len(ps)-1]
		if err := h.Ensure(first.Data, last.Data+last.Size-first.Data); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]string{asked(a.Offset, b.Offset+b.Length)}, s.ranges()); diff != "" {
			t.Error(diff)
		}
		for _, p := range ps {
			if err := checkPiece(h.data.File(), &p, new(uint32)); err != nil {
				t.Error(err)
			}
		}
		// The second alone, and then the first.
		dropAll(t, h)
		s.Reset()
		for _, p := range []index.Piece{last, first} {
			if err := h.Ensure(p.Data, 1); err != nil {
				t.Fatal(err)
			}
		}
		if diff := cmp.Diff([]string{asked(b.Offset, b.Offset+b.Length), asked(a.Offset, a.Offset+a.Length)}, s.ranges()); diff != "" {
			t.Error(diff)
		}
	}
	if shared == 0 {
		t.Fatalf("none of %d frames share a byte", frames)
	}
	checkAll(t, h, l)
}

// corruptSpan asks again for a span whose contents do not verify.
func corruptSpan(t *testing.T, l *layer) {
	s := serve(t, l)
	m := on(t, t.TempDir(), quick)
	h := m.open(t, l, s.origin(l))
	frames, _, _ := h.frames.Len()
	f := h.frames.Frame(frames / 2)
	p := h.frames.FramePieces(frames / 2)[0]
	r := asked(f.Offset, f.Offset+f.Length)
	for _, test := range []struct {
		faults []*link.Fault
		want   error
	}{
		{[]*link.Fault{{Corrupt: f.Length / 2}}, nil},
		{[]*link.Fault{{Corrupt: f.Length / 2}, {Corrupt: f.Length / 3}}, ErrVerify},
	} {
		dropAll(t, h)
		s.Reset()
		s.spoil(test.faults...)
		failures := m.count(t, "verify_failures_total", "chunk")
		if err := h.Ensure(p.Data, 1); !errors.Is(err, test.want) {
			t.Errorf("got %v, want %v", err, test.want)
		}
		if diff := cmp.Diff([]string{r, r}, s.ranges()); diff != "" {
			t.Error(diff)
		}
		if n := m.count(t, "verify_failures_total", "chunk") - failures; n != 1 {
			t.Errorf("%d failures are counted", n)
		}
		if h.data.Present(frames/2) != (test.want == nil) {
			t.Error("what does not verify is present, or what does is not")
		}
		if err := checkPiece(h.data.File(), &p, new(uint32)); test.want == nil && err != nil {
			t.Error(err)
		}
	}
	forgive(h)
	checkAll(t, h, l)
}

// unrangedAfterDrop brings dropped frames from a registry that gives only whole
// blobs: all of them at once.
func unrangedAfterDrop(t *testing.T, l *layer) {
	s := serve(t, l)
	m := on(t, t.TempDir(), quick)
	h := m.open(t, l, s.origin(l))
	dropAll(t, h)
	s.Reset()
	s.always(link.Fault{DropRange: true})
	checkFile(t, h, find(t, l, "volume3"))
	checkAll(t, h, l)
	if n := len(s.ranges()); n > 2 || !h.Whole() {
		t.Errorf("%d requests, whole: %v", n, h.Whole())
	}
}
