package run

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestParseVolume(t *testing.T) {
	for _, c := range []struct {
		in   string
		want place
		err  string
	}{
		{in: "/data", want: place{kind: volumePlace, dest: "/data"}},
		{in: "/h:/c", want: place{source: "/h", dest: "/c"}},
		{in: "/h/../i/:/c//d/", want: place{source: "/i", dest: "/c/d"}},
		{in: "/h:/c:ro", want: place{source: "/h", dest: "/c", readOnly: true}},
		{in: "/h:/c:rw,Z", want: place{source: "/h", dest: "/c"}},
		{in: "/h:/c:ro,z,rshared,cached", want: place{source: "/h", dest: "/c", readOnly: true, propagation: "rshared"}},
		{in: "name:/c", want: place{kind: volumePlace, source: "name", dest: "/c"}},
		{in: "name:/c:nocopy,ro", want: place{kind: volumePlace, source: "name", dest: "/c", noCopy: true, readOnly: true}},
		{in: "", err: "invalid volume specification: ''"},
		{in: ":/c", err: "invalid volume specification"},
		{in: "/c:ro", err: "invalid volume specification"},
		{in: "/h:/c:ro:x", err: "invalid volume specification"},
		{in: "/h:/c:ro,rw", err: "invalid mode: ro,rw"},
		{in: "/h:/c:fast", err: "invalid mode: fast"},
		{in: "/h:/c:nocopy", err: "nocopy is for volumes"},
		{in: "name:/c:shared", err: "propagation is for host directories"},
		{in: "/h:c", err: "mount path must be absolute"},
		{in: "/h:/", err: "destination can't be '/'"},
		{in: "/h:/x/..", err: "destination can't be '/'"},
		{in: "c", err: "mount path must be absolute"},
		{in: "../x:/c", err: "includes invalid characters for a local volume name"},
		{in: "a/b:/c", err: "includes invalid characters"},
		{in: ".x:/c", err: "includes invalid characters"},
		{in: "x:/c", err: "includes invalid characters"}, // docker's names have two letters at least
	} {
		got, err := parseVolume(c.in)
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%q: error %v, want %q", c.in, err, c.err)
			}
		} else if d := cmp.Diff(c.want, got, cmp.AllowUnexported(place{})); d != "" || err != nil {
			t.Errorf("%q: %v %s", c.in, err, d)
		}
	}
}

func TestParseTmpfs(t *testing.T) {
	for in, want := range map[string]string{
		"/t":                         "noexec nosuid nodev rprivate",
		"/t:exec,size=1m":            "nosuid nodev rprivate exec size=1m",
		"/t:size=1m,size=2m,ro,rw":   "noexec nosuid nodev rprivate size=2m rw",
		"/t:mode=1777,uid=3,private": "noexec nosuid nodev mode=1777 uid=3 private",
		"/t:lowerdir=/":              "",
		"/t:bind":                    "",
		"t":                          "",
		"/":                          "",
	} {
		got, err := parseTmpfs(in)
		if (err != nil) != (want == "") {
			t.Errorf("%q: %v", in, err)
		} else if err == nil && strings.Join(got.options, " ") != want {
			t.Errorf("%q: %v, want %s", in, got.options, want)
		}
	}
}

func TestPlaces(t *testing.T) {
	img := ocispec.ImageConfig{Volumes: map[string]struct{}{"/b/c": {}, "/a": {}, "/v/": {}}}
	got, err := places(Options{Volumes: []string{"/x:/b/c/d", "n1:/v"}, Tmpfs: []string{"/b/c"}}, img)
	must(t, err)
	var dests []string
	for _, p := range got {
		dests = append(dests, p.dest)
	}
	// Upper ones first; the image's only where the user has none.
	if want := []string{"/v", "/a", "/b/c", "/b/c/d"}; !slices.Equal(dests, want) || got[0].source != "n1" || got[2].kind != tmpfsPlace {
		t.Errorf("%+v, want %v", got, want)
	}
	if _, err := places(Options{Volumes: []string{"/x:/b", "/y:/b/."}}, img); err == nil || err.Error() != "Duplicate mount point: /b" {
		t.Errorf("the same place twice: %v", err)
	}
	if _, err := places(Options{}, ocispec.ImageConfig{Volumes: map[string]struct{}{"relative": {}}}); err == nil {
		t.Error("a relative volume of the image's is taken")
	}
	a, b := place{dest: "/a"}, place{dest: "/b"}
	if a.directory() == b.directory() || a.directory() != (place{dest: "/a"}).directory() || strings.Contains(a.directory(), "/") {
		t.Errorf("volumes' directories: %s, %s", a.directory(), b.directory())
	}
}
