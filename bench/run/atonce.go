package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/varvefs/varve/bench/link"
)

// crowdSize is how many containers start at once, crowdTarget what they may take,
// times what they do on overlayfs.
const (
	crowdSize   = 32
	crowdTarget = 1.2
)

const measureAtOnce = "32 containers at once, warm"

// crowdRun is a crowd with nothing here at first.
type crowdRun struct {
	took         time.Duration
	bytes, twice int64 // of blobs
	mounts       mounted
}

func (b *bench) atOnce(ctx context.Context, out *section) error {
	if err := b.rivals.containers(); err != nil {
		return err
	}
	w, err := b.wire(ctx, link.None)
	if err != nil {
		return err
	}
	defer w.Close()
	n := b.turns(5)
	images := b.imagesOr("debian", "python")
	for _, image := range images {
		if workloads[image] == "" {
			return fmt.Errorf("%s is no image of the corpus with a workload", image)
		}
		if err := b.have(ctx, image); err != nil {
			return err
		}
	}
	out.line("%d containers of one image, each by a `ctr run` of its own, all started at the same moment, until the last one has ended with exit 0. (%s.)", crowdSize, b.rivals.versions(ctx))
	out.line("")
	out.line("**Warm**, beside the overlayfs snapshotter of the same containerd, which has unpacked the image; each has started one crowd before. In turns, medians of n=%d.", n)
	out.line("")
	out.line("| image | workload | varve s | least | overlayfs s | least | ratio | by least | target |")
	out.line("|---|---|--:|--:|--:|--:|--:|--:|---|")
	for _, image := range images {
		if err := b.crowdWarm(ctx, w, image, n, out); err != nil {
			return fmt.Errorf("%s, warm: %w", image, err)
		}
	}
	out.line("")
	out.line("**Cold**, behind the edge link, on an empty store, from the pull on: what a crowd fetches and mounts beside what one container does. *lower mounts*: those that the containers' overlays lie on. *twice*: bytes of blobs that came more than once. One container may have some too, no crowd's doing: what lies before a table of contents comes with that, and once more when it is read. *MB* differ from run to run by what is fetched around reads; that depends on how fast the link seems.")
	out.line("")
	out.line("| image | containers | s | blobs MB | twice MB | lower mounts | FUSE mounts | once each | one lower |")
	out.line("|---|--:|--:|--:|--:|--:|--:|---|---|")
	w.link.SetProfile(link.Edge)
	for _, image := range images {
		var alone crowdRun
		for _, size := range []int{1, crowdSize} {
			r, err := b.crowdCold(ctx, w, image, size)
			if err != nil {
				return fmt.Errorf("%d of %s, cold: %w", size, image, err)
			}
			if size == 1 {
				alone = r
			}
			b.say("atonce cold %s %d: %s s, blobs %d bytes, %d twice, %+v", image, size, seconds(r.took), r.bytes, r.twice, r.mounts)
			out.line("| %s | %d | %s | %s | %s | %d | %d | %s | %s |", image, size, seconds(r.took), mb(r.bytes), mb(r.twice), r.mounts.lower, r.mounts.fuse,
				exactly(r.twice, alone.twice), exactly(r.mounts.lower, 1))
		}
	}
	return nil
}

// crowdWarm takes turns between ours and overlayfs.
func (b *bench) crowdWarm(ctx context.Context, w *wire, image string, n int, out *section) (err error) {
	h, err := b.host(ctx, w, systemOurs)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, h.close()) }()
	refs := map[string]string{ourSnapshotter: w.ref(image, tagEStargz), kindOverlayfs.name: w.ref(image, tagPlain)}
	if err := h.pull(ctx, refs[ourSnapshotter]); err != nil {
		return err
	}
	if _, err := output(h.c.ctr(ctx, "image", "pull", "--plain-http", "--snapshotter", kindOverlayfs.name, refs[kindOverlayfs.name])); err != nil {
		return err
	}
	got := map[string][]time.Duration{}
	for i := range n + 1 {
		for _, name := range turn([]string{ourSnapshotter, kindOverlayfs.name}, i) {
			took, err := h.crowd(ctx, name, refs[name], workloads[image], crowdSize)
			if err := errors.Join(err, h.clear(ctx)); err != nil {
				return err
			}
			b.say("atonce warm %s %s: %s s", image, name, seconds(took))
			if i > 0 {
				got[name] = append(got[name], took)
			}
		}
	}
	if err := h.remote(ctx); err != nil {
		return err
	}
	ours, theirs := got[ourSnapshotter], got[kindOverlayfs.name]
	ratio := float64(median(ours)) / float64(median(theirs))
	out.line("| %s | `%s` | %s | %s | %s | %s | %.2f | %.2f | <= %.2f %s |", image, workloads[image], seconds(median(ours)), seconds(lowest(ours)),
		seconds(median(theirs)), seconds(lowest(theirs)), ratio, float64(lowest(ours))/float64(lowest(theirs)), crowdTarget, verdict(ratio, crowdTarget))
	record(Figure{measureAtOnce, image, "", systemOurs, formEStargz, "s", pickFrom(ours, time.Duration.Seconds)})
	record(Figure{measureAtOnce, image, "", systemOverlayfs, formPlain, "s", pickFrom(theirs, time.Duration.Seconds)})
	return nil
}

// crowdCold starts a crowd with nothing here.
func (b *bench) crowdCold(ctx context.Context, w *wire, image string, size int) (r crowdRun, err error) {
	h, err := b.host(ctx, w, systemOurs)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, h.close()) }()
	if err := b.dropImages(ctx); err != nil {
		return r, err
	}
	ref := w.ref(image, tagEStargz)
	w.reset()
	start := time.Now()
	if err := h.pull(ctx, ref); err != nil {
		return r, err
	}
	if _, err := h.crowd(ctx, ourSnapshotter, ref, workloads[image], size); err != nil {
		return r, err
	}
	r.took = time.Since(start)
	time.Sleep(time.Second) // what is still on its way
	log := w.rec.Requests()
	r.bytes = w.rec.Totals()[link.Blob].Bytes
	if r.twice, err = twice(log); err != nil {
		return r, err
	}
	if r.mounts, err = h.ours.mounted(); err != nil {
		return r, err
	}
	return r, h.remote(ctx)
}

// exactly is verdict for what may be neither more nor less.
func exactly[T int | int64](got, want T) string {
	if got == want {
		return "reached"
	}
	return "missed"
}

// twice counts the bytes of blobs that came more than once.
func twice(log []link.Request) (n int64, err error) {
	type stretch struct{ from, to int64 }
	came := map[string][]stretch{}
	for _, r := range log {
		if r.Class != link.Blob || r.Method != "GET" || r.Bytes == 0 || r.Status/100 != 2 {
			continue
		}
		var from, to int64
		if r.Range != "" {
			if _, err := fmt.Sscanf(r.Range, "bytes=%d-%d", &from, &to); err != nil {
				return 0, fmt.Errorf("range %q of %s: %w", r.Range, r.Path, err)
			}
		}
		blob := path.Base(r.Path)
		came[blob] = append(came[blob], stretch{from, from + r.Bytes})
	}
	for _, all := range came {
		slices.SortFunc(all, func(a, b stretch) int { return int(a.from - b.from) })
		var end int64
		for _, s := range all {
			n += max(0, min(end, s.to)-s.from)
			end = max(end, s.to)
		}
	}
	return n, nil
}

// mounted is what a daemon has mounted.
type mounted struct{ lower, fuse, erofs int }

func (s *server) mounted() (mounted, error) {
	info, err := os.ReadFile("/proc/self/mountinfo")
	return mountedBelow(string(info), s.root), err
}

// mountedBelow counts the mounts of the daemon of a store: those that containers lie
// on, those served by FUSE, and those that are the kernel's.
func mountedBelow(mountinfo, root string) (m mounted) {
	for line := range strings.Lines(mountinfo) {
		head, tail, _ := strings.Cut(line, " - ")
		f, kind := strings.Fields(head), strings.Fields(tail)
		if len(f) < 5 || len(kind) == 0 || !strings.HasPrefix(f[4], root+"/") {
			continue
		}
		if filepath.Dir(f[4]) == filepath.Join(root, "run", "lower") {
			m.lower++
		}
		switch {
		case kind[0] == "fuse" || strings.HasPrefix(kind[0], "fuse."):
			m.fuse++
		case kind[0] == "erofs":
			m.erofs++
		}
	}
	return m
}
