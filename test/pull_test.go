package test

import (
	"bytes"
	"fmt"
	"net/http"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/varvefs/varve/bench/forms"
	"github.com/varvefs/varve/bench/link"
	"github.com/varvefs/varve/index"
)

// ids gives an image's layers as they are shown.
func ids(t *testing.T, img v1.Image) (short []string) {
	digests, _ := blobs(t, img)
	for _, d := range digests {
		short = append(short, d[len("sha256:"):][:12])
	}
	return short
}

// said compares what a pull printed with what is wanted. The lines of the layers,
// between the first and the last three, may come in any order, and those that tell
// of progress may be missing.
func said(t *testing.T, r result, want ...string) {
	t.Helper()
	if r.code != 0 {
		t.Fatal(r)
	}
	lines := slices.DeleteFunc(strings.Split(strings.TrimSuffix(r.out, "\n"), "\n"), func(l string) bool {
		return strings.HasSuffix(l, ": Downloading") || strings.HasSuffix(l, ": Verifying Checksum")
	})
	if len(lines) > 4 && len(want) > 4 {
		slices.Sort(lines[1 : len(lines)-3])
		slices.Sort(want[1 : len(want)-3])
	}
	if !slices.Equal(lines, want) {
		t.Errorf("%s\nwant:\n%s", r, strings.Join(want, "\n"))
	}
}

func imageID(t *testing.T, img v1.Image) string {
	t.Helper()
	return mustGet[v1.Hash](t)(img.Digest()).String()
}

// TestPull brings what a mount needs, and no contents.
func TestPull(t *testing.T) {
	needRoot(t)
	lower, upper := newLayer(t), newLayer(t)
	lower.file("a", noise(1, 4<<20))
	upper.file("b", noise(2, 3<<20))
	r := newRegistry(t)
	img := build(t, forms.EStargz, lower.bytes(), upper.bytes())
	ref := r.push("team/app:latest", img)
	id, digest := ids(t, img), imageID(t, img)
	h := newHost(t)

	repo := strings.TrimSuffix(ref, ":latest")
	said(t, h.run("pull", repo),
		"Using default tag: latest", "latest: Pulling from team/app",
		id[0]+": Pulling fs layer", id[1]+": Pulling fs layer", id[0]+": Indexed", id[1]+": Indexed",
		"Digest: "+digest, "Status: Downloaded newer image for "+ref, ref)
	got, ranges := r.requests(img)
	if n, whole := blobBytes(ranges); n > 2<<20+100_000 || whole > 0 || got["manifest"] != 1 || got["config"] != 1 {
		t.Errorf("%d bytes by range and %d besides, requests %v", n, whole, got)
	}
	said(t, h.run("pull", ref), "latest: Pulling from team/app", id[0]+": Already exists", id[1]+": Already exists",
		"Digest: "+digest, "Status: Image is up to date for "+ref, ref)
	got, _ = r.requests(img)
	asked(t, "the second pull", got, map[string]int{"manifest": 1})
	if res := h.run("pull", "-q", repo+"@"+digest); res.code != 0 || res.out != repo+"@"+digest+"\n" || res.err != "" {
		t.Errorf("-q: %s", res)
	}

	other := newLayer(t)
	other.file("c", noise(3, 100_000))
	next := build(t, forms.EStargz, lower.bytes(), other.bytes())
	r.push("team/app:latest", next)
	said(t, h.run("pull", ref), "latest: Pulling from team/app",
		id[0]+": Already exists", ids(t, next)[1]+": Pulling fs layer", ids(t, next)[1]+": Indexed",
		"Digest: "+imageID(t, next), "Status: Downloaded newer image for "+ref, ref)

	if line := h.fails(3, "pull", r.rec.Addr()+"/team/none:1"); !strings.Contains(line, "team/none") {
		t.Errorf("what is not there: %s", line)
	}
	r.close()
	res := h.run("pull", ref)
	said(t, res, "latest: Pulling from team/app", id[0]+": Already exists", ids(t, next)[1]+": Already exists",
		"Digest: "+imageID(t, next), "Status: Image is here for "+ref+", its registry gives no answer", ref)
	if !strings.Contains(res.err, "going on with what is here") {
		t.Errorf("with the registry gone: %s", res)
	}
	h.fails(5, "pull", r.rec.Addr()+"/team/none:1")
	dir := h.ok("mount", "--offline", ref)
	if n := list(t, dir); n != 3 {
		t.Errorf("%d names", n)
	}
	h.ok("umount", dir)
}

// TestPullNotLazy has layers that no index makes lazy.
func TestPullNotLazy(t *testing.T) {
	needRoot(t)
	l, names := small(t, 10, 30_000)
	r := newRegistry(t)
	img := build(t, forms.Gzip, l)
	ref := r.push("team/app:1", img)
	id := ids(t, img)[0]
	h := newHost(t)
	if res := h.run("pull", "--index", "require", ref); res.code != 1 || !strings.Contains(res.err, "varve index --push") {
		t.Errorf("an index is required: %s", res)
	}
	res := h.run("pull", ref)
	said(t, res, "1: Pulling from team/app", id+": Pulling fs layer", id+": Pull complete",
		"Digest: "+imageID(t, img), "Status: Downloaded newer image for "+ref, ref)
	if !strings.Contains(res.err, "warning: 1 of 1 layers were not lazy") || !strings.Contains(res.err, id) || !strings.Contains(res.err, "it has no index") {
		t.Errorf("it is not said that the layer was read whole: %s", res)
	}
	if res := h.run("pull", ref); !strings.Contains(res.out, id+": Already exists\n") || res.err != "" {
		t.Errorf("again: %s", res)
	}
	r.close()
	if got := h.ok("cat", "--offline", ref, names[3]); got != string(content(names[3], 30_000)) {
		t.Errorf("offline: %d bytes", len(got))
	}
}

// TestPullFull brings every byte of every form.
func TestPullFull(t *testing.T) {
	needRoot(t)
	for _, form := range []forms.Form{forms.EStargz, forms.ZstdChunked, forms.ZstdChunkedContainers, forms.Gzip, forms.Zstd, forms.Tar} {
		for _, indexed := range []bool{false, true} {
			if indexed && !tarForm(form) {
				continue
			}
			t.Run(fmt.Sprintf("%s/indexed=%v", form, indexed), func(t *testing.T) { pullFull(t, form, indexed) })
		}
	}
}

func pullFull(t *testing.T, form forms.Form, indexed bool) {
	a, names := small(t, 100, 20_000)
	large := newLayer(t)
	large.file("large", content("large", 5<<20))
	large.file("noise", noise(1, 3<<20))
	r := newRegistry(t)
	img := build(t, form, a, large.bytes())
	ref := r.push("team/app:1", img)
	if indexed {
		newHost(t).ok("index", "--push", ref)
		r.rec.Reset()
	}
	_, sizes := blobs(t, img)
	size := sizes[0] + sizes[1]
	h := newHost(t)
	h.ok("pull", ref)
	_, ranges := r.requests(img)
	before, besides := blobBytes(ranges)
	lazy := indexed || !tarForm(form)
	if before+besides > 2<<20+50_000 == lazy {
		t.Errorf("%d bytes were fetched of %d", before+besides, size)
	}
	id := ids(t, img)
	res := h.run("pull", "--full", ref)
	if res.code != 0 || strings.Count(res.out, ": Pull complete\n")+strings.Count(res.out, ": Already exists\n") != 2 || res.err != "" {
		t.Errorf("pull --full: %s", res)
	}
	if lazy && !strings.Contains(res.out, id[1]+": Pull complete\n") {
		t.Errorf("the layer %s was not brought: %s", id[1], res)
	}
	_, ranges = r.requests(img)
	n, again := blobBytes(ranges)
	const headers = 30_000 // of forms and of tars, which nobody reads
	if n > size || lazy && n < size-before-headers || !lazy && n > 0 || again > 0 {
		t.Errorf("%d bytes by range and %d besides, for layers of %d", n, again, size)
	}
	h.ok("pull", "--full", ref)
	got, _ := r.requests(img)
	if got["blob"] > 0 || got["config"] > 0 || !indexed && got["manifest"] != 1 {
		t.Errorf("all is here, and it was asked for %v", got)
	}

	r.close()
	h.stop()
	dir := h.ok("mount", "--offline", ref)
	for _, name := range names {
		holds(t, filepath.Join(dir, name), string(content(name, 20_000)))
	}
	holds(t, filepath.Join(dir, "large"), string(content("large", 5<<20)))
	holds(t, filepath.Join(dir, "noise"), string(noise(1, 3<<20)))
	for _, l := range h.inspect(dir).Layers {
		if !l.Whole || l.Unproven {
			t.Errorf("a layer is not whole, or was not compared with its index: %+v", l)
		}
	}
	h.ok("umount", dir)
}

// resumable is an image of one large layer, in a registry behind a gate, of which a
// host has the index alone.
type resumable struct {
	*gate
	r      *registry
	ref    string
	digest string
	size   int64
	took   int64 // bytes of the layer that it takes to have all of it, the index apart
}

func newResumable(t *testing.T) *resumable {
	t.Helper()
	l := newLayer(t)
	for i := range 200 {
		l.file(fmt.Sprint(i), noise(byte(i), 100_000))
	}
	x := &resumable{r: newRegistry(t)}
	x.gate = gated(t, x.r)
	img := build(t, forms.EStargz, l.bytes())
	x.r.push("team/app:1", img)
	x.ref = x.addr + "/team/app:1"
	digests, sizes := blobs(t, img)
	x.digest, x.size = digests[0], sizes[0]
	h := newHost(t)
	h.ok("pull", x.ref)
	before := x.bytes(x.digest)
	h.ok("pull", "--full", x.ref)
	if x.took = x.bytes(x.digest) - before; x.took > x.size || x.took < 200*100_000 {
		t.Errorf("to pull a layer of %d took %d bytes", x.size, x.took)
	}
	return x
}

// half begins a full pull and waits until half of it has come.
func (x *resumable) half(h *host, before int64) (pull *running) {
	h.t.Helper()
	x.let(x.digest, x.size/2)
	pull = start(h, "pull", "--full", x.ref)
	for end := time.Now().Add(time.Minute); x.bytes(x.digest)-before < x.size/2-200_000; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			h.t.Fatalf("%d bytes of %d have come", x.bytes(x.digest)-before, x.size)
		}
	}
	return pull
}

// whole reads all files without the network.
func (x *resumable) whole(h *host) {
	h.t.Helper()
	dir := h.ok("mount", "--offline", x.ref)
	for i := range 200 {
		holds(h.t, filepath.Join(dir, fmt.Sprint(i)), string(noise(byte(i), 100_000)))
	}
	h.ok("umount", dir)
}

// running is a verb that runs beside the test.
type running struct {
	res  <-chan result
	kill func(syscall.Signal)
}

func start(h *host, args ...string) *running {
	cmd := h.command(args...)
	started := make(chan struct{})
	var once result
	c := make(chan result, 1)
	go func() {
		var out, errs strings.Builder
		cmd.Stdout, cmd.Stderr = &out, &errs
		err := cmd.Start()
		close(started)
		if err == nil {
			cmd.Wait()
		}
		once = result{args: args, out: out.String(), err: errs.String(), code: -1}
		if cmd.ProcessState != nil {
			once.code = cmd.ProcessState.ExitCode()
		}
		c <- once
	}()
	<-started
	return &running{c, func(s syscall.Signal) { cmd.Process.Signal(s) }}
}

// TestPullResumes breaks a full pull in the middle and calls it again: no byte comes
// twice.
func TestPullResumes(t *testing.T) {
	needRoot(t)
	x := newResumable(t)
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGKILL} {
		t.Run(sig.String(), func(t *testing.T) {
			x.let(x.digest, all)
			h := newHost(t)
			h.ok("pull", x.ref)
			before := x.bytes(x.digest)
			p := x.half(h, before)
			p.kill(sig)
			if res := <-p.res; sig == syscall.SIGINT && (res.code != 130 || !strings.HasSuffix(res.err, "varve: interrupted\n")) {
				t.Errorf("interrupted: %s", res)
			}
			// What was asked for comes; nothing else is asked for.
			x.let(x.digest, all)
			x.r.settled()
			if n := x.bytes(x.digest) - before; n > x.size*3/4 {
				t.Errorf("after the client went away %d bytes of %d have come", n, x.size)
			}
			h.ok("pull", "--full", x.ref)
			if n := x.bytes(x.digest) - before; n != x.took {
				t.Errorf("in two parts it took %d bytes, at once %d", n, x.took)
			}
			x.whole(h)
		})
	}
	t.Run("daemon", func(t *testing.T) {
		x.let(x.digest, all)
		h := newHost(t)
		h.ok("pull", x.ref)
		before := x.bytes(x.digest)
		p := x.half(h, before)
		h.kill()
		if res := <-p.res; res.code == 0 || !strings.Contains(res.err, "the daemon went away") {
			t.Errorf("the daemon was killed: %s", res)
		}
		x.let(x.digest, all)
		h.ok("pull", "--full", x.ref)
		// What was on its way was lost, and what had come was not.
		if n := x.bytes(x.digest) - before; n > x.took+x.took/4 {
			t.Errorf("in two parts it took %d bytes, at once %d", n, x.took)
		}
		x.whole(h)
	})
}

// TestPullRefused has the registry refuse in the middle.
func TestPullRefused(t *testing.T) {
	needRoot(t)
	x := newResumable(t)
	h := newHost(t)
	h.ok("pull", x.ref)
	before := x.bytes(x.digest)
	x.r.rec.SetFault(func(q *http.Request) *link.Fault {
		var from int64
		if fmt.Sscanf(q.Header.Get("Range"), "bytes=%d-", &from); path.Base(q.URL.Path) == x.digest && from > x.size/8 {
			return &link.Fault{Status: http.StatusNotFound}
		}
		return nil
	})
	res := h.run("pull", "--full", x.ref)
	if res.code != 5 || !strings.Contains(res.err, "404") || !strings.Contains(res.err, "pull "+x.ref) || strings.Contains(res.out, "Pull complete") {
		t.Errorf("the registry refuses: %s", res)
	}
	// It gives up soon: what is not to be had is not asked for to the end.
	refused := 0
	for _, q := range x.r.rec.Requests() {
		if q.Fault {
			refused++
		}
	}
	if refused > 40 {
		t.Errorf("%d requests were refused", refused)
	}
	x.r.rec.SetFault(nil)
	h.ok("pull", "--full", x.ref)
	if n := x.bytes(x.digest) - before; n != x.took {
		t.Errorf("in two parts it took %d bytes, at once %d", n, x.took)
	}
	x.whole(h)
}

// TestLimitRate fetches no faster than is allowed, of layers with and without an
// index; who reads is not held up.
func TestLimitRate(t *testing.T) {
	needRoot(t)
	const bytes, rate = 3_000_000, 2_000_000
	// An eighth of a second's worth may come at once.
	least := time.Second * (bytes - rate/8) / rate
	for _, form := range []forms.Form{forms.EStargz, forms.Gzip} {
		l := newLayer(t)
		l.file("a", noise(1, bytes))
		_, ref := serve(t, form, l.bytes())
		for _, args := range [][]string{{"pull", "--full", "--limit-rate", "2MB", ref}, {"warm", "--limit-rate", "2MB", ref, "/"}} {
			h := newHost(t)
			begun := time.Now()
			h.ok(args...)
			if d := time.Since(begun); d < least {
				t.Errorf("%s: varve %s took %v, want at least %v", form, args[0], d, least)
			}
		}
	}
	h := newHost(t)
	for _, bad := range []string{"x", "-1", "10", "2MBit", "1e99"} {
		if line := h.fails(2, "pull", "--limit-rate="+bad, "a/b"); !strings.Contains(line, "--limit-rate") {
			t.Errorf("%s: %s", bad, line)
		}
	}

	x := newResumable(t)
	dir := h.ok("mount", x.ref)
	p := start(h, "pull", "--full", "--limit-rate", "100kB", x.ref) // for minutes
	for i := range 200 {
		if i%20 == 0 {
			helper(t, "sum", filepath.Join(dir, fmt.Sprint(i)))
		}
	}
	pending(t, "pull at 100 kB a second", p.res)
	p.kill(syscall.SIGINT)
	<-p.res
	h.ok("umount", dir)
}

// TestPullPlatforms pulls all images of a manifest list.
func TestPullPlatforms(t *testing.T) {
	needRoot(t)
	other := map[string]string{"amd64": "arm64"}[runtime.GOARCH]
	if other == "" {
		other = "amd64"
	}
	for _, archs := range [][]string{{runtime.GOARCH, "s390x", other}, {other, "riscv64"}} {
		r := newRegistry(t)
		idx := platforms(t, true, archs...)
		must(t, remote.WriteIndex(r.reference("list/image:1"), idx))
		ref := r.rec.Addr() + "/list/image:1"
		h := newHost(t)
		if archs[0] != runtime.GOARCH {
			h.fails(3, "pull", ref)
		}
		h.fails(2, "pull", "--all-platforms", "--platform", "linux/s390x", ref)
		res := h.run("pull", "--all-platforms", ref)
		want := "Digest: " + mustGet[v1.Hash](t)(idx.Digest()).String() + "\n"
		if res.code != 0 || strings.Count(res.out, "\nPlatform linux/") != len(archs) || strings.Count(res.out, want) != 1 || !strings.HasSuffix(res.out, "\n"+ref+"\n") {
			t.Errorf("pull --all-platforms: %s", res)
		}
		r.close()
		for _, arch := range archs {
			if got := h.ok("cat", "--offline", "--platform", "linux/"+arch, ref, "/etc/arch"); got != arch {
				t.Errorf("%s: %q", arch, got)
			}
		}
	}
}

// TestPullIndexLies pulls by an index that says of a file what the layer does not:
// nothing of it is kept, and the next pull does without.
func TestPullIndexLies(t *testing.T) {
	needRoot(t)
	x := newIndexed(t)
	x.replace(x.ours, func(raw []byte) []byte {
		b, err := index.ReadBundle(raw)
		must(t, err)
		for i := range b.Entries {
			if b.Entries[i].Name == x.names[9] {
				b.Entries[i].Mode |= 0o4111
			}
		}
		var out bytes.Buffer
		must(t, index.WriteBundle(&out, b))
		return out.Bytes()
	})
	h := newHost(t)
	res := h.run("pull", "--full", x.ref)
	if res.code != 6 || !strings.Contains(res.err, "pull it again") || strings.Contains(res.out, "Pull complete") {
		t.Errorf("an index that lies: %s", res)
	}
	res = h.run("pull", "--full", x.ref)
	if res.code != 0 || !strings.Contains(res.out, "Pull complete") || !strings.Contains(res.err, "was found wrong before") {
		t.Errorf("after that: %s", res)
	}
	dir := h.ok("mount", "--offline", x.ref)
	x.whole(dir)
	h.ok("umount", dir)
}
