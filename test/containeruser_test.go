package test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestContainerOfPlainUser runs one without privilege, in a user namespace.
func TestContainerOfPlainUser(t *testing.T) {
	h := newUser(t)
	t.Cleanup(h.noContainers)
	r := newRegistry(t)
	ref := shellImage(t, r, "run/shell:1", shellLayer(t), nil)
	try := exec.Command("unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", "true")
	try.SysProcAttr = &syscall.SysProcAttr{Credential: h.as}
	if out, err := try.CombinedOutput(); err != nil {
		// Where the machine forbids it that is said, and nothing is left.
		if line := h.fails(125, "run", "--rm", ref, "true"); !strings.Contains(line, "user namespace") {
			t.Errorf("%s: %q", out, line)
		}
		return
	}
	h.gives("0 0\n", "run", "--rm", ref, "sh", "-c", "echo $(id -u) $(id -g)")
	if res := h.run("run", "--rm", ref, "sh", "-c", "exit 7"); res.code != 7 {
		t.Error(res)
	}
	h.fails(127, "run", "--rm", ref, "no-such")
	dir := filepath.Join(h.root, "shared")
	must(t, os.Mkdir(dir, 0o755))
	must(t, os.Chown(dir, nobody, nobody))
	h.gives("", "run", "--rm", "-v", dir+":/mnt", ref, "sh", "-c", "echo mine > /mnt/new")
	holds(t, filepath.Join(dir, "new"), "mine\n")
	if line := h.fails(125, "run", "--rm", "-m", "64m", ref, "true"); !strings.Contains(line, "memory") {
		t.Errorf("a limit that cannot be had: %q", line)
	}

	h.ok("run", "-d", "--name", "c", ref, "sh", "-c", stays)
	h.says("c", "ready")
	h.gives("run\n", "exec", "c", "cat", "/runs")
	h.commit("c", "made:1")
	h.gives("c\n", "stop", "c")
	h.ok("start", "c")
	h.eventually("the second run", func() string { return h.run("exec", "c", "cat", "/runs").out }, "run\nrun\n")
	h.ok("rm", "-f", "c")
	h.gives("run\n", "run", "--rm", "made:1", "cat", "/runs")
}
