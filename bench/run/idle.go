package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// The idle images, and what the daemon may take for them in MiB.
const (
	idleCount  = 20
	idleLayers = 10
	idleShared = 5 // layers of the base, where there is one
	idleTarget = 64
	idleName   = "idle"
)

// What the idle images share.
const (
	sharedNothing = "sharing nothing"
	sharedBase    = "sharing a base"
)

const measureIdle = "20 idle images"

// idleWait is how long containers are left alone: what is kept for those who come
// soon is given up in less.
const idleWait = 2 * time.Minute

// idleRun is what a daemon holds.
type idleRun struct {
	one, all, idle rss
	heap           int64
	mounts         mounted
	overlays       int
}

func (b *bench) idle(ctx context.Context, out *section) error {
	if err := b.rivals.containers(); err != nil {
		return err
	}
	n := b.turns(1)
	out.line("%d images of %d layers, 40 small files of noise each, as eStargz; of each one container that waits, by `varve pull --containerd` and `ctr run --detach`. *sharing a base*: the lowest %d layers are the same. *started*: with the last container started; *idle*: after %s. *one*: with the first container. MiB, medians of n=%d; the heap is what the runtime says is in use. *overlays*: the containers' own. (%s.)", idleCount, idleLayers, idleShared, idleWait, n, b.rivals.versions(ctx))
	out.line("")
	out.line("| images | overlays | lower mounts | target | FUSE mounts | target | RSS one | RSS started | RSS idle | anon | file | shmem | target | peak | target | heap |")
	out.line("|---|--:|--:|---|--:|---|--:|--:|--:|--:|--:|--:|---|--:|---|--:|")
	for _, sharing := range []string{sharedNothing, sharedBase} {
		if b.only != nil && !slices.Contains(b.only, sharing) {
			continue
		}
		refs, err := b.idleImages(ctx, sharing)
		if err != nil {
			return fmt.Errorf("make images %s: %w", sharing, err)
		}
		var got []idleRun
		for range n {
			r, err := b.idleOnce(ctx, refs)
			if err != nil {
				return fmt.Errorf("images %s: %w", sharing, err)
			}
			b.say("idle %s: RSS MiB one %s, started %s, idle %s (anon %s, file %s), peak %s, heap %s; %+v", sharing, mib(r.one.all), mib(r.all.all), mib(r.idle.all), mib(r.idle.anon), mib(r.idle.file), mib(r.idle.peak), mib(r.heap), r.mounts)
			got = append(got, r)
		}
		of := func(f func(idleRun) int64) int64 { return median(pickFrom(got, f)) }
		size := func(f func(idleRun) int64) string { return mib(of(f)) }
		within := func(f func(idleRun) int64) string {
			return fmt.Sprintf("<= %d %s", idleTarget, verdict(float64(of(f))/(1<<20), idleTarget))
		}
		idle, peak := func(r idleRun) int64 { return r.idle.all }, func(r idleRun) int64 { return r.idle.peak }
		m := got[0].mounts
		out.line("| %s | %d | %d | %d %s | %d | 1 %s | %s | %s | %s | %s | %s | %s | %s | %s | %s | %s |", sharing, got[0].overlays, m.lower, idleCount, exactly(m.lower, idleCount), m.fuse, exactly(m.fuse, 1),
			size(func(r idleRun) int64 { return r.one.all }), size(func(r idleRun) int64 { return r.all.all }), size(idle),
			size(func(r idleRun) int64 { return r.idle.anon }), size(func(r idleRun) int64 { return r.idle.file }), size(func(r idleRun) int64 { return r.idle.shmem }), within(idle),
			size(peak), within(peak), size(func(r idleRun) int64 { return r.heap }))
		record(Figure{measureIdle, idleName, "", systemOurs, sharing, "MiB", pickFrom(got, func(r idleRun) float64 { return float64(r.idle.all) / (1 << 20) })})
	}
	return nil
}

// idleOnce starts a container of each image on an empty store.
func (b *bench) idleOnce(ctx context.Context, refs []string) (r idleRun, err error) {
	h, err := b.host(ctx, nil, systemOurs)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, h.close()) }()
	for i, ref := range refs {
		if err := h.pull(ctx, ref); err != nil {
			return r, err
		}
		if err := h.run(ctx, ourSnapshotter, ref, []string{"--detach"}, "/pause"); err != nil {
			return r, err
		}
		if i == 0 {
			if r.one, err = h.ours.rss(); err != nil {
				return r, err
			}
		}
	}
	if r.all, err = h.ours.rss(); err != nil {
		return r, err
	}
	select {
	case <-ctx.Done():
		return r, ctx.Err()
	case <-time.After(idleWait):
	}
	if r.idle, err = h.ours.rss(); err != nil {
		return r, err
	}
	if r.mounts, err = h.ours.mounted(); err != nil {
		return r, err
	}
	if _, r.heap, err = h.ours.heap(ctx); err != nil {
		return r, err
	}
	profile, err := h.ours.get(ctx, "/debug/pprof/heap")
	if err == nil {
		err = os.WriteFile(filepath.Join(b.dir, "heap-idle.pb.gz"), profile, 0o644)
	}
	if err != nil {
		return r, err
	}
	maps, err := h.ours.mappings()
	if err != nil {
		return r, err
	}
	for _, m := range maps {
		b.say("  %s MiB %s", mib(m.rss), m.what)
	}
	tasks, err := h.list(ctx, "task")
	r.overlays = len(tasks)
	return r, errors.Join(err, h.remote(ctx))
}
