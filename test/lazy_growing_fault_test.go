package test

import (
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/varvefs/varve/bench/link"
	"github.com/varvefs/varve/daemon"
)

// TestGrowingRestart ends the daemon while it reads, in order and by force: the
// mount comes back and goes on.
func TestGrowingRestart(t *testing.T) {
	needRoot(t)
	for _, how := range []string{"stop", "kill"} {
		t.Run(how, func(t *testing.T) {
			g := newGrowing(t)
			h := newHost(t)
			dir := g.begin(h)
			id := h.inspect(dir).ID
			waits := later(func() error { _, err := os.ReadFile(filepath.Join(dir, "late/0")); return err })
			diff := later(func() result { return h.run("diff", "image") })
			held := hold(t, filepath.Join(dir, "early/0"))
			h.inspect(dir)
			pending(t, "diff", diff)
			if how == "stop" {
				h.stop()
			} else {
				h.kill()
			}
			if err := <-waits; err == nil {
				t.Error("a file that had not passed was read")
			}
			held.in.Close() // what it reads is nobody's any more
			held.cmd.Wait()
			if r := <-diff; r.code != 1 || strings.Count(r.err, "\n") != 1 {
				t.Error(r)
			}
			if s := h.status("image"); !strings.HasPrefix(s, "Reading ") {
				t.Errorf("ps: %q", s)
			}
			if m := h.inspect(dir); m.ID != id || m.State != "reading" {
				t.Errorf("after: %+v", m)
			}
			g.all()
			if m := h.settled(dir); m.State != "mounted" || m.Face != "kernel" {
				t.Errorf("at the end: %+v", m)
			}
			g.whole(t, dir)
			h.ok("umount", dir)
			unchanged(t, h)
			if strings.Contains(h.logText(), "level=ERROR") {
				t.Error("the daemon logged an error")
			}
		})
	}
}

// TestGrowingWrong has the layer be another than its manifest says, which is known
// at its end.
func TestGrowingWrong(t *testing.T) {
	needRoot(t)
	for _, face := range faces {
		t.Run(face, func(t *testing.T) {
			g := newGrowing(t)
			h := newHost(t)
			g.spoil(g.digest, 5) // of the time in gzip's header: all else is as it should be
			dir := g.begin(h, "--face", face)
			held := hold(t, filepath.Join(dir, "middle"))
			holds(t, filepath.Join(dir, "early/0"), string(content("early/0", 200_000)))
			waits := later(func() error { _, err := os.Lstat(filepath.Join(dir, "none")); return err })
			g.all()
			if err := <-waits; !errors.Is(err, syscall.EIO) {
				t.Errorf("a name that waited: %v, want EIO", err)
			}
			m := h.settled(dir)
			if m.State != "failed" || !strings.Contains(m.Error, g.digest[:19]) {
				t.Errorf("inspect: %+v", m)
			}
			if s := h.status("image"); !strings.HasPrefix(s, "Failed (") {
				t.Errorf("ps: %q", s)
			}
			for _, name := range []string{"late/0", "early/0", "none"} {
				if _, err := os.ReadFile(filepath.Join(dir, name)); !errors.Is(err, syscall.EIO) {
					t.Errorf("%s: %v, want EIO", name, err)
				}
			}
			held.in.Close()
			if err := held.cmd.Wait(); err == nil {
				t.Error("a file that was open could be read")
			}
			if !regexp.MustCompile(`level=ERROR msg="mount failed[^\n]*` + g.digest[:19]).MatchString(h.logText()) {
				t.Error("the log does not say that the mount failed")
			}
			for _, verb := range [][]string{{"diff", "image"}, {"export", "-o", filepath.Join(h.root, "out"), "image"}, {"cp", "image:/early/0", h.root}, {"commit", "image", "app:1"}} {
				if line := h.fails(6, verb...); !strings.Contains(line, g.digest[:19]) {
					t.Errorf("%s: %s", verb[0], line)
				}
			}
			h.ok("umount", dir)
			gone(t, h, dir)

			// Nothing of it was kept.
			unchanged(t, h)
			g.spoil(g.digest, 0)
			dir = h.ok("mount", "--wait", "--face", face, g.ref)
			g.whole(t, dir)
			h.ok("umount", dir)
		})
	}
}

// TestGrowingSlowLink does it through a link that is slow, and holds half of the
// layer back: what is asked for is what a program waits for, not the image.
func TestGrowingSlowLink(t *testing.T) {
	needRoot(t)
	g := newGrowing(t)
	g.let(g.digest, g.size/2)
	slow, err := link.Start(t.Context(), g.addr, link.Profile{RTT: 20 * time.Millisecond, Rate: 1 << 20})
	must(t, err)
	defer slow.Close()
	h := newHost(t)
	dir := h.ok("mount", slow.Addr()+"/grow/image:1")
	holds(t, filepath.Join(dir, "early/1"), string(content("early/1", 100_000)))
	g.all()
	var before int64
	m := h.until(dir, func(m daemon.Mount) bool {
		if m.Local < before {
			t.Errorf("%d bytes are here, before %d", m.Local, before)
		}
		before = m.Local
		return m.State != "reading"
	})
	if m.State != "mounted" || m.Face != "kernel" {
		t.Errorf("at the end: %+v", m)
	}
	g.whole(t, dir)
	g.once(t)
	h.ok("umount", dir)
}

// TestGrowingCut breaks the connection while a layer is read: it goes on where it
// was.
func TestGrowingCut(t *testing.T) {
	needRoot(t)
	g := newGrowing(t)
	wire, err := link.Start(t.Context(), g.addr, link.None)
	must(t, err)
	defer wire.Close()
	h := newHost(t)
	dir := h.ok("mount", wire.Addr()+"/grow/image:1")
	g.reached(g.digest)
	h.until(dir, func(m daemon.Mount) bool { return m.Local > part/2 })
	wire.Cut(link.Reset)
	late := later(func() string { b, _ := os.ReadFile(filepath.Join(dir, "late/0")); return string(b) })
	holds(t, filepath.Join(dir, "early/0"), string(content("early/0", 200_000)))
	pending(t, "a file that has not passed", late)
	wire.Restore()
	g.all()
	if got := <-late; got != string(content("late/0", 2<<20)) {
		t.Errorf("a file that had not passed: %d bytes", len(got))
	}
	if m := h.settled(dir); m.State != "mounted" {
		t.Errorf("at the end: %+v", m)
	}
	g.whole(t, dir)
	if n := g.bytes(g.digest); n > g.size+part/2 {
		t.Errorf("%d bytes of a layer of %d came", n, g.size)
	}
	h.ok("umount", dir)
}
