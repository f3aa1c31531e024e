package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/varvefs/varve/bench/link"
	"github.com/varvefs/varve/daemon"
)

// indexTarget is how many percent of a layer, decompressed, its index may take.
const (
	indexTarget = 1.0
	leastTar    = 1e6 // bytes; a smaller layer has no target
)

func (b *bench) indexSize(ctx context.Context, out *section) error {
	many, err := b.haveManyFiles(ctx)
	if err != nil {
		return err
	}
	if err := b.indexSizes(ctx, out); err != nil {
		return err
	}
	for _, l := range many.Layers {
		sizeLine(out, manyFiles, l)
	}
	w, err := b.wire(ctx, link.None)
	if err != nil {
		return err
	}
	defer w.Close()
	if err := b.loadIndexes(ctx, many, out); err != nil {
		return err
	}
	return b.mountIndexed(ctx, w, out)
}

// indexSizes has `varve index` say how large its indexes are.
func (b *bench) indexSizes(ctx context.Context, out *section) (err error) {
	out.line("**Size** of what `varve index` makes of the plain images, each layer once, in percent of the layer as a tar. *varve*: names, frames, digests of contents, points every 512 KiB at least; *zTOC*: SOCI's, spans of 4 MiB. Target: at most %.0f %%, for a layer of at least %s MB and for all of an image. `%s` is the image of 100,000 small files that is loaded below.", indexTarget, mb(leastTar), manyFiles)
	out.line("")
	out.line("| image | layer | format | blob MB | tar MB | files | varve KB | %% | target | zTOC KB | %% | target |")
	out.line("|---|---|---|--:|--:|--:|--:|--:|---|--:|--:|---|")
	s, err := b.fresh(ctx, "indexsize")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.discard()) }()
	seen := map[string]bool{}
	for _, image := range b.imagesOr(corpus...) {
		x, err := s.client.Index(ctx, daemon.IndexOptions{ImageOptions: daemon.ImageOptions{Image: b.registry + "/" + image + ":" + tagPlain, Insecure: true}})
		if err != nil {
			return fmt.Errorf("%w (%s)", err, needs)
		}
		sum := daemon.IndexedLayer{Digest: "all"}
		for _, l := range x.Layers {
			if l.Left != "" {
				return fmt.Errorf("layer %.19s of %s was left out: %s", l.Digest, image, l.Left)
			}
			sum.Size += l.Size
			sum.Uncompressed += l.Uncompressed
			sum.Entries += l.Entries
			sum.Bundle += l.Bundle
			sum.ZTOC += l.ZTOC
			if !seen[l.Digest] {
				seen[l.Digest] = true
				sizeLine(out, image, l)
			}
		}
		if len(x.Layers) > 1 {
			sizeLine(out, image, sum)
		}
		b.say("indexsize %s: varve %s MB, zTOC %s MB of %s MB", image, mb(sum.Bundle), mb(sum.ZTOC), mb(sum.Uncompressed))
	}
	return nil
}

func sizeLine(out *section, image string, l daemon.IndexedLayer) {
	show := func(n int64) string {
		percent, target := 100*float64(n)/float64(max(l.Uncompressed, 1)), ""
		if l.Uncompressed >= leastTar {
			target = fmt.Sprintf("<= %.0f %s", indexTarget, verdict(percent, indexTarget))
		}
		return fmt.Sprintf("%.1f | %.2f | %s", float64(n)/1e3, percent, target)
	}
	out.line("| %s | %.8s | %s | %s | %s | %d | %s | %s |", image, strings.TrimPrefix(l.Digest, "sha256:"), l.Format, mb(l.Size), mb(l.Uncompressed), l.Entries,
		show(l.Bundle), show(l.ZTOC))
}
