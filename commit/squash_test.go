package commit

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	digest "github.com/opencontainers/go-digest"

	"github.com/varvefs/varve/fs/upper"
	"github.com/varvefs/varve/index"
)

// compressed gives a tar as a layer, in one form after the other.
func compressed(t *testing.T, layer []byte, form int) Blob {
	t.Helper()
	var buf bytes.Buffer
	switch form % 3 {
	case 0:
		buf.Write(layer)
	case 1: // in members, as eStargz has them
		for len(layer) > 0 {
			n := min(len(layer), 4000)
			z := gzip.NewWriter(&buf)
			z.Write(layer[:n])
			ok(t, z.Close())
			layer = layer[n:]
		}
	case 2:
		z, err := zstd.NewWriter(&buf)
		ok(t, err)
		z.Write(layer)
		ok(t, z.Close())
	}
	return Blob{ReaderAt: bytes.NewReader(buf.Bytes()), Size: int64(buf.Len())}
}

func TestSquash(t *testing.T) {
	for n := range uint64(3) {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			r := seed(t, 300+n)
			base := scratch(t)
			below := filepath.Join(base, "0")
			fill(t, below, r, false)
			image := filepath.Join(base, "image")
			copyTree(t, below, image)
			var chain []Blob
			for i := range 3 {
				im, _ := imageOf(t, below)
				merged, up := overlay(t, upper.Trusted, below)
				c := changer{t: t, root: merged, r: r}
				for range 40 {
					c.change()
				}
				got, err := Entries(context.Background(), up, im, EntryOptions{})
				ok(t, err)
				layer := tarOf(t, got.Entries)
				if i < 2 {
					next := filepath.Join(base, fmt.Sprint(i+1))
					copyTree(t, below, next)
					applyLayer(t, layer, next)
					below = next
					b := compressed(t, layer, int(n)+i)
					b.DiffID = digest.FromBytes(layer)
					chain = append(chain, b)
					continue
				}
				s, err := Squash(context.Background(), chain, got.Entries, base)
				ok(t, err)
				defer s.Close()
				squashed := tarOf(t, s.Entries)
				if !bytes.Equal(squashed, tarOf(t, s.Entries)) {
					t.Error("it is not the same twice")
				}
				unpackLayer(t, squashed, image, true) // the chain does not know what the base has
				sameTrees(t, "the mount, and the squashed layer over the base", look(t, merged), look(t, image))
			}
			names, err := filepath.Glob(filepath.Join(base, "tar-*"))
			if err != nil || len(names) > 0 {
				t.Errorf("left behind: %q %v", names, err)
			}
		})
	}
}

func TestSquashCases(t *testing.T) {
	entry := func(typ byte, name, link string) Entry {
		return Entry{Header: &tar.Header{Typeflag: typ, Name: name, Linkname: link, Mode: 0o644}}
	}
	dir := func(name string) Entry { return entry(tar.TypeDir, name+"/", "") }
	reg := func(name string) Entry { return entry(tar.TypeReg, name, "") }
	hard := func(name, to string) Entry { return entry(tar.TypeLink, name, to) }
	tests := []struct {
		name   string
		layers [][]Entry
		want   []string
	}{
		{"a deletion stays, and takes what is lower in the chain", [][]Entry{{dir("a"), reg("a/f")}, {reg(".wh.a")}}, []string{".wh.a"}},
		{"what comes again after its deletion hides the base's", [][]Entry{{reg(".wh.a"), reg(".wh.f")}, {dir("a"), reg("a/f"), reg("f")}},
			[]string{"a/", "a/.wh..wh..opq", "a/f", "f"}},
		{"a directory where a file was", [][]Entry{{reg("a")}, {dir("a")}}, []string{"a/", "a/.wh..wh..opq"}},
		{"opaque", [][]Entry{{dir("a"), reg("a/f"), reg("a/.wh.g")}, {dir("a"), reg("a/.wh..wh..opq"), reg("a/h")}},
			[]string{"a/", "a/.wh..wh..opq", "a/h"}},
		{"directories merge", [][]Entry{{dir("a"), reg("a/f")}, {dir("a"), reg("a/g")}}, []string{"a/", "a/f", "a/g"}},
		{"a link outlives the name it was made for", [][]Entry{{reg("a"), hard("b", "a"), hard("c", "a")}, {reg("a")}},
			[]string{"a", "b", "c -> b"}},
		{"a link of an upper layer to a lower one", [][]Entry{{reg("z")}, {hard("a", "z")}}, []string{"a", "z -> a"}},
		{"whiteouts stand first", [][]Entry{{reg("a"), reg(".wh.z"), reg(".wh.b")}}, []string{".wh.b", ".wh.z", "a"}},
		{"a file in a directory that was deleted and is not listed", [][]Entry{{reg(".wh.a")}, {reg("a/f")}},
			[]string{"a/.wh..wh..opq", "a/f"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var chain []Blob
			last := len(tt.layers) - 1
			for _, l := range tt.layers[:last] {
				b := tarOf(t, l)
				chain = append(chain, Blob{bytes.NewReader(b), int64(len(b)), digest.FromBytes(b)})
			}
			s, err := Squash(context.Background(), chain, tt.layers[last], t.TempDir())
			ok(t, err)
			defer s.Close()
			var got []string
			for _, e := range s.Entries {
				name := e.Header.Name
				if e.Header.Typeflag == tar.TypeLink {
					name += " -> " + e.Header.Linkname
				}
				got = append(got, name)
			}
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Errorf("(-want +got):\n%s", d)
			}
		})
	}
	good := tarOf(t, []Entry{reg("a")})
	for name, b := range map[string]Blob{
		"empty":        {bytes.NewReader(nil), 0, ""},
		"other digest": {bytes.NewReader(good), int64(len(good)), digest.FromString("x")},
		"cut gzip":     {bytes.NewReader([]byte("\x1f\x8b\x08\x00")), 4, ""},
	} {
		if _, err := Squash(context.Background(), []Blob{b}, nil, t.TempDir()); !errors.Is(err, index.ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
	b := tarOf(t, []Entry{hard("a", "nowhere")})
	if _, err := Squash(context.Background(), []Blob{{bytes.NewReader(b), int64(len(b)), digest.FromBytes(b)}}, nil, t.TempDir()); err == nil {
		t.Error("a link to nowhere passed")
	}
}
