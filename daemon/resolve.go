package daemon

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
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
	*resolved
	manifest *image.Manifest
	layers   []*fetch.Handle // nil where the layer is still read
	passes   []*fetch.Pass   // nil, or by layer those that are
	index    *sharedIndex    // nil while layers are
	refs     atomic.Int32    // beyond the first
}

func (t *tree) retain() { t.refs.Add(1) }

// close gives up a reference; with the last, everything is closed.
func (t *tree) close() {
	if t.refs.Add(-1) >= 0 {
		return
	}
	for _, l := range opened(t.layers) {
		l.Close()
	}
	for _, p := range t.passes {
		if p != nil {
			p.Close()
		}
	}
	if t.index != nil {
		t.index.release()
	}
	t.resolved.close()
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
func (d *Daemon) open(ctx context.Context, o ImageOptions, n note) (*tree, error) {
	return d.openTree(ctx, o, n, false)
}

// openTree is open for who may not want to wait for layers that must be read
// whole: then the tree has their passes.
func (d *Daemon) openTree(ctx context.Context, o ImageOptions, n note, growing bool) (*tree, error) {
	r, err := d.resolve(ctx, o, n)
	if err != nil {
		return nil, err
	}
	return r.tree(ctx, n, growing)
}

// source gives where the image comes from, nil when it may not be asked.
func (d *Daemon) source(name image.Name, o ImageOptions) (image.Source, error) {
	if o.Offline {
		return nil, nil
	}
	src, err := d.registries.Source(name, d.imageOptions(o))
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
	case lerr != nil && !errors.Is(lerr, image.ErrNotFound) && !errors.Is(lerr, image.ErrNoPlatform):
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
func (t *tree) openLayers(ctx context.Context, n note, growing bool) error {
	r := t.resolved
	t.layers = make([]*fetch.Handle, len(t.manifest.Layers))
	passes := make([]*fetch.Pass, len(t.layers))
	eg, ectx := errgroup.WithContext(ctx)
	for i := range t.layers {
		eg.Go(func() error {
			q, err := r.request(ectx, i, n)
			if err != nil {
				return err
			}
			if growing {
				t.layers[i], passes[i], err = r.d.fetcher.Start(ectx, q)
			} else {
				t.layers[i], err = r.d.fetcher.Open(ectx, q)
			}
			return err
		})
	}
	eg.Go(func() error { _, err := r.diffIDs(); return err })
	err := eg.Wait()
	if slices.ContainsFunc(passes, func(p *fetch.Pass) bool { return p != nil }) {
		t.passes = passes
	}
	if err != nil {
		return err
	}
	if r.ready != nil && t.passes == nil {
		r.ready(t)
	}
	if err := r.keep(); err != nil {
		return err
	}
	if t.passes != nil {
		return nil
	}
	t.index, err = r.d.sharedIndex(t.layers)
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
