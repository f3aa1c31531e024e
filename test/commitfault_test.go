package test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/bench/forms"
)

// TestCommitKilled kills the daemon in the middle of a commit.
func TestCommitKilled(t *testing.T) {
	withBoth(t, func(t *testing.T, overlay string) {
		l, _ := small(t, 3, 10_000)
		_, ref := serve(t, forms.EStargz, l)
		h := newHost(t)
		h.env = append(h.env, "SOURCE_DATE_EPOCH=1700000000")
		dir := h.writable(overlay, "w", ref)
		large := content("large", 8<<20)
		for i := range 4 {
			put(t, filepath.Join(dir, "etc", itoa(i)), string(large[i:]))
		}
		must(t, os.Remove(filepath.Join(dir, "etc/hostname")))
		before := readTree(t, dir)
		pid := h.pid()
		fd := mustGet[int](t)(pidfdOpen(pid))
		defer unix.Close(fd)
		cmd := h.command("commit", "w", "app:1")
		var errs bytes.Buffer
		cmd.Stderr = &errs
		must(t, cmd.Start())
		blobs := filepath.Join(h.root, "state/images/blobs")
		half := func() (n int64) {
			names, _ := os.ReadDir(blobs)
			for _, e := range names {
				if st, err := e.Info(); err == nil && !e.IsDir() {
					n += st.Size()
				}
			}
			return n
		}
		for deadline := time.Now().Add(time.Minute); half() == 0; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("no layer was begun")
			}
		}
		must(t, unix.Kill(pid, unix.SIGKILL))
		must(t, waitGone(fd))
		if err := cmd.Wait(); err == nil {
			t.Fatal("the commit ended before the daemon was killed")
		} else if !strings.HasPrefix(errs.String(), "varve: ") {
			t.Errorf("the command ended with %v: %q", err, &errs)
		}
		if n := half(); n == 0 {
			t.Error("the daemon had finished its layer")
		}

		if out := h.status("w"); !strings.HasPrefix(out, "Up ") {
			t.Errorf("the mount is %q", out)
		}
		must(t, filepath.WalkDir(filepath.Join(h.root, "state/images"), func(p string, d fs.DirEntry, err error) error {
			if strings.Contains(d.Name(), "tmp") || strings.HasPrefix(d.Name(), ".") {
				t.Errorf("left: %s", p)
			}
			return err
		}))
		if n := half(); n != 0 {
			t.Errorf("%d bytes of a layer are left", n)
		}
		h.fails(3, "mount", "--pull", "never", "app:1")
		sameTree(t, before, readTree(t, dir))
		h.commit("w", "app:1")
		again := h.ok("mount", "--wait", "--name", "again", "app:1")
		sameAgain(t, dir, again)
		h.ok("umount", "-a")
	})
}

// TestCommitWhileWriting commits while somebody writes. Where the daemon is the
// writer, what is committed is one moment; where the kernel is, that or a refusal.
func TestCommitWhileWriting(t *testing.T) {
	withBoth(t, func(t *testing.T, overlay string) {
		l, _ := small(t, 3, 10_000)
		_, ref := serve(t, forms.EStargz, l)
		h := newHost(t)
		dir := h.writable(overlay, "w", ref)
		// Each step writes a before b: so no moment has b ahead of a, or a by more
		// than one step. The files change their lengths, so that nobody can read
		// one half old, half new.
		at := [2]string{filepath.Join(dir, "etc/a"), filepath.Join(dir, "etc/b")}
		write := func(n int) error {
			for _, p := range at {
				if err := os.WriteFile(p+".new", []byte(strings.Repeat("x", 1000+n)), 0o644); err != nil {
					return err
				}
				if err := os.Rename(p+".new", p); err != nil {
					return err
				}
			}
			return nil
		}
		must(t, write(0))
		stop := make(chan struct{})
		var writer sync.WaitGroup
		end := sync.OnceFunc(func() { close(stop); writer.Wait() })
		defer end()
		writer.Go(func() {
			for n := 1; ; n = (n + 1) % 5000 {
				select {
				case <-stop:
					return
				default:
				}
				if err := write(n); err != nil {
					t.Errorf("write while it is committed: %v", err)
					return
				}
			}
		})
		committed := 0
		for range 3 {
			r := h.run("commit", "w", "app:paused")
			if r.code == 7 && overlay == "kernel" && strings.Contains(r.err, "--no-pause") && r.out == "" {
				continue
			}
			if r.code != 0 {
				t.Fatal(r)
			}
			committed++
			top := topLayers(t, h.made(isDigest(t, strings.TrimSpace(r.out))), 1)[0]
			entries := tarOf(t, string(top))
			// Names only rename brings are whole; .new may be in the middle.
			a, b := len(entries["etc/a"].content), len(entries["etc/b"].content)
			if a < 1000 || b < 1000 || a-b > 1 || b-a > 0 && a != 1000 {
				t.Errorf("a moment at which a was at %d and b at %d", a-1000, b-1000)
			}
		}
		if committed == 0 && overlay == "fuse" {
			t.Error("nothing could be committed")
		}
		h.commit("--no-pause", "w", "app:running")
		end()
		dir = h.ok("mount", "--wait", "--name", "running", "app:running")
		list(t, dir)
		h.commit("w", "app:quiet")
		h.ok("umount", "-a")
	})
}

// TestCommitCancelled is interrupted by whoever asked for it.
func TestCommitCancelled(t *testing.T) {
	needRoot(t)
	l, _ := small(t, 3, 10_000)
	_, ref := serve(t, forms.EStargz, l)
	h := newHost(t)
	dir := h.writable("kernel", "w", ref)
	large := content("large", 8<<20)
	for i := range 4 {
		put(t, filepath.Join(dir, "etc", itoa(i)), string(large[i:]))
	}
	cmd := h.command("commit", "w", "app:1")
	must(t, cmd.Start())
	blobs := filepath.Join(h.root, "state/images/blobs")
	temps := func() (n int) {
		names, _ := os.ReadDir(blobs)
		for _, e := range names {
			if !e.IsDir() {
				n++
			}
		}
		return n
	}
	for deadline := time.Now().Add(time.Minute); temps() == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("no layer was begun")
		}
	}
	must(t, cmd.Process.Signal(unix.SIGINT))
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != 130 {
		t.Errorf("an interrupted commit ends with %v", err)
	}
	for deadline := time.Now().Add(time.Minute); temps() > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the unfinished layer stays")
		}
	}
	h.fails(3, "mount", "--pull", "never", "app:1")
	h.ok("umount", "w")
}
