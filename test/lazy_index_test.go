package test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/varvefs/varve/bench/forms"
	"github.com/varvefs/varve/bench/link"
	"github.com/varvefs/varve/daemon"
	"github.com/varvefs/varve/index/soci"
)

// withoutReferrers has a registry be one that does not know the referrers API.
func withoutReferrers(q *http.Request) *link.Fault {
	if link.ClassOf(q) == link.Referrer {
		return &link.Fault{Status: http.StatusNotFound}
	}
	return nil
}

// blobBytes sums the bytes of blobs that were asked for by range, and of those that
// were asked for whole.
func blobBytes(ranges []link.Request) (byRange, whole int64) {
	for _, q := range ranges {
		if q.Range != "" {
			byRange += q.Bytes
		} else {
			whole += q.Bytes
		}
	}
	return byRange, whole
}

// listedIndex is a line of `varve index ls`.
type listedIndex struct{ digest, kind string }

func (h *host) indexes(ref string) (out []listedIndex) {
	h.t.Helper()
	for _, line := range strings.Split(h.ok("index", "ls", ref), "\n")[1:] {
		f := strings.Fields(line)
		out = append(out, listedIndex{f[0], f[1]})
	}
	return out
}

// put stores a blob in a repository, behind the recorder's back.
func (r *registry) put(repo string, b []byte) ocispec.Descriptor {
	r.t.Helper()
	d := digest.FromBytes(b)
	r.send(http.MethodPost, repo+"/blobs/uploads/?digest="+d.String(), "application/octet-stream", b)
	return ocispec.Descriptor{MediaType: "application/octet-stream", Digest: d, Size: int64(len(b))}
}

// tag stores a manifest under a tag, or under its digest if that is empty.
func (r *registry) tag(repo, tag string, m ocispec.Manifest) digest.Digest {
	r.t.Helper()
	m.Versioned = specs.Versioned{SchemaVersion: 2}
	raw, err := json.Marshal(m)
	must(r.t, err)
	if tag == "" {
		tag = digest.FromBytes(raw).String()
	}
	r.send(http.MethodPut, repo+"/manifests/"+tag, ocispec.MediaTypeImageManifest, raw)
	return digest.FromBytes(raw)
}

// document reads a manifest or a blob.
func (r *registry) document(path string) []byte {
	r.t.Helper()
	return r.send(http.MethodGet, path, "", nil)
}

func (r *registry) send(method, path, mediaType string, b []byte) []byte {
	r.t.Helper()
	req, err := http.NewRequest(method, "http://"+r.server.Addr()+"/v2/"+path, bytes.NewReader(b))
	must(r.t, err)
	req.Header.Set("Content-Type", mediaType)
	resp, err := http.DefaultClient.Do(req)
	must(r.t, err)
	defer resp.Body.Close()
	out, err := io.ReadAll(resp.Body)
	must(r.t, err)
	if resp.StatusCode >= 300 {
		r.t.Fatalf("%s %s: %s %s", method, path, resp.Status, out)
	}
	return out
}

// manifest reads a manifest by its tag or digest.
func (r *registry) manifest(repo, id string) (m ocispec.Manifest) {
	r.t.Helper()
	must(r.t, json.Unmarshal(r.document(repo+"/manifests/"+id), &m))
	return m
}

// twoGroups is the most that a small file takes of a blob: the spans that it lies in
// are fetched with those beside them.
const twoGroups = 2 * 600 << 10

// TestIndexPush pushes the indexes of an image that has none; whoever mounts it
// then reads what is read, and no more.
func TestIndexPush(t *testing.T) {
	needRoot(t)
	for _, form := range []forms.Form{forms.Gzip, forms.Zstd, forms.Tar} {
		t.Run(string(form)+"/api", func(t *testing.T) { indexPush(t, form, nil) })
	}
	t.Run("gzip/tag", func(t *testing.T) { indexPush(t, forms.Gzip, withoutReferrers) })
}

func indexPush(t *testing.T, form forms.Form, fault func(*http.Request) *link.Fault) {
	const size = 200_000 // of a file
	l, names := small(t, 40, size)
	r := newRegistry(t)
	img := build(t, form, l)
	ref := r.push("lazy/image:1", img)
	r.rec.SetFault(fault)
	digests, sizes := blobs(t, img)
	before := r.document("lazy/image/manifests/1")
	maker := newHost(t)
	if got := maker.indexes(ref); len(got) != 0 {
		t.Errorf("indexes of a new image: %v", got)
	}
	r.requests(img)

	out := maker.ok("index", "--push", ref)
	want := []listedIndex{}
	for _, m := range regexp.MustCompile(`: (varve|soci) index (sha256:[0-9a-f]{64}) \(1 layers, `).FindAllStringSubmatch(out, -1) {
		want = append(want, listedIndex{m[2], m[1]})
	}
	if n := map[forms.Form]int{forms.Gzip: 2, forms.Tar: 2, forms.Zstd: 1}[form]; len(want) != n || want[0].kind != "varve" {
		t.Fatalf("index --push: %s", out)
	}
	_, ranges := r.requests(img)
	if n, _ := blobBytes(ranges); n != sizes[0] {
		t.Errorf("%d bytes of a layer of %d were read for its index", n, sizes[0])
	}
	if !bytes.Equal(before, r.document("lazy/image/manifests/1")) {
		t.Error("the image was changed")
	}
	if got := maker.indexes(ref); !sameSet(got, want) {
		t.Errorf("index ls: %v, want %v", got, want)
	}
	r.requests(img)
	if again := maker.ok("index", "--push", ref); again != out {
		t.Errorf("pushed once more: %s\nwas: %s", again, out)
	}
	_, ranges = r.requests(img)
	if n, whole := blobBytes(ranges); n != 0 || whole != 0 {
		t.Errorf("%d bytes of the layer were read for the same index", n+whole)
	}

	bundle := r.manifest("lazy/image", want[0].digest).Layers[0].Size
	for _, face := range faces {
		h := newHost(t)
		dir := h.ok("mount", "--face", face, ref)
		list(t, dir)
		got, ranges := r.requests(img)
		byRange, whole := blobBytes(ranges)
		if byRange != 0 || whole != bundle || got["blob"] != 1 || got["config"] != 1 {
			t.Errorf("%s: mount: requests %v, %d bytes of the layer and %d of its index, which has %d", face, got, byRange, whole, bundle)
		}
		m := h.inspect(dir)
		if l := m.Layers[0]; m.State != "mounted" || m.Face != face || m.Manifest != digest.FromBytes(before).String() || l.Index != "varve" || !l.Unproven || l.Whole || l.Local != 0 || l.Fetched != bundle || !strings.Contains(l.Reason, "as a referrer of the image") {
			t.Errorf("%s: inspect: %+v", face, m)
		}

		name := names[20]
		holds(t, filepath.Join(dir, name), string(content(name, size)))
		r.settled()
		got, ranges = r.requests(img)
		if len(ranges) > 2 || len(got) != 1 { // the kernel may ask for a file in two parts
			t.Errorf("%s: a file: requests %v", face, got)
		}
		byRange, _ = blobBytes(ranges)
		h.until(dir, func(m daemon.Mount) bool { // spans of gzip may share a byte
			return m.Layers[0].Fetched == bundle+byRange && m.Layers[0].Local >= byRange && m.Layers[0].Local < byRange+100
		})
		// A zstd frame can be entered only where it needs nothing of what lies before.
		if byRange > twoGroups && form != forms.Zstd {
			t.Errorf("%s: a file of %d bytes took %d of %d", face, size, byRange, sizes[0])
		}
		h.ok("umount", dir)
		dir = h.ok("mount", "--face", face, ref)
		holds(t, filepath.Join(dir, name), string(content(name, size)))
		got, _ = r.requests(img)
		asked(t, face+": again", got, nothing)

		// With its last byte the layer is proven.
		for _, name := range names {
			holds(t, filepath.Join(dir, name), string(content(name, size)))
		}
		holds(t, filepath.Join(dir, "etc/hostname"), "varve\n")
		m = h.until(dir, func(m daemon.Mount) bool { return !m.Layers[0].Unproven })
		if l := m.Layers[0]; !l.Whole || l.DiffID == "" || l.Local != sizes[0] || l.Digest != digests[0] {
			t.Errorf("%s: proven: %+v", face, l)
		}
		r.settled()
		_, ranges = r.requests(img)
		more, whole := blobBytes(ranges)
		if n := byRange + more; n < sizes[0]-100 || n > sizes[0]+int64(len(ranges)+1) || whole != 0 { // spans may share a byte
			t.Errorf("%s: %d bytes came of a layer of %d", face, n, sizes[0])
		}
		h.stop()
		if s := h.status("image"); !strings.HasPrefix(s, "Up ") {
			t.Errorf("%s: brought back: %s", face, s)
		}
		holds(t, filepath.Join(dir, names[0]), string(content(names[0], size)))
		got, _ = r.requests(img)
		asked(t, face+": brought back", got, nothing)
		h.ok("umount", dir)
	}

	if out := maker.ok("index", "rm", ref, want[0].digest); out != "Deleted: "+want[0].digest {
		t.Errorf("index rm: %s", out)
	}
	if got := maker.indexes(ref); !sameSet(got, want[1:]) {
		t.Errorf("index ls after index rm: %v", got)
	}
	maker.ok("index", "rm", ref)
	if got := maker.indexes(ref); len(got) != 0 {
		t.Errorf("index ls after index rm of all: %v", got)
	}
	if !bytes.Equal(before, r.document("lazy/image/manifests/1")) {
		t.Error("the image was changed")
	}
	h := newHost(t)
	dir := h.ok("mount", "--wait", ref)
	if l := h.inspect(dir).Layers[0]; l.Index != "checkpoints" || !strings.Contains(l.Reason, "no index") || l.Fetched != sizes[0] {
		t.Errorf("without indexes: %+v", l)
	}
	h.ok("umount", dir)
}

func sameSet[T comparable](a, b []T) bool {
	n := map[T]int{}
	for _, v := range a {
		n[v]++
	}
	for _, v := range b {
		n[v]--
	}
	for _, c := range n {
		if c != 0 {
			return false
		}
	}
	return true
}

// TestIndexKinds names for each layer what it is read by, and why.
func TestIndexKinds(t *testing.T) {
	needRoot(t)
	const size = 100_000
	l, names := small(t, 20, size)
	r := newRegistry(t)
	star := r.push("own/image:1", build(t, forms.EStargz, l))
	img := build(t, forms.Gzip, l)
	ref := r.push("kinds/image:1", img)
	maker := newHost(t)
	maker.ok("index", "--push", ref)
	var socis, ours string
	for _, x := range maker.indexes(ref) {
		if x.kind == "soci" {
			socis = x.digest
		} else {
			ours = x.digest
		}
	}

	if out := maker.ok("index", "--push", star); !strings.Contains(out, "it has a table of contents") || len(maker.indexes(star)) != 0 {
		t.Errorf("index of what has its own: %s", out)
	}
	maker.fails(3, "index", "--push", r.rec.Addr()+"/no/such")
	maker.fails(3, "index", "ls", r.rec.Addr()+"/no/such")

	// SOCI's second version: the image's manifest names its index.
	second := r.manifest("kinds/image", socis)
	second.Subject = nil
	second.Config.MediaType = soci.TypeIndexV2
	v2 := r.tag("kinds/image", "", second)
	whole := r.manifest("kinds/image", "1")
	whole.Annotations = map[string]string{soci.IndexDigestAnnotation: v2.String()}
	r.tag("kinds/image", "v2", whole)
	byAnnotation := r.rec.Addr() + "/kinds/image:v2"

	kind := func(what, ref, index, reason, fallback string, flags ...string) {
		t.Helper()
		h := newHost(t)
		dir := h.ok(append(append([]string{"mount"}, flags...), ref)...)
		want := map[string]string{}
		if fallback != "" {
			want[fallback] = "1"
		}
		if got := h.fallbacks(); !maps.Equal(got, want) {
			t.Errorf("%s: fallbacks %v, want %v", what, got, want)
		}
		if l := h.inspect(dir).Layers[0]; l.Index != index || !strings.Contains(l.Reason, reason) {
			t.Errorf("%s: index %q: %s", what, l.Index, l.Reason)
		}
		for _, name := range []string{names[3], names[19]} {
			holds(t, filepath.Join(dir, name), string(content(name, size)))
		}
		h.ok("umount", dir)
	}
	kind("its own", star, "toc", "its table of contents is named by the manifest", "")
	kind("varve's", ref, "varve", "as a referrer of the image", "", "--index=require")
	maker.ok("index", "rm", ref, ours)
	kind("SOCI's", ref, "soci", "as a referrer of the image", "", "--index=require")
	maker.ok("index", "rm", ref)
	kind("SOCI's second", byAnnotation, "soci", "by the manifest's annotation (SOCI v2)", "")
	kind("none", ref, "checkpoints", "it has no index, so it was read whole once", "no_index", "--wait")
	kind("none wanted", star, "checkpoints", "indexes were not wanted (--index=none)", "not_wanted", "--wait", "--index=none")

	r.rec.SetFault(func(q *http.Request) *link.Fault {
		if q.Header.Get("Range") != "" {
			return &link.Fault{DropRange: true}
		}
		return nil
	})
	kind("no ranges", star, "checkpoints", "the registry does not serve ranges", "no_range", "--wait")
	r.rec.SetFault(nil)

	h := newHost(t)
	if line := h.fails(1, "mount", "--index=require", ref); !strings.Contains(line, "varve index --push") {
		t.Errorf("required: %s", line)
	}
	unchanged(t, h)
	h.fails(2, "mount", "--index=sideways", ref)
	h.ok("umount", h.ok("mount", "--wait", ref))
	dir := h.ok("mount", "--index=require", ref) // it has one now, of its own
	if l := h.inspect(dir).Layers[0]; l.Index != "checkpoints" || !l.Whole {
		t.Errorf("read whole before: %+v", l)
	}
	h.ok("umount", dir)
}

// TestIndexOptions leaves layers out, and makes finer spans.
func TestIndexOptions(t *testing.T) {
	needRoot(t)
	a, names := small(t, 20, 200_000)
	b := newLayer(t)
	b.file("second", []byte("small"))
	r := newRegistry(t)
	img := build(t, forms.Gzip, a, b.bytes())
	ref := r.push("lazy/image:1", img)
	digests, sizes := blobs(t, img)
	h := newHost(t)
	h.fails(2, "index", "--span-size", "1KiB", ref)
	h.fails(2, "index", "--span-size", "much", ref)
	h.fails(2, "index", "--min-layer-size", "-1", ref)
	h.fails(2, "index", "--push", sources(t, img)["layout"])
	size := func(flags ...string) (bundle, ztoc int64) {
		t.Helper()
		out := h.ok(append(append([]string{"index", "--push", "--min-layer-size", "10KiB"}, flags...), ref)...)
		if !strings.Contains(out, "it is smaller than the least") || strings.Count(out, "(1 layers, ") != 2 {
			t.Errorf("index: %s", out)
		}
		for _, x := range h.indexes(ref) {
			m := r.manifest("lazy/image", x.digest)
			if len(m.Layers) != 1 {
				t.Errorf("%s: %d layers", x.kind, len(m.Layers))
			}
			if x.kind == "varve" {
				bundle = m.Layers[0].Size
			} else {
				ztoc = m.Layers[0].Size
			}
		}
		h.ok("index", "rm", ref)
		return bundle, ztoc
	}
	fine, fineSOCI := size("--span-size", "64KiB")
	coarse, coarseSOCI := size("--span-size", "4MiB")
	if fine <= coarse || fineSOCI <= coarseSOCI {
		t.Errorf("indexes with fine spans have %d and %d bytes, with coarse ones %d and %d", fine, fineSOCI, coarse, coarseSOCI)
	}
	h.ok("index", "--push", "--min-layer-size", "10KiB", ref)

	// The layer that was left out is read, the other is not.
	r.requests(img)
	other := newHost(t)
	dir := other.ok("mount", "--wait", ref)
	m := other.inspect(dir)
	if m.Layers[0].Index != "varve" || m.Layers[0].Local != 0 || m.Layers[1].Index != "checkpoints" || !m.Layers[1].Whole {
		t.Errorf("inspect: %+v", m.Layers)
	}
	_, ranges := r.requests(img)
	for _, q := range ranges {
		if strings.HasSuffix(q.Path, digests[0]) || strings.HasSuffix(q.Path, digests[1]) && q.Bytes != sizes[1] {
			t.Errorf("%s was asked for: %s, %d bytes", q.Path, q.Range, q.Bytes)
		}
	}
	holds(t, filepath.Join(dir, names[7]), string(content(names[7], 200_000)))
	holds(t, filepath.Join(dir, "second"), "small")
	other.ok("umount", dir)
}

// TestIndexMany has many read by an index at once, and the daemon killed: what came
// once is not asked for again.
func TestIndexMany(t *testing.T) {
	needRoot(t)
	for _, kind := range []string{"varve", "soci"} {
		for _, face := range faces {
			t.Run(kind+"/"+face, func(t *testing.T) { indexMany(t, kind, face) })
		}
	}
}

func indexMany(t *testing.T, kind, face string) {
	const size = 300_000 // of a file
	l, names := small(t, 30, size)
	r := newRegistry(t)
	img := build(t, forms.Gzip, l)
	ref := r.push("many/image:1", img)
	_, sizes := blobs(t, img)
	h := newHost(t)
	h.ok("index", "--push", "--span-size", "128KiB", ref)
	var bytes int64
	for _, x := range h.indexes(ref) {
		if x.kind != kind {
			h.ok("index", "rm", ref, x.digest)
		} else {
			bytes = r.manifest("many/image", x.digest).Layers[0].Size
		}
	}
	h.stop()
	h = newHost(t)
	r.requests(img)
	dirs := make([]string, 4)
	var mounts sync.WaitGroup
	for i := range dirs {
		mounts.Go(func() { dirs[i] = h.ok("mount", "--prefetch", "none", "--face", face, "--name", fmt.Sprint(i), ref) })
	}
	mounts.Wait()
	_, ranges := r.requests(img)
	if byRange, whole := blobBytes(ranges); byRange != 0 || whole != bytes {
		t.Errorf("%d bytes of the layer and %d of its index came, which has %d", byRange, whole, bytes)
	}
	var readers sync.WaitGroup
	for i := range 24 {
		readers.Go(func() {
			name := names[8+i%3]
			if got := helper(t, "sum", filepath.Join(dirs[i%len(dirs)], name)); got != sumOf(content(name, size)) {
				t.Errorf("%s has digest %s", name, got)
			}
		})
	}
	readers.Wait()
	r.settled()
	_, ranges = r.requests(img)
	came, _ := blobBytes(ranges)
	if came >= sizes[0]*3/4 {
		t.Errorf("%d bytes of %d came for three files in %d requests", came, sizes[0], len(ranges))
	}
	h.until("0", func(m daemon.Mount) bool { return m.Layers[0].Local >= came-int64(len(ranges)) })

	h.kill()
	if s := h.status("0"); !strings.HasPrefix(s, "Up ") {
		t.Errorf("brought back: %s", s)
	}
	for _, name := range names[8:11] {
		holds(t, filepath.Join(dirs[1], name), string(content(name, size)))
	}
	if l := h.inspect("1").Layers[0]; l.Index != kind || !l.Unproven {
		t.Errorf("brought back: %+v", l)
	}
	got, _ := r.requests(img)
	asked(t, "brought back", got, nothing)
	h.ok("umount", "--all")
}

// TestIndexPlainUser reads by an index without privilege.
func TestIndexPlainUser(t *testing.T) {
	needRoot(t) // to become another user
	_, err := exec.LookPath("fusermount3")
	need(t, err == nil, "fusermount3")
	l, names := small(t, 40, 100_000)
	r := newRegistry(t)
	img := build(t, forms.Gzip, l)
	ref := r.push("user/image:1", img)
	h := newHostAs(t, &syscall.Credential{Uid: nobody, Gid: nobody})
	h.ok("index", "--push", ref)
	digests, _ := blobs(t, img)
	h.ok("store", "drop", digests[0])
	r.requests(img)
	dir := h.ok("mount", ref)
	cmd := exec.Command(child, "sum", filepath.Join(dir, names[4]))
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: h.as}
	cmd.Dir = "/"
	if got := strings.TrimSpace(finish(t, cmd, []string{"sum"}).out); got != sumOf(content(names[4], 100_000)) {
		t.Errorf("%s has digest %s", names[4], got)
	}
	r.settled()
	_, ranges := r.requests(img)
	if n, _ := blobBytes(ranges); n == 0 || n > twoGroups {
		t.Errorf("a file took %d bytes", n)
	}
	if m := h.inspect(dir); m.Face != "fuse" || m.Layers[0].Index != "checkpoints" {
		t.Errorf("inspect: %+v", m)
	}
	h.ok("umount", dir)
}
