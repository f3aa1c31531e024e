package commit

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/varvefs/varve/image"
)

// Manifests are the entries of a manifest list.
func Manifests(raw []byte) ([]ocispec.Descriptor, error) {
	var list ocispec.Index
	if err := json.Unmarshal(raw, &list); err != nil {
		return nil, pushErrorf(image.ErrMalformed, err, "manifest list: %s", err)
	}
	for _, d := range list.Manifests {
		if err := d.Digest.Validate(); err != nil || d.Size < 0 || d.Size > image.MaxManifest {
			return nil, pushErrorf(image.ErrMalformed, err, "manifest list: an entry %.80q of %d bytes", string(d.Digest), d.Size)
		}
	}
	return list.Manifests, nil
}

// MayBeImage reports whether an entry of a manifest list names an image of a known
// platform, as far as the entry says. Others are attestations, and what else lies
// beside images.
func MayBeImage(d ocispec.Descriptor) bool {
	switch d.ArtifactType {
	case "", ocispec.MediaTypeImageConfig, image.MediaTypeDockerConfig: // some say of images what their configs are
	default:
		return false
	}
	return d.Platform != nil && d.Platform.OS != "" && d.Platform.OS != "unknown" && d.Annotations["vnd.docker.reference.type"] == ""
}

// IsImage reports whether a manifest is that of an image, and not of another
// artifact.
func IsImage(raw []byte) bool {
	var m struct {
		Config struct {
			MediaType string `json:"mediaType"`
		} `json:"config"`
	}
	if json.Unmarshal(raw, &m) != nil {
		return false
	}
	return m.Config.MediaType == ocispec.MediaTypeImageConfig || m.Config.MediaType == image.MediaTypeDockerConfig
}

// ArtifactManifest reads a manifest of whatever kind, so that [Push] can copy it:
// nothing is said of what its blobs are.
func ArtifactManifest(raw []byte, mediaType string) (*image.Manifest, error) {
	var m ocispec.Manifest
	bad := func(err error, format string, args ...any) (*image.Manifest, error) {
		return nil, pushErrorf(image.ErrMalformed, err, "manifest %s: %s", digest.FromBytes(raw), fmt.Sprintf(format, args...))
	}
	if err := json.Unmarshal(raw, &m); err != nil {
		return bad(err, "%s", err)
	}
	if len(m.Layers) > image.MaxLayers {
		return bad(nil, "it names %d blobs, the limit is %d", len(m.Layers), image.MaxLayers)
	}
	out := &image.Manifest{Digest: digest.FromBytes(raw), MediaType: mediaType, Raw: raw, ConfigDesc: m.Config}
	for _, d := range append(m.Layers, m.Config) {
		if err := d.Digest.Validate(); err != nil || d.Size < 0 {
			return bad(err, "a blob %.80q of %d bytes", string(d.Digest), d.Size)
		}
	}
	for _, d := range m.Layers {
		out.Layers = append(out.Layers, image.Layer{Digest: d.Digest, Size: d.Size, MediaType: d.MediaType, Annotations: d.Annotations})
	}
	if m.Config.Size > image.MaxConfig {
		return bad(nil, "a config of %d bytes, the limit is %d", m.Config.Size, image.MaxConfig)
	}
	return out, nil
}

// PushList puts a manifest list under a name whose repository has the manifests
// already, as [Push] brings them there.
func PushList(ctx context.Context, raw []byte, mediaType string, o PushOptions) error {
	list := &image.Manifest{Digest: digest.FromBytes(raw), MediaType: mediaType, Raw: raw}
	if err := newClient(o).putManifest(ctx, list, o.Target); err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return pushErrorf(kindOf(err), err, "push %s: %s", o.Target.Familiar(), err)
	}
	return nil
}
