package main

import (
	"archive/tar"
	"bytes"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"

	"github.com/varvefs/varve/bench/forms"
	"github.com/varvefs/varve/index"
)

func TestChoose(t *testing.T) {
	var every []string
	for _, m := range measures {
		every = append(every, m.name)
	}
	for _, c := range []struct{ in, want []string }{
		{nil, every},
		{[]string{"all"}, every},
		{[]string{"shared", "walk"}, []string{"walk", "shared"}},
		{[]string{"walk", "run"}, nil},
	} {
		got, err := choose(c.in)
		if (err != nil) != (c.want == nil) {
			t.Fatalf("choose(%q): %v", c.in, err)
		}
		var names []string
		for _, m := range got {
			names = append(names, m.name)
		}
		if d := cmp.Diff(c.want, names); d != "" {
			t.Errorf("choose(%q) (-want +got):\n%s", c.in, d)
		}
	}
}

func TestWriteTree(t *testing.T) {
	pool := bytes.Repeat([]byte("package main\n"), 1<<10)
	for i := range trees {
		var first bytes.Buffer
		if err := writeTree(&first, i, pool); err != nil {
			t.Fatal(err)
		}
		files, dirs, seen := 0, 0, map[string]bool{}
		for r := tar.NewReader(bytes.NewReader(first.Bytes())); ; {
			h, err := r.Next()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			if seen[h.Name] {
				t.Fatalf("layer %d has %s twice", i, h.Name)
			}
			seen[h.Name] = true
			if h.Typeflag == tar.TypeDir {
				dirs++
			} else {
				files++
			}
		}
		if want := manyFilesCount / len(trees); files != want || dirs < want/20 || dirs > want/5 {
			t.Errorf("layer %d has %d files in %d directories", i, files, dirs)
		}
		var again bytes.Buffer
		if err := writeTree(&again, i, pool); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(first.Bytes(), again.Bytes()) {
			t.Errorf("layer %d is not the same twice", i)
		}
	}
}

func TestCompressFrames(t *testing.T) {
	content := make([]byte, 5<<20)
	for i, r := 0, rand.New(rand.NewPCG(1, 2)); i < len(content); i++ {
		content[i] = byte('a' + r.IntN(4))
	}
	for _, c := range []struct {
		size, frame int64
		want        int
	}{{0, 0, 1}, {5 << 20, 0, 1}, {5 << 20, 2 << 20, 3}, {4 << 20, 2 << 20, 2}} {
		var blob bytes.Buffer
		if err := compressFrames(&blob, bytes.NewReader(content[:c.size]), c.frame); err != nil {
			t.Fatal(err)
		}
		d, err := decompressBy(wayZstdPoints, bytes.NewReader(blob.Bytes()))
		if err != nil || d.Size != c.size {
			t.Fatalf("%d bytes in frames of %d: %d come back, %v", c.size, c.frame, d.Size, err)
		}
		if got := bytes.Count(blob.Bytes(), []byte{0x28, 0xb5, 0x2f, 0xfd}); c.size > 0 && got != c.want {
			t.Errorf("%d bytes in frames of %d: %d frames, want %d", c.size, c.frame, got, c.want)
		}
		z, err := zstd.NewReader(&blob)
		if err != nil {
			t.Fatal(err)
		}
		back, err := io.ReadAll(z)
		z.Close()
		if err != nil || !bytes.Equal(back, content[:c.size]) {
			t.Errorf("%d bytes in frames of %d do not come back: %v", c.size, c.frame, err)
		}
	}
}

func TestDecompressBy(t *testing.T) {
	// More than one span, of which little is repeated.
	content := make([]byte, 4<<20)
	for i, r := 0, rand.New(rand.NewPCG(3, 4)); i < len(content); i++ {
		content[i] = byte('a' + r.IntN(16))
	}
	gz, zst := compressed(t, forms.Gzip, content), compressed(t, forms.Zstd, content)
	for _, c := range []struct {
		way    string
		blob   []byte
		points bool
	}{
		{wayGzipPoints, gz, true}, {wayInflate, gz, false}, {wayGzipKlauspost, gz, false}, {wayGzipGo, gz, false},
		{wayZstdPoints, zst, true}, {wayZstdBlocks, zst, false}, {wayZstdOne, zst, false}, {wayZstdMany, zst, false},
	} {
		d, err := decompressBy(c.way, bytes.NewReader(c.blob))
		if err != nil || d.Size < int64(len(content)) || (d.Points > 0) != c.points {
			t.Errorf("%s: %+v, %v", c.way, d, err)
		}
	}
	if _, err := decompressBy("by hand", bytes.NewReader(gz)); err == nil {
		t.Error("a way that there is not was gone")
	}
}

// compressed gives the blob of a layer with one file.
func compressed(t *testing.T, form forms.Form, content []byte) []byte {
	t.Helper()
	open := func() (io.ReadCloser, error) {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "file", Mode: 0o644, Size: int64(len(content))}); err != nil {
			return nil, err
		}
		if _, err := w.Write(content); err != nil {
			return nil, err
		}
		return io.NopCloser(&b), w.Close()
	}
	img, err := forms.FromLayers(t.Context(), form, forms.Options{Dir: t.TempDir()}, open)
	if err != nil {
		t.Fatal(err)
	}
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	r, err := layers[0].Compressed()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	blob, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return blob
}

func TestSpans(t *testing.T) {
	var w index.PointsWriter
	s := spans{points: &w}
	var got []int64
	for out := int64(0); out < 2<<20; out += 100 << 10 {
		if s.want(out/3, 0, out) {
			got = append(got, out)
		}
	}
	if d := cmp.Diff([]int64{0, 600 << 10, 1200 << 10, 1800 << 10}, got); d != "" {
		t.Errorf("points (-want +got):\n%s", d)
	}
}
