package daemon

import (
	"context"
	"errors"
	"os"
	"slices"

	"github.com/opencontainers/go-digest"
)

// What comes for containerd is noted, by which name (see mark) and which layers it
// has, before there is a snapshot that stands for it: a pull may be given up, and who
// pulls an image that another is just removing makes snapshots of what has no name
// here any more. So what is noted and nobody needs goes, whichever way it came to that.

// Sweep deletes what came here for snapshots and neither those that are left need nor
// anybody else. It says whether some of it is still in use, so that it is worth another
// try.
func (c *Chains) Sweep(_ context.Context, left []Chain) (again bool, err error) {
	c.d.using.deciding.Lock()
	defer c.d.using.deciding.Unlock()
	return c.sweep(left)
}

func (c *Chains) sweep(left []Chain) (again bool, err error) {
	idle, used, err := c.idle(left)
	if err != nil || len(idle) == 0 {
		return used, err
	}
	needed, err := c.needed(left)
	if err != nil {
		return false, err
	}
	var errs []error
	noted := map[digest.Digest][]string{}
	for _, id := range idle {
		layers, err := c.noted(notedLayers, id)
		if err == nil {
			err = c.unmark(id, func(string) bool { return true })
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		gone := slices.DeleteFunc(slices.Clone(layers), func(l string) bool { return needed[l] })
		if len(gone) > 0 {
			c.d.dropIndex(layers) // while they are here: it is known by them
		}
		noted[id] = gone
	}
	for _, layers := range noted {
		for _, l := range layers {
			c.removeLayer(l)
		}
	}
	for id, layers := range noted {
		if slices.ContainsFunc(layers, c.has) { // somebody is still at it
			used = true
			continue
		}
		errs = append(errs, c.note(notedLayers, id, nil))
	}
	return used, errors.Join(errs...)
}

// idle gives the images that something is noted of, that have no snapshot and that
// nobody does anything with, and whether there are some that have none and are used.
func (c *Chains) idle(left []Chain) (all []digest.Digest, used bool, err error) {
	seen := map[string]bool{}
	for _, ch := range left {
		seen[ch.Manifest] = true
	}
	uses := c.inUse()
	for _, dir := range []string{c.notesDir(notedNames), c.notesDir(notedLayers)} {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, false, err
		}
		for _, e := range entries {
			id := digest.NewDigestFromEncoded(digest.SHA256, e.Name())
			if id.Validate() != nil || seen[id.String()] {
				continue
			}
			seen[id.String()] = true
			if uses[id.String()] {
				used = true
			} else {
				all = append(all, id)
			}
		}
	}
	return all, used, nil
}

// inUse gives the manifests of images that something is done with, and of those that
// somebody has mounted, or has changes of.
func (c *Chains) inUse() map[string]bool {
	uses := map[string]bool{}
	c.d.mu.Lock()
	for _, m := range c.d.mounts {
		if !m.Base {
			uses[m.Target], uses[m.Manifest] = true, true
		}
	}
	c.d.mu.Unlock()
	c.d.using.mu.Lock()
	defer c.d.using.mu.Unlock()
	for id := range c.d.using.manifests {
		uses[id] = true
	}
	return uses
}

func (c *Chains) has(layer string) bool { return len(c.d.fetcher.Layers(layer)) > 0 }

// removeLayer deletes what is kept of a layer, at once or when nobody has it open any
// more.
func (c *Chains) removeLayer(id string) {
	for _, l := range c.d.fetcher.Layers(id) {
		c.d.fetcher.Remove(l, func(err error) {
			c.d.faces.gone(l)
			if err != nil {
				c.d.log.Error("a layer was not all removed", "layer", l.Digest, "err", err)
			}
		})
	}
}
