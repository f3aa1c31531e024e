package image

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// server is a registry that writes down what it is asked and may answer first.
type server struct {
	*httptest.Server
	t     *testing.T
	store http.Handler

	mu    sync.Mutex // guards what follows
	asked []string
	auths []string
	first func(http.ResponseWriter, *http.Request) bool // true: answered
}

func newServer(t *testing.T) *server {
	s := &server{t: t, store: ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0)))}
	s.Server = httptest.NewServer(s)
	t.Cleanup(s.Close)
	return s
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	s.asked = append(s.asked, r.Method+" "+r.URL.RequestURI())
	s.auths = append(s.auths, r.Header.Get("Authorization"))
	first := s.first
	s.mu.Unlock()
	if first != nil && first(w, r) {
		return
	}
	s.store.ServeHTTP(w, r)
}

// reset forgets the requests and sets what answers first.
func (s *server) reset(first func(http.ResponseWriter, *http.Request) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked, s.auths, s.first = nil, nil, first
}

func (s *server) requests() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.asked)
}

func (s *server) addr() string { return strings.TrimPrefix(s.URL, "http://") }

// pushed puts an image of two layers for two platforms under repo:list, and
// the one for linux/amd64 under repo:one.
func (s *server) pushed(repo string) v1.ImageIndex {
	s.t.Helper()
	var list v1.ImageIndex = empty.Index
	for _, arch := range []string{"amd64", "arm64"} {
		img, err := random.Image(1000, 2)
		if err != nil {
			s.t.Fatal(err)
		}
		cf, err := img.ConfigFile()
		if err != nil {
			s.t.Fatal(err)
		}
		cf = cf.DeepCopy()
		cf.OS, cf.Architecture = "linux", arch
		if img, err = mutate.ConfigFile(img, cf); err != nil {
			s.t.Fatal(err)
		}
		list = mutate.AppendManifests(list, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}}})
		if arch == "amd64" {
			ref, _ := name.ParseReference(s.addr() + "/" + repo + ":one")
			if err := remote.Write(ref, img); err != nil {
				s.t.Fatal(err)
			}
		}
	}
	ref, _ := name.ParseReference(s.addr() + "/" + repo + ":list")
	if err := remote.WriteIndex(ref, list); err != nil {
		s.t.Fatal(err)
	}
	s.reset(nil)
	return list
}

func mustName(t *testing.T, s string) Name {
	t.Helper()
	n, err := ParseName(s)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func newRegistries() *Registries {
	r := NewRegistries(nil, nil)
	r.wait = func(ctx context.Context, _ time.Duration) error { return ctx.Err() }
	return r
}

func open(t *testing.T, r *Registries, ref string, o Options) Source {
	t.Helper()
	if o.HostsDir == nil {
		o.HostsDir = []string{t.TempDir()}
	}
	src, err := r.Source(mustName(t, ref), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { src.Close() })
	return src
}

// fetch reads a blob from its first origin.
func fetch(t *testing.T, o Origin) (int, []byte) {
	t.Helper()
	resp, err := (&http.Client{Transport: o.Transport}).Get(o.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, b
}

func TestResolveAsksNoMore(t *testing.T) {
	s := newServer(t)
	s.pushed("a/b")
	r := newRegistries()
	ctx := t.Context()

	m, err := open(t, r, s.addr()+"/a/b:one", Options{}).Resolve(ctx, "linux/amd64")
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"GET /v2/a/b/manifests/one"}
	if d := cmp.Diff(want, s.requests()); d != "" {
		t.Errorf("single manifest: %s", d)
	}
	if m.Target != m.Digest || len(m.Layers) != 2 || m.Platform != "" {
		t.Errorf("%+v", m)
	}

	s.reset(nil)
	src := open(t, r, s.addr()+"/a/b:list", Options{})
	if m, err = src.Resolve(ctx, "linux/arm64/v8"); err != nil {
		t.Fatal(err)
	}
	raw, err := src.Config(ctx, m)
	if err != nil {
		t.Fatal(err)
	}
	c, err := ParseConfig(raw)
	if err != nil || c.MatchPlatform(m.Platform) != nil || m.Platform != "linux/arm64" {
		t.Errorf("%s, %+v, %v", m.Platform, c, err)
	}
	b, err := src.Blob(m.Layers[0])
	if err != nil {
		t.Fatal(err)
	}
	if code, got := fetch(t, b.Origins[0]); code != 200 || verify(b.Digest, got) != nil {
		t.Errorf("blob: %d, %d bytes", code, len(got))
	}
	want = []string{
		"GET /v2/a/b/manifests/list", "GET /v2/a/b/manifests/" + m.Digest.String(),
		"GET /v2/a/b/blobs/" + m.ConfigDesc.Digest.String(), "GET /v2/a/b/blobs/" + b.Digest.String(),
	}
	if d := cmp.Diff(want, s.requests()); d != "" {
		t.Errorf("list: %s", d)
	}
	if len(m.Blobs) != 2 || m.Target == m.Digest {
		t.Errorf("target %s, %d blobs", m.Target, len(m.Blobs))
	}
	if _, err = src.Resolve(ctx, "linux/s390x"); !errors.Is(err, ErrNoPlatform) || !strings.Contains(err.Error(), "linux/amd64, linux/arm64") {
		t.Errorf("missing platform: %v", err)
	}
}

func TestRegistryErrors(t *testing.T) {
	s := newServer(t)
	s.pushed("a")
	status := func(code int) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			if r.URL.Path == "/v2/" {
				return false
			}
			w.WriteHeader(code)
			fmt.Fprint(w, `{"errors":[{"code":"X","message":"its own\ntext"}]}`)
			return true
		}
	}
	dead := httptest.NewServer(nil)
	dead.Close()
	for _, tt := range []struct {
		name, ref string
		first     func(http.ResponseWriter, *http.Request) bool
		kind      error
		want      string
	}{
		{"404", s.addr() + "/a:one", status(404), ErrNotFound, "No such image: " + s.addr() + "/a:one: "},
		{"404 text", s.addr() + "/a:one", status(404), ErrNotFound, "its own text"},
		{"401", s.addr() + "/a:one", status(401), ErrUnauthorized, "'docker login " + s.addr() + "' or 'podman login " + s.addr() + "'"},
		{"403", s.addr() + "/a:one", status(403), ErrUnauthorized, "denied"},
		{"429", s.addr() + "/a:one", status(429), ErrUnreachable, "slow down"},
		{"503", s.addr() + "/a:one", status(503), ErrUnreachable, "its own text"},
		{"dial", strings.TrimPrefix(dead.URL, "http://") + "/a:one", nil, ErrUnreachable, "refused"},
		{"dns", "no-such-host.invalid/a:one", nil, ErrUnreachable, "no-such-host.invalid"},
		{"html", s.addr() + "/a:one", func(w http.ResponseWriter, r *http.Request) bool { fmt.Fprint(w, "<html>"); return true }, ErrMalformed, "manifest"},
		{"large", s.addr() + "/a:one", func(w http.ResponseWriter, r *http.Request) bool {
			w.Write(make([]byte, MaxManifest+1))
			return true
		}, ErrMalformed, "more than"},
		{"digest", s.addr() + "/a@sha256:" + strings.Repeat("0", 64), func(w http.ResponseWriter, r *http.Request) bool {
			fmt.Fprint(w, "{}")
			return true
		}, ErrMalformed, "other bytes"},
	} {
		s.reset(tt.first)
		_, err := open(t, newRegistries(), tt.ref, Options{}).Resolve(t.Context(), "")
		if !errors.Is(err, tt.kind) || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
	// What fails and passes is asked again.
	n := 0
	s.reset(func(w http.ResponseWriter, r *http.Request) bool {
		if n++; n == 2 {
			w.WriteHeader(502)
			return true
		}
		return false
	})
	if _, err := open(t, newRegistries(), s.addr()+"/a:one", Options{}).Resolve(t.Context(), "linux/amd64"); err != nil {
		t.Errorf("502 once: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := open(t, newRegistries(), s.addr()+"/a:one", Options{}).Resolve(ctx, ""); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestTLS(t *testing.T) {
	s := httptest.NewTLSServer(ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0))))
	defer s.Close()
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	addr := strings.TrimPrefix(s.URL, "https://")
	dir := t.TempDir()
	putFile(t, filepath.Join(dir, addr, "hosts.toml"), fmt.Sprintf("server = %q\n", s.URL))
	_, err := open(t, newRegistries(), addr+"/a", Options{HostsDir: []string{dir}}).Resolve(t.Context(), "")
	if !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), "unknown authority") {
		t.Errorf("no CA: %v", err)
	}
	putFile(t, filepath.Join(dir, addr, "hosts.toml"), fmt.Sprintf("server = %q\nskip_verify = true\n", s.URL))
	if _, err = open(t, newRegistries(), addr+"/a", Options{HostsDir: []string{dir}}).Resolve(t.Context(), ""); !errors.Is(err, ErrNotFound) {
		t.Errorf("skip_verify: %v", err)
	}
	putFile(t, filepath.Join(dir, addr, "ca.pem"), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})))
	putFile(t, filepath.Join(dir, addr, "hosts.toml"), fmt.Sprintf("server = %q\nca = \"ca.pem\"\n", s.URL))
	if _, err = open(t, newRegistries(), addr+"/a", Options{HostsDir: []string{dir}}).Resolve(t.Context(), ""); !errors.Is(err, ErrNotFound) {
		t.Errorf("ca: %v", err)
	}
	if _, err = open(t, newRegistries(), addr+"/a", Options{Insecure: true}).Resolve(t.Context(), ""); !errors.Is(err, ErrNotFound) {
		t.Errorf("insecure: %v", err)
	}
}

// bearer lets in who has the token it gave last.
type bearer struct {
	s      *server
	mu     sync.Mutex
	valid  string
	given  int
	logins []string
}

func (b *bearer) serve(w http.ResponseWriter, r *http.Request) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if r.URL.Path == "/token" {
		user, pass, _ := r.BasicAuth()
		b.logins = append(b.logins, user+" "+r.URL.Query().Get("scope"))
		if pass != "p" {
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}
		b.given++
		b.valid = fmt.Sprintf("t%d", b.given)
		json.NewEncoder(w).Encode(map[string]string{"token": b.valid})
		return true
	}
	if r.Header.Get("Authorization") == "Bearer "+b.valid && b.valid != "" {
		return false
	}
	w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="reg"`, b.s.URL))
	w.WriteHeader(http.StatusUnauthorized)
	return true
}

func TestBearer(t *testing.T) {
	s := newServer(t)
	s.pushed("ns/app")
	b := &bearer{s: s}
	s.reset(b.serve)
	dir := t.TempDir()
	login := func(userpass string) {
		putFile(t, filepath.Join(dir, "config.json"), fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, s.addr(), userpass))
	}
	login("bWU6cA==") // me:p
	r := newRegistries()
	o := Options{Auth: Auth{DockerConfig: dir}}
	src := open(t, r, s.addr()+"/ns/app:one", o)
	m, err := src.Resolve(t.Context(), "linux/amd64")
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"GET /v2/ns/app/manifests/one", "GET /token?scope=repository%3Ans%2Fapp%3Apull&service=reg", "GET /v2/ns/app/manifests/one"}
	if d := cmp.Diff(want, s.requests()); d != "" {
		t.Error(d)
	}

	// The token runs out while many read: one new one, with a new password.
	b.mu.Lock()
	b.valid = "other"
	b.mu.Unlock()
	login("eW91OnA=") // you:p
	blob, err := open(t, r, s.addr()+"/ns/app:list", o).Blob(m.Layers[0])
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if code, _ := fetch(t, blob.Origins[0]); code != 200 {
				t.Errorf("status %d", code)
			}
		})
	}
	wg.Wait()
	if d := cmp.Diff([]string{"me repository:ns/app:pull", "you repository:ns/app:pull"}, b.logins); d != "" {
		t.Error(d)
	}

	b.mu.Lock()
	b.valid = "other"
	b.mu.Unlock()
	login("bWU6c2VjcmV0") // me:secret
	_, err = src.Resolve(t.Context(), "linux/amd64")
	if !errors.Is(err, ErrUnauthorized) || strings.Contains(err.Error(), "secret") {
		t.Errorf("wrong password: %v", err)
	}
}

func TestBasicRenewedAfter403(t *testing.T) {
	s := newServer(t)
	s.pushed("a")
	good := "new"
	s.reset(func(w http.ResponseWriter, r *http.Request) bool {
		user, pass, _ := r.BasicAuth()
		switch {
		case user == "":
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
		case pass != good:
			w.WriteHeader(http.StatusForbidden)
		default:
			return false
		}
		return true
	})
	// The helper gives another password at its second run.
	dir := t.TempDir()
	putHelper(t, "turn", fmt.Sprintf(`p=old; [ -e %[1]s ] && p=new; touch %[1]s; echo "{\"Username\":\"u\",\"Secret\":\"$p\"}"`, filepath.Join(dir, "mark")))
	putFile(t, filepath.Join(dir, "config.json"), `{"credsStore":"turn"}`)
	if _, err := open(t, newRegistries(), s.addr()+"/a:one", Options{Auth: Auth{DockerConfig: dir}}).Resolve(t.Context(), "linux/amd64"); err != nil {
		t.Fatal(err)
	}
}

func TestRedirectTakesNoCredential(t *testing.T) {
	s, other := newServer(t), newServer(t)
	s.pushed("a")
	other.reset(func(w http.ResponseWriter, r *http.Request) bool { fmt.Fprint(w, "bytes"); return true })
	s.reset(func(w http.ResponseWriter, r *http.Request) bool {
		if _, _, ok := r.BasicAuth(); !ok {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}
		if strings.Contains(r.URL.Path, "/blobs/") {
			http.Redirect(w, r, other.URL+"/signed?x=y", http.StatusTemporaryRedirect)
			return true
		}
		return false
	})
	dir := t.TempDir()
	putFile(t, filepath.Join(dir, "config.json"), fmt.Sprintf(`{"auths":{%q:{"auth":"dTpw"}}}`, s.addr()))
	src := open(t, newRegistries(), s.addr()+"/a:one", Options{Auth: Auth{DockerConfig: dir}})
	m, err := src.Resolve(t.Context(), "linux/amd64")
	if err != nil {
		t.Fatal(err)
	}
	b, err := src.Blob(m.Layers[0])
	if err != nil {
		t.Fatal(err)
	}
	if code, got := fetch(t, b.Origins[0]); code != 200 || string(got) != "bytes" {
		t.Errorf("%d %q", code, got)
	}
	if d := cmp.Diff([]string{"GET /signed?x=y"}, other.requests()); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff([]string{""}, other.auths); d != "" {
		t.Errorf("credential sent on: %s", d)
	}
}

func TestMirrors(t *testing.T) {
	s, broken, mirror := newServer(t), newServer(t), newServer(t)
	list := s.pushed("a")
	ref, _ := name.ParseReference(mirror.addr() + "/a:old")
	if err := remote.WriteIndex(ref, list); err != nil {
		t.Fatal(err)
	}
	broken.reset(func(w http.ResponseWriter, r *http.Request) bool { w.WriteHeader(http.StatusNotFound); return true })
	mirror.reset(func(w http.ResponseWriter, r *http.Request) bool {
		r.URL.Path = strings.Replace(r.URL.Path, "/api/", "/v2/", 1)
		return false
	})
	dir := t.TempDir()
	putFile(t, filepath.Join(dir, "reg.test", "hosts.toml"), fmt.Sprintf(`
server = %q
[host.%q]
[host."%s/api"]
capabilities = ["pull"]
override_path = true
header = { X-Mirror = "yes" }
`, s.URL, broken.URL, mirror.URL))
	src := open(t, newRegistries(), "reg.test/a:list", Options{HostsDir: []string{dir}})
	m, err := src.Resolve(t.Context(), "linux/amd64")
	if err != nil {
		t.Fatal(err)
	}
	id := m.Digest.String()
	for _, tt := range []struct {
		name string
		s    *server
		want []string
	}{
		{"broken", broken, []string{"GET /v2/a/manifests/list?ns=reg.test", "GET /v2/a/manifests/" + id + "?ns=reg.test"}},
		{"mirror", mirror, []string{"GET /api/a/manifests/" + id + "?ns=reg.test"}},
		{"server", s, []string{"GET /v2/a/manifests/list?ns=reg.test"}},
	} {
		if d := cmp.Diff(tt.want, tt.s.requests()); d != "" {
			t.Errorf("%s: %s", tt.name, d)
		}
	}
	b, err := src.Blob(m.Layers[0])
	if err != nil {
		t.Fatal(err)
	}
	var hosts []string
	for _, o := range b.Origins {
		hosts = append(hosts, o.Registry)
	}
	if d := cmp.Diff([]string{broken.addr(), mirror.addr(), s.addr()}, hosts); d != "" {
		t.Error(d)
	}
	if code, got := fetch(t, b.Origins[1]); code != 200 || verify(b.Digest, got) != nil {
		t.Errorf("blob of the mirror: %d", code)
	}
}

func TestPushTransport(t *testing.T) {
	s := newServer(t)
	r := newRegistries()
	rt, err := r.Transport(mustName(t, s.addr()+"/x:y"), Options{HostsDir: []string{t.TempDir()}})
	if err != nil {
		t.Fatal(err)
	}
	img, err := random.Image(10, 1)
	if err != nil {
		t.Fatal(err)
	}
	ref, _ := name.ParseReference(s.addr() + "/x:y")
	if err := remote.Write(ref, img, remote.WithTransport(rt)); err != nil {
		t.Fatal(err)
	}
	if _, err := open(t, r, s.addr()+"/x:y", Options{}).Resolve(t.Context(), ""); err != nil {
		t.Error(err)
	}
}

func TestCheckRealm(t *testing.T) {
	for _, tt := range []struct {
		realm, addr string
		plain, ok   bool
	}{
		{"https://auth.test/t", "reg.test", false, true},
		{"http://auth.test/t", "reg.test", false, false},
		{"http://auth.test/t", "reg.test", true, true},
		{"https://10.0.0.9/t", "reg.test", false, false},
		{"https://10.0.0.9/t", "10.0.0.5:5000", false, true},
		{"http://169.254.169.254/t", "10.0.0.5:5000", true, false},
		{"https://u:p@auth.test/t", "reg.test", false, false},
		{"file:///etc/passwd", "reg.test", true, false},
	} {
		u, err := url.Parse(tt.realm)
		if err != nil {
			t.Fatal(err)
		}
		if err := checkRealm(u, tt.addr, tt.plain); (err == nil) != tt.ok {
			t.Errorf("%s for %s: %v", tt.realm, tt.addr, err)
		}
	}
}
