package daemon

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/singleflight"

	"github.com/varvefs/varve/fetch/profile"
	"github.com/varvefs/varve/image"
)

// ImageRef is an image as others named it who had resolved it.
type ImageRef struct {
	Name     string `json:"name"`     // by which it was pulled
	Manifest string `json:"manifest"` // digest of its platform's manifest
}

// LayerID is a layer of an image.
type LayerID struct {
	Digest string // of the blob
	DiffID string
}

// Chain is an image's layers from the lowest up to some layer.
type Chain struct {
	ImageRef
	Layers int `json:"layers"`
}

// Chains has the images that containers of others lie on, containerd's. Each is a
// mount like any other, below the runtime directory, where only the daemon's user
// comes; so it comes back with the daemon, has its start recorded, and is listed.
// Its methods may be called from any goroutine.
type Chains struct {
	d *Daemon

	opening  singleflight.Group
	mounting singleflight.Group

	mu   sync.Mutex
	open map[string]*pulledImage // by manifest

	marks sync.Mutex // of who changes the files of marked names
}

// pulledImage is one that was pulled a moment ago and is held open: its container
// comes next, and layers that must be read whole are on their way.
type pulledImage struct {
	layers []LayerID
	tree   *tree
	start  *start        // of the container that comes next
	gone   chan struct{} // closed when it was removed
}

// holdFor is how long an image stays open for who pulled it.
const holdFor = time.Minute

// chainOf gives the mount options of a chain.
func chainOf(c Chain) (MountOptions, error) {
	name, err := chainName(c.ImageRef)
	if err != nil {
		return MountOptions{}, err
	}
	sum := sha256.Sum256(fmt.Appendf(nil, "%s %d", c.Manifest, c.Layers))
	return MountOptions{
		ImageOptions: ImageOptions{Image: name.String(), Layers: c.Layers, Auth: image.AuthFromEnv()},
		Name:         fmt.Sprintf("containerd-%x", sum[:6]), Base: true, Wait: true, Setuid: os.Geteuid() == 0,
	}, nil
}

// chainName gives the name by which an image is resolved: what was pulled, and not
// what the tag leads to by now.
func chainName(im ImageRef) (image.Name, error) {
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

// Layers has every layer of an image opened and gives them, the lowest first. An
// error is why it cannot be mounted.
func (c *Chains) Layers(ctx context.Context, im ImageRef) ([]LayerID, error) {
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

func (c *Chains) pulled(name image.Name) (*pulledImage, error) {
	id := name.Digest().String()
	c.mu.Lock()
	o := c.open[id]
	c.mu.Unlock()
	if o != nil {
		return o, nil
	}
	defer c.d.using.use(&image.Manifest{Digest: name.Digest()})() // before its name is noted
	marked, err := c.mark(name)
	if err != nil {
		return nil, err
	}
	if o, err = c.openPulled(name); err != nil && marked { // it will not be a snapshot, whose end would take the name away
		err = errors.Join(err, c.unmark(name.Digest(), func(s string) bool { return s == name.String() }))
	}
	return o, err
}

func (c *Chains) openPulled(name image.Name) (*pulledImage, error) {
	d, n := c.d, note(func(event) {})
	r, err := d.resolve(d.life, ImageOptions{Image: name.String(), Auth: image.AuthFromEnv(), alone: true}, n)
	if err != nil {
		return nil, err
	}
	if r.manifest.Digest != name.Digest() {
		r.close()
		return nil, fmt.Errorf("image %s: that digest is of a list of manifests: want one image's", name.Familiar())
	}
	s := d.soon(d.life, r)
	r.ready = s.opened
	t, err := r.tree(d.life, n, true)
	if err != nil {
		s.cancel()
		return nil, err
	}
	return c.keep(t, s)
}

// keep holds an image open that was opened, with the start of its container: what that
// needs is fetched from the pull on. It closes the tree, also where it fails.
func (c *Chains) keep(t *tree, s *start) (*pulledImage, error) {
	ids, err := t.diffIDs()
	if err != nil {
		s.cancel()
		t.close()
		return nil, err
	}
	o := &pulledImage{tree: t, start: s, gone: make(chan struct{})}
	var digests []string
	for i, l := range t.manifest.Layers {
		digests = append(digests, l.Digest.String())
		o.layers = append(o.layers, LayerID{Digest: digests[i], DiffID: ids[i]})
	}
	if err := c.note(notedLayers, t.manifest.Digest, digests); err != nil {
		s.cancel()
		t.close()
		return nil, err
	}
	if t.index != nil {
		s.runs <- t
	}
	id := t.manifest.Digest.String()
	c.mu.Lock()
	defer c.mu.Unlock()
	if before := c.open[id]; before != nil { // another was faster
		s.cancel()
		t.close()
		return before, nil
	}
	c.open[id] = o
	c.d.background.Go(func() { c.hold(id, o) })
	return o, nil
}

// hold keeps an image open for a while, and until its layers have been read.
func (c *Chains) hold(id string, o *pulledImage) {
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
	o.start.cancel()
	o.tree.close()
}

// missed gives what of a profile was missing when the image was pulled, where that was
// a moment ago.
func (c *Chains) missed(id string, p *profile.Profile) []bool {
	c.mu.Lock()
	o := c.open[id]
	c.mu.Unlock()
	if o == nil {
		return nil
	}
	s := o.start
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.used == nil || !slices.Equal(s.used.Uses, p.Uses) {
		return nil
	}
	return s.missing
}

// letGo ends the hold of an image that was removed.
func (c *Chains) letGo(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if o := c.open[id]; o != nil {
		delete(c.open, id)
		o.tree.unuse()
		close(o.gone)
	}
}

// Mount mounts a chain, if it is not, and gives the directory. It stays the same
// mount until Unmount.
func (c *Chains) Mount(ctx context.Context, ch Chain) (string, error) {
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

func (c *Chains) mount(o MountOptions) (dir string, err error) {
	waited := false
	for {
		m, ok := c.mounted(o.Name)
		switch {
		case !ok:
			if err := c.markMount(o); err != nil {
				return "", err
			}
			v, err := c.d.Mount(c.d.life, o, func(event) {})
			if err != nil {
				return "", err
			}
			return v.Dir, nil
		case m.State == "restoring":
			waited = true
			select {
			case <-c.d.life.Done():
				return "", c.d.life.Err()
			case <-time.After(10 * time.Millisecond):
			}
			continue
		case m.State == "failed" && waited: // a second try would take as long, and who asks does not wait for ever
			return "", errors.New(m.Error)
		case m.State != "failed":
			there, err := isMountPoint(m.Dir)
			if there || err != nil {
				return m.Dir, err
			}
		}
		// The registry may be there by now, or somebody unmounted it behind our back.
		if _, err := c.d.Unmount(UnmountOptions{Mount: m.ID, Force: true, own: true}); err != nil {
			return "", err
		}
	}
}

// markMount is mark for what is not here any more when it is mounted, and is got again.
func (c *Chains) markMount(o MountOptions) error {
	name, err := image.ParseName(o.Image)
	if err == nil {
		_, err = c.mark(name)
	}
	return err
}

// mounted gives the mount with a name.
func (c *Chains) mounted(name string) (Mount, bool) {
	c.d.mu.Lock()
	defer c.d.mu.Unlock()
	for _, m := range c.d.mounts {
		if m.Base && m.Name == name {
			return m.view(false), true
		}
	}
	return Mount{}, false
}

// Unmount takes away all chains but those that are to stay.
func (c *Chains) Unmount(ctx context.Context, stay map[Chain]bool) error {
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
