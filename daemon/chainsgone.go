package daemon

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"

	"github.com/opencontainers/go-digest"

	"github.com/varvefs/varve/image"
)

// digests gives those of a chain's layers, none where the image is not known any
// more.
func (c *Chains) digests(ch Chain) ([]string, error) {
	name, err := chainName(ch.ImageRef)
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
		if err := c.unmark(gone.ImageRef); err != nil {
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

func (c *Chains) markPath(manifest digest.Digest) string {
	return filepath.Join(c.d.dirs.State, "containerd", "pulled", manifest.Encoded())
}

// mark notes that an image comes here for containerd only, unless it is here: its
// name goes with the last of its snapshots then.
func (c *Chains) mark(name image.Name) error {
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
func (c *Chains) unmark(im ImageRef) error {
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
