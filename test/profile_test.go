package test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/varvefs/varve/bench/forms"
	"github.com/varvefs/varve/bench/link"
	"github.com/varvefs/varve/daemon"
	"github.com/varvefs/varve/fetch/profile"
	"github.com/varvefs/varve/index/soci"
)

// profiled is an image that a workload starts from: it reads some files in an order
// that is not the image's.
type profiled struct {
	*registry
	img   v1.Image
	ref   string
	names []string // of all files
	reads []string // of those that are read, in that order
}

const (
	profiledSize = 40_000 // of a file
	profiledRepo = "start/image"
)

func newProfiled(t *testing.T, form forms.Form) *profiled {
	t.Helper()
	l, names := small(t, 400, profiledSize)
	p := &profiled{registry: newRegistry(t), img: build(t, form, l), names: names}
	p.ref = p.push(profiledRepo+":1", p.img)
	for i := range 12 {
		p.reads = append(p.reads, names[(i*157+31)%len(names)])
	}
	return p
}

// start runs the workload.
func (p *profiled) start(dir string) {
	p.t.Helper()
	for _, name := range p.reads {
		if got := helper(p.t, "sum", filepath.Join(dir, name)); got != sumOf(content(name, profiledSize)) {
			p.t.Errorf("%s has digest %s", name, got)
		}
	}
}

// burst waits until what the start needs is here and gives what brought it.
func (p *profiled) burst(h *host, dir, source string) (asked map[string]int, ranges []link.Request) {
	p.t.Helper()
	m := h.until(dir, func(m daemon.Mount) bool { return m.Profile.State == "done" || m.Profile.State == "failed" })
	if u := m.Profile; u.Source != source || u.State != "done" || u.Fetched != u.Missing || (source != "none") != (u.Bytes > 0) {
		p.t.Errorf("fetched ahead by %q: %+v", source, u)
	}
	p.settled()
	return p.requests(p.img)
}

// ready mounts the image where its start is known, and runs it: it has to wait for
// nothing.
func (p *profiled) ready(h *host, source string, flags ...string) (asked map[string]int, ranges []link.Request) {
	p.t.Helper()
	p.requests(p.img)
	dir := h.ok(append(append([]string{"mount"}, flags...), p.ref)...)
	asked, ranges = p.burst(h, dir, source)
	p.start(dir)
	p.settled()
	if got, _ := p.requests(p.img); len(got) > 0 {
		p.t.Errorf("a start that has a profile (%s) asked for %v", source, got)
	}
	h.ok("umount", dir)
	return asked, ranges
}

// empty deletes what is here of layers, while no daemon runs.
func (h *host) empty() {
	h.t.Helper()
	h.stop()
	must(h.t, os.RemoveAll(filepath.Join(h.root, "cache")))
}

func (h *host) profileFile(m, title string) string {
	return filepath.Join(h.root, "state", "profiles", strings.TrimPrefix(m, "sha256:"), title+".json.gz")
}

func (h *host) shown(args ...string) (p daemon.ProfileShown) {
	h.t.Helper()
	must(h.t, json.Unmarshal([]byte(h.ok(append([]string{"profile", "show", "--json"}, args...)...)), &p))
	return p
}

func TestProfile(t *testing.T) {
	needRoot(t)
	for _, face := range faces {
		t.Run(face, func(t *testing.T) { startTwice(t, face) })
	}
}

// startTwice has the second start of an image know what the first one read.
func startTwice(t *testing.T, face string) {
	p := newProfiled(t, forms.EStargz)
	h := newHost(t)
	dir := h.ok("mount", "--face", face, p.ref)
	if m := h.inspect(dir); m.Prefetch != "profile" || !m.Recording {
		t.Errorf("inspect: %+v", m)
	}
	if got, _ := p.burst(h, dir, "none"); got["referrer"] != 1 {
		t.Errorf("a first mount asked for %v", got)
	}
	p.start(dir)
	p.settled()
	first, _ := p.requests(p.img)
	if first["blob"] < len(p.reads)/2 {
		t.Fatalf("the first start asked for %v: it proves nothing", first)
	}
	h.ok("umount", dir)

	shown := h.shown(p.ref)
	var got []string
	for i, f := range shown.Files {
		got = append(got, strings.TrimPrefix(f.Path, "/"))
		if f.Bytes != profiledSize || f.Size != profiledSize || i > 0 && f.Seconds < shown.Files[i-1].Seconds {
			t.Errorf("profile show: %+v", f)
		}
	}
	if !slices.Equal(got, p.reads) || shown.Files[0].Seconds != 0 {
		t.Errorf("profile show: %v, want %v", got, p.reads)
	}
	if out := h.ok("profile", "ls"); !strings.Contains(out, p.ref) || !strings.Contains(out, "default") || strings.Count(out, "\n") != 1 {
		t.Errorf("profile ls: %s", out)
	}
	if out := h.ok("profile", "show", p.ref); strings.Count(out, "\n") != len(p.reads) || !strings.Contains(out, "/"+p.reads[0]) {
		t.Errorf("profile show: %s", out)
	}

	h.empty()
	asked, ranges := p.ready(h, "local", "--face", face)
	if asked["referrer"] != 0 {
		t.Errorf("a start that has a local profile asked for %v", asked)
	}
	var bytes int64
	for _, q := range ranges {
		bytes += q.Bytes
	}
	touched := h.touched(p)
	if n := bytes - touched; n < 0 || n > touched/10+h.tail(p) {
		t.Errorf("%d bytes came for the %d of the files that are read", bytes, touched)
	}
}

// touched gives the compressed bytes of the files that are read: what a mount that
// fetches nothing else fetches for them.
func (h *host) touched(p *profiled) int64 {
	h.t.Helper()
	h = newHost(h.t)
	dir := h.ok("mount", "--prefetch", "none", p.ref)
	p.settled()
	p.requests(p.img)
	p.start(dir)
	p.settled()
	_, ranges := p.requests(p.img)
	if len(ranges) != len(p.reads) {
		h.t.Errorf("%d requests for %d files", len(ranges), len(p.reads))
	}
	n, _ := blobBytes(ranges)
	m := h.inspect(dir)
	if m.Local != n || m.Prefetch != "none" || m.Profile.Source != "none" {
		h.t.Errorf("%d bytes of files are here, %d came: %+v", m.Local, n, m)
	}
	h.ok("umount", dir)
	return n
}

// tail gives the bytes that a mount of the image takes.
func (h *host) tail(p *profiled) int64 {
	h.t.Helper()
	h = newHost(h.t)
	p.requests(p.img)
	h.ok("umount", h.ok("mount", "--prefetch", "none", p.ref))
	p.settled()
	_, ranges := p.requests(p.img)
	n, _ := blobBytes(ranges)
	return n
}

// recorded gives a machine that has a profile of the workload.
func (p *profiled) recorded(flags ...string) *host {
	p.t.Helper()
	h := newHost(p.t)
	dir := h.ok(append(append([]string{"mount"}, flags...), p.ref)...)
	p.start(dir)
	h.ok("umount", dir)
	return h
}

// TestProfileNotUsed has profiles here that cannot be used: the mount says so, and
// goes on.
func TestProfileNotUsed(t *testing.T) {
	needRoot(t)
	p := newProfiled(t, forms.EStargz)
	h := p.recorded()
	m := digest.FromBytes(p.document(profiledRepo + "/manifests/1")).String()
	path := h.profileFile(m, "default")
	good, err := os.ReadFile(path)
	must(t, err)
	change := func(by func(*profile.Profile)) []byte {
		x := mustGet[*profile.Profile](t)(profile.Decode(good))
		by(x)
		return mustGet[[]byte](t)(x.Encode())
	}
	for says, b := range map[string][]byte{
		"malformed":        []byte("junk"),
		"unexpected EOF":   good[:len(good)/2],
		"limit is":         bytes.Repeat([]byte{0}, profile.MaxBytes+1),
		"another image":    change(func(x *profile.Profile) { x.Manifest = digest.FromString("another").String() }),
		"outdated profile": change(func(x *profile.Profile) { x.Layers[0].Size += 4096 }),
	} {
		h.empty()
		must(t, os.WriteFile(path, b, 0o600))
		r := h.run("mount", "--record-for", "0", p.ref)
		if says == "limit is" {
			says = "malformed"
		}
		if r.code != 0 || strings.Count(r.err, "\n") != 1 || !strings.Contains(r.err, says) || !strings.HasPrefix(r.err, "varve: warning: the start-up profile ") {
			t.Errorf("%s: %s", says, r)
		}
		if !strings.Contains(h.logText(), "start-up profile not used") {
			t.Errorf("%s: nothing of it in the log", says)
		}
		dir := strings.TrimSuffix(r.out, "\n")
		p.burst(h, dir, "none")
		p.start(dir)
		h.ok("umount", dir)
		if left, _ := os.ReadFile(path); !bytes.Equal(left, b) {
			t.Errorf("%s: a mount that does not record changed it", says)
		}
	}
	// A mount that records makes a new one of it.
	dir := h.ok("mount", "--face", "fuse", p.ref)
	p.start(dir)
	h.ok("umount", dir)
	h.empty()
	p.ready(h, "local")
}

// TestProfileNames keeps the starts of several workloads apart.
func TestProfileNames(t *testing.T) {
	needRoot(t)
	p := newProfiled(t, forms.EStargz)
	h := p.recorded("--profile", "web")
	dir := h.ok("mount", "--face", "fuse", "--profile", "one", p.ref)
	helper(t, "sum", filepath.Join(dir, p.reads[3]))
	if m := h.inspect(dir); m.Profile.Name != "one" {
		t.Errorf("inspect: %+v", m.Profile)
	}
	h.ok("umount", dir)
	if got := h.shown("--name", "one", p.ref).Files; len(got) != 1 || got[0].Path != "/"+p.reads[3] {
		t.Errorf("one: %+v", got)
	}
	if got := h.shown("--name", "web", p.ref).Files; len(got) != len(p.reads) {
		t.Errorf("web: %+v", got)
	}
	h.fails(3, "profile", "show", p.ref)
	h.ok("profile", "push", "--name", "web", p.ref)
	p.ready(newHost(t), "referrer", "--profile", "web")
	p.requests(p.img)
	other := newHost(t)
	dir = other.ok("mount", p.ref)
	p.burst(other, dir, "none")
	other.ok("umount", dir)

	if out := h.ok("profile", "rm", p.ref); out != "Deleted: "+p.ref+" one\nDeleted: "+p.ref+" web" {
		t.Errorf("profile rm: %s", out)
	}
	for _, args := range [][]string{
		{"mount", "--profile", "../x", p.ref}, {"mount", "--prefetch", "some", p.ref}, {"mount", "--record-for", "-1s", p.ref}, {"mount", "--record-for", "soon", p.ref},
		{"profile", "show", "--name", "a/b", p.ref}, {"profile"}, {"profile", "what"}, {"profile", "show"}, {"profile", "ls", "--remote"}, {"profile", "import", p.ref, "/nowhere"},
	} {
		if r := h.run(args...); r.code != 2 {
			t.Errorf("%s", r)
		}
	}
	if got, _ := os.ReadDir(filepath.Join(h.root, "state", "profiles")); len(got) != 0 {
		t.Errorf("left: %v", got)
	}
}

// TestProfileImport makes profiles of what others recorded.
func TestProfileImport(t *testing.T) {
	needRoot(t)
	p := newProfiled(t, forms.EStargz)
	var paths, records bytes.Buffer
	fmt.Fprintln(&paths, "# what it reads")
	for _, name := range p.reads {
		fmt.Fprintln(&paths, "/"+name)
		must(t, json.NewEncoder(&records).Encode(map[string]any{"path": name, "manifestDigest": digest.FromString("other").String(), "layerIndex": 7}))
	}
	fmt.Fprintln(&paths, "not/there")
	file := filepath.Join(t.TempDir(), "start")
	for name, text := range map[string][]byte{"paths": paths.Bytes(), "records": records.Bytes()} {
		h := newHost(t)
		must(t, os.WriteFile(file, text, 0o600))
		r := h.run("profile", "import", p.ref, file)
		if r.code != 0 || strings.Contains(r.err, "1 of 13 paths are no files") != (name == "paths") {
			t.Errorf("%s: %s", name, r)
		}
		p.ready(h, "local")
		raw, err := os.ReadFile(h.profileFile(digest.FromBytes(p.document(profiledRepo+"/manifests/1")).String(), "default"))
		must(t, err)
		must(t, os.WriteFile(file, raw, 0o600))
		other := newHost(t)
		other.ok("profile", "import", "--name", "copy", p.ref, file)
		p.ready(other, "local", "--profile", "copy")
	}
	h := newHost(t)
	_, else_ := serve(t, forms.EStargz, newLayerOf(t, "else"))
	if line := h.fails(2, "profile", "import", else_, file); !strings.Contains(line, "profile of another image") {
		t.Errorf("import of another image's: %s", line)
	}
	for says, text := range map[string]string{"has none of the 1 paths": "not/there\n", "malformed profile": "\x1f\x8bjunk", "invalid character": "{x}\n"} {
		must(t, os.WriteFile(file, []byte(text), 0o600))
		if line := h.fails(2, "profile", "import", p.ref, file); !strings.Contains(line, says) {
			t.Errorf("import: %s, want %q", line, says)
		}
	}
}

// newLayerOf makes a layer of one file.
func newLayerOf(t *testing.T, name string) []byte {
	l := newLayer(t)
	l.file(name, []byte(name))
	return l.bytes()
}

// TestProfileLandmark converts an image by its profile: who has no profile fetches
// what lies before the landmark.
func TestProfileLandmark(t *testing.T) {
	needRoot(t)
	p := newProfiled(t, forms.EStargz)
	h := p.recorded()
	m := digest.FromBytes(p.document(profiledRepo + "/manifests/1")).String()
	for i, from := range []string{"@default", h.profileFile(m, "default")} {
		q := *p
		q.ref = fmt.Sprintf("%s/converted/%d:1", p.rec.Addr(), i)
		h.ok("convert", "--quiet", "--force", "--push", "--from-profile", from, p.ref, q.ref)
		other := newHost(t)
		q.requests(q.img)
		dir := other.ok("mount", q.ref)
		asked, ranges := q.burst(other, dir, "landmark")
		if n, _ := blobBytes(ranges); asked["blob"] > 3 || n > 1<<20 {
			t.Errorf("%s: %v, %d bytes", from, asked, n)
		}
		q.start(dir)
		besides := q.names[slices.IndexFunc(q.names, func(n string) bool { return !slices.Contains(q.reads, n) })]
		// Its builder knew the start: what was not foreseen brings no neighbours.
		helper(t, "sum", filepath.Join(dir, besides))
		q.settled()
		asked, ranges = q.requests(q.img)
		if n, _ := blobBytes(ranges); asked["blob"] != 1 || n > profiledSize+1000 {
			t.Errorf("%s: the start and one file more asked for %v, %d bytes", from, asked, n)
		}
		other.ok("umount", dir)
		// None of what others may find in a file of the image.
		if out := newHost(t).ok("ls", q.ref, "/"); strings.Contains(out, "landmark") {
			t.Errorf("ls: %s", out)
		}
	}
	if line := h.fails(3, "convert", "--quiet", "--force", "--from-profile", "@web", p.ref, p.ref+"-x"); !strings.Contains(line, `no start-up profile "web" here`) {
		t.Errorf("convert: %s", line)
	}
}

// TestProfileSOCI follows the list of spans that a SOCI index has.
func TestProfileSOCI(t *testing.T) {
	needRoot(t)
	p := newProfiled(t, forms.Gzip)
	maker := newHost(t)
	maker.ok("index", "--push", "--span-size", "64KiB", p.ref)
	var index ocispec.Manifest
	for _, x := range maker.indexes(p.ref) {
		if x.kind == "soci" {
			index = p.manifest(profiledRepo, x.digest)
		}
		maker.ok("index", "rm", p.ref, x.digest)
	}
	layer := index.Layers[0].Annotations[soci.LayerDigestAnnotation]
	list := p.put(profiledRepo, []byte(`{"version":"1.0","prefetch_spans":[{"start_span":3,"end_span":9,"priority":2},{"start_span":20,"end_span":20}]}`))
	list.MediaType, list.Annotations = soci.TypePrefetch, map[string]string{soci.LayerDigestAnnotation: layer}
	index.Layers = append(index.Layers, list)
	p.tag(profiledRepo, "", index)
	p.requests(p.img)
	h := newHost(t)
	dir := h.ok("mount", "--index", "require", p.ref)
	_, ranges := p.burst(h, dir, "soci")
	m := h.inspect(dir)
	byRange, _ := blobBytes(slices.DeleteFunc(ranges, func(q link.Request) bool { return !strings.HasSuffix(q.Path, layer) }))
	if byRange == 0 || m.Profile.Missing < byRange*8/10 || byRange > m.Size/4 {
		t.Errorf("%d bytes came: %+v", byRange, m.Profile)
	}
	p.start(dir)
	h.ok("umount", dir)
}

// TestProfileEnds has the recording end in every way.
func TestProfileEnds(t *testing.T) {
	needRoot(t)
	p := newProfiled(t, forms.EStargz)
	for name, end := range map[string]func(h *host, dir string) (kept bool){
		"killed":       func(h *host, dir string) bool { h.kill(); h.ok("ps"); return false },
		"stopped":      func(h *host, dir string) bool { h.stop(); return true },
		"not recorded": func(h *host, dir string) bool { h.ok("umount", dir); return false },
		"quiet": func(h *host, dir string) bool {
			h.until(dir, func(m daemon.Mount) bool { return !m.Recording })
			h.kill()
			return true
		},
		"for a time": func(h *host, dir string) bool {
			h.until(dir, func(m daemon.Mount) bool { return !m.Recording })
			return true
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			flags := map[string][]string{"not recorded": {"--record-for", "0"}, "for a time": {"--record-for", "2s"}}[name]
			dir := h.ok(append(append([]string{"mount", "--face", "fuse"}, flags...), p.ref)...)
			p.start(dir)
			kept := end(h, dir)
			if out := h.ok("profile", "ls"); strings.Contains(out, p.ref) != kept {
				t.Errorf("profile ls: %s", out)
			}
			h.ok("umount", "--all")
			if _, err := os.Stat(h.profileFile(digest.FromBytes(p.document(profiledRepo+"/manifests/1")).String(), "default")); (err == nil) != kept {
				t.Errorf("its file: %v", err)
			}
			if kept {
				h.empty()
				p.ready(h, "local")
			}
		})
	}
}

// TestProfileGrows adds what a later start needs to a profile, and keeps the rest.
func TestProfileGrows(t *testing.T) {
	needRoot(t)
	p := newProfiled(t, forms.EStargz)
	h := p.recorded()
	more := p.names[2]
	h.empty()
	dir := h.ok("mount", p.ref)
	p.burst(h, dir, "local")
	for _, name := range []string{p.reads[0], more, p.reads[1]} {
		helper(t, "sum", filepath.Join(dir, name))
	}
	h.ok("umount", dir)
	var got []string
	for _, f := range h.shown(p.ref).Files {
		got = append(got, strings.TrimPrefix(f.Path, "/"))
	}
	if want := slices.Insert(slices.Clone(p.reads), 1, more); !slices.Equal(got, want) {
		t.Errorf("after a start that read more: %v, want %v", got, want)
	}
	// What was fetched for three starts and read by none is dropped.
	for range 2 {
		h.empty()
		dir := h.ok("mount", p.ref)
		p.burst(h, dir, "local")
		helper(t, "sum", filepath.Join(dir, p.reads[0]))
		h.ok("umount", dir)
	}
	got = nil
	for _, f := range h.shown(p.ref).Files {
		got = append(got, strings.TrimPrefix(f.Path, "/"))
	}
	if want := []string{p.reads[0], more, p.reads[1]}; !slices.Equal(got, want) {
		t.Errorf("after three starts that read less: %v, want %v", got, want)
	}
}

// TestProfileGrowing records the start of an image of which a layer is still read,
// and gives it to who has an index of that layer.
func TestProfileGrowing(t *testing.T) {
	needRoot(t)
	for _, face := range faces {
		p := newProfiled(t, forms.Gzip)
		digests, sizes := blobs(t, p.img)
		g := gated(t, p.registry)
		p.ref = g.addr + "/" + profiledRepo + ":1"
		g.let(digests[0], 0)
		h := newHost(t)
		dir := h.ok("mount", "--face", face, p.ref)
		if m := h.inspect(dir); m.State != "reading" || !m.Recording {
			t.Errorf("inspect: %+v", m)
		}
		g.let(digests[0], sizes[0]/2) // the first file, and not enough for the kernel face
		helper(t, "sum", filepath.Join(dir, p.reads[0]))
		g.let(digests[0], all)
		p.start(dir)
		h.until(dir, func(m daemon.Mount) bool { return m.State == "mounted" })
		h.ok("umount", dir)
		// The kernel face takes the place of what served the mount, and reads on unseen.
		got := h.shown(p.ref).Files
		for i, f := range got {
			if f.Path != "/"+p.reads[i] || f.Bytes != profiledSize {
				t.Errorf("%s: profile show: %+v", face, f)
			}
		}
		if len(got) == 0 || face == "fuse" && len(got) != len(p.reads) {
			t.Errorf("%s: profile show: %+v", face, got)
		}
		p.reads = p.reads[:len(got)]
		h.ok("index", "--push", p.ref)
		h.ok("profile", "push", p.ref)
		p.ready(newHost(t), "referrer", "--index", "require", "--face", face)
	}
}

// TestPrefetchAll fills the store behind the reader's back, also after the daemon
// was started anew in the middle.
func TestPrefetchAll(t *testing.T) {
	needRoot(t)
	p := newProfiled(t, forms.EStargz)
	p.rec.SetFault(func(q *http.Request) *link.Fault {
		if q.Header.Get("Range") != "" {
			return &link.Fault{Delay: 50 * time.Millisecond}
		}
		return nil
	})
	h := newHost(t)
	dir := h.ok("mount", "--prefetch", "all", "--face", "fuse", p.ref)
	h.kill()
	h.ok("ps")
	p.rec.SetFault(nil)
	m := h.until(dir, func(m daemon.Mount) bool { return len(m.Layers) == 1 && m.Layers[0].Whole })
	if m.Prefetch != "all" || m.Recording {
		t.Errorf("inspect: %+v", m)
	}
	p.settled()
	p.requests(p.img)
	p.start(dir)
	if got, _ := p.requests(p.img); len(got) > 0 {
		t.Errorf("requests %v", got)
	}
	h.ok("umount", dir)
}
