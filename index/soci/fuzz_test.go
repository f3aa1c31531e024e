package soci

import (
	"archive/tar"
	"errors"
	"io"
	"testing"

	"github.com/varvefs/varve/index"
	"github.com/varvefs/varve/index/indextest"
)

func FuzzRead(f *testing.F) {
	d := sound()
	f.Add(d.bytes(), d.blob)
	// A small one: a span of the first layout, whose only point is not in it.
	d.points, d.have, d.last, d.digests = nil, 1, 0, d.digests[:1]
	d.files[0].pax = []string{"SCHILY.xattr.user.x", "1", "LIBARCHIVE.xattr.user.y", "AP8"}
	f.Add(d.bytes(), d.blob)
	d = plainDoc(4096, 1000, 5)
	f.Add(d.bytes(), d.blob)
	tarball := indextest.Tar(f, tar.FormatPAX, members())
	_, s := plain(tarball, 100_000)
	f.Add(write(f, s), s.Compressed)
	f.Fuzz(func(t *testing.T, ztoc []byte, blob int64) {
		l, err := Read(ztoc, blob)
		if err != nil {
			if !errors.Is(err, index.ErrMalformed) {
				t.Fatal(err)
			}
			return
		}
		if err := covers(l); err != nil {
			t.Fatal(err)
		}
		for _, e := range l.Entries {
			if c, err := index.Clean("/" + e.Name); err != nil || c != e.Name {
				t.Fatalf("name %q", e.Name)
			}
			if e.IsRegular() && e.Size > 0 && (e.Data%index.BlockSize != 0 || e.Data < 0 || e.Size > l.Contents-e.Data) {
				t.Fatalf("%+v, contents of %d bytes", e, l.Contents)
			}
		}
		if l.Uncompressed < 1<<20 {
			if n, err := io.Copy(io.Discard, l.Tar(zeroes{})); err != nil || n != l.Uncompressed {
				t.Fatalf("tar of %d bytes, want %d: %v", n, l.Uncompressed, err)
			}
		}
	})
}

type zeroes struct{}

func (zeroes) ReadAt(p []byte, _ int64) (int, error) { clear(p); return len(p), nil }
