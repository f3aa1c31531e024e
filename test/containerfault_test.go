package test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/bench/forms"
)

// TestContainerDaemon ends the daemon, in order and by force, under containers that
// run, and finds them again.
func TestContainerDaemon(t *testing.T) {
	h, r := newContainers(t)
	ref := shellImage(t, r, "run/shell:1", shellLayer(t), nil)
	// What the kernel reads in place it reads without the daemon.
	h.ok("pull", "--full", ref)
	id := h.ok("run", "-d", "--name", "c", ref, "sh", "-c", stays)
	h.says("c", "ready")
	pid := h.state("c").Pid
	written := "not a program\n"
	for what, end := range map[string]func(){"stopped": h.stop, "killed": h.kill} {
		t.Run(what, func(t *testing.T) {
			end()
			if !alive(pid) {
				t.Fatal("the container went with the daemon")
			}
			if s := h.state("c"); !s.Running || s.Pid != pid {
				t.Errorf("state %+v", s)
			}
			if got := h.process("c"); got != "Up T" {
				t.Errorf("status %q", got)
			}
			if out := h.ok("ps", "-q", "--no-trunc"); out != id {
				t.Errorf("ps: %q", out)
			}
			h.gives("from the image\n", "exec", "c", "cat", "/data/seed")
			// A file of the image is changed: that takes the work directory of the mount.
			h.gives("", "exec", "c", "sh", "-c", "echo "+what+" >> /etc/plain; rm /bin/touch; cp /bin/cat /bin/touch; chmod 700 /home/jo")
			written += what + "\n"
			holds(t, filepath.Join(h.root, "run/mnt/c/etc/plain"), written)
			if out := h.ok("diff", "c"); !strings.Contains(out, "C /etc/plain") || !strings.Contains(out, "C /bin/touch") {
				t.Errorf("diff: %q", out)
			}
			h.commit("c", "made:"+what)
			h.fails(7, "umount", "c")
			h.fails(7, "rm", "c")
		})
	}
	h.gives("c\n", "stop", "c")
	h.gives("ready\nbye\n", "logs", "c")
	h.ok("start", "c")
	h.eventually("the second run", func() string { return h.run("exec", "c", "cat", "/runs").out }, "run\nrun\n")
	h.ok("rm", "-f", "c")
	if m := h.mounted(); len(m) != 0 {
		t.Errorf("mounts left: %q", m)
	}
}

// TestContainerServed stops a daemon through which a container reads its image.
func TestContainerServed(t *testing.T) {
	h, r := newContainers(t)
	ref := shellImage(t, r, "run/shell:1", shellLayer(t), nil)
	h.ok("run", "-d", "--name", "lazy", "--prefetch", "none", ref, "sleep", "1000")
	h.ok("run", "-d", "--name", "union", "--overlay", "fuse", ref, "sleep", "1000")
	for _, name := range []string{"lazy", "union"} {
		if out := h.ok("inspect", "-f", "{{.Container.Served}}", name); out != "true" {
			t.Errorf("%s is served: %s", name, out)
		}
	}
	res := h.run("daemon", "stop")
	if res.code != 0 || strings.Count(res.err, "until it is started anew") != 2 || !strings.Contains(res.err, "lazy") || !strings.Contains(res.err, "union") {
		t.Error(res)
	}
	for _, name := range []string{"lazy", "union"} {
		if got := h.process(name); got != "Up T" {
			t.Errorf("%s: status %q", name, got)
		}
		h.ok("stop", "-t", "0", name)
		h.ok("start", name)
		h.gives("from the image\n", "exec", name, "cat", "/data/seed")
		h.ok("rm", "-f", name)
	}
}

// TestContainerDaemonDies kills a daemon through which a container reads its image: what
// is not here cannot be had any more, which is said, and the container ends as any other.
func TestContainerDaemonDies(t *testing.T) {
	h, r := newContainers(t)
	more := newLayer(t)
	more.dir("data")
	more.file("data/big", content("big", 8<<20))
	img := mustGet[v1.Image](t)(mutate.Config(build(t, forms.EStargz, shellLayer(t), more.bytes()), v1.Config{Env: []string{"PATH=/bin"}}))
	ref := r.push("run/shell:1", img)
	for what, end := range map[string]func(){"stopped": h.stop, "killed": h.kill} {
		h.ok("run", "-d", "--name", what, "--prefetch", "none", ref, "sleep", "1000")
		h.gives("from the image\n", "exec", what, "cat", "/data/seed")
		for _, pid := range h.monitors() {
			fds, err := filepath.Glob("/proc/" + pid + "/fd/*")
			must(t, err)
			for _, fd := range fds {
				if to, err := os.Readlink(fd); err == nil && (to == "/dev/fuse" || strings.HasPrefix(to, h.root+"/cache")) {
					t.Errorf("%s: the monitor has %s of the daemon's", what, to)
				}
			}
		}
		end()
		h.ok("ps")
		if res := h.run("exec", what, "cat", "/data/big"); res.code == 0 || !strings.Contains(strings.ToLower(res.err), "input/output error") {
			t.Errorf("%s: %s", what, res)
		}
		h.ok("stop", "-t", "0", what)
		h.ok("start", what)
		h.gives("from the image\n", "exec", what, "cat", "/data/seed")
		h.ok("rm", "-f", what)
	}
}

// TestContainerEndsAlone has containers end while there is no daemon.
func TestContainerEndsAlone(t *testing.T) {
	h, r := newContainers(t)
	ref := shellImage(t, r, "run/shell:1", shellLayer(t), nil)
	h.ok("pull", "--full", ref)
	h.ok("run", "-d", "--name", "kept", ref, "sh", "-c", stays)
	h.ok("run", "-d", "--rm", "--name", "gone", ref, "sh", "-c", stays)
	h.says("kept", "ready")
	h.says("gone", "ready")
	pids := []int{h.state("kept").Pid, h.state("gone").Pid}
	h.kill()
	for _, pid := range pids {
		must(t, unix.Kill(pid, unix.SIGTERM))
	}
	h.eventually("monitors", func() string { return strings.Join(h.monitors(), " ") }, "")
	if got := h.process("kept"); got != "Exited (3) T" {
		t.Errorf("status %q", got)
	}
	h.eventually("gone", func() string { return h.process("gone") }, "none")
	h.gives("ready\nbye\n", "logs", "kept")
	h.ok("rm", "kept")
}

// TestContainerMonitor kills what stands beside a container.
func TestContainerMonitor(t *testing.T) {
	h, r := newContainers(t)
	ref := shellImage(t, r, "run/shell:1", shellLayer(t), nil)
	h.ok("pull", "--full", ref)
	run := h.command("run", "--name", "c", ref, "sh", "-c", stays)
	must(t, run.Start())
	h.says("c", "ready")
	pid := h.state("c").Pid
	killed(t, pidOf(t, h.monitors()[0]))
	run.Wait()
	if code := run.ProcessState.ExitCode(); code != 137 {
		t.Errorf("run ended with %d", code)
	}
	h.eventually("its process", func() string {
		if alive(pid) {
			return "is left"
		}
		return ""
	}, "")
	if s := h.state("c"); s.Status != "exited" || s.ExitCode != 137 || !strings.Contains(s.Error, "monitor") {
		t.Errorf("state %+v", s)
	}
	// The same while there is no daemon.
	h.ok("start", "c")
	h.eventually("the second run", func() string { return h.run("exec", "c", "cat", "/runs").out }, "run\nrun\n")
	h.kill()
	killed(t, pidOf(t, h.monitors()[0]))
	h.eventually("c", func() string { return h.process("c") }, "Exited (137) T")
	h.ok("start", "c")
	h.ok("rm", "-f", "c")

	// The container itself is killed, from outside.
	h.ok("run", "-d", "--name", "k", ref, "sleep", "1000")
	must(t, unix.Kill(h.state("k").Pid, unix.SIGKILL))
	h.eventually("k", func() string { return h.process("k") }, "Exited (137) T")
	h.ok("rm", "k")
}

// TestContainerImageMoves gives a container's name of an image to another one.
func TestContainerImageMoves(t *testing.T) {
	h, r := newContainers(t)
	layer := shellLayer(t)
	ref := shellImage(t, r, "run/shell:1", layer, func(c *v1.Config) { c.Cmd = []string{"cat", "/data/seed", "/mine"} })
	h.ok("run", "--name", "c", ref, "sh", "-c", "cat /data/seed; echo mine >> /mine; cat /mine")
	more := newLayer(t)
	more.dir("data")
	more.file("data/seed", []byte("from another image\n"))
	r.push("run/shell:1", build(t, forms.EStargz, layer, more.bytes()))
	h.gives("from another image\n", "run", "--rm", "--pull", "always", ref, "cat", "/data/seed")
	h.gives("from the image\nmine\nmine\n", "start", "-a", "c")
	r.close()
	h.gives("from the image\nmine\nmine\nmine\n", "start", "-a", "c")
	h.ok("rm", "c")
}

// TestContainerOutOfMemory is told what ended a container.
func TestContainerOutOfMemory(t *testing.T) {
	h, r := newContainers(t)
	ref := shellImage(t, r, "run/shell:1", shellLayer(t), nil)
	if res := h.run("run", "--name", "c", "-m", "16m", "--memory-swap", "16m", ref, "sh", "-c", `x=0123456789abcdef; while :; do x=$x$x; done`); res.code != 137 {
		t.Error(res)
	}
	if s := h.state("c"); !s.OOMKilled || s.ExitCode != 137 {
		t.Errorf("state %+v", s)
	}
	h.ok("rm", "c")
}
