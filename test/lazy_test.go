package test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/varvefs/varve/bench/forms"
)

// list walks a mount without reading a file, as `ls -lR` does.
func list(t *testing.T, dir string) (names int) {
	t.Helper()
	must(t, filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err == nil {
			_, err = d.Info()
			names++
		}
		return err
	}))
	return names
}

// asked compares the requests since the last call with what is wanted.
func asked(t *testing.T, what string, got, want map[string]int) {
	t.Helper()
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%s: requests %v, want %v", what, got, want)
	}
}

var nothing = map[string]int{}

func TestOnlyWhatIsRead(t *testing.T) {
	needRoot(t)
	for _, form := range []forms.Form{forms.EStargz, forms.ZstdChunked, forms.ZstdChunkedContainers} {
		for _, face := range faces {
			t.Run(string(form)+"/"+face, func(t *testing.T) { onlyWhatIsRead(t, form, face) })
		}
	}
}

func onlyWhatIsRead(t *testing.T, form forms.Form, face string) {
	a, names := small(t, 200, 50_000)
	upper := newLayer(t)
	upper.dir("more")
	upper.file("more/file", content("more", 200_000))
	r := newRegistry(t)
	img := build(t, form, a, upper.bytes())
	ref := r.push("lazy/image:1", img)
	h := newHost(t)

	dir := h.ok("mount", "--prefetch", "none", "--face", face, ref)
	list(t, dir)
	got, ranges := r.requests(img)
	if got["ping"] > 1 || got["blob"] > 4 {
		t.Errorf("mount and list of two layers: requests %v", got)
	}
	delete(got, "ping")
	delete(got, "blob")
	asked(t, "mount and list", got, map[string]int{"manifest": 1, "config": 1})
	for _, q := range ranges {
		if q.Range == "" {
			t.Errorf("a table of contents was asked for without a range: %v", q)
		}
	}

	// One small file: one range, not much larger than the file.
	if sum, want := helper(t, "sum", filepath.Join(dir, names[100])), sumOf(content(names[100], 50_000)); sum != want {
		t.Errorf("%s has digest %s, want %s", names[100], sum, want)
	}
	got, ranges = r.requests(img)
	asked(t, "read of a file", got, map[string]int{"blob": 1})
	if n := ranges[0].Bytes; n > 1<<20 {
		t.Errorf("a file of 50 kB took %d bytes", n)
	}
	helper(t, "sum", filepath.Join(dir, names[100]))
	got, _ = r.requests(img)
	asked(t, "second read", got, nothing)

	h.ok("umount", dir)
	dir = h.ok("mount", "--prefetch", "none", "--face", face, ref)
	list(t, dir)
	got, _ = r.requests(img)
	asked(t, "second mount", got, nothing)

	h.stop()
	h.ok("ps")
	list(t, dir)
	helper(t, "sum", filepath.Join(dir, names[100]))
	got, _ = r.requests(img)
	asked(t, "mount brought back by a new daemon", got, nothing)

	if n := len(strings.Split(h.ok("ls", ref, "/files"), "\n")); n != 200 {
		t.Errorf("ls shows %d names", n)
	}
	got, _ = r.requests(img)
	asked(t, "ls", got, nothing)
	cat := h.run("cat", ref, "/more/file")
	if cat.code != 0 || cat.out != string(content("more", 200_000)) {
		t.Errorf("cat gave %d bytes, exit %d: %s", len(cat.out), cat.code, cat.err)
	}
	got, _ = r.requests(img)
	// A new daemon has no session with the registry yet.
	delete(got, "ping")
	asked(t, "cat", got, map[string]int{"blob": 1})
	h.ok("umount", dir)
}

func TestLookWithoutMount(t *testing.T) {
	needRoot(t)
	a, names := small(t, 50, 30_000)
	r := newRegistry(t)
	img := build(t, forms.EStargz, a)
	ref := r.push("look/image:1", img)
	h := newHost(t)
	if got := h.ok("ls", ref, "/etc"); got != "hostname" {
		t.Errorf("ls: %q", got)
	}
	got, _ := r.requests(img)
	if got["blob"] > 2 || got["manifest"] != 1 || got["config"] != 1 {
		t.Errorf("ls: requests %v", got)
	}
	if got := h.ok("cat", ref, "etc/hostname", names[3]); got != "varve\n"+string(content(names[3], 30_000)) {
		t.Errorf("cat gave %d bytes", len(got))
	}
	got, _ = r.requests(img)
	if got["blob"] > 2 || got["manifest"] != 0 {
		t.Errorf("cat: requests %v", got)
	}
	if len(h.mounts()) > 0 {
		t.Errorf("ls and cat mounted something: %v", h.mounts())
	}
}

func TestOffline(t *testing.T) {
	needRoot(t)
	for _, face := range faces {
		t.Run(face, func(t *testing.T) {
			a, names := small(t, 200, 50_000)
			r := newRegistry(t)
			img := build(t, forms.EStargz, a)
			ref := r.push("lazy/offline:1", img)
			h := newHost(t)
			if line := h.fails(3, "mount", "--offline", ref); !strings.Contains(line, "No such image") {
				t.Errorf("unknown image: %s", line)
			}
			dir := h.ok("mount", "--prefetch", "none", "--face", face, ref)
			helper(t, "sum", filepath.Join(dir, names[0]))
			h.ok("umount", dir)
			r.settled()
			r.requests(img)

			dir = h.ok("mount", "--offline", "--face", face, ref)
			list(t, dir)
			if got := helper(t, "sum", filepath.Join(dir, names[0])); got != sumOf(content(names[0], 50_000)) {
				t.Errorf("%s: digest %s", names[0], got)
			}
			if _, err := os.ReadFile(filepath.Join(dir, names[150])); !errors.Is(err, syscall.EIO) {
				t.Errorf("a file whose bytes are missing: %v, want EIO", err)
			}
			got, _ := r.requests(img)
			asked(t, "offline", got, nothing)
			if !h.inspect(dir).Offline {
				t.Error("inspect does not say that the mount is offline")
			}
			h.ok("umount", dir)
		})
	}
}

func TestRegistryAway(t *testing.T) {
	needRoot(t)
	for _, face := range faces {
		t.Run(face, func(t *testing.T) {
			a, names := small(t, 50, 50_000)
			r, ref := serve(t, forms.EStargz, a)
			h := newHost(t)
			dir := h.ok("mount", "--face", face, ref)
			want := helper(t, "sum", filepath.Join(dir, names[7]))
			r.close()
			if n := list(t, dir); n != 54 {
				t.Errorf("%d names", n)
			}
			again := h.ok("mount", "--face", face, "--name", "again", ref)
			for _, d := range []string{dir, again} {
				if got := helper(t, "sum", filepath.Join(d, names[7])); got != want {
					t.Errorf("%s: digest %s, want %s", d, got, want)
				}
			}
			h.stop()
			h.ok("ps")
			if got := helper(t, "sum", filepath.Join(again, names[7])); got != want {
				t.Errorf("after a restart: digest %s, want %s", got, want)
			}
			h.ok("umount", "--all")
		})
	}
}

// TestOnceForAll has many processes read the same cold file.
func TestOnceForAll(t *testing.T) {
	needRoot(t)
	for _, face := range faces {
		t.Run(face, func(t *testing.T) {
			l := newLayer(t)
			l.file("large", content("large", 9<<20))
			r := newRegistry(t)
			img := build(t, forms.EStargz, l.bytes())
			ref := r.push("lazy/once:1", img)
			h := newHost(t)
			dir := h.ok("mount", "--face", face, ref)
			r.requests(img)
			want := sumOf(content("large", 9<<20))
			var wg sync.WaitGroup
			for range 32 {
				wg.Go(func() {
					if got := helper(t, "sum", filepath.Join(dir, "large")); got != want {
						t.Errorf("digest %s, want %s", got, want)
					}
				})
			}
			wg.Wait()
			_, ranges := r.requests(img)
			seen := map[string]bool{}
			var sum int64
			for _, q := range ranges {
				if seen[q.Range] {
					t.Errorf("the range %s was asked for twice", q.Range)
				}
				seen[q.Range] = true
				sum += q.Bytes
			}
			m := h.inspect(dir)
			if sum > m.Size || !m.Layers[0].Whole {
				t.Errorf("%d bytes came for a layer of %d, whole: %v", sum, m.Size, m.Layers[0].Whole)
			}
			h.ok("umount", dir)
		})
	}
}

// TestHolesAreNotZeroes reads what is missing while the registry gives nothing.
func TestHolesAreNotZeroes(t *testing.T) {
	needRoot(t)
	for _, face := range faces {
		t.Run(face, func(t *testing.T) {
			l := newLayer(t)
			l.file("a", content("a", 100_000))
			_, ref := serve(t, forms.EStargz, l.bytes())
			h := newHost(t)
			h.ok("umount", h.ok("mount", ref))
			dir := h.ok("mount", "--offline", "--face", face, ref)
			b, err := os.ReadFile(filepath.Join(dir, "a"))
			if !errors.Is(err, syscall.EIO) || bytes.Contains(b, make([]byte, 64)) {
				t.Errorf("%d bytes, %v: want EIO", len(b), err)
			}
			h.ok("umount", dir)
		})
	}
}
