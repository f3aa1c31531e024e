package commit

import (
	"cmp"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/varvefs/varve/image"
)

// stargzChunkedChecksum is what stargz-snapshotter's dialect of zstd:chunked has in
// the place of [chunkedChecksum].
const stargzChunkedChecksum = "io.containers.zstd-chunked.manifest-checksum"

// formAnnotations begin the annotations of a layer's descriptor that are of its
// blob: they are wrong of another.
var formAnnotations = []string{
	"containerd.io/snapshot/stargz/", estargz.StoreUncompressedSizeAnnotation,
	chunkedPrefix, "io.containers.zstd-chunked.", "containerd.io/uncompressed",
}

// sociIndex is an annotation of a manifest: the SOCI index of its layers.
const sociIndex = "com.amazon.soci.index-digest"

// convertedImage makes the manifest and config of an image in which some layers
// were converted; nil are those that stay as they are.
func convertedImage(base *image.Manifest, config []byte, ids []digest.Digest, layers []*LayerDesc, oci bool) (*image.Manifest, []byte, error) {
	docker, changed := base.IsDocker() && !oci, false
	for _, l := range layers {
		if l != nil {
			changed = true
			docker = docker && !image.Layer{MediaType: l.MediaType}.Zstd()
		}
	}
	raw, made := base.Raw, config
	var err error
	if changed {
		if made, err = convertedConfig(config, ids, layers); err != nil {
			return nil, nil, err
		}
	}
	if changed || docker != base.IsDocker() {
		if raw, err = convertedManifest(base, made, layers, docker); err != nil {
			return nil, nil, err
		}
	}
	out, err := image.ParseManifest(raw, base.MediaType)
	if err != nil {
		return nil, nil, fmt.Errorf("the new image's %w", err)
	}
	out.Target, out.Platform = out.Digest, base.Platform
	out.Blobs = map[digest.Digest][]byte{out.Digest: raw}
	out.Sources = append(out.Sources, base.Sources...)
	if !base.Name.IsZero() && !base.Name.IsID() {
		out.Sources = append(out.Sources, base.Name)
	}
	return out, made, nil
}

// convertedConfig puts the new diffIDs into a config.
func convertedConfig(config []byte, ids []digest.Digest, layers []*LayerDesc) ([]byte, error) {
	o, err := parseObject(config)
	if err != nil {
		return nil, fmt.Errorf("image config: %w", err)
	}
	root, err := parseObject(o.get("rootfs"))
	if err != nil {
		return nil, fmt.Errorf("image config: rootfs: %w", err)
	}
	diffIDs := append([]digest.Digest{}, ids...)
	for i, l := range layers {
		if l != nil {
			diffIDs[i] = l.DiffID
		}
	}
	root.set("type", "layers")
	root.set("diff_ids", diffIDs)
	o.put("rootfs", root.bytes())
	made := o.bytes()
	c, err := image.ParseConfig(made)
	if err == nil {
		_, err = c.DiffIDs(len(diffIDs))
	}
	if err != nil {
		return nil, fmt.Errorf("the new image's: %w", err)
	}
	return made, nil
}

// convertedManifest keeps of a manifest what is not of its layers' form. It is no
// referrer to what the old one was one to.
func convertedManifest(base *image.Manifest, config []byte, layers []*LayerDesc, docker bool) ([]byte, error) {
	bad := func(err error) ([]byte, error) { return nil, fmt.Errorf("manifest %s: %w", base.Digest, err) }
	o, err := parseObject(base.Raw)
	if err != nil {
		return bad(err)
	}
	var old []json.RawMessage
	if err := json.Unmarshal(o.get("layers"), &old); err != nil {
		return bad(err)
	}
	if len(old) != len(layers) {
		return bad(fmt.Errorf("it names %d layers, not %d", len(old), len(layers)))
	}
	for i, raw := range old {
		if old[i], err = convertedDescriptor(raw, base.Layers[i].MediaType, layers[i], docker); err != nil {
			return bad(fmt.Errorf("layer %d: %w", i+1, err))
		}
	}
	manifestType, configType := ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageConfig
	if docker {
		manifestType, configType = image.MediaTypeDockerManifest, image.MediaTypeDockerConfig
	}
	desc, err := parseObject(o.get("config"))
	if err != nil {
		return bad(err)
	}
	if docker != base.IsDocker() {
		desc.set("mediaType", configType)
	}
	desc.set("digest", digest.FromBytes(config))
	desc.set("size", len(config))
	desc.drop("data")
	o.set("mediaType", manifestType)
	o.put("config", desc.bytes())
	o.put("layers", arrayOf(old))
	o.drop("subject")
	if err := editAnnotations(o, func(name string) bool { return name == sociIndex }, nil); err != nil {
		return bad(err)
	}
	return o.bytes(), nil
}

// convertedDescriptor names a converted layer in the place of the old, or the old
// one in a family of media types.
func convertedDescriptor(raw json.RawMessage, mediaType string, l *LayerDesc, docker bool) (json.RawMessage, error) {
	if l == nil {
		return convertLayer(raw, mediaType, docker)
	}
	mt, ok := image.LayerType(l.MediaType, docker)
	if !ok {
		return nil, fmt.Errorf("unknown type %.80q", l.MediaType)
	}
	o, err := parseObject(raw)
	if err != nil {
		return nil, err
	}
	o.set("mediaType", mt)
	o.set("digest", l.Digest)
	o.set("size", l.Size)
	for _, name := range []string{"data", "urls"} { // those were of the old blob
		o.drop(name)
	}
	old := func(name string) bool {
		for _, prefix := range formAnnotations {
			if strings.HasPrefix(name, prefix) {
				return true
			}
		}
		return false
	}
	if err := editAnnotations(o, old, l.Annotations); err != nil {
		return nil, err
	}
	return o.bytes(), nil
}

// editAnnotations takes some annotations out of an object, and adds others.
func editAnnotations(o *object, gone func(string) bool, more map[string]string) error {
	a := map[string]string{}
	if raw := o.get("annotations"); !isNull(raw) {
		if err := json.Unmarshal(raw, &a); err != nil {
			return fmt.Errorf("annotations: %w", err)
		}
	}
	changed := len(more) > 0
	for name := range a {
		if gone(name) {
			delete(a, name)
			changed = true
		}
	}
	for name, value := range more {
		a[name] = value
	}
	switch {
	case !changed:
	case len(a) == 0:
		o.drop("annotations")
	default:
		o.set("annotations", a)
	}
	return nil
}

// ConvertedList makes of a manifest list one that names other manifests in the
// place of some, in its order and with its annotations. made has them by the
// digests of the old. Of the same manifests it gives the same bytes.
func ConvertedList(raw []byte, made map[digest.Digest]*image.Manifest) (list []byte, mediaType string, err error) {
	if list, err = convertedList(raw, made); err != nil {
		return nil, "", fmt.Errorf("convert manifest list %s: %w", digest.FromBytes(raw), err)
	}
	var l ocispec.Index
	if err := json.Unmarshal(list, &l); err != nil {
		return nil, "", fmt.Errorf("the new manifest list: %w", err)
	}
	return list, cmp.Or(l.MediaType, ocispec.MediaTypeImageIndex), nil
}

func convertedList(raw []byte, made map[digest.Digest]*image.Manifest) ([]byte, error) {
	o, err := parseObject(raw)
	if err != nil {
		return nil, err
	}
	var all []json.RawMessage
	if err := json.Unmarshal(o.get("manifests"), &all); err != nil {
		return nil, err
	}
	changed, oci := false, false
	for i, entry := range all {
		d, err := parseObject(entry)
		if err != nil {
			return nil, err
		}
		var id digest.Digest
		if err := json.Unmarshal(d.get("digest"), &id); err != nil {
			return nil, err
		}
		m := made[id]
		if m == nil {
			continue
		}
		oci = oci || !m.IsDocker()
		if m.Digest == id {
			continue
		}
		changed = true
		d.set("mediaType", m.MediaType)
		d.set("digest", m.Digest)
		d.set("size", len(m.Raw))
		d.drop("data")
		all[i] = d.bytes()
	}
	if !changed {
		return raw, nil
	}
	o.put("manifests", arrayOf(all))
	o.drop("subject")
	if oci {
		o.set("mediaType", ocispec.MediaTypeImageIndex)
	}
	list := o.bytes()
	if len(list) > image.MaxManifest {
		return nil, fmt.Errorf("it has %d bytes, the limit is %d", len(list), image.MaxManifest)
	}
	return list, nil
}
