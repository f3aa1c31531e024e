package run

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

func TestFill(t *testing.T) {
	tr, dir := tmpTree(t, map[string]string{"data/a": "one", "data/sub/b": "two", "data/link": "->/etc/passwd", "out": "->../../data", "file": "x"})
	must(t, os.Link(filepath.Join(dir, "data/a"), filepath.Join(dir, "data/hard")))
	must(t, os.Chmod(filepath.Join(dir, "data/sub"), 0o700))
	must(t, os.Chmod(filepath.Join(dir, "data"), 0o1777))
	must(t, os.Chmod(filepath.Join(dir, "data/a"), 0o640))
	for _, plain := range []bool{false, true} {
		if !plain && os.Geteuid() != 0 {
			continue // who may not give files away
		}
		top := t.TempDir()
		vol, err := place{source: "name", dest: "/out"}.fill(tr, top, plain)
		must(t, err)
		if vol != filepath.Join(top, "name/_data") {
			t.Errorf("the volume is in %s", vol)
		}
		for name, want := range map[string]string{"a": "one", "hard": "one", "sub/b": "two"} {
			if got, err := os.ReadFile(filepath.Join(vol, name)); string(got) != want {
				t.Errorf("%s: %q, %v", name, got, err)
			}
		}
		if to, err := os.Readlink(filepath.Join(vol, "link")); to != "/etc/passwd" {
			t.Errorf("link: %q, %v", to, err)
		}
		for name, want := range map[string]os.FileMode{"sub": 0o700, "a": 0o640, ".": 0o777} {
			if fi, err := os.Stat(filepath.Join(vol, name)); err != nil || fi.Mode().Perm() != want {
				t.Errorf("%s: %v, %v", name, fi.Mode(), err)
			}
		}
		if !plain {
			var a, b unix.Stat_t
			must(t, errors.Join(unix.Stat(filepath.Join(vol, "a"), &a), unix.Stat(filepath.Join(vol, "hard"), &b)))
			if a.Ino != b.Ino {
				t.Error("a hard link became a file of its own")
			}
		}
		// What is there stays, also when the image has changed.
		must(t, os.WriteFile(filepath.Join(vol, "a"), []byte("mine"), 0o600))
		_, err = place{source: "name", dest: "/data/sub"}.fill(tr, top, plain)
		must(t, err)
		if got, _ := os.ReadFile(filepath.Join(vol, "a")); string(got) != "mine" {
			t.Errorf("a used volume was filled again: %q", got)
		}
		// What was not finished is made again.
		must(t, os.WriteFile(filepath.Join(top, "name/filling"), nil, 0o600))
		_, err = place{source: "name", dest: "/data/sub"}.fill(tr, top, plain)
		must(t, err)
		if left, _ := os.ReadDir(vol); len(left) != 1 || left[0].Name() != "b" {
			t.Errorf("an unfinished volume: %v", left)
		}
	}
}

func TestFillNothing(t *testing.T) {
	tr, _ := tmpTree(t, map[string]string{"data/a": "one", "file": "x"})
	for _, p := range []place{{dest: "/none"}, {dest: "/data", noCopy: true}} {
		vol, err := p.fill(tr, t.TempDir(), true)
		must(t, err)
		if is, err := isEmpty(vol); !is {
			t.Errorf("%+v: not empty: %v", p, err)
		}
	}
	if _, err := (place{dest: "/file"}).fill(tr, t.TempDir(), true); err == nil || !strings.Contains(err.Error(), "copy the image's /file into its volume: not a directory") {
		t.Errorf("a volume over a file: %v", err)
	}
}

// TestFillTogether has containers that share a volume begin at once.
func TestFillTogether(t *testing.T) {
	files := map[string]string{}
	for i := range 200 {
		files["data/"+strings.Repeat("x", i+1)] = strings.Repeat("y", i)
	}
	tr, _ := tmpTree(t, files)
	top := t.TempDir()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			vol, err := place{source: "shared", dest: "/data"}.fill(tr, top, true)
			if err != nil {
				t.Error(err)
				return
			}
			if all, err := os.ReadDir(vol); len(all) != 200 {
				t.Errorf("%d files when it is full, %v", len(all), err)
			}
		})
	}
	wg.Wait()
}
