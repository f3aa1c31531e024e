package test

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"

	"github.com/varvefs/varve/bench/forms"
)

// shellLayer has this machine's shell in it, and what it needs to be of use.
func shellLayer(t *testing.T) []byte {
	t.Helper()
	l := newLayer(t)
	l.dir(".", "bin", "etc", "root", "home", "home/jo", "data")
	l.add(tar.Header{Typeflag: tar.TypeDir, Name: "tmp/", Mode: 0o1777}, nil)
	done := map[string]bool{}
	add := func(name, path string) {
		if done[name] {
			return
		}
		done[name] = true
		b, err := os.ReadFile(path)
		must(t, err)
		l.add(tar.Header{Typeflag: tar.TypeReg, Name: strings.TrimPrefix(name, "/"), Mode: 0o755}, b)
	}
	library := regexp.MustCompile(`(/\S+) \(0x`)
	for _, name := range []string{"sh", "cat", "id", "sleep", "stty", "ls", "touch", "rm", "cp", "chmod"} {
		path, err := exec.LookPath(name)
		need(t, err == nil, name)
		add("/bin/"+name, path)
		out, err := exec.Command("ldd", path).Output()
		must(t, err)
		for _, m := range library.FindAllStringSubmatch(string(out), -1) {
			add(m[1], m[1])
		}
	}
	add("/bin/child", child)
	l.file("etc/passwd", []byte("root:x:0:0:root:/root:/bin/sh\njo:x:1000:1000::/home/jo:/bin/sh\n"))
	l.file("etc/group", []byte("root:x:0:\njo:x:1000:\nextra:x:2000:jo\n"))
	l.file("etc/plain", []byte("not a program\n"))
	l.file("data/seed", []byte("from the image\n"))
	return l.bytes()
}

// shellImage is an image of that layer with a config as set makes it, under a name.
func shellImage(t *testing.T, r *registry, name string, layer []byte, set func(c *v1.Config)) string {
	t.Helper()
	img := build(t, forms.EStargz, layer)
	c := v1.Config{Env: []string{"PATH=/bin", "FROM=image"}, Cmd: []string{"sh"}}
	if set != nil {
		set(&c)
	}
	return r.push(name, mustGet[v1.Image](t)(mutate.Config(img, c)))
}

// newContainers makes a host for containers. At the end nothing may be left of them:
// no process, no control group, no socket, no directory.
func newContainers(t *testing.T) (*host, *registry) {
	t.Helper()
	needRoot(t)
	_, crun := exec.LookPath("crun")
	_, runc := exec.LookPath("runc")
	need(t, crun == nil || runc == nil, "crun or runc")
	r := newRegistry(t)
	h := newHost(t)
	t.Cleanup(h.noContainers)
	return h, r
}

func (h *host) noContainers() {
	t := h.t
	ids := strings.Fields(h.run("ps", "-aq", "--no-trunc").out)
	for _, id := range ids {
		h.run("rm", "-f", id)
	}
	if t.Failed() {
		for _, path := range h.below("state/containers/*/monitor.log", "state/containers/*/runtime.log") {
			b, _ := os.ReadFile(path)
			t.Logf("%s:\n%s", path, b)
		}
	}
	h.eventually("nothing of containers is left", func() string {
		return strings.Join(append(h.below("state/containers/*", "state/uppers/*", "run/containers/*", "run/containers/.*", "run/runtime/*", "run/mnt/*"), h.monitors()...), " ")
	}, "")
	for _, id := range ids {
		if left, _ := filepath.Glob("/sys/fs/cgroup/*/varve/*" + id + "*"); len(left) > 0 {
			t.Errorf("control groups are left: %v", left)
		}
	}
}

// below gives what fits patterns in the host's root.
func (h *host) below(patterns ...string) (found []string) {
	for _, p := range patterns {
		m, err := filepath.Glob(filepath.Join(h.root, p))
		must(h.t, err)
		found = append(found, m...)
	}
	return found
}

// monitors gives the monitors of this root's containers, as pids.
func (h *host) monitors() (pids []string) {
	lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range lines {
		b, err := os.ReadFile(path)
		if err == nil && bytes.HasPrefix(b, []byte(varve+"\x00monitor\x00"+h.root+"/")) {
			pids = append(pids, filepath.Base(filepath.Dir(path)))
		}
	}
	return pids
}

// eventually waits until look gives want.
func (h *host) eventually(what string, look func() string, want string) {
	h.t.Helper()
	var got string
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if got = look(); got == want {
			return
		}
	}
	h.t.Errorf("%s: %q, want %q", what, got, want)
}

// says waits until a container has written a text.
func (h *host) says(name, want string) {
	h.t.Helper()
	h.eventually(name+" has written", func() string {
		if strings.Contains(h.run("logs", name).out, want) {
			return want
		}
		return ""
	}, want)
}

// state gives docker's State of a container.
func (h *host) state(name string) (s struct {
	Status            string
	Running           bool
	Pid, ExitCode     int
	Error             string
	OOMKilled         bool
	StartedAt         time.Time
	FinishedAt        time.Time
	Paused, Dead, any bool
}) {
	h.t.Helper()
	must(h.t, json.Unmarshal([]byte(h.ok("inspect", "--format", "{{json .State}}", name)), &s))
	return s
}

// process gives the STATUS of a container without its times.
func (h *host) process(name string) string {
	for line := range strings.Lines(h.ok("ps", "-a", "--format", "{{.Names}}|{{.Status}}")) {
		if s, ok := strings.CutPrefix(strings.TrimSpace(line), name+"|"); ok {
			return regexp.MustCompile(`(Less than )?(a|an|About a|About an|\d+) (second|minute)s?( ago)?`).ReplaceAllString(s, "T")
		}
	}
	return "none"
}

// with runs a verb with something on its stdin.
func (h *host) with(stdin string, args ...string) result {
	h.t.Helper()
	cmd := h.command(args...)
	cmd.Stdin = strings.NewReader(stdin)
	return finish(h.t, cmd, args)
}

// gives runs a verb that must succeed and print exactly so.
func (h *host) gives(want string, args ...string) {
	h.t.Helper()
	if r := h.run(args...); r.code != 0 || r.out != want || r.err != "" {
		h.t.Errorf("want %q: %s", want, r)
	}
}

// alive reports whether there is such a process. One that nobody has waited for is
// none.
func alive(pid int) bool {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	_, state, _ := strings.Cut(string(b), ") ")
	return err == nil && !strings.HasPrefix(state, "Z")
}

// mounted gives the mounts of images, of which the directory that the kernel reads
// layers from is none.
func (h *host) mounted() (lines []string) {
	for _, line := range h.mounts() {
		if strings.Fields(line)[4] != filepath.Join(h.root, "run/data") {
			lines = append(lines, line)
		}
	}
	return lines
}

func pidOf(t *testing.T, s string) int {
	t.Helper()
	return mustGet[int](t)(strconv.Atoi(s))
}

func killed(t *testing.T, pid int) {
	t.Helper()
	fd, err := pidfdOpen(pid)
	must(t, err)
	defer syscall.Close(fd)
	must(t, syscall.Kill(pid, syscall.SIGKILL))
	must(t, waitGone(fd))
}
