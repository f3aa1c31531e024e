package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/varvefs/varve/bench/link"
)

func TestLowerBound(t *testing.T) {
	for _, c := range []struct {
		p    link.Profile
		want time.Duration
	}{
		{link.Edge, 150*time.Millisecond + 2*time.Second},
		{link.Datacenter, 3*time.Millisecond + 100*time.Millisecond},
	} {
		if got := lowerBound(c.p, touched{bytes: 12_500_000}); got != c.want {
			t.Errorf("at %s: %s, want %s", c.p.Name, got, c.want)
		}
	}
}

func TestLazy(t *testing.T) {
	pulled := []link.Request{{Path: "/v2/a/blobs/toc", Range: "", Bytes: wholeLayer}, {Path: "/v2/a/blobs/b", Range: "bytes=0-99", Bytes: wholeLayer + 1}}
	if err := lazy(way{}, pulled); err != nil {
		t.Error(err)
	}
	pulled = append(pulled, link.Request{Path: "/v2/a/blobs/c", Bytes: wholeLayer + 1})
	if err := lazy(way{}, pulled); err == nil || !strings.Contains(err.Error(), "blobs/c") {
		t.Errorf("a layer that was fetched whole: %v", err)
	}
	if err := lazy(way{full: true}, pulled); err != nil {
		t.Errorf("a full pull: %v", err)
	}
}

func TestStartVerdicts(t *testing.T) {
	runs := func(took, cpu time.Duration, down int64) []startRun {
		return []startRun{{took: took, cpu: cpu, down: down}}
	}
	got := map[string][]startRun{
		"varve: estargz":                         runs(7*time.Second, time.Second, 0),
		"varve: estargz, profile":                runs(2900*time.Millisecond, time.Second, 16_000_000),
		"stargz-snapshotter: estargz":            runs(10*time.Second, 4*time.Second, 0),
		"stargz-snapshotter: estargz, optimised": runs(4*time.Second, 4*time.Second, 0),
		"overlayfs: gzip":                        runs(20*time.Second, 0, 0),
	}
	// B is 2.15 s.
	touches := touched{bytes: 12_500_000, tocs: 2_000_000}
	for _, c := range []struct {
		p    link.Profile
		want []string
	}{
		{link.Edge, []string{"0.70 | <= 0.60 missed", "0.25 | <= 0.50 reached", "0.25 | <= 0.50 reached", "0.94 | <= 1.00 reached", "1.12 | <= 1.15 reached"}},
		{link.Datacenter, []string{"0.14 | <= 0.20 reached", "0.72 | <= 1.00 reached", "0.25 | <= 0.50 reached"}},
	} {
		var out section
		startVerdicts(&out, c.p, "python", touches, got)
		var said []string
		for line := range strings.Lines(out.String()) {
			f := strings.Split(strings.Trim(line, "| \n"), " | ")
			said = append(said, strings.Join(f[len(f)-2:], " | "))
		}
		if d := cmp.Diff(c.want, said); d != "" {
			t.Errorf("at %s (-want +got):\n%s", c.p.Name, d)
		}
	}
}

func TestRivalsFind(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"containerd", "ctr", "runc", "soci"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir)
	r := rivals{soci: noRival}
	if err := r.find(); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{filepath.Join(dir, "containerd"), filepath.Join(dir, "ctr"), filepath.Join(dir, "runc"), "", ""},
		[]string{r.containerd, r.ctr, r.runtime, r.soci, r.stargz}); d != "" {
		t.Errorf("found (-want +got):\n%s", d)
	}
	if r.lazyStargz() || r.full() != systemOverlayfs {
		t.Errorf("with containerd alone: stargz %v, full pull by %s", r.lazyStargz(), r.full())
	}
	r = rivals{stargz: filepath.Join(dir, "nothing")}
	if err := r.find(); err == nil {
		t.Error("a path that names no program was taken")
	}
}
