package commit

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/varvefs/varve/image"
)

var updateImages = flag.Bool("update-images", false, "write the golden manifests and configs anew")

func gzipLayer(i int) string { return typedLayer(i, ocispec.MediaTypeImageLayerGzip) }

// typedLayer is a descriptor as it stands in a manifest, with what a commit has
// to keep.
func typedLayer(i int, mediaType string) string {
	return fmt.Sprintf(`{"size":%d, "mediaType":%q,"digest":%q,"later":{"<":1}}`, 100+i, mediaType, digest.FromString(fmt.Sprint("layer ", i)))
}

func layerDesc(i int) *LayerDesc {
	return &LayerDesc{
		Digest: digest.FromString(fmt.Sprint("layer ", i)), DiffID: digest.FromString(fmt.Sprint("diff ", i)), Size: int64(100 + i),
		MediaType: ocispec.MediaTypeImageLayerGzip, Annotations: map[string]string{"containerd.io/snapshot/stargz/toc.digest": "sha256:t", "a<b": "&"},
	}
}

// testBase is an image with the config, and the layers by their descriptors.
func testBase(t testing.TB, docker bool, config string, layers ...string) *image.Manifest {
	t.Helper()
	mt, ct, more := ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageConfig,
		`"subject":`+gzipLayer(77)+`,"annotations":{"keep":"<me>","org.opencontainers.image.created":"2001-01-01T00:00:00Z","org.opencontainers.image.base.name":"its.own/base:1","org.opencontainers.image.base.digest":"sha256:own"},`
	if docker {
		mt, ct, more = image.MediaTypeDockerManifest, image.MediaTypeDockerConfig, ""
	}
	raw := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,%s"config":{"mediaType":%q,"digest":%q,"size":%d},"layers":[%s]}`,
		mt, more, ct, digest.FromString(config), len(config), strings.Join(layers, ","))
	m, err := image.ParseManifest([]byte(raw), "")
	if err != nil {
		t.Fatal(err)
	}
	if m.Name, err = image.ParseName("base/app:1"); err != nil {
		t.Fatal(err)
	}
	m.Platform = "linux/amd64"
	return m
}

// checkImage reads an image as all others do.
func checkImage(t testing.TB, m *image.Manifest, config []byte) {
	t.Helper()
	again, err := image.ParseManifest(m.Raw, "")
	if err != nil {
		t.Fatalf("%s: %v", m.Raw, err)
	}
	c, err := image.ParseConfig(config)
	if err != nil {
		t.Fatalf("%s: %v", config, err)
	}
	if !json.Valid(config) || !json.Valid(m.Raw) {
		t.Errorf("not JSON: %s, %s", config, m.Raw)
	}
	if again.ConfigDesc.Digest != digest.FromBytes(config) || again.ConfigDesc.Size != int64(len(config)) {
		t.Errorf("config is %+v", again.ConfigDesc)
	}
	ids, err := c.DiffIDs(len(again.Layers))
	if err != nil {
		t.Fatal(err)
	}
	made := 0
	for _, h := range c.History {
		if !h.EmptyLayer {
			made++
		}
	}
	if made != len(ids) {
		t.Errorf("%d entries for %d layers: %s", made, len(ids), config)
	}
	if m.Digest != digest.FromBytes(m.Raw) || m.Target != m.Digest || m.Blobs[m.Digest] == nil {
		t.Errorf("digest %s, target %s", m.Digest, m.Target)
	}
	if want := m.IsDocker(); want != (again.ConfigDesc.MediaType == image.MediaTypeDockerConfig) {
		t.Errorf("config of type %s in %s", again.ConfigDesc.MediaType, m.MediaType)
	}
}

func mustChanges(t testing.TB, lines ...string) Changes {
	t.Helper()
	c, err := ParseChanges(lines)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func testConfig(layers int) string {
	var history []string
	for i := range layers {
		history = append(history, fmt.Sprintf(`{"created":"2020-01-01T00:00:00Z","created_by":"step %d"}`, i))
	}
	return `{"architecture":"amd64","os":"linux","created":"2020-01-01T00:00:00Z","config":{"Env":["PATH=/bin"],"Cmd":["sh"],"Labels":{"a":"1"}},` +
		`"history":[` + strings.Join(history, ",") + `],"rootfs":` + diffIDsOf(layers) + `}`
}

func TestImageGolden(t *testing.T) {
	base, err := image.ParseName("debian:12")
	if err != nil {
		t.Fatal(err)
	}
	meta := Meta{
		Author: "A <a@b.test>", Comment: "what I did", CreatedBy: "varve commit", Created: time.Unix(1700000000, 0), BaseName: base,
		Changes: mustChanges(t, "ENV A=$PATH:/x", "LABEL b=2", `ENTRYPOINT ["e"]`, "EXPOSE 80", "WORKDIR w"),
	}
	zstd := layerDesc(9)
	zstd.MediaType = ocispec.MediaTypeImageLayerZstd
	foreign := []string{
		typedLayer(0, image.MediaTypeDockerLayer+".gzip"),
		strings.Replace(typedLayer(1, "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"), "{", `{"urls":["https://x.test/l"],`, 1),
		typedLayer(2, image.MediaTypeDockerLayer),
	}
	own := []string{gzipLayer(0), gzipLayer(1)}
	with := func(f func(*Meta)) Meta {
		m := meta
		f(&m)
		return m
	}
	for _, tt := range []struct {
		name   string
		docker bool
		layers []string
		layer  *LayerDesc
		meta   Meta
	}{
		{"oci", false, own, layerDesc(9), with(func(m *Meta) { m.Annotations = map[string]string{"mine": "x"} })},
		{"docker", true, foreign, layerDesc(9), meta},
		{"empty", false, own, nil, meta},
		{"zstd-on-docker", true, foreign, zstd, meta},
		{"docker-to-oci", true, foreign, layerDesc(9), with(func(m *Meta) { m.Format = FormatOCI })},
		{"oci-to-docker", false, append(own, typedLayer(2, "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip")), layerDesc(9), with(func(m *Meta) { m.Format = FormatDocker })},
		{"squash", false, own, layerDesc(9), with(func(m *Meta) { m.Squash = 1; m.BaseDigest = digest.FromString("below") })},
		{"scratch", false, nil, layerDesc(9), Meta{}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			config := testConfig(len(tt.layers))
			b := testBase(t, tt.docker, config, tt.layers...)
			m, made, err := Image(b, []byte(config), tt.layer, tt.meta)
			if err != nil {
				t.Fatal(err)
			}
			checkImage(t, m, made)
			for range 20 {
				again, _, err := Image(b, []byte(config), tt.layer, tt.meta)
				if err != nil || again.Digest != m.Digest {
					t.Fatalf("another image: %v", err)
				}
			}
			// Put on lines for the eye; the digest is of the bytes themselves.
			var text bytes.Buffer
			for _, doc := range [][]byte{m.Raw, made} {
				if err := json.Indent(&text, doc, "", " "); err != nil {
					t.Fatal(err)
				}
				text.WriteString("\n" + digest.FromBytes(doc).String() + "\n")
			}
			file := filepath.Join("testdata", "image-"+tt.name+".golden")
			if *updateImages {
				if err := os.WriteFile(file, text.Bytes(), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(string(want), text.String()); d != "" {
				t.Error(d)
			}
		})
	}
}

// rawLayers gives the layers of a manifest as they are written.
func rawLayers(t *testing.T, m *image.Manifest) []string {
	t.Helper()
	var doc struct{ Layers []json.RawMessage }
	if err := json.Unmarshal(m.Raw, &doc); err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, l := range doc.Layers {
		all = append(all, string(l))
	}
	return all
}

func TestDescriptorsOfTheBaseAreKept(t *testing.T) {
	config := testConfig(2)
	for _, docker := range []bool{false, true} {
		layers := []string{gzipLayer(0), typedLayer(1, "application/vnd.oci.image.layer.nondistributable.v1.tar")}
		if docker {
			layers = []string{typedLayer(0, image.MediaTypeDockerLayer+".gzip"), gzipLayer(1)} // of the other family
		}
		m, _, err := Image(testBase(t, docker, config, layers...), []byte(config), layerDesc(9), Meta{})
		if err != nil {
			t.Fatal(err)
		}
		got := rawLayers(t, m)
		if d := cmp.Diff(layers, got[:2]); d != "" {
			t.Error(d)
		}
		if want := map[bool]string{false: ocispec.MediaTypeImageLayerGzip, true: image.MediaTypeDockerLayer + ".gzip"}[docker]; m.Layers[2].MediaType != want {
			t.Errorf("new layer of type %s", m.Layers[2].MediaType)
		}
		if m.Layers[2].Annotations["a<b"] != "&" {
			t.Errorf("annotations %v", m.Layers[2].Annotations)
		}
		if strings.Contains(string(m.Raw), `"subject"`) {
			t.Error("a referrer of what its base refers to")
		}
	}
}

func annotationsOf(t *testing.T, m *image.Manifest) map[string]string {
	t.Helper()
	var doc struct{ Annotations map[string]string }
	if err := json.Unmarshal(m.Raw, &doc); err != nil {
		t.Fatal(err)
	}
	return doc.Annotations
}

func TestAnnotations(t *testing.T) {
	config := testConfig(1)
	b := testBase(t, false, config, gzipLayer(0))
	b.Target = digest.FromString("a list")
	name := func(s string) image.Name {
		n, err := image.ParseName(s)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	const baseName, baseDigest, created = ocispec.AnnotationBaseImageName, ocispec.AnnotationBaseImageDigest, ocispec.AnnotationCreated
	below := digest.FromString("below")
	for what, tt := range map[string]struct {
		meta Meta
		want map[string]string
	}{
		"nothing said":   {Meta{}, map[string]string{"keep": "<me>", baseDigest: b.Digest.String()}},
		"name and time":  {Meta{BaseName: name("nginx"), Created: time.Unix(0, 5)}, map[string]string{"keep": "<me>", baseDigest: b.Digest.String(), baseName: "docker.io/library/nginx:latest", created: "1970-01-01T00:00:00.000000005Z"}},
		"a path":         {Meta{BaseName: name("oci:/home/me/x")}, map[string]string{"keep": "<me>", baseDigest: b.Digest.String()}},
		"an ID":          {Meta{BaseName: name(below.String())}, map[string]string{"keep": "<me>", baseDigest: b.Digest.String()}},
		"squashed":       {Meta{Squash: 1, BaseName: name("nginx")}, map[string]string{"keep": "<me>"}},
		"squashed, told": {Meta{Squash: 1, BaseName: name("nginx"), BaseDigest: below}, map[string]string{"keep": "<me>", baseDigest: below.String(), baseName: "docker.io/library/nginx:latest"}},
		"one's own":      {Meta{Annotations: map[string]string{"keep": "", baseName: "mine"}}, map[string]string{"keep": "", baseDigest: b.Digest.String(), baseName: "mine"}},
	} {
		m, _, err := Image(b, []byte(config), layerDesc(9), tt.meta)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(tt.want, annotationsOf(t, m)); d != "" {
			t.Errorf("%s: %s", what, d)
		}
	}
}

func TestImageRefuses(t *testing.T) {
	config := testConfig(1)
	oci, docker := testBase(t, false, config, gzipLayer(0)), testBase(t, true, config, typedLayer(0, image.MediaTypeDockerLayer+".gzip"))
	with := func(f func(*LayerDesc)) *LayerDesc {
		l := layerDesc(9)
		f(l)
		return l
	}
	zstd := with(func(l *LayerDesc) { l.MediaType = ocispec.MediaTypeImageLayerZstd })
	for name, tt := range map[string]struct {
		base  *image.Manifest
		layer *LayerDesc
		meta  Meta
		want  string
	}{
		"no base":          {nil, layerDesc(9), Meta{}, "no base"},
		"zstd in docker's": {docker, zstd, Meta{Format: FormatDocker}, "no layers of zstd"},
		"annotations":      {docker, layerDesc(9), Meta{Annotations: map[string]string{"a": "b"}}, "--format oci"},
		"format":           {oci, layerDesc(9), Meta{Format: "OCI"}, `neither "oci" nor "docker"`},
		"squash too much":  {oci, layerDesc(9), Meta{Squash: 2}, "2 layers to squash, the image has 1"},
		"squash less":      {oci, layerDesc(9), Meta{Squash: -1}, "-1 layers to squash"},
		"layer type":       {oci, with(func(l *LayerDesc) { l.MediaType = "application/json" }), Meta{}, "unknown type"},
		"digest":           {oci, with(func(l *LayerDesc) { l.Digest = "sha256:x" }), Meta{}, "digest of the layer"},
		"diffID":           {oci, with(func(l *LayerDesc) { l.DiffID = "" }), Meta{}, "digest of the layer"},
		"sha512":           {oci, with(func(l *LayerDesc) { l.Digest = digest.SHA512.FromString("") }), Meta{}, "sha512"},
		"size":             {oci, with(func(l *LayerDesc) { l.Size = -1 }), Meta{}, "layer of -1 bytes"},
		"base digest":      {oci, layerDesc(9), Meta{BaseDigest: "x"}, "digest of the base"},
		"time":             {oci, layerDesc(9), Meta{Created: time.Unix(lastSecond+1, 0)}, "cannot be written"},
		"time before all":  {oci, layerDesc(9), Meta{Created: time.Unix(-1<<40, 0)}, "cannot be written"},
	} {
		if m, _, err := Image(tt.base, []byte(config), tt.layer, tt.meta); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, %v", name, m, err)
		}
	}
	if _, _, err := Image(oci, []byte(testConfig(2)), layerDesc(9), Meta{}); err == nil || !strings.Contains(err.Error(), "the config given is not") {
		t.Errorf("another config: %v", err)
	}
	// More layers than an image may have.
	var many []string
	for i := range image.MaxLayers {
		many = append(many, gzipLayer(i))
	}
	config = testConfig(image.MaxLayers)
	if _, _, err := Image(testBase(t, false, config, many...), []byte(config), layerDesc(9), Meta{}); err == nil || !strings.Contains(err.Error(), "the limit is") {
		t.Errorf("many layers: %v", err)
	}
}

// Commit upon commit through a store, as a mount of each would do.
func TestImageThroughTheStore(t *testing.T) {
	s, err := image.OpenStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	config := []byte(testConfig(1))
	base := testBase(t, true, string(config), typedLayer(0, image.MediaTypeDockerLayer+".gzip"))
	for i := 1; i < 4; i++ {
		layer := layerDesc(i)
		made, raw, err := Image(base, config, layer, Meta{Changes: mustChanges(t, fmt.Sprintf("ENV N%d=$PATH", i))})
		if err != nil {
			t.Fatal(err)
		}
		if made.Name, err = image.ParseName(fmt.Sprintf("mine/app:%d", i)); err != nil {
			t.Fatal(err)
		}
		if err := s.Put(made, raw); err != nil {
			t.Fatal(err)
		}
		if base, config, err = s.Get(made.Name, ""); err != nil {
			t.Fatal(err)
		}
		if len(base.Layers) != i+1 || !base.IsDocker() || len(base.Sources) != 1 || base.Sources[0].Repository() != "base/app" {
			t.Errorf("%d: %d layers, %v", i, len(base.Layers), base.Sources)
		}
	}
}
