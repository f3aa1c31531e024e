package commit

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/varvefs/varve/image"
)

func saved(t *testing.T, images ...SaveImage) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := Save(t.Context(), &b, images, SaveOptions{}); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func untar(t *testing.T, b []byte) (names []string, files map[string][]byte) {
	t.Helper()
	files = map[string][]byte{}
	for tr := tar.NewReader(bytes.NewReader(b)); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return names, files
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.ModTime.Unix() != 0 || h.Uid != 0 || h.Uname != "" || len(h.PAXRecords) > 0 {
			t.Errorf("header %+v", h)
		}
		names = append(names, h.Name)
		if files[h.Name], err = io.ReadAll(tr); err != nil {
			t.Fatal(err)
		}
	}
}

func TestSave(t *testing.T) {
	one, two := newPushImage(t, false, 1000, 2<<20, 0), newPushImage(t, true, 1000)
	one.blobs.here = false
	ref := pushName(t, "nginx:1")
	images := []SaveImage{
		{one.m, one.config, []image.Name{ref, pushName(t, "localhost:5000/a/b:v"), ref}, one.blobs},
		{two.m, two.config, nil, two.blobs},
		{one.m, one.config, []image.Name{ref.WithDigest(one.m.Digest)}, one.blobs},
	}
	var lines []string
	var out bytes.Buffer
	err := Save(t.Context(), &out, images, SaveOptions{Report: func(id, status string, n, total int64) {
		if status == "Saved" && n == total {
			lines = append(lines, id)
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	if len(lines) != 3 {
		t.Errorf("reports %q", lines)
	}
	if !bytes.Equal(out.Bytes(), saved(t, images...)) {
		t.Error("the same images gave another tar")
	}
	names, files := untar(t, out.Bytes())
	if !slices.IsSorted(names) || len(names) != len(files) {
		t.Errorf("members %q", names)
	}
	// Two manifests, two configs, three layers, of which one is shared.
	if n := len(files); n != 7+2+3 {
		t.Errorf("%d members: %q", n, names)
	}
	for p, b := range files {
		if hex, ok := strings.CutPrefix(p, "blobs/sha256/"); ok && hex != "" && digest.FromBytes(b).Encoded() != hex {
			t.Errorf("%s holds %s", p, digest.FromBytes(b))
		}
	}
	var index ocispec.Index
	if err := json.Unmarshal(files["index.json"], &index); err != nil {
		t.Fatal(err)
	}
	desc := func(m *image.Manifest, names ...string) ocispec.Descriptor {
		d := ocispec.Descriptor{MediaType: m.MediaType, Digest: m.Digest, Size: int64(len(m.Raw))}
		if len(names) > 0 {
			d.Annotations = map[string]string{"io.containerd.image.name": names[0], "org.opencontainers.image.ref.name": names[1]}
		}
		return d
	}
	pinned := "docker.io/library/nginx@" + one.m.Digest.String()
	want := []ocispec.Descriptor{
		desc(one.m, "docker.io/library/nginx:1", "1"), desc(one.m, "localhost:5000/a/b:v", "v"), desc(two.m), desc(one.m, pinned, pinned),
	}
	if d := cmp.Diff(want, index.Manifests); d != "" {
		t.Error(d)
	}
	if string(files["oci-layout"]) != `{"imageLayoutVersion":"1.0.0"}` {
		t.Errorf("%s", files["oci-layout"])
	}
	var docker []struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	if err := json.Unmarshal(files["manifest.json"], &docker); err != nil {
		t.Fatal(err)
	}
	if len(docker) != 2 || docker[1].RepoTags != nil || len(docker[0].Layers) != 3 {
		t.Fatalf("%s", files["manifest.json"])
	}
	if d := cmp.Diff([]string{"nginx:1", "localhost:5000/a/b:v"}, docker[0].RepoTags); d != "" {
		t.Error(d)
	}
	if docker[0].Config != "blobs/sha256/"+one.m.ConfigDesc.Digest.Encoded() {
		t.Errorf("%s", files["manifest.json"])
	}
}

// Another's reader of docker's archives, and our own of layouts, take it.
func TestSaveIsReadBack(t *testing.T) {
	img := newPushImage(t, false, 1000, 3<<20)
	n := pushName(t, "example.com/a/b:v1")
	file := filepath.Join(t.TempDir(), "saved.tar")
	if err := os.WriteFile(file, saved(t, SaveImage{img.m, img.config, []image.Name{n}, img.blobs}), 0o600); err != nil {
		t.Fatal(err)
	}
	tag, err := name.NewTag(n.String())
	if err != nil {
		t.Fatal(err)
	}
	back, err := tarball.ImageFromPath(file, &tag)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Image(back, validate.Fast); err != nil {
		t.Error(err)
	}
	for _, s := range []string{"oci:" + file + ":v1", "docker-archive:" + file + ":" + n.String()} {
		src, err := image.NewRegistries(nil, nil).Source(pushName(t, s), image.Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer src.Close()
		m, err := src.Resolve(t.Context(), "linux/amd64")
		if err != nil {
			t.Fatal(err)
		}
		if len(m.Layers) != 2 || strings.HasPrefix(s, "oci:") && m.Digest != img.m.Digest {
			t.Errorf("%s: %+v", s, m)
		}
	}
}

// A blob that is not what its descriptor says leaves a tar without an end.
func TestSaveProvesBlobs(t *testing.T) {
	n := pushName(t, "a:b")
	for what, harm := range map[string]func([]byte) []byte{
		"changed": func(b []byte) []byte { b[len(b)-1] ^= 1; return b },
		"short":   func(b []byte) []byte { return b[:len(b)-1] },
		"missing": func([]byte) []byte { return nil },
	} {
		img := newPushImage(t, false, 2<<20)
		d := img.m.Layers[0].Digest
		img.blobs.data[d] = harm(img.blobs.data[d])
		var b bytes.Buffer
		err := Save(t.Context(), &b, []SaveImage{{img.m, img.config, []image.Name{n}, img.blobs}}, SaveOptions{})
		if !errors.Is(err, image.ErrMalformed) || !strings.Contains(err.Error(), d.Encoded()) {
			t.Errorf("%s: %v", what, err)
		}
		tr := tar.NewReader(&b)
		for err = nil; err == nil; {
			if _, err = tr.Next(); err == nil {
				_, err = io.Copy(io.Discard, tr)
			}
		}
		if err == io.EOF {
			t.Errorf("%s: the tar has an end", what)
		}
	}
}

func TestSaveRefuses(t *testing.T) {
	one, two := newPushImage(t, false, 10), newPushImage(t, true, 20)
	n := pushName(t, "a:b")
	for what, images := range map[string][]SaveImage{
		"nothing":      nil,
		"one name":     {{one.m, one.config, []image.Name{n}, one.blobs}, {two.m, two.config, []image.Name{n}, two.blobs}},
		"a path":       {{one.m, one.config, []image.Name{pushName(t, "oci:/x:y")}, one.blobs}},
		"other config": {{one.m, two.config, nil, one.blobs}},
		"no blobs":     {{one.m, one.config, nil, nil}},
	} {
		var b bytes.Buffer
		if err := Save(t.Context(), &b, images, SaveOptions{}); err == nil || b.Len() > 0 {
			t.Errorf("%s: %v, %d bytes", what, err, b.Len())
		}
	}
}
