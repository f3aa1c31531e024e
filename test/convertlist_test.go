package test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/varvefs/varve/bench/forms"
)

// platforms is a list of images with an attestation, as BuildKit pushes it.
func platforms(t *testing.T, docker bool, archs ...string) v1.ImageIndex {
	t.Helper()
	idx := v1.ImageIndex(empty.Index)
	var add []mutate.IndexAddendum
	for i, arch := range archs {
		l := newLayer(t)
		l.dir("etc")
		l.file("etc/arch", []byte(arch))
		l.file("etc/more", content(arch, 100_000))
		common := newLayer(t)
		common.file("common", content("common", 100_000))
		img := changeConfig(t, build(t, forms.Gzip, l.bytes(), common.bytes()), func(f map[string]any) { f["architecture"] = arch })
		p := &v1.Platform{OS: "linux", Architecture: arch}
		add = append(add, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: p, Annotations: map[string]string{"of": arch}}})
		if i > 0 {
			continue
		}
		statement := static.NewLayer([]byte(`{"_type":"https://in-toto.io/Statement/v0.1"}`), "application/vnd.in-toto+json")
		att := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
		att = mutate.ConfigMediaType(att, types.OCIConfigJSON)
		att = mustGet[v1.Image](t)(mutate.Append(att, mutate.Addendum{Layer: statement, MediaType: "application/vnd.in-toto+json"}))
		add = append(add, mutate.IndexAddendum{Add: att, Descriptor: v1.Descriptor{
			Platform: &v1.Platform{OS: "unknown", Architecture: "unknown"},
			Annotations: map[string]string{
				"vnd.docker.reference.type": "attestation-manifest", "vnd.docker.reference.digest": mustGet[v1.Hash](t)(img.Digest()).String(),
			},
		}})
	}
	idx = mutate.AppendManifests(idx, add...)
	if docker {
		return mutate.IndexMediaType(idx, types.DockerManifestList)
	}
	return mutate.Annotations(idx, map[string]string{"of": "the list"}).(v1.ImageIndex)
}

// TestConvertAllPlatforms converts a list, of a registry and of a layout, and pushes
// it.
func TestConvertAllPlatforms(t *testing.T) {
	needRoot(t)
	other := map[string]string{"amd64": "arm64"}[runtime.GOARCH]
	if other == "" {
		other = "amd64"
	}
	for _, archs := range [][]string{{"s390x", runtime.GOARCH, other}, {other, "riscv64"}} {
		idx := platforms(t, false, archs...)
		r := newRegistry(t)
		must(t, remote.WriteIndex(r.reference("list/image:1"), idx))
		path := layout.Path(t.TempDir())
		path = mustGet[layout.Path](t)(layout.Write(string(path), empty.Index))
		must(t, path.AppendIndex(idx))
		h := newHost(t)
		var digests []string
		for i, src := range []string{r.rec.Addr() + "/list/image:1", "oci:" + string(path)} {
			for _, to := range []string{"estargz", "zstd:chunked"} {
				repo := fmt.Sprintf("to/image%d:%s", i, strings.ReplaceAll(to, ":", "-"))
				res := h.run("convert", "--all-platforms", "--to", to, "--push", src, r.rec.Addr()+"/"+repo)
				if res.code != 0 {
					t.Fatal(res)
				}
				id := isDigest(t, strings.TrimSpace(res.out))
				digests = append(digests, id)
				if !strings.Contains(res.err, fmt.Sprintf("\n%d layers converted", len(archs)+1)) {
					t.Errorf("the layer that all have was not converted once: %s", res.err)
				}
				got := mustGet[v1.ImageIndex](t)(remote.Index(r.reference(repo)))
				if d := mustGet[v1.Hash](t)(got.Digest()).String(); d != id {
					t.Errorf("the registry has %s, want %s", d, id)
				}
				sameList(t, idx, got)
				for _, arch := range archs {
					dir := h.ok("mount", "--platform", "linux/"+arch, r.rec.Addr()+"/"+repo)
					holds(t, filepath.Join(dir, "etc/arch"), arch)
					h.ok("umount", dir)
				}
				fresh := newHost(t)
				dir := fresh.ok("mount", "--platform", "linux/"+other, r.rec.Addr()+"/"+repo)
				holds(t, filepath.Join(dir, "etc/more"), string(content(other, 100_000)))
				holds(t, filepath.Join(dir, "common"), string(content("common", 100_000)))
				fresh.ok("umount", "-a")
			}
		}
		if digests[0] != digests[2] || digests[1] != digests[3] || digests[0] == digests[1] {
			t.Errorf("of registry and layout came %v", digests)
		}
		if slices.Contains(archs, runtime.GOARCH) {
			one := h.convert(r.rec.Addr()+"/list/image:1", "one:1")
			if one == digests[0] || mustGet[*v1.ConfigFile](t)(h.made(one).ConfigFile()).Architecture != runtime.GOARCH {
				t.Errorf("%s is not this machine's image alone", one)
			}
		} else {
			h.fails(3, "convert", r.rec.Addr()+"/list/image:1", "one:1")
		}
	}
	// A list of docker's stays one, until it has to be another.
	r := newRegistry(t)
	must(t, remote.WriteIndex(r.reference("docker:1"), platforms(t, true, runtime.GOARCH)))
	h := newHost(t)
	h.convert("--all-platforms", "--push", r.rec.Addr()+"/docker:1", r.rec.Addr()+"/out:1")
	// Its manifest was one of OCI's all the time.
	if mt := mustGet[*v1.IndexManifest](t)(mustGet[v1.ImageIndex](t)(remote.Index(r.reference("out:1"))).IndexManifest()).MediaType; mt != types.OCIImageIndex {
		t.Errorf("a list of the type %s", mt)
	}
}

// sameList holds two lists against each other: what is in them in the same order,
// what is said of it, and what is no image.
func sameList(t *testing.T, want, got v1.ImageIndex) {
	t.Helper()
	w, g := mustGet[*v1.IndexManifest](t)(want.IndexManifest()), mustGet[*v1.IndexManifest](t)(got.IndexManifest())
	if d := cmp.Diff(w.Annotations, g.Annotations); d != "" || len(w.Manifests) != len(g.Manifests) {
		t.Fatalf("%d manifests, want %d; annotations: %s", len(g.Manifests), len(w.Manifests), d)
	}
	for i, m := range g.Manifests {
		old := w.Manifests[i]
		if d := cmp.Diff([]any{old.Platform, old.Annotations}, []any{m.Platform, m.Annotations}); d != "" {
			t.Errorf("manifest %d: %s", i, d)
		}
		img := mustGet[v1.Image](t)(got.Image(m.Digest))
		if attestation := m.Platform.OS == "unknown"; attestation != (m.Digest == old.Digest) {
			t.Errorf("manifest %d of %v is %s, was %s", i, m.Platform, m.Digest, old.Digest)
		} else if !attestation {
			whole(t, img)
			continue
		}
		for _, l := range mustGet[[]v1.Layer](t)(img.Layers()) {
			rc := mustGet[io.ReadCloser](t)(l.Compressed())
			b, err := io.ReadAll(rc)
			if err = errors.Join(err, rc.Close()); err != nil || !json.Valid(b) {
				t.Errorf("the attestation is %q, %v", b, err)
			}
		}
	}
}
