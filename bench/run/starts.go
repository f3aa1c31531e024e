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

// The systems that start an image.
const (
	systemOurs      = "varve"
	systemStargz    = "stargz-snapshotter"
	systemSOCI      = "soci-snapshotter"
	systemOverlayfs = "overlayfs" // containerd's, the image pulled and unpacked
	systemUnpacked  = "skopeo and umoci"
)

// The forms of an image that a start is measured with.
const (
	formEStargz        = "estargz"
	formOptimised      = "estargz, optimised"
	formIndexed        = "gzip, varve index"
	formProfile        = "estargz, profile"
	formIndexedProfile = "gzip, varve index, profile"
	formConverted      = "converted from profile"
	formConvertedAlone = "converted from profile, without one"
	formSOCI           = "gzip, soci index"
	formPlain          = "gzip"
)

// way is a system with a form of an image.
type way struct {
	system, form string
	image        target
	node         func(ctx context.Context) (node, error)
	full         bool   // it fetches all there is
	ahead        string // what ours must know by what a start reads, if that matters
}

func (v way) String() string { return v.system + ": " + v.form }

// startRun is one cold start.
type startRun struct {
	took, ready time.Duration // until the workload has ended; until its root is there
	down        int64
	requests    int64
	cpu         time.Duration
	peak        int64
}

func (b *bench) starts(ctx context.Context, out *section) error {
	if err := b.rivals.startable(); err != nil {
		return err
	}
	w, err := b.wire(ctx, link.None)
	if err != nil {
		return err
	}
	defer w.Close()
	n := b.turns(3)
	out.line("From nothing to the end of the image's workload with exit 0: empty stores, daemons running, page cache dropped, the registry behind the link. What is timed is the pull where there is one, the making of a writable root, and a container on it that runs the workload. Ours: `varve mount --rw`. The others: `ctr image pull` or `ctr-remote image rpull`, a snapshot prepared and mounted as `ctr` says. The container is the same for all, the runtime itself with a bundle of ours, so that neither `ctr run` nor containerd's shim is in any figure. (%s.) In turns, medians of n=%d; a full pull at edge is taken once.", b.rivals.versions(ctx), n)
	out.line("")
	out.line("*estargz, optimised* was made by a run of that very workload (ctr-remote image optimize where it is here, else `varve convert --from-profile`), and is the same image for ours and for stargz-snapshotter; *profile*: a start on an empty store beside which the profile of an earlier start is kept; *converted from profile*: the eStargz of `varve convert --from-profile @default`. Snapshotters have the settings they come with. B: 3 round trips and the compressed bytes of the files that the workload touches (*touched*, as in *Bytes on the wire*) / bandwidth; what the container's own start takes is not in B. MB and requests: all until the workload's end, TOCs and manifests too. CPU and peak RSS: the daemon that serves the image, not its children and not the containerd in front of a snapshotter; for overlayfs containerd with what it starts to decompress.")
	out.line("")
	out.line("| link | image | B s | touched MB | system | form | s | least | / B | root there s | MB down | requests | CPU s | peak RSS MiB |")
	out.line("|---|---|--:|--:|---|---|--:|--:|--:|--:|--:|--:|--:|--:|")
	verdicts := &section{}
	for _, image := range b.imagesOr(corpus...) {
		if workloads[image] == "" {
			return fmt.Errorf("%s is no image of the corpus with a workload", image)
		}
		t, ways, err := b.ways(ctx, w, image)
		if err != nil {
			return fmt.Errorf("prepare %s: %w", image, err)
		}
		for _, p := range []link.Profile{link.Edge, link.Datacenter} {
			w.link.SetProfile(p)
			got := map[string][]startRun{}
			for i := range n {
				for _, v := range turn(ways, i) {
					if v.full && p == link.Edge && i > 0 {
						continue
					}
					r, err := b.start(ctx, w, v, image)
					if err != nil {
						return fmt.Errorf("%s at %s by %s: %w", image, p.Name, v, err)
					}
					b.say("start %s %s %s: %s s, root %s, %s MB, %d requests, CPU %s, peak %s", p.Name, image, v, seconds(r.took), seconds(r.ready), mb(r.down), r.requests, seconds(r.cpu), mib(r.peak))
					got[v.String()] = append(got[v.String()], r)
				}
			}
			least := lowerBound(p, t)
			record(Figure{measureStart, image, p.Name, systemBound, "", "s", []float64{least.Seconds()}})
			record(Figure{measureStart, image, p.Name, systemBound, "", "MB", []float64{float64(t.bytes) / 1e6}})
			record(Figure{measureStart, image, p.Name, systemTOCs, "", "MB", []float64{float64(t.tocs) / 1e6}})
			for _, v := range ways {
				startLine(out, p, image, t, v, got[v.String()])
			}
			startVerdicts(verdicts, p, image, t, got)
		}
		w.link.SetProfile(link.None)
	}
	out.line("")
	out.line("| link | image | what | ours | beside | ratio | by least | target |")
	out.line("|---|---|---|--:|--:|--:|--:|---|")
	out.WriteString(verdicts.String())
	return nil
}

// lowerBound is what the link alone would need for whole files.
func lowerBound(p link.Profile, t touched) time.Duration {
	return 3*p.RTT + time.Duration(float64(t.bytes)/float64(p.Rate)*float64(time.Second))
}

// start runs a workload once, cold.
func (b *bench) start(ctx context.Context, w *wire, v way, image string) (r startRun, err error) {
	n, err := v.node(ctx)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, n.close()) }()
	if err := dropCaches(); err != nil {
		return r, err
	}
	before, err := n.cpu()
	if err != nil {
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
	r.ready = time.Since(start)
	if err := b.contain(ctx, dir, workloads[image]); err != nil {
		return r, err
	}
	r.took = time.Since(start)
	r.down, r.requests = w.moved().Down, w.rec.Totals().All().Requests
	b.timeline(start, w.rec.Requests())
	if err := lazy(v, w.rec.Requests()); err != nil {
		return r, err
	}
	if ours, ok := n.(*oursNode); ok && v.ahead != "" {
		if by, err := ours.ahead(ctx); err != nil || by != v.ahead {
			return r, errors.Join(err, fmt.Errorf("what it reads was known by %q, not %q", by, v.ahead))
		}
	}
	after, err := n.cpu()
	if err != nil {
		return r, err
	}
	r.cpu = after - before
	if r.peak, err = n.peak(); err != nil {
		return r, err
	}
	return r, n.leave(ctx)
}

// wholeLayer is more, in bytes, than what a lazy system asks for without a range:
// configs, tables of contents, indexes: SOCI's of 100,000 small files is 21 MB.
const wholeLayer = 32 << 20

// lazy says whether a start was what its way says. A snapshotter that cannot read
// an image lazily pulls it without a word.
func lazy(v way, log []link.Request) error {
	for _, r := range log {
		if !v.full && r.Range == "" && r.Bytes > wholeLayer {
			return fmt.Errorf("it is not lazy: %s was fetched whole, %s MB", r.Path, mb(r.Bytes))
		}
	}
	return nil
}

func took(r startRun) time.Duration { return r.took }

func startLine(out *section, p link.Profile, image string, t touched, v way, runs []startRun) {
	least := lowerBound(p, t)
	times := pickFrom(runs, took)
	cpu, peak := "", "" // without a daemon
	if v.system != systemUnpacked {
		cpu = seconds(median(pickFrom(runs, func(r startRun) time.Duration { return r.cpu })))
		peak = mib(median(pickFrom(runs, func(r startRun) int64 { return r.peak })))
	}
	out.line("| %s | %s | %s | %s | %s | %s | %s | %s | %.2f | %s | %s | %d | %s | %s |", p.Name, image, seconds(least), mb(t.bytes), v.system, v.form,
		seconds(median(times)), seconds(lowest(times)), float64(median(times))/float64(least), seconds(median(pickFrom(runs, func(r startRun) time.Duration { return r.ready }))),
		mb(median(pickFrom(runs, func(r startRun) int64 { return r.down }))), median(pickFrom(runs, func(r startRun) int64 { return r.requests })),
		cpu, peak)
	for _, f := range []struct {
		unit string
		of   func(startRun) float64
	}{
		{"s", func(r startRun) float64 { return r.took.Seconds() }},
		{"MB", func(r startRun) float64 { return float64(r.down) / 1e6 }},
		{"requests", func(r startRun) float64 { return float64(r.requests) }},
		{"CPU s", func(r startRun) float64 { return r.cpu.Seconds() }},
		{"MiB", func(r startRun) float64 { return float64(r.peak) / (1 << 20) }},
	} {
		if v.system == systemUnpacked && (f.unit == "MiB" || f.unit == "CPU s") {
			continue
		}
		record(Figure{measureStart, image, p.Name, v.system, v.form, f.unit, pickFrom(runs, f.of)})
	}
}

// startTarget is what a start of ours has to reach beside another.
type startTarget struct {
	link         string
	form         string // of ours
	rival, rform string
	what         string // "s" or "CPU s"
	atMost       float64
}

var startTargets = []startTarget{
	{"edge", formOptimised, systemStargz, formOptimised, "s", 1},
	{"edge", formEStargz, systemStargz, formEStargz, "s", 0.6},
	{"datacenter", formProfile, systemOverlayfs, formPlain, "s", 0.2},
	{"datacenter", formProfile, systemUnpacked, formPlain, "s", 0.2},
	{"datacenter", formProfile, systemStargz, formOptimised, "s", 1},
	{"edge", formEStargz, systemStargz, formEStargz, "CPU s", 0.5},
	{"edge", formOptimised, systemStargz, formOptimised, "CPU s", 0.5},
	{"edge", formProfile, systemStargz, formOptimised, "CPU s", 0.5},
	{"datacenter", formProfile, systemStargz, formOptimised, "CPU s", 0.5},
}

// The targets of a start with a profile at edge, beside B and the touched bytes.
const (
	profileTarget   = 1.3 // times B, and
	profileAside    = 300 * time.Millisecond
	touchedTarget   = 1.15
	convertedTarget = 0.7 // times B, of the image that is read in part
)

// startVerdicts says of each target that has its runs whether it is reached.
func startVerdicts(out *section, p link.Profile, image string, t touched, got map[string][]startRun) {
	line := func(what, ours, rival string, ratio, least, atMost float64) {
		out.line("| %s | %s | %s | %s | %s | %.2f | %.2f | <= %.2f %s |", p.Name, image, what, ours, rival, ratio, least, atMost, verdict(ratio, atMost))
	}
	for _, s := range startTargets {
		ours, theirs := got[way{system: systemOurs, form: s.form}.String()], got[way{system: s.rival, form: s.rform}.String()]
		if s.link != p.Name || ours == nil || theirs == nil {
			continue
		}
		of := took
		if s.what == "CPU s" {
			of = func(r startRun) time.Duration { return r.cpu }
		}
		mine, other := pickFrom(ours, of), pickFrom(theirs, of)
		line(fmt.Sprintf("%s of %s beside %s of %s", s.what, s.form, s.rival, s.rform), seconds(median(mine)), seconds(median(other)),
			float64(median(mine))/float64(median(other)), float64(lowest(mine))/float64(lowest(other)), s.atMost)
	}
	if p != link.Edge {
		return
	}
	bound := lowerBound(p, t)
	if runs := got[way{system: systemOurs, form: formProfile}.String()]; runs != nil {
		times, down := pickFrom(runs, took), pickFrom(runs, func(r startRun) int64 { return r.down - t.tocs })
		limit := time.Duration(profileTarget*float64(bound)) + profileAside
		line("s with profile beside 1.3 B + 0.3 s", seconds(median(times)), seconds(limit), float64(median(times))/float64(limit), float64(lowest(times))/float64(limit), 1)
		line("MB with profile, less TOCs, beside those touched", mb(median(down)), mb(t.bytes), float64(median(down))/float64(t.bytes), float64(lowest(down))/float64(t.bytes), touchedTarget)
	}
	if runs := got[way{system: systemOurs, form: formConverted}.String()]; runs != nil {
		times := pickFrom(runs, took)
		line("s converted from profile beside B", seconds(median(times)), seconds(bound), float64(median(times))/float64(bound), float64(lowest(times))/float64(bound), convertedTarget)
	}
}

// ways makes the forms of an image that are not there yet and gives all ways to
// start it.
func (b *bench) ways(ctx context.Context, w *wire, image string) (t touched, ways []way, err error) {
	if err := b.have(ctx, image); err != nil {
		return t, nil, err
	}
	if err := b.copied(ctx, repoIndexed, image); err != nil {
		return t, nil, err
	}
	if _, err := b.indexed(ctx, repoIndexed+image); err != nil {
		return t, nil, err
	}
	t, err = b.touches(ctx, w, image)
	if err != nil {
		return t, nil, fmt.Errorf("under strace: %w", err)
	}
	optimised, err := b.optimised(ctx, image, t.names)
	if err != nil {
		return t, nil, fmt.Errorf("optimise: %w", err)
	}
	esgz := target{image, tagEStargz}
	ways = append(ways, b.oursWay(formEStargz, esgz))
	if b.rivals.lazyStargz() {
		ways = append(ways, b.ctrWay(w, systemStargz, formEStargz, esgz, kindStargz), b.ctrWay(w, systemStargz, formOptimised, optimised, kindStargz))
	}
	ways = append(ways, b.oursWay(formOptimised, optimised), b.oursWay(formIndexed, target{repoIndexed + image, tagPlain}))
	if b.rivals.lazySOCI() {
		soci, err := b.withSOCI2(ctx, image)
		if err != nil {
			return t, nil, fmt.Errorf("soci: %w", err)
		}
		ways = append(ways, b.ctrWay(w, systemSOCI, formSOCI, soci, kindSOCI))
	}
	profiled, err := b.profiledWays(ctx, w, image)
	if err != nil {
		return t, nil, err
	}
	ways = append(append(ways, profiled...), b.fullWay(w, image))
	return t, b.chosenWays(ways), nil
}

func (b *bench) oursWay(form string, image target, flags ...string) way {
	return way{system: systemOurs, form: form, image: image, node: func(ctx context.Context) (node, error) { return b.oursNode(ctx, flags...) }}
}

func (b *bench) ctrWay(w *wire, system, form string, image target, kind snapshotterKind) way {
	return way{system: system, form: form, image: image, full: kind.program == nil,
		node: func(ctx context.Context) (node, error) { return b.ctrNode(ctx, w, kind, image) }}
}

// fullWay is the full pull: containerd's, or that of programs without a daemon.
func (b *bench) fullWay(w *wire, image string) way {
	plain := target{image, tagPlain}
	if b.rivals.containerd != "" {
		return b.ctrWay(w, systemOverlayfs, formPlain, plain, kindOverlayfs)
	}
	return way{system: systemUnpacked, form: formPlain, image: plain, full: true, node: func(context.Context) (node, error) { return b.unpackedNode() }}
}

// chosenWays are those that were asked for.
func (b *bench) chosenWays(ways []way) []way {
	if b.only == nil {
		return ways
	}
	return slices.DeleteFunc(ways, func(v way) bool {
		return !slices.ContainsFunc(b.only, func(s string) bool { return strings.Contains(v.String(), s) })
	})
}
