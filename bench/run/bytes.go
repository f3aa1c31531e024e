package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/varvefs/varve/bench/link"
)

// workloads are those of the corpus: images.txt beside its script.
var workloads = map[string]string{
	"debian": `true`,
	"python": `python3 -c "import numpy; print(numpy.zeros(3))"`,
	"node":   `cd /app && node web.js`,
	"nginx":  `/app/nginx.sh`,
	"redis":  `/app/redis.sh`,
	"jdk":    `java -version && java -cp /app Hello`,
	"gcc":    `gcc -O1 -o /tmp/hello /app/hello.c && /tmp/hello`,
	"large":  `python3 /app/large.py`,
}

// corpus is all of them.
var corpus = []string{"debian", "python", "node", "nginx", "redis", "jdk", "gcc", "large"}

// inside runs a workload with an overlay over the mount as its root. What it
// mounts goes with its mount namespace, what it starts with its process
// namespace. $0 is a scratch directory, $1 the mount, $2 the workload.
const inside = `set -e
mount -t tmpfs tmpfs "$0"
mkdir "$0/upper" "$0/work" "$0/root"
mount -t overlay overlay -o "lowerdir=$1,upperdir=$0/upper,workdir=$0/work" "$0/root"
mount -t proc proc "$0/root/proc"
mount --rbind /dev "$0/root/dev"
exec chroot "$0/root" /bin/sh -c "$2"`

// wired is what one run of a workload brought over the wire.
type wired struct {
	down, blobs, fetched int64
	requests             string
	took                 time.Duration
}

func (b *bench) bytes(ctx context.Context, out *section) error {
	if _, err := exec.LookPath("strace"); err != nil {
		return fmt.Errorf("strace says what a workload touches: apt-get install strace: %w", err)
	}
	w, err := b.wire(ctx, link.None)
	if err != nil {
		return err
	}
	defer w.Close()
	out.line("A new daemon on an empty store mounts the image, and the workload of the corpus runs once in a chroot on an overlay (upper on tmpfs) over the mount; the link is not shaped. *wire*: all that came down the link from the mount until a second after the end, headers and the manifest too. *touched*: the compressed chunks of each distinct regular file of the image that is opened or executed after the chroot, as strace shows in a run of its own, by the TOCs as the estargz library reads them, so whole files. *TOCs*: tables of contents and footers of all layers, exactly. Target: (wire - TOCs) / touched at most 1.15, and with it wire / (1.15 touched + TOCs) at most 1. Median of n=%d.", b.n)
	out.line("")
	out.line("| image | files | touched MB | TOCs MB | face | wire MB | least | blob bodies MB | fetched, as varve says MB | (wire - TOCs) / touched | wire / (1.15 touched + TOCs) | target | requests | wall s |")
	out.line("|---|--:|--:|--:|---|--:|--:|--:|--:|--:|--:|---|---|--:|")
	for _, image := range b.imagesOr(corpus...) {
		if workloads[image] == "" {
			return fmt.Errorf("%s is no image of the corpus with a workload", image)
		}
		if err := b.have(ctx, image); err != nil {
			return err
		}
		t, err := b.touches(ctx, w, image)
		if err != nil {
			return fmt.Errorf("%s under strace: %w", image, err)
		}
		runs := map[string][]wired{}
		for range b.n {
			for _, face := range faces {
				r, err := b.wiredBy(ctx, w, image, face)
				if err != nil {
					return fmt.Errorf("%s, %s face: %w", image, face, err)
				}
				runs[face] = append(runs[face], r)
			}
		}
		for _, face := range faces {
			of := func(f func(wired) int64) []int64 {
				var s []int64
				for _, r := range runs[face] {
					s = append(s, f(r))
				}
				return s
			}
			down := of(func(r wired) int64 { return r.down })
			wire := median(down)
			ratio := float64(wire-t.tocs) / float64(t.bytes)
			out.line("| %s | %d | %s | %s | %s | %s | %s | %s | %s | %.2f | %.2f | %s | %s | %.2f |", image, t.files, mb(t.bytes), mb(t.tocs), face,
				mb(wire), mb(lowest(down)), mb(median(of(func(r wired) int64 { return r.blobs }))), mb(median(of(func(r wired) int64 { return r.fetched }))),
				ratio, float64(wire)/(1.15*float64(t.bytes)+float64(t.tocs)), verdict(ratio, 1.15), runs[face][0].requests,
				time.Duration(median(of(func(r wired) int64 { return int64(r.took) }))).Seconds())
			b.say("bytes %s %s: wire MB %s", image, face, all(down, mb))
		}
	}
	return nil
}

// wiredBy runs a workload once, cold.
func (b *bench) wiredBy(ctx context.Context, w *wire, image, face string) (r wired, err error) {
	s, err := b.fresh(ctx, "bytes")
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, s.discard()) }()
	w.reset()
	start := time.Now()
	m, err := s.mount(ctx, w.image(image), face)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, s.unmount(context.WithoutCancel(ctx))) }()
	if err := b.work(ctx, nil, m.Dir, workloads[image]); err != nil {
		return r, err
	}
	r.took = time.Since(start)
	time.Sleep(time.Second) // what is still on its way
	r.down, r.blobs, r.requests = w.moved().Down, w.rec.Totals()[link.Blob].Bytes, w.requests()
	v, err := s.client.Inspect(ctx, m.ID)
	r.fetched = v.Fetched
	return r, err
}

// work runs a workload over a mount. It is unshare(1) that is started here and
// chroot(1) that executes from the mount: this process, whose threads stand still
// while a child execs, runs the link that the exec waits for.
func (b *bench) work(ctx context.Context, prefix []string, dir, workload string) error {
	scratch, err := os.MkdirTemp(b.dir, "root-")
	if err != nil {
		return err
	}
	defer os.Remove(scratch)
	argv := append(append([]string{}, prefix...), "unshare", "--mount", "--pid", "--fork", "--kill-child", "--", "sh", "-c", inside, scratch, dir, workload)
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C"}
	said, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %.500s", workload, err, said)
	}
	b.say("  %s: %.200q", workload, strings.TrimSpace(string(said)))
	return nil
}

// touches runs a workload under strace and sums what it touches.
func (b *bench) touches(ctx context.Context, w *wire, image string) (t touched, err error) {
	s, err := b.fresh(ctx, "touch")
	if err != nil {
		return t, err
	}
	defer func() { err = errors.Join(err, s.discard()) }()
	m, err := s.mount(ctx, w.image(image), "auto")
	if err != nil {
		return t, err
	}
	defer func() { err = errors.Join(err, s.unmount(context.WithoutCancel(ctx))) }()
	trace := filepath.Join(b.dir, "trace-"+image)
	prefix := []string{"strace", "-f", "-y", "-qq", "-s", "4096", "-o", trace, "-e", "trace=execve,execveat,open,openat,openat2,chroot"}
	if err := b.work(ctx, prefix, m.Dir, workloads[image]); err != nil {
		return t, err
	}
	f, err := os.Open(trace)
	if err != nil {
		return t, err
	}
	defer f.Close()
	names, err := namesIn(f, m.Dir)
	if err != nil {
		return t, err
	}
	return b.weigh(ctx, image, names)
}
