package test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/opencontainers/go-digest"

	"github.com/varvefs/varve/bench/forms"
	"github.com/varvefs/varve/bench/link"
)

var targets = []string{"estargz", "zstd:chunked", "gzip", "zstd"}

// convert converts an image and gives the new one's digest.
func (h *host) convert(args ...string) string {
	h.t.Helper()
	return isDigest(h.t, h.ok(append([]string{"convert", "-q"}, args...)...))
}

// remote reads an image of the registry past the recorder, and holds all its bytes
// against their digests.
func (r *registry) remote(repo string) v1.Image {
	r.t.Helper()
	img := mustGet[v1.Image](r.t)(remote.Image(r.reference(repo)))
	whole(r.t, img)
	return img
}

// whole reads all blobs of an image, which are held against their digests. The
// library's own check knows no zstd.
func whole(t *testing.T, img v1.Image) {
	t.Helper()
	invariant(t, img)
	c := mustGet[*v1.ConfigFile](t)(img.ConfigFile())
	for i, l := range mustGet[[]v1.Layer](t)(img.Layers()) {
		rc := mustGet[io.ReadCloser](t)(l.Compressed())
		n, err := io.Copy(io.Discard, rc)
		if err = errors.Join(err, rc.Close()); err != nil || n != mustGet[int64](t)(l.Size()) {
			t.Errorf("layer %d: %d bytes, %v", i, n, err)
		}
		rc = mustGet[io.ReadCloser](t)(l.Uncompressed())
		sum, _, err := v1.SHA256(rc)
		if err = errors.Join(err, rc.Close()); err != nil || sum != c.RootFS.DiffIDs[i] {
			t.Errorf("layer %d holds %s, the config says %s; %v", i, sum, c.RootFS.DiffIDs[i], err)
		}
	}
}

func (r *registry) reference(repo string) name.Reference {
	r.t.Helper()
	return mustGet[name.Reference](r.t)(name.ParseReference(r.server.Addr()+"/"+repo, name.Insecure))
}

// TestConvert converts everything to every form, mounts it where it was made, and
// from the registry elsewhere, where it is lazy if the form is.
func TestConvert(t *testing.T) {
	needRoot(t)
	layers := kinds(t)
	want := extracted(t, build(t, forms.Tar, layers...))
	for i, from := range []forms.Form{forms.Gzip, forms.ZstdChunkedContainers} {
		r := newRegistry(t)
		img := build(t, from, layers...)
		ref := r.push("from/image:1", img)
		h := newHost(t)
		for j, to := range targets {
			t.Run(string(from)+"/"+to, func(t *testing.T) {
				dst := fmt.Sprintf("%s/to/image:%d", r.rec.Addr(), j)
				digest := h.convert("--force", "--to", to, "--push", ref, dst)
				dir := h.ok("mount", "--wait", dst)
				sameTree(t, want, readTree(t, dir))
				h.ok("umount", dir)

				got := r.remote(strings.TrimPrefix(dst, r.rec.Addr()+"/"))
				if d := mustGet[v1.Hash](t)(got.Digest()).String(); d != digest {
					t.Errorf("the registry has %s, want %s", d, digest)
				}
				face := faces[(i+j)%len(faces)]
				other := newHost(t)
				r.rec.Reset()
				dir = other.ok("mount", "--wait", "--face", face, dst)
				_, ranges := r.requests(got)
				lazy := to == "estargz" || to == "zstd:chunked"
				for _, l := range other.inspect(dir).Layers {
					if (l.Format == to) != lazy || l.Whole && lazy && l.Size > 1<<20 {
						t.Errorf("layer of the form %s, whole %t, because %s", l.Format, l.Whole, l.Reason)
					}
				}
				for _, q := range ranges {
					if lazy && q.Range == "" {
						t.Errorf("the mount asked for a whole layer: %v", q)
					}
				}
				sameTree(t, want, readTree(t, dir))
				other.ok("umount", dir)
			})
		}
	}
}

// TestConvertAgain makes the same image of the same anywhere.
func TestConvertAgain(t *testing.T) {
	needRoot(t)
	layers := append(layered(t), kinds(t)...)
	r, ref := serve(t, forms.Gzip, layers...)
	profile := filepath.Join(t.TempDir(), "profile")
	must(t, os.WriteFile(profile, []byte("sizes/65536\nkinds/second\n"), 0o644))
	h, slow, source := newHost(t), newHost(t), sources(t, r.remote("test/image:1"))
	slow.env = append(slow.env, "GOMAXPROCS=1", "SOURCE_DATE_EPOCH=1000000000", "TZ=Asia/Tokyo")
	for _, args := range [][]string{{}, {"--zstdchunked"}, {"--to", "gzip", "--force"}, {"--to", "zstd"}, {"--estargz", "--from-profile", profile}} {
		first := h.convert(append(args, ref, "app:1")...)
		if again := slow.convert(append(args, ref, "elsewhere/app:2")...); again != first {
			t.Errorf("%v: %s, on another machine %s", args, first, again)
		}
		if again := slow.convert(append(args, source["layout"], "elsewhere/app:3")...); again != first {
			t.Errorf("%v: %s, of a layout %s", args, first, again)
		}
		if again := h.convert(append(args, ref, "app:1")...); again != first {
			t.Errorf("%v: %s, once more %s", args, first, again)
		}
	}
}

// tocOf reads a layer's table of contents with eStargz's library, which has to
// find all of it in order.
func tocOf(t *testing.T, l v1.Layer, annotations map[string]string) *estargz.Reader {
	t.Helper()
	rc := mustGet[io.ReadCloser](t)(l.Compressed())
	defer rc.Close()
	blob := mustGet[[]byte](t)(io.ReadAll(rc))
	r := mustGet[*estargz.Reader](t)(estargz.Open(io.NewSectionReader(bytes.NewReader(blob), 0, int64(len(blob)))))
	if _, err := r.VerifyTOC(digest.Digest(annotations[estargz.TOCJSONDigestAnnotation])); err != nil {
		t.Error(err)
	}
	return r
}

// TestConvertProfile puts first what a profile names.
func TestConvertProfile(t *testing.T) {
	needRoot(t)
	l, names := small(t, 40, 50_000)
	top := newLayer(t)
	top.dir("srv", "files")
	top.file("srv/start", content("start", 200_000))
	top.hardlink("srv/alias", "srv/start")
	top.file(names[3], content("new", 70_000))
	second := top.bytes()
	r, ref := serve(t, forms.Gzip, l, second)
	h := newHost(t)
	profile := filepath.Join(h.root, "profile")
	must(t, os.WriteFile(profile, fmt.Appendf(nil, "# a start\n/%s\n%s\n/srv/alias\n/%s\n/not/there\n", names[30], names[20], names[3]), 0o644))
	res := h.run("convert", "--from-profile", "profile", "--push", ref, r.rec.Addr()+"/to/image:1")
	if res.code != 0 || !strings.Contains(res.err, "warning: 1 of the 5 paths of the profile are not in "+ref) {
		t.Fatal(res)
	}
	if strings.Count(res.err, ": Converted\n") != 2 || !strings.Contains(res.err, "\n2 layers converted, from ") {
		t.Errorf("what was said: %s", res.err)
	}
	img := r.remote("to/image:1")
	m, layers := mustGet[*v1.Manifest](t)(img.Manifest()), mustGet[[]v1.Layer](t)(img.Layers())
	for i, want := range [][]string{{names[30], names[20]}, {"srv/start", names[3]}} {
		toc := tocOf(t, layers[i], m.Layers[i].Annotations)
		mark, ok := toc.Lookup(".prefetch.landmark")
		if !ok {
			t.Fatalf("layer %d has no landmark", i)
		}
		if _, ok := toc.Lookup(".no.prefetch.landmark"); ok {
			t.Errorf("layer %d has both landmarks", i)
		}
		last := int64(0)
		for _, name := range want {
			e, ok := toc.Lookup(name)
			if !ok || e.Offset <= last || e.Offset >= mark.Offset {
				t.Errorf("layer %d: %s is at %d, after %d, the landmark at %d", i, name, e.Offset, last, mark.Offset)
			}
			last = e.Offset
		}
		if e, ok := toc.Lookup("etc/hostname"); i == 0 && (!ok || e.Offset <= mark.Offset) {
			t.Errorf("a file that nobody named is at %d, the landmark at %d", e.Offset, mark.Offset)
		}
	}
	want := readTree(t, h.ok("mount", "--wait", ref))
	sameTree(t, want, readTree(t, h.ok("mount", r.rec.Addr()+"/to/image:1")))
	// Who knows nothing of the table of contents unpacks the same.
	unpacked := applied(t, topLayers(t, img, 2)...)
	for _, n := range []string{".prefetch.landmark", "stargz.index.json"} {
		if _, ok := unpacked[n]; !ok {
			t.Errorf("%s is not in the tar", n)
		}
		delete(unpacked, n)
	}
	plain := applied(t, l, second)
	plain["."] = unpacked["."]
	sameTree(t, plain, unpacked)

	// As stargz-snapshotter records it, on an image and by its layers.
	source := mustGet[v1.Hash](t)(r.remote("test/image:1").Digest())
	record := fmt.Appendf(nil, `{"path":%q,"manifestDigest":%q,"layerIndex":0}`+"\n", names[3], source)
	must(t, os.WriteFile(profile, record, 0o644))
	h.convert("--from-profile", "profile", "--push", ref, r.rec.Addr()+"/to/image:2")
	img = r.remote("to/image:2")
	m, layers = mustGet[*v1.Manifest](t)(img.Manifest()), mustGet[[]v1.Layer](t)(img.Layers())
	low, lowMark := tocOf(t, layers[0], m.Layers[0].Annotations).Lookup(".prefetch.landmark")
	if _, topMark := tocOf(t, layers[1], m.Layers[1].Annotations).Lookup(".prefetch.landmark"); !lowMark || topMark {
		t.Errorf("landmark of the lower layer %+v, of the upper %t", low, topMark)
	}
	h.ok("umount", "-a")
}

// TestConvertKept reads nothing of what has the form already.
func TestConvertKept(t *testing.T) {
	needRoot(t)
	l, names := small(t, 3, 50_000)
	r := newRegistry(t)
	for _, form := range []forms.Form{forms.EStargz, forms.ZstdChunked, forms.ZstdChunkedContainers} {
		img := build(t, form, l)
		ref := r.push("kept/"+string(form)+":1", img)
		h := newHost(t)
		to := "zstd:chunked"
		if form == forms.EStargz {
			to = "estargz"
		}
		if got := h.convert("--to", to, ref, "app:1"); got != mustGet[v1.Hash](t)(img.Digest()).String() {
			t.Errorf("%s became %s", form, got)
		}
		got, _ := r.requests(img)
		if got["blob"] > 0 {
			t.Errorf("%s: layers were read", form)
		}
		// Its layers are where they were.
		holds(t, filepath.Join(h.ok("mount", "app:1"), names[1]), string(content(names[1], 50_000)))
		h.ok("umount", "-a")
		forced := h.convert("--force", "--to", to, ref, "app:2")
		if forced == mustGet[v1.Hash](t)(img.Digest()).String() {
			t.Errorf("%s: nothing was forced", form)
		}
		if again := h.convert("--to", to, "app:2", "app:3"); again != forced {
			t.Errorf("%s: what was converted became %s", forced, again)
		}
	}
}

// TestConvertCommitted converts what was committed here and never pushed.
func TestConvertCommitted(t *testing.T) {
	withBoth(t, func(t *testing.T, overlay string) {
		_, ref := serve(t, forms.EStargz, committable(t)...)
		h := newHost(t)
		dir := h.writable(overlay, "w", ref)
		editAll(t, dir, overlay)
		h.commit("w", "app:1")
		first := h.convert("--to", "zstd:chunked", "app:1", "app:2")
		// The tars know the base's times better than its tables of contents do.
		want, got := readTree(t, dir).wholeSeconds(), readTree(t, h.ok("mount", "app:2")).wholeSeconds()
		got["."] = want["."]
		sameTree(t, want, got)
		if byID := h.convert("--to", "zstd:chunked", h.commit("w", "app:3"), "app:4"); byID == first {
			t.Error("a commit at another time gave the same image") // by its config
		}
		h.ok("umount", "-a")
	})
}

// TestConvertLatin keeps a layer that no table of contents can hold.
func TestConvertLatin(t *testing.T) {
	needRoot(t)
	a, b := newLayer(t), newLayer(t)
	a.file("caf\xe9", content("latin", 5000))
	b.file("plain", content("plain", 5000))
	_, ref := serve(t, forms.Gzip, a.bytes(), b.bytes())
	h := newHost(t)
	res := h.run("convert", ref, "app:1")
	if res.code != 0 || !strings.Contains(res.err, " stays as it is: ") || !strings.Contains(res.err, "1 layers converted") || !strings.Contains(res.err, "1 kept") {
		t.Error(res)
	}
	dir := h.ok("mount", "--wait", "app:1")
	holds(t, filepath.Join(dir, "caf\xe9"), string(content("latin", 5000)))
	holds(t, filepath.Join(dir, "plain"), string(content("plain", 5000)))
	h.ok("umount", "-a")
}

func TestConvertMistakes(t *testing.T) {
	needRoot(t)
	l, _ := small(t, 3, 100_000)
	img := build(t, forms.Gzip, l)
	r := newRegistry(t)
	ref := r.push("test/image:1", img)
	h := newHost(t)
	bad := filepath.Join(h.root, "bad")
	must(t, os.WriteFile(bad, []byte("a\n../b\n"), 0o644))
	h.ok("version")
	for _, tc := range []struct {
		code int
		args []string
	}{
		{2, []string{ref}},
		{2, []string{"--to", "nydus", ref, "app:1"}},
		{2, []string{"--estargz", "--zstdchunked", ref, "app:1"}},
		{2, []string{"--to", "gzip", "--zstdchunked", ref, "app:1"}},
		{2, []string{"--platform", "linux/amd64", "--all-platforms", ref, "app:1"}},
		{2, []string{"--platform", "linux/no/such/thing", ref, "app:1"}},
		{2, []string{"--from-profile", filepath.Join(h.root, "nowhere"), ref, "app:1"}},
		{2, []string{"--from-profile", bad, ref, "app:1"}},
		{2, []string{ref, "oci:" + h.root + "/layout"}},
		{2, []string{ref, "app@sha256:" + strings.Repeat("0", 64)}},
		{2, []string{"UPPER", "app:1"}},
		{3, []string{r.rec.Addr() + "/no/image:1", "app:1"}},
		{3, []string{"oci:" + h.root + "/nowhere", "app:1"}},
		{3, []string{"--offline", ref, "app:1"}},
		{3, []string{"--platform", "linux/mips64le", ref, "app:1"}},
		{5, []string{"127.0.0.1:1/no/registry:1", "app:1"}},
	} {
		h.fails(tc.code, append([]string{"convert", "-q"}, tc.args...)...)
	}
	config := mustGet[v1.Hash](t)(img.ConfigName()).String()
	r.rec.SetFault(func(q *http.Request) *link.Fault {
		if at := spoil("layer", 5000)(q, config); at > 0 {
			return &link.Fault{Corrupt: at}
		}
		return nil
	})
	before := h.store()
	for _, to := range targets {
		h.fails(6, "convert", "-q", "--force", "--to", to, ref, "app:1")
	}
	if after := h.store(); after != before {
		t.Errorf("a conversion that failed left %s, before it was %s", after, before)
	}
	h.fails(3, "mount", "--pull", "never", "app:1")
	r.rec.SetFault(nil)
	digest := h.convert(ref, "app:1")
	// The image is here, the registry is not.
	if line := h.fails(5, "convert", "-q", "--push", ref, "127.0.0.1:1/app:1"); !strings.Contains(line, "is converted to "+digest+", but not pushed") {
		t.Error(line)
	}
}

// TestConvertInterrupted takes the client, and then the daemon, away.
func TestConvertInterrupted(t *testing.T) {
	needRoot(t)
	r := newRegistry(t)
	r.push("test/image:1", mustGet[v1.Image](t)(forms.FromLayers(t.Context(), forms.EStargz, forms.Options{Dir: t.TempDir(), Level: 1}, noisy(1, 4, 2<<20), noisy(2, 4, 2<<20))))
	line := mustGet[*link.Link](t)(link.Start(context.Background(), r.server.Addr(), link.None))
	t.Cleanup(func() { line.Close() })
	ref := line.Addr() + "/test/image:1"
	h := newHost(t)
	profile := filepath.Join(h.root, "profile")
	must(t, os.WriteFile(profile, []byte("big/1-2\n"), 0o644))
	h.ok("umount", h.ok("mount", ref)) // for the manifest
	before := h.store()
	for _, args := range [][]string{{}, {"--from-profile", profile}} {
		for _, who := range []string{"client", "daemon"} {
			line.SetProfile(link.Profile{Rate: 8 << 20})
			start := line.Counters()
			cmd := h.command(append(append([]string{"convert", "-q", "--zstdchunked"}, args...), ref, "app:1")...)
			must(t, cmd.Start())
			for deadline := time.Now().Add(time.Minute); line.Counters().Sub(start).Down < 4<<20; time.Sleep(time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatal("the conversion does not get on")
				}
			}
			if who == "client" {
				must(t, cmd.Process.Signal(syscall.SIGINT))
				cmd.Wait()
				if code := cmd.ProcessState.ExitCode(); code != 130 {
					t.Errorf("the client ended with %d", code)
				}
			} else {
				h.kill()
				cmd.Wait()
				h.ok("mount", "--name", "w", ref) // starts another
				h.ok("umount", "w")
			}
			line.SetProfile(link.None)
			deadline := time.Now().Add(time.Minute)
			for h.store() != before && time.Now().Before(deadline) {
				time.Sleep(10 * time.Millisecond)
			}
			if after := h.store(); after != before {
				t.Errorf("%v, %s: left is %s, before it was %s", args, who, after, before)
			}
			if left, _ := filepath.Glob(filepath.Join(h.root, "state/convert-*")); len(left) > 0 {
				t.Errorf("%v, %s: left is %v", args, who, left)
			}
		}
	}
	h.convert("--zstdchunked", ref, "app:1")
	h.ok("umount", h.ok("mount", "app:1"))
}

// TestConvertSparse has a file whose holes are not in the tar.
func TestConvertSparse(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	f := mustGet[*os.File](t)(os.Create(filepath.Join(dir, "holes")))
	_, err := f.WriteAt([]byte("island"), 5<<20)
	must(t, errors.Join(err, f.Truncate(9<<20), f.Close()))
	raw := []byte(tool(t, "tar", "-S", "--format=posix", "-C", dir, "-cf", "-", "holes"))
	if h := mustGet[*tar.Header](t)(tar.NewReader(bytes.NewReader(raw)).Next()); h.Size != 9<<20 || len(raw) > 1<<20 {
		t.Fatalf("%d bytes of tar of %d", len(raw), h.Size)
	}
	_, ref := serve(t, forms.Gzip, raw)
	h := newHost(t)
	want := readTree(t, h.ok("mount", "--wait", ref))
	for _, to := range targets {
		h.convert("--force", "--to", to, ref, "app:1")
		dir := h.ok("mount", "--wait", "--name", "x", "app:1")
		sameTree(t, want, readTree(t, dir))
		h.ok("umount", "x")
	}
	h.ok("umount", "-a")
}

// TestConvertElsewhere has containerd and podman pull what was converted.
func TestConvertElsewhere(t *testing.T) {
	needRoot(t)
	d := newDistribution(t, false)
	src := d.put(t, "from/image:1", build(t, forms.Gzip, committable(t)...))
	h := newHost(t)
	want := readTree(t, h.ok("mount", "--wait", src)).roundSeconds()
	profile := filepath.Join(h.root, "profile")
	must(t, os.WriteFile(profile, []byte("still/second\nlinks/two\ndata/move\netc/conf\nopaque/sub/old\n"), 0o644))
	ctrd, pod := newContainerd(t), podman(t)
	for _, to := range targets {
		t.Run(to, func(t *testing.T) {
			ref := d.ref("to/" + strings.ReplaceAll(to, ":", "-") + ":1")
			h.convert("--force", "--to", to, "--from-profile", profile, "--push", src, ref)
			ctrd.ctr("image", "pull", "--plain-http", ref)
			got := ctrd.tree(ref)
			delete(got, ".prefetch.landmark")
			asUnpacked(t, want, got)

			pod("pull", "-q", "--tls-verify=false", ref)
			got = readTree(t, pod("image", "mount", ref))
			delete(got, ".prefetch.landmark")
			asUnpacked(t, want, got)
			pod("image", "unmount", ref)
		})
	}
	h.ok("umount", "-a")
}
