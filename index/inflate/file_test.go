package inflate

import (
	"bytes"
	"crypto/sha256"
	"io"
	"os"
	"testing"

	stdgzip "compress/gzip"

	"github.com/varvefs/varve/index"
)

// TestFile compares with Go's own reader over a large blob, and reads on from its
// points to their next. The blob is this program, or the one that INFLATE_BLOB
// names.
func TestFile(t *testing.T) {
	blob, err := os.ReadFile(os.Getenv("INFLATE_BLOB"))
	if err != nil {
		blob = program(t)
	}
	zr, err := stdgzip.NewReader(bytes.NewReader(blob))
	if err != nil {
		t.Fatal(err)
	}
	want := sha256.New()
	size, err := io.Copy(want, zr)
	if err != nil {
		t.Fatal(err)
	}
	var points []index.Point
	got := sha256.New()
	all := new(bytes.Buffer)
	if n, err := io.Copy(io.MultiWriter(got, all), NewReader(bytes.NewReader(blob), every(1<<20, &points))); err != nil || n != size {
		t.Fatalf("%d bytes, %v; want %d", n, err, size)
	}
	if !bytes.Equal(got.Sum(nil), want.Sum(nil)) {
		t.Fatal("other bytes")
	}
	z := new(Reader)
	buf := make([]byte, 3<<20)
	for i, p := range points {
		end := size
		if i+1 < len(points) {
			end = points[i+1].Out
		}
		if err := z.Resume(bytes.NewReader(blob[p.Start():]), p); err != nil {
			t.Fatal(err)
		}
		b := buf[:min(end-p.Out, int64(len(buf)))]
		if _, err := io.ReadFull(z, b); err != nil || !bytes.Equal(b, all.Bytes()[p.Out:][:len(b)]) {
			t.Fatalf("from point %d at %d: %v", i, p.In, err)
		}
	}
}

// program gives the program that runs, compressed.
func program(t *testing.T) []byte {
	t.Helper()
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	w := stdgzip.NewWriter(&b)
	if _, err := w.Write(p); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}
