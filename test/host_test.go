package test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/varvefs/varve/daemon"
)

// host is a store with a daemon of its own, and the user who drives it.
type host struct {
	t    *testing.T
	root string
	env  []string
	as   *syscall.Credential // nil is the tests' own user
}

// newHost makes one. At the end of the test its daemon is stopped, and nothing
// of it may be left: no process, no mount.
func newHost(t *testing.T) *host { return newHostAs(t, nil) }

func newHostAs(t *testing.T, as *syscall.Credential) *host {
	t.Helper()
	root, err := os.MkdirTemp("", "vt-")
	must(t, err)
	if as != nil {
		must(t, os.Chown(root, int(as.Uid), int(as.Gid)))
	}
	h := &host{t: t, root: root, as: as, env: []string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + root, "VARVE_ROOT=" + root, "VARVE_CONFIG=" + filepath.Join(root, "config"),
	}}
	t.Cleanup(h.end)
	return h
}

func (h *host) end() {
	t := h.t
	if t.Failed() {
		log, _ := os.ReadFile(h.log())
		t.Logf("the daemon's log:\n%s", log)
	}
	if h.pid() != 0 {
		h.stop()
	}
	for _, line := range h.mounts() {
		t.Errorf("a mount is left: %s", line)
		syscall.Unmount(strings.Fields(line)[4], syscall.MNT_DETACH)
	}
	for _, p := range h.processes() {
		t.Errorf("a daemon is left: pid %d", p)
		syscall.Kill(p, syscall.SIGKILL)
	}
	must(t, os.RemoveAll(h.root))
}

func (h *host) log() string { return filepath.Join(h.root, "state", "daemon.log") }

func (h *host) logText() string {
	b, err := os.ReadFile(h.log())
	must(h.t, err)
	return string(b)
}

// logged waits until the daemon has logged what fits, which it may do after it has
// answered, and gives the lines that do.
func (h *host) logged(fits string) (lines []string) {
	h.t.Helper()
	re := regexp.MustCompile(fits)
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		for line := range strings.Lines(h.logText()) {
			if strings.HasSuffix(line, "\n") && re.MatchString(line) {
				lines = append(lines, line)
			}
		}
		if len(lines) > 0 {
			return lines
		}
		if time.Now().After(end) {
			h.t.Fatalf("the log says nothing of %s", fits)
		}
	}
}

// mounts gives the lines of mountinfo for what lies below the root.
func (h *host) mounts() (lines []string) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	must(h.t, err)
	for line := range strings.Lines(string(b)) {
		if strings.HasPrefix(strings.Fields(line)[4], h.root+"/") {
			lines = append(lines, line)
		}
	}
	return lines
}

// processes gives the daemons of this root, which have it in their environment.
func (h *host) processes() (pids []int) {
	environs, _ := filepath.Glob("/proc/[0-9]*/environ")
	for _, path := range environs {
		env, err := os.ReadFile(path)
		if err != nil || !bytes.Contains(env, []byte("VARVE_ROOT="+h.root+"\x00")) {
			continue
		}
		cmdline, _ := os.ReadFile(filepath.Join(filepath.Dir(path), "cmdline"))
		if string(cmdline) != varve+"\x00daemon\x00" {
			continue
		}
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		pids = append(pids, pid)
	}
	return pids
}

// result is how a command ended.
type result struct {
	args     []string
	out, err string
	code     int
}

func (r result) String() string {
	return fmt.Sprintf("varve %s: exit %d\nstdout: %sstderr: %s", strings.Join(r.args, " "), r.code, r.out, r.err)
}

func (h *host) command(args ...string) *exec.Cmd {
	cmd := exec.Command(varve, args...)
	cmd.Env = h.env
	cmd.Dir = h.root
	if h.as != nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: h.as}
	}
	return cmd
}

func (h *host) run(args ...string) result { return finish(h.t, h.command(args...), args) }

func finish(t *testing.T, cmd *exec.Cmd, args []string) result {
	t.Helper()
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("%v: %v", cmd.Args, err)
	}
	return result{args: args, out: out.String(), err: errs.String(), code: cmd.ProcessState.ExitCode()}
}

// ok runs a verb that must succeed and gives its output without the last newline.
func (h *host) ok(args ...string) string {
	h.t.Helper()
	r := h.run(args...)
	if r.code != 0 {
		h.t.Fatal(r)
	}
	return strings.TrimSuffix(r.out, "\n")
}

// fails runs a verb that must end with a code, say why in one line on stderr,
// and nothing on stdout. It gives the line.
func (h *host) fails(code int, args ...string) string {
	h.t.Helper()
	r := h.run(args...)
	if r.code != code {
		h.t.Errorf("want exit %d: %s", code, r)
	}
	// What goes on is said in lines of its own, which name a layer first.
	lines := slices.DeleteFunc(strings.SplitAfter(r.err, "\n"), func(l string) bool {
		return l == "" || strings.HasPrefix(l, "varve: sha256:") && (strings.HasSuffix(l, " read whole once\n") || strings.HasSuffix(l, ": done\n"))
	})
	if r.out != "" || len(lines) != 1 || !strings.HasPrefix(lines[0], "varve: ") {
		h.t.Fatalf("want one line on stderr and none on stdout: %s", r)
	}
	return strings.TrimSuffix(lines[0], "\n")
}

// pid gives the daemon's process, 0 if none runs.
func (h *host) pid() int {
	h.t.Helper()
	var v struct{ Daemon *daemon.Version }
	must(h.t, json.Unmarshal([]byte(h.ok("version", "--format", "json")), &v))
	if v.Daemon == nil {
		return 0
	}
	return v.Daemon.PID
}

// kill ends the daemon as a crash does and waits until it is gone.
func (h *host) kill() {
	h.t.Helper()
	pid := h.pid()
	fd, err := pidfdOpen(pid)
	must(h.t, err)
	defer syscall.Close(fd)
	must(h.t, syscall.Kill(pid, syscall.SIGKILL))
	must(h.t, waitGone(fd))
}

// stop ends the daemon in order and waits until it is gone.
func (h *host) stop() {
	h.t.Helper()
	fd, err := pidfdOpen(h.pid())
	must(h.t, err)
	defer syscall.Close(fd)
	h.ok("daemon", "stop")
	must(h.t, waitGone(fd))
}

func (h *host) inspect(name string) daemon.Mount {
	h.t.Helper()
	var ms []daemon.Mount
	must(h.t, json.Unmarshal([]byte(h.ok("inspect", name)), &ms))
	if len(ms) != 1 {
		h.t.Fatalf("inspect gave %d mounts", len(ms))
	}
	return ms[0]
}

// descriptors counts the daemon's open descriptors.
func (h *host) descriptors() int {
	h.t.Helper()
	names, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", h.pid()))
	must(h.t, err)
	return len(names)
}
