package soci

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	digests "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/varvefs/varve/index"
)

func TestPrefetches(t *testing.T) {
	layer, list := digests.FromString("layer"), digests.FromString("list")
	of := func(mt string, d digests.Digest, size int64, layer string) ocispec.Descriptor {
		return ocispec.Descriptor{MediaType: mt, Digest: d, Size: size, Annotations: map[string]string{LayerDigestAnnotation: layer}}
	}
	raw, _ := json.Marshal(ocispec.Manifest{Layers: []ocispec.Descriptor{
		of(TypeZTOC, list, 10, layer.String()), of(TypePrefetch, list, 10, layer.String()), of(TypePrefetch, "sha256:0", 10, layer.String()),
		of(TypePrefetch, list, 10, ""), of(TypePrefetch, list, 0, layer.String()), of(TypePrefetch, list, MaxPrefetch+1, layer.String()),
	}})
	if d := cmp.Diff([]Prefetch{{list, 10, layer}}, Prefetches(raw)); d != "" {
		t.Error(d)
	}
	for _, s := range []string{"", "[]", `{"layers":1}`} {
		if got := Prefetches([]byte(s)); got != nil {
			t.Errorf("%q: %v", s, got)
		}
	}
}

func TestReadPrefetch(t *testing.T) {
	got, err := ReadPrefetch([]byte(`{"version":"1.0","prefetch_spans":[
		{"start_span":7,"end_span":9,"priority":2},{"start_span":3,"end_span":3},{"start_span":1,"end_span":2,"priority":2}]}`))
	if d := cmp.Diff([]SpanRange{{3, 3}, {7, 9}, {1, 2}}, got); d != "" || err != nil {
		t.Errorf("%v %s", err, d)
	}
	for name, s := range map[string]string{
		"no JSON": "[", "version": `{"version":"2.0"}`, "no version": `{}`,
		"backwards": `{"version":"1.0","prefetch_spans":[{"start_span":2,"end_span":1}]}`,
		"below":     `{"version":"1.0","prefetch_spans":[{"start_span":-1,"end_span":1}]}`,
		"far":       `{"version":"1.0","prefetch_spans":[{"start_span":0,"end_span":1099511627776}]}`,
		"often":     `{"version":"1.0","prefetch_spans":[{"start_span":0,"end_span":1000000}` + strings.Repeat(`,{"start_span":0,"end_span":1000000}`, 20) + `]}`,
		"many":      `{"version":"1.0","prefetch_spans":[{}` + strings.Repeat(",{}", maxSpanRanges) + `]}`,
		"long":      strings.Repeat(" ", MaxPrefetch+1),
	} {
		if got, err := ReadPrefetch([]byte(s)); !errors.Is(err, index.ErrMalformed) {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}
