package daemon

import (
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"

	"github.com/varvefs/varve/image"
)

// DropOptions name what `varve store drop` punches out.
type DropOptions struct {
	What string `json:"what"` // an image that is here, or a layer's digest
}

// Dropped is what was punched out.
type Dropped struct {
	Layer string `json:"Layer"`
	Bytes int64  `json:"Bytes"` // of contents
	Kept  string `json:"Kept,omitempty"`
}

// Drop punches the contents of layers out of the store. Reads bring them back.
func (d *Daemon) Drop(o DropOptions) ([]Dropped, error) {
	var digests []string
	if id, err := digest.Parse(o.What); err == nil {
		digests = []string{id.String()}
	} else {
		name, err := image.ParseName(o.What)
		if err != nil {
			return nil, fmt.Errorf("%w%w", err, silent{errUsage})
		}
		m, _, err := d.images.Get(name, "")
		if err != nil {
			return nil, err
		}
		for _, l := range m.Layers {
			digests = append(digests, l.Digest.String())
		}
	}
	out := []Dropped{}
	var errs []error
	for _, digest := range digests {
		for _, l := range d.fetcher.Layers(digest) {
			x := Dropped{Layer: digest}
			n, kept, err := d.faces.drop(l)
			if x.Bytes = n; kept {
				x.Kept = "the kernel reads it in place for a mount: unmount that first"
			} else if err != nil {
				errs = append(errs, err)
			}
			out = append(out, x)
		}
	}
	if len(out) == 0 && len(errs) == 0 {
		return nil, fmt.Errorf("the store has nothing of %s%w", o.What, silent{image.ErrNotFound})
	}
	return out, errors.Join(errs...)
}
