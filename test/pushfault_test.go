package test

import (
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/bench/forms"
	"github.com/varvefs/varve/bench/link"
)

// newKeeping is a registry that keeps what came of a broken request. Debian's
// begins such an upload anew.
func newKeeping(t *testing.T) *distribution {
	t.Helper()
	s := mustGet[*forms.Server](t)(forms.Registry(t.TempDir()))
	t.Cleanup(func() { s.Close() })
	d := &distribution{addr: s.Addr(), link: mustGet[*link.Link](t)(link.Start(context.Background(), s.Addr(), link.None))}
	t.Cleanup(func() { d.link.Close() })
	return d
}

// TestPushInterrupted takes the line away in the middle, and the daemon.
func TestPushInterrupted(t *testing.T) {
	needRoot(t)
	for _, how := range []string{"line", "daemon"} {
		t.Run("keeping/"+how, func(t *testing.T) { pushInterrupted(t, newKeeping(t), how, true) })
		t.Run("distribution/"+how, func(t *testing.T) { pushInterrupted(t, newDistribution(t, false), how, false) })
	}
}

func pushInterrupted(t *testing.T, d *distribution, how string, keeps bool) {
	const first, second = 2 << 20, 24 << 20
	l, _ := small(t, 3, 1000)
	base := d.put(t, "team/base:1", build(t, forms.EStargz, l))
	h := newHost(t)
	dir := h.writable("kernel", "w", base)
	put(t, filepath.Join(dir, "etc/first"), string(noise(3, first)))
	h.commit("w", "local:1")
	dir = h.writable("kernel", "x", "local:1")
	put(t, filepath.Join(dir, "etc/second"), string(noise(4, second)))
	ref := d.ref("team/app:1")
	digest := h.commit("x", ref)

	d.link.SetProfile(link.Profile{Rate: 4 << 20}) // half of it takes seconds
	start := d.link.Counters()
	up := func() int64 { return d.link.Counters().Sub(start).Up }
	pid := h.pid()
	fd := mustGet[int](t)(pidfdOpen(pid))
	defer unix.Close(fd)
	cmd := h.command("push", ref)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	must(t, cmd.Start())
	for deadline := time.Now().Add(time.Minute); up() < first+second/2; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the push does not get on")
		}
	}
	d.link.Cut(link.Reset)
	broken := up()
	d.link.SetProfile(link.None)
	if how == "line" {
		time.Sleep(50 * time.Millisecond) // so that somebody runs into it
		d.link.Restore()
		if err := cmd.Wait(); err != nil {
			t.Fatalf("push over a broken line: %v\n%s", err, &errs)
		}
	} else {
		must(t, unix.Kill(pid, unix.SIGKILL))
		must(t, waitGone(fd))
		if err := cmd.Wait(); err == nil {
			t.Fatal("the push ended before the daemon was killed")
		}
		d.link.Restore()
		r := h.run("push", ref)
		// The base's layer and the first were done.
		if r.code != 0 || strings.Count(r.out, ": Layer already exists\n") != 2 || strings.Count(r.out, ": Pushed\n") != 1 {
			t.Errorf("again: %s", r)
		}
	}
	// Some of what is under way when it breaks has to be sent again; of a registry
	// that keeps nothing of it, that blob, but no other.
	most := first + second + second/5
	if !keeps {
		most = int(broken) + second + second/5
	}
	if n := up(); n > int64(most) {
		t.Errorf("%d bytes were sent for %d, %d before it broke", n, first+second, broken)
	}
	if got := mustGet[v1.Hash](t)(d.remote(t, "team/app:1").Digest()).String(); got != digest {
		t.Errorf("the registry has %s, want %s", got, digest)
	}
	if left, _ := filepath.Glob(filepath.Join(h.root, "state/uploads/*")); len(left) > 0 {
		t.Errorf("notes of uploads that have ended are left: %v", left)
	}
	h.ok("umount", "-a")
}

// TestPushRefused pushes to registries that do not answer, or not this user.
func TestPushRefused(t *testing.T) {
	needRoot(t)
	l, _ := small(t, 2, 1000)
	_, base := serve(t, forms.EStargz, l)
	closed := newDistribution(t, true)
	h := newHost(t)
	dir := h.writable("kernel", "w", base)
	put(t, filepath.Join(dir, "etc/new"), "new")
	ref := closed.ref("team/app:1")
	digest := h.commit("w", ref)
	auth := func(password string) {
		config := fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, closed.link.Addr(), base64.StdEncoding.EncodeToString([]byte("jo:"+password)))
		must(t, os.MkdirAll(filepath.Join(h.root, ".docker"), 0o700))
		must(t, os.WriteFile(filepath.Join(h.root, ".docker/config.json"), []byte(config), 0o600))
	}
	refused := func(what string, args ...string) {
		t.Helper()
		r := h.run(args...)
		if r.code != 4 || !strings.Contains(r.err, closed.link.Addr()) || strings.Contains(r.out+r.err+h.logText(), "c2VjcmV0") {
			t.Errorf("%s: %s", what, r)
		}
	}
	refused("no credentials", "push", ref)
	auth("wrong")
	refused("wrong credentials", "push", ref)
	// The commit stands, and its digest is not lost.
	if r := h.run("commit", "--push", "w", ref); r.code != 4 || !strings.Contains(r.err, "sha256:") {
		t.Errorf("commit --push with wrong credentials: %s", r)
	}
	auth("secret")
	if r := h.run("push", ref); r.code != 0 {
		t.Errorf("right credentials: %s", r)
	}
	// One that is out of order says when to come again, else it would be asked for
	// longer than a test should last.
	down := newRegistry(t)
	down.rec.SetFault(func(*http.Request) *link.Fault {
		return &link.Fault{Status: http.StatusServiceUnavailable, Header: http.Header{"Retry-After": {"1"}}}
	})
	ref = down.rec.Addr() + "/team/app:1"
	h.commit("w", ref)
	if r := h.run("push", ref); r.code != 5 || !strings.Contains(r.err, down.rec.Addr()) {
		t.Errorf("no registry: %s", r)
	}
	h.fails(3, "push", "no-such-image:1")
	h.fails(3, "push", closed.ref("team/other:1"))
	h.fails(2, "push", "oci:"+h.root+"/layout")
	h.fails(2, "push", strings.TrimPrefix(digest, "sha256:"))
	h.fails(2, "push", "UPPER")
	h.fails(2, "push")
	h.ok("umount", "-a")
}

// TestPushVerifies pushes and saves an image some of whose base is not what its
// digest says.
func TestPushVerifies(t *testing.T) {
	needRoot(t)
	p := newLayer(t)
	p.file("large", noise(7, 3<<20))
	r := newRegistry(t)
	base := r.push("test/base:1", build(t, forms.EStargz, p.bytes()))
	to := newDistribution(t, false)
	h := newHost(t)
	dir := h.writable("kernel", "w", base)
	put(t, filepath.Join(dir, "new"), "new")
	ref := to.ref("team/app:1")
	h.commit("w", ref)
	r.rec.SetFault(func(q *http.Request) *link.Fault {
		if link.ClassOf(q) == link.Blob && q.Method == http.MethodGet {
			return &link.Fault{Corrupt: 70_000}
		}
		return nil
	})
	if res := h.run("push", ref); res.code != 6 || !strings.Contains(res.err, "digest") {
		t.Errorf("push: %s", res)
	}
	n := mustGet[name.Reference](t)(name.ParseReference(to.addr+"/team/app:1", name.Insecure))
	if _, err := remote.Head(n); err == nil {
		t.Error("the registry has it")
	}
	file := filepath.Join(h.root, "saved.tar")
	if line := h.fails(6, "save", "-o", file, ref); !strings.Contains(line, "sha256:") {
		t.Errorf("save: %s", line)
	}
	missing(t, file)
	r.rec.SetFault(nil)
	h.ok("push", ref)
	to.remote(t, "team/app:1")
	h.ok("save", "-o", file, ref)
	h.ok("umount", "-a")
}
