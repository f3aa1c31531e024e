package test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/varvefs/varve/bench/forms"
)

// TestRestart ends the daemon in order and by force, at rest and while somebody
// reads: its mounts come back with the next verb, with the same ids.
func TestRestart(t *testing.T) {
	needRoot(t)
	for _, face := range faces {
		t.Run(face, func(t *testing.T) { restart(t, face) })
	}
}

func restart(t *testing.T, face string) {
	l, names := small(t, 100, 50_000)
	_, ref := serve(t, forms.EStargz, l)
	h := newHost(t)
	own := filepath.Join(h.root, "own dir") // the kernel's list writes a blank as \040
	must(t, os.Mkdir(own, 0o755))
	h.ok("mount", "--face", face, ref)
	h.ok("mount", "--face", face, "--name", "other", ref, own)
	dirs := []string{filepath.Join(h.root, "run/mnt/image"), own}
	before := h.ok("ps", "--no-trunc", "--format", "{{.ID}} {{.Names}} {{.Mountpoint}} {{.Face}} {{.CreatedAt}}")
	next := 0
	check := func(what string) {
		t.Helper()
		if after := h.ok("ps", "--no-trunc", "--format", "{{.ID}} {{.Names}} {{.Mountpoint}} {{.Face}} {{.CreatedAt}}"); after != before {
			t.Errorf("%s: mounts\n%s, before\n%s", what, after, before)
		}
		lines := strings.Join(h.mounts(), "")
		for _, dir := range dirs {
			if n := strings.Count(lines, " "+strings.ReplaceAll(dir, " ", `\040`)+" "); n != 1 {
				t.Errorf("%s: %d mounts at %s", what, n, dir)
			}
			name := names[next]
			next++
			if got := helper(t, "sum", filepath.Join(dir, name)); got != sumOf(content(name, 50_000)) {
				t.Errorf("%s: %s has digest %s", what, name, got)
			}
		}
	}
	check("at first")
	h.stop()
	for _, line := range h.mounts() {
		t.Errorf("a stopped daemon left %s", line)
	}
	check("after a stop")
	h.kill()
	check("after a kill")

	// Killed while it is asked to read. Whoever read gets an error or the truth.
	var readers sync.WaitGroup
	for _, name := range names[50:] {
		readers.Go(func() {
			b, err := os.ReadFile(filepath.Join(own, name))
			if err == nil && sumOf(b) != sumOf(content(name, 50_000)) {
				t.Errorf("%s: wrong bytes after the daemon was killed", name)
			}
		})
	}
	h.kill()
	readers.Wait()
	check("after a kill in a read")
	for _, name := range names {
		if got := helper(t, "sum", filepath.Join(own, name)); got != sumOf(content(name, 50_000)) {
			t.Errorf("%s: digest %s", name, got)
		}
	}

	// A mount whose directory is gone stays listed with the reason.
	h.stop()
	must(t, os.Remove(own))
	if out := h.ok("ps", "--format", "{{.Names}} {{.Status}}"); !strings.Contains(out, "other Failed (") || !strings.Contains(out, "image Up ") {
		t.Errorf("ps: %q", out)
	}
	h.ok("umount", "other")
	h.ok("umount", "image")
	if left, _ := os.ReadDir(filepath.Join(h.root, "state/mounts")); len(left) > 0 {
		t.Errorf("records left: %v", left)
	}
}

// TestUnmountedByHand ends a mount behind the daemon's back.
func TestUnmountedByHand(t *testing.T) {
	needRoot(t)
	for _, face := range faces {
		t.Run(face, func(t *testing.T) {
			l, _ := small(t, 3, 10)
			_, ref := serve(t, forms.EStargz, l)
			h := newHost(t)
			dir := h.ok("mount", "--face", face, ref)
			must(t, syscall.Unmount(dir, 0))
			h.ok("umount", dir)
			if out := h.ok("ps", "-q"); out != "" {
				t.Errorf("still listed: %q", out)
			}
			h.ok("umount", h.ok("mount", "--face", face, ref))
		})
	}
}

func TestOneDaemon(t *testing.T) {
	h := newHost(t)
	h.ok("ps")
	pid := h.pid()
	r := h.run("daemon")
	if r.code != 1 || !strings.Contains(r.err, fmt.Sprintf("pid %d", pid)) || r.out != "" {
		t.Errorf("a second daemon: %s", r)
	}
	if h.pid() != pid {
		t.Error("the first daemon is gone")
	}
	h.ok("ps")
}

// TestManyClients starts many verbs at once where no daemon runs: one is started.
func TestManyClients(t *testing.T) {
	h := newHost(t)
	var clients sync.WaitGroup
	for range 12 {
		clients.Go(func() {
			if r := h.run("ps", "-q"); r.code != 0 {
				t.Error(r)
			}
		})
	}
	clients.Wait()
	// Those that came second give up by themselves, and none takes over.
	first := h.pid()
	for _, p := range h.processes() {
		if p == first {
			continue
		}
		if fd, err := pidfdOpen(p); err == nil {
			must(t, waitGone(fd))
			syscall.Close(fd)
		}
	}
	if p := h.processes(); len(p) != 1 || p[0] != first || h.pid() != first {
		t.Errorf("daemons: %v, the first was %d", p, first)
	}
}

// TestProbeLeft starts a daemon where another was killed while it found out what the
// kernel can do.
func TestProbeLeft(t *testing.T) {
	needRoot(t)
	h := newHost(t)
	dir := filepath.Join(h.root, "run/probe-1")
	for _, name := range []string{"served", "mnt"} {
		must(t, os.MkdirAll(filepath.Join(dir, name), 0o700))
		must(t, syscall.Mount("none", filepath.Join(dir, name), "tmpfs", 0, ""))
		must(t, os.WriteFile(filepath.Join(dir, name, "probe"), nil, 0o600))
	}
	must(t, os.WriteFile(filepath.Join(dir, "index"), nil, 0o600))
	h.ok("ps")
	if _, err := os.Lstat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it is still there: %v", err)
	}
	for _, line := range h.mounts() {
		if strings.Contains(line, "/probe-1/") {
			t.Errorf("left: %s", line)
		}
	}
}
