package test

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/varvefs/varve/bench/forms"
	"github.com/varvefs/varve/bench/link"
)

func TestNotFound(t *testing.T) {
	needRoot(t)
	l, _ := small(t, 3, 10)
	r, ref := serve(t, forms.EStargz, l)
	h := newHost(t)
	h.fails(3, "mount", r.rec.Addr()+"/test/image:other")
	h.fails(3, "mount", r.rec.Addr()+"/no/such")
	h.fails(3, "mount", "--pull", "never", ref)
	h.fails(3, "mount", ref+"@sha256:"+strings.Repeat("0", 64))
	h.fails(3, "mount", "--platform", "linux/s390x", ref)
	h.fails(3, "ls", r.rec.Addr()+"/no/such")
	unchanged(t, h)
}

// unchanged checks that refusals left nothing behind.
func unchanged(t *testing.T, h *host) {
	t.Helper()
	if out := h.ok("ps", "-q"); out != "" {
		t.Errorf("listed: %q", out)
	}
	for _, line := range h.mounts() {
		if strings.Contains(line, "/run/mnt/") {
			t.Errorf("mounted: %s", line)
		}
	}
	for _, dir := range []string{"run/mnt", "state/mounts", "cache/tmp"} {
		left, err := os.ReadDir(filepath.Join(h.root, dir))
		// A layer that was being read goes when its connection has ended.
		for end := time.Now().Add(time.Minute); len(left) > 0 && dir == "cache/tmp" && time.Now().Before(end); {
			time.Sleep(10 * time.Millisecond)
			left, err = os.ReadDir(filepath.Join(h.root, dir))
		}
		if err != nil && !os.IsNotExist(err) || len(left) > 0 {
			t.Errorf("left in %s: %v %v", dir, left, err)
		}
	}
}

func TestUnreachable(t *testing.T) {
	needRoot(t)
	l, _ := small(t, 3, 10)
	r, ref := serve(t, forms.EStargz, l)
	h := newHost(t)
	r.close()
	line := h.fails(5, "mount", ref)
	if !strings.Contains(line, r.rec.Addr()) {
		t.Errorf("the registry is not named: %s", line)
	}
	h.fails(5, "cat", ref, "/etc/hostname")
	h.fails(5, "mount", "--pull", "always", ref)
	unchanged(t, h)
}

// TestCredentials uses a registry that asks for a password.
func TestCredentials(t *testing.T) {
	needRoot(t)
	const user, secret = "someone", "s3cret-word"
	inner := mustGet[http.Handler](t)(forms.NewHandler(t.TempDir()))
	open := httptest.NewServer(inner)
	defer open.Close()
	closed := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if u, p, ok := q.BasicAuth(); !ok || u != user || p != secret {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			http.Error(w, `{"errors":[{"code":"UNAUTHORIZED"}]}`, http.StatusUnauthorized)
			return
		}
		inner.ServeHTTP(w, q)
	}))
	defer closed.Close()
	addr := strings.TrimPrefix(closed.URL, "http://")
	l, names := small(t, 3, 1000)
	must(t, forms.Push(t.Context(), build(t, forms.EStargz, l), strings.TrimPrefix(open.URL, "http://")+"/private/image:1"))
	ref := addr + "/private/image:1"

	h := newHost(t)
	h.fails(4, "mount", ref)
	config := filepath.Join(h.root, "docker")
	must(t, os.Mkdir(config, 0o700))
	write := func(password string) {
		auth := base64.StdEncoding.EncodeToString([]byte(user + ":" + password))
		must(t, os.WriteFile(filepath.Join(config, "config.json"), fmt.Appendf(nil, `{"auths":{%q:{"auth":%q}}}`, addr, auth), 0o600))
	}
	h.env = append(h.env, "DOCKER_CONFIG="+config)
	write("wrong")
	h.fails(4, "mount", ref)
	unchanged(t, h)
	// The daemon that was started without the configuration takes it from the
	// request, each time anew.
	write(secret)
	dir := h.ok("mount", ref)
	helper(t, "sum", filepath.Join(dir, names[0]))
	h.stop()
	h.ok("ps")
	helper(t, "sum", filepath.Join(dir, names[1]))
	h.ok("umount", dir)
	encoded := base64.StdEncoding.EncodeToString([]byte(user + ":" + secret))
	must(t, filepath.WalkDir(h.root, func(p string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || filepath.Dir(p) == config {
			return err
		}
		b, err := os.ReadFile(p)
		if strings.Contains(string(b), secret) || strings.Contains(string(b), encoded) {
			t.Errorf("the password is in %s", p)
		}
		return err
	}))
}

// annotated makes an image of one layer of another, with annotations changed.
func annotated(t *testing.T, img v1.Image, change func(map[string]string)) v1.Image {
	t.Helper()
	m := mustGet[*v1.Manifest](t)(img.Manifest())
	layers := mustGet[[]v1.Layer](t)(img.Layers())
	a := map[string]string{}
	for k, v := range m.Layers[0].Annotations {
		a[k] = v
	}
	change(a)
	base := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	base = mustGet[v1.Image](t)(mutate.ConfigFile(base, &v1.ConfigFile{OS: "linux", Architecture: runtime.GOARCH, RootFS: v1.RootFS{Type: "layers"}}))
	return mustGet[v1.Image](t)(mutate.Append(base, mutate.Addendum{Layer: layers[0], Annotations: a, MediaType: m.Layers[0].MediaType}))
}

const tocDigest = "containerd.io/snapshot/stargz/toc.digest"

func TestVerification(t *testing.T) {
	needRoot(t)
	l, _ := small(t, 300, 2000)
	wrong := "sha256:" + strings.Repeat("ab", 32)
	for name, tc := range map[string]struct {
		form   forms.Form
		change func(map[string]string)
	}{
		"no such table": {forms.EStargz, func(a map[string]string) { a[tocDigest] = wrong }},
		"both kinds": {forms.EStargz, func(a map[string]string) {
			a[tocDigest] = wrong
			a["io.github.containers.zstd-chunked.manifest-checksum"] = wrong
			a["io.github.containers.zstd-chunked.manifest-position"] = "1:2:3:1"
		}},
		"position": {forms.ZstdChunkedContainers, func(a map[string]string) {
			a["io.github.containers.zstd-chunked.manifest-position"] = "1:99999999:3:1"
		}},
		"checksum": {forms.ZstdChunkedContainers, func(a map[string]string) { a["io.github.containers.zstd-chunked.manifest-checksum"] = wrong }},
		"no table": {forms.Gzip, func(a map[string]string) { a[tocDigest] = wrong }},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			img := annotated(t, build(t, tc.form, l), tc.change)
			ref := newRegistry(t).push("bad/image:1", img)
			h.fails(6, "mount", "--wait", ref)
			unchanged(t, h)
		})
	}

	// The end of an eStargz layer, of a whole one, a manifest and a config.
	for name, tc := range map[string]struct {
		form forms.Form
		at   func(q *http.Request, config string) int64
	}{
		"table": {forms.EStargz, func(q *http.Request, _ string) int64 {
			if link.ClassOf(q) != link.Blob {
				return 0
			}
			_, span, _ := strings.Cut(q.Header.Get("Range"), "=")
			from, to, ok := strings.Cut(span, "-")
			if !ok {
				return 0
			}
			a, _ := strconv.ParseInt(from, 10, 64)
			b, _ := strconv.ParseInt(to, 10, 64)
			return max(1, b-a-300) // among the members before the footer
		}},
		"layer":    {forms.Gzip, spoil("layer", 5000)},
		"zstd":     {forms.Zstd, spoil("layer", 5000)},
		"config":   {forms.Gzip, spoil("config", 100)},
		"manifest": {forms.Gzip, spoil("manifest", 100)},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			r := newRegistry(t)
			img := build(t, tc.form, l)
			ref := r.push("bad/"+name+":1", img)
			if name == "manifest" { // a tag's manifest has no digest to differ from
				ref = strings.TrimSuffix(ref, ":1") + "@" + mustGet[v1.Hash](t)(img.Digest()).String()
			}
			config := mustGet[v1.Hash](t)(img.ConfigName()).String()
			r.rec.SetFault(func(q *http.Request) *link.Fault {
				if at := tc.at(q, config); at > 0 {
					return &link.Fault{Corrupt: at}
				}
				return nil
			})
			h.fails(6, "mount", "--wait", ref)
			unchanged(t, h)
			r.rec.SetFault(nil)
			h.ok("umount", h.ok("mount", "--wait", ref)) // nothing wrong was kept
		})
	}
}

// spoil chooses a byte of every answer of a kind.
func spoil(kind string, at int64) func(*http.Request, string) int64 {
	return func(q *http.Request, config string) int64 {
		got := link.ClassOf(q).String()
		if got == "blob" {
			got = "layer"
			if strings.HasSuffix(q.URL.Path, config) {
				got = "config"
			}
		}
		if q.Method != http.MethodGet || got != kind {
			return 0
		}
		return at
	}
}
