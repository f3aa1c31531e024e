package test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/validate"

	"github.com/varvefs/varve/bench/forms"
	"github.com/varvefs/varve/bench/link"
)

// distribution is a real registry, Debian's docker-registry, behind a link that
// counts the bytes of both directions.
type distribution struct {
	addr string // past the link
	link *link.Link
}

// htpasswd lets in the user "jo" with the password "secret".
const htpasswd = "jo:$2b$04$s0/Hx2JljscQxw8J4x2imO.orulH1Rna1wowzu.w0e271RYucRh3.\n"

func newDistribution(t *testing.T, closed bool) *distribution {
	t.Helper()
	bin, err := exec.LookPath("docker-registry")
	need(t, err == nil, "docker-registry")
	dir := t.TempDir()
	l := mustGet[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	d := &distribution{addr: l.Addr().String()}
	must(t, l.Close())
	config := fmt.Sprintf("version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\n"+
		"storage: {filesystem: {rootdirectory: %s/data}}\nhttp: {addr: %q, secret: test}\n", dir, d.addr)
	if closed {
		config += fmt.Sprintf("auth: {htpasswd: {realm: test, path: %s/users}}\n", dir)
		must(t, os.WriteFile(filepath.Join(dir, "users"), []byte(htpasswd), 0o600))
	}
	must(t, os.WriteFile(filepath.Join(dir, "config.yml"), []byte(config), 0o600))
	cmd := exec.Command(bin, "serve", filepath.Join(dir, "config.yml"))
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	must(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("the registry's log:\n%s", &log)
		}
	})
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		resp, err := http.Get("http://" + d.addr + "/v2/")
		if err == nil {
			resp.Body.Close()
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("docker-registry does not answer: %v", err)
		}
	}
	d.link = mustGet[*link.Link](t)(link.Start(context.Background(), d.addr, link.None))
	t.Cleanup(func() { d.link.Close() })
	return d
}

// ref is a name by which the registry is reached through the link.
func (d *distribution) ref(name string) string { return d.link.Addr() + "/" + name }

// put pushes an image past the link and gives its name through it.
func (d *distribution) put(t *testing.T, name string, img v1.Image) string {
	t.Helper()
	must(t, forms.Push(context.Background(), img, d.addr+"/"+name))
	return d.ref(name)
}

// remote reads an image of the registry past the link, and all its bytes are held
// against their digests.
func (d *distribution) remote(t *testing.T, ref string) v1.Image {
	t.Helper()
	n := mustGet[name.Reference](t)(name.ParseReference(d.addr+"/"+ref, name.Insecure))
	img := mustGet[v1.Image](t)(remote.Image(n))
	if err := validate.Image(img); err != nil {
		t.Errorf("%s in the registry: %v", ref, err)
	}
	return img
}

// noise gives bytes that nothing can compress.
func noise(seed byte, n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

// noisy is a layer of files of noise that is made while it is read.
func noisy(layer byte, files, size int) forms.Opener {
	return func() (io.ReadCloser, error) {
		r, w := io.Pipe()
		go func() {
			tw := tar.NewWriter(w)
			err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: "big/", Mode: 0o755, ModTime: epoch.Truncate(time.Second)})
			for i := range files {
				h := tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("big/%d-%d", layer, i), Mode: 0o644, Size: int64(size), ModTime: epoch.Truncate(time.Second)}
				if err == nil {
					err = tw.WriteHeader(&h)
				}
				if err == nil {
					_, err = tw.Write(noise(layer<<4|byte(i), size))
				}
			}
			w.CloseWithError(errors.Join(err, tw.Close()))
		}()
		return r, nil
	}
}

// pushed picks the numbers of blobs from the last line of a push.
func pushed(t *testing.T, stderr string) (uploaded, mounted, existed, streamed string) {
	t.Helper()
	m := regexp.MustCompile(`(?m)^\S+: \S+ uploaded \((\d+)\), \S+ mounted from other repositories \((\d+)\), \S+ already there \((\d+)\), \S+ streamed from other registries \((\d+)\)$`).FindStringSubmatch(stderr)
	if m == nil {
		t.Fatalf("no summary in %q", stderr)
	}
	return m[1], m[2], m[3], m[4]
}

// TestPushWithoutBase commits on a base of 500 MB and pushes into the registry
// that has it. What goes over the line is the change.
func TestPushWithoutBase(t *testing.T) {
	needRoot(t)
	const (
		layers, files, size = 4, 4, 32 << 20
		change              = 300_000
		spare               = 100_000
	)
	open := make([]forms.Opener, layers)
	for i := range open {
		open[i] = noisy(byte(i), files, size)
	}
	d := newDistribution(t, false)
	base := func() string {
		dir := t.TempDir()
		defer os.RemoveAll(dir) // 500 MB
		img := mustGet[v1.Image](t)(forms.FromLayers(context.Background(), forms.EStargz, forms.Options{Dir: dir, Level: 1}, open...))
		return d.put(t, "team/base:1", img)
	}()
	withBoth(t, func(t *testing.T, overlay string) {
		h := newHost(t)
		ref := d.ref("team/" + overlay + ":1")
		start := d.link.Counters()
		dir := h.writable(overlay, "w", base)
		// The end of each layer, where its table of contents is.
		if moved := d.link.Counters().Sub(start); moved.Up > spare || moved.Down > layers<<20+spare {
			t.Errorf("the mount moved %d bytes up and %d down", moved.Up, moved.Down)
		}
		start = d.link.Counters()
		put(t, filepath.Join(dir, "big/new"), string(noise(200, change)))
		must(t, os.Remove(filepath.Join(dir, "big/0-0")))
		put(t, filepath.Join(dir, "big/1-1"), "replaced, without a look at what it was") // O_TRUNC
		r := h.run("commit", "--push", "w", ref)
		if r.code != 0 {
			t.Fatal(r)
		}
		digest := isDigest(t, strings.TrimSpace(r.out))
		moved := d.link.Counters().Sub(start)
		if moved.Up > change+spare || moved.Down > change+spare {
			t.Errorf("a change of %d bytes on a base of %d moved %d bytes up and %d down", change, layers*files*size, moved.Up, moved.Down)
		}
		if n := strings.Count(r.err, ": Mounted from team/base\n"); n != layers || strings.Count(r.err, ": Pushed\n") != 1 {
			t.Errorf("what was said: %s", r.err)
		}
		if up, mounted, existed, streamed := pushed(t, r.err); up != "2" || mounted != itoa(layers) || existed != "0" || streamed != "0" {
			t.Errorf("summary: %s", r.err)
		}

		// Again: all is there.
		start = d.link.Counters()
		r = h.run("push", ref)
		if r.code != 0 || strings.Count(r.out, ": Layer already exists\n") != layers+1 || strings.Contains(r.out, "Pushed") {
			t.Errorf("again: %s", r)
		}
		lines := strings.Split(strings.TrimSpace(r.out), "\n")
		if want := "The push refers to repository [" + d.ref("team/"+overlay) + "]"; lines[0] != want {
			t.Errorf("the first line is %q, want %q", lines[0], want)
		}
		if last := lines[len(lines)-1]; !regexp.MustCompile(`^1: digest: ` + digest + ` size: \d+$`).MatchString(last) {
			t.Errorf("the last line is %q", last)
		}
		if again := d.link.Counters().Sub(start); again.Up > 20_000 || again.Down > 20_000 {
			t.Errorf("to push again moved %d bytes up and %d down", again.Up, again.Down)
		}
		if r := h.run("push", "-q", ref); r.code != 0 || r.out != ref+"\n" || r.err != "" {
			t.Errorf("-q: %s", r)
		}

		// Another machine mounts it, as lazily.
		other := newHost(t)
		again := other.ok("mount", "--wait", ref)
		holds(t, filepath.Join(again, "big/new"), string(noise(200, change)))
		missing(t, filepath.Join(again, "big/0-0"))
		m := other.inspect(again)
		if m.Target != digest || m.Fetched > layers<<20+change+spare {
			t.Errorf("mounted %s, for which %d bytes were fetched", m.Target, m.Fetched)
		}
		other.ok("umount", "-a")
		h.ok("umount", "-a")
	})
}

// TestPushElsewhere pushes to a registry that has nothing of the base: it streams
// through.
func TestPushElsewhere(t *testing.T) {
	withBoth(t, func(t *testing.T, overlay string) {
		from, to := newDistribution(t, false), newDistribution(t, false)
		a, b := newLayer(t), newLayer(t)
		a.file("a", noise(1, 3<<20))
		b.file("b", noise(2, 200_000))
		img := build(t, forms.EStargz, a.bytes(), b.bytes())
		base := from.put(t, "team/base:1", img)
		h := newHost(t)
		dir := h.writable(overlay, "w", base)
		put(t, filepath.Join(dir, "new"), "new")
		r := h.run("commit", "--push", "-a", "Jo", "w", to.ref("other/app:2"))
		if r.code != 0 {
			t.Fatal(r)
		}
		if up, mounted, existed, streamed := pushed(t, r.err); up != "2" || mounted != "0" || existed != "0" || streamed != "2" {
			t.Errorf("summary: %s", r.err)
		}
		if strings.Count(r.err, ": Pushed\n") != 3 {
			t.Errorf("what was said: %s", r.err)
		}
		got := to.remote(t, "other/app:2")
		if d := mustGet[v1.Hash](t)(got.Digest()).String(); d != strings.TrimSpace(r.out) {
			t.Errorf("%s was committed, the registry has %s", r.out, d)
		}
		invariant(t, got)
		// It went through: here lies no more than the mount has read.
		if m := h.inspect("w"); m.Local > 1<<20 {
			t.Errorf("%d bytes of the base stayed here", m.Local)
		}
		// A second tag moves nothing, and a second repository mounts.
		h.commit("w", to.ref("other/app:3"))
		r = h.run("push", to.ref("other/app:3"))
		if _, mounted, existed, streamed := pushed(t, r.err); r.code != 0 || mounted != "0" || existed != "3" || streamed != "0" {
			t.Errorf("a second tag: %s", r)
		}
		// From what was pushed, without the first registry.
		from.link.Cut(link.Reset)
		second := newHost(t)
		dir = second.writable(overlay, "w", to.ref("other/app:2"))
		put(t, filepath.Join(dir, "newer"), "newer")
		r = second.run("commit", "--push", "w", to.ref("third/app:1"))
		if _, mounted, _, streamed := pushed(t, r.err); r.code != 0 || mounted != "3" || streamed != "0" {
			t.Errorf("from one repository to another: %s", r)
		}
		to.remote(t, "third/app:1")
		second.ok("umount", "-a")
		h.ok("umount", "-a")
	})
}

// TestPushFromAnywhere commits on images of layouts and archives, and of one
// platform out of several, and pushes them.
func TestPushFromAnywhere(t *testing.T) {
	needRoot(t)
	l, names := small(t, 3, 50_000)
	img := build(t, forms.EStargz, l)
	d := newDistribution(t, false)
	all := sources(t, img)
	other := changeConfig(t, img, func(f map[string]any) { f["architecture"] = "s390x" })
	list := mutate.AppendManifests(empty.Index,
		mutate.IndexAddendum{Add: other, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "s390x"}}},
		mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: runtime.GOARCH}}})
	must(t, remote.WriteIndex(mustGet[name.Reference](t)(name.ParseReference(d.addr+"/team/list:1", name.Insecure)), list))
	all["list"] = d.ref("team/list:1")
	h := newHost(t)
	for kind, source := range all {
		dir := h.writable("kernel", kind, source)
		put(t, filepath.Join(dir, "etc/new"), kind)
		appendTo(t, filepath.Join(dir, names[1]), "more")
		r := h.run("commit", "--push", kind, d.ref("from/"+kind+":1"))
		if r.code != 0 {
			t.Errorf("%s: %s", kind, r)
			continue
		}
		got := d.remote(t, "from/"+kind+":1")
		invariant(t, got)
		if digest := mustGet[v1.Hash](t)(got.Digest()).String(); digest != strings.TrimSpace(r.out) {
			t.Errorf("%s: the registry has %s, want %s", kind, digest, r.out)
		}
		if c := mustGet[*v1.ConfigFile](t)(got.ConfigFile()); c.Architecture != runtime.GOARCH {
			t.Errorf("%s: of the architecture %s", kind, c.Architecture)
		}
		// What lies here alone is told to nobody.
		if base := mustGet[*v1.Manifest](t)(got.Manifest()).Annotations["org.opencontainers.image.base.name"]; strings.Contains(base, "/tmp") || (kind == "list") != (base == source) {
			t.Errorf("%s: the base is called %q", kind, base)
		}
		again := newHost(t)
		dir = again.ok("mount", "--wait", d.ref("from/"+kind+":1"))
		holds(t, filepath.Join(dir, "etc/new"), kind)
		holds(t, filepath.Join(dir, names[1]), string(content(names[1], 50_000))+"more")
		again.ok("umount", "-a")
	}
	h.ok("umount", "-a")
}
