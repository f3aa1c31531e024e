package forms

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"runtime"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sync/errgroup"
)

// Opener opens one layer as an uncompressed tar stream; the stream's reader
// closes it.
type Opener func() (io.ReadCloser, error)

// Convert writes the layers of img in another form and gives the image that
// they make, with OCI media types. History and configuration are kept, diffIDs
// follow the new streams. The image reads its blobs from opts.Dir.
func Convert(ctx context.Context, img v1.Image, form Form, opts Options) (v1.Image, error) {
	layers, err := img.Layers()
	if err != nil {
		return nil, fmt.Errorf("convert to %s: %w", form, err)
	}
	config, err := img.RawConfigFile()
	if err != nil {
		return nil, fmt.Errorf("convert to %s: %w", form, err)
	}
	manifest, err := img.Manifest()
	if err != nil {
		return nil, fmt.Errorf("convert to %s: %w", form, err)
	}
	open := make([]Opener, len(layers))
	for i, l := range layers {
		open[i] = l.Uncompressed
	}
	out, err := build(ctx, config, manifest.Annotations, open, form, opts)
	if err != nil {
		return nil, fmt.Errorf("convert to %s: %w", form, err)
	}
	return out, nil
}

// FromLayers makes an image of tar streams, lowest first, for the platform
// this runs on.
func FromLayers(ctx context.Context, form Form, opts Options, layers ...Opener) (v1.Image, error) {
	config := v1.ConfigFile{OS: "linux", Architecture: runtime.GOARCH}
	for i := range layers {
		config.History = append(config.History, v1.History{CreatedBy: fmt.Sprintf("layer %d", i)})
	}
	raw, err := json.Marshal(config)
	if err != nil {
		return nil, fmt.Errorf("make image: %w", err)
	}
	img, err := build(ctx, raw, nil, layers, form, opts)
	if err != nil {
		return nil, fmt.Errorf("make image: %w", err)
	}
	return img, nil
}

// LoadTar makes an image of one layer of a tar stream, as Pack writes it.
func LoadTar(ctx context.Context, r io.Reader, form Form, opts Options) (v1.Image, error) {
	return FromLayers(ctx, form, opts, func() (io.ReadCloser, error) { return io.NopCloser(r), nil })
}

func build(ctx context.Context, config []byte, annotations map[string]string, open []Opener, form Form, opts Options) (v1.Image, error) {
	layers := make([]*layer, len(open))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(2)
	for i := range open {
		g.Go(func() error {
			r, err := open[i]()
			if err != nil {
				return fmt.Errorf("open layer %d: %w", i, err)
			}
			defer r.Close()
			if layers[i], err = writeLayer(ctx, r, form, opts); err != nil {
				return fmt.Errorf("write layer %d: %w", i, err)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	return assemble(config, annotations, layers)
}

// assemble writes the configuration and the manifest around layers. Fields of
// the configuration that nobody here knows are kept.
func assemble(config []byte, annotations map[string]string, layers []*layer) (v1.Image, error) {
	fields := map[string]json.RawMessage{}
	if err := json.Unmarshal(config, &fields); err != nil {
		return nil, fmt.Errorf("parse config: %w", err)
	}
	img := &image{layers: map[v1.Hash]*layer{}}
	rootfs := v1.RootFS{Type: "layers", DiffIDs: []v1.Hash{}}
	manifest := v1.Manifest{
		SchemaVersion: 2,
		MediaType:     types.OCIManifestSchema1,
		Layers:        []v1.Descriptor{},
		Annotations:   maps.Clone(annotations),
	}
	for _, l := range layers {
		rootfs.DiffIDs = append(rootfs.DiffIDs, l.diffID)
		manifest.Layers = append(manifest.Layers, l.desc)
		img.layers[l.desc.Digest] = l
	}
	var err error
	if fields["rootfs"], err = json.Marshal(rootfs); err != nil {
		return nil, err
	}
	if img.config, err = json.Marshal(fields); err != nil {
		return nil, err
	}
	manifest.Config.MediaType = types.OCIConfigJSON
	manifest.Config.Size = int64(len(img.config))
	if manifest.Config.Digest, err = partial.ConfigName(img); err != nil {
		return nil, err
	}
	if img.manifest, err = json.Marshal(manifest); err != nil {
		return nil, err
	}
	return partial.CompressedToImage(img)
}

// image is the core that partial.CompressedToImage completes.
type image struct {
	config, manifest []byte
	layers           map[v1.Hash]*layer
}

func (i *image) MediaType() (types.MediaType, error) { return types.OCIManifestSchema1, nil }
func (i *image) RawConfigFile() ([]byte, error)      { return i.config, nil }
func (i *image) RawManifest() ([]byte, error)        { return i.manifest, nil }

func (i *image) LayerByDigest(h v1.Hash) (partial.CompressedLayer, error) {
	if l, ok := i.layers[h]; ok {
		return l, nil
	}
	if name, err := partial.ConfigName(i); err != nil || name != h {
		return nil, fmt.Errorf("no layer %s in the image", h)
	}
	return partial.ConfigLayer(i)
}
