package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/varvefs/varve/bench/link"
)

// ground is what is walked: a mount of ours with its daemon, or the tree on ext4.
type ground struct {
	name   string
	dir    string
	server *server // nil for ext4
}

// step is one walk.
type step struct {
	cpu, daemon, wall time.Duration // cpu has the daemon's in it
	requests          int64
}

var walks = []struct {
	name string
	argv []string
}{
	{"find", []string{"find"}},
	{"ls -lR", []string{"ls", "-lR"}},
}

// Walks after one with caches dropped.
const warmPerCold = 3

// walkTargets are the ratios of CPU to ext4, cold and warm.
var walkTargets = map[string][2]float64{"kernel": {1.1, 1.0}, "fuse": {2.0, 1.4}}

func (b *bench) walk(ctx context.Context, out *section) (err error) {
	if err := b.have(ctx, "large"); err != nil {
		return err
	}
	plain, err := b.tree(ctx)
	if err != nil {
		return err
	}
	w, err := b.wire(ctx, link.None)
	if err != nil {
		return err
	}
	defer w.Close()
	grounds := []ground{{name: "ext4", dir: plain}}
	for _, face := range faces {
		s, err := b.fresh(ctx, "walk-"+face)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, s.discard()) }()
		m, err := s.mount(ctx, w.image("large"), face)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, s.unmount(context.WithoutCancel(ctx))) }()
		grounds = append(grounds, ground{face, m.Dir, s})
	}
	out.line("`large`, %s, no file data needed; ext4 has the same tree, copied by cp -a from a mount of the plain image. CPU is the client's user and system time and the daemon's. *cold*: after sync and drop_caches=3, n=%d; *warm*: the %d walks that follow each, n=%d. The three take turns.", b.sizeOf(ctx, plain), b.n, warmPerCold, b.n*warmPerCold)
	out.line("")
	out.line("| walk | | on | CPU ms | least | wall ms | least | ratio of CPU | ratio of least | target | daemon CPU ms | FUSE requests |")
	out.line("|---|---|---|--:|--:|--:|--:|--:|--:|---|--:|--:|")
	for _, k := range walks {
		cold, warm := map[string][]step{}, map[string][]step{}
		for range b.n {
			for _, g := range grounds {
				if err := dropCaches(); err != nil {
					return err
				}
				for i := range 1 + warmPerCold {
					s, err := g.walk(ctx, k.argv)
					if err != nil {
						return err
					}
					if i == 0 {
						cold[g.name] = append(cold[g.name], s)
					} else {
						warm[g.name] = append(warm[g.name], s)
					}
				}
			}
		}
		for i, t := range []map[string][]step{cold, warm} {
			for _, g := range grounds {
				walkLine(out, k.name, []string{"cold", "warm"}[i], g.name, t[g.name], t["ext4"], i)
				b.say("%s %s %s: CPU ms %s", k.name, []string{"cold", "warm"}[i], g.name, all(t[g.name], func(s step) string { return ms(s.cpu) }))
			}
		}
	}
	return nil
}

func walkLine(out *section, walk, state, on string, v, rival []step, i int) {
	pick := func(v []step, f func(step) time.Duration) []time.Duration {
		var d []time.Duration
		for _, s := range v {
			d = append(d, f(s))
		}
		return d
	}
	cpu := func(s step) time.Duration { return s.cpu }
	wall := pick(v, func(s step) time.Duration { return s.wall })
	dcpu := pick(v, func(s step) time.Duration { return s.daemon })
	var requests []int64
	for _, s := range v {
		requests = append(requests, s.requests)
	}
	mine, theirs := pick(v, cpu), pick(rival, cpu)
	ratio := float64(median(mine)) / float64(median(theirs))
	least := float64(lowest(mine)) / float64(lowest(theirs))
	target := ""
	if t, ok := walkTargets[on]; ok {
		target = fmt.Sprintf("<= %.1f %s", t[i], verdict(ratio, t[i]))
	}
	out.line("| %s | %s | %s | %s | %s | %s | %s | %.2f | %.2f | %s | %s | %d |", walk, state, on, ms(median(mine)), ms(lowest(mine)),
		ms(median(wall)), ms(lowest(wall)), ratio, least, target, ms(median(dcpu)), median(requests))
}

func (g ground) walk(ctx context.Context, argv []string) (s step, err error) {
	var cpu time.Duration
	var before, after int64
	if g.server != nil {
		if _, before, err = g.server.fuseRequests(ctx); err != nil {
			return s, err
		}
		if cpu, err = g.server.cpu(); err != nil {
			return s, err
		}
	}
	cmd := exec.CommandContext(ctx, argv[0], append(argv[1:len(argv):len(argv)], g.dir)...)
	cmd.Dir = "/"
	start := time.Now()
	if err := cmd.Run(); err != nil {
		return s, fmt.Errorf("%v of %s: %w", argv, g.dir, err)
	}
	s.wall = time.Since(start)
	s.cpu = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	if g.server != nil {
		end, err := g.server.cpu()
		if err != nil {
			return s, err
		}
		s.daemon = end - cpu
		s.cpu += s.daemon
		if _, after, err = g.server.fuseRequests(ctx); err != nil {
			return s, err
		}
		s.requests = after - before
	}
	return s, nil
}

func dropCaches() error {
	syscall.Sync()
	return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3\n"), 0)
}

// tree copies the tree of the largest image to the scratch directory, once.
func (b *bench) tree(ctx context.Context) (dir string, err error) {
	dir = filepath.Join(b.dir, "tree-large")
	done := dir + ".done"
	if _, err := os.Stat(done); err == nil {
		return dir, nil
	}
	if err := os.RemoveAll(dir); err != nil {
		return "", err
	}
	s, err := b.fresh(ctx, "copy")
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, s.discard()) }()
	start := time.Now()
	m, err := s.mount(ctx, b.registry+"/large:"+tagPlain, "auto")
	if err != nil {
		return "", fmt.Errorf("%w (%s)", err, needs)
	}
	defer func() { err = errors.Join(err, s.unmount(context.WithoutCancel(ctx))) }()
	b.say("mounted large:%s in %s", tagPlain, time.Since(start).Round(time.Millisecond))
	if out, err := exec.CommandContext(ctx, "cp", "-a", m.Dir+"/.", dir).CombinedOutput(); err != nil {
		return "", fmt.Errorf("copy the tree: %w: %.500s", err, out)
	}
	b.say("copied in %s", time.Since(start).Round(time.Second))
	return dir, os.WriteFile(done, nil, 0o644)
}

func (b *bench) sizeOf(ctx context.Context, dir string) string {
	out, err := exec.CommandContext(ctx, "sh", "-c", `find "$0" | wc -l | tr -d '\n'`, dir).Output()
	if err != nil {
		return "?"
	}
	return string(out) + " names"
}
