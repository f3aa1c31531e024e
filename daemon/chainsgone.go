package daemon

import (
	"context"
	"errors"
	"slices"

	"github.com/opencontainers/go-digest"

	"github.com/varvefs/varve/image"
)

// digests gives those of a chain's layers, none where they are not known any more.
func (c *Chains) digests(ch Chain) ([]string, error) {
	name, err := chainName(ch.ImageRef)
	if err != nil {
		return nil, err
	}
	if all, err := c.noted(notedLayers, name.Digest()); err != nil || len(all) >= ch.Layers {
		return all[:min(ch.Layers, len(all))], err
	}
	m, _, err := c.d.images.Get(name, "")
	if errors.Is(err, image.ErrNotFound) {
		id, perr := image.ParseName(name.Digest().Encoded()) // pulled under another name
		if perr != nil {
			return nil, perr
		}
		m, _, err = c.d.images.Get(id, "")
	}
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
func (c *Chains) Usage(_ context.Context, ch Chain) (n int64, err error) {
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
func (c *Chains) Forget(_ context.Context, gone Chain, left []Chain) error {
	c.d.using.deciding.Lock()
	defer c.d.using.deciding.Unlock()
	all, err := c.digests(gone)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(left, func(ch Chain) bool { return ch.Manifest == gone.Manifest }) {
		c.letGo(gone.Manifest)
		if _, err := c.sweep(left); err != nil {
			return err
		}
	}
	if len(all) < gone.Layers {
		return nil
	}
	needed, err := c.needed(left)
	if err != nil || needed[all[gone.Layers-1]] {
		return err
	}
	c.d.dropIndex(all)
	c.removeLayer(all[gone.Layers-1])
	return nil
}

// needed gives the layers that somebody may come back to: snapshots that are left,
// mounts, images that something is done with, and those that were not got for
// containerd.
func (c *Chains) needed(left []Chain) (map[string]bool, error) {
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
	c.d.using.mu.Lock()
	for l := range c.d.using.layers {
		needed[l] = true
	}
	c.d.using.mu.Unlock()
	all, err := c.d.images.List()
	if err != nil {
		return nil, err
	}
	for _, r := range all {
		marked, err := c.noted(notedNames, r.Manifest)
		if err != nil {
			return nil, err
		}
		if slices.Contains(marked, r.Name.String()) {
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

// mark notes that an image comes here for containerd only, unless it is here: that
// name goes with the last of its snapshots then. It says whether it did.
func (c *Chains) mark(name image.Name) (bool, error) {
	if _, _, err := c.d.images.Get(name, ""); !errors.Is(err, image.ErrNotFound) {
		return false, nil
	}
	c.marks.Lock()
	defer c.marks.Unlock()
	names, err := c.noted(notedNames, name.Digest())
	if err != nil || slices.Contains(names, name.String()) {
		return false, err
	}
	return true, c.note(notedNames, name.Digest(), append(names, name.String()))
}

// unmark takes away the names that mark noted of an image, or of them only those that
// are meant.
func (c *Chains) unmark(manifest digest.Digest, meant func(name string) bool) error {
	c.marks.Lock()
	defer c.marks.Unlock()
	names, err := c.noted(notedNames, manifest)
	if err != nil || len(names) == 0 {
		return err
	}
	all, err := c.d.images.List()
	if err != nil {
		return err
	}
	// Not what else has this digest: a tag that somebody pulled since.
	for _, r := range all {
		if s := r.Name.String(); meant(s) && slices.Contains(names, s) {
			if _, err := c.d.images.Remove(r.Name); err != nil && !errors.Is(err, image.ErrNotFound) {
				return err
			}
		}
	}
	return c.note(notedNames, manifest, slices.DeleteFunc(names, meant))
}

// taken says that somebody wants an image by a name for himself: it does not go with
// containerd's snapshots any more.
func (c *Chains) taken(name image.Name, manifest digest.Digest) error {
	c.marks.Lock()
	defer c.marks.Unlock()
	names, err := c.noted(notedNames, manifest)
	if err != nil || !slices.Contains(names, name.String()) {
		return err
	}
	return c.note(notedNames, manifest, slices.DeleteFunc(names, func(s string) bool { return s == name.String() }))
}
