package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/varvefs/varve/bench/link"
	"github.com/varvefs/varve/daemon"
)

// Of a commit as eStargz.
const (
	commitTarget = 1.5 // times packed
	commitMemory = 200 // MiB

	commitFiles = 20_000
	commitBytes = 1_000_000_000

	packed     = "tar, pigz, sha256sum"
	packedKept = "tar, pigz, tee, sha256sum"
)

// committed is one turn of a way to pack the upper.
type committed struct {
	wall, cpu   time.Duration
	size, raw   int64
	peak, start int64 // RSS of the daemon, bytes
	down        int64 // from the registry
	requests    string
	fetched     int64 // as the daemon counts
}

// packs are the rivals' commands: $0 is the upper, $1 a file. Both are piped
// through all cores.
var packs = map[string]string{
	packed:     `set -o pipefail; tar -C "$0" -c . | pigz | sha256sum`,
	packedKept: `set -o pipefail; tar -C "$0" -c . | pigz | tee "$1" | sha256sum && sync "$1"`,
}

func (b *bench) commit(ctx context.Context, out *section) (err error) {
	if _, err := exec.LookPath("pigz"); err != nil {
		return fmt.Errorf("apt-get install pigz: %w", err)
	}
	if err := b.have(ctx, "large"); err != nil {
		return err
	}
	w, err := b.wire(ctx, link.None)
	if err != nil {
		return err
	}
	defer w.Close()
	s, err := b.fresh(ctx, "commit")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.discard()) }()
	o := daemon.MountOptions{ImageOptions: daemon.ImageOptions{Image: w.image("large"), Insecure: true}, Name: "m", RW: true, Overlay: "kernel"}
	m, err := s.client.Mount(ctx, o)
	if err != nil {
		return err
	}
	defer func() {
		_, uerr := s.client.Unmount(context.WithoutCancel(ctx), daemon.UnmountOptions{Mount: "m", Force: true, Remove: true})
		err = errors.Join(err, uerr)
	}()
	if err := b.fillUpper(ctx, filepath.Join(m.Dir, "work")); err != nil {
		return err
	}
	upper := filepath.Join(m.Upper, "fs")
	kept := filepath.Join(b.dir, "packed")
	defer os.Remove(kept)
	ways := []string{packed, packedKept, "estargz", "gzip", "zstd", "zstd:chunked"}
	got := map[string][]committed{}
	if err := readAll(upper); err != nil {
		return err
	}
	for i := range b.n {
		for _, way := range turn(ways, i) {
			syscall.Sync()
			var c committed
			if script := packs[way]; script != "" {
				c, err = packUpper(ctx, script, upper, kept)
			} else {
				c, err = s.commit(ctx, w, way)
			}
			if err != nil {
				return fmt.Errorf("%s: %w", way, err)
			}
			got[way] = append(got[way], c)
		}
	}
	size, err := os.Stat(kept)
	if err != nil {
		return err
	}
	for _, way := range ways[:2] {
		got[way][0].size = size.Size()
	}
	out.line("`varve commit --compression C m` of a mount of `large`, of which no file was read, as the daemon is asked for it: from the request until the image is in the store. The upper holds %d files of %s MB together, in the page cache: half of the bytes are pieces of the sources of Go with changes, half random, sizes log-normal with a median of %d bytes, the same in every run. The rival is `tar -C UPPER -c . | pigz | sha256sum` of the upper, with all cores, which keeps nothing; *tee* is the same with the blob kept: `| tee FILE | sha256sum && sync FILE`. In turns, with a sync before each, n=%d. *Peak RSS* is the daemon's VmHWM, set back (clear_refs) before each commit, the highest of all turns. *From the registry*: bytes that came down the link during the commits, all turns together, and what `varve_fetch_bytes_total` grew by.", commitFiles, mb(commitBytes), commitMedian, b.n)
	out.line("")
	out.line("| | wall s | least | / (tar, pigz, sha256sum) | by least | target | CPU s | MB/s | blob MB | peak RSS MiB | target | from the registry, bytes | fetched | target |")
	out.line("|---|--:|--:|--:|--:|---|--:|--:|--:|--:|---|--:|--:|---|")
	for _, way := range ways {
		commitLine(out, way, got[way], got[packed])
		b.say("commit %s: ms %s; peak MiB %s, before %s", way, all(got[way], func(c committed) string { return ms(c.wall) }),
			all(got[way], func(c committed) string { return mib(c.peak) }), all(got[way], func(c committed) string { return mib(c.start) }))
	}
	out.line("")
	out.line("Requests during all commits: %s. The layer's tar has %s MB.", requestsOf(got), mb(got["gzip"][0].raw))
	return nil
}

func commitLine(out *section, way string, v, rival []committed) {
	wall := func(c committed) time.Duration { return c.wall }
	mine, theirs := pickFrom(v, wall), pickFrom(rival, wall)
	ratio := float64(median(mine)) / float64(median(theirs))
	least := float64(lowest(mine)) / float64(lowest(theirs))
	var peak, down, fetched int64
	for _, c := range v {
		peak = max(peak, c.peak)
		down += c.down
		fetched += c.fetched
	}
	speed, memory, base := "", "", ""
	if way == "estargz" {
		speed = fmt.Sprintf("<= %.1f %s", commitTarget, verdict(ratio, commitTarget))
		memory = fmt.Sprintf("< %d %s", commitMemory, verdict(float64(peak)/(1<<20), commitMemory))
		base = "0 " + verdict(float64(down+fetched), 0)
	}
	rss, wire, said := "", "", ""
	if packs[way] == "" {
		rss, wire, said = mib(peak), strconv.FormatInt(down, 10), strconv.FormatInt(fetched, 10)
	}
	out.line("| %s | %s | %s | %.2f | %.2f | %s | %s | %.0f | %s | %s | %s | %s | %s | %s |", way, seconds(median(mine)), seconds(lowest(mine)), ratio, least, speed,
		seconds(median(pickFrom(v, func(c committed) time.Duration { return c.cpu }))), commitBytes/1e6/median(mine).Seconds(), mb(v[0].size), rss, memory, wire, said, base)
}

func requestsOf(got map[string][]committed) string {
	for _, v := range got {
		for _, c := range v {
			if c.requests != "" && c.requests != "none" {
				return c.requests
			}
		}
	}
	return "none"
}

// packUpper packs the upper as a rival does.
func packUpper(ctx context.Context, script, upper, kept string) (c committed, err error) {
	cmd := exec.CommandContext(ctx, "bash", "-c", script, upper, kept)
	cmd.Dir = "/"
	start := time.Now()
	if said, err := cmd.CombinedOutput(); err != nil {
		return c, fmt.Errorf("%s: %w: %.300s", script, err, said)
	}
	c.wall = time.Since(start)
	c.cpu = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	return c, nil
}

// commit commits the upper once, as an image without a name.
func (s *server) commit(ctx context.Context, w *wire, compression string) (c committed, err error) {
	before, err := s.fetchedBytes(ctx)
	if err != nil {
		return c, err
	}
	cpu, err := s.cpu()
	if err != nil {
		return c, err
	}
	// 5: reset the peak (proc(5), clear_refs).
	if err := os.WriteFile(s.proc("clear_refs"), []byte("5\n"), 0); err != nil {
		return c, err
	}
	now, err := s.rss()
	if err != nil {
		return c, err
	}
	w.reset()
	start := time.Now()
	got, err := s.client.Commit(ctx, daemon.CommitOptions{Mount: "m", Compression: compression})
	c.wall = time.Since(start)
	if err != nil {
		return c, err
	}
	if got.Entries < commitFiles || got.Raw < commitBytes {
		return c, fmt.Errorf("the layer has %d names and %d bytes, fewer than the upper", got.Entries, got.Raw)
	}
	c.size, c.raw, c.start = got.Size, got.Raw, now.all
	c.down, c.requests = w.moved().Down, w.requests()
	after, err := s.cpu()
	if err != nil {
		return c, err
	}
	c.cpu = after - cpu
	if now, err = s.rss(); err != nil {
		return c, err
	}
	c.peak = now.peak
	c.fetched, err = s.fetchedBytes(ctx)
	c.fetched -= before
	return c, err
}

// fetchedBytes is what the daemon says that it has had from networks.
func (s *server) fetchedBytes(ctx context.Context) (n int64, err error) {
	err = s.metrics(ctx, func(name, _ string, v float64) {
		if strings.HasSuffix(name, "fetch_bytes_total") {
			n += int64(v)
		}
	})
	return n, err
}
