package zstdchunked

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestRealLayout reads every zstd:chunked layer of an OCI layout on disk, made
// for example by `skopeo copy --dest-compress-format zstd:chunked … oci:DIR`.
func TestRealLayout(t *testing.T) {
	dir := os.Getenv("VARVE_ZSTDCHUNKED_LAYOUT")
	if dir == "" {
		t.Skip("VARVE_ZSTDCHUNKED_LAYOUT names no OCI layout")
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
