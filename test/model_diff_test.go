package test

import (
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// sameDiff holds what `varve diff` says against the two trees.
//
// What it must say is what can be seen. What it may say besides are files that
// are in the upper and have become again what the image has, and with them the
// directories they lie in: the upper alone cannot tell.
func (m *model) sameDiff(name string, base, now tree) {
	m.t.Helper()
	want := deltas(base, now)
	got := map[string]string{}
	for line := range strings.SplitSeq(m.h.ok("diff", name), "\n") {
		if kind, p, ok := strings.Cut(line, " /"); ok {
			if got[p] != "" {
				m.t.Errorf("diff names %q twice", p)
			}
			got[p] = kind
		}
	}
	extra := map[string]bool{}
	for p, kind := range got {
		if want[p] == kind {
			continue
		}
		if want[p] != "" || kind != "C" {
			m.t.Errorf("diff says %s of %q, want %q", kind, p, want[p])
			continue
		}
		extra[p] = true
	}
	for p, kind := range want {
		if got[p] == "" {
			m.t.Errorf("diff does not say %s of %q: it was %+v, is %+v", kind, p, base[p], now[p])
		}
	}
	upper := filepath.Join(m.h.inspect(name).Upper, "fs")
	for p := range extra {
		if _, err := os.Lstat(filepath.Join(upper, p)); err != nil {
			m.t.Errorf("diff says C of %q, which is not in the upper: %v", p, err)
		}
		if now[p].mode&unix.S_IFMT != unix.S_IFDIR {
			continue
		}
		// A directory only for what is in it.
		below := func(q string) bool { return strings.HasPrefix(q, p+"/") }
		if !slices.ContainsFunc(keys(extra), below) && !slices.ContainsFunc(keys(want), below) {
			m.t.Errorf("diff says C of %q, in which nothing changed", p)
		}
	}
	m.check("diff")
}

func keys[V any](m map[string]V) (ks []string) {
	for k := range m {
		ks = append(ks, k)
	}
	return ks
}

// deltas is docker's A, C and D of two trees: of what is gone only the top; of
// what changed, the directories on the way to it as well, except the root.
func deltas(base, now tree) map[string]string {
	out := map[string]string{}
	isDir := func(n node) bool { return n.mode&unix.S_IFMT == unix.S_IFDIR }
	for p, n := range now {
		b, was := base[p]
		n.nsec, b.nsec = 0, 0 // as a layer keeps times
		n.links, b.links = "", ""
		if isDir(n) && isDir(b) {
			n.sec, b.sec = 0, 0
		}
		if n.mode&unix.S_IFMT == unix.S_IFREG && b.mode&unix.S_IFMT == unix.S_IFREG && n.sum == b.sum && n.size == b.size {
			n.sum, b.sum = "", ""
		}
		switch {
		case p == ".":
		case !was:
			out[p] = "A"
		case n != b:
			out[p] = "C"
		}
	}
	for p := range base {
		if _, ok := now[p]; !ok && isDir(now[path.Dir(p)]) {
			out[p] = "D"
		}
	}
	for _, p := range keys(out) {
		for d := path.Dir(p); d != "."; d = path.Dir(d) {
			if out[d] == "" {
				out[d] = "C"
			}
		}
	}
	return out
}
