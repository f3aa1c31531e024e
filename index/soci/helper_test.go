package soci

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/varvefs/varve/index"
	"github.com/varvefs/varve/index/indextest"
	"github.com/varvefs/varve/index/inflate"
	"github.com/varvefs/varve/index/tarscan"
)

func members() []indextest.Member {
	when := time.Unix(-3, 250_000_000)
	return []indextest.Member{
		{H: tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o755, ModTime: when}},
		{H: tar.Header{Name: "a/", Typeflag: tar.TypeDir, Mode: 0o1777, ModTime: when, Uname: "root", Gname: "wheel"}},
		{H: tar.Header{Name: "a/su", Mode: 0o4755, ModTime: when, Uid: 4000000000, Gid: 7, PAXRecords: map[string]string{
			"SCHILY.xattr.security.capability": "\x01\x00\x00\x02\xff\x00",
			"SCHILY.xattr.user.both":           "plain",
			"LIBARCHIVE.xattr.user.both":       "b3RoZXI",
			"LIBARCHIVE.xattr.user.x%20y":      "AP8",
			"LIBARCHIVE.creationtime":          "1",
		}}, Data: []byte("hello")},
		{H: tar.Header{Name: "big", Mode: 0o644, ModTime: when}, Data: indextest.Noise(300_017, 1)},
		{H: tar.Header{Name: "zeros", Mode: 0o600, ModTime: when}, Data: make([]byte, 200_000)},
		{H: tar.Header{Name: "block", Mode: 0o644}, Data: indextest.Noise(512, 2)},
		{H: tar.Header{Name: "empty", Mode: 0o600}},
		{H: tar.Header{Name: "link", Typeflag: tar.TypeSymlink, Linkname: "../a/su", Mode: 0o777}},
		{H: tar.Header{Name: "hard", Typeflag: tar.TypeLink, Linkname: "./a/su", Mode: 0o4755}},
		{H: tar.Header{Name: "null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 300, Mode: 0o666}},
		{H: tar.Header{Name: "disk", Typeflag: tar.TypeBlock, Devmajor: 300, Devminor: 1, Mode: 0o660}},
		{H: tar.Header{Name: "pipe", Typeflag: tar.TypeFifo, Mode: 0o600}},
		{H: tar.Header{Name: "a/.wh.gone", Mode: 0o600}},
		{H: tar.Header{Name: "cont", Typeflag: tar.TypeCont, Mode: 0o600}, Data: []byte("old")},
	}
}

// plainMembers are those that the older formats can hold as well.
func plainMembers() []indextest.Member {
	ms := members()
	for i := range ms {
		ms[i].H.PAXRecords, ms[i].H.ModTime = nil, time.Unix(1_700_000_000, 0)
		if ms[i].H.Uid > 1<<20 {
			ms[i].H.Uid = 1000
		}
	}
	return ms
}

// source makes a gzip blob of a member for every span, the points of which need
// no state, and what describes it.
func source(t testing.TB, tarball []byte, span int) (blob []byte, s Source) {
	t.Helper()
	var buf bytes.Buffer
	s = Source{Tar: bytes.NewReader(tarball), Uncompressed: int64(len(tarball)), Gzip: true, SpanSize: int64(span), Tool: "test"}
	for at := 0; at < len(tarball); at += span {
		from := buf.Len()
		zw := gzip.NewWriter(&buf)
		if _, err := zw.Write(tarball[at:min(at+span, len(tarball))]); err != nil {
			t.Fatal(err)
		}
		if err := zw.Close(); err != nil {
			t.Fatal(err)
		}
		s.Points = append(s.Points, index.Point{In: int64(from + plainGzipHeader), Out: int64(at)})
	}
	s.Compressed = int64(buf.Len())
	sum(s.Points, buf.Bytes())
	return buf.Bytes(), s
}

// resumed makes a gzip blob of one member, and points at its blocks.
func resumed(t testing.TB, tarball []byte, span int64) (blob []byte, s Source) {
	t.Helper()
	var buf bytes.Buffer
	zw := gzip.NewWriter(&buf)
	zw.Name = "layer.tar"
	if _, err := zw.Write(tarball); err != nil {
		t.Fatal(err)
	}
	if err := zw.Close(); err != nil {
		t.Fatal(err)
	}
	s = Source{Tar: bytes.NewReader(tarball), Compressed: int64(buf.Len()), Uncompressed: int64(len(tarball)), Gzip: true, SpanSize: span, Tool: "test"}
	last := -span
	zr := inflate.NewReader(bytes.NewReader(buf.Bytes()), inflate.Options{
		Want: func(_ int64, _ uint8, out int64) bool {
			if out-last < span {
				return false
			}
			last = out
			return true
		},
		Point: func(p index.Point) error { s.Points = append(s.Points, p); return nil },
	})
	if _, err := io.Copy(io.Discard, zr); err != nil {
		t.Fatal(err)
	}
	sum(s.Points, buf.Bytes())
	return buf.Bytes(), s
}

// plain describes a blob that is the tar.
func plain(tarball []byte, span int) (blob []byte, s Source) {
	n := int64(len(tarball))
	s = Source{Tar: bytes.NewReader(tarball), Compressed: n, Uncompressed: n, SpanSize: int64(span), Tool: "test"}
	for at := int64(0); at < n; at += s.SpanSize {
		s.Points = append(s.Points, index.Point{In: at, Out: at})
	}
	sum(s.Points, tarball)
	return tarball, s
}

func sum(points []index.Point, blob []byte) {
	for i := range points {
		end := int64(len(blob))
		if i+1 < len(points) {
			end = points[i+1].In
		}
		points[i].Digest = sha256.Sum256(blob[points[i].Start():end])
	}
}

func write(t testing.TB, s Source) []byte {
	t.Helper()
	var buf bytes.Buffer
	if err := Write(&buf, s); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// file is a data file in memory.
type file []byte

func (f file) ReadAt(p []byte, off int64) (int, error) { return bytes.NewReader(f).ReadAt(p, off) }

// fill gives the data file of a layer, each of its frames decompressed from its
// own bytes of the blob.
func fill(t testing.TB, l *Layer, blob []byte) file {
	t.Helper()
	frames, _, size := l.Frames.Len()
	data := make(file, size)
	for i := range frames {
		f := l.Frames.Frame(i)
		raw := blob[f.Offset : f.Offset+f.Length]
		p, err := l.Points.Point(f.Point - 1)
		if err != nil {
			t.Fatal(err)
		}
		if sha256.Sum256(raw) != p.Digest {
			t.Fatalf("frame %d: the digest differs", i)
		}
		var in io.Reader = bytes.NewReader(raw)
		if f.Kind == index.Deflate {
			if in, err = inflate.Resume(in, p); err != nil {
				t.Fatal(err)
			}
		}
		var at int64
		for _, q := range l.Frames.FramePieces(i) {
			if q.Inner != at {
				t.Fatalf("frame %d: piece %+v does not follow %d", i, q, at)
			}
			if _, err := io.ReadFull(in, data[q.Data:q.Data+q.Size]); err != nil {
				t.Fatalf("frame %d: piece %+v: %v", i, q, err)
			}
			at += q.Size
		}
	}
	return data
}

// covers proves that every byte of the tar lies in exactly one piece.
func covers(l *Layer) error {
	if err := l.Frames.Verify(); err != nil {
		return err
	}
	frames, _, size := l.Frames.Len()
	if l.Points == nil || l.Points.Len() != frames || l.Contents > size {
		return fmt.Errorf("%d frames, contents of %d bytes in %d", frames, l.Contents, size)
	}
	var at int64
	for i := range frames {
		f := l.Frames.Frame(i)
		p := l.Points.At(f.Point - 1)
		if f.Point != i+1 || f.Offset != p.Start() || p.Out < at {
			return fmt.Errorf("frame %+v of point %+v, after %d bytes", f, p, at)
		}
		if i == 0 && p.Out != 0 {
			return fmt.Errorf("the tar begins at %d", p.Out)
		}
		if i > 0 && p.Out != at {
			return fmt.Errorf("frame %d begins at %d, the one before ends at %d", i, p.Out, at)
		}
		for _, q := range l.Frames.FramePieces(i) {
			if p.Out+q.Inner != at || q.Digest != [sha256.Size]byte{} {
				return fmt.Errorf("piece %+v of frame %d, after %d bytes", q, i, at)
			}
			at += q.Size
		}
	}
	if at != l.Uncompressed {
		return fmt.Errorf("%d bytes in pieces, tar of %d", at, l.Uncompressed)
	}
	return nil
}

// check reads a zTOC and compares with the blob and with what a pass over it says.
func check(t *testing.T, ztoc, blob, tarball []byte) *Layer {
	t.Helper()
	raw := bytes.Clone(ztoc)
	l, err := Read(raw, int64(len(blob)))
	if err != nil {
		t.Fatal(err)
	}
	clear(raw) // nothing of it may be kept
	if err := covers(l); err != nil {
		t.Fatal(err)
	}
	want, _, err := tarscan.Scan(context.Background(), bytes.NewReader(tarball), tarscan.Plain, discard{}, tarscan.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want.Entries, l.Entries); d != "" {
		t.Errorf("entries, a pass gives -, the zTOC +:\n%s", d)
	}
	data := fill(t, l, blob)
	tr := tar.NewReader(bytes.NewReader(tarball))
	for _, e := range l.Entries {
		if _, err := tr.Next(); err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		if e.Data%index.BlockSize != 0 || e.Data+e.Size > l.Contents || !bytes.Equal(got, data[e.Data:e.Data+e.Size]) {
			t.Errorf("%q: contents differ", e.Name)
		}
	}
	got, err := io.ReadAll(l.Tar(data))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, tarball[:l.Uncompressed]) {
		t.Error("the tar is not what it was")
	}
	return l
}

type discard struct{}

func (discard) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }
