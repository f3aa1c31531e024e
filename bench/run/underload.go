package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/varvefs/varve/bench/link"
)

// peakTarget is MiB of memory at the most, of the image of loadImage.
const (
	peakTarget = 64
	loadImage  = "large"
)

// loadRun is one walk and one whole reading after it.
type loadRun struct {
	walk, read       time.Duration
	walkCPU, readCPU time.Duration // of the daemon
	mounted          int64         // peak RSS
	walked, peak     int64
}

func (b *bench) underLoad(ctx context.Context, out *section) error {
	if err := b.rivals.startable(); err != nil {
		return err
	}
	w, err := b.wire(ctx, link.None)
	if err != nil {
		return err
	}
	defer w.Close()
	n := b.turns(1)
	out.line("A new daemon on an empty store makes a root of the image, `ls -lR` walks it, and `tar c` of all of it is read through a pipe; page cache dropped before, the link not shaped. Peak RSS and CPU of the daemon that serves it, as in *Cold starts*, medians of n=%d. (%s.) Target: at most %d MiB for `%s`.", n, b.rivals.versions(ctx), peakTarget, loadImage)
	out.line("")
	out.line("| image | system | peak RSS mounted MiB | walked | read | target | ls -lR s | daemon CPU s | tar c s | daemon CPU s |")
	out.line("|---|---|--:|--:|--:|---|--:|--:|--:|--:|")
	for _, image := range b.imagesOr(loadImage) {
		if err := b.have(ctx, image); err != nil {
			return err
		}
		esgz := target{image, tagEStargz}
		var ways []way
		for _, face := range faces {
			ways = append(ways, way{system: systemOurs + " " + face, form: formEStargz, image: esgz,
				node: func(ctx context.Context) (node, error) { return b.oursNode(ctx, "--face", face) }})
		}
		if b.rivals.lazyStargz() {
			ways = append(ways, b.ctrWay(w, systemStargz, formEStargz, esgz, kindStargz))
		}
		ways = b.chosenWays(ways)
		got := map[string][]loadRun{}
		for i := range n {
			for _, v := range turn(ways, i) {
				r, err := b.loaded(ctx, w, v)
				if err != nil {
					return fmt.Errorf("%s by %s: %w", image, v, err)
				}
				got[v.String()] = append(got[v.String()], r)
			}
		}
		for _, v := range ways {
			loadLine(out, image, v, got[v.String()])
		}
	}
	return nil
}

func loadLine(out *section, image string, v way, runs []loadRun) {
	size := func(f func(loadRun) int64) string { return mib(median(pickFrom(runs, f))) }
	span := func(f func(loadRun) time.Duration) string { return seconds(median(pickFrom(runs, f))) }
	peak := func(r loadRun) int64 { return r.peak }
	said := ""
	if image == loadImage && v.system != systemStargz {
		said = fmt.Sprintf("<= %d %s", peakTarget, verdict(float64(median(pickFrom(runs, peak)))/(1<<20), peakTarget))
	}
	out.line("| %s | %s | %s | %s | %s | %s | %s | %s | %s | %s |", image, v.system, size(func(r loadRun) int64 { return r.mounted }), size(func(r loadRun) int64 { return r.walked }),
		size(peak), said, span(func(r loadRun) time.Duration { return r.walk }), span(func(r loadRun) time.Duration { return r.walkCPU }),
		span(func(r loadRun) time.Duration { return r.read }), span(func(r loadRun) time.Duration { return r.readCPU }))
	record(Figure{measureLoad, image, "", v.system, v.form, "MiB", pickFrom(runs, func(r loadRun) float64 { return float64(r.peak) / (1 << 20) })})
	record(Figure{measureLoad, image, "", v.system, v.form, "CPU s", pickFrom(runs, func(r loadRun) float64 { return (r.walkCPU + r.readCPU).Seconds() })})
	record(Figure{measureLoad, image, "", v.system, v.form, "s", pickFrom(runs, func(r loadRun) float64 { return (r.walk + r.read).Seconds() })})
}

// loaded walks and reads an image once.
func (b *bench) loaded(ctx context.Context, w *wire, v way) (r loadRun, err error) {
	n, err := v.node(ctx)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, n.close()) }()
	if err := dropCaches(); err != nil {
		return r, err
	}
	ref := w.ref(v.image.repo, v.image.tag)
	if err := n.pull(ctx, ref); err != nil {
		return r, err
	}
	dir, err := n.root(ctx, ref)
	if err != nil {
		return r, err
	}
	if r.mounted, err = n.peak(); err != nil {
		return r, err
	}
	if r.walk, r.walkCPU, err = timed(n, func() error { return listAll(ctx, dir) }); err != nil {
		return r, err
	}
	if r.walked, err = n.peak(); err != nil {
		return r, err
	}
	if r.read, r.readCPU, err = timed(n, func() error { _, err := tarOf(ctx, dir); return err }); err != nil {
		return r, err
	}
	if r.peak, err = n.peak(); err != nil {
		return r, err
	}
	b.say("load %s: peak MiB mounted %s walked %s read %s; walk %s s, CPU %s; read %s s, CPU %s", v, mib(r.mounted), mib(r.walked), mib(r.peak),
		seconds(r.walk), seconds(r.walkCPU), seconds(r.read), seconds(r.readCPU))
	return r, n.leave(ctx)
}

// timed says how long something took, and what the node's daemon computed for it.
func timed(n node, do func() error) (wall, cpu time.Duration, err error) {
	before, err := n.cpu()
	if err != nil {
		return 0, 0, err
	}
	start := time.Now()
	if err := do(); err != nil {
		return 0, 0, err
	}
	wall = time.Since(start)
	after, err := n.cpu()
	return wall, after - before, err
}
