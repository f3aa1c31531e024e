package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/varvefs/varve/bench/link"
	"github.com/varvefs/varve/daemon"
)

// The ways to have all of an image.
const (
	wayMount      = "varve mount --wait"
	wayCrane      = "crane export, sha256sum"
	wayContainerd = "containerd, pulled and unpacked"
)

// passTargets are ours in proportion to the rival's.
var passTargets = map[string]float64{wayCrane: 1.1, wayContainerd: 0.7}

// passed is one turn.
type passed struct {
	wall, cpu time.Duration
	down      int64
}

func (b *bench) pass(ctx context.Context, out *section) error {
	for _, tool := range []string{"crane", "containerd", "ctr"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("apt-get install containerd and go install github.com/google/go-containerregistry/cmd/crane@latest: %w", err)
		}
	}
	w, err := b.wire(ctx, link.None)
	if err != nil {
		return err
	}
	defer w.Close()
	out.line("The first mount of an image whose layers have no index, so that each is read whole: `varve mount --wait` as a daemon with an empty store is asked for it, until the mount answers. Points and names are made on the way and kept, contents are written to the store, digests and diffIDs proven. Beside it `crane export IMAGE - | sha256sum`, which keeps nothing, and on the datacenter link `ctr image pull --plain-http --snapshotter overlayfs` by a containerd (%s) with an empty root, alone on its socket, without CRI; ctr fetches all layers and unpacks them then. In turns over the same link, with a sync before each, n=%d. CPU: of the daemon; of the pipe; of ctr and containerd with the `unpigz` that it starts where there is one. *ours / rival* by medians.", b.containerdVersion(ctx), b.n)
	out.line("")
	out.line("| link | image | way | wall s | least | ours / rival | by least | target | CPU s | MB down | link alone s |")
	out.line("|---|---|---|--:|--:|--:|--:|---|--:|--:|--:|")
	for _, image := range b.imagesOr("python", "node") {
		if err := b.copied(ctx, repoUnindexed, image); err != nil {
			return err
		}
		for _, p := range []link.Profile{link.None, link.Datacenter} {
			w.link.SetProfile(p)
			ways := []string{wayMount, wayCrane}
			if p == link.Datacenter {
				ways = append(ways, wayContainerd)
			}
			got := map[string][]passed{}
			for i := range b.n {
				for _, way := range turn(ways, i) {
					t, err := b.passBy(ctx, w, way, repoUnindexed+image)
					if err != nil {
						return fmt.Errorf("%s of %s: %w", way, image, err)
					}
					got[way] = append(got[way], t)
				}
			}
			for _, way := range ways {
				passLine(out, p, image, way, got)
				b.say("pass %s %s %s: ms %s; CPU ms %s", p.Name, image, way, all(got[way], func(t passed) string { return ms(t.wall) }),
					all(got[way], func(t passed) string { return ms(t.cpu) }))
			}
		}
	}
	return nil
}

func passLine(out *section, p link.Profile, image, way string, got map[string][]passed) {
	wall := func(t passed) time.Duration { return t.wall }
	v, ours := pickFrom(got[way], wall), pickFrom(got[wayMount], wall)
	ratio, least, target := "", "", ""
	if want := passTargets[way]; want > 0 {
		r := float64(median(ours)) / float64(median(v))
		ratio, least = fmt.Sprintf("%.2f", r), fmt.Sprintf("%.2f", float64(lowest(ours))/float64(lowest(v)))
		target = fmt.Sprintf("<= %.1f %s", want, verdict(r, want))
	}
	down := median(pickFrom(got[way], func(t passed) int64 { return t.down }))
	alone := ""
	if p.Rate > 0 {
		alone = fmt.Sprintf("%.3f", float64(down)/float64(p.Rate))
	}
	out.line("| %s | %s | %s | %s | %s | %s | %s | %s | %s | %s | %s |", p.Name, image, way, seconds(median(v)), seconds(lowest(v)), ratio, least, target,
		seconds(median(pickFrom(got[way], func(t passed) time.Duration { return t.cpu }))), mb(down), alone)
}

func (b *bench) passBy(ctx context.Context, w *wire, way, repo string) (t passed, err error) {
	ref := w.ref(repo, tagPlain)
	switch way {
	case wayMount:
		return b.passMount(ctx, w, ref)
	case wayCrane:
		return passCrane(ctx, w, ref)
	}
	return b.passContainerd(ctx, w, ref)
}

func (b *bench) passMount(ctx context.Context, w *wire, ref string) (t passed, err error) {
	s, err := b.fresh(ctx, "pass")
	if err != nil {
		return t, err
	}
	defer func() { err = errors.Join(err, s.discard()) }()
	syscall.Sync()
	w.reset()
	before, err := s.cpu()
	if err != nil {
		return t, err
	}
	start := time.Now()
	m, err := s.client.Mount(ctx, daemon.MountOptions{ImageOptions: daemon.ImageOptions{Image: ref, Insecure: true}, Name: "m", Wait: true})
	if err != nil {
		return t, err
	}
	t.wall = time.Since(start)
	t.down = w.moved().Down
	defer func() { err = errors.Join(err, s.unmount(context.WithoutCancel(ctx))) }()
	after, err := s.cpu()
	if err != nil {
		return t, err
	}
	t.cpu = after - before
	for _, l := range m.Layers {
		if !l.Whole {
			return t, fmt.Errorf("layer %.19s was not read whole (%s)", l.Digest, l.Reason)
		}
	}
	names, err := os.ReadDir(m.Dir)
	if err == nil && len(names) == 0 {
		err = fmt.Errorf("%s is empty", m.Dir)
	}
	return t, err
}

func passCrane(ctx context.Context, w *wire, ref string) (t passed, err error) {
	cmd := exec.CommandContext(ctx, "bash", "-c", `set -o pipefail; crane export "$0" - | sha256sum`, ref)
	cmd.Dir = "/"
	syscall.Sync()
	w.reset()
	start := time.Now()
	said, err := cmd.CombinedOutput()
	t.wall = time.Since(start)
	if err != nil {
		return t, fmt.Errorf("%w: %.300s", err, said)
	}
	if f := strings.Fields(string(said)); len(f) == 0 || len(f[0]) != 64 {
		return t, fmt.Errorf("no digest but %.300q", said)
	}
	t.cpu, t.down = cmd.ProcessState.UserTime()+cmd.ProcessState.SystemTime(), w.moved().Down
	return t, nil
}

func (b *bench) passContainerd(ctx context.Context, w *wire, ref string) (t passed, err error) {
	c, err := b.containerd(ctx, "")
	if err != nil {
		return t, err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	syscall.Sync()
	w.reset()
	before, err := c.cpu()
	if err != nil {
		return t, err
	}
	cmd := c.ctr(ctx, "image", "pull", "--plain-http", "--snapshotter", "overlayfs", ref)
	start := time.Now()
	said, err := cmd.CombinedOutput()
	t.wall = time.Since(start)
	if err != nil {
		return t, fmt.Errorf("%w: %.500s", err, said)
	}
	after, err := c.cpu()
	if err != nil {
		return t, err
	}
	t.cpu = after - before + cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	t.down = w.moved().Down
	return t, nil
}
