package commit

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/varvefs/varve/image"
)

// Another's registry and another's client agree that the image is whole.
func TestPushIsReadByOthers(t *testing.T) {
	for _, docker := range []bool{false, true} {
		t.Run(fmt.Sprintf("docker=%v", docker), func(t *testing.T) {
			srv := httptest.NewServer(ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0))))
			t.Cleanup(srv.Close)
			img := newPushImage(t, docker, 3<<20, 100, 2<<20, 0)
			// The same layer twice is one blob.
			m := ocispec.Manifest{MediaType: img.m.MediaType, Config: img.m.ConfigDesc}
			m.SchemaVersion = 2
			for _, i := range []int{0, 1, 2, 3, 0} {
				l := img.m.Layers[i]
				m.Layers = append(m.Layers, ocispec.Descriptor{MediaType: l.MediaType, Digest: l.Digest, Size: l.Size})
			}
			img.set(t, m)
			target := pushName(t, strings.TrimPrefix(srv.URL, "http://")+"/a/b:v1")
			tr, err := image.NewRegistries(nil, nil).Transport(target, image.Options{HostsDir: []string{t.TempDir()}})
			if err != nil {
				t.Fatal(err)
			}
			var lines []string
			o := PushOptions{Target: target, Transport: tr, Blobs: img.blobs, Report: func(id, status string, _, _ int64) {
				if l := id + ": " + status; len(lines) == 0 || lines[len(lines)-1] != l {
					lines = append(lines, l)
				}
			}, Parallel: 1}
			p, err := Push(t.Context(), img.m, img.config, o)
			if err != nil {
				t.Fatal(err)
			}
			total := int64(5<<20 + 100 + len(img.config))
			want := &Pushed{Digest: img.m.Digest, Size: int64(len(img.m.Raw)), Uploaded: Count{5, total}, Sent: total}
			if d := cmp.Diff(want, p); d != "" {
				t.Error(d)
			}
			if got, want := p.Line(target), fmt.Sprintf("v1: digest: %s size: %d", img.m.Digest, len(img.m.Raw)); got != want {
				t.Errorf("line %q, want %q", got, want)
			}
			var wantLines []string
			for i, status := range []string{"Preparing", "Waiting"} {
				for _, l := range img.m.Layers[i:4] {
					wantLines = append(wantLines, l.Digest.Encoded()[:12]+": "+status)
				}
			}
			for _, l := range img.m.Layers[:4] {
				wantLines = append(wantLines, l.Digest.Encoded()[:12]+": Pushing", l.Digest.Encoded()[:12]+": Pushed")
			}
			if d := cmp.Diff(wantLines, lines); d != "" {
				t.Error(d)
			}
			ref, err := name.ParseReference(target.String())
			if err != nil {
				t.Fatal(err)
			}
			got, err := remote.Get(ref)
			if err != nil {
				t.Fatal(err)
			}
			if got.Digest.String() != img.m.Digest.String() || string(got.MediaType) != img.m.MediaType {
				t.Errorf("%s %s", got.Digest, got.MediaType)
			}
			back, err := got.Image()
			if err != nil {
				t.Fatal(err)
			}
			if err := validate.Image(back, validate.Fast); err != nil {
				t.Error(err)
			}
			layers, _ := back.Layers()
			for _, l := range layers {
				d, _ := l.Digest()
				rc, err := l.Compressed()
				if err != nil {
					t.Fatal(err)
				}
				b, _ := io.ReadAll(rc)
				rc.Close()
				if string(b) != string(img.blobs.data[digest.Digest(d.String())]) {
					t.Errorf("layer %s has other bytes", d)
				}
			}
			o.Report = nil
			if p, err = Push(t.Context(), img.m, img.config, o); err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(&Pushed{Digest: p.Digest, Size: p.Size, Existed: Count{5, total}}, p); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestPushMounts(t *testing.T) {
	for _, mounts := range []bool{true, false} {
		s := newPushRegistry(t)
		s.mounts = mounts
		img := newPushImage(t, false, 2<<20, 2<<20)
		in, out := img.m.Layers[0], img.m.Layers[1]
		s.blobs["base/two@"+in.Digest.String()] = img.blobs.data[in.Digest]
		o, _ := pushTo(t, s, img, "a/b")
		o.MountFrom = []string{"base/one", "a/b", "base/two"}
		var last []string
		o.Report = func(id, status string, _, _ int64) {
			if id == in.Digest.Encoded()[:12] {
				last = append(last, status)
			}
		}
		img.blobs.here = false
		p, err := Push(t.Context(), img.m, img.config, o)
		if err != nil {
			t.Fatal(err)
		}
		config := Count{1, int64(len(img.config))}
		want := &Pushed{Digest: p.Digest, Size: p.Size, Uploaded: config, Mounted: Count{1, in.Size}, Streamed: Count{1, out.Size}, Received: out.Size}
		status := "Mounted from base/two"
		if !mounts {
			want.Mounted, want.Streamed, want.Received, status = Count{}, Count{2, 4 << 20}, 4<<20, "Pushed"
		}
		want.Sent = want.Received + config.Bytes
		if d := cmp.Diff(want, p); d != "" {
			t.Error(d)
		}
		if got := last[len(last)-1]; got != status {
			t.Errorf("status %q, want %q", got, status)
		}
		if len(s.uploads) != 0 {
			t.Errorf("%d uploads are left open", len(s.uploads))
		}
	}
}

func TestPushSkipsForeign(t *testing.T) {
	s := newPushRegistry(t)
	img := newPushImage(t, true, 100, 200)
	m := ocispec.Manifest{MediaType: img.m.MediaType, Config: img.m.ConfigDesc}
	m.SchemaVersion = 2
	m.Layers = []ocispec.Descriptor{
		{MediaType: "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", Digest: img.m.Layers[0].Digest, Size: 100, URLs: []string{"https://example.com/l"}},
		{MediaType: img.m.Layers[1].MediaType, Digest: img.m.Layers[1].Digest, Size: 200},
	}
	img.set(t, m)
	delete(img.blobs.data, img.m.Layers[0].Digest)
	o, _ := pushTo(t, s, img, "a/b")
	p, err := Push(t.Context(), img.m, img.config, o)
	if err != nil {
		t.Fatal(err)
	}
	if p.Skipped != (Count{1, 100}) || p.Uploaded.Blobs != 2 {
		t.Errorf("%+v", p)
	}
	if got := s.manifests["a/b:v1 "+image.MediaTypeDockerManifest]; string(got) != string(img.m.Raw) {
		t.Errorf("manifest %q", got)
	}
}

// An upload is never ended that holds other bytes than the blob's.
func TestPushProvesBytes(t *testing.T) {
	for _, size := range []int{1000, 3 << 20} {
		for what, harm := range map[string]func([]byte) []byte{
			"changed": func(b []byte) []byte { b = slices.Clone(b); b[len(b)/2] ^= 1; return b },
			"short":   func(b []byte) []byte { return b[:len(b)-1] },
		} {
			t.Run(fmt.Sprintf("%s %d", what, size), func(t *testing.T) {
				s := newPushRegistry(t)
				img := newPushImage(t, false, size)
				d := img.m.Layers[0].Digest
				img.blobs.data[d] = harm(img.blobs.data[d])
				img.blobs.here = false
				o, _ := pushTo(t, s, img, "a/b")
				o.Parallel = 1
				_, err := Push(t.Context(), img.m, img.config, o)
				if err == nil || !strings.Contains(err.Error(), d.String()) {
					t.Fatal(err)
				}
				if what == "changed" && !errors.Is(err, image.ErrMalformed) {
					t.Errorf("kind of %v", err)
				}
				if _, ok := s.blobs["a/b@"+d.String()]; ok || len(s.manifests) > 0 {
					t.Error("it was pushed")
				}
				if what == "changed" && len(s.uploads) > 0 {
					t.Error("the upload was left")
				}
			})
		}
	}
}

// The transport that pushes asks for the rights it needs, and an upload that
// goes on at another host takes no credential there.
func TestPushAuthorizes(t *testing.T) {
	var storage *httptest.Server
	s := newPushRegistry(t)
	s.mounts = true
	img := newPushImage(t, false, 2<<20, 100)
	s.blobs["base@"+img.m.Layers[1].Digest.String()] = img.blobs.data[img.m.Layers[1].Digest]
	var mu sync.Mutex
	var scopes, leaked []string
	storage = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		leaked = append(leaked, r.Header.Get("Authorization"))
		mu.Unlock()
		s.serve(w, r)
	}))
	t.Cleanup(storage.Close)
	s.first = func(w http.ResponseWriter, r *http.Request) bool {
		switch {
		case r.URL.Path == "/token":
			mu.Lock()
			scopes = append(scopes, r.URL.Query()["scope"]...)
			mu.Unlock()
			io.WriteString(w, `{"token":"secret"}`)
			return true
		case r.Header.Get("Authorization") != "Bearer secret":
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="x"`, s.URL))
			w.WriteHeader(401)
			return true
		case r.Method == http.MethodPatch:
			http.Redirect(w, r, storage.URL+r.URL.RequestURI(), http.StatusTemporaryRedirect)
			return true
		}
		return false
	}
	o, _ := pushTo(t, s, img, "a/b")
	o.Base, o.MountFrom = nil, []string{"base"}
	var err error
	o.Transport, err = image.NewRegistries(nil, nil).Transport(o.Target, image.Options{HostsDir: []string{t.TempDir()}}, "base")
	if err != nil {
		t.Fatal(err)
	}
	p, err := Push(t.Context(), img.m, img.config, o)
	if err != nil {
		t.Fatal(err)
	}
	if p.Mounted.Blobs != 1 || p.Uploaded.Blobs != 2 {
		t.Errorf("%+v", p)
	}
	if d := cmp.Diff([]string{"repository:a/b:pull,push", "repository:base:pull"}, scopes); d != "" {
		t.Error(d)
	}
	if len(leaked) == 0 || slices.ContainsFunc(leaked, func(a string) bool { return a != "" }) {
		t.Errorf("the storage saw %q", leaked)
	}
}

func TestPushRefusesNonsense(t *testing.T) {
	s := newPushRegistry(t)
	img := newPushImage(t, false, 10)
	for what, change := range map[string]func(*PushOptions, *image.Manifest, *[]byte){
		"other digest": func(o *PushOptions, _ *image.Manifest, _ *[]byte) {
			o.Target = o.Target.WithDigest(digest.FromString("x"))
		},
		"layout":         func(o *PushOptions, _ *image.Manifest, _ *[]byte) { o.Target = pushName(t, "oci:/x:y") },
		"no transport":   func(o *PushOptions, _ *image.Manifest, _ *[]byte) { o.Transport = nil },
		"no blobs":       func(o *PushOptions, _ *image.Manifest, _ *[]byte) { o.Blobs = nil },
		"other config":   func(_ *PushOptions, _ *image.Manifest, c *[]byte) { *c = []byte("{}") },
		"other manifest": func(_ *PushOptions, m *image.Manifest, _ *[]byte) { m.Raw = []byte("{}") },
	} {
		o, _ := pushTo(t, s, img, "a/b")
		m, config := *img.m, img.config
		change(&o, &m, &config)
		if _, err := Push(t.Context(), &m, config, o); !errors.Is(err, image.ErrMalformed) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if n := len(s.requests()); n > 0 {
		t.Errorf("%d requests", n)
	}
	o, _ := pushTo(t, s, img, "a/b")
	o.Target = o.Target.WithDigest(img.m.Digest)
	if p, err := Push(t.Context(), img.m, img.config, o); err != nil || !strings.HasPrefix(p.Line(o.Target), "sha256:") {
		t.Errorf("by digest: %v, %v", p, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Push(ctx, img.m, img.config, o); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}
