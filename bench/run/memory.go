package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/varvefs/varve/bench/link"
)

// rss is the memory of a daemon, in bytes.
type rss struct{ all, anon, file, shmem, peak int64 }

// held is what a daemon holds after a mount and a walk.
type held struct {
	mounted, walked, collected, restored rss
	heapAlloc, heapInuse                 int64 // after a forced collection
	files                                uint64
	mappings                             []mapping
}

type mapping struct {
	what string
	rss  int64
}

// rssTargets are MiB after a cold mount and a walk.
var rssTargets = map[string]float64{"kernel": 32, "fuse": 40}

func (b *bench) memory(ctx context.Context, out *section) error {
	w, err := b.wire(ctx, link.None)
	if err != nil {
		return err
	}
	defer w.Close()
	images := []string{"large", "debian"}
	got := map[string][]held{}
	for _, image := range images {
		if err := b.have(ctx, image); err != nil {
			return err
		}
	}
	for range b.n {
		for _, image := range images {
			for _, face := range faces {
				h, err := b.heldBy(ctx, w, image, face)
				if err != nil {
					return err
				}
				got[image+face] = append(got[image+face], h)
			}
		}
	}
	out.line("A new daemon on an empty store mounts the image, TOCs from the network, and `ls -lR` walks it once; MiB, medians of n=%d. *collected*: after two forced garbage collections, which a daemon does not do by itself. *restarted*: a daemon that brings the mount back from the store, walked once.", b.n)
	out.line("")
	out.line("| image | face | RSS mounted | RSS walked | anon | file | shmem | peak | target | RSS collected | RSS restarted |")
	out.line("|---|---|--:|--:|--:|--:|--:|--:|---|--:|--:|")
	for _, image := range images {
		for _, face := range faces {
			v := got[image+face]
			of := func(f func(held) int64) int64 {
				var s []int64
				for _, h := range v {
					s = append(s, f(h))
				}
				return median(s)
			}
			walked := of(func(h held) int64 { return h.walked.all })
			target := ""
			if image == "large" {
				target = fmt.Sprintf("<= %.0f %s", rssTargets[face], verdict(float64(walked)/(1<<20), rssTargets[face]))
			}
			out.line("| %s | %s | %s | %s | %s | %s | %s | %s | %s | %s | %s |", image, face, mib(of(func(h held) int64 { return h.mounted.all })), mib(walked),
				mib(of(func(h held) int64 { return h.walked.anon })), mib(of(func(h held) int64 { return h.walked.file })),
				mib(of(func(h held) int64 { return h.walked.shmem })), mib(of(func(h held) int64 { return h.walked.peak })), target,
				mib(of(func(h held) int64 { return h.collected.all })), mib(of(func(h held) int64 { return h.restored.all })))
			b.say("memory %s %s: walked MiB %s", image, face, all(v, func(h held) string { return mib(h.walked.all) }))
		}
	}
	out.line("")
	b.perFile(got, out)
	out.line("")
	out.line("RSS by mapping after the walk, `large`, the last turn:")
	out.line("")
	out.line("| face | mapping | MiB |")
	out.line("|---|---|--:|")
	for _, face := range faces {
		v := got["large"+face]
		for _, m := range v[len(v)-1].mappings {
			out.line("| %s | %s | %s |", face, m.what, mib(m.rss))
		}
	}
	return nil
}

// perFile sets the heaps of two images side by side.
func (b *bench) perFile(got map[string][]held, out *section) {
	out.line("**Heap for each file**: Go heap after forced collections, `large` less `debian`, divided by the files that it has more; what six layers take over one is in it. Target: at most 8 bytes.")
	out.line("")
	out.line("| face | files | heap alloc KiB large / debian | heap in use KiB large / debian | bytes a file, alloc | bytes a file, in use | target |")
	out.line("|---|--:|--:|--:|--:|--:|---|")
	for _, face := range faces {
		l, d := got["large"+face], got["debian"+face]
		m := func(v []held, f func(held) int64) int64 {
			var s []int64
			for _, h := range v {
				s = append(s, f(h))
			}
			return median(s)
		}
		alloc, inuse := func(h held) int64 { return h.heapAlloc }, func(h held) int64 { return h.heapInuse }
		files := int64(l[0].files - d[0].files)
		per := func(f func(held) int64) float64 { return float64(m(l, f)-m(d, f)) / float64(files) }
		out.line("| %s | %d - %d | %d / %d | %d / %d | %.2f | %.2f | %s |", face, l[0].files, d[0].files, m(l, alloc)>>10, m(d, alloc)>>10,
			m(l, inuse)>>10, m(d, inuse)>>10, per(alloc), per(inuse), verdict(per(alloc), 8))
	}
}

func (b *bench) heldBy(ctx context.Context, w *wire, image, face string) (h held, err error) {
	s, err := b.fresh(ctx, "memory")
	if err != nil {
		return h, err
	}
	defer func() { err = errors.Join(err, s.discard()) }()
	m, err := s.mount(ctx, w.image(image), face)
	if err != nil {
		return h, err
	}
	h.files = m.Files
	if h.mounted, err = s.rss(); err != nil {
		return h, err
	}
	if err := listAll(ctx, m.Dir); err != nil {
		return h, err
	}
	if h.walked, err = s.rss(); err != nil {
		return h, err
	}
	if h.mappings, err = s.mappings(); err != nil {
		return h, err
	}
	// Twice: a sync.Pool is empty after the second.
	for range 2 {
		profile, err := s.get(ctx, "/debug/pprof/heap?gc=1")
		if err == nil {
			err = os.WriteFile(filepath.Join(b.dir, "heap-"+image+"-"+face+".pb.gz"), profile, 0o644)
		}
		if err != nil {
			return h, err
		}
	}
	if h.heapAlloc, h.heapInuse, err = s.heap(ctx); err != nil {
		return h, err
	}
	if h.collected, err = s.rss(); err != nil {
		return h, err
	}
	if err := s.stop(); err != nil {
		return h, err
	}
	if s, err = s.again(ctx); err != nil {
		return h, err
	}
	// The socket may answer before the mounts are back.
	if err := s.back(ctx); err != nil {
		return h, err
	}
	if err := listAll(ctx, m.Dir); err != nil {
		return h, err
	}
	if h.restored, err = s.rss(); err != nil {
		return h, err
	}
	return h, s.unmount(ctx)
}

func listAll(ctx context.Context, dir string) error {
	cmd := exec.CommandContext(ctx, "ls", "-lR", dir)
	cmd.Dir = "/"
	return cmd.Run()
}

// heap reads what the Go runtime says of its heap.
func (s *server) heap(ctx context.Context) (alloc, inuse int64, err error) {
	err = s.metrics(ctx, func(name, _ string, v float64) {
		switch name {
		case "go_memstats_heap_alloc_bytes":
			alloc = int64(v)
		case "go_memstats_heap_inuse_bytes":
			inuse = int64(v)
		}
	})
	return alloc, inuse, err
}

func (s *server) proc(name string) string { return procOf(s.cmd.Process.Pid, name) }

func procOf(pid int, name string) string { return filepath.Join("/proc", strconv.Itoa(pid), name) }

func (s *server) rss() (rss, error) { return rssOf(s.cmd.Process.Pid) }

func rssOf(pid int) (r rss, err error) {
	text, err := os.ReadFile(procOf(pid, "status"))
	if err != nil {
		return r, err
	}
	into := map[string]*int64{"VmRSS:": &r.all, "RssAnon:": &r.anon, "RssFile:": &r.file, "RssShmem:": &r.shmem, "VmHWM:": &r.peak}
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) == 3 && into[f[0]] != nil {
			kib, err := strconv.ParseInt(f[1], 10, 64)
			if err != nil {
				return r, err
			}
			*into[f[0]] = kib << 10
		}
	}
	return r, nil
}

// mappings sums RSS by what is mapped, largest first, those under 256 KiB
// together.
func (s *server) mappings() (out []mapping, err error) {
	f, err := os.Open(s.proc("smaps"))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	sums, what := map[string]int64{}, ""
	for sc := bufio.NewScanner(f); sc.Scan(); {
		v := strings.Fields(sc.Text())
		switch {
		case strings.Contains(v[0], "-"): // from-to perms offset dev inode [path]
			what = s.label(v)
		case v[0] == "Rss:":
			kib, err := strconv.ParseInt(v[1], 10, 64)
			if err != nil {
				return nil, err
			}
			sums[what] += kib << 10
		}
	}
	for what, n := range sums {
		if n < 256<<10 {
			sums["others"] += n
			continue
		}
		if what != "others" {
			out = append(out, mapping{what, n})
		}
	}
	out = append(out, mapping{"others", sums["others"]})
	slices.SortFunc(out, func(a, b mapping) int { return int(b.rss - a.rss) })
	return out, nil
}

// label names a mapping of the program by its rights, one of the store by its
// place there.
func (s *server) label(v []string) string {
	path := strings.Join(v[5:], " ")
	switch {
	case path == s.bench.varve:
		return "program " + v[1]
	case strings.HasPrefix(path, s.root+"/"):
		parts := strings.Split(path[len(s.root)+1:], "/")
		for i, p := range parts {
			if len(p) > 32 {
				parts[i] = "DIGEST" + filepath.Ext(p)
			}
		}
		return "store " + strings.Join(parts, "/")
	case path == "":
		return "unnamed anonymous"
	}
	return path
}

// back waits until a daemon that was started again has its mount back.
func (s *server) back(ctx context.Context) error {
	for {
		m, err := s.client.Inspect(ctx, "m")
		if err == nil && m.State == "mounted" {
			return nil
		}
		if err == nil && m.Error != "" {
			return errors.New(m.Error)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err := pause(ctx); err != nil {
			return err
		}
	}
}
