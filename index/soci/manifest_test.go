package soci

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	digests "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/varvefs/varve/index"
)

func someZTOCs() []ZTOC {
	return []ZTOC{
		{Digest: digests.FromString("z1"), Size: 10, LayerDigest: digests.FromString("l1"), LayerMediaType: ocispec.MediaTypeImageLayerGzip, SpanSize: 4 << 20},
		{Digest: digests.FromString("z2"), Size: 20, LayerDigest: digests.FromString("l2"), LayerMediaType: ocispec.MediaTypeImageLayer, SpanSize: 1 << 20, DisableXattrs: true},
	}
}

func TestIndex(t *testing.T) {
	subject := ocispec.Descriptor{
		MediaType: ocispec.MediaTypeImageManifest, Digest: digests.FromString("image"), Size: 7,
		Annotations: map[string]string{"not": "kept"}, Platform: &ocispec.Platform{OS: "linux"},
	}
	b, err := Index(subject, someZTOCs())
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json",`+
		`"config":{"mediaType":"application/vnd.amazon.soci.index.v1+json","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2},`+
		`"layers":[{"mediaType":"application/octet-stream","digest":"%s","size":10,"annotations":{"com.amazon.soci.image-layer-digest":"%s","com.amazon.soci.image-layer-mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","com.amazon.soci.span-size":"4194304"}},`+
		`{"mediaType":"application/octet-stream","digest":"%s","size":20,"annotations":{"com.amazon.soci.disable-xattrs":"true","com.amazon.soci.image-layer-digest":"%s","com.amazon.soci.image-layer-mediaType":"application/vnd.oci.image.layer.v1.tar","com.amazon.soci.span-size":"1048576"}}],`+
		`"subject":{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"%s","size":7},`+
		`"annotations":{"com.amazon.soci.build-tool-identifier":"varve"}}`,
		digests.FromString("z1"), digests.FromString("l1"), digests.FromString("z2"), digests.FromString("l2"), digests.FromString("image"))
	if string(b) != want {
		t.Errorf("got  %s\nwant %s", b, want)
	}
	version, ztocs, err := ParseIndex(b)
	if err != nil || version != 1 {
		t.Fatalf("version %d: %v", version, err)
	}
	if d := cmp.Diff(someZTOCs(), ztocs); d != "" {
		t.Error(d)
	}
	// The second version has no subject, and may have prefetch blobs.
	second := strings.NewReplacer("index.v1", "index.v2", `"subject"`, `"other"`,
		`"layers":[`, `"layers":[{"mediaType":"application/vnd.amazon.soci.prefetch.v1+json","digest":"none","size":-1},`).Replace(string(b))
	version, ztocs, err = ParseIndex([]byte(second))
	if err != nil || version != 2 || !cmp.Equal(ztocs, someZTOCs()) {
		t.Errorf("version %d, %+v: %v", version, ztocs, err)
	}
}

func TestIndexRefuses(t *testing.T) {
	ok, err := Index(ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digests.FromString("image"), Size: 7}, someZTOCs())
	if err != nil {
		t.Fatal(err)
	}
	z1 := digests.FromString("z1").String()
	for name, b := range map[string]string{
		"empty":           "",
		"no object":       "[]",
		"an image":        strings.Replace(string(ok), TypeIndexV1, ocispec.MediaTypeImageConfig, 1),
		"digest":          strings.Replace(string(ok), z1, "sha256:00", 1),
		"unknown hash":    strings.Replace(string(ok), z1, "md5:00", 1),
		"no layer digest": strings.Replace(string(ok), LayerDigestAnnotation, "other", 1),
		"no size":         strings.Replace(string(ok), `"size":10`, `"size":0`, 1),
		"size":            strings.Replace(string(ok), `"size":10`, `"size":1000000000`, 1),
		"span size":       strings.Replace(string(ok), "4194304", "4 MiB", 1),
		"many layers":     strings.Replace(string(ok), `"layers":[`, `"layers":[`+strings.Repeat("{},", MaxLayers), 1),
		"large":           string(ok) + strings.Repeat(" ", MaxManifest),
	} {
		if _, _, err := ParseIndex([]byte(b)); !errors.Is(err, index.ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Index(ocispec.Descriptor{}, someZTOCs()); err == nil {
		t.Error("an index of nothing")
	}
	if _, err := Index(ocispec.Descriptor{Digest: digests.FromString("image")}, nil); err == nil {
		t.Error("an index without layers")
	}
}

func FuzzParseIndex(f *testing.F) {
	b, err := Index(ocispec.Descriptor{Digest: digests.FromString("image")}, someZTOCs())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, _, err := ParseIndex(b); err != nil && !errors.Is(err, index.ErrMalformed) {
			t.Fatal(err)
		}
	})
}
