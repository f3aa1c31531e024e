package test

import (
	"archive/tar"
	"bytes"
	"fmt"
	"hash/fnv"
	"io"
	"math/rand/v2"
	"path"
	"strings"
	"testing"
	"time"

	"github.com/varvefs/varve/bench/forms"
)

func opener(layer []byte) forms.Opener {
	return func() (io.ReadCloser, error) { return nopCloser{bytes.NewReader(layer)}, nil }
}

// layer writes a layer's tar by hand.
type layer struct {
	t   *testing.T
	buf bytes.Buffer
	w   *tar.Writer
}

func newLayer(t *testing.T) *layer {
	l := &layer{t: t}
	l.w = tar.NewWriter(&l.buf)
	return l
}

// bytes ends the layer.
func (l *layer) bytes() []byte {
	l.t.Helper()
	must(l.t, l.w.Close())
	return l.buf.Bytes()
}

// epoch is the time of every file that a test has nothing to say about.
var epoch = time.Unix(1_600_000_000, 123_456_789)

func (l *layer) add(h tar.Header, content []byte) {
	l.t.Helper()
	h.Format = tar.FormatPAX
	h.Size = int64(len(content))
	if h.ModTime.IsZero() {
		h.ModTime = epoch
	}
	if h.Mode == 0 {
		h.Mode = 0o644
		if h.Typeflag == tar.TypeDir {
			h.Mode = 0o755
		}
	}
	if err := l.w.WriteHeader(&h); err != nil {
		l.t.Fatalf("%q: %v", h.Name, err)
	}
	_, err := l.w.Write(content)
	must(l.t, err)
}

func (l *layer) dir(names ...string) {
	l.t.Helper()
	for _, n := range names {
		l.add(tar.Header{Typeflag: tar.TypeDir, Name: strings.TrimSuffix(n, "/") + "/"}, nil)
	}
}

func (l *layer) file(name string, content []byte) {
	l.t.Helper()
	l.add(tar.Header{Typeflag: tar.TypeReg, Name: name}, content)
}

func (l *layer) symlink(name, target string) {
	l.t.Helper()
	l.add(tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}, nil)
}

func (l *layer) hardlink(name, target string) {
	l.t.Helper()
	l.add(tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target}, nil)
}

func (l *layer) whiteout(names ...string) {
	l.t.Helper()
	for _, n := range names {
		l.file(path.Join(path.Dir(n), ".wh."+path.Base(n)), nil)
	}
}

func (l *layer) opaque(dir string) {
	l.t.Helper()
	l.file(path.Join(dir, ".wh..wh..opq"), nil)
}

// xattrs gives the PAX records of extended attributes.
func xattrs(kv ...string) map[string]string {
	m := map[string]string{}
	for i := 0; i < len(kv); i += 2 {
		m["SCHILY.xattr."+kv[i]] = kv[i+1]
	}
	return m
}

// content gives n bytes that depend on the name alone, about half of them
// compressible.
func content(name string, n int) []byte {
	h := fnv.New64a()
	io.WriteString(h, name)
	r := rand.New(rand.NewPCG(h.Sum64(), 1))
	b := make([]byte, 0, n+64)
	for len(b) < n {
		if r.IntN(2) == 0 {
			b = append(b, strings.Repeat(string(rune('a'+r.IntN(26))), 40)...)
			continue
		}
		for range 5 {
			v := r.Uint64()
			b = append(b, byte(v), byte(v>>8), byte(v>>16), byte(v>>24), byte(v>>32), byte(v>>40), byte(v>>48), byte(v>>56))
		}
	}
	return b[:n]
}

// small gives a layer of n files of the same size, and their names.
func small(t *testing.T, n, size int) ([]byte, []string) {
	l := newLayer(t)
	l.dir(".", "etc", "files")
	l.file("etc/hostname", []byte("varve\n"))
	names := make([]string, n)
	for i := range names {
		names[i] = fmt.Sprintf("files/%04d", i)
		l.file(names[i], content(names[i], size))
	}
	return l.bytes(), names
}
