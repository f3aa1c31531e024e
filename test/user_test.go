package test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/varvefs/varve/bench/forms"
)

// nobody is a user that every machine has.
const nobody = 65534

// TestPlainUser does everything without privilege.
func TestPlainUser(t *testing.T) {
	needRoot(t) // to become another user
	_, err := exec.LookPath("fusermount3")
	need(t, err == nil, "fusermount3")
	st, err := os.Stat("/dev/fuse")
	must(t, err)
	need(t, st.Mode().Perm()&0o006 == 0o006, "a /dev/fuse for everyone")
	l, names := small(t, 20, 50_000)
	_, ref := serve(t, forms.EStargz, l)
	h := newHostAs(t, &syscall.Credential{Uid: nobody, Gid: nobody})
	as := func(name string, args ...string) result {
		cmd := exec.Command(name, args...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: h.as}
		cmd.Dir = "/"
		return finish(t, cmd, append([]string{name}, args...))
	}
	h.fails(1, "mount", "--face", "kernel", ref)
	h.fails(2, "mount", "--setuid", ref)
	dir := h.ok("mount", ref)
	if m := h.inspect(dir); m.Face != "fuse" || m.FaceReason == "" {
		t.Errorf("face %s: %s", m.Face, m.FaceReason)
	}
	if r := as("find", dir, "-ls"); r.code != 0 || strings.Count(r.out, "\n") != 24 {
		t.Error(r)
	}
	if r := as(child, "sum", filepath.Join(dir, names[4])); strings.TrimSpace(r.out) != sumOf(content(names[4], 50_000)) {
		t.Error(r)
	}
	for _, line := range h.mounts() {
		if !strings.Contains(line, "nosuid") || !strings.Contains(line, "nodev") {
			t.Errorf("a plain user's mount honours setuid or devices: %s", line)
		}
	}

	held := exec.Command(child, "hold", filepath.Join(dir, names[5]))
	held.SysProcAttr = &syscall.SysProcAttr{Credential: h.as}
	in, err := held.StdinPipe()
	must(t, err)
	out, err := held.StdoutPipe()
	must(t, err)
	must(t, held.Start())
	_, err = out.Read(make([]byte, 5))
	must(t, err)
	h.fails(7, "umount", dir)
	in.Close()
	held.Wait()

	h.kill()
	h.ok("ps")
	if r := as(child, "sum", filepath.Join(dir, names[6])); strings.TrimSpace(r.out) != sumOf(content(names[6], 50_000)) {
		t.Errorf("after a kill: %s", r)
	}
	h.ok("umount", dir)

	// Others may not speak to this daemon, nor read its store.
	must(t, os.Chmod(h.root, 0o755))
	other := *h
	other.as = &syscall.Credential{Uid: nobody - 1, Gid: nobody - 1}
	if r := other.run("ps"); r.code != 1 || strings.Count(r.err, "\n") != 1 {
		t.Errorf("another user: %s", r)
	}
	for _, private := range []string{"state", "cache"} {
		st, err := os.Stat(filepath.Join(h.root, private))
		must(t, err)
		if st.Mode().Perm() != 0o700 {
			t.Errorf("%s has mode %v", private, st.Mode())
		}
	}
}
