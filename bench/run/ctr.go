package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/varvefs/varve/bench/link"
)

// The measures of containers that containerd starts.
const (
	ctrMeasure    = "ctr"
	atOnceMeasure = "atonce"
	idleMeasure   = "idle"
	// containersVerb is short for all of them.
	containersVerb = "containers"
)

var containerMeasures = []string{ctrMeasure, atOnceMeasure, idleMeasure}

// What `ctr run` may take, times what others do.
const (
	byHandTarget = 1.1
	stargzTarget = 0.8
)

// Names that this gives to what it records.
const (
	measureCtr    = "pull and ctr run, cold"
	measureCtrRun = "ctr run alone, cold"
)

// containerGoals are those of containers that containerd starts.
var containerGoals = []goal{
	{what: "pull and `ctr run`, cold at edge", section: ctrMeasure, measure: measureCtr, link: "edge", unit: "s", system: systemOurs, variant: formEStargz, rival: systemByHand, rvariant: formEStargz, want: byHandTarget},
	{section: ctrMeasure, measure: measureCtr, link: "edge", unit: "s", system: systemOurs, variant: formPlain, rival: systemByHand, rvariant: formPlain, want: byHandTarget},
	{section: ctrMeasure, measure: measureCtr, link: "edge", unit: "s", system: systemOurs, variant: formEStargz, rival: systemStargz, rvariant: formEStargz, want: stargzTarget},
	{section: ctrMeasure, measure: measureCtr, link: "edge", unit: "s", system: systemOurs, variant: formOptimised, rival: systemStargz, rvariant: formOptimised, want: stargzTarget},
	{what: "`ctr run` alone, the image pulled before", section: ctrMeasure, measure: measureCtrRun, link: "edge", unit: "s", system: systemOurs, variant: formEStargz, rival: systemStargz, rvariant: formEStargz, want: stargzTarget},
	{what: "32 containers of one image at once, warm", section: atOnceMeasure, measure: measureAtOnce, unit: "s", system: systemOurs, variant: formEStargz, rival: systemOverlayfs, rvariant: formPlain, want: crowdTarget},
	{what: "daemon memory, 20 idle images of 10 layers", section: idleMeasure, measure: measureIdle, unit: "MiB", system: systemOurs, variant: sharedNothing, rival: systemStargz, image: idleName, want: idleTarget, absolute: true},
	{section: idleMeasure, measure: measureIdle, unit: "MiB", system: systemOurs, variant: sharedBase, rival: systemStargz, image: idleName, want: idleTarget, absolute: true},
}

// starter starts a container with nothing here at first.
type starter interface {
	pull(ctx context.Context, ref string) error
	start(ctx context.Context, ref, workload string) error
	cpu() (time.Duration, error)
	close() error
}

// ctrWay is who starts a container, with a form of an image.
type ctrWay struct {
	system, form string
	image        target
	whole        bool // the image is read whole
}

func (v ctrWay) String() string { return v.system + ": " + v.form }

// ctrRun is one start.
type ctrRun struct {
	pull, run time.Duration
	down      int64
	requests  int64
	cpu       time.Duration
}

func (r ctrRun) took() time.Duration { return r.pull + r.run }

func (r *rivals) containers() error {
	if r.containerd == "" {
		return errors.New("there is no containerd: apt-get install containerd, or name one with -containerd")
	}
	return r.startable()
}

func (b *bench) ctr(ctx context.Context, out *section) error {
	if err := b.rivals.containers(); err != nil {
		return err
	}
	w, err := b.wire(ctx, link.None)
	if err != nil {
		return err
	}
	defer w.Close()
	n := b.turns(3)
	out.line("From nothing to the end of the image's workload with exit 0, behind the edge link: empty stores, daemons running, the page cache dropped but for the programs themselves. *varve*: `varve pull --containerd`, then `ctr run` through our snapshotter. *%s*: `varve mount --rw`, and the same runtime with a bundle of ours. *stargz-snapshotter*: `ctr-remote image rpull` and `ctr-remote run`. The runtime is the same for all. *s*: both steps; a start with an image that is read whole is taken once. (%s.) In turns, medians of n=%d.", systemByHand, b.rivals.versions(ctx), n)
	out.line("")
	out.line("| image | form | by | s | least | pull s | run s | MB down | requests | daemon's CPU s |")
	out.line("|---|---|---|--:|--:|--:|--:|--:|--:|--:|")
	verdicts := &section{}
	for _, image := range b.imagesOr("debian", "python", "node", "nginx") {
		if workloads[image] == "" {
			return fmt.Errorf("%s is no image of the corpus with a workload", image)
		}
		w.link.SetProfile(link.None)
		ways, err := b.ctrWays(ctx, w, image)
		if err != nil {
			return fmt.Errorf("prepare %s: %w", image, err)
		}
		w.link.SetProfile(link.Edge)
		got := map[ctrWay][]ctrRun{}
		for i := range n {
			for _, v := range turn(ways, i) {
				if v.whole && i > 0 {
					continue
				}
				r, err := b.ctrStart(ctx, w, v, image)
				if err != nil {
					return fmt.Errorf("%s by %s: %w", image, v, err)
				}
				b.say("ctr %s %s: %s s, pull %s, run %s, %s MB, %d requests, CPU %s", image, v, seconds(r.took()), seconds(r.pull), seconds(r.run), mb(r.down), r.requests, seconds(r.cpu))
				got[v] = append(got[v], r)
			}
		}
		for _, v := range ways {
			ctrLine(out, image, v, got[v])
			if v.system == systemOurs {
				ctrVerdicts(verdicts, image, v, got)
			}
		}
	}
	out.line("")
	out.line("*run alone*: what `ctr run` takes once the image is pulled, beside all that the other does, or beside its run alone.")
	out.line("")
	out.line("| image | form | what | s | beside | s | ratio | by least | target |")
	out.line("|---|---|---|--:|---|--:|--:|--:|---|")
	out.WriteString(verdicts.String())
	return nil
}

// ctrWays makes the forms of an image that are not there yet and gives all ways.
func (b *bench) ctrWays(ctx context.Context, w *wire, image string) (ways []ctrWay, err error) {
	if err := b.have(ctx, image); err != nil {
		return nil, err
	}
	lazily := []ctrWay{{form: formEStargz, image: target{image, tagEStargz}}}
	if b.rivals.lazyStargz() {
		made := target{repoOptimised + image, tagEStargz}
		if !b.there(ctx, made) {
			t, err := b.touches(ctx, w, image)
			if err != nil {
				return nil, fmt.Errorf("under strace: %w", err)
			}
			if made, err = b.optimised(ctx, image, t.names); err != nil {
				return nil, fmt.Errorf("optimise: %w", err)
			}
		}
		lazily = append(lazily, ctrWay{form: formOptimised, image: made})
	}
	for _, v := range lazily {
		for _, v.system = range []string{systemByHand, systemOurs, systemStargz} {
			if v.system != systemStargz || b.rivals.lazyStargz() {
				ways = append(ways, v)
			}
		}
	}
	if err := b.copied(ctx, repoUnindexed, image); err != nil {
		return nil, err
	}
	for _, system := range []string{systemByHand, systemOurs} {
		ways = append(ways, ctrWay{system, formPlain, target{repoUnindexed + image, tagPlain}, true})
	}
	return slices.DeleteFunc(ways, func(v ctrWay) bool {
		return b.only != nil && !slices.ContainsFunc(b.only, func(s string) bool { return strings.Contains(v.String(), s) })
	}), nil
}

func (b *bench) starter(ctx context.Context, w *wire, system string) (starter, error) {
	if system != systemByHand {
		return b.host(ctx, w, system)
	}
	n, err := b.oursNode(ctx)
	return byHand{n}, err
}

// ctrStart starts a container once, cold.
func (b *bench) ctrStart(ctx context.Context, w *wire, v ctrWay, image string) (r ctrRun, err error) {
	s, err := b.starter(ctx, w, v.system)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	if err := b.dropImages(ctx); err != nil {
		return r, err
	}
	before, err := s.cpu()
	if err != nil {
		return r, err
	}
	ref := w.ref(v.image.repo, v.image.tag)
	w.reset()
	start := time.Now()
	if err := s.pull(ctx, ref); err != nil {
		return r, err
	}
	r.pull = time.Since(start)
	pulled := time.Now()
	if err := s.start(ctx, ref, workloads[image]); err != nil {
		return r, err
	}
	r.run = time.Since(pulled)
	r.down, r.requests = w.moved().Down, w.rec.Totals().All().Requests
	b.timeline(start, w.rec.Requests())
	after, err := s.cpu()
	if err != nil {
		return r, err
	}
	r.cpu = after - before
	if err := lazy(way{full: v.whole}, w.rec.Requests()); err != nil {
		return r, err
	}
	if h, ok := s.(*host); ok && h.ours != nil {
		return r, h.remote(ctx)
	}
	return r, nil
}

// remote says whether the containers lie on a mount of ours.
func (h *host) remote(ctx context.Context) error {
	if n, err := h.fell(ctx); err != nil || n > 0 {
		return errors.Join(err, fmt.Errorf("containerd unpacked %d layers", n))
	}
	ms, err := h.ours.client.Mounts(ctx)
	if err == nil && len(ms) == 0 {
		err = errors.New("nothing is mounted: containerd unpacked the image")
	}
	return err
}

func ctrLine(out *section, image string, v ctrWay, runs []ctrRun) {
	times, alone := pickFrom(runs, ctrRun.took), pickFrom(runs, func(r ctrRun) time.Duration { return r.run })
	out.line("| %s | %s | %s | %s | %s | %s | %s | %s | %d | %s |", image, v.form, v.system, seconds(median(times)), seconds(lowest(times)),
		seconds(median(pickFrom(runs, func(r ctrRun) time.Duration { return r.pull }))), seconds(median(alone)),
		mb(median(pickFrom(runs, func(r ctrRun) int64 { return r.down }))), median(pickFrom(runs, func(r ctrRun) int64 { return r.requests })),
		seconds(median(pickFrom(runs, func(r ctrRun) time.Duration { return r.cpu }))))
	f := Figure{measureCtr, image, link.Edge.Name, v.system, v.form, "s", pickFrom(times, time.Duration.Seconds)}
	record(f)
	f.Unit, f.Values = "MB", pickFrom(runs, func(r ctrRun) float64 { return float64(r.down) / 1e6 })
	record(f)
	f.Unit, f.Values = "requests", pickFrom(runs, func(r ctrRun) float64 { return float64(r.requests) })
	record(f)
	f.Measure, f.Unit, f.Values = measureCtrRun, "s", pickFrom(alone, time.Duration.Seconds)
	record(f)
}

// ctrVerdicts sets a start of ours beside others of the same form.
func ctrVerdicts(out *section, image string, v ctrWay, got map[ctrWay][]ctrRun) {
	alone := func(r ctrRun) time.Duration { return r.run }
	for _, c := range []struct {
		what, rival  string
		ours, theirs func(ctrRun) time.Duration
		atMost       float64
	}{
		{"pull and run", systemByHand, ctrRun.took, ctrRun.took, byHandTarget},
		{"run alone", systemByHand, alone, ctrRun.took, byHandTarget},
		{"pull and run", systemStargz, ctrRun.took, ctrRun.took, stargzTarget},
		{"run alone", systemStargz, alone, alone, stargzTarget},
	} {
		rival := v
		rival.system = c.rival
		if got[rival] == nil {
			continue
		}
		ours, theirs := pickFrom(got[v], c.ours), pickFrom(got[rival], c.theirs)
		ratio := float64(median(ours)) / float64(median(theirs))
		out.line("| %s | %s | %s | %s | %s | %s | %.2f | %.2f | <= %.2f %s |", image, v.form, c.what, seconds(median(ours)), c.rival, seconds(median(theirs)),
			ratio, float64(lowest(ours))/float64(lowest(theirs)), c.atMost, verdict(ratio, c.atMost))
	}
}
