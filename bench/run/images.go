package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/varvefs/varve/bench/forms"
)

// The tags of a corpus image that the measurements know.
const (
	tagPlain   = "plain"   // as the corpus script pushes it: gzip, no index
	tagEStargz = "estargz" // as package forms converts it
)

// have makes sure that the registry holds an image as eStargz. The conversion of
// the largest one takes minutes; its result stays in the registry.
func (b *bench) have(ctx context.Context, image string) error {
	ref, err := name.ParseReference(b.registry+"/"+image+":"+tagEStargz, name.Insecure)
	if err != nil {
		return err
	}
	if _, err := remote.Head(ref, remote.WithContext(ctx)); err == nil {
		return nil
	}
	start := time.Now()
	dir, err := os.MkdirTemp(b.dir, "convert-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	img, err := forms.From(ctx, b.registry+"/"+image+":"+tagPlain)
	if err != nil {
		return fmt.Errorf("read %s:%s (%s): %w", image, tagPlain, needs, err)
	}
	if img, err = forms.Convert(ctx, img, forms.EStargz, forms.Options{Dir: dir}); err != nil {
		return fmt.Errorf("convert %s: %w", image, err)
	}
	if err := forms.Push(ctx, img, ref.String()); err != nil {
		return fmt.Errorf("push %s: %w", ref, err)
	}
	b.say("converted %s to %s in %s", image, tagEStargz, time.Since(start).Round(time.Second))
	return nil
}
