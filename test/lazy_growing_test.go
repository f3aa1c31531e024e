package test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/varvefs/varve/bench/forms"
	"github.com/varvefs/varve/daemon"
)

// growing is an image of one layer without an index, behind a gate that lets the
// first part of it pass: early/0 and early/1 whole, some of middle.
type growing struct {
	*gate
	r      *registry
	ref    string
	digest string // of the layer
	size   int64  // of its blob
}

// part is how much of the layer passes at first.
const part = 1 << 20

var growingFiles = []struct {
	name string
	size int
}{{"early/0", 200_000}, {"early/1", 100_000}, {"middle", 5 << 20}, {"late/0", 2 << 20}, {"late/1", 10}}

func newGrowing(t *testing.T) *growing {
	t.Helper()
	l := newLayer(t)
	l.dir(".", "early")
	for i, f := range growingFiles {
		if i == 3 {
			l.dir("late")
		}
		l.file(f.name, content(f.name, f.size))
	}
	r := newRegistry(t)
	img := build(t, forms.Gzip, l.bytes())
	r.push("grow/image:1", img)
	g := &growing{gate: gated(t, r), r: r}
	g.ref = g.addr + "/grow/image:1"
	digests, sizes := blobs(t, img)
	g.digest, g.size = digests[0], sizes[0]
	g.let(g.digest, part)
	return g
}

// all lets everything pass.
func (g *growing) all() { g.let(g.digest, all) }

// begin mounts the image and waits until the first part of it has passed.
func (g *growing) begin(h *host, args ...string) (dir string) {
	h.t.Helper()
	dir = h.ok(append(append([]string{"mount"}, args...), g.ref)...)
	if n := g.bytes(g.digest); n > part {
		h.t.Errorf("%d bytes of the layer had passed when mount returned", n)
	}
	g.reached(g.digest)
	return dir
}

// settled waits until a mount is not read any more.
func (h *host) settled(name string) daemon.Mount {
	h.t.Helper()
	return h.until(name, func(m daemon.Mount) bool { return m.State != "reading" })
}

// until waits until something is so of a mount.
func (h *host) until(name string, so func(daemon.Mount) bool) daemon.Mount {
	h.t.Helper()
	for end := time.Now().Add(time.Minute); ; {
		m := h.inspect(name)
		if so(m) {
			return m
		}
		if time.Now().After(end) {
			h.t.Fatalf("it stays as it is: %+v", m)
		}
		time.Sleep(10 * time.Millisecond) // nothing tells when
	}
}

// later runs fn beside the test and gives what it came to.
func later[T any](fn func() T) <-chan T {
	c := make(chan T, 1)
	go func() { c <- fn() }()
	return c
}

// pending checks that something has not ended.
func pending[T any](t *testing.T, what string, c <-chan T) {
	t.Helper()
	if len(c) > 0 {
		t.Errorf("%s: it has ended: %+v", what, <-c)
	}
}

// whole checks everything that a mount holds, which was waited for.
func (g *growing) whole(t *testing.T, dir string) {
	t.Helper()
	if got := namesIn(t, dir) + " " + namesIn(t, filepath.Join(dir, "early")) + " " + namesIn(t, filepath.Join(dir, "late")); got != "early late middle 0 1 0 1" {
		t.Errorf("names: %s", got)
	}
	for _, f := range growingFiles {
		holds(t, filepath.Join(dir, f.name), string(content(f.name, f.size)))
	}
}

// once checks that every byte of the layer came once.
func (g *growing) once(t *testing.T) {
	t.Helper()
	if n := g.bytes(g.digest); n != g.size {
		t.Errorf("%d bytes of a layer of %d came", n, g.size)
	}
}

// TestGrowing mounts an image before its layer is there, and looks at it while it
// comes.
func TestGrowing(t *testing.T) {
	needRoot(t)
	for _, face := range faces {
		t.Run(face, func(t *testing.T) { grows(t, face) })
	}
}

func grows(t *testing.T, face string) {
	g := newGrowing(t)
	h := newHost(t)
	dir := g.begin(h, "--face", face)
	m := h.inspect(dir)
	if m.State != "reading" || m.Face != "fuse" || m.Layers[0].Index != "" || m.Layers[0].Whole || m.Layers[0].Size != g.size || !strings.Contains(m.Layers[0].Reason, "no index") {
		t.Errorf("inspect: %+v", m)
	}
	if !strings.Contains(m.FaceReason, "1 of 1 layers are still being read") {
		t.Errorf("why this face: %s", m.FaceReason)
	}
	if n := m.Layers[0].Local; n > part || m.Local != n {
		t.Errorf("%d bytes of the layer are here, of the mount %d", n, m.Local)
	}

	// What has passed is there, and no more of it comes for that.
	holds(t, filepath.Join(dir, "early/0"), string(content("early/0", 200_000)))
	holds(t, filepath.Join(dir, "early/1"), string(content("early/1", 100_000)))
	m = h.until(dir, func(m daemon.Mount) bool { return m.Local == part })
	lists(t, dir, "early middle")
	if s, want := h.status("image"), fmt.Sprintf("Reading %d%%", 100*m.Local/g.size); s != want {
		t.Errorf("ps: %q, want %q", s, want)
	}
	if n := g.bytes(g.digest); n != part {
		t.Errorf("%d bytes came, want %d", n, part)
	}

	// Everything else waits.
	cat := later(func() string { b, _ := os.ReadFile(filepath.Join(dir, "late/0")); return string(b) })
	none := later(func() error { _, err := os.Lstat(filepath.Join(dir, "early/none")); return err })
	held := hold(t, filepath.Join(dir, "early/1"))
	in := exec.Command("/bin/sh", "-c", "read x; cat 1 ../middle")
	in.Dir = filepath.Join(dir, "early")
	stdin, err := in.StdinPipe()
	must(t, err)
	inside := later(func() string { b, _ := in.Output(); return string(b) })
	mid := later(func() string { b, _ := os.ReadFile(filepath.Join(dir, "middle")); return string(b) })
	h.until(dir, func(daemon.Mount) bool { return in.Process != nil })
	pending(t, "a file that has not passed", cat)
	pending(t, "a file that passes", mid)
	pending(t, "a name that is not there", none)
	g.let(g.digest, part+part/2)
	g.reached(g.digest)
	h.until(dir, func(n daemon.Mount) bool { return n.Local > m.Local })
	pending(t, "a file that has not passed", cat)
	pending(t, "a file that passes", mid)
	pending(t, "a name that is not there", none)
	g.all()
	if <-cat != string(content("late/0", 2<<20)) || <-mid != string(content("middle", 5<<20)) {
		t.Error("what was waited for has other bytes")
	}
	if err := <-none; !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a name that is not there: %v", err)
	}
	g.once(t)

	// Now it is what it would have been from the start, but for who is in it.
	m = h.settled(dir)
	want := map[string]string{"kernel": "kernel", "fuse": "fuse"}[face]
	if l := m.Layers[0]; m.State != "mounted" || m.Face != want || !l.Whole || l.Index != "checkpoints" || l.Local != g.size || l.Fetched != g.size || l.DiffID == "" {
		t.Errorf("inspect at the end: %+v", m)
	}
	if s := h.status("image"); !strings.HasPrefix(s, "Up ") || !strings.Contains(s, want) {
		t.Errorf("ps at the end: %q", s)
	}
	g.whole(t, dir)
	if got := held.read(t); got != sumOf(content("early/1", 100_000)) {
		t.Errorf("a file that was open: digest %s", got)
	}
	fmt.Fprintln(stdin)
	if got := <-inside; got != string(content("early/1", 100_000))+string(content("middle", 5<<20)) {
		t.Errorf("who was in a directory read %d bytes", len(got))
	}
	missing(t, filepath.Join(dir, "early/none"))
	if lines := h.mounts(); !slices.ContainsFunc(lines, func(l string) bool {
		return strings.Fields(l)[4] == dir && strings.Contains(l, map[string]string{"kernel": " - erofs ", "fuse": " - fuse"}[face])
	}) {
		t.Errorf("mounts: %v", lines)
	}
	if face == "fuse" { // the mount is still the one that grew
		if out := h.ok("store", "drop", g.ref); strings.Contains(out, "kept") {
			t.Errorf("store drop: %s", out)
		}
		forget(t, dir, []string{"early/0", "middle", "late/0"})
		g.whole(t, dir)
		if n := g.bytes(g.digest); n <= g.size || n > 2*g.size {
			t.Errorf("%d bytes of a layer of %d came, which was dropped once", n, g.size)
		}
	}
	h.ok("umount", dir)

	// The next mount asks for nothing.
	before := g.bytes(g.digest)
	dir = h.ok("mount", "--face", face, g.ref)
	if m := h.inspect(dir); m.State != "mounted" || m.Face != want {
		t.Errorf("the next mount: %+v", m)
	}
	g.whole(t, dir)
	if n := g.bytes(g.digest); n != before {
		t.Errorf("the next mount brought %d bytes", n-before)
	}
	h.ok("umount", dir)
	if strings.Contains(h.logText(), "level=ERROR") {
		t.Error("the daemon logged an error")
	}
}

// TestGrowingWait waits where that was asked for, and where changes are kept.
func TestGrowingWait(t *testing.T) {
	needRoot(t)
	for _, flag := range []string{"--wait", "--rw"} {
		t.Run(flag, func(t *testing.T) {
			g := newGrowing(t)
			h := newHost(t)
			mounted := later(func() result { return h.run("mount", flag, g.ref) })
			g.reached(g.digest)
			if out := h.ok("ps", "-q"); out != "" {
				t.Errorf("listed before it is there: %q", out)
			}
			pending(t, "mount", mounted)
			g.all()
			r := <-mounted
			dir := strings.TrimSuffix(r.out, "\n")
			if r.code != 0 || g.bytes(g.digest) != g.size || h.inspect(dir).State != "mounted" {
				t.Fatal(r)
			}
			g.whole(t, dir)
			g.once(t)
			h.ok("umount", dir)
		})
	}
}

// TestGrowingUnmount ends mounts that are still read.
func TestGrowingUnmount(t *testing.T) {
	needRoot(t)
	g := newGrowing(t)
	h := newHost(t)
	h.ok("ps")
	before := h.descriptors()
	dir := g.begin(h)
	held := hold(t, filepath.Join(dir, "early/0"))
	if line := h.fails(7, "umount", dir); !strings.Contains(line, fmt.Sprint(held.pid())) {
		t.Errorf("who is in it is not named: %s", line)
	}
	if m := h.inspect(dir); m.State != "reading" {
		t.Errorf("after an unmount that was refused: %+v", m)
	}
	waits := later(func() error { _, err := os.Lstat(filepath.Join(dir, "late/0")); return err })
	h.inspect(dir)
	pending(t, "a lookup", waits)
	h.ok("umount", "-f", dir)
	if err := <-waits; err == nil || errors.Is(err, os.ErrNotExist) {
		t.Errorf("who waited when it was unmounted by force: %v", err)
	}
	gone(t, h, dir)
	held.in.Close()
	held.cmd.Wait()

	// At rest it needs no force, and what was read of it is not kept.
	dir = h.ok("mount", g.ref)
	if got := namesIn(t, dir); strings.Contains(got, "late") {
		t.Errorf("names that have passed: %s", got)
	}
	h.ok("umount", dir)
	gone(t, h, dir)
	for end := time.Now().Add(time.Minute); h.descriptors() > before+2 && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
	}
	if n := h.descriptors(); n > before+2 { // idle connections
		t.Errorf("%d descriptors, before %d", n, before)
	}
	g.all()
	g.whole(t, h.ok("mount", "--wait", g.ref))
	h.ok("umount", "--all")
}

// TestGrowingTwice mounts an image twice while it is read.
func TestGrowingTwice(t *testing.T) {
	needRoot(t)
	g := newGrowing(t)
	h := newHost(t)
	dirs := make([]string, 2)
	var both sync.WaitGroup
	for i, name := range []string{"one", "two"} {
		both.Go(func() { dirs[i] = h.ok("mount", "--name", name, g.ref) })
	}
	both.Wait()
	g.reached(g.digest)
	for _, dir := range dirs {
		holds(t, filepath.Join(dir, "early/1"), string(content("early/1", 100_000)))
	}
	h.ok("umount", "one") // the other goes on
	dirs[0] = h.ok("mount", "--name", "one", g.ref)
	g.all()
	for _, dir := range dirs {
		if m := h.settled(dir); m.State != "mounted" || m.Face != "kernel" {
			t.Errorf("%s: %+v", dir, m)
		}
		g.whole(t, dir)
	}
	g.once(t)
	h.ok("umount", "--all")
}

// TestGrowingVerbs runs what takes a mount as a whole: it waits until the mount is.
func TestGrowingVerbs(t *testing.T) {
	needRoot(t)
	for _, verb := range []string{"diff", "export", "cp", "commit"} {
		t.Run(verb, func(t *testing.T) {
			g := newGrowing(t)
			h := newHost(t)
			dir := g.begin(h)
			out := filepath.Join(h.root, "late")
			ran := later(func() result {
				switch verb {
				case "diff":
					return h.run("diff", "image")
				case "export":
					return h.run("export", "-o", out, "image")
				case "commit":
					return h.run("commit", "image", "app:1")
				}
				return h.run("cp", "image:/late/0", out)
			})
			h.inspect(dir)
			pending(t, verb, ran)
			g.all()
			if r := <-ran; r.code != 0 {
				t.Error(r)
			}
			if verb == "cp" {
				holds(t, out, string(content("late/0", 2<<20)))
			}
			if n := g.bytes(g.digest); n != g.size {
				t.Errorf("%s did not wait: %d bytes of %d had come", verb, n, g.size)
			}
			h.ok("umount", dir)
		})
	}
}

// TestGrowingLayers mounts layers of which the first is there, the second comes and
// the third does not yet: what a layer that is above may still hide is waited for.
func TestGrowingLayers(t *testing.T) {
	needRoot(t)
	a := newLayer(t)
	a.dir(".", "all", "hidden")
	a.file("all/a", content("a", 3000))
	a.file("hidden/a", []byte("a"))
	a.file("gone", []byte("gone"))
	b := newLayer(t)
	b.file("b", content("b", 2<<20))
	b.file("b-late", []byte("b"))
	c := newLayer(t)
	c.file("c", content("c", 2<<20))
	c.whiteout("gone")
	c.dir("hidden")
	c.opaque("hidden")
	c.file("hidden/c", []byte("c"))
	r := newRegistry(t)
	img := build(t, forms.Gzip, a.bytes(), b.bytes(), c.bytes())
	r.push("grow/image:1", img)
	g := gated(t, r)
	ref := g.addr + "/grow/image:1"
	digests, sizes := blobs(t, img)
	g.let(digests[1], part)
	g.let(digests[2], part)
	h := newHost(t)
	dir := h.ok("mount", ref)
	g.reached(digests[1])
	g.reached(digests[2])
	h.until(dir, func(m daemon.Mount) bool { return m.Layers[0].Whole || m.Layers[0].Local == sizes[0] })
	lists(t, dir, "all b c gone hidden")
	top := make([]byte, 4096) // the topmost layer's own waits for nobody
	f, err := os.Open(filepath.Join(dir, "c"))
	must(t, err)
	if _, err := f.Read(top); err != nil || string(top) != string(content("c", 2<<20)[:4096]) {
		t.Errorf("the begin of a file that passes: %v", err)
	}
	f.Close()
	read := func(name string) <-chan string {
		return later(func() string {
			b, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil {
				return err.Error()
			}
			return string(b)
		})
	}
	low, mid, gone, hidden := read("all/a"), read("b-late"), read("gone"), read("hidden/a")
	h.inspect(dir)
	for what, c := range map[string]<-chan string{"of the lowest layer": low, "of the second": mid, "that will be removed": gone, "that will be hidden": hidden} {
		pending(t, "a file "+what, c)
	}
	g.let(digests[2], all)
	h.inspect(dir)
	pending(t, "a file of the lowest layer, which the second may still have", low)
	g.let(digests[1], all)
	if got := <-low; got != string(content("a", 3000)) {
		t.Errorf("a file of the lowest layer: %d bytes", len(got))
	}
	if got := <-mid; got != "b" {
		t.Errorf("a file of the second layer: %q", got)
	}
	for _, c := range []<-chan string{gone, hidden} {
		if got := <-c; !strings.Contains(got, "no such file") {
			t.Errorf("a file that another layer hides: %q", got)
		}
	}
	h.settled(dir)
	if got := namesIn(t, dir) + " " + namesIn(t, filepath.Join(dir, "hidden")); got != "all b b-late c hidden c" {
		t.Errorf("names at the end: %s", got)
	}
	for i, d := range digests {
		if n := g.bytes(d); n != sizes[i] {
			t.Errorf("%d bytes of layer %d came, which has %d", n, i, sizes[i])
		}
	}
	h.ok("umount", dir)
}

// TestGrowingPlainUser does it without privilege: the mount stays FUSE's.
func TestGrowingPlainUser(t *testing.T) {
	needRoot(t) // to become another user
	_, err := exec.LookPath("fusermount3")
	need(t, err == nil, "fusermount3")
	g := newGrowing(t)
	h := newHostAs(t, &syscall.Credential{Uid: nobody, Gid: nobody})
	dir := g.begin(h)
	sum := func(name string) string {
		cmd := exec.Command(child, "sum", filepath.Join(dir, name))
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: h.as}
		cmd.Dir = "/"
		return strings.TrimSpace(finish(t, cmd, []string{"sum", name}).out)
	}
	if got := sum("early/0"); got != sumOf(content("early/0", 200_000)) {
		t.Errorf("early/0 has digest %s", got)
	}
	late := later(func() string { return sum("late/0") })
	if m := h.inspect(dir); m.State != "reading" {
		t.Errorf("inspect: %+v", m)
	}
	pending(t, "a file that has not passed", late)
	g.all()
	if got := <-late; got != sumOf(content("late/0", 2<<20)) {
		t.Errorf("late/0 has digest %s", got)
	}
	if m := h.settled(dir); m.State != "mounted" || m.Face != "fuse" || m.FaceReason == "" {
		t.Errorf("at the end: %+v", m)
	}
	if got := sum("early/1"); got != sumOf(content("early/1", 100_000)) {
		t.Errorf("early/1 has digest %s", got)
	}
	g.once(t)
	h.ok("umount", dir)
}
