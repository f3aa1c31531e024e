package soci

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"

	digests "github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/varvefs/varve/index"
)

// Media types of an index manifest's config, which say its version, and of its
// layers.
const (
	TypeIndexV1  = "application/vnd.amazon.soci.index.v1+json" // found as a referrer of its subject, the image's manifest
	TypeIndexV2  = "application/vnd.amazon.soci.index.v2+json" // named by the image's manifest
	TypeZTOC     = "application/octet-stream"
	TypePrefetch = "application/vnd.amazon.soci.prefetch.v1+json" // see Prefetch
)

// Annotations.
const (
	IndexDigestAnnotation    = "com.amazon.soci.index-digest"          // of an image's manifest: the digest of its index manifest (v2)
	ImageManifestAnnotation  = "com.amazon.soci.image-manifest-digest" // of an index manifest's descriptor: the image it is for (v2)
	BuildToolAnnotation      = "com.amazon.soci.build-tool-identifier" // of an index manifest
	LayerDigestAnnotation    = "com.amazon.soci.image-layer-digest"    // of a zTOC's descriptor, as are those below
	LayerMediaTypeAnnotation = "com.amazon.soci.image-layer-mediaType"
	SpanSizeAnnotation       = "com.amazon.soci.span-size"      // decimal bytes
	DisableXattrsAnnotation  = "com.amazon.soci.disable-xattrs" // "true" where the layer has no extended attributes and no opaque directories
)

// Config is the content of an index manifest's config, which is to be pushed
// with it.
const Config = "{}"

// BuildTool is what varve calls itself in what it writes.
const BuildTool = "varve"

// Limits on an index manifest, far above what images have.
const (
	MaxManifest = 4 << 20 // bytes
	MaxLayers   = 4096
)

// ZTOC is the descriptor of a zTOC and of the layer it describes.
type ZTOC struct {
	Digest         digests.Digest
	Size           int64 // bytes
	LayerDigest    digests.Digest
	LayerMediaType string
	SpanSize       int64 // bytes; 0 where the index does not say
	DisableXattrs  bool  // the layer has no extended attributes
}

// ParseIndex reads an index manifest, of version 1 or 2.
func ParseIndex(manifest []byte) (version int, ztocs []ZTOC, err error) {
	if len(manifest) > MaxManifest {
		return 0, nil, fmt.Errorf("%w: SOCI index of %d bytes, the limit is %d", index.ErrMalformed, len(manifest), MaxManifest)
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(manifest, &m); err != nil {
		return 0, nil, fmt.Errorf("%w: SOCI index: %w", index.ErrMalformed, err)
	}
	switch m.Config.MediaType {
	case TypeIndexV1:
		version = 1
	case TypeIndexV2:
		version = 2
	default:
		return 0, nil, fmt.Errorf("%w: SOCI index: config of type %.80q", index.ErrMalformed, m.Config.MediaType)
	}
	if len(m.Layers) > MaxLayers {
		return 0, nil, fmt.Errorf("%w: SOCI index of %d layers, the limit is %d", index.ErrMalformed, len(m.Layers), MaxLayers)
	}
	for i, d := range m.Layers {
		if d.MediaType != TypeZTOC {
			continue
		}
		z, err := parseZTOC(d)
		if err != nil {
			return 0, nil, fmt.Errorf("%w: SOCI index: layer %d: %w", index.ErrMalformed, i, err)
		}
		ztocs = append(ztocs, z)
	}
	return version, ztocs, nil
}

func parseZTOC(d ocispec.Descriptor) (ZTOC, error) {
	z := ZTOC{
		Digest: d.Digest, Size: d.Size,
		LayerDigest:    digests.Digest(d.Annotations[LayerDigestAnnotation]),
		LayerMediaType: d.Annotations[LayerMediaTypeAnnotation],
		DisableXattrs:  d.Annotations[DisableXattrsAnnotation] == "true",
	}
	if s, ok := d.Annotations[SpanSizeAnnotation]; ok {
		var err error
		if z.SpanSize, err = strconv.ParseInt(s, 10, 64); err != nil || z.SpanSize < 0 {
			return z, fmt.Errorf("span size %.80q", s)
		}
	}
	return z, z.check()
}

func (z *ZTOC) check() error {
	if err := z.Digest.Validate(); err != nil {
		return fmt.Errorf("digest %.80q: %w", z.Digest, err)
	}
	if err := z.LayerDigest.Validate(); err != nil {
		return fmt.Errorf("digest of the image's layer %.80q: %w", z.LayerDigest, err)
	}
	if z.Size <= 0 || z.Size > index.MaxTOCSize {
		return fmt.Errorf("zTOC of %d bytes, the limit is %d", z.Size, int64(index.MaxTOCSize))
	}
	return nil
}

// Index makes the index manifest, of version 1, of the image whose manifest is
// subject. The same arguments give the same bytes.
func Index(subject ocispec.Descriptor, ztocs []ZTOC) ([]byte, error) {
	if len(ztocs) == 0 || len(ztocs) > MaxLayers {
		return nil, fmt.Errorf("SOCI index of %d layers", len(ztocs))
	}
	if err := subject.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("SOCI index of %.80q: %w", subject.Digest, err)
	}
	m := ocispec.Manifest{
		Versioned:   specs.Versioned{SchemaVersion: 2},
		MediaType:   ocispec.MediaTypeImageManifest,
		Config:      ocispec.Descriptor{MediaType: TypeIndexV1, Digest: digests.FromString(Config), Size: int64(len(Config))},
		Subject:     &ocispec.Descriptor{MediaType: subject.MediaType, Digest: subject.Digest, Size: subject.Size},
		Annotations: map[string]string{BuildToolAnnotation: BuildTool},
	}
	for _, z := range ztocs {
		err := z.check()
		if err == nil && z.SpanSize <= 0 {
			err = errors.New("no span size")
		}
		if err != nil {
			return nil, fmt.Errorf("SOCI index: zTOC %.80q: %w", z.Digest, err)
		}
		d := ocispec.Descriptor{MediaType: TypeZTOC, Digest: z.Digest, Size: z.Size, Annotations: map[string]string{
			LayerDigestAnnotation:    z.LayerDigest.String(),
			LayerMediaTypeAnnotation: z.LayerMediaType,
			SpanSizeAnnotation:       strconv.FormatInt(z.SpanSize, 10),
		}}
		if z.DisableXattrs {
			d.Annotations[DisableXattrsAnnotation] = "true"
		}
		m.Layers = append(m.Layers, d)
	}
	return json.Marshal(m)
}
