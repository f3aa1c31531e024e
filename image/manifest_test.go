package image

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestParseManifestRefuses(t *testing.T) {
	d := digest.FromString("x").String()
	long := digest.SHA512.FromString("x").String()
	conf := `"config":{"mediaType":"` + ocispec.MediaTypeImageConfig + `","digest":"` + d + `","size":1}`
	layer := func(s string) string {
		return `{"schemaVersion":2,` + conf + `,"layers":[` + s + `]}`
	}
	many := strings.Repeat(`{},`, MaxLayers) + `{}`
	for _, tt := range []struct{ name, raw, want string }{
		{"json", `{`, "manifest"},
		{"schema 1", `{"schemaVersion":1,"fsLayers":[]}`, "schema 1"},
		{"unknown", `{"schemaVersion":2,"mediaType":"a/b"}`, `unknown type "a/b"`},
		{"both", `{"schemaVersion":2,"manifests":[],` + conf + `,"layers":[]}`, "both"},
		{"list", `{"schemaVersion":2,"manifests":[]}`, "list"},
		{"artifact", `{"schemaVersion":2,"config":{"mediaType":"application/helm","digest":"` + d + `","size":1}}`, `"application/helm"`},
		{"many", layer(many), "1001 layers"},
		{"size", layer(`{"mediaType":"` + ocispec.MediaTypeImageLayer + `","digest":"` + d + `","size":-1}`), "size of -1"},
		{"digest", layer(`{"mediaType":"` + ocispec.MediaTypeImageLayer + `","digest":"sha256:../../x","size":1}`), "digest"},
		{"sha512 layer", layer(`{"mediaType":"` + ocispec.MediaTypeImageLayer + `","digest":"` + long + `","size":1}`), "layer 1: digest algorithm sha512 is not supported"},
		{"sha512 config", strings.Replace(layer(""), d, long, 1), "config: digest algorithm sha512 is not supported"},
		{"encrypted", layer(`{"mediaType":"` + ocispec.MediaTypeImageLayerGzip + `+encrypted","digest":"` + d + `","size":1}`), "encrypted"},
		{"layer type", layer(`{"mediaType":"x/y","digest":"` + d + `","size":1}`), `"x/y"`},
		{"url", layer(`{"mediaType":"` + ocispec.MediaTypeImageLayer + `","digest":"` + d + `","size":1,"urls":["file:///etc/passwd"]}`), "http"},
		{"large", `{"x":"` + strings.Repeat("x", MaxManifest) + `"}`, "limit"},
	} {
		if _, err := ParseManifest([]byte(tt.raw), ""); !errors.Is(err, ErrMalformed) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
	ok := layer(`{"mediaType":"` + mediaTypeDockerForeign + `.gzip","digest":"` + d + `","size":1,"urls":["https://x.test/y"]}`)
	m, err := ParseManifest([]byte(ok), "")
	if err != nil || len(m.Layers) != 1 || !m.Layers[0].Foreign() {
		t.Errorf("foreign layer: %+v, %v", m, err)
	}
}

func TestChoosePlatform(t *testing.T) {
	entry := func(s string) ocispec.Descriptor {
		p := parsePlatform(s)
		if s == "unknown/unknown" {
			p = ocispec.Platform{OS: "unknown", Architecture: "unknown"}
		}
		return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString(s), Platform: &p}
	}
	for _, tt := range []struct{ have, ask, want, err string }{
		{"linux/amd64 linux/arm64", "linux/arm64/v8", "linux/arm64", ""},
		{"linux/arm64/v8 linux/amd64", "linux/arm64", "linux/arm64/v8", ""},
		{"linux/amd64 linux/amd64/v2 linux/amd64/v4", "linux/amd64/v3", "linux/amd64/v2", ""},
		{"linux/386", "linux/amd64", "", "only for linux/386"},
		{"linux/arm/v7", "linux/arm64", "", "only for linux/arm/v7"},
		{"linux/arm/v5 linux/arm/v6", "linux/arm/v7", "linux/arm/v6", ""},
		{"unknown/unknown linux/s390x", "linux/amd64", "", "only for linux/s390x"},
		{"unknown/unknown", "linux/amd64", "", "names no platform"},
	} {
		var list []ocispec.Descriptor
		for _, s := range strings.Fields(tt.have) {
			list = append(list, entry(s))
		}
		m, err := newMatcher(tt.ask)
		if err != nil {
			t.Fatal(err)
		}
		got, err := m.choose(list)
		switch {
		case tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)):
			t.Errorf("%s of %s: %v, want %q", tt.ask, tt.have, err, tt.err)
		case tt.err == "" && (err != nil || got.Digest != digest.FromString(tt.want)):
			t.Errorf("%s of %s: %v, %v; want %s", tt.ask, tt.have, got.Platform, err, tt.want)
		}
	}
	if err := (Config{OS: "linux", Architecture: "arm64"}).MatchPlatform("linux/amd64"); !errors.Is(err, ErrNoPlatform) {
		t.Errorf("MatchPlatform: %v", err)
	}
}

func TestParseConfig(t *testing.T) {
	raw := `{"architecture":"amd64","os":"linux","created":"2024-01-02T03:04:05Z","config":{"Env":["A=b"],"Cmd":["sh"],"Shell":["/bin/sh"]},
		"rootfs":{"type":"layers","diff_ids":["` + digest.FromString("a").String() + `"]}}`
	c, err := ParseConfig([]byte(raw))
	if err != nil || c.Platform() != "linux/amd64" || c.Config.Env[0] != "A=b" || c.Config.Shell[0] != "/bin/sh" || c.Created == nil {
		t.Fatalf("%+v, %v", c, err)
	}
	if _, err := c.DiffIDs(1); err != nil {
		t.Error(err)
	}
	if _, err := c.DiffIDs(2); !errors.Is(err, ErrMalformed) {
		t.Errorf("two layers: %v", err)
	}
	for _, raw := range []string{`[`, `{"rootfs":{"type":"x"}}`, `{"rootfs":{"diff_ids":["md5:1"]}}`} {
		if _, err := ParseConfig([]byte(raw)); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v", raw, err)
		}
	}
}

func FuzzParseManifest(f *testing.F) {
	f.Add([]byte(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}`))
	f.Add([]byte(`{"schemaVersion":2,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","size":1},"layers":[{}]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		m, err := ParseManifest(raw, "")
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Errorf("%v", err)
			}
			return
		}
		for _, l := range m.Layers {
			if l.Size < 0 || l.Digest.Validate() != nil {
				t.Errorf("layer %+v", l)
			}
		}
		if !json.Valid(raw) {
			t.Error("not JSON")
		}
	})
}

// An index of SOCI v2 lies in the list beside the image and has its platform.
func TestListWithArtifacts(t *testing.T) {
	match, err := newMatcher("linux/amd64")
	if err != nil {
		t.Fatal(err)
	}
	amd64 := &ocispec.Platform{OS: "linux", Architecture: "amd64"}
	soci := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, ArtifactType: "application/vnd.amazon.soci.index.v2+json", Digest: digest.FromString("index"), Platform: amd64}
	want := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, ArtifactType: ocispec.MediaTypeImageConfig, Digest: digest.FromString("image"), Platform: amd64}
	got, err := match.choose([]ocispec.Descriptor{soci, want})
	if err != nil || got.Digest != want.Digest {
		t.Errorf("chose %v, %v", got, err)
	}
}
