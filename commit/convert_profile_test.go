package commit

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"

	"github.com/varvefs/varve/index"
)

func mustProfile(t testing.TB, text string) *Profile {
	t.Helper()
	p, err := ParseProfile(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestParseProfile(t *testing.T) {
	d := digest.FromString("m")
	got := mustProfile(t, "# what a start reads\n\n/usr/bin/sh\r\n./etc//passwd\n a b \n"+
		`{"path":"lib/x","manifestDigest":"`+d.String()+`","layerIndex":2}`+"\n"+`  {"path":"/lib/y","later":1}`)
	want := []profileLine{{"usr/bin/sh", "", -1}, {"etc/passwd", "", -1}, {" a b ", "", -1}, {"lib/x", d, 2}, {"lib/y", "", -1}}
	if d := cmp.Diff(want, got.lines, cmp.AllowUnexported(profileLine{})); d != "" {
		t.Error(d)
	}
	for _, bad := range []string{"../x", "a\n{}", `{"path":"x"`, `{"path":"x","layerIndex":-1}`, strings.Repeat("x", maxProfileLine+1), "a\x00b"} {
		if p, err := ParseProfile(strings.NewReader(bad)); err == nil {
			t.Errorf("%.20q: %v", bad, p)
		}
	}
	if _, err := ParseProfile(strings.NewReader(strings.Repeat("x\n", maxProfilePaths+1))); err == nil {
		t.Error("too many paths")
	}
	if _, err := ParseProfile(io.MultiReader(strings.NewReader("a\n"), broken{io.ErrUnexpectedEOF})); err == nil {
		t.Error("a broken reader")
	}
}

// names gives those of a tar's entries, in order.
func namesOf(t testing.TB, raw []byte) (names []string) {
	t.Helper()
	tr := tar.NewReader(bytes.NewReader(raw))
	for {
		h, err := tr.Next()
		if err == io.EOF {
			return names
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, h.Name)
	}
}

func dir(name string) packEntry {
	return packEntry{h: tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755}}
}

func link2(name, to string) packEntry {
	return packEntry{h: tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: to, Mode: 0o644}}
}

func symlink(name, to string) packEntry {
	return packEntry{h: tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: to, Mode: 0o777}}
}

// fronts says what of a layer comes first.
func fronts(t testing.TB, raw []byte) []string {
	t.Helper()
	names := namesOf(t, raw)
	i := slices.Index(names, estargz.PrefetchLandmark)
	if i < 0 {
		if names[0] != estargz.NoPrefetchLandmark {
			t.Errorf("no landmark in %q", names)
		}
		return nil
	}
	if slices.Contains(names, estargz.NoPrefetchLandmark) {
		t.Errorf("two landmarks in %q", names)
	}
	return names[:i]
}

func TestConvertFront(t *testing.T) {
	body := bytes.Repeat([]byte("body "), 300)
	low := []packEntry{
		dir("./"), dir("etc/"), dir("usr/"), dir("usr/bin/"), regular("etc/a", body), regular("etc/b", body),
		regular("usr/bin/tool", body), link2("usr/bin/alias", "usr/bin/tool"), link2("usr/bin/second", "./usr/bin/alias"),
		symlink("bin", "usr/bin"), regular("etc/c", body), regular("etc/hidden", body), regular("etc/empty", nil),
		dir("opaque/"), regular("opaque/old", body), dir("gone/"), regular("gone/file", body), regular("became/file", body),
		regular("same", body),
	}
	top := []packEntry{
		dir("etc/"), regular("etc/.wh.hidden", nil), regular("etc/b", body), regular("opaque/.wh..wh..opq", nil), regular("opaque/new", body),
		regular(".wh.gone", nil), regular("became", body), regular("deep/in/it", body), regular("x", body),
		regular("dup", body), link2("duplink", "dup"), regular("dup", body), dir("twice/"), regular("twice/f", body), dir("twice/"),
		regular("wh/.wh.f", nil), regular("wh/f", body), regular("y/.wh.f", nil), regular("mixed/f", body), regular("mixed", body),
		symlink("via", "deep"), regular("via/f", body),
	}
	s := sourceOf(t, false, []string{"gzip"}, plainTar(t, low), plainTar(t, top))
	record := func(path string, layer int) string {
		return fmt.Sprintf(`{"path":%q,"manifestDigest":%q,"layerIndex":%d}`+"\n", path, s.base.Digest, layer)
	}
	for _, tc := range []struct {
		name, profile string
		low, top      []string
		missing       string
	}{
		{"order", "etc/c\n/etc/a\nx\netc/c", []string{"./", "etc/", "etc/c", "etc/a"}, []string{"x"}, ""},
		{"topmost", "etc/b", nil, []string{"etc/", "etc/b"}, ""},
		{"a layer", record("etc/b", 0) + record("etc/b", 1), []string{"./", "etc/", "etc/b"}, []string{"etc/", "etc/b"}, ""},
		{"another image", strings.Replace(record("etc/b", 0), "sha256:", "sha256:0", 1), nil, []string{"etc/", "etc/b"}, ""},
		{"no such layer", record("etc/b", 7), nil, nil, "1 of the 1 paths"},
		{"not in the layer", record("etc/a", 1), nil, nil, "1 of the 1 paths"},
		{"deleted", "etc/hidden\ngone/file\nopaque/old\nbecame/file\nnever", nil, nil, "5 of the 5 paths"},
		{"opaque", "opaque/new", nil, []string{"opaque/new"}, ""},
		{"hard link", "usr/bin/alias", []string{"./", "usr/", "usr/bin/", "usr/bin/tool"}, nil, ""},
		{"link to a link", "usr/bin/second\nusr/bin/tool", []string{"./", "usr/", "usr/bin/", "usr/bin/tool"}, nil, ""},
		{"what has no contents", "bin\netc\netc/empty", []string{"./", "etc/", "etc/empty"}, nil, ""},
		{"no directories", "deep/in/it", nil, []string{"deep/in/it"}, ""},
		{"stays", "dup\nduplink\nwh/f\nmixed\nmixed/f\nvia/f", nil, nil, ""},
		{"directory twice", "twice/f", nil, []string{"twice/", "twice/f"}, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := convertAll(t, s, ConvertOptions{Profile: mustProfile(t, tc.profile)})
			for i, want := range [][]string{tc.low, tc.top} {
				raw := untarred(t, got.layers[i])
				if d := cmp.Diff(want, fronts(t, raw)); d != "" {
					t.Errorf("layer %d: %s", i, d)
				}
				was, is := listing(t, [][]byte{plainTar(t, low), plainTar(t, top)}[i]), listing(t, raw)
				rest := slices.DeleteFunc(slices.Clone(was), func(l string) bool { return slices.Contains(is[:len(want)], l) })
				left := is[len(want):]
				if tc.name == "directory twice" { // of two entries that are alike one is first
					rest, left = nil, nil
				}
				if d := cmp.Diff(rest, left); d != "" {
					t.Errorf("what was not moved in layer %d: %s", i, d)
				}
				slices.Sort(was)
				slices.Sort(is)
				if d := cmp.Diff(was, is); d != "" {
					t.Errorf("layer %d: %s", i, d)
				}
			}
			if warned := strings.Join(got.warned, "\n"); !strings.Contains(warned, tc.missing) || tc.missing == "" && warned != "" {
				t.Errorf("warned: %q", warned)
			}
		})
	}
}

// TestConvertFrontOffsets holds the places of files in the blob against the
// landmark's: what lies before the member that holds it is what readers prefetch.
func TestConvertFrontOffsets(t *testing.T) {
	list := some()
	wanted := []string{"small/0030", "big/04", "etc/x", "small/0002", "etc/empty", "holes/mid"}
	s := sourceOf(t, false, []string{"zstd"}, plainTar(t, list))
	o := ConvertOptions{Profile: mustProfile(t, strings.Join(wanted, "\n"))}
	for _, to := range compressions {
		o.To = to
		got := convertAll(t, s, o)
		raw := untarred(t, got.layers[0])
		var first []string
		for _, name := range namesOf(t, raw) {
			if slices.Contains(wanted, name) {
				first = append(first, name)
			}
		}
		if d := cmp.Diff(wanted, first); d != "" {
			t.Errorf("%s: %s", to, d)
		}
		if to != EStargz {
			if slices.Contains(namesOf(t, raw), estargz.PrefetchLandmark) {
				t.Errorf("%s: a landmark, which is a file like any other there", to)
			}
			continue
		}
		r := verified(t, got.layers[0], got.Layers[0].Annotations)
		mark, ok := r.Lookup(estargz.PrefetchLandmark)
		if !ok || mark.InnerOffset != 0 || mark.Offset == 0 {
			t.Fatalf("landmark %+v", mark)
		}
		entries, _ := stargzEntries(t, got.layers[0])
		last, before := int64(-1), true
		for _, e := range entries {
			if e.Name == estargz.PrefetchLandmark {
				before = false
			}
			if e.Type != "reg" && e.Type != "chunk" || e.Size == 0 && e.Type == "reg" {
				continue
			}
			if e.Offset < last || before != (e.Offset < mark.Offset) || before && !slices.Contains(wanted, e.Name) {
				t.Errorf("%s at %d, after %d, the landmark is at %d", e.Name, e.Offset, last, mark.Offset)
			}
			last = e.Offset
		}
	}
}

// TestConvertFrontKept leaves lazy layers alone of which the profile names nothing.
func TestConvertFrontKept(t *testing.T) {
	a, b := plainTar(t, []packEntry{regular("a", []byte("a"))}), plainTar(t, []packEntry{regular("b", []byte("b"))})
	s := sourceOf(t, false, []string{"estargz"}, a, b)
	got := convertAll(t, s, ConvertOptions{Profile: mustProfile(t, "b")})
	if got.done.Kept != 1 || got.done.Converted != 1 || got.Layers[0].Digest != s.base.Layers[0].Digest {
		t.Errorf("%+v", got.done)
	}
	if d := cmp.Diff([]string{"b"}, fronts(t, untarred(t, got.layers[1]))); d != "" {
		t.Error(d)
	}
	// With the same profile once more, all stays as it is named now.
	if again := convertAll(t, s, ConvertOptions{Profile: mustProfile(t, "nothing")}); again.Digest != s.base.Digest {
		t.Error("nothing was named, and something was converted")
	}
}

func FuzzParseProfile(f *testing.F) {
	f.Add([]byte("# x\n/a/b\n{\"path\":\"c\",\"layerIndex\":1}\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		p, err := ParseProfile(bytes.NewReader(text))
		if err != nil {
			return
		}
		for _, l := range p.lines {
			if clean, err := index.Clean("/" + l.path); err != nil || clean != l.path || l.layer < -1 {
				t.Errorf("%+v", l)
			}
		}
	})
}
