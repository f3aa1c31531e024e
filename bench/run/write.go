package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// writeTargets are speeds in proportion to the rival's.
var writeTargets = map[string]float64{"varve kernel": 0.9, "varve fuse": 1.5}

// wrote is one turn at one work.
type wrote struct {
	wall  time.Duration
	cpu   time.Duration // the command's, and the daemon's that served it
	synch time.Duration // of a sync after it
}

// task is a work that a union is put to. All are done in one mount, in order, each
// with what the ones before it left.
type task struct {
	name, note string
	argv       func(dir string) []string
	prepare    func(dir string) error // before the sync that all work begins with; may be nil
	fio        bool                   // it says itself how long it took
	reads      bool                   // it leaves nothing for the disk, and has no target for the kernel writer
	cold       bool                   // without caches
	times      int                    // in a turn, 0 for once
}

func (b *bench) write(ctx context.Context, out *section) (err error) {
	for _, tool := range []string{"fio", "git", "tar", "mkfs.ext4", "fuse-overlayfs"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("apt-get install fio git tar e2fsprogs fuse-overlayfs: %w", err)
		}
	}
	src, err := b.sources(ctx)
	if err != nil {
		return err
	}
	if err := b.have(ctx, "large"); err != nil {
		return err
	}
	plain, err := b.tree(ctx)
	if err != nil {
		return err
	}
	s, err := b.fresh(ctx, "write")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.discard()) }()
	unions := s.contenders(b.registry+"/large:"+tagEStargz, plain)
	tasks := src.tasks()
	got := map[string][]wrote{}
	for i := range b.n {
		for _, c := range turn(unions, i) {
			if err := b.taskAll(ctx, c, tasks, got); err != nil {
				return fmt.Errorf("%s: %w", c.name, err)
			}
		}
	}
	out.line("`varve mount --rw --overlay kernel|fuse` of `large`; overlayfs as `mount -t overlay` and Debian's `fuse-overlayfs` (%s) have the same tree, %s, as a plain directory on ext4 for their lower; all as root, with default options. All uppers lie on an ext4 of their own, in a file, made anew for each mount. The four take turns, who begins changes; in a turn each mounts with an empty upper and does all works in this order, with a sync before each. Wall time, n=%d; *speed* is the rival's time / ours, of overlayfs for the kernel writer, of fuse-overlayfs for the fuse writer. *on disk*: with the sync after it. CPU is the command's and its daemon's.", version(ctx, "fuse-overlayfs"), b.sizeOf(ctx, plain), b.n)
	out.line("")
	for _, t := range tasks {
		argv := strings.ReplaceAll(strings.Join(t.argv("DIR"), " "), b.dir, "SCRATCH")
		out.line("- *%s*: `%s`%s", t.name, argv, t.note)
	}
	out.line("")
	out.line("| work | on | wall s | least | speed | by least | target | CPU s | least | on disk s |")
	out.line("|---|---|--:|--:|--:|--:|---|--:|--:|--:|")
	for _, t := range tasks {
		for _, c := range unions {
			writeLine(out, t, c, got)
			b.say("%s %s: ms %s", t.name, c.name, all(got[t.name+c.name], func(w wrote) string { return ms(w.wall) }))
		}
	}
	return b.copyUp(ctx, s, out)
}

func writeLine(out *section, t task, c contender, got map[string][]wrote) {
	wall := func(w wrote) time.Duration { return w.wall }
	v := got[t.name+c.name]
	mine := pickFrom(v, wall)
	speed, least, target := "", "", ""
	if c.rival != "" {
		theirs := pickFrom(got[t.name+c.rival], wall)
		ratio := float64(median(theirs)) / float64(median(mine))
		speed = fmt.Sprintf("%.2f", ratio)
		least = fmt.Sprintf("%.2f", float64(lowest(theirs))/float64(lowest(mine)))
		if want := writeTargets[c.name]; want > 1 || !t.reads {
			target = fmt.Sprintf(">= %.1f %s", want, atLeast(ratio, want))
		}
	}
	cpu := pickFrom(v, func(w wrote) time.Duration { return w.cpu })
	disk := ""
	if !t.reads {
		disk = seconds(median(pickFrom(v, func(w wrote) time.Duration { return w.wall + w.synch })))
	}
	out.line("| %s | %s | %s | %s | %s | %s | %s | %s | %s | %s |", t.name, c.name, seconds(median(mine)), seconds(lowest(mine)), speed, least, target,
		seconds(median(cpu)), seconds(lowest(cpu)), disk)
}

func pickFrom[T, V any](v []T, f func(T) V) []V {
	var s []V
	for _, x := range v {
		s = append(s, f(x))
	}
	return s
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.3f", d.Seconds()) }

// atLeast is verdict for what shall be large.
func atLeast(got, want float64) string { return verdict(-got, -want) }

// taskAll puts one union to all works, once.
func (b *bench) taskAll(ctx context.Context, c contender, tasks []task, got map[string][]wrote) (err error) {
	d := disk{b}
	upper, err := d.open(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.close()) }()
	dir, err := c.open(ctx, upper)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.close(context.WithoutCancel(ctx))) }()
	for _, t := range tasks {
		for range max(t.times, 1) {
			w, err := c.do(ctx, t, dir)
			if err != nil {
				return fmt.Errorf("%s: %w", t.name, err)
			}
			got[t.name+c.name] = append(got[t.name+c.name], w)
		}
	}
	return nil
}

func (c contender) do(ctx context.Context, t task, dir string) (w wrote, err error) {
	if t.prepare != nil {
		if err := t.prepare(dir); err != nil {
			return w, err
		}
	}
	syscall.Sync()
	if t.cold {
		if err := dropCaches(); err != nil {
			return w, err
		}
	}
	before, err := c.cpu()
	if err != nil {
		return w, err
	}
	argv := t.argv(dir)
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), gitEnv...)
	var text, said strings.Builder
	if t.fio {
		cmd.Stdout = &text
	}
	cmd.Stderr = &said
	start := time.Now()
	if err := cmd.Run(); err != nil {
		return w, fmt.Errorf("%v: %w: %.300s", argv, err, said.String())
	}
	w.wall = time.Since(start)
	after, err := c.cpu()
	if err != nil {
		return w, err
	}
	w.cpu = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime() + after - before
	start = time.Now()
	syscall.Sync()
	w.synch = time.Since(start)
	if t.fio {
		w.wall, err = fioTime(text.String())
	}
	return w, err
}

// fioTime reads from fio's report how long its writes took, and the fsync after
// them.
func fioTime(report string) (time.Duration, error) {
	var r struct {
		Jobs []struct {
			Error   int `json:"error"`
			Runtime int `json:"job_runtime"` // ms
			Write   struct {
				IOs int `json:"total_ios"`
			} `json:"write"`
		} `json:"jobs"`
	}
	if i := strings.IndexByte(report, '{'); i > 0 {
		report = report[i:] // notes come before it
	}
	if err := json.Unmarshal([]byte(report), &r); err != nil {
		return 0, fmt.Errorf("fio's report: %w: %.200s", err, report)
	}
	if len(r.Jobs) != 1 || r.Jobs[0].Error != 0 || r.Jobs[0].Write.IOs != fioBlocks || r.Jobs[0].Runtime == 0 {
		return 0, fmt.Errorf("fio did not do its work: %.400s", report)
	}
	return time.Duration(r.Jobs[0].Runtime) * time.Millisecond, nil
}

// sources is what is written, made once and kept.
type sources struct{ tar, repo string }

const fioBlocks = 64 << 10 // of 4 KiB

// tasks are the works in their order.
func (s *sources) tasks() []task {
	read := func(string) error { return errors.Join(readAll(s.tar), readAll(s.repo)) }
	fio := func(more ...string) func(string) []string {
		return func(dir string) []string {
			return append([]string{"fio", "--name=w", "--filename=" + filepath.Join(dir, "fio"), "--size=256m", "--rw=randwrite", "--bs=4k",
				"--ioengine=psync", "--numjobs=1", "--randseed=7", "--invalidate=0", "--fallocate=none", "--output-format=json"}, more...)
		}
	}
	find := func(dir string) []string { return []string{"find", dir} }
	return []task{
		{name: "untar", note: ", the Go tree, its tar in the page cache", prepare: func(dir string) error {
			return errors.Join(read(dir), os.Mkdir(filepath.Join(dir, "untar"), 0o755))
		}, argv: func(dir string) []string { return []string{"tar", "-xf", s.tar, "-C", filepath.Join(dir, "untar")} }},
		{name: "git clone", note: ", the sources of Go in one commit and one pack, in the page cache", prepare: read, argv: func(dir string) []string {
			return []string{"git", "clone", "--quiet", "--no-hardlinks", s.repo, filepath.Join(dir, "clone")}
		}},
		{name: "random writes", note: ", each block of a file of 256 MiB once; it was written and synced before, and is in the page cache; as long as fio itself says", fio: true, prepare: func(dir string) error {
			return fill(filepath.Join(dir, "fio"), fioBlocks*4096)
		}, argv: fio()},
		{name: "random writes, fsync", note: ", once more, with one fsync at the end", fio: true, argv: fio("--end_fsync=1")},
		{name: "find cold", note: ", image, Go tree and clone, after drop_caches=3", argv: find, reads: true, cold: true},
		{name: "find warm", note: fmt.Sprintf(", the %d that follow each", warmPerCold), argv: find, reads: true, times: warmPerCold},
	}
}

// fill writes a file of bytes that no file system takes for a hole.
func fill(path string, size int64) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	block := []byte(strings.Repeat("varve. ", 1<<17))
	for at := int64(0); at < size; at += int64(len(block)) {
		if _, err := f.Write(block[:min(size-at, int64(len(block)))]); err != nil {
			return err
		}
	}
	return errors.Join(f.Sync(), f.Close())
}

// readAll brings all files below a path into the page cache.
func readAll(path string) error {
	return filepath.WalkDir(path, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.Copy(io.Discard, f)
		return err
	})
}
