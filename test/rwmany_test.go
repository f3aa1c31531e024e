package test

import (
	"archive/tar"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/bench/forms"
)

// TestInodeNumbers looks at what identifies a file before and after it is copied
// up, given more names, and forgotten by the kernel.
func TestInodeNumbers(t *testing.T) {
	withBoth(t, func(t *testing.T, overlay string) {
		l, names := small(t, 3, 5000)
		_, ref := serve(t, forms.EStargz, l)
		h := newHost(t)
		dir := h.writable(overlay, "n", ref)
		id := func(name string) string {
			t.Helper()
			var st unix.Stat_t
			must(t, unix.Lstat(filepath.Join(dir, name), &st))
			return fmt.Sprintf("%x:%d", st.Dev, st.Ino)
		}
		want := map[string]string{}
		for _, n := range append(names, "files", "etc/hostname") {
			want[n] = id(n)
		}
		same := func(when string) {
			t.Helper()
			for n, w := range want {
				if got := id(n); got != w {
					t.Errorf("%s: %s is %s, was %s", when, n, got, w)
				}
			}
		}
		appendTo(t, filepath.Join(dir, names[0]), "more")
		must(t, os.Chmod(filepath.Join(dir, names[1]), 0o600))
		must(t, os.Link(filepath.Join(dir, names[2]), filepath.Join(dir, "etc/second")))
		must(t, os.Chmod(filepath.Join(dir, "files"), 0o700))
		want["etc/second"] = want[names[2]]
		same("copied up")
		must(t, os.Rename(filepath.Join(dir, names[0]), filepath.Join(dir, "moved")))
		want["moved"] = want[names[0]]
		delete(want, names[0])
		same("renamed")
		must(t, os.WriteFile("/proc/sys/vm/drop_caches", []byte("2"), 0))
		same("looked up anew")
		h.ok("umount", dir)
	})
}

// TestManyWriters replaces files by rename from many goroutines while others read
// them: each is always one that somebody wrote, whole.
func TestManyWriters(t *testing.T) {
	withBoth(t, func(t *testing.T, overlay string) {
		l := newLayer(t)
		l.dir("a", "b")
		payload := func(seed int) string {
			body := string(content(itoa(seed), 500+seed*37%20_000))
			return sumOf([]byte(body)) + body
		}
		var names []string
		for i := range 12 {
			names = append(names, fmt.Sprintf("%c/%d", 'a'+i%2, i))
			l.file(names[i], []byte(payload(i)))
		}
		_, ref := serve(t, forms.EStargz, l.bytes())
		h := newHost(t)
		dir := h.writable(overlay, "n", ref)
		whole := func(name string) {
			b, err := os.ReadFile(filepath.Join(dir, name))
			if errors.Is(err, os.ErrNotExist) {
				return
			}
			if err != nil || len(b) < 64 || sumOf(b[64:]) != string(b[:64]) {
				t.Errorf("%s: %d bytes of nobody's, %v", name, len(b), err)
			}
		}
		var writers, readers sync.WaitGroup
		for w := range 4 {
			writers.Go(func() {
				r := rand.New(rand.NewPCG(uint64(w), 1))
				for i := range 200 {
					name := filepath.Join(dir, names[r.IntN(len(names))])
					tmp := filepath.Join(dir, fmt.Sprintf("%c/tmp-%d-%d", 'a'+r.IntN(2), w, i))
					err := os.WriteFile(tmp, []byte(payload(w*1000+i)), 0o644)
					switch {
					case err != nil:
					case i%9 == 8:
						os.Remove(name)
						err = os.Link(tmp, name)
						if errors.Is(err, os.ErrExist) {
							err = nil
						}
						err = errors.Join(err, os.Remove(tmp))
					default:
						err = os.Rename(tmp, name)
					}
					if err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		done := make(chan struct{})
		for range 2 {
			readers.Go(func() {
				for i := 0; ; i++ {
					select {
					case <-done:
						return
					default:
						whole(names[i%len(names)])
						os.ReadDir(filepath.Join(dir, "a"))
					}
				}
			})
		}
		writers.Wait()
		close(done)
		readers.Wait()
		before := readTree(t, dir)
		for p := range before {
			if strings.Contains(p, "tmp-") {
				t.Errorf("%s is left", p)
			}
		}
		h.ok("umount", "n")
		h.ok("mount", "--name", "n")
		sameTree(t, before, readTree(t, dir))
		for _, n := range names {
			whole(n)
		}
		if strings.Contains(h.logText(), "level=ERROR") {
			t.Error("the daemon logged an error")
		}
		h.ok("umount", "--rm", "n")
	})
}

// TestReaddirUnderChange reads a directory of the image in pieces while names in
// it come and go: what was there all the time is seen once.
func TestReaddirUnderChange(t *testing.T) {
	withBoth(t, func(t *testing.T, overlay string) {
		const n = 1000
		l := newLayer(t)
		l.dir("d")
		for i := range n {
			l.file(fmt.Sprintf("d/%04d", i), nil)
		}
		_, ref := serve(t, forms.EStargz, l.bytes())
		h := newHost(t)
		dir := filepath.Join(h.writable(overlay, "n", ref), "d")
		put(t, filepath.Join(dir, "upper"), "")
		f, err := os.Open(dir)
		must(t, err)
		seen := map[string]int{}
		removed := map[string]bool{}
		for i := 0; ; i++ {
			names, _ := f.Readdirnames(150)
			if len(names) == 0 {
				break
			}
			for k, name := range names {
				seen[name]++
				if k%3 == 0 && name[0] <= '9' && !removed[name] {
					must(t, os.Remove(filepath.Join(dir, name)))
					removed[name] = true
				}
			}
			put(t, filepath.Join(dir, fmt.Sprintf("new-%d", i)), "")
			ahead := fmt.Sprintf("%04d", n-1-i)
			if !removed[ahead] {
				must(t, os.Remove(filepath.Join(dir, ahead)))
				removed[ahead] = true
			}
		}
		must(t, f.Close())
		for i := range n {
			name := fmt.Sprintf("%04d", i)
			if seen[name] > 1 || seen[name] == 0 && !removed[name] {
				t.Errorf("%s was seen %d times", name, seen[name])
			}
		}
		if seen["upper"] != 1 {
			t.Errorf("a name of the upper was seen %d times", seen["upper"])
		}
		list, err := os.ReadDir(dir)
		must(t, err)
		for _, e := range list {
			if removed[e.Name()] {
				t.Errorf("%s was removed and is listed", e.Name())
			}
		}
		// All of it goes, and may come again as something else.
		must(t, os.RemoveAll(dir))
		missing(t, dir)
		must(t, os.Mkdir(dir, 0o755))
		if list, _ := os.ReadDir(dir); len(list) != 0 {
			t.Errorf("the new directory shows %d names of the old", len(list))
		}
		h.ok("umount", "n")
		h.ok("mount", "--name", "n")
		if list, _ := os.ReadDir(dir); len(list) != 0 {
			t.Errorf("mounted again, it shows %d names of the old", len(list))
		}
		h.ok("umount", "n")
	})
}

// TestRunsWhatWasWritten executes programs of the image and of the upper.
func TestRunsWhatWasWritten(t *testing.T) {
	withBoth(t, func(t *testing.T, overlay string) {
		bin, err := os.ReadFile(child)
		must(t, err)
		l := newLayer(t)
		l.file("hello", []byte("hello"))
		l.dir("bin")
		l.add(tar.Header{Typeflag: tar.TypeReg, Name: "bin/child", Mode: 0o755}, bin)
		_, ref := serve(t, forms.EStargz, l.bytes())
		h := newHost(t)
		dir := h.writable(overlay, "n", ref)
		run := func(name string) {
			t.Helper()
			for _, verb := range []string{"sum", "mmap"} {
				out, err := fromMount(filepath.Join(dir, name), verb, filepath.Join(dir, "hello")).Output()
				if err != nil || strings.TrimSpace(string(out)) != sumOf([]byte("hello")) {
					t.Errorf("%s %s: %q %v %s", name, verb, out, err, stderrOf(err))
				}
			}
		}
		run("bin/child")
		must(t, os.WriteFile(filepath.Join(dir, "copied"), bin, 0o755))
		run("copied")
		running := fromMount(filepath.Join(dir, "copied"), "hold", filepath.Join(dir, "hello"))
		in, err := running.StdinPipe()
		must(t, err)
		out, err := running.StdoutPipe()
		must(t, err)
		must(t, running.Start())
		_, err = out.Read(make([]byte, 5))
		must(t, err)
		if f, err := os.OpenFile(filepath.Join(dir, "copied"), os.O_WRONLY, 0); !errors.Is(err, unix.ETXTBSY) {
			t.Errorf("a program that runs can be written to: %v", err)
			f.Close()
		}
		in.Close()
		running.Wait()
		appendTo(t, filepath.Join(dir, "bin/child"), "what follows a program is nothing to it")
		run("bin/child")
		must(t, os.Rename(filepath.Join(dir, "copied"), filepath.Join(dir, "bin/child")))
		run("bin/child")
		h.ok("umount", dir)
		h.ok("mount", "--name", "n")
		run("bin/child")
		h.ok("umount", "--rm", dir)
	})
}

// TestWritableDescriptors mounts, edits and unmounts many times: the daemon must
// not come to hold more.
func TestWritableDescriptors(t *testing.T) {
	withBoth(t, func(t *testing.T, overlay string) {
		l, names := small(t, 30, 5000)
		_, ref := serve(t, forms.EStargz, l)
		h := newHost(t)
		cycle := func() {
			dir := h.writable(overlay, "n", ref)
			for i, name := range names {
				appendTo(t, filepath.Join(dir, name), "more")
				sub := filepath.Join(dir, "new", itoa(i))
				must(t, os.MkdirAll(sub, 0o755))
				put(t, filepath.Join(sub, "file"), "x")
				if i%2 == 0 {
					must(t, os.RemoveAll(sub))
					must(t, os.Remove(filepath.Join(dir, name)))
				}
			}
			h.ok("diff", "n")
			h.ok("commit", "--dry-run", "n")
			h.ok("umount", "--rm", "n")
		}
		cycle()
		before := h.descriptors()
		for range 4 {
			cycle()
		}
		// What the HTTP client and server keep open comes and goes.
		if after := h.descriptors(); after > before+1 {
			t.Errorf("%d descriptors, %d before", after, before)
		}
		if n := h.uppers(); n != 0 {
			t.Errorf("%d uppers are left", n)
		}
	})
}
