package soci

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"

	digests "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/varvefs/varve/index"
)

// Prefetch names a list of the spans of a layer that are to be fetched ahead
// (soci/prefetch.go).
type Prefetch struct {
	Digest      digests.Digest
	Size        int64 // bytes
	LayerDigest digests.Digest
}

// Limits of such a list.
const (
	MaxPrefetch   = 1 << 20 // bytes
	maxSpanRanges = 1 << 15
)

// Prefetches gives the lists that an index manifest names. Those that cannot be
// used are passed over: nothing depends on them.
func Prefetches(manifest []byte) (out []Prefetch) {
	var m ocispec.Manifest
	if len(manifest) > MaxManifest || json.Unmarshal(manifest, &m) != nil || len(m.Layers) > MaxLayers {
		return nil
	}
	for _, d := range m.Layers {
		p := Prefetch{Digest: d.Digest, Size: d.Size, LayerDigest: digests.Digest(d.Annotations[LayerDigestAnnotation])}
		if d.MediaType == TypePrefetch && p.Digest.Validate() == nil && p.LayerDigest.Validate() == nil && p.Size > 0 && p.Size <= MaxPrefetch {
			out = append(out, p)
		}
	}
	return out
}

// SpanRange is a range of spans, both ends in it.
type SpanRange struct {
	First, Last int
}

// ReadPrefetch gives the spans that a list names, the most urgent first.
func ReadPrefetch(raw []byte) ([]SpanRange, error) {
	type spans struct {
		Start    int `json:"start_span"`
		End      int `json:"end_span"`
		Priority int `json:"priority"` // the lower the sooner
	}
	var list struct {
		Version string  `json:"version"`
		Spans   []spans `json:"prefetch_spans"`
	}
	if len(raw) > MaxPrefetch {
		return nil, fmt.Errorf("%w: SOCI prefetch list of %d bytes, the limit is %d", index.ErrMalformed, len(raw), MaxPrefetch)
	}
	if err := json.Unmarshal(raw, &list); err != nil {
		return nil, fmt.Errorf("%w: SOCI prefetch list: %w", index.ErrMalformed, err)
	}
	if list.Version != "1.0" {
		return nil, fmt.Errorf("%w: SOCI prefetch list of version %.20q", index.ErrMalformed, list.Version)
	}
	if len(list.Spans) > maxSpanRanges {
		return nil, fmt.Errorf("%w: SOCI prefetch list of %d ranges, the limit is %d", index.ErrMalformed, len(list.Spans), maxSpanRanges)
	}
	total := 0
	for i, s := range list.Spans {
		if s.Start < 0 || s.End < s.Start || s.End >= index.MaxPoints {
			return nil, fmt.Errorf("%w: SOCI prefetch list: range %d: spans %d to %d", index.ErrMalformed, i, s.Start, s.End)
		}
		if total += s.End - s.Start + 1; total > index.MaxPoints { // some of them often
			return nil, fmt.Errorf("%w: SOCI prefetch list of more than %d spans", index.ErrMalformed, index.MaxPoints)
		}
	}
	slices.SortStableFunc(list.Spans, func(a, b spans) int { return cmp.Compare(a.Priority, b.Priority) })
	out := make([]SpanRange, len(list.Spans))
	for i, s := range list.Spans {
		out[i] = SpanRange{s.Start, s.End}
	}
	return out, nil
}
