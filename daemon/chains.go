package daemon

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/singleflight"

	"github.com/varvefs/varve/image"
	"github.com/varvefs/varve/snapshotter"
)

// chains gives the snapshotter the images that containerd's containers lie on. Each
// is a mount like any other, below the runtime directory, where only the daemon's
// user comes; so it comes back with the daemon, has its start recorded, and is
// listed.
type chains struct {
	d *Daemon

	opening  singleflight.Group
	mounting singleflight.Group

	mu   sync.Mutex
	open map[string]*pulledImage // by manifest
}

// pulledImage is one that was pulled a moment ago and is held open: its container
// comes next, and layers that must be read whole are on their way.
type pulledImage struct {
	layers []snapshotter.Layer
	tree   *tree
	gone   chan struct{} // closed when it was removed
}

// holdFor is how long an image stays open for who pulled it.
const holdFor = time.Minute

// chainOf gives the mount options of a chain.
func chainOf(c snapshotter.Chain) (MountOptions, error) {
	name, err := chainName(c.Image)
	if err != nil {
		return MountOptions{}, err
	}
	sum := sha256.Sum256(fmt.Appendf(nil, "%s %d", c.Manifest, c.Layers))
	return MountOptions{
		ImageOptions: ImageOptions{Image: name.String(), Layers: c.Layers, Auth: image.AuthFromEnv()},
		Name:         fmt.Sprintf("containerd-%x", sum[:6]), Base: true, Wait: true,
	}, nil
}

// chainName gives the name by which an image is resolved: what was pulled, and not
// what the tag leads to by now.
func chainName(im snapshotter.Image) (image.Name, error) {
	name, err := image.ParseName(im.Name)
	if err != nil {
		return name, err
	}
	if name.IsLocal() || name.IsID() {
		return name, fmt.Errorf("image %q: want a name in a registry", im.Name)
	}
	id, err := digest.Parse(im.Manifest)
	if err != nil {
		return name, fmt.Errorf("image %s: manifest %q: %w", im.Name, im.Manifest, err)
	}
	return name.WithDigest(id), nil
}

// Layers opens an image.
func (c *chains) Layers(ctx context.Context, im snapshotter.Image) ([]snapshotter.Layer, error) {
	name, err := chainName(im)
	if err != nil {
		return nil, err
	}
	// Who asks may go, the others still wait.
	ch := c.opening.DoChan(im.Manifest, func() (any, error) { return c.pulled(name) })
	select {
	case r := <-ch:
		if r.Err != nil {
			return nil, r.Err
		}
		return r.Val.(*pulledImage).layers, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (c *chains) pulled(name image.Name) (*pulledImage, error) {
	id := name.Digest().String()
	c.mu.Lock()
	o := c.open[id]
	c.mu.Unlock()
	if o != nil {
		return o, nil
	}
	d, n := c.d, note(func(event) {})
	if err := c.mark(name); err != nil {
		return nil, err
	}
	r, err := d.resolve(d.life, ImageOptions{Image: name.String(), Auth: image.AuthFromEnv(), alone: true}, n)
	if err != nil {
		return nil, err
	}
	t, err := r.tree(d.life, n, true)
	if err != nil {
		return nil, err
	}
	ids, err := r.diffIDs()
	if err != nil {
		t.close()
		return nil, err
	}
	o = &pulledImage{tree: t, gone: make(chan struct{})}
	for i, l := range r.manifest.Layers {
		o.layers = append(o.layers, snapshotter.Layer{Digest: l.Digest.String(), DiffID: ids[i]})
	}
	c.mu.Lock()
	c.open[id] = o
	c.mu.Unlock()
	d.background.Go(func() { c.hold(id, o) })
	return o, nil
}

// hold keeps an image open for a while, and until its layers have been read.
func (c *chains) hold(id string, o *pulledImage) {
	ctx, cancel := context.WithCancel(c.d.life)
	defer cancel()
	go func() {
		select {
		case <-o.gone:
			cancel()
		case <-ctx.Done():
		}
	}()
	for _, p := range o.tree.passes {
		if p == nil {
			continue
		}
		if err := p.Wait(ctx); err != nil && ctx.Err() == nil {
			c.d.log.Error("a layer that containerd pulled cannot be read", "image", o.tree.name.Familiar(), "layer", p.Digest(), "err", err)
		}
	}
	select {
	case <-time.After(holdFor):
	case <-ctx.Done():
	}
	c.mu.Lock()
	if c.open[id] == o {
		delete(c.open, id)
	}
	c.mu.Unlock()
	o.tree.close()
}

// letGo ends the hold of an image that was removed.
func (c *chains) letGo(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if o := c.open[id]; o != nil {
		delete(c.open, id)
		close(o.gone)
	}
}

// Mount mounts a chain, if it is not.
func (c *chains) Mount(ctx context.Context, ch snapshotter.Chain) (string, error) {
	o, err := chainOf(ch)
	if err != nil {
		return "", err
	}
	done := c.mounting.DoChan(o.Name, func() (any, error) { return c.mount(o) })
	select {
	case r := <-done:
		if r.Err != nil {
			return "", r.Err
		}
		return r.Val.(string), nil
	case <-ctx.Done():
		return "", ctx.Err()
	}
}

func (c *chains) mount(o MountOptions) (dir string, err error) {
	for {
		m, ok := c.mounted(o.Name)
		switch {
		case !ok:
			v, err := c.d.Mount(c.d.life, o, func(event) {})
			if err != nil {
				return "", err
			}
			return v.Dir, nil
		case m.State == "restoring":
			select {
			case <-c.d.life.Done():
				return "", c.d.life.Err()
			case <-time.After(10 * time.Millisecond):
			}
		case m.State == "failed": // the registry may be there by now
			if _, err := c.d.Unmount(UnmountOptions{Mount: m.ID, Force: true, own: true}); err != nil {
				return "", err
			}
		default:
			return m.Dir, nil
		}
	}
}

// mounted gives the mount with a name.
func (c *chains) mounted(name string) (Mount, bool) {
	c.d.mu.Lock()
	defer c.d.mu.Unlock()
	for _, m := range c.d.mounts {
		if m.Name == name {
			return m.view(false), true
		}
	}
	return Mount{}, false
}

// Unmount takes away all chains but those that are to stay.
func (c *chains) Unmount(ctx context.Context, stay map[snapshotter.Chain]bool) error {
	names := map[string]bool{}
	for ch := range stay {
		o, err := chainOf(ch)
		if err != nil {
			return err
		}
		names[o.Name] = true
	}
	var ids []string
	c.d.mu.Lock()
	for _, m := range c.d.mounts {
		if m.Base && !m.coming && !names[m.Name] {
			ids = append(ids, m.ID)
		}
	}
	c.d.mu.Unlock()
	var errs []error
	for _, id := range ids {
		if _, err := c.d.Unmount(UnmountOptions{Mount: id, own: true}); err != nil && !errors.Is(err, errNoMount) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// digests gives those of a chain's layers, none where the image is not known any
// more.
func (c *chains) digests(ch snapshotter.Chain) ([]string, error) {
	name, err := chainName(ch.Image)
	if err != nil {
		return nil, err
	}
	m, _, err := c.d.images.Get(name, "")
	if errors.Is(err, image.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var all []string
	for _, l := range m.Layers[:min(ch.Layers, len(m.Layers))] {
		all = append(all, l.Digest.String())
	}
	return all, nil
}

// Usage gives what is kept of a chain's highest layer.
func (c *chains) Usage(_ context.Context, ch snapshotter.Chain) (n int64, err error) {
	all, err := c.digests(ch)
	if err != nil || len(all) < ch.Layers {
		return 0, err
	}
	for _, l := range c.d.fetcher.Layers(all[ch.Layers-1]) {
		n += l.Usage()
	}
	return n, nil
}

// Forget deletes what is kept of a chain's highest layer, and the image's documents
// with its last one, unless somebody needs them.
func (c *chains) Forget(_ context.Context, gone snapshotter.Chain, left []snapshotter.Chain) error {
	all, err := c.digests(gone)
	if err != nil || len(all) < gone.Layers {
		return err
	}
	last := true
	for _, ch := range left {
		last = last && ch.Manifest != gone.Manifest
	}
	if last {
		c.letGo(gone.Manifest)
		if err := c.unmark(gone.Image); err != nil {
			return err
		}
	}
	needed, err := c.needed(left)
	if err != nil || needed[all[gone.Layers-1]] {
		return err
	}
	c.d.dropIndex(all)
	for _, l := range c.d.fetcher.Layers(all[gone.Layers-1]) {
		c.d.fetcher.Remove(l, func(err error) {
			c.d.faces.gone(l.Key)
			if err != nil {
				c.d.log.Error("a layer was not all removed", "layer", l.Digest, "err", err)
			}
		})
	}
	return nil
}

// needed gives the layers that somebody may come back to: snapshots that are left,
// mounts, and images that were not got for containerd.
func (c *chains) needed(left []snapshotter.Chain) (map[string]bool, error) {
	needed := map[string]bool{}
	for _, ch := range left {
		all, err := c.digests(ch)
		if err != nil {
			return nil, err
		}
		for _, l := range all {
			needed[l] = true
		}
	}
	c.d.mu.Lock()
	for _, m := range c.d.mounts {
		for _, k := range m.Keys {
			needed[digestOf(k)] = true
		}
	}
	c.d.mu.Unlock()
	all, err := c.d.images.List()
	if err != nil {
		return nil, err
	}
	for _, r := range all {
		if _, err := os.Lstat(c.markPath(r.Manifest)); err == nil && r.Name.Digest() == r.Manifest {
			continue
		}
		id, err := image.ParseName(r.Manifest.Encoded())
		if err != nil {
			return nil, err
		}
		m, _, err := c.d.images.Get(id, r.Platform)
		if err != nil {
			return nil, err
		}
		for _, l := range m.Layers {
			needed[l.Digest.String()] = true
		}
	}
	return needed, nil
}

func (c *chains) markPath(manifest digest.Digest) string {
	return filepath.Join(c.d.dirs.State, "containerd", "pulled", manifest.Encoded())
}

// mark notes that an image comes here for containerd only, unless it is here: its
// name goes with the last of its snapshots then.
func (c *chains) mark(name image.Name) error {
	_, _, err := c.d.images.Get(name, "")
	if !errors.Is(err, image.ErrNotFound) {
		return nil
	}
	path := c.markPath(name.Digest())
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return os.WriteFile(path, nil, 0o600)
}

// unmark takes away the name that mark noted.
func (c *chains) unmark(im snapshotter.Image) error {
	name, err := chainName(im)
	if err != nil {
		return err
	}
	path := c.markPath(name.Digest())
	if _, err := os.Lstat(path); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	all, err := c.d.images.List()
	if err != nil {
		return err
	}
	// Not what else has this digest: a tag that somebody pulled since.
	if slices.ContainsFunc(all, func(r image.Record) bool { return r.Name == name }) {
		if _, err := c.d.images.Remove(name); err != nil {
			return err
		}
	}
	return os.Remove(path)
}
