package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/opencontainers/go-digest"

	"github.com/varvefs/varve/fetch"
	"github.com/varvefs/varve/image"
)

// forContainerd settles what is asked of an image that containerd's containers will
// lie on. What they read is fetched with the daemon's own credentials, so that those
// must do for the pull.
func (o *PullOptions) forContainerd(name image.Name) error {
	switch {
	case o.AllPlatforms:
		return errors.New("for containerd it is one platform's image")
	case o.Insecure:
		return errors.New("for containerd no registry is insecure but by its hosts.toml")
	case name.IsLocal() || name.IsID():
		return fmt.Errorf("image %s: containerd wants a name in a registry", name.Familiar())
	}
	o.Auth, o.AuthConfig = image.AuthFromEnv(), ""
	return nil
}

// pin has an image for containerd kept by the name under which its snapshots will be
// looked for, so that it goes with them, and not by the tag.
func (p *pulling) pin(t *tree) error {
	r := t.resolved
	m := *r.manifest
	p.out.Manifest, p.out.Documents = m.Digest.String(), map[string][]byte{}
	for id, b := range m.Blobs {
		p.out.Documents[id.String()] = b
	}
	m.Name, m.Target, m.Blobs = p.name.WithDigest(m.Digest), m.Digest, map[digest.Digest][]byte{m.Digest: m.Raw}
	if _, err := p.chains.mark(m.Name); err != nil {
		return err
	}
	if _, config, err := p.images.Get(m.Name, p.Platform); err == nil {
		r.known = config
	}
	r.manifest, t.manifest = &m, &m
	if p.Platform == "" { // a manifest without a list was not chosen by platform
		ids := r.diffIDs
		r.diffIDs = sync.OnceValues(func() ([]string, error) {
			raw, err := r.config()
			if err != nil {
				return nil, err
			}
			c, err := image.ParseConfig(raw)
			if err == nil {
				err = c.MatchPlatform("")
			}
			if err != nil {
				return nil, err
			}
			return ids()
		})
	}
	return nil
}

// settle ends the pull of an image for containerd. One that cannot be opened is not
// lazy, which the snapshotter will find too: its layers are fetched as ever.
func (p *pulling) settle(t *tree, err error) error {
	for _, final := range []error{image.ErrNoPlatform, image.ErrUnauthorized, image.ErrNotFound, image.ErrUnreachable, fetch.ErrUnavailable, context.Canceled} {
		if errors.Is(err, final) {
			return err
		}
	}
	if err != nil {
		if p.PullOptions.Index == "require" {
			return err
		}
		p.out.NotLazy = err.Error()
		if err := t.keep(); err != nil {
			return err
		}
	}
	config, err := t.config()
	if err != nil {
		return err
	}
	p.out.Documents[t.manifest.ConfigDesc.Digest.String()] = config
	return nil
}

// LayerOptions name a layer of an image that was pulled for containerd.
type LayerOptions struct {
	Image    string `json:"image"`            // its name
	Manifest string `json:"manifest"`         // digest
	Layer    string `json:"layer"`            // digest
	Offset   int64  `json:"offset,omitempty"` // from which on its blob is wanted
}

// Layer writes a layer's blob to w, as the registry has it. The bytes are not
// checked.
func (c *Client) Layer(ctx context.Context, o LayerOptions, w io.Writer) error {
	return c.copy(ctx, "/v1/layer", o, w)
}

// layerBlob gives what writes a layer's blob.
func (d *Daemon) layerBlob(ctx context.Context, o LayerOptions) (func(io.Writer) error, error) {
	name, err := chainName(ImageRef{Name: o.Image, Manifest: o.Manifest})
	if err == nil && o.Offset < 0 {
		err = fmt.Errorf("offset %d", o.Offset)
	}
	if err != nil {
		return nil, fmt.Errorf("%w%w", err, silent{errUsage})
	}
	r, err := d.resolve(ctx, ImageOptions{Image: name.String(), Auth: image.AuthFromEnv()}, func(event) {})
	if err != nil {
		return nil, err
	}
	for _, l := range r.manifest.Layers {
		if l.Digest != digest.Digest(o.Layer) {
			continue
		}
		b, err := r.blobs.Open(ctx, l, o.Offset)
		if err != nil {
			r.close()
			return nil, err
		}
		return func(w io.Writer) error {
			defer r.close()
			defer b.Close()
			_, err := io.Copy(w, b)
			return err
		}, nil
	}
	r.close()
	return nil, fmt.Errorf("image %s has no layer %s%w", r.name.Familiar(), o.Layer, silent{image.ErrNotFound})
}
