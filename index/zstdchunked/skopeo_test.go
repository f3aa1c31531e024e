package zstdchunked

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/varvefs/varve/index/indextest"
)

// TestSkopeo reads the zstd:chunked layer that skopeo, which shares its writer
// with Podman and buildah, makes of an image.
func TestSkopeo(t *testing.T) {
	skopeo, err := exec.LookPath("skopeo")
	if err != nil {
		t.Skip("no skopeo: scripts/deps installs it")
	}
	plain := indextest.Tar(t, tar.FormatPAX, members())
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(plain)), nil })
	if err != nil {
		t.Fatal(err)
	}
	img, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		t.Fatal(err)
	}
	src, dir := filepath.Join(t.TempDir(), "src.tar"), t.TempDir()
	if err := tarball.WriteToFile(src, name.MustParseReference("test:1"), img); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(skopeo, "--insecure-policy", "copy", "--quiet", "--dest-compress-format", "zstd:chunked", "docker-archive:"+src, "oci:"+dir+":1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("skopeo: %v\n%s", err, out)
	}
	blob := func(digest string) []byte {
		data, err := os.ReadFile(filepath.Join(dir, "blobs", "sha256", strings.TrimPrefix(digest, "sha256:")))
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	type desc struct {
		Digest      string            `json:"digest"`
		Annotations map[string]string `json:"annotations"`
	}
	var idx struct{ Manifests []desc }
	top, err := os.ReadFile(filepath.Join(dir, "index.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(top, &idx); err != nil {
		t.Fatal(err)
	}
	for _, m := range idx.Manifests {
		var man struct{ Layers []desc }
		if err := json.Unmarshal(blob(m.Digest), &man); err != nil {
			t.Fatal(err)
		}
		for _, l := range man.Layers {
			data := blob(l.Digest)
			layer := readBlob(t, data, l.Annotations)
			if n := len(layer.Entries); n != len(members()) {
				t.Errorf("%d entries of %d", n, len(members()))
			}
			checkChunks(t, data, layer)
			checkTar(t, data, layer, nil)
			frames, pieces, size := layer.Frames.Len()
			var ends int64
			for i := range frames {
				ends += layer.Frames.Frame(i).Length
			}
			t.Logf("%s: %d entries, %d frames, %d pieces, %d bytes of data in %d of blob (%d in frames)",
				l.Digest, len(layer.Entries), frames, pieces, size, len(data), ends)
		}
	}
}
