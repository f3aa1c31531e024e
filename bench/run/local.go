package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/varvefs/varve/daemon"
)

const (
	smallCount  = 20_000 // files that are opened, read and closed
	smallMost   = 64 << 10
	randomCount = 10_000 // blocks of 4 KiB
)

// place is where one of the contenders has both trees.
type place struct {
	name      string
	many, big string // directories; big is "" of one that only has the other
	cpu       func() (time.Duration, error)
	requests  func(context.Context) (int64, error) // nil of what answers none
}

// localWork is a work that all places are put to.
type localWork struct {
	measure, about string
	image          string // with its size: figures of others are others
	big, cold      bool   // big is of the one large file
	of             func(localTurn) float64
	unit           string // of that: "s", "CPU s", "MB/s", "IOPS"
	run            func(ctx context.Context, p place, turn int) (readOf, error)
}

// localTurn is what one turn took.
type localTurn struct {
	readOf
	daemon   time.Duration
	requests int64
}

func (t localTurn) cpu() float64 { return (t.CPU + t.daemon).Seconds() }

func (b *bench) localReads(ctx context.Context, out *section) (err error) {
	many, big, err := b.localImages(ctx)
	if err != nil {
		return err
	}
	places, list, end, err := b.localPlaces(ctx, many, big)
	defer func() { err = errors.Join(err, end()) }()
	if err != nil {
		return err
	}
	works := b.localWorks(list)
	got := map[string]map[string][]localTurn{}
	for _, w := range works {
		got[w.measure] = map[string][]localTurn{}
		if err := b.localTurns(ctx, w, places, got[w.measure]); err != nil {
			return fmt.Errorf("%s: %w", w.measure, err)
		}
	}
	b.localSaid(ctx, out, works, places, got)
	return nil
}

// localWorks are the works; list is the file with the names of the small files.
func (b *bench) localWorks(list string) []localWork {
	wall := func(t localTurn) float64 { return t.Wall.Seconds() }
	perSecond := func(t localTurn) float64 { return float64(t.Reads) / t.Wall.Seconds() }
	many, one := fmt.Sprintf("%d files", b.local.files), fmt.Sprintf("%d MiB", b.local.megabytes)
	random := min(randomCount, b.local.megabytes<<20/randomBlock/4)
	randomly := func(way string) func(context.Context, place, int) (readOf, error) {
		return func(ctx context.Context, p place, turn int) (readOf, error) {
			return readBy(ctx, p.big, way, bigFile, strconv.Itoa(turn), strconv.Itoa(random))
		}
	}
	speed := func(t localTurn) float64 { return float64(t.Bytes) / 1e6 / t.Wall.Seconds() }
	return []localWork{
		{
			measure: measureTar, image: many, cold: true, unit: "s", of: wall,
			about: fmt.Sprintf("`tar c` of the image of %d files, piped to `wc -c`; wall time", b.local.files),
			run:   func(ctx context.Context, p place, _ int) (readOf, error) { return tarTree(ctx, p.many) },
		},
		{
			measure: measureOpen, image: many, unit: "CPU s", of: localTurn.cpu,
			about: fmt.Sprintf("%d of its files of at most %d KiB, after one pass over them; CPU of client and daemon", min(smallCount, b.local.files), smallMost>>10),
			run:   func(ctx context.Context, p place, _ int) (readOf, error) { return readBy(ctx, p.many, readEach, list) },
		},
		{
			measure: measureBig, image: one, big: true, cold: true, unit: "MB/s", of: speed,
			about: fmt.Sprintf("a file of %d MiB from start to end, %d KiB a read", b.local.megabytes, sequentialBuffer>>10),
			run: func(ctx context.Context, p place, _ int) (readOf, error) {
				return readBy(ctx, p.big, readSequential, bigFile)
			},
		},
		{
			measure: measureRandom, image: one, big: true, cold: true, unit: "IOPS", of: perSecond,
			about: fmt.Sprintf("%d blocks of it, none twice, one after the other", random),
			run:   randomly(readRandom),
		},
		{
			measure: measureRandom + advised, image: one, big: true, cold: true, unit: "IOPS", of: perSecond,
			about: "the same after `posix_fadvise(POSIX_FADV_RANDOM)`, which fio calls and others do not",
			run:   randomly(readAdvised),
		},
	}
}

// localPlaces lays the trees on disks of their own, ours with the store on one and
// the rivals' on the other, and mounts them. What it has begun ends with end,
// which is never nil.
func (b *bench) localPlaces(ctx context.Context, many, big localImage) (places []place, list string, end func() error, err error) {
	var ends []func() error
	end = func() (err error) {
		for i := len(ends) - 1; i >= 0; i-- {
			err = errors.Join(err, ends[i]())
		}
		return err
	}
	newDisk := func(name string) (string, error) {
		d := disk{b.on(filepath.Join(b.dir, name))}
		dir, err := d.open(ctx)
		if err == nil {
			ends = append(ends, d.close)
		}
		return dir, err
	}
	theirs, err := newDisk("local-ext4")
	if err != nil {
		return nil, "", end, err
	}
	ext4 := place{name: "ext4", many: filepath.Join(theirs, "many"), big: filepath.Join(theirs, "big"), cpu: func() (time.Duration, error) { return 0, nil }}
	if err := errors.Join(many.unpack(ctx, ext4.many), big.unpack(ctx, ext4.big)); err != nil {
		return nil, "", end, err
	}
	names, _, err := smallFiles(ext4.many, smallCount, smallMost)
	if err != nil {
		return nil, "", end, err
	}
	list = filepath.Join(b.dir, "local-names")
	if err := os.WriteFile(list, names, 0o644); err != nil {
		return nil, "", end, err
	}
	places = append(places, ext4)

	mine, err := newDisk("local-varve")
	if err != nil {
		return nil, "", end, err
	}
	s, err := b.on(mine).serve(ctx, "store")
	if err != nil {
		return nil, "", end, err
	}
	ends = append(ends, s.stop) // the store goes with its disk
	faced := map[string]*place{}
	for _, face := range faces {
		faced[face] = &place{name: "varve " + face, cpu: s.cpu, requests: func(ctx context.Context) (int64, error) {
			_, sum, err := s.fuseRequests(ctx)
			return sum, err
		}}
	}
	for _, i := range []localImage{many, big} {
		path, err := b.layout(ctx, i)
		if err != nil {
			return nil, "", end, err
		}
		if err := s.bring(ctx, path); err != nil {
			return nil, "", end, err
		}
		for _, face := range faces {
			name := face + "-" + i.name
			m, err := s.client.Mount(ctx, daemon.MountOptions{ImageOptions: daemon.ImageOptions{Image: "oci:" + path}, Face: face, Name: name})
			if err != nil {
				return nil, "", end, err
			}
			ends = append(ends, func() error {
				_, err := s.client.Unmount(context.WithoutCancel(ctx), daemon.UnmountOptions{Mount: name, Force: true})
				return err
			})
			if p := faced[face]; i.name == many.name {
				p.many = m.Dir
			} else {
				p.big = m.Dir
			}
		}
	}
	for _, face := range faces {
		p := *faced[face]
		if err := b.command(ctx, "cmp", filepath.Join(ext4.big, bigFile), filepath.Join(p.big, bigFile)); err != nil {
			return nil, "", end, err
		}
		places = append(places, p)
	}

	if program := b.local.program(); program != "" {
		f := &fuseOverlayfs{over: over{b: b.on(theirs), lower: ext4.many}, program: program}
		dir, err := f.open(ctx, theirs)
		if err != nil {
			return nil, "", end, err
		}
		ends = append(ends, func() error { return f.close(ctx) })
		places = append(places, place{name: "fuse-overlayfs", many: dir, cpu: f.cpu})
	}
	return places, list, end, nil
}

// program is the rival that was named, or is in PATH.
func (o localOptions) program() string {
	if o.fuseOverlayfs != "" {
		return o.fuseOverlayfs
	}
	path, err := exec.LookPath("fuse-overlayfs")
	if err != nil {
		return ""
	}
	return path
}

// localTurns puts all places to a work, in turns. Everybody must read as much.
func (b *bench) localTurns(ctx context.Context, w localWork, places []place, got map[string][]localTurn) error {
	if w.big {
		var those []place
		for _, p := range places {
			if p.big != "" {
				those = append(those, p)
			}
		}
		places = those
	}
	n := b.n
	if !w.cold {
		n *= warmPerCold
		for _, p := range places {
			if _, err := w.run(ctx, p, 0); err != nil {
				return fmt.Errorf("%s: %w", p.name, err)
			}
		}
	}
	for i := range n {
		for _, p := range turn(places, i) {
			t, err := p.turn(ctx, w, i)
			if err != nil {
				return fmt.Errorf("%s: %w", p.name, err)
			}
			if rival := got["ext4"]; len(rival) > 0 && (t.Bytes != rival[0].Bytes || t.Reads != rival[0].Reads) {
				return fmt.Errorf("%s read %d bytes of %d files or blocks, ext4 %d of %d", p.name, t.Bytes, t.Reads, rival[0].Bytes, rival[0].Reads)
			}
			b.say("%s, %s: %s %s; wall %s, CPU %s and %s of the daemon, %d requests", w.measure, p.name, short(w.of(t)), w.unit, seconds(t.Wall), seconds(t.CPU), seconds(t.daemon), t.requests)
			got[p.name] = append(got[p.name], t)
		}
	}
	return nil
}

func (p place) turn(ctx context.Context, w localWork, i int) (t localTurn, err error) {
	requests := p.requests
	if requests == nil {
		requests = func(context.Context) (int64, error) { return 0, nil }
	}
	before, err := requests(ctx)
	if err != nil {
		return t, err
	}
	if w.cold {
		if err := dropCaches(); err != nil {
			return t, err
		}
	}
	cpu, err := p.cpu()
	if err != nil {
		return t, err
	}
	if t.readOf, err = w.run(ctx, p, i); err != nil {
		return t, err
	}
	end, err := p.cpu()
	if err != nil {
		return t, err
	}
	t.daemon = end - cpu
	after, err := requests(ctx)
	t.requests = after - before
	return t, err
}

// tarTree packs a tree. A pipe, since GNU tar reads nothing if its output is
// /dev/null.
func tarTree(ctx context.Context, dir string) (r readOf, err error) {
	cmd := exec.CommandContext(ctx, "bash", "-c", `set -o pipefail; tar -C "$0" -cf - . | wc -c`, dir)
	cmd.Dir = "/"
	var said bytes.Buffer
	cmd.Stderr = &said
	start := time.Now()
	text, err := cmd.Output()
	r.Wall = time.Since(start)
	if err == nil && said.Len() > 0 {
		err = errors.New("it complains")
	}
	if err != nil {
		return r, fmt.Errorf("tar of %s: %w: %.300s", dir, err, said.String())
	}
	r.Reads = 1
	r.CPU = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	r.Bytes, err = strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	return r, err
}

func (b *bench) localSaid(ctx context.Context, out *section, works []localWork, places []place, got map[string]map[string][]localTurn) {
	out.line("All bytes are here, on ext4 of their own, new ones in files of one disk: varve's store on one, the unpacked trees of the rivals on the other. Two images without an index were mounted and waited for until they were whole: %d files in %d layers (median %d bytes), and one file of %d MiB of noise. *kernel*, *fuse*: `varve mount --face`. *cold*: after sync and drop_caches=3, n=%d; *warm*: n=%d. Everybody takes turns, who begins changes; all read the same number of bytes, and the large file is compared with `cmp` beforehand. CPU: of the reading thread or the command, and of the daemon; what the kernel's own threads compute is not in it. *ratio*: to ext4, of the figure in the first column of numbers.", b.local.files, len(trees), manyFilesMedian, b.local.megabytes, b.n, b.n*warmPerCold)
	out.line("")
	for _, w := range works {
		out.line("- *%s*: %s", w.measure, w.about)
	}
	if program := b.local.program(); program != "" {
		out.line("- *fuse-overlayfs*: %s over the unpacked tree, with an upper", version(ctx, program))
	}
	out.line("")
	out.line("| work | on | | best | | ratio | by best | target | wall s | client CPU s | daemon CPU s | FUSE requests |")
	out.line("|---|---|--:|--:|---|--:|--:|---|--:|--:|--:|--:|")
	for _, w := range works {
		for _, p := range places {
			if v := got[w.measure][p.name]; v != nil {
				w.line(out, p, v, got[w.measure]["ext4"])
			}
		}
	}
}

func (w localWork) line(out *section, p place, v, rival []localTurn) {
	mine, theirs := pickFrom(v, w.of), pickFrom(rival, w.of)
	daemon := pickFrom(v, func(t localTurn) float64 { return t.daemon.Seconds() })
	requests := pickFrom(v, func(t localTurn) float64 { return float64(t.requests) })
	best := lowest[float64]
	if higherIsBetter(w.unit) {
		best = highest[float64]
	}
	ratio, byBest := median(mine)/median(theirs), best(mine)/best(theirs)
	target := ""
	if want, ok := targets(w.measure)[p.name]; ok && higherIsBetter(w.unit) {
		target = fmt.Sprintf(">= %.1f %s", want, atLeast(ratio, want))
	} else if ok {
		target = fmt.Sprintf("<= %.1f %s", want, verdict(ratio, want))
	}
	asked := ""
	if p.requests != nil {
		asked = fmt.Sprintf("%.0f", median(requests))
	}
	out.line("| %s | %s | %s | %s | %s | %.2f | %.2f | %s | %s | %s | %s | %s |", w.measure, p.name, short(median(mine)), short(best(mine)), w.unit, ratio, byBest, target,
		seconds(median(pickFrom(v, func(t localTurn) time.Duration { return t.Wall }))), seconds(median(pickFrom(v, func(t localTurn) time.Duration { return t.CPU }))),
		fmt.Sprintf("%.3f", median(daemon)), asked)
	f := Figure{Measure: w.measure, Image: w.image, System: p.name}
	keep := func(unit, variant string, values []float64) {
		f.Unit, f.Variant, f.Values = unit, variant, values
		record(f)
	}
	keep(w.unit, "", mine)
	if w.unit != "CPU s" {
		keep("CPU s", "", pickFrom(v, localTurn.cpu))
	}
	if p.name != "ext4" {
		keep("CPU s", "daemon", daemon)
	}
	if p.requests != nil {
		keep("requests", "", requests)
	}
}
