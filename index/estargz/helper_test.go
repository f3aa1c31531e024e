package estargz

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"io"
	"testing"
	"time"

	upstream "github.com/containerd/stargz-snapshotter/estargz"
	"github.com/klauspost/compress/gzip"

	"github.com/varvefs/varve/index"
	"github.com/varvefs/varve/index/indextest"
)

func members() []indextest.Member {
	when := time.Unix(1700000000, 0)
	big := indextest.Noise(300_000, 1)
	return []indextest.Member{
		{H: tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o755, ModTime: when}},
		{H: tar.Header{Name: "bin/", Typeflag: tar.TypeDir, Mode: 0o1777, ModTime: time.Unix(-5, 0)}},
		{H: tar.Header{Name: "bin/su", Mode: 0o4755, ModTime: when, Uid: 4000000000, Gid: 7, PAXRecords: map[string]string{
			"SCHILY.xattr.security.capability": "\x01\x00\x00\x02\xff\x00",
		}}, Data: []byte("hello")},
		{H: tar.Header{Name: "bin/big", Mode: 0o2755, ModTime: when}, Data: big},
		{H: tar.Header{Name: "bin/copy", Mode: 0o644, ModTime: when}, Data: big},
		{H: tar.Header{Name: "exact", Mode: 0o644, ModTime: when}, Data: indextest.Noise(10_000, 5)},
		{H: tar.Header{Name: "zeros", Mode: 0o600, ModTime: when}, Data: make([]byte, 70_000)},
		{H: tar.Header{Name: "empty", Mode: 0o600, ModTime: when}},
		{H: tar.Header{Name: "link", Typeflag: tar.TypeSymlink, Linkname: "../bin/su", Mode: 0o777, ModTime: when}},
		{H: tar.Header{Name: "hard", Typeflag: tar.TypeLink, Linkname: "./bin/su", Mode: 0o4755, ModTime: when}},
		{H: tar.Header{Name: "null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 300, Mode: 0o666, ModTime: when}},
		{H: tar.Header{Name: "disk", Typeflag: tar.TypeBlock, Devmajor: 300, Devminor: 1, Mode: 0o660, ModTime: when}},
		{H: tar.Header{Name: "pipe", Typeflag: tar.TypeFifo, Mode: 0o600, ModTime: when}},
		{H: tar.Header{Name: "bin/.wh.gone", Mode: 0o600, ModTime: when}},
	}
}

func build(t testing.TB, tarball []byte, o ...upstream.Option) (blob []byte, dgst string) {
	t.Helper()
	b, err := upstream.Build(io.NewSectionReader(bytes.NewReader(tarball), 0, int64(len(tarball))), o...)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if blob, err = io.ReadAll(b); err != nil {
		t.Fatal(err)
	}
	return blob, b.TOCDigest().String()
}

func sharedFrames(l *index.Layer) (n int) {
	frames, _, _ := l.Frames.Len()
	for i := range frames {
		if len(l.Frames.FramePieces(i)) > 1 {
			n++
		}
	}
	return n
}

// checkChunks decompresses every frame from its own range of the blob alone and
// compares every piece with its digest.
func checkChunks(t *testing.T, blob []byte, l *index.Layer) {
	t.Helper()
	if err := l.Frames.Verify(); err != nil {
		t.Fatal(err)
	}
	frames, _, _ := l.Frames.Len()
	for i := range frames {
		f := l.Frames.Frame(i)
		zr, err := gzip.NewReader(bytes.NewReader(blob[f.Offset : f.Offset+f.Length]))
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(zr)
		if err != nil {
			t.Fatalf("frame %d: %v", i, err)
		}
		for _, p := range l.Frames.FramePieces(i) {
			if p.Inner+p.Size > int64(len(data)) || sha256.Sum256(data[p.Inner:p.Inner+p.Size]) != p.Digest {
				t.Fatalf("frame %d (%+v of %d bytes): piece %+v differs", i, f, len(data), p)
			}
		}
	}
}

// checkTar compares entries with the tar in the blob.
func checkTar(t *testing.T, blob []byte, l *index.Layer) {
	t.Helper()
	zr, err := gzip.NewReader(bytes.NewReader(blob))
	if err != nil {
		t.Fatal(err)
	}
	tr := tar.NewReader(zr)
	i := 0
	for {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		name, _ := index.Clean(h.Name)
		if new(landmarks).skip(name, 0) {
			continue
		}
		if i >= len(l.Entries) {
			t.Fatalf("%q is missing", h.Name)
		}
		e := l.Entries[i]
		i++
		if e.Name != name || e.UID != uint32(h.Uid) || e.GID != uint32(h.Gid) || !e.HardLink && e.Mode&0o7777 != uint32(h.Mode) || e.Mtime != h.ModTime.Unix() {
			t.Fatalf("entry %+v, tar has %+v", e, h)
		}
		if int64(index.Major(e.Rdev)) != h.Devmajor || int64(index.Minor(e.Rdev)) != h.Devminor {
			t.Errorf("%q is device %d:%d", e.Name, index.Major(e.Rdev), index.Minor(e.Rdev))
		}
		for _, x := range e.Xattrs {
			if h.PAXRecords["SCHILY.xattr."+x.Name] != string(x.Value) {
				t.Fatalf("%q: xattr %q is %q", e.Name, x.Name, x.Value)
			}
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		want, err := io.ReadAll(tr)
		if err != nil || e.Size != int64(len(want)) {
			t.Fatal(e, err)
		}
		from, to := l.Frames.PiecesIn(e.Data, e.Size)
		var covered int64
		for k := from; k < to && e.Size > 0; k++ {
			p := l.Frames.Piece(k)
			at := p.Data - e.Data
			if sha256.Sum256(want[at:at+p.Size]) != p.Digest {
				t.Fatalf("%q: piece at %d differs", e.Name, at)
			}
			covered += p.Size
		}
		if covered != e.Size {
			t.Errorf("%q: %d of %d bytes in pieces", e.Name, covered, e.Size)
		}
	}
	if i != len(l.Entries) {
		t.Fatalf("%d entries, tar has %d", len(l.Entries), i)
	}
}
