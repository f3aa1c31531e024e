package image

import (
	"fmt"
	"io"
	"net/http"
	"net/url"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// post uploads text as one blob, as a push would.
func post(t *testing.T, r *Registries, n Name, o Options, repo string, query url.Values, more ...string) *http.Response {
	t.Helper()
	base, rt, err := r.Endpoint(n, o, more...)
	if err != nil {
		t.Fatal(err)
	}
	u := base.JoinPath(repo, "blobs", "uploads", "/")
	u.RawQuery = query.Encode()
	resp, err := (&http.Client{Transport: rt}).Post(u.String(), "application/octet-stream", strings.NewReader("layer"))
	if err != nil {
		t.Fatal(err)
	}
	io.Copy(io.Discard, resp.Body)
	resp.Body.Close()
	return resp
}

func TestEndpointAsksForPushAndForTheOthersPull(t *testing.T) {
	s := newServer(t)
	b := &bearer{s: s}
	s.reset(b.serve)
	dir := t.TempDir()
	putFile(t, filepath.Join(dir, "config.json"), fmt.Sprintf(`{"auths":{%q:{"auth":"bWU6cA=="}}}`, s.addr())) // me:p
	r := newRegistries()
	n := mustName(t, s.addr()+"/mine/app:1")
	o := Options{Auth: Auth{DockerConfig: dir}, HostsDir: []string{t.TempDir()}}
	layer := "sha256:" + hexOf("layer")

	if resp := post(t, r, mustName(t, s.addr()+"/base/one"), o, "base/one", url.Values{"digest": {layer}}); resp.StatusCode != http.StatusCreated {
		t.Fatal(resp.Status)
	}
	more := []string{"base/one", "base/two", "base/one", "mine/app"}
	if resp := post(t, r, n, o, "mine/app", url.Values{"mount": {layer}, "from": {"base/one"}}, more...); resp.StatusCode != http.StatusAccepted { // this registry mounts nothing
		t.Error(resp.Status)
	}
	var scopes []string
	for _, q := range s.requests() {
		if u, err := url.Parse(strings.TrimPrefix(q, "GET ")); err == nil && u.Path == "/token" {
			scopes = append(scopes, strings.Join(u.Query()["scope"], " "))
		}
	}
	want := []string{"repository:base/one:pull,push", "repository:mine/app:pull,push repository:base/one:pull repository:base/two:pull"}
	if d := cmp.Diff(want, scopes); d != "" {
		t.Error(d)
	}
}

func TestEndpointPassesMirrorsBy(t *testing.T) {
	for name, tt := range map[string]struct {
		ref, hosts string // %s is the mirror
		insecure   bool
		want       string
	}{
		"hub":            {ref: "debian:12", want: "https://registry-1.docker.io/v2/"},
		"alias of it":    {ref: "index.docker.io/x/y", want: "https://registry-1.docker.io/v2/"},
		"registry":       {ref: "reg.test:5000/x", want: "https://reg.test:5000/v2/"},
		"loopback":       {ref: "localhost:5000/x", want: "http://localhost:5000/v2/"},
		"insecure":       {ref: "reg.test/x", insecure: true, want: "https://reg.test/v2/"},
		"mirror":         {ref: "reg.test/x", hosts: `[host."https://mirror.test"]`, want: "https://reg.test/v2/"},
		"pulling mirror": {ref: "reg.test/x", hosts: "[host.\"https://mirror.test\"]\ncapabilities = [\"pull\", \"resolve\"]", want: "https://reg.test/v2/"},
		"pushing mirror": {ref: "reg.test/x", hosts: "[host.\"https://a.test\"]\n[host.\"http://b.test\"]\ncapabilities = [\"pull\", \"Push\"]", want: "http://b.test/v2/"},
		"server":         {ref: "reg.test/x", hosts: `server = "http://elsewhere.test:99"`, want: "http://elsewhere.test:99/v2/"},
	} {
		n := mustName(t, tt.ref)
		dir := t.TempDir()
		if tt.hosts != "" {
			putFile(t, filepath.Join(dir, n.Registry(), "hosts.toml"), tt.hosts)
		}
		base, _, err := newRegistries().Endpoint(n, Options{HostsDir: []string{dir}, Insecure: tt.insecure})
		if err != nil || base.String() != tt.want {
			t.Errorf("%s: %v, %v, want %s", name, base, err, tt.want)
		}
	}
	if _, _, err := newRegistries().Endpoint(mustName(t, "oci:/x"), Options{}); err == nil {
		t.Error("a layout has an endpoint")
	}
}

// A mirror that takes pushes has its own path and is told whose images it has.
func TestEndpointOfAMirrorThatIsPushedTo(t *testing.T) {
	s := newServer(t)
	s.reset(func(w http.ResponseWriter, r *http.Request) bool {
		r.URL.Path = strings.TrimPrefix(r.URL.Path, "/proxy")
		return false
	})
	dir := t.TempDir()
	putFile(t, filepath.Join(dir, "reg.test", "hosts.toml"), fmt.Sprintf("[host.%q]\ncapabilities = [\"push\"]\n", s.URL+"/proxy"))
	o := Options{HostsDir: []string{dir}}
	resp := post(t, newRegistries(), mustName(t, "reg.test/a:1"), o, "a", url.Values{"digest": {"sha256:" + hexOf("layer")}})
	if resp.StatusCode != http.StatusCreated {
		t.Error(resp.Status)
	}
	asked := s.requests()
	if got := asked[len(asked)-1]; !strings.HasPrefix(got, "POST /proxy/v2/a/blobs/uploads/?") || !strings.Contains(got, "ns=reg.test") {
		t.Error(got)
	}
}

// A registry of plain HTTP elsewhere than on the loopback is spoken to in the
// way that a pull found out, or in the one that the first request does.
func TestEndpointFallsBackToHTTP(t *testing.T) {
	s := newServer(t)
	r := newRegistries()
	o := Options{Insecure: true, HostsDir: []string{t.TempDir()}, Base: elsewhere{s}}
	resp := post(t, r, mustName(t, "reg.test/a:1"), o, "a", url.Values{"digest": {"sha256:" + hexOf("layer")}})
	if resp.StatusCode != http.StatusCreated {
		t.Error(resp.Status)
	}
}

// elsewhere makes reg.test a host that speaks plain HTTP only.
type elsewhere struct{ s *server }

func (e elsewhere) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL.Scheme == "https" {
		if req.Body != nil {
			req.Body.Close()
		}
		return nil, fmt.Errorf("server gave HTTP response to HTTPS client")
	}
	req = req.Clone(req.Context())
	req.URL.Host = e.s.addr()
	return http.DefaultTransport.RoundTrip(req)
}
