package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/varvefs/varve/bench/link"
)

// wholeTarget is times the full pull, unpacking and reading.
const wholeTarget = 1.0

// wholeRun is one reading of all of an image.
type wholeRun struct {
	took, there time.Duration // until the end; until the tree could be read
	down, size  int64         // off the wire; of the archive
}

func (b *bench) whole(ctx context.Context, out *section) error {
	if err := b.rivals.startable(); err != nil {
		return err
	}
	w, err := b.wire(ctx, link.Datacenter)
	if err != nil {
		return err
	}
	defer w.Close()
	n := b.turns(3)
	out.line("`tar c` of the whole tree of an image, through a pipe into `wc -c`, from nothing: empty stores, page cache dropped, the registry behind the datacenter link (1 ms, 1 Gbit/s). Ours is mounted and read at once; the rival pulls and unpacks the image first. Writable roots, as in *Cold starts*, in turns, medians of n=%d. (%s.) *ours / rival*: beside the full pull.", n, b.rivals.versions(ctx))
	out.line("")
	out.line("| image | system | form | s | least | there s | MB down | link alone s | archive MB | ours / rival | by least | target |")
	out.line("|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|---|")
	for _, image := range b.imagesOr("python", "node", "large") {
		if err := b.have(ctx, image); err != nil {
			return err
		}
		if err := b.copied(ctx, repoIndexed, image); err != nil {
			return err
		}
		if _, err := b.indexed(ctx, repoIndexed+image); err != nil {
			return err
		}
		if err := b.copied(ctx, repoUnindexed, image); err != nil {
			return err
		}
		full := b.fullWay(w, image)
		ways := []way{full, b.oursWay(formEStargz, target{image, tagEStargz}), b.oursWay(formIndexed, target{repoIndexed + image, tagPlain}), b.oursWay(formPlain, target{repoUnindexed + image, tagPlain})}
		ways = b.chosenWays(ways)
		got := map[string][]wholeRun{}
		for i := range n {
			for _, v := range turn(ways, i) {
				r, err := b.readWhole(ctx, w, v)
				if err != nil {
					return fmt.Errorf("all of %s by %s: %w", image, v, err)
				}
				b.say("whole %s %s: %s s, there %s, %s MB down, archive %s MB", image, v, seconds(r.took), seconds(r.there), mb(r.down), mb(r.size))
				got[v.String()] = append(got[v.String()], r)
			}
		}
		for _, v := range ways {
			wholeLine(out, image, v, got[v.String()], got[full.String()])
		}
	}
	return nil
}

func wholeLine(out *section, image string, v way, runs, rival []wholeRun) {
	of := func(r wholeRun) time.Duration { return r.took }
	times, theirs := pickFrom(runs, of), pickFrom(rival, of)
	ratio, least, said := "", "", ""
	if v.system == systemOurs && rival != nil {
		r := float64(median(times)) / float64(median(theirs))
		ratio, least = fmt.Sprintf("%.2f", r), fmt.Sprintf("%.2f", float64(lowest(times))/float64(lowest(theirs)))
		said = fmt.Sprintf("<= %.2f %s", wholeTarget, verdict(r, wholeTarget))
	}
	down := median(pickFrom(runs, func(r wholeRun) int64 { return r.down }))
	out.line("| %s | %s | %s | %s | %s | %s | %s | %.2f | %s | %s | %s | %s |", image, v.system, v.form, seconds(median(times)), seconds(lowest(times)),
		seconds(median(pickFrom(runs, func(r wholeRun) time.Duration { return r.there }))), mb(down), float64(down)/float64(link.Datacenter.Rate),
		mb(median(pickFrom(runs, func(r wholeRun) int64 { return r.size }))), ratio, least, said)
	record(Figure{measureWhole, image, link.Datacenter.Name, v.system, v.form, "s", pickFrom(times, time.Duration.Seconds)})
	record(Figure{measureWhole, image, link.Datacenter.Name, v.system, v.form, "MB", pickFrom(runs, func(r wholeRun) float64 { return float64(r.down) / 1e6 })})
}

// readWhole reads all of an image once, cold.
func (b *bench) readWhole(ctx context.Context, w *wire, v way) (r wholeRun, err error) {
	n, err := v.node(ctx)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, n.close()) }()
	if err := dropCaches(); err != nil {
		return r, err
	}
	ref := w.ref(v.image.repo, v.image.tag)
	w.reset()
	start := time.Now()
	if err := n.pull(ctx, ref); err != nil {
		return r, err
	}
	dir, err := n.root(ctx, ref)
	if err != nil {
		return r, err
	}
	r.there = time.Since(start)
	if r.size, err = tarOf(ctx, dir); err != nil {
		return r, err
	}
	r.took, r.down = time.Since(start), w.moved().Down
	return r, n.leave(ctx)
}
