package estargz

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	upstream "github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/externaltoc"
	"github.com/klauspost/compress/gzip"
	digest "github.com/opencontainers/go-digest"

	"github.com/varvefs/varve/index"
	"github.com/varvefs/varve/index/indextest"
)

func open(blob []byte, dgst string) (*index.Layer, Landmark, error) {
	size := int64(len(blob))
	off, n, err := Locate(blob[size-TailSize(size):], size)
	if err != nil {
		return nil, Landmark{}, err
	}
	return Read(bytes.NewReader(blob[off:off+n]), dgst, size, off)
}

func TestBuilt(t *testing.T) {
	tarball := indextest.Tar(t, tar.FormatPAX, members())
	for name, tc := range map[string]struct {
		o      []upstream.Option
		marked bool
	}{
		"plain":       {},
		"chunks":      {o: []upstream.Option{upstream.WithChunkSize(10_000)}},
		"small":       {o: []upstream.Option{upstream.WithChunkSize(100)}},
		"min":         {o: []upstream.Option{upstream.WithMinChunkSize(20_000)}},
		"min chunks":  {o: []upstream.Option{upstream.WithChunkSize(3000), upstream.WithMinChunkSize(50_000)}},
		"prioritized": {o: []upstream.Option{upstream.WithPrioritizedFiles([]string{"exact", "bin/su"})}, marked: true},
	} {
		t.Run(name, func(t *testing.T) {
			blob, dgst := build(t, tarball, tc.o...)
			l, mark, err := open(blob, dgst)
			if err != nil {
				t.Fatal(err)
			}
			checkChunks(t, blob, l)
			checkTar(t, blob, l)
			if !mark.Set || (mark.End > 0) != tc.marked {
				t.Errorf("landmark %+v", mark)
			}
			if tc.marked && (l.Frames.Frame(0).Offset >= mark.End || l.Frames.Frame(2).Offset < mark.End) {
				t.Errorf("landmark %+v does not part the prioritized from the others", mark)
			}
			if name == "min" && sharedFrames(l) == 0 {
				t.Error("no frame holds two chunks: the test tests nothing")
			}
		})
	}
}

func TestLossless(t *testing.T) {
	var buf bytes.Buffer
	w := upstream.NewWriterLevel(&buf, gzip.BestSpeed)
	if err := w.AppendTarLossLess(bytes.NewReader(indextest.Tar(t, tar.FormatPAX, members()))); err != nil {
		t.Fatal(err)
	}
	d, err := w.Close()
	if err != nil {
		t.Fatal(err)
	}
	l, mark, err := open(buf.Bytes(), d.String())
	if err != nil || mark.Set {
		t.Fatal(mark, err)
	}
	checkChunks(t, buf.Bytes(), l)
	checkTar(t, buf.Bytes(), l)
}

func TestAnnotations(t *testing.T) {
	if upstream.TOCJSONDigestAnnotation != AnnotationTOCDigest || upstream.StoreUncompressedSizeAnnotation != AnnotationUncompressedSize {
		t.Error("annotations are not those of the library")
	}
	if _, ok := TOCDigest(nil); ok {
		t.Error("a digest of no annotations")
	}
	if d, ok := TOCDigest(map[string]string{AnnotationTOCDigest: "sha256:x"}); !ok || d != "sha256:x" {
		t.Error(d, ok)
	}
}

func TestTailSize(t *testing.T) {
	for in, want := range map[int64]int64{
		-1: 0, 0: 0, 50: 50, 64 << 10: 64 << 10, 1 << 20: 64 << 10, 32 << 20: 256 << 10, 1 << 40: 1 << 20,
	} {
		if got := TailSize(in); got != want {
			t.Errorf("TailSize(%d) = %d, want %d", in, got, want)
		}
	}
}

func legacy(off int64) []byte { return upstream.CreateGzipFooter(fmt.Appendf(nil, "%016xSTARGZ", off)) }

func modern(sub string) []byte {
	return upstream.CreateGzipFooter(append([]byte{'S', 'G', byte(len(sub)), 0}, sub...))
}

func TestLocate(t *testing.T) {
	pad := make([]byte, 100)
	join := func(a, b []byte) []byte { return append(append([]byte(nil), a...), b...) }
	for name, tc := range map[string]struct {
		tail     []byte
		size     int64
		off, len int64
		err      error
	}{
		"footer":       {tail: join(pad, modern("0000000000000010STARGZ")), size: 1051, off: 16, len: 984},
		"alone":        {tail: modern("0000000000000010STARGZ"), size: 1051, off: 16, len: 984},
		"legacy":       {tail: join(pad, legacy(16)), size: 1047, off: 16, len: 984},
		"legacy alone": {tail: legacy(16), size: 1047, off: 16, len: 984},
		"external":     {tail: join(pad, modern("STARGZEXTERNALTOC")), size: 1000, err: ErrExternalTOC},
		"external 46":  {tail: modern("STARGZEXTERNALTOC"), size: 46, err: ErrExternalTOC},
		"none":         {tail: pad, size: 100, err: index.ErrMalformed},
		"empty":        {err: index.ErrMalformed},
		"negative":     {size: -5, err: index.ErrMalformed},
		"larger":       {tail: pad, size: 99, err: index.ErrMalformed},
		"at the end":   {tail: modern("0000000000000400STARGZ"), size: 1024 + 51, err: index.ErrMalformed},
		"past the end": {tail: modern("7fffffffffffffffSTARGZ"), size: 1051, err: index.ErrMalformed},
		"minus":        {tail: modern("ffffffffffffffffSTARGZ"), size: 1051, err: index.ErrMalformed},
		"sign":         {tail: modern("+000000000000010STARGZ"), size: 1051, err: index.ErrMalformed},
		"too large":    {tail: modern("0000000000000010STARGZ"), size: 1 << 30, err: index.ErrMalformed},
		"cut":          {tail: modern("0000000000000010STARGZ")[1:], size: 1051, err: index.ErrMalformed},
	} {
		t.Run(name, func(t *testing.T) {
			off, n, err := Locate(tc.tail, tc.size)
			if off != tc.off || n != tc.len || !errors.Is(err, tc.err) {
				t.Errorf("got %d, %d, %v", off, n, err)
			}
		})
	}
	if externaltoc.FooterSize != externalFooterSize {
		t.Error("the external footer's size is not the library's")
	}
}

// packTOC makes a compressed TOC of a tar with one file.
func packTOC(t testing.TB, name, json string) []byte {
	var buf bytes.Buffer
	zw := gzip.NewWriter(&buf)
	if _, err := zw.Write(indextest.Tar(t, tar.FormatPAX, []indextest.Member{{H: tar.Header{Name: name, Mode: 0o644}, Data: []byte(json)}})); err != nil {
		t.Fatal(err)
	}
	if err := zw.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func TestReadRefuses(t *testing.T) {
	blob, dgst := build(t, indextest.Tar(t, tar.FormatPAX, members()))
	size := int64(len(blob))
	off, n, err := Locate(blob[size-footerSize:], size)
	if err != nil {
		t.Fatal(err)
	}
	toc := blob[off : off+n]
	const empty = `{"version":1,"entries":[]}`
	late := `{"version":1,"entries":[{"type":"reg","name":".prefetch.landmark","size":1,"offset":101}]}`
	for name, tc := range map[string]struct {
		toc       []byte
		digest    string
		size, off int64
		want      string
	}{
		"digest":    {toc, digest.FromString("x").String(), size, off, "has digest"},
		"no digest": {toc, "", size, off, "no sha256"},
		"empty":     {nil, dgst, size, off, "truncated"},
		"cut":       {toc[:len(toc)/2], dgst, size, off, "truncated"},
		"no gzip":   {[]byte("hello, this is no gzip"), dgst, size, off, "no gzip"},
		"no tar": {func() []byte {
			var b bytes.Buffer
			w := gzip.NewWriter(&b)
			w.Write(indextest.Noise(2000, 1))
			w.Close()
			return b.Bytes()
		}(), dgst, size, off, "no tar"},
		"name":       {packTOC(t, "other.json", empty), digest.FromString(empty).String(), size, off, "other.json"},
		"offset":     {toc, dgst, size, size, "of a blob"},
		"negative":   {toc, dgst, size, -1, "of a blob"},
		"size":       {toc, dgst, 0, 0, "of a blob"},
		"small data": {toc, dgst, size, 100, "data ends"},
		"landmark":   {packTOC(t, tocName, late), digest.FromString(late).String(), size, 100, "landmark"},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := Read(bytes.NewReader(tc.toc), tc.digest, tc.size, tc.off)
			if !errors.Is(err, index.ErrMalformed) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
		})
	}
	gone := errors.New("gone")
	for _, n := range []int{0, 5, len(toc) / 2} {
		r := io.MultiReader(bytes.NewReader(toc[:n]), iotest.ErrReader(gone))
		if _, _, err := Read(r, dgst, size, off); !errors.Is(err, gone) || errors.Is(err, index.ErrMalformed) {
			t.Errorf("a failing reader at %d: %v", n, err)
		}
	}
}

func FuzzLocate(f *testing.F) {
	f.Add(modern("0000000000000010STARGZ"), int64(1051))
	f.Add(legacy(16), int64(1051))
	f.Add(modern("STARGZEXTERNALTOC"), int64(46))
	f.Fuzz(func(t *testing.T, tail []byte, size int64) {
		off, n, err := Locate(tail, size)
		if err != nil {
			if !errors.Is(err, index.ErrMalformed) {
				t.Error(err)
			}
			return
		}
		if off < 0 || n <= 0 || off+n > size {
			t.Errorf("TOC of %d at %d of %d", n, off, size)
		}
	})
}

func FuzzRead(f *testing.F) {
	blob, _ := build(f, indextest.Tar(f, tar.FormatPAX, members()[:3]), upstream.WithChunkSize(3))
	size := int64(len(blob))
	off, n, err := Locate(blob[size-footerSize:], size)
	if err != nil {
		f.Fatal(err)
	}
	zr, err := gzip.NewReader(bytes.NewReader(blob[off : off+n]))
	if err != nil {
		f.Fatal(err)
	}
	raw, err := io.ReadAll(zr)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw, size, off, false)
	f.Add(blob[off:off+n], size, off, true)
	f.Fuzz(func(t *testing.T, data []byte, size, off int64, packed bool) {
		if !packed {
			var buf bytes.Buffer
			zw, _ := gzip.NewWriterLevel(&buf, gzip.BestSpeed)
			zw.Write(data)
			zw.Close()
			data = buf.Bytes()
		}
		// A reader that gets past the digest: take it from the data.
		want := digest.FromString("x").String()
		if zr, err := gzip.NewReader(bytes.NewReader(data)); err == nil {
			tr := tar.NewReader(io.LimitReader(zr, 1<<20))
			if _, err := tr.Next(); err == nil {
				if d, err := digest.FromReader(tr); err == nil {
					want = d.String()
				}
			}
		}
		l, mark, err := Read(bytes.NewReader(data), want, size, off)
		if err != nil {
			if !errors.Is(err, index.ErrMalformed) {
				t.Error(err)
			}
			return
		}
		if err := l.Frames.Verify(); err != nil || mark.End < 0 || mark.End > off {
			t.Error(err, mark)
		}
	})
}
