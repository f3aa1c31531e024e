package test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/bench/forms"
	"github.com/varvefs/varve/bench/link"
	"github.com/varvefs/varve/daemon"
	"github.com/varvefs/varve/index"
)

// fallbacks gives how often layers were not read lazily, by reason.
func (h *host) fallbacks() map[string]string {
	h.t.Helper()
	over := h.overSocket()
	defer over.CloseIdleConnections()
	out := map[string]string{}
	for _, m := range regexp.MustCompile(`(?m)^varve_lazy_fallbacks_total\{reason="(\w+)"\} ([1-9]\d*)`).FindAllStringSubmatch(scrape(h.t, over, "http://varve/metrics"), -1) {
		out[m[1]] = m[2]
	}
	return out
}

// streamed mounts an image whose indexes are of no use: it is read whole, says why
// and counts it.
func (h *host) streamed(ref, reason, why string, check func(dir string)) {
	h.t.Helper()
	dir := h.ok("mount", "--wait", ref)
	if l := h.inspect(dir).Layers[0]; l.Index != "checkpoints" || !strings.Contains(l.Reason, why) {
		h.t.Errorf("index %q: %s, want %q", l.Index, l.Reason, why)
	}
	if got, want := fmt.Sprint(h.fallbacks()), fmt.Sprint(map[string]string{reason: "1"}); got != want {
		h.t.Errorf("fallbacks: %s, want %s", got, want)
	}
	check(dir)
	h.ok("umount", dir)
}

// indexed is an image with both indexes in a registry.
type indexed struct {
	*registry
	t          *testing.T
	ref        string
	names      []string
	ours, soci string // digests of the two indexes' manifests
	manifests  map[string]ocispec.Manifest
	maker      *host
}

const (
	indexedRepo = "hostile/image"
	indexedSize = 100_000 // of each file
)

func newIndexed(t *testing.T) *indexed {
	t.Helper()
	l, names := small(t, 30, indexedSize)
	x := &indexed{registry: newRegistry(t), t: t, names: names, maker: newHost(t), manifests: map[string]ocispec.Manifest{}}
	x.ref = x.push(indexedRepo+":1", build(t, forms.Gzip, l))
	x.maker.ok("index", "--push", "--span-size", "256KiB", x.ref)
	for _, i := range x.maker.indexes(x.ref) {
		x.manifests[i.digest] = x.manifest(indexedRepo, i.digest)
		if i.kind == "soci" {
			x.soci = i.digest
		} else {
			x.ours = i.digest
		}
	}
	return x
}

// files checks all files, or that those which cannot be read fail with EIO, and
// gives how many did.
func (x *indexed) files(dir string) (bad int) {
	x.t.Helper()
	for _, name := range x.names {
		b, err := os.ReadFile(filepath.Join(dir, name))
		switch {
		case errors.Is(err, syscall.EIO):
			bad++
		case err != nil || !bytes.Equal(b, content(name, indexedSize)):
			x.t.Errorf("%s: %d bytes, %v", name, len(b), err)
		}
	}
	return bad
}

// whole checks that every file is right.
func (x *indexed) whole(dir string) {
	x.t.Helper()
	if n := x.files(dir); n > 0 {
		x.t.Errorf("%d files cannot be read", n)
	}
}

// replace puts another document into an index, and the index in the place of all
// that there are.
func (x *indexed) replace(id string, change func(document []byte) []byte) {
	x.t.Helper()
	m := x.manifests[id]
	d := x.put(indexedRepo, change(x.document(indexedRepo+"/blobs/"+m.Layers[0].Digest.String())))
	d.MediaType, d.Annotations = m.Layers[0].MediaType, m.Layers[0].Annotations
	m.Layers = []ocispec.Descriptor{d}
	x.maker.ok("index", "rm", x.ref)
	x.tag(indexedRepo, "", m)
}

// TestIndexMalformed pushes indexes that cannot be those of the layer: they are
// not used, and not looked at again.
func TestIndexMalformed(t *testing.T) {
	needRoot(t)
	bundle := func(change func(*index.Bundle)) func(*testing.T, []byte) []byte {
		return func(t *testing.T, raw []byte) []byte {
			b, err := index.ReadBundle(raw)
			must(t, err)
			change(b)
			var out bytes.Buffer
			must(t, index.WriteBundle(&out, b))
			return out.Bytes()
		}
	}
	x := newIndexed(t)
	for name, c := range map[string]struct {
		soci   bool
		change func(*testing.T, []byte) []byte
	}{
		"no bundle":         {false, func(*testing.T, []byte) []byte { return []byte("varve") }},
		"cut bundle":        {false, func(_ *testing.T, b []byte) []byte { return b[:len(b)/2] }},
		"of another layer":  {false, bundle(func(b *index.Bundle) { b.Digest = "sha256:" + strings.Repeat("ab", 32) })},
		"of another size":   {false, bundle(func(b *index.Bundle) { b.Size++ })},
		"of another diffID": {false, bundle(func(b *index.Bundle) { b.DiffID = "sha256:" + strings.Repeat("ab", 32) })},
		"no zTOC":           {true, func(*testing.T, []byte) []byte { return []byte("soci") }},
		"cut zTOC":          {true, func(_ *testing.T, b []byte) []byte { return b[:len(b)/2] }},
		"zTOC of a version": {true, func(_ *testing.T, b []byte) []byte { return bytes.Replace(b, []byte("0.9"), []byte("1.9"), 1) }},
		"zTOC full of 0xff": {true, func(_ *testing.T, b []byte) []byte {
			return append(b[:64:64], bytes.Repeat([]byte{0xff}, len(b)-64)...)
		}},
		"zTOC of other size": {true, func(_ *testing.T, b []byte) []byte { return append(bytes.Clone(b[:4]), b...) }},
	} {
		t.Run(name, func(t *testing.T) {
			id := x.ours
			if c.soci {
				id = x.soci
			}
			x.replace(id, func(b []byte) []byte { return c.change(t, b) })
			h := newHost(t)
			h.streamed(x.ref, "index_malformed", "cannot be used", x.whole)
			if strings.Contains(h.logText(), "level=ERROR") || !strings.Contains(h.logText(), "index not used") {
				t.Error("the log does not say that an index was not used, or says more")
			}
		})
	}
}

// TestIndexOfAnotherImage has the registry name an index that is not the image's.
func TestIndexOfAnotherImage(t *testing.T) {
	needRoot(t)
	x := newIndexed(t)
	raw := x.document(indexedRepo + "/manifests/" + x.ours)
	m := x.manifest(indexedRepo, x.ours)
	m.Subject.Digest = digest.FromString("another")
	other := x.tag(indexedRepo, "", m)
	x.answer(ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, ArtifactType: m.ArtifactType, Digest: other, Size: int64(len(raw))})
	newHost(t).streamed(x.ref, "index_unreachable", "another image", x.whole)
}

// answer has the referrers API list these.
func (x *indexed) answer(list ...ocispec.Descriptor) {
	x.t.Helper()
	body, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": ocispec.MediaTypeImageIndex, "manifests": list})
	must(x.t, err)
	x.rec.SetFault(func(q *http.Request) *link.Fault {
		if link.ClassOf(q) == link.Referrer {
			return &link.Fault{Status: http.StatusOK, Header: http.Header{"Content-Type": {ocispec.MediaTypeImageIndex}}, Body: body}
		}
		return nil
	})
}

// TestIndexSpoilt has the index of a layer be spoilt on its way, which says nothing
// of the index.
func TestIndexSpoilt(t *testing.T) {
	needRoot(t)
	x := newIndexed(t)
	x.maker.ok("index", "rm", x.ref, x.soci)
	bundle := x.manifest(indexedRepo, x.ours).Layers[0].Digest.String()
	x.rec.SetFault(func(q *http.Request) *link.Fault {
		if strings.HasSuffix(q.URL.Path, bundle) {
			return &link.Fault{Corrupt: 100}
		}
		return nil
	})
	newHost(t).streamed(x.ref, "index_unreachable", "not to be had", x.whole)
	x.rec.SetFault(nil)
	h := newHost(t)
	dir := h.ok("mount", x.ref)
	if l := h.inspect(dir).Layers[0]; l.Index != "varve" {
		t.Errorf("index %q: %s", l.Index, l.Reason)
	}
	x.whole(dir)
	h.ok("umount", dir)
}

// TestIndexWrongSpan changes the digest of one span of a zTOC: what lies in it
// cannot be read, all else can.
func TestIndexWrongSpan(t *testing.T) {
	needRoot(t)
	for _, face := range faces {
		t.Run(face, func(t *testing.T) {
			x := newIndexed(t)
			x.replace(x.soci, func(b []byte) []byte {
				at := regexp.MustCompile(`sha256:[0-9a-f]{64}`).FindAllIndex(b, -1)
				b = bytes.Clone(b)
				b[at[len(at)/2][1]-1] ^= 1 // a digit that stays one
				return b
			})
			h := newHost(t)
			dir := h.ok("mount", "--face", face, x.ref)
			if l := h.inspect(dir).Layers[0]; l.Index != "soci" {
				t.Fatalf("inspect: %+v", l)
			}
			if bad := x.files(dir); bad == 0 || bad > 6 {
				t.Errorf("%d of %d files cannot be read", bad, len(x.names))
			}
			h.logged(`level=ERROR msg="read failed".* path=/files/.*its index says sha256:`)
			h.ok("umount", dir)
			dir = h.ok("mount", "--wait", "--face", face, x.ref)
			x.whole(dir)
			h.ok("umount", dir)
		})
	}
}

// TestIndexLies has varve's own index say of one file what is not so, which shows
// when all of the layer is here.
func TestIndexLies(t *testing.T) {
	needRoot(t)
	for _, face := range faces {
		t.Run(face, func(t *testing.T) {
			x := newIndexed(t)
			victim := x.names[9]
			x.replace(x.ours, func(raw []byte) []byte {
				b, err := index.ReadBundle(raw)
				must(t, err)
				for i := range b.Entries {
					if b.Entries[i].Name == victim {
						b.Entries[i].Mode |= 0o4111
					}
				}
				var out bytes.Buffer
				must(t, index.WriteBundle(&out, b))
				return out.Bytes()
			})
			h := newHost(t)
			dir := h.ok("mount", "--face", face, x.ref)
			if l := h.inspect(dir).Layers[0]; l.Index != "varve" || !l.Unproven {
				t.Fatalf("inspect: %+v", l)
			}
			st, err := os.Stat(filepath.Join(dir, victim))
			must(t, err)
			if st.Mode().Perm() != 0o755 {
				t.Errorf("mode %v", st.Mode())
			}
			x.files(dir)
			os.ReadFile(filepath.Join(dir, "etc/hostname"))
			m := h.until(dir, func(m daemon.Mount) bool { return m.State == "failed" })
			if !strings.Contains(m.Error, victim) || !strings.HasPrefix(h.status("image"), "Failed (") {
				t.Errorf("inspect: %s: %s", m.State, m.Error)
			}
			for _, name := range x.names { // what the kernel still has of it apart
				f, err := os.Open(filepath.Join(dir, name))
				must(t, err)
				must(t, unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
				if _, err := f.Read(make([]byte, 1)); !errors.Is(err, syscall.EIO) {
					t.Errorf("%s: %v, want EIO", name, err)
				}
				f.Close()
			}
			for line := range strings.Lines(h.logText()) {
				if strings.Contains(line, "level=ERROR") && !strings.Contains(line, victim) {
					t.Errorf("the log says %s", line)
				}
			}
			if !strings.Contains(h.logText(), `level=ERROR msg="index refused`) {
				t.Error("the log does not say that the index was refused")
			}
			if got := fmt.Sprint(h.fallbacks()); got != fmt.Sprint(map[string]string{"index_mismatch": "1"}) {
				t.Errorf("fallbacks: %s", got)
			}
			h.ok("umount", dir)

			dir = h.ok("mount", "--wait", "--face", face, x.ref)
			if l := h.inspect(dir).Layers[0]; l.Index != "checkpoints" || !strings.Contains(l.Reason, "found wrong before") {
				t.Errorf("the next mount: %+v", l)
			}
			st, err = os.Stat(filepath.Join(dir, victim))
			must(t, err)
			if st.Mode() != 0o644 {
				t.Errorf("mode %v", st.Mode())
			}
			x.whole(dir)
			h.ok("umount", dir)
		})
	}
}

// TestReferrersHostile has the referrers API answer with what nobody wants.
func TestReferrersHostile(t *testing.T) {
	needRoot(t)
	x := newIndexed(t)
	good := x.manifest(indexedRepo, x.ours)
	many := make([]ocispec.Descriptor, 1000)
	for i := range many {
		many[i] = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, ArtifactType: good.ArtifactType, Digest: digest.FromString(fmt.Sprint(i)), Size: 500}
	}
	asks := func() (referrers, manifests int) {
		for _, q := range x.rec.Requests() {
			switch q.Class {
			case link.Referrer:
				referrers++
			case link.Manifest:
				manifests++
			}
		}
		x.rec.Reset()
		return referrers, manifests
	}
	asks()
	x.answer(many...)
	newHost(t).streamed(x.ref, "index_unreachable", "could not be asked for", x.whole)
	if r, m := asks(); r != 1 || m > 10 { // the image's, and of the fallback tag
		t.Errorf("a thousand entries: %d requests for lists, %d for manifests", r, m)
	}

	// Pages without an end, and in a circle. What is on the first is used.
	page, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": ocispec.MediaTypeImageIndex, "manifests": []ocispec.Descriptor{
		{MediaType: ocispec.MediaTypeImageManifest, ArtifactType: good.ArtifactType, Digest: digest.Digest(x.ours), Size: 700},
	}})
	must(t, err)
	for name, next := range map[string]func(q *http.Request) string{
		"endless": func(q *http.Request) string { return q.URL.Path + "?n=" + q.URL.Query().Get("n") + "1" },
		"circle":  func(q *http.Request) string { return q.URL.Path },
	} {
		x.rec.SetFault(func(q *http.Request) *link.Fault {
			if link.ClassOf(q) != link.Referrer {
				return nil
			}
			return &link.Fault{Status: http.StatusOK, Body: page, Header: http.Header{
				"Content-Type": {ocispec.MediaTypeImageIndex}, "Link": {"<" + next(q) + `>; rel="next"`},
			}}
		})
		h := newHost(t)
		dir := h.ok("mount", x.ref)
		if l := h.inspect(dir).Layers[0]; l.Index != "varve" {
			t.Errorf("%s: index %q: %s", name, l.Index, l.Reason)
		}
		x.whole(dir)
		h.ok("umount", dir)
		if r, _ := asks(); r > 16 {
			t.Errorf("%s: %d pages were asked for", name, r)
		}
	}

	for name, f := range map[string]*link.Fault{
		"broken":  {Status: http.StatusInternalServerError},
		"no JSON": {Status: http.StatusOK, Header: http.Header{"Content-Type": {ocispec.MediaTypeImageIndex}}, Body: []byte("{")},
	} {
		x.rec.SetFault(func(q *http.Request) *link.Fault {
			if link.ClassOf(q) == link.Referrer || strings.Contains(q.URL.Path, "/manifests/sha256-") {
				return f
			}
			return nil
		})
		h := newHost(t)
		if r := h.run("index", "ls", x.ref); r.code == 0 || strings.Count(r.err, "\n") != 1 {
			t.Errorf("%s: %s", name, r)
		}
		asks()
		h.streamed(x.ref, "index_unreachable", "could not be asked for", x.whole)
		if r, _ := asks(); r > 8 {
			t.Errorf("%s: %d requests", name, r)
		}
	}
}

// TestIndexPushRefused pushes indexes to where they may not be.
func TestIndexPushRefused(t *testing.T) {
	needRoot(t)
	l, names := small(t, 5, 10_000)
	for what, c := range map[string]struct {
		status, exit int
		on           string // what the path ends in, or a part of it
	}{
		"uploads forbidden":       {http.StatusForbidden, 4, "/blobs/uploads/"},
		"uploads not allowed":     {http.StatusMethodNotAllowed, 1, "/blobs/uploads/"},
		"manifests not allowed":   {http.StatusMethodNotAllowed, 1, "/manifests/sha256:"},
		"the fallback tag denied": {http.StatusForbidden, 4, "/manifests/sha256-"},
	} {
		t.Run(what, func(t *testing.T) {
			r, ref := serve(t, forms.Gzip, l)
			r.rec.SetFault(func(q *http.Request) *link.Fault {
				if q.Method != http.MethodGet && q.Method != http.MethodHead && strings.Contains(q.URL.Path, c.on) {
					return &link.Fault{Status: c.status}
				}
				return nil
			})
			h := newHost(t)
			if line := h.fails(c.exit, "index", "--push", ref); !strings.Contains(line, "were made, but not pushed") || !strings.Contains(line, fmt.Sprint(c.status)) {
				t.Errorf("index --push: %s", line)
			}
			dir := h.ok("mount", ref)
			for _, name := range names {
				holds(t, filepath.Join(dir, name), string(content(name, 10_000)))
			}
			h.ok("umount", dir)
		})
	}
}
