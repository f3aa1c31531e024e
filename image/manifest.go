package image

import (
	_ "crypto/sha512" // to tell a digest that is not supported from one that is wrong
	"encoding/json"
	"errors"
	"mime"
	"net/url"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Limits on a manifest. They bound memory and lie far above what images have.
const (
	MaxManifest = 4 << 20 // bytes of a manifest or manifest list
	MaxLayers   = 1000    // layers of an image
	maxDepth    = 4       // manifest lists in manifest lists
)

// Media types of manifests.
const (
	MediaTypeDockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	MediaTypeDockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
	MediaTypeDockerConfig   = "application/vnd.docker.container.image.v1+json"

	// MediaTypeDockerLayer is an uncompressed layer, as docker save writes it.
	MediaTypeDockerLayer     = "application/vnd.docker.image.rootfs.diff.tar"
	mediaTypeDockerLayerGzip = MediaTypeDockerLayer + ".gzip"
	mediaTypeDockerLayerZstd = MediaTypeDockerLayer + ".zstd"
	mediaTypeDockerForeign   = "application/vnd.docker.image.rootfs.foreign.diff.tar"

	ociNondistributable = "application/vnd.oci.image.layer.nondistributable.v1.tar"
)

var layerTypes = []string{
	MediaTypeDockerLayer, mediaTypeDockerLayerGzip, mediaTypeDockerLayerZstd,
	mediaTypeDockerForeign, mediaTypeDockerForeign + ".gzip", mediaTypeDockerForeign + ".zstd",
	ocispec.MediaTypeImageLayer, ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerZstd,
	ociNondistributable, ociNondistributable + "+gzip", ociNondistributable + "+zstd",
}

// manifestTypes is what a registry is asked for: all that can be read, and
// nothing it would have to convert to.
var manifestTypes = []string{
	ocispec.MediaTypeImageIndex, MediaTypeDockerList, ocispec.MediaTypeImageManifest, MediaTypeDockerManifest,
}

func isList(mt string) bool { return mt == ocispec.MediaTypeImageIndex || mt == MediaTypeDockerList }

func isManifest(mt string) bool {
	return mt == ocispec.MediaTypeImageManifest || mt == MediaTypeDockerManifest
}

// Manifest is one image for one platform.
type Manifest struct {
	Name       Name               // as it was asked for
	Target     digest.Digest      // what the name points at, list or manifest: the image ID
	Digest     digest.Digest      // of the manifest
	MediaType  string             // of the manifest
	Raw        []byte             // the manifest's own bytes; not to be changed
	Platform   string             // as the manifest list names it; "" for a single manifest
	ConfigDesc ocispec.Descriptor // of the image config
	Layers     []Layer            // lowest first
	Sources    []Name             // other images in whose repositories layers lie, as a Store knows them

	// Blobs are the documents read on the way, lists and manifest, by digest:
	// what a Store needs.
	Blobs map[digest.Digest][]byte
}

// Layer names one layer's blob.
type Layer struct {
	Digest      digest.Digest     // of the blob's bytes
	Size        int64             // of the blob, in bytes
	MediaType   string            // one of docker's or OCI's layer types
	Annotations map[string]string // as in the manifest
	URLs        []string          // other places, http or https, of a foreign layer
}

// Foreign reports whether the layer must not be pushed to a registry.
func (l Layer) Foreign() bool {
	return strings.Contains(l.MediaType, ".foreign.") || strings.Contains(l.MediaType, ".nondistributable.")
}

// document is what both forms of manifest look like, to be told apart.
type document struct {
	SchemaVersion int                  `json:"schemaVersion"`
	MediaType     string               `json:"mediaType"`
	ArtifactType  string               `json:"artifactType"`
	Config        *ocispec.Descriptor  `json:"config"`
	Layers        []ocispec.Descriptor `json:"layers"`
	Manifests     []ocispec.Descriptor `json:"manifests"`
	FSLayers      json.RawMessage      `json:"fsLayers"` // schema 1 only
}

// parseDocument reads a manifest or manifest list. contentType is what the
// registry or descriptor calls it: used where the document itself does not say.
func parseDocument(raw []byte, contentType string) (document, error) {
	var d document
	if len(raw) > MaxManifest {
		return d, malformed("manifest of %d bytes, the limit is %d", len(raw), MaxManifest)
	}
	if err := json.Unmarshal(raw, &d); err != nil {
		return d, failf(ErrMalformed, err, "manifest: %s", err)
	}
	if mt, _, err := mime.ParseMediaType(contentType); err == nil {
		contentType = mt
	}
	if d.SchemaVersion == 1 || d.FSLayers != nil || strings.HasPrefix(contentType, "application/vnd.docker.distribution.manifest.v1+") {
		return d, malformed("manifest of docker schema 1, which is obsolete: pull and push the image with a current docker to convert it")
	}
	// A document that is both could be read as one thing here and as another
	// elsewhere under the same digest (CVE-2021-41190).
	if d.Manifests != nil && (d.Layers != nil || d.Config != nil) {
		return d, malformed("manifest is both a list and an image")
	}
	switch {
	case d.MediaType != "":
	case isList(contentType), isManifest(contentType):
		d.MediaType = contentType
	case d.Manifests != nil:
		d.MediaType = ocispec.MediaTypeImageIndex
	case d.Config != nil:
		d.MediaType = ocispec.MediaTypeImageManifest
	}
	switch {
	case isList(d.MediaType):
		if d.Config != nil || d.Layers != nil {
			return d, malformed("manifest list has layers")
		}
		for _, m := range d.Manifests {
			if err := checkDescriptor(m); err != nil {
				return d, failf(ErrMalformed, err, "manifest list: %s", err)
			}
		}
	case isManifest(d.MediaType):
		if d.Config == nil {
			return d, malformed("manifest names no config")
		}
	default:
		return d, malformed("manifest of unknown type %q", clip(d.MediaType))
	}
	return d, nil
}

// ParseManifest reads the manifest of one image, docker schema 2 or OCI, and
// checks all it says about its config and layers. mediaType is used where the
// document does not name its own. Name, Target, Platform and Blobs are left to
// the caller; Raw keeps raw.
func ParseManifest(raw []byte, mediaType string) (*Manifest, error) {
	d, err := parseDocument(raw, mediaType)
	if err != nil {
		return nil, err
	}
	if !isManifest(d.MediaType) {
		return nil, malformed("manifest list where the manifest of one image should be")
	}
	return d.manifest(raw)
}

func (d document) manifest(raw []byte) (*Manifest, error) {
	switch mt := d.Config.MediaType; mt {
	case ocispec.MediaTypeImageConfig, MediaTypeDockerConfig:
	default:
		if d.ArtifactType != "" {
			mt = d.ArtifactType
		}
		return nil, malformed("not a container image but an artifact of type %q", clip(mt))
	}
	if err := checkDescriptor(*d.Config); err != nil {
		return nil, failf(ErrMalformed, err, "config: %s", err)
	}
	if err := checkAlgorithm(d.Config.Digest); err != nil {
		return nil, failf(ErrMalformed, err, "config: %s", err)
	}
	if d.Config.Size > MaxConfig {
		return nil, malformed("image config of %d bytes, the limit is %d", d.Config.Size, MaxConfig)
	}
	if len(d.Layers) > MaxLayers {
		return nil, malformed("manifest with %d layers, the limit is %d", len(d.Layers), MaxLayers)
	}
	m := &Manifest{
		Digest:     digest.FromBytes(raw),
		MediaType:  d.MediaType,
		Raw:        raw,
		ConfigDesc: *d.Config,
		Layers:     make([]Layer, 0, len(d.Layers)),
	}
	for i, l := range d.Layers {
		if err := checkLayer(l); err != nil {
			return nil, failf(ErrMalformed, err, "layer %d: %s", i+1, err)
		}
		m.Layers = append(m.Layers, Layer{
			Digest: l.Digest, Size: l.Size, MediaType: l.MediaType, Annotations: l.Annotations, URLs: l.URLs,
		})
	}
	return m, nil
}

func checkLayer(l ocispec.Descriptor) error {
	if err := checkDescriptor(l); err != nil {
		return err
	}
	if err := checkAlgorithm(l.Digest); err != nil {
		return err
	}
	for _, s := range l.URLs {
		u, err := url.Parse(s)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.User != nil {
			return malformed("a URL that is not plain http or https")
		}
	}
	switch {
	case slices.Contains(layerTypes, l.MediaType):
		return nil
	case strings.HasSuffix(l.MediaType, "+encrypted"):
		return malformed("encrypted (%s), decrypt the image with skopeo first", clip(l.MediaType))
	}
	return malformed("unknown type %q", clip(l.MediaType))
}

func checkDescriptor(d ocispec.Descriptor) error {
	if err := d.Digest.Validate(); err != nil {
		return failf(ErrMalformed, err, "digest %q: %s", clip(string(d.Digest)), err)
	}
	if d.Size < 0 {
		return malformed("%s has a size of %d bytes", d.Digest, d.Size)
	}
	return nil
}

// checkAlgorithm refuses what the store of frames has no key for. Lists may have
// such entries for other platforms.
func checkAlgorithm(d digest.Digest) error {
	if a := d.Algorithm(); a != digest.SHA256 {
		return malformed("digest algorithm %s is not supported", a)
	}
	return nil
}

// verify checks bytes against the digest they were asked by.
func verify(d digest.Digest, b []byte) error {
	if err := d.Validate(); err != nil {
		return failf(ErrMalformed, err, "digest %q: %s", clip(string(d)), err)
	}
	if got := d.Algorithm().FromBytes(b); got != d {
		return malformed("%s holds other bytes (%s), it is damaged or was tampered with", d, got)
	}
	return nil
}

// reader gives the bytes of a manifest or list. want is nil for what the name
// itself points at. mediaType is what the source calls them, or "".
type reader func(want *ocispec.Descriptor) (raw []byte, mediaType string, err error)

// resolve goes from what a name points at to the manifest for a platform.
func resolve(n Name, platform string, read reader) (*Manifest, error) {
	match, err := newMatcher(platform)
	if err != nil {
		return nil, err
	}
	if n.digest != "" {
		if err := checkAlgorithm(n.digest); err != nil {
			return nil, about(n, err)
		}
	}
	blobs := map[digest.Digest][]byte{}
	var target digest.Digest
	var chosen *ocispec.Descriptor
	for range maxDepth {
		raw, mediaType, err := read(chosen)
		if err != nil {
			return nil, err
		}
		id := digest.FromBytes(raw)
		switch {
		case chosen != nil:
			if err := verify(chosen.Digest, raw); err != nil {
				return nil, about(n, err)
			}
			id = chosen.Digest
			if mediaType == "" {
				mediaType = chosen.MediaType
			}
		case n.digest != "":
			if err := verify(n.digest, raw); err != nil {
				return nil, about(n, err)
			}
			id = n.digest
		}
		if target == "" {
			target = id
		}
		blobs[id] = raw
		doc, err := parseDocument(raw, mediaType)
		if err != nil {
			return nil, about(n, err)
		}
		if isManifest(doc.MediaType) {
			m, err := doc.manifest(raw)
			if err != nil {
				return nil, about(n, err)
			}
			m.Name, m.Target, m.Digest, m.Blobs = n, target, id, blobs
			if chosen != nil && chosen.Platform != nil {
				m.Platform = formatPlatform(*chosen.Platform)
			}
			return m, nil
		}
		next, err := match.choose(doc.Manifests)
		if err != nil {
			return nil, failf(ErrNoPlatform, err, "image %s: %s", n.Familiar(), err)
		}
		if err := checkAlgorithm(next.Digest); err != nil {
			return nil, about(n, err)
		}
		if next.Size > MaxManifest {
			return nil, about(n, malformed("manifest of %d bytes, the limit is %d", next.Size, MaxManifest))
		}
		chosen = &next
	}
	return nil, about(n, malformed("manifest lists nested more than %d deep", maxDepth))
}

// about names the image an error is about.
func about(n Name, err error) error {
	kind := ErrMalformed
	for _, k := range []error{ErrNotFound, ErrUnauthorized, ErrUnreachable, ErrNoPlatform} {
		if errors.Is(err, k) {
			kind = k
		}
	}
	return failf(kind, err, "image %s: %s", n.Familiar(), err)
}
