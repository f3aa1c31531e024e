package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/varvefs/varve/fetch"
	"github.com/varvefs/varve/image"
	"github.com/varvefs/varve/index"
	"github.com/varvefs/varve/index/estargz"
	"github.com/varvefs/varve/index/soci"
	"github.com/varvefs/varve/index/zstdchunked"
)

// IndexOptions are what `varve index` asks for.
type IndexOptions struct {
	ImageOptions
	Push         bool  `json:"push,omitempty"`
	SpanSize     int64 `json:"span_size,omitempty"`      // bytes of the decompressed layer; 0 for what is best
	MinLayerSize int64 `json:"min_layer_size,omitempty"` // layers of fewer bytes are left out
}

// Indexed is what came of indexing an image.
type Indexed struct {
	Image  string         `json:"Image"`
	Digest string         `json:"Digest"` // of the manifest that the indexes are for
	Layers []IndexedLayer `json:"Layers"`
	Pushed []ImageIndex   `json:"Pushed,omitempty"`
}

// IndexedLayer is a layer of an indexed image.
type IndexedLayer struct {
	Digest       string `json:"Digest"`
	Format       string `json:"Format"`
	Left         string `json:"Left,omitempty"` // why it was left out
	Size         int64  `json:"Size"`           // of the blob
	Uncompressed int64  `json:"Uncompressed,omitempty"`
	Entries      int    `json:"Entries,omitempty"`
	Bundle       int64  `json:"Bundle,omitempty"` // bytes of varve's index of it
	ZTOC         int64  `json:"ZTOC,omitempty"`   // bytes of SOCI's
}

// ImageIndex is an index of an image in its registry.
type ImageIndex struct {
	Kind   string `json:"Kind"` // varve, soci
	Digest string `json:"Digest"`
	Layers int    `json:"Layers"` // that it has indexes of
	Size   int64  `json:"Size"`   // bytes of those
}

// IndexRemoval names what `varve index rm` deletes.
type IndexRemoval struct {
	ImageOptions
	Digests []string `json:"digests,omitempty"` // all if none
}

// Index makes indexes of the layers that bring none, and pushes them beside the
// image if asked.
func (d *Daemon) Index(ctx context.Context, o IndexOptions, n note) (*Indexed, error) {
	const least = 64 << 10
	if o.SpanSize < 0 || o.SpanSize > 0 && o.SpanSize < least {
		return nil, fmt.Errorf("a span of %d bytes: want at least %d%w", o.SpanSize, least, silent{errUsage})
	}
	im, err := d.resolve(ctx, o.ImageOptions, n)
	if err != nil {
		return nil, err
	}
	defer im.close()
	if o.Push && (im.name.IsLocal() || im.name.IsID()) {
		return nil, fmt.Errorf("push the indexes of %s: it is in no registry%w", im.name.Familiar(), silent{errUsage})
	}
	if _, err := im.diffIDs(); err != nil { // another platform's, say: before anything is read
		return nil, fmt.Errorf("index %s: %w", im.name.Familiar(), err)
	}
	m := im.manifest
	out := &Indexed{Image: im.name.Familiar(), Digest: m.Digest.String(), Layers: make([]IndexedLayer, len(m.Layers))}
	made := make([]*fetch.Shared, len(m.Layers))
	eg, ectx := errgroup.WithContext(ctx)
	eg.SetLimit(2) // each is a pass on several cores
	for i, l := range m.Layers {
		il := &out.Layers[i]
		il.Digest, il.Size = l.Digest.String(), l.Size
		if il.Format, il.Left = leftOut(l, o.MinLayerSize); il.Left != "" {
			continue
		}
		eg.Go(func() (err error) {
			made[i], err = d.share(ectx, im, i, o, n)
			if errors.Is(err, index.ErrUnshared) {
				il.Left, made[i] = "it has sparse files, which no index can say", nil
				return nil
			}
			if err != nil {
				return err
			}
			s := made[i]
			il.Format, il.Uncompressed, il.Entries = s.Format, s.Uncompressed, s.Entries
			il.Bundle, il.ZTOC = int64(len(s.Bundle)), int64(len(s.ZTOC))
			return nil
		})
	}
	if err := eg.Wait(); err != nil {
		return nil, fmt.Errorf("index %s: %w", im.name.Familiar(), err)
	}
	if err := im.keep(); err != nil {
		return nil, err
	}
	if o.Push {
		if out.Pushed, err = d.pushIndexes(ctx, im, made, o.ImageOptions); err != nil {
			return nil, fmt.Errorf("the indexes of %s were made, but not pushed: %w", im.name.Familiar(), err)
		}
	}
	return out, nil
}

// leftOut says why a layer needs no index.
func leftOut(l image.Layer, least int64) (format, why string) {
	if _, ok := estargz.TOCDigest(l.Annotations); ok {
		return "estargz", "it has a table of contents"
	}
	if _, ok, err := zstdchunked.FromAnnotations(l.Annotations); ok && err == nil {
		return "zstd:chunked", "it has a table of contents"
	}
	if l.Size < least {
		return "", "it is smaller than the least"
	}
	return "", ""
}

// share makes the indexes of layer i, of what is kept of it where it was read
// whole before.
func (d *Daemon) share(ctx context.Context, im *resolved, i int, o IndexOptions, n note) (*fetch.Shared, error) {
	q, err := im.request(ctx, i, n)
	if err != nil {
		return nil, err
	}
	q.Index, q.Find = "", nil // it is to have an index of its own
	if o.SpanSize > 0 {
		return d.fetcher.Index(ctx, q, o.SpanSize)
	}
	h, err := d.fetcher.Open(ctx, q)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	return h.Share()
}

// pushIndexes pushes the two indexes of an image: varve's of all layers, and
// SOCI's of those that it knows.
func (d *Daemon) pushIndexes(ctx context.Context, im *resolved, made []*fetch.Shared, o ImageOptions) ([]ImageIndex, error) {
	m := im.manifest
	subject := ocispec.Descriptor{MediaType: m.MediaType, Digest: m.Digest, Size: int64(len(m.Raw))}
	ours := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, ArtifactType: bundleIndexType,
		Config: ocispec.DescriptorEmptyJSON, Subject: &subject, Layers: []ocispec.Descriptor{},
	}
	ours.Config.MediaType = bundleIndexType // which some registries list as the artifact's type
	var ztocs []soci.ZTOC
	empty := []byte("{}")
	blobs, sociBlobs := [][]byte{empty}, [][]byte{empty}
	var size, sociSize int64
	for i, s := range made {
		if s == nil {
			continue
		}
		l := m.Layers[i]
		ours.Layers = append(ours.Layers, ocispec.Descriptor{
			MediaType: bundleLayerType, Digest: digest.FromBytes(s.Bundle), Size: int64(len(s.Bundle)),
			Annotations: map[string]string{bundleLayerDigest: l.Digest.String()},
		})
		blobs = append(blobs, s.Bundle)
		size += int64(len(s.Bundle))
		if s.ZTOC == nil {
			continue
		}
		ztocs = append(ztocs, soci.ZTOC{Digest: digest.FromBytes(s.ZTOC), Size: int64(len(s.ZTOC)), LayerDigest: l.Digest, LayerMediaType: l.MediaType, SpanSize: s.SpanSize})
		sociBlobs = append(sociBlobs, s.ZTOC)
		sociSize += int64(len(s.ZTOC))
	}
	if len(ours.Layers) == 0 {
		return nil, nil
	}
	raw, err := json.Marshal(ours)
	if err != nil {
		return nil, err
	}
	ref, err := d.registries.PushReferrer(ctx, im.name, d.imageOptions(o), m.Digest, raw, blobs)
	if err != nil {
		return nil, err
	}
	out := []ImageIndex{{Kind: fetch.KindBundle, Digest: ref.Digest.String(), Layers: len(ours.Layers), Size: size}}
	if len(ztocs) == 0 {
		return out, nil
	}
	if raw, err = soci.Index(subject, ztocs); err != nil {
		return out, err
	}
	if ref, err = d.registries.PushReferrer(ctx, im.name, d.imageOptions(o), m.Digest, raw, sociBlobs); err != nil {
		return out, err
	}
	return append(out, ImageIndex{Kind: fetch.KindSOCI, Digest: ref.Digest.String(), Layers: len(ztocs), Size: sociSize}), nil
}

// Indexes lists the indexes that an image has in its registry.
func (d *Daemon) Indexes(ctx context.Context, o ImageOptions) ([]ImageIndex, error) {
	im, err := d.resolve(ctx, o, func(event) {})
	if err != nil {
		return nil, err
	}
	defer im.close()
	refs, err := d.registries.Referrers(ctx, im.name, d.imageOptions(o), im.manifest.Digest, bundleIndexType, soci.TypeIndexV1)
	if err != nil {
		return nil, err
	}
	out := []ImageIndex{}
	for _, r := range refs {
		x := ImageIndex{Kind: fetch.KindSOCI, Digest: r.Digest.String()}
		if r.ArtifactType == bundleIndexType {
			x.Kind = fetch.KindBundle
		}
		raw, err := d.registries.FetchManifest(ctx, im.name, d.imageOptions(o), r.Digest, ocispec.MediaTypeImageManifest, image.MaxManifest)
		if err != nil {
			return nil, err
		}
		var m ocispec.Manifest
		if err := json.Unmarshal(raw, &m); err != nil {
			return nil, fmt.Errorf("index %.19s: %w: %w", r.Digest, index.ErrMalformed, err)
		}
		for _, l := range m.Layers {
			if l.MediaType == bundleLayerType || l.MediaType == soci.TypeZTOC {
				x.Layers++
				x.Size += l.Size
			}
		}
		out = append(out, x)
	}
	return out, nil
}

// RemoveIndexes deletes indexes of an image from its registry and gives their
// digests.
func (d *Daemon) RemoveIndexes(ctx context.Context, o IndexRemoval) ([]string, error) {
	im, err := d.resolve(ctx, o.ImageOptions, func(event) {})
	if err != nil {
		return nil, err
	}
	defer im.close()
	refs, err := d.registries.Referrers(ctx, im.name, d.imageOptions(o.ImageOptions), im.manifest.Digest, bundleIndexType, soci.TypeIndexV1)
	if err != nil {
		return nil, err
	}
	all := make([]string, len(refs))
	for i, r := range refs {
		all[i] = r.Digest.String()
	}
	digests := o.Digests
	if len(digests) == 0 {
		digests = all
	}
	removed := []string{}
	for _, s := range digests {
		id, err := digest.Parse(s)
		if err != nil {
			return removed, fmt.Errorf("%q: %w%w", s, err, silent{errUsage})
		}
		if !slices.Contains(all, s) { // it may be the image itself, or another
			return removed, fmt.Errorf("%s is no index of %s%w", s, im.name.Familiar(), silent{image.ErrNotFound})
		}
		if err := d.registries.DeleteReferrer(ctx, im.name, d.imageOptions(o.ImageOptions), im.manifest.Digest, id); err != nil {
			return removed, err
		}
		removed = append(removed, s)
	}
	d.forgetIndexes(im.manifest.Digest)
	return removed, nil
}
