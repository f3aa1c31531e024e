package test

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/varvefs/varve/bench/forms"
)

// TestNeighbours reads small files beside which others lie that the kernel would read
// ahead: they are fetched when they are read, and are in the profile of a start only if
// they were, though a start that has them here gets them from the page cache.
func TestNeighbours(t *testing.T) {
	needRoot(t)
	for _, face := range faces {
		t.Run(face, func(t *testing.T) {
			const size = 5000 // two blocks
			l, names := small(t, 200, size)
			r := newRegistry(t)
			img := build(t, forms.EStargz, l)
			ref := r.push("team/neighbours:1", img)
			h := newHost(t)
			read := func(dir string, which ...int) {
				t.Helper()
				for _, i := range which {
					if got := helper(t, "sum", filepath.Join(dir, names[i])); got != sumOf(content(names[i], size)) {
						t.Errorf("%s has digest %s", names[i], got)
					}
				}
			}
			profiled := func() (got []string) {
				for _, f := range h.shown(ref).Files {
					got = append(got, strings.TrimPrefix(f.Path, "/"))
				}
				return got
			}

			dir := h.ok("mount", "--prefetch", "none", "--face", face, ref)
			r.settled()
			r.requests(img)
			read(dir, 50, 120, 51)
			r.settled()
			asked, ranges := r.requests(img)
			var bytes int64
			for _, q := range ranges {
				bytes += q.Bytes
			}
			if asked["blob"] != 3 || bytes > 3*(size+500) {
				t.Errorf("%d requests, %d bytes for 3 files of %d: %v", asked["blob"], bytes, size, ranges)
			}
			h.ok("umount", dir)
			if want := []string{names[50], names[120], names[51]}; !slices.Equal(profiled(), want) {
				t.Errorf("profile show: %v, want %v", profiled(), want)
			}

			// Where all that a start needs is here, its profile may only grow.
			dir = h.ok("mount", "--face", face, ref)
			read(dir, 50, 51, 52, 120)
			h.ok("umount", dir)
			got := slices.Sorted(slices.Values(profiled()))
			if want := []string{names[50], names[51], names[52], names[120]}; !slices.Equal(got, want) {
				t.Errorf("profile show after another start: %v, want %v", got, want)
			}
		})
	}
}

// TestNeighbourOfALongFile reads a file to its end, where the kernel reads ahead from
// the next one's first byte on.
func TestNeighbourOfALongFile(t *testing.T) {
	needRoot(t)
	for _, face := range faces {
		t.Run(face, func(t *testing.T) {
			const size = 4<<16 - 100 // the next file begins where windows of 64 KiB end
			l, names := small(t, 4, size)
			r := newRegistry(t)
			img := build(t, forms.EStargz, l)
			ref := r.push("team/long:1", img)
			h := newHost(t)
			dir := h.ok("mount", "--prefetch", "none", "--face", face, ref)
			r.settled()
			r.requests(img)
			if got := helper(t, "sum", filepath.Join(dir, names[1])); got != sumOf(content(names[1], size)) {
				t.Errorf("%s has digest %s", names[1], got)
			}
			r.settled()
			if asked, ranges := r.requests(img); asked["blob"] != 1 {
				t.Errorf("%d requests for one file: %v", asked["blob"], ranges)
			}
			h.ok("umount", dir)
			if got := h.shown(ref).Files; len(got) != 1 || got[0].Path != "/"+names[1] || got[0].Bytes != size {
				t.Errorf("profile show: %+v", got)
			}
		})
	}
}
