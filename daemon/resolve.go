package daemon

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/varvefs/varve/fetch"
	"github.com/varvefs/varve/fs"
	"github.com/varvefs/varve/image"
)

// note is told of progress and warnings while something takes its time.
type note func(event)

func (n note) progress(format string, args ...any) { n(event{Progress: fmt.Sprintf(format, args...)}) }
func (n note) warn(format string, args ...any)     { n(event{Warning: fmt.Sprintf(format, args...)}) }

// tree is an image ready to be read: its manifest, its layers and their index.
type tree struct {
	manifest *image.Manifest
	blobs    *blobs
	layers   []*fetch.Handle
	index    *sharedIndex
	refs     atomic.Int32 // beyond the first
}

func (t *tree) retain() { t.refs.Add(1) }

// close gives up a reference; with the last, everything is closed.
func (t *tree) close() {
	if t.refs.Add(-1) >= 0 {
		return
	}
	for _, l := range t.layers {
		l.Close()
	}
	if t.index != nil {
		t.index.release()
	}
	if t.blobs != nil {
		t.blobs.Close()
	}
}

// data gives the layers as the faces read them.
func (t *tree) data() []fs.Data {
	data := make([]fs.Data, len(t.layers))
	for i, l := range t.layers {
		data[i] = l
	}
	return data
}

// open makes an image readable. The manifest comes from the local store or the
// registry, as Pull says; the config is fetched beside the layers' tables of
// contents, since only a layer that is read whole needs it.
func (d *Daemon) open(ctx context.Context, o ImageOptions, n note) (_ *tree, err error) {
	name, err := image.ParseName(o.Image)
	if err == nil {
		_, err = image.NormalizePlatform(o.Platform)
	}
	if err != nil {
		return nil, fmt.Errorf("%w%w", err, silent{errUsage})
	}
	t := &tree{}
	defer func() {
		if err != nil {
			t.close()
		}
	}()
	src, err := d.source(name, o)
	if err != nil && (o.Pull == "always" || !errors.Is(err, image.ErrNotFound)) {
		return nil, err
	}
	t.blobs = &blobs{d: d}
	if src != nil {
		t.blobs.sources = []image.Source{src}
	}
	var config []byte
	if t.manifest, config, err = d.manifest(ctx, src, name, o, n); err != nil {
		return nil, err
	}
	// An image that was made here has its layers in the repositories of what it
	// was made of, and in its own only if it was pushed.
	for _, from := range slices.Backward(t.manifest.Sources) {
		if s, err := d.source(from, o); err != nil {
			n.warn("%v", err)
		} else if s != nil {
			t.blobs.sources = slices.Insert(t.blobs.sources, 0, s)
		}
	}
	if err := d.openLayers(ctx, t, config, o, n); err != nil {
		return nil, fmt.Errorf("%s: %w", name.Familiar(), err)
	}
	return t, nil
}

// source gives where the image comes from, nil when it may not be asked.
func (d *Daemon) source(name image.Name, o ImageOptions) (image.Source, error) {
	if o.Offline {
		return nil, nil
	}
	auth := o.Auth
	auth.Inline = o.AuthConfig
	src, err := d.registries.Source(name, image.Options{Insecure: o.Insecure, Auth: auth, Log: d.log})
	if err != nil {
		return nil, err // not src, which may be a nil of some type
	}
	return src, nil
}

// manifest gives an image's manifest, and its config where it is here already.
// A layout or an archive is always looked into where it can be: that costs
// nothing, and it may hold another image by now.
func (d *Daemon) manifest(ctx context.Context, src image.Source, name image.Name, o ImageOptions, n note) (*image.Manifest, []byte, error) {
	if o.target != "" { // a mount that comes back
		_, hex, _ := strings.Cut(o.target, ":")
		id, err := image.ParseName(hex)
		if err != nil {
			return nil, nil, err
		}
		m, config, err := d.images.Get(id, o.Platform)
		if err == nil || name.IsLocal() {
			return m, config, err
		}
		// Damaged, or gone with the state: the registry may still have it.
		pinned := name.WithDigest(digest.Digest(o.target))
		if src, err := d.source(pinned, o); src != nil && err == nil {
			defer src.Close()
			if m, rerr := src.Resolve(ctx, o.Platform); rerr == nil {
				return m, nil, nil
			}
		}
		return nil, nil, err
	}
	local, config, lerr := d.images.Get(name, o.Platform)
	fresh := o.Pull == "always" || name.IsLocal() && o.Pull != "never"
	switch {
	case lerr == nil && (src == nil || !fresh):
		return local, config, nil
	case lerr != nil && !errors.Is(lerr, image.ErrNotFound):
		n.warn("%v", lerr) // damaged: got again, if it can be
	}
	if src == nil && name.IsLocal() && !o.Offline {
		_, err := d.source(name, o)
		return nil, nil, err
	}
	if src == nil || o.Pull == "never" {
		return nil, nil, fmt.Errorf("No such image: %s is not here, and may not be asked for%w", name.Familiar(), silent{image.ErrNotFound})
	}
	m, err := src.Resolve(ctx, o.Platform)
	if err != nil && lerr == nil && errors.Is(err, image.ErrUnreachable) {
		n.warn("%v; going on with what is here", err)
		return local, config, nil
	}
	return m, nil, err
}

// openLayers opens all layers side by side, keeps the image's documents, and
// builds or finds the index.
func (d *Daemon) openLayers(ctx context.Context, t *tree, config []byte, o ImageOptions, n note) error {
	getConfig := sync.OnceValues(func() ([]byte, error) {
		if config != nil {
			return config, nil
		}
		if len(t.blobs.sources) == 0 {
			return nil, fmt.Errorf("config %.19s: %w", t.manifest.ConfigDesc.Digest, fetch.ErrOffline)
		}
		return t.blobs.sources[len(t.blobs.sources)-1].Config(ctx, t.manifest)
	})
	diffIDs := sync.OnceValues(func() ([]string, error) { return d.diffIDs(t.manifest, getConfig, o.Platform) })
	t.layers = make([]*fetch.Handle, len(t.manifest.Layers))
	eg, ctx := errgroup.WithContext(ctx)
	for i, l := range t.manifest.Layers {
		eg.Go(func() error {
			q := fetch.Request{
				Digest: l.Digest.String(), Size: l.Size, MediaType: l.MediaType, Annotations: l.Annotations,
				DiffID: func() (string, error) {
					ids, err := diffIDs()
					if err != nil {
						return "", err
					}
					return ids[i], nil
				},
				Progress: n.progress,
			}
			var err error
			if q.Blob, err = t.blobs.blob(l); err != nil {
				return err
			}
			h, err := d.fetcher.Open(ctx, q)
			t.layers[i] = h
			return err
		})
	}
	eg.Go(func() error { _, err := diffIDs(); return err })
	if err := eg.Wait(); err != nil {
		t.layers = opened(t.layers)
		return err
	}
	if config == nil {
		config, err := getConfig()
		if err != nil {
			return err
		}
		if err := d.images.Put(t.manifest, config); err != nil {
			return fmt.Errorf("keep the manifest: %w", err)
		}
	}
	var err error
	t.index, err = d.sharedIndex(t.layers)
	return err
}

func (d *Daemon) diffIDs(m *image.Manifest, getConfig func() ([]byte, error), platform string) ([]string, error) {
	raw, err := getConfig()
	if err != nil {
		return nil, err
	}
	c, err := image.ParseConfig(raw)
	if err != nil {
		return nil, err
	}
	if platform != "" {
		if err := c.MatchPlatform(platform); err != nil {
			return nil, err
		}
	}
	if m.Platform == "" {
		m.Platform = c.Platform()
	}
	ids, err := c.DiffIDs(len(m.Layers))
	if err != nil {
		return nil, err
	}
	out := make([]string, len(ids))
	for i, id := range ids {
		out[i] = id.String()
	}
	return out, nil
}

func opened(hs []*fetch.Handle) (out []*fetch.Handle) {
	for _, h := range hs {
		if h != nil {
			out = append(out, h)
		}
	}
	return out
}
