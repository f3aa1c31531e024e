package daemon

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/varvefs/varve/fetch"
	"github.com/varvefs/varve/image"
	"github.com/varvefs/varve/index/soci"
)

// resolved is an image whose manifest is here and whose layers can be asked for.
type resolved struct {
	d        *Daemon
	name     image.Name
	o        ImageOptions
	manifest *image.Manifest
	blobs    *blobs
	indexes  *indexes
	unuse    func()                   // has it no longer count as used, as close does
	known    []byte                   // the config, where it was here
	config   func() ([]byte, error)   // asked for once
	diffIDs  func() ([]string, error) // of the layers, by the config
	// referrers lists the indexes and profiles that others pushed. Asked for once.
	referrers func() ([]image.Referrer, error)
	ready     func(*tree) // is told when all layers can be read; may be nil
}

// resolve finds an image. The manifest comes from the local store or the
// registry, as Pull says; the config is asked for beside what is done with the
// layers. The caller closes what it gets.
func (d *Daemon) resolve(ctx context.Context, o ImageOptions, n note) (_ *resolved, err error) {
	name, err := image.ParseName(o.Image)
	if err == nil {
		_, err = image.NormalizePlatform(o.Platform)
	}
	if err == nil && !slices.Contains([]string{"", "auto", "none", "require"}, o.Index) {
		err = fmt.Errorf("index %q: want auto, none or require", o.Index)
	}
	if err != nil {
		return nil, fmt.Errorf("%w%w", err, silent{errUsage})
	}
	r := &resolved{d: d, name: name, o: o, blobs: &blobs{d: d}, unuse: func() {}}
	defer func() {
		if err != nil {
			r.close()
		}
	}()
	src, err := d.source(name, o)
	if err != nil && (o.Pull == "always" || !errors.Is(err, image.ErrNotFound)) {
		return nil, err
	}
	if src != nil {
		r.blobs.sources = []image.Source{src}
	}
	if r.manifest, r.known, err = d.manifest(ctx, src, name, o, n); err != nil {
		return nil, err
	}
	r.unuse = d.using.use(r.manifest)
	// An image that was made here has its layers in the repositories of what it
	// was made of, and in its own only if it was pushed.
	for _, from := range slices.Backward(r.manifest.Sources) {
		if s, err := d.source(from, o); err != nil {
			n.warn("%v", err)
		} else if s != nil {
			r.blobs.sources = slices.Insert(r.blobs.sources, 0, s)
		}
	}
	// A layer that is still read may ask for the config after the caller was
	// answered.
	ctx = context.WithoutCancel(ctx)
	r.config = sync.OnceValues(func() ([]byte, error) {
		if r.known != nil {
			return r.known, nil
		}
		if len(r.blobs.sources) == 0 {
			return nil, fmt.Errorf("config %.19s: %w", r.manifest.ConfigDesc.Digest, fetch.ErrOffline)
		}
		return r.blobs.sources[len(r.blobs.sources)-1].Config(ctx, r.manifest)
	})
	r.diffIDs = sync.OnceValues(func() ([]string, error) { return d.diffIDs(r.manifest, r.config, o.Platform) })
	r.referrers = sync.OnceValues(func() ([]image.Referrer, error) {
		return d.registries.Referrers(ctx, name, d.imageOptions(o), r.manifest.Digest, bundleIndexType, soci.TypeIndexV1, profileType)
	})
	r.indexes = d.indexesOf(ctx, name, r.manifest, o)
	r.indexes.referrers = r.referrers
	return r, nil
}

func (r *resolved) close() {
	r.blobs.Close()
	r.unuse()
}

// tree opens the layers. What it gives closes the image with them; so does an error.
func (r *resolved) tree(ctx context.Context, n note, growing bool) (*tree, error) {
	t := &tree{manifest: r.manifest, resolved: r}
	if n := r.depth(); n < len(r.manifest.Layers) {
		lowest := *r.manifest
		lowest.Layers = lowest.Layers[:n]
		t.manifest = &lowest
	}
	if err := t.openLayers(ctx, n, growing); err != nil {
		t.close()
		return nil, fmt.Errorf("%s: %w", r.name.Familiar(), err)
	}
	return t, nil
}

// depth is how many of the layers are wanted, from the lowest up.
func (r *resolved) depth() int {
	if n := len(r.manifest.Layers); r.o.Layers == 0 || r.o.Layers > n {
		return n
	}
	return r.o.Layers
}

// request asks for layer i.
func (r *resolved) request(ctx context.Context, i int, n note) (fetch.Request, error) {
	l := r.manifest.Layers[i]
	q := fetch.Request{
		Digest: l.Digest.String(), Size: l.Size, MediaType: l.MediaType, Annotations: l.Annotations,
		DiffID: func() (string, error) {
			ids, err := r.diffIDs()
			if err != nil {
				return "", err
			}
			return ids[i], nil
		},
		Progress: n.progress, Index: r.o.Index, NoAhead: r.o.alone,
		Find: func(context.Context) ([]fetch.Found, error) { return r.indexes.find(l.Digest) },
	}
	if len(r.o.keys) == r.depth() {
		q.Key = r.o.keys[i]
	}
	var err error
	q.Blob, err = r.blobs.blob(l)
	return q, err
}

// keep puts the image's documents into the image store, if they are not there.
func (r *resolved) keep() error {
	if r.known != nil {
		return nil
	}
	config, err := r.config()
	if err == nil {
		if err = r.d.images.Put(r.manifest, config); err != nil {
			err = fmt.Errorf("keep the manifest: %w", err)
		}
	}
	return err
}
