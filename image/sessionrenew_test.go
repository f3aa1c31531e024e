package image

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// gate is a registry that lets in who knows a password, by basic authentication or
// by tokens that it gives for it. It writes down who came.
type gate struct {
	bearer bool

	mu     sync.Mutex
	good   map[string]bool // "user:password"; of tokens, by what they were given for
	public bool            // a token that is given to nobody is good
	weak   map[string]bool // given a token, which lets in nowhere
	given  int
	tokens map[string]string // token to what it was given for
	came   []string          // "token USER", "GET USER STATUS"
}

func newGate(bearer bool, good ...string) *gate {
	g := &gate{bearer: bearer, good: map[string]bool{}, weak: map[string]bool{}, tokens: map[string]string{}}
	for _, up := range good {
		g.good[up] = true
	}
	return g
}

func (g *gate) RoundTrip(r *http.Request) (*http.Response, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	user, password, _ := r.BasicAuth()
	who := user
	if who == "" {
		who = "nobody"
	}
	if r.URL.Host == "auth.test" {
		up := user + ":" + password
		g.came = append(g.came, "token "+who)
		if !g.good[up] && !g.weak[up] && user != "" {
			return said(r, http.StatusUnauthorized, `{"details":"incorrect username or password"}`), nil
		}
		g.given++
		token := fmt.Sprintf("t%d", g.given)
		g.tokens[token] = up
		return said(r, http.StatusOK, fmt.Sprintf(`{"token":%q}`, token)), nil
	}
	in := g.good[user+":"+password]
	if g.bearer {
		up, known := g.tokens[strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")]
		in = g.good[up] || known && up == ":" && g.public
		if who, _, _ = strings.Cut(up, ":"); who == "" {
			who = "nobody"
		}
	}
	status := http.StatusOK
	if !in {
		status = http.StatusUnauthorized
	}
	g.came = append(g.came, fmt.Sprintf("GET %s %d", who, status))
	resp := said(r, status, "bytes")
	if !in && g.bearer {
		resp.Header.Set("WWW-Authenticate", `Bearer realm="https://auth.test/token",service="reg"`)
	} else if !in {
		resp.Header.Set("WWW-Authenticate", `Basic realm="reg"`)
	}
	return resp, nil
}

func said(r *http.Request, status int, text string) *http.Response {
	return &http.Response{StatusCode: status, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(text)), ContentLength: int64(len(text)), Request: r}
}

// change changes who is let in, and forgets tokens and who came.
func (g *gate) change(good ...string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	clear(g.good)
	clear(g.tokens)
	for _, up := range good {
		g.good[up] = true
	}
	g.came = nil
}

func (g *gate) log() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	came := slices.Clone(g.came)
	g.came = nil
	return came
}

// testSession opens a session of reg.test/ns/app at a gate.
func testSession(g *gate, auth Auth, node *Node, log *slog.Logger) *session {
	h := host{schemes: []string{"https"}, addr: "reg.test", prefix: "/v2", pull: true, resolve: true}
	return newSession(h, g, lookup{auth: auth, node: node, log: log, registry: "reg.test", repository: "ns/app"}, scopeOf("ns/app", "pull"))
}

// get reads a blob and gives the status, or the error.
func get(t *testing.T, s *session) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://reg.test/v2/ns/app/blobs/x", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := s.RoundTrip(req)
	if err != nil {
		return err.Error()
	}
	discard(resp)
	return fmt.Sprint(resp.StatusCode)
}

// login writes a config.json for reg.test; "" takes it away.
func login(t *testing.T, dir, user, password string) {
	t.Helper()
	text := "{}"
	if user != "" {
		text = fmt.Sprintf(`{"auths":{"reg.test":{"username":%q,"password":%q}}}`, user, password)
	}
	putFile(t, filepath.Join(dir, "config.json"), text)
}

func pullsOf(user, password string) *Pulls {
	p := &Pulls{}
	p.Came("reg.test/ns/app", PullCredential{Username: user, Password: password})(true)
	return p
}

// TestNextSource has credentials that are of no use before those that are.
func TestNextSource(t *testing.T) {
	for _, tt := range []struct {
		name         string
		bearer, weak bool
		first, later []string
	}{
		{"basic", false, false, []string{"GET nobody 401", "GET old 401", "GET pod 200"}, []string{"GET pod 200"}},
		{"bearer", true, false, []string{"GET nobody 401", "token old", "token pod", "GET pod 200"}, []string{"GET pod 200"}},
		{"a token for another repository", true, true, []string{"GET nobody 401", "token old", "GET old 401", "token pod", "GET pod 200"}, []string{"GET pod 200"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := newGate(tt.bearer, "pod:p")
			if tt.weak {
				g.weak["old:hunter2"] = true
			}
			dir := t.TempDir()
			login(t, dir, "old", "hunter2")
			var log bytes.Buffer
			s := testSession(g, Auth{DockerConfig: dir}, &Node{Pulls: pullsOf("pod", "p")}, slog.New(slog.NewTextHandler(&log, nil)))
			if got := get(t, s); got != "200" {
				t.Errorf("%s", got)
			}
			if d := cmp.Diff(tt.first, g.log()); d != "" {
				t.Error(d)
			}
			get(t, s)
			if d := cmp.Diff(tt.later, g.log()); d != "" {
				t.Errorf("later: %s", d)
			}
			// The tokens run out: what is of no use is not asked again.
			g.mu.Lock()
			clear(g.tokens)
			g.mu.Unlock()
			if got := get(t, s); got != "200" {
				t.Errorf("renewed: %s", got)
			}
			if came := g.log(); slices.ContainsFunc(came, func(c string) bool { return strings.Contains(c, "old") }) {
				t.Errorf("the wrong one is used again: %v", came)
			}
			if text := log.String(); strings.Count(text, filepath.Join(dir, "config.json")) != 1 || strings.Contains(text, "hunter2") {
				t.Errorf("log: %s", text)
			}
		})
	}
}

// TestPublicInSpite reads what is public with a password that ran out.
func TestPublicInSpite(t *testing.T) {
	g := newGate(true)
	g.public = true
	dir := t.TempDir()
	login(t, dir, "old", "hunter2")
	s := testSession(g, Auth{DockerConfig: dir}, nil, nil)
	if got := get(t, s); got != "200" {
		t.Errorf("%s", got)
	}
	if d := cmp.Diff([]string{"GET nobody 401", "token old", "token nobody", "GET nobody 200"}, g.log()); d != "" {
		t.Error(d)
	}
}

// TestRevoked has a password that is taken back and comes again, as it was or as
// another one.
func TestRevoked(t *testing.T) {
	for _, bearer := range []bool{false, true} {
		t.Run(fmt.Sprintf("bearer %v", bearer), func(t *testing.T) {
			dir := t.TempDir()
			synctest.Test(t, func(t *testing.T) {
				g := newGate(bearer, "u:one")
				login(t, dir, "u", "one")
				s := testSession(g, Auth{DockerConfig: dir}, nil, nil)
				if got := get(t, s); got != "200" {
					t.Fatal(got)
				}
				g.change()
				for range 100 {
					if got := get(t, s); got == "200" || strings.Contains(got, "one") {
						t.Fatal(got)
					}
				}
				if n := len(slices.DeleteFunc(g.log(), func(c string) bool { return strings.HasSuffix(c, " 401") })); n > 2 {
					t.Errorf("%d tokens were asked for in a moment", n)
				}
				g.change("u:two")
				login(t, dir, "u", "two")
				time.Sleep(renewPause)
				if got := get(t, s); got != "200" {
					t.Errorf("another password: %s", got)
				}
				g.change()
				get(t, s)
				g.change("u:two")
				time.Sleep(renewPause)
				if got := get(t, s); got != "200" {
					t.Errorf("the same password again: %s", got)
				}
			})
		})
	}
}

// TestManyReadersOneToken lets a token run out while many read: one is asked for.
func TestManyReadersOneToken(t *testing.T) {
	g := newGate(true, "u:p")
	dir := t.TempDir()
	login(t, dir, "u", "p")
	s := testSession(g, Auth{DockerConfig: dir}, nil, nil)
	get(t, s)
	for range 5 {
		g.change("u:p")
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() {
				if got := get(t, s); got != "200" {
					t.Error(got)
				}
			})
		}
		wg.Wait()
		if n := strings.Count(strings.Join(g.log(), "\n"), "token"); n != 1 {
			t.Errorf("%d tokens were asked for", n)
		}
	}
}

// TestProviderAskedAgain has a provider whose kept answer is refused.
func TestProviderAskedAgain(t *testing.T) {
	for _, bearer := range []bool{false, true} {
		p, providers := newPlugin(t, "v1", "", `n=$(wc -l < "$(dirname "$0")/asked"); echo "{\"kind\":\"CredentialProviderResponse\",\"apiVersion\":\"credentialprovider.kubelet.k8s.io/v1\",\"cacheKeyType\":\"Registry\",\"auth\":{\"reg.test\":{\"username\":\"u$n\",\"password\":\"p\"}}}"`)
		g := newGate(bearer, "u1:p")
		s := testSession(g, Auth{}, &Node{Providers: providers}, nil)
		for i, want := range []int{1, 1, 2} {
			if i == 2 {
				g.change("u2:p")
			} else {
				g.change("u1:p")
			}
			if got := get(t, s); got != "200" || len(p.asked()) != want {
				t.Errorf("bearer %v, %d: %s, %d runs", bearer, i, got, len(p.asked()))
			}
		}
	}
}

// TestSourcesInOrder has every source answer, and takes them away one by one.
func TestSourcesInOrder(t *testing.T) {
	dir := t.TempDir()
	file := func(name, user string) string {
		return putFile(t, filepath.Join(dir, name), fmt.Sprintf(`{"auths":{"reg.test":{"username":%q,"password":"p"}}}`, user))
	}
	_, providers := newPlugin(t, "v1", "", "echo '"+answer("v1", "Image", `,"auth":{"reg.test":{"username":"provider","password":"p"}}`)+"'")
	auth := Auth{
		Inline:   `{"auths":{"reg.test":{"username":"inline","password":"p"}}}`,
		AuthFile: file("auth.json", "authfile"), Home: filepath.Join(dir, "home"),
	}
	file("home/.docker/config.json", "docker")
	file("node/.docker/config.json", "node")
	putFile(t, filepath.Join(dir, "node", oldConfig), `{"https://reg.test/v1/":{"username":"older","password":"p"}}`)
	node := &Node{
		Auth: Auth{Home: filepath.Join(dir, "node")}, Pulls: pullsOf("pull", "p"), Providers: providers,
		Files: []string{putFile(t, filepath.Join(dir, "kubelet/config.json"), `{"auths":{"*.test":{"username":"kubelet","password":"p"}}}`)},
		Containerd: putFile(t, filepath.Join(dir, "config.toml"), `[plugins."io.containerd.grpc.v1.cri".registry.configs."reg.test".auth]
username = "containerd"
password = "p"
`),
	}
	var got []string
	for _, s := range (lookup{auth: auth, node: node, registry: "reg.test", repository: "ns/app"}).sources() {
		creds, err := s.find(t.Context())
		if err != nil {
			t.Errorf("%s: %v", s.name, err)
		}
		for _, ac := range creds {
			got = append(got, ac.Username)
		}
	}
	want := []string{"inline", "authfile", "docker", "node", "older", "kubelet", "pull", "containerd", "provider"}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	// A source that fails is passed by.
	putFile(t, filepath.Join(dir, "auth.json"), "{")
	g := newGate(false, "docker:p")
	auth.Inline = ""
	s := testSession(g, auth, node, nil)
	if got := get(t, s); got != "200" {
		t.Errorf("with a broken file: %s", got)
	}
	g.change()
	if got := get(t, testSession(g, auth, nil, nil)); !strings.Contains(got, auth.AuthFile) {
		t.Errorf("nothing helps, and the broken file is not named: %s", got)
	}
}

func TestHomeWithoutEnvironment(t *testing.T) {
	t.Setenv("HOME", "")
	if h := AuthFromEnv().Home; !filepath.IsAbs(h) {
		t.Errorf("home %q", h)
	}
}

// TestHeaderReachesTokenService: what hosts.toml adds is added there too, and not
// sent on to where that leads.
func TestHeaderReachesTokenService(t *testing.T) {
	other := newServer(t)
	s := newServer(t)
	var seen []string
	other.reset(func(w http.ResponseWriter, r *http.Request) bool {
		seen = append(seen, "other "+r.Header.Get("X-Key"))
		fmt.Fprint(w, `{"token":"t"}`)
		return true
	})
	s.reset(func(w http.ResponseWriter, r *http.Request) bool {
		seen = append(seen, r.URL.Path+" "+r.Header.Get("X-Key"))
		switch {
		case r.URL.Path == "/token":
			http.Redirect(w, r, other.URL+"/token", http.StatusTemporaryRedirect)
		case r.Header.Get("Authorization") == "":
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token"`, s.URL))
			w.WriteHeader(http.StatusUnauthorized)
		}
		return true
	})
	dir := t.TempDir()
	putFile(t, filepath.Join(dir, s.addr(), "hosts.toml"), fmt.Sprintf("server = %q\n[header]\nx-key = \"k\"\n", s.URL))
	open(t, newRegistries(), s.addr()+"/a:one", Options{HostsDir: []string{dir}}).Resolve(t.Context(), "")
	if d := cmp.Diff([]string{"/v2/a/manifests/one k", "/token k", "other ", "/v2/a/manifests/one k"}, seen); d != "" {
		t.Error(d)
	}
}
