package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/varvefs/varve/bench/link"
	"github.com/varvefs/varve/daemon"
)

// sharedTarget is times what the same takes with eStargz.
const sharedTarget = 1.25

// lazyForm is an image in a form that need not be read whole.
type lazyForm struct{ name, repo, tag, index string }

func (b *bench) shared(ctx context.Context, out *section) error {
	w, err := b.wire(ctx, link.Edge)
	if err != nil {
		return err
	}
	defer w.Close()
	out.line("A program run once, cold, on the edge link (50 ms, 50 Mbit/s): caches dropped, a new daemon on an empty store mounts the image, and `chroot` runs the program in an overlay (upper on tmpfs) over the mount. *varve index*: the plain image, to which both indexes refer that `varve index --push` made, just now and with this varve; *SOCI index*: only the one of SOCI; *eStargz*: the image converted by the estargz library (level 6, chunks of 4 MiB), whose blobs are larger. *time*: from the request for the mount until the program has ended; *wire*: all that came down the link from the mount until a second after the end. In turns, medians of n=%d. Target: at most %.2f of eStargz, in bytes and in time.", b.n, sharedTarget)
	out.line("")
	out.line("| image | program | form | wire MB | least | / eStargz | target | time s | least | / eStargz | by least | target | mount s | link alone s | requests |")
	out.line("|---|---|---|--:|--:|--:|---|--:|--:|--:|--:|---|--:|--:|---|")
	for _, image := range b.imagesOr("node") {
		program := workloads[image]
		if image == "node" {
			program = "node -e 0"
		}
		if program == "" {
			return fmt.Errorf("%s is no image of the corpus with a workload", image)
		}
		forms := []lazyForm{
			{"eStargz", image, tagEStargz, "toc"},
			{"varve index", repoIndexed + image, tagPlain, "varve"},
			{"SOCI index", repoSOCI + image, tagPlain, "soci"},
		}
		if err := b.haveIndexed(ctx, image); err != nil {
			return err
		}
		got := map[string][]coldRun{}
		for i := range b.n {
			for _, f := range turn(forms, i) {
				r, err := b.runCold(ctx, w, f, program)
				if err != nil {
					return fmt.Errorf("%s of %s by %s: %w", program, image, f.name, err)
				}
				got[f.name] = append(got[f.name], r)
			}
		}
		for _, f := range forms {
			sharedLine(out, image, program, f, got[f.name], got[forms[0].name])
			b.say("shared %s %s: wire MB %s; ms %s; mount ms %s", image, f.name, all(got[f.name], func(r coldRun) string { return mb(r.down) }),
				all(got[f.name], func(r coldRun) string { return ms(r.took) }), all(got[f.name], func(r coldRun) string { return ms(r.mount) }))
			last := got[f.name][b.n-1]
			b.timeline(last.start, last.log)
		}
	}
	return nil
}

// haveIndexed makes sure that the registry holds an image in all forms.
func (b *bench) haveIndexed(ctx context.Context, image string) error {
	if err := b.have(ctx, image); err != nil {
		return err
	}
	if err := b.copied(ctx, repoIndexed, image); err != nil {
		return err
	}
	x, err := b.indexed(ctx, repoIndexed+image)
	if err != nil {
		return err
	}
	return b.withSOCI(ctx, image, x)
}

func sharedLine(out *section, image, program string, f lazyForm, v, rival []coldRun) {
	down, took := func(r coldRun) int64 { return r.down }, func(r coldRun) time.Duration { return r.took }
	wire, mine := pickFrom(v, down), pickFrom(v, took)
	wires, theirs := pickFrom(rival, down), pickFrom(rival, took)
	byWire, byTime := float64(median(wire))/float64(median(wires)), float64(median(mine))/float64(median(theirs))
	wireSaid, timeSaid := "", ""
	if f.index == "varve" {
		wireSaid = fmt.Sprintf("<= %.2f %s", sharedTarget, verdict(byWire, sharedTarget))
		timeSaid = fmt.Sprintf("<= %.2f %s", sharedTarget, verdict(byTime, sharedTarget))
	}
	out.line("| %s | `%s` | %s | %s | %s | %.2f | %s | %s | %s | %.2f | %.2f | %s | %s | %.2f | %s |", image, program, f.name, mb(median(wire)), mb(lowest(wire)),
		byWire, wireSaid, seconds(median(mine)), seconds(lowest(mine)), byTime, float64(lowest(mine))/float64(lowest(theirs)), timeSaid,
		seconds(median(pickFrom(v, func(r coldRun) time.Duration { return r.mount }))), float64(median(wire))/float64(link.Edge.Rate), v[0].requests)
}

// coldRun is one run of a program, cold.
type coldRun struct {
	mount, took time.Duration
	down        int64
	requests    string
	start       time.Time
	log         []link.Request
}

func (b *bench) runCold(ctx context.Context, w *wire, f lazyForm, program string) (r coldRun, err error) {
	s, err := b.fresh(ctx, "shared")
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, s.discard()) }()
	if err := dropCaches(); err != nil {
		return r, err
	}
	w.reset()
	r.start = time.Now()
	m, err := s.client.Mount(ctx, daemon.MountOptions{ImageOptions: daemon.ImageOptions{Image: w.ref(f.repo, f.tag), Insecure: true}, Name: "m", Wait: true})
	if err != nil {
		return r, err
	}
	r.mount = time.Since(r.start)
	defer func() { err = errors.Join(err, s.unmount(context.WithoutCancel(ctx))) }()
	for _, l := range m.Layers {
		if l.Index != f.index {
			return r, fmt.Errorf("layer %.19s is read by %q, not %q (%s)", l.Digest, l.Index, f.index, l.Reason)
		}
	}
	if err := b.work(ctx, nil, m.Dir, program); err != nil {
		return r, err
	}
	r.took = time.Since(r.start)
	time.Sleep(time.Second) // what is still on its way
	r.down, r.requests, r.log = w.moved().Down, w.requests(), w.rec.Requests()
	return r, nil
}
