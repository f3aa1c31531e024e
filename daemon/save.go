package daemon

import (
	"context"
	"fmt"
	"io"

	"github.com/varvefs/varve/commit"
	"github.com/varvefs/varve/image"
)

// save gives what writes images as one tar. Layers that are not here are streamed
// through from where they are.
func (d *Daemon) save(ctx context.Context, o SaveOptions) (func(io.Writer) error, error) {
	var images []commit.SaveImage
	var held []*blobs
	closeAll := func() {
		for _, b := range held {
			b.Close()
		}
	}
	for _, ref := range o.Refs {
		img, b, err := d.saved(ctx, ref, o.ImageOptions)
		if err != nil {
			closeAll()
			return nil, fmt.Errorf("save %s: %w", ref, err)
		}
		held = append(held, b)
		images = append(images, img)
	}
	return func(w io.Writer) error {
		defer closeAll()
		return commit.Save(ctx, w, images, commit.SaveOptions{})
	}, nil
}

// saved finds an image to be saved: here, or where its name says.
func (d *Daemon) saved(ctx context.Context, ref string, o ImageOptions) (commit.SaveImage, *blobs, error) {
	var img commit.SaveImage
	name, err := image.ParseName(ref)
	if err != nil {
		return img, nil, fmt.Errorf("%w%w", err, silent{errUsage})
	}
	n := note(func(event) {})
	src, err := d.source(name, o)
	if err != nil && !name.IsID() {
		return img, nil, err
	}
	m, config, err := d.manifest(ctx, src, name, o, n)
	if err == nil && config == nil {
		config, err = src.Config(ctx, m)
	}
	if src != nil {
		src.Close()
	}
	if err != nil {
		return img, nil, err
	}
	b := d.blobsOf(m, o, n)
	img = commit.SaveImage{Manifest: m, Config: config, Blobs: b}
	if !name.IsID() && !name.IsLocal() {
		img.Names = []image.Name{name}
	}
	return img, b, nil
}
