package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/varvefs/varve/bench/link"
)

// secondTarget is times a start of the image that the rival has unpacked.
const secondTarget = 1.05

// The state of the page cache before a second start.
const (
	cacheLeft    = "as left"
	cacheDropped = "dropped"
)

func (b *bench) second(ctx context.Context, out *section) error {
	if err := b.rivals.startable(); err != nil {
		return err
	}
	w, err := b.wire(ctx, link.Edge)
	if err != nil {
		return err
	}
	defer w.Close()
	n := b.turns(5)
	out.line("The image's workload once more on a node that has started it before, with a new writable root, as in *Cold starts*; nothing is pulled again. Beside it overlayfs with the image unpacked, on the same filesystem as our store. *as left*: with what the start before left in the page cache; *dropped*: after drop_caches. In turns, each on a node of its own, the registry behind the edge link; medians of n=%d after a first start that is not counted. (%s.)", n, b.rivals.versions(ctx))
	out.line("")
	out.line("| image | page cache | system | form | s | least | root there s | ours / rival | by least | target | requests |")
	out.line("|---|---|---|---|--:|--:|--:|--:|--:|---|--:|")
	for _, image := range b.imagesOr("debian", "python", "node", "large") {
		if workloads[image] == "" {
			return fmt.Errorf("%s is no image of the corpus with a workload", image)
		}
		if err := b.have(ctx, image); err != nil {
			return err
		}
		if err := b.startsAgain(ctx, w, image, n, out); err != nil {
			return fmt.Errorf("%s: %w", image, err)
		}
	}
	return nil
}

// secondOf takes turns between the ways, whose nodes live as long as it does.
func (b *bench) startsAgain(ctx context.Context, w *wire, image string, n int, out *section) (err error) {
	full := b.fullWay(w, image)
	ways := b.chosenWays([]way{full, b.oursWay(formEStargz, target{image, tagEStargz})})
	nodes := map[string]node{}
	defer func() {
		for _, n := range nodes {
			err = errors.Join(err, n.close())
		}
	}()
	w.link.SetProfile(link.None) // the first start is no part of it
	for _, v := range ways {
		n, err := v.node(ctx)
		if err != nil {
			return err
		}
		nodes[v.String()] = n
		if err := n.pull(ctx, w.ref(v.image.repo, v.image.tag)); err != nil {
			return err
		}
		if _, err := b.startAgain(ctx, w, n, v, image); err != nil {
			return fmt.Errorf("first start by %s: %w", v, err)
		}
	}
	w.link.SetProfile(link.Edge)
	got := map[string][]startRun{}
	for i := range n {
		for _, cache := range []string{cacheLeft, cacheDropped} {
			for _, v := range turn(ways, i) {
				if cache == cacheDropped {
					if err := dropCaches(); err != nil {
						return err
					}
				} else if _, err := b.startAgain(ctx, w, nodes[v.String()], v, image); err != nil {
					return err // what the page cache is warm from
				}
				r, err := b.startAgain(ctx, w, nodes[v.String()], v, image)
				if err != nil {
					return fmt.Errorf("by %s: %w", v, err)
				}
				b.say("second %s %s %s: %s s, root %s, %d requests", image, cache, v, seconds(r.took), seconds(r.ready), r.requests)
				got[cache+v.String()] = append(got[cache+v.String()], r)
			}
		}
	}
	for _, cache := range []string{cacheLeft, cacheDropped} {
		for _, v := range ways {
			secondLine(out, image, cache, v, got[cache+v.String()], got[cache+full.String()])
		}
	}
	return nil
}

func secondLine(out *section, image, cache string, v way, runs, rival []startRun) {
	times, theirs := pickFrom(runs, took), pickFrom(rival, took)
	ratio, least, said := "", "", ""
	if v.system == systemOurs && rival != nil {
		r := float64(median(times)) / float64(median(theirs))
		ratio, least = fmt.Sprintf("%.2f", r), fmt.Sprintf("%.2f", float64(lowest(times))/float64(lowest(theirs)))
		said = fmt.Sprintf("<= %.2f %s", secondTarget, verdict(r, secondTarget))
	}
	out.line("| %s | %s | %s | %s | %s | %s | %s | %s | %s | %s | %d |", image, cache, v.system, v.form, seconds(median(times)), seconds(lowest(times)),
		seconds(median(pickFrom(runs, func(r startRun) time.Duration { return r.ready }))), ratio, least, said,
		median(pickFrom(runs, func(r startRun) int64 { return r.requests })))
	record(Figure{measureSecond + cache, image, link.Edge.Name, v.system, v.form, "s", pickFrom(times, time.Duration.Seconds)})
}

// startAgain runs a workload on a new root of a node that has the image.
func (b *bench) startAgain(ctx context.Context, w *wire, n node, v way, image string) (r startRun, err error) {
	w.reset()
	start := time.Now()
	dir, err := n.root(ctx, w.ref(v.image.repo, v.image.tag))
	if err != nil {
		return r, err
	}
	r.ready = time.Since(start)
	if err := b.contain(ctx, dir, workloads[image]); err != nil {
		return r, errors.Join(err, n.leave(ctx))
	}
	r.took, r.requests = time.Since(start), w.rec.Totals().All().Requests
	return r, n.leave(ctx)
}
