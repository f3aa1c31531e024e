package containerd

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/varvefs/varve/image"
)

func TestAddress(t *testing.T) {
	sockets = []string{t.TempDir() + "/none", t.TempDir()}
	for _, tt := range []struct{ env, named, want string }{
		{"", "", sockets[1]},
		{"unix:///env.sock", "", "/env.sock"},
		{"/env.sock", "/named.sock", "/named.sock"},
		{"", "unix:///named.sock", "/named.sock"},
	} {
		t.Setenv("CONTAINERD_ADDRESS", tt.env)
		if got := Address(tt.named); got != tt.want {
			t.Errorf("%+v: %s", tt, got)
		}
	}
	sockets = sockets[:1]
	t.Setenv("CONTAINERD_ADDRESS", "")
	if got := Address(""); got != sockets[0] {
		t.Errorf("with no socket there: %s", got)
	}
}

func TestAddRepository(t *testing.T) {
	for _, tt := range [][3]string{
		{"", "library/a", "library/a"},
		{"library/a", "library/a", "library/a"},
		{"library/b", "library/a", "library/a,library/b"},
		{"a,c", "b", "a,b,c"},
	} {
		if got := addRepository(tt[0], tt[1]); got != tt[2] {
			t.Errorf("%q and %q: %q", tt[0], tt[1], got)
		}
	}
}

// TestListLayers has more layers than a label has room for.
func TestListLayers(t *testing.T) {
	var ls []image.Layer
	for i := range 100 {
		ls = append(ls, image.Layer{Digest: digest.FromString(fmt.Sprint(i))})
	}
	list := listLayers(ls)
	if err := labels.Validate(snapshotters.TargetImageLayersLabel, list); err != nil {
		t.Fatal(err)
	}
	got := strings.Split(list, ",")
	for i, l := range got {
		if l != ls[i].Digest.String() {
			t.Fatalf("layer %d is %s", i, l)
		}
	}
	if len(got) < 50 || len(got) == len(ls) {
		t.Errorf("%d layers are named", len(got))
	}
	if list := listLayers(ls[99:]); list != ls[99].Digest.String() {
		t.Errorf("of one layer: %s", list)
	}
}

// sample is an image of two layers behind a manifest list.
func sample(t *testing.T) Image {
	t.Helper()
	im := Image{Name: "registry.example:5000/team/app:1", Documents: map[string][]byte{}}
	put := func(v any) ocispec.Descriptor {
		raw, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		d := digest.FromBytes(raw)
		im.Documents[d.String()] = raw
		return ocispec.Descriptor{Digest: d, Size: int64(len(raw))}
	}
	a, b := digest.FromString("a"), digest.FromString("b")
	config := put(ocispec.Image{RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{a, b}}})
	config.MediaType = ocispec.MediaTypeImageConfig
	m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: config}
	m.SchemaVersion = 2
	for _, l := range []digest.Digest{a, b} {
		m.Layers = append(m.Layers, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: l, Size: 1})
	}
	manifest := put(m)
	manifest.MediaType = m.MediaType
	list := ocispec.Index{Manifests: []ocispec.Descriptor{manifest}}
	list.SchemaVersion = 2
	im.Manifest, im.Target = manifest.Digest.String(), put(list).Digest.String()
	return im
}

func TestParse(t *testing.T) {
	im := sample(t)
	p, err := im.parse()
	if err != nil {
		t.Fatal(err)
	}
	if p.target.Digest.String() != im.Target || p.target.MediaType != ocispec.MediaTypeImageIndex || p.target.Size != int64(len(im.Documents[im.Target])) {
		t.Errorf("target %+v", p.target)
	}
	types := map[string]string{}
	for _, d := range p.docs {
		types[d.Digest.String()] = d.MediaType
	}
	want := map[string]string{
		im.Target: ocispec.MediaTypeImageIndex, im.Manifest: ocispec.MediaTypeImageManifest,
		p.manifest.ConfigDesc.Digest.String(): ocispec.MediaTypeImageConfig,
	}
	if diff := cmp.Diff(want, types); diff != "" {
		t.Error(diff)
	}

	for what, spoil := range map[string]func(*Image){
		"no config":           func(im *Image) { delete(im.Documents, p.manifest.ConfigDesc.Digest.String()) },
		"no manifest":         func(im *Image) { delete(im.Documents, im.Manifest) },
		"no list":             func(im *Image) { delete(im.Documents, im.Target) },
		"another list":        func(im *Image) { im.Documents[im.Target] = []byte("{}") },
		"another manifest":    func(im *Image) { im.Documents[im.Manifest] = append(im.Documents[im.Manifest], ' ') },
		"something unnamed":   func(im *Image) { im.Documents["../x"] = nil },
		"a name that is none": func(im *Image) { im.Name = "A B" },
		"a name in a layout":  func(im *Image) { im.Name = "oci:/x" },
		"a config of others":  func(im *Image) { im.Manifest = im.Target },
	} {
		im := sample(t)
		spoil(&im)
		if _, err := im.parse(); err == nil {
			t.Errorf("%s: no error", what)
		}
	}
}

func TestNames(t *testing.T) {
	im := sample(t)
	p, err := im.parse()
	if err != nil {
		t.Fatal(err)
	}
	c := &Client{Config: Config{Namespace: "default"}}
	if diff := cmp.Diff([]string{im.Name}, c.names(p)); diff != "" {
		t.Error(diff)
	}
	c.Namespace = "k8s.io"
	pinned := "registry.example:5000/team/app@" + im.Target
	if diff := cmp.Diff([]string{p.manifest.ConfigDesc.Digest.String(), im.Name, pinned}, c.names(p)); diff != "" {
		t.Error(diff)
	}
	im.Name = pinned
	if p, err = im.parse(); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{p.manifest.ConfigDesc.Digest.String(), pinned}, c.names(p)); diff != "" {
		t.Error(diff)
	}
}
