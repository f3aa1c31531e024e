package commit

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/varvefs/varve/image"
)

// Families of media types that an image can be made in.
const (
	FormatOCI    = "oci"
	FormatDocker = "docker"
)

// LayerDesc describes the layer of a commit.
type LayerDesc struct {
	Digest      digest.Digest     // of the blob
	DiffID      digest.Digest     // of the tar in it
	Size        int64             // of the blob, in bytes
	MediaType   string            // in either family; the image's own is taken
	Annotations map[string]string // what lets the layer be read by range; kept in both families
}

// Meta says what a commit adds beside its layer. The zero Meta works.
type Meta struct {
	Author    string    // of the commit; "" leaves the image its own
	Comment   string    // into the history
	CreatedBy string    // into the history
	Created   time.Time // zero: the image does not say when
	Changes   Changes   // to the config
	Format    string    // FormatOCI, FormatDocker, or "": the base's family

	// BaseName is what the base is called. Only a registry's name is told in the
	// image.
	BaseName image.Name
	// BaseDigest is the base's manifest, for one that is not the image given:
	// with Squash, the one below the layers that are replaced. "" is the image
	// given, or with Squash none.
	BaseDigest digest.Digest

	Annotations map[string]string // of the manifest, OCI only
	Squash      int               // top layers of the base that the new layer, or none, replaces
}

// Image makes the manifest and config of a commit on base, whose config's bytes
// are config. No byte of a layer is read. A nil layer is a commit without a
// change of files: an entry in the history alone. With Squash it says that the
// layers replaced come to nothing together.
//
// Of the base are kept: the descriptors of its layers, the bytes of all fields of
// the config that are not set here, and the annotations of the manifest. Not its
// subject, to which the new image is no referrer. The same input gives the same
// bytes.
//
// The manifest has neither Name nor Platform of its own: Platform is the base's,
// and Sources are the base and its Sources.
func Image(base *image.Manifest, config []byte, layer *LayerDesc, m Meta) (*image.Manifest, []byte, error) {
	if base == nil {
		return nil, nil, errors.New("make image: there is no base")
	}
	made, raw, err := makeImage(base, config, layer, m)
	if err != nil {
		return nil, nil, fmt.Errorf("make image on %s: %w", base.Name.Familiar(), err)
	}
	return made, raw, nil
}

func makeImage(base *image.Manifest, config []byte, layer *LayerDesc, m Meta) (*image.Manifest, []byte, error) {
	if err := checkInput(base, config, layer, m); err != nil {
		return nil, nil, err
	}
	docker, err := imageFamily(base, layer, m)
	if err != nil {
		return nil, nil, err
	}
	var diffID digest.Digest
	if layer != nil {
		diffID = layer.DiffID
	}
	made, err := newConfig(config, len(base.Layers), diffID, m)
	if err != nil {
		return nil, nil, err
	}
	raw, err := newManifest(base, made, layer, m, docker)
	if err != nil {
		return nil, nil, err
	}
	out, err := image.ParseManifest(raw, "")
	if err != nil {
		return nil, nil, fmt.Errorf("the new image's %w", err)
	}
	c, err := image.ParseConfig(made)
	if err != nil {
		return nil, nil, err
	}
	if _, err := c.DiffIDs(len(out.Layers)); err != nil {
		return nil, nil, err
	}
	out.Target, out.Platform = out.Digest, base.Platform
	out.Blobs = map[digest.Digest][]byte{out.Digest: raw}
	out.Sources = append(out.Sources, base.Sources...)
	if !base.Name.IsZero() && !base.Name.IsID() {
		out.Sources = append(out.Sources, base.Name)
	}
	return out, made, nil
}

// lastSecond is the last one that RFC 3339 can write, 9999-12-31T23:59:59Z.
const lastSecond = 253402300799

func checkInput(base *image.Manifest, config []byte, layer *LayerDesc, m Meta) error {
	switch {
	case digest.FromBytes(config) != base.ConfigDesc.Digest:
		return fmt.Errorf("the config given is not %s", base.ConfigDesc.Digest)
	case m.Squash < 0 || m.Squash > len(base.Layers):
		return fmt.Errorf("%d layers to squash, the image has %d", m.Squash, len(base.Layers))
	case m.Created.Unix() > lastSecond || !m.Created.IsZero() && m.Created.UTC().Year() < 0:
		return fmt.Errorf("the time %s cannot be written", m.Created)
	case m.Format != "" && m.Format != FormatOCI && m.Format != FormatDocker:
		return fmt.Errorf("format %.40q is neither %q nor %q", m.Format, FormatOCI, FormatDocker)
	}
	if m.BaseDigest != "" {
		if err := m.BaseDigest.Validate(); err != nil {
			return fmt.Errorf("digest of the base: %w", err)
		}
	}
	if layer == nil {
		return nil
	}
	for _, d := range []digest.Digest{layer.Digest, layer.DiffID} {
		if err := d.Validate(); err != nil {
			return fmt.Errorf("digest of the layer: %w", err)
		}
	}
	if layer.Size < 0 {
		return fmt.Errorf("layer of %d bytes", layer.Size)
	}
	return nil
}

// imageFamily decides whether the image is made in docker's media types.
func imageFamily(base *image.Manifest, layer *LayerDesc, m Meta) (docker bool, err error) {
	docker = base.IsDocker()
	if m.Format != "" {
		docker = m.Format == FormatDocker
	}
	zstd := layer != nil && image.Layer{MediaType: layer.MediaType}.Zstd()
	for _, l := range base.Layers[:len(base.Layers)-m.Squash] {
		zstd = zstd || l.Zstd()
	}
	switch {
	case docker && zstd && m.Format == FormatDocker:
		return false, errors.New("docker's format has no layers of zstd: take --format oci, or --compression gzip if it is the new layer that is one")
	case docker && zstd:
		docker = false
	}
	if docker && len(m.Annotations) > 0 {
		return false, errors.New("manifests in docker's format have no annotations, take --format oci")
	}
	return docker, nil
}

func newManifest(base *image.Manifest, config []byte, layer *LayerDesc, m Meta, docker bool) ([]byte, error) {
	var old struct {
		Layers      []json.RawMessage `json:"layers"`
		Annotations map[string]string `json:"annotations"`
	}
	if err := json.Unmarshal(base.Raw, &old); err != nil {
		return nil, fmt.Errorf("manifest %s: %w", base.Digest, err)
	}
	if len(old.Layers) != len(base.Layers) {
		return nil, fmt.Errorf("manifest %s names %d layers, not %d", base.Digest, len(old.Layers), len(base.Layers))
	}
	layers := old.Layers[:len(old.Layers)-m.Squash]
	// Without a reason they stay as they are, also where a manifest of one family
	// has layers of the other.
	if m.Format != "" || docker != base.IsDocker() {
		for i, raw := range layers {
			converted, err := convertLayer(raw, base.Layers[i].MediaType, docker)
			if err != nil {
				return nil, fmt.Errorf("manifest %s: layer %d: %w", base.Digest, i+1, err)
			}
			layers[i] = converted
		}
	}
	if layer != nil {
		mt, ok := image.LayerType(layer.MediaType, docker)
		if !ok {
			return nil, fmt.Errorf("layer of unknown type %.80q", layer.MediaType)
		}
		layers = append(layers, encodeJSON(ocispec.Descriptor{
			MediaType: mt, Digest: layer.Digest, Size: layer.Size, Annotations: layer.Annotations,
		}))
	}
	manifestType, configType := ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageConfig
	if docker {
		manifestType, configType = image.MediaTypeDockerManifest, image.MediaTypeDockerConfig
	}
	o := &object{}
	o.set("schemaVersion", 2)
	o.set("mediaType", manifestType)
	o.set("config", ocispec.Descriptor{MediaType: configType, Digest: digest.FromBytes(config), Size: int64(len(config))})
	o.put("layers", arrayOf(layers))
	if !docker {
		o.set("annotations", manifestAnnotations(old.Annotations, base, m))
	}
	return o.bytes(), nil
}

func convertLayer(raw json.RawMessage, mediaType string, docker bool) (json.RawMessage, error) {
	mt, ok := image.LayerType(mediaType, docker)
	if !ok {
		return nil, fmt.Errorf("unknown type %.80q", mediaType)
	}
	if mt == mediaType {
		return raw, nil
	}
	o, err := parseObject(raw)
	if err != nil {
		return nil, err
	}
	o.set("mediaType", mt)
	return o.bytes(), nil
}

// manifestAnnotations gives those of the new manifest. base.digest is that of the
// platform's own manifest, not of a list it was found through: it is to be "the
// immediate image sharing zero-indexed layers with the image" (image-spec,
// annotations.md), and a list has no layers.
func manifestAnnotations(old map[string]string, base *image.Manifest, m Meta) map[string]string {
	a := map[string]string{}
	maps.Copy(a, old)
	for _, name := range []string{ocispec.AnnotationBaseImageName, ocispec.AnnotationBaseImageDigest, ocispec.AnnotationCreated} {
		delete(a, name) // those were of the base
	}
	from := m.BaseDigest
	if from == "" && m.Squash == 0 {
		from = base.Digest
	}
	if from != "" {
		a[ocispec.AnnotationBaseImageDigest] = from.String()
		// A path would be true on one machine only, and tell of it.
		if m.BaseName.Registry() != "" {
			a[ocispec.AnnotationBaseImageName] = m.BaseName.String()
		}
	}
	if !m.Created.IsZero() {
		a[ocispec.AnnotationCreated] = m.Created.UTC().Format(time.RFC3339Nano)
	}
	maps.Copy(a, m.Annotations)
	return a
}
