package test

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/varvefs/varve/bench/forms"
)

// private is a registry that lets in who knows a password: by basic
// authentication, or by tokens that are good for a number of requests.
type private struct {
	open, closed *httptest.Server
	inner        http.Handler

	mu     sync.Mutex
	good   map[string]bool // "user:password"
	uses   int             // of a token, 0 for basic authentication
	left   map[string]int  // token to what is left of it
	given  int             // tokens
	logins map[string]int  // by user
}

// newPrivate makes one with a user.
func newPrivate(t *testing.T, uses int, userpass string) *private {
	t.Helper()
	p := &private{inner: mustGet[http.Handler](t)(forms.NewHandler(t.TempDir())), uses: uses, good: map[string]bool{userpass: true}, left: map[string]int{}, logins: map[string]int{}}
	p.open, p.closed = httptest.NewServer(p.inner), httptest.NewServer(p)
	t.Cleanup(func() { p.open.Close(); p.closed.Close() })
	return p
}

func (p *private) addr() string { return strings.TrimPrefix(p.closed.URL, "http://") }

func (p *private) push(t *testing.T, name string, img v1.Image) (ref string) {
	t.Helper()
	must(t, forms.Push(t.Context(), img, strings.TrimPrefix(p.open.URL, "http://")+"/"+name))
	return p.addr() + "/" + name
}

func (p *private) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	if p.lets(w, q) {
		p.inner.ServeHTTP(w, q)
	}
}

func (p *private) lets(w http.ResponseWriter, q *http.Request) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	user, password, _ := q.BasicAuth()
	in := p.good[user+":"+password]
	if q.Method == http.MethodPost && q.URL.Path == "/token" { // the OAuth2 form, which containerd tries first
		user, password = q.PostFormValue("username"), q.PostFormValue("password")
		in = p.good[user+":"+password]
	}
	switch {
	case q.URL.Path == "/token":
		p.logins[user]++
		if !in {
			http.Error(w, `{"details":"incorrect username or password"}`, http.StatusUnauthorized)
			return false
		}
		p.given++
		token := fmt.Sprintf("token%d", p.given)
		p.left[token] = p.uses
		fmt.Fprintf(w, `{"token":%q,"access_token":%[1]q,"expires_in":3600}`, token)
		return false
	case p.uses > 0:
		token := strings.TrimPrefix(q.Header.Get("Authorization"), "Bearer ")
		in = p.left[token] > 0
		p.left[token]--
	default:
		p.logins[user]++
	}
	if in {
		return true
	}
	w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
	if p.uses > 0 {
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="test"`, p.closed.URL))
	}
	http.Error(w, `{"errors":[{"code":"UNAUTHORIZED"}]}`, http.StatusUnauthorized)
	return false
}

// let changes who is let in. What was given before is good for nothing.
func (p *private) let(userpass ...string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	clear(p.good)
	clear(p.left)
	for _, up := range userpass {
		p.good[up] = true
	}
}

func (p *private) tokens() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.given
}

func (p *private) loginsOf(user string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.logins[user]
}

// dockerConfig gives the text of a config.json.
func dockerConfig(addr, userpass string) string {
	return fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, addr, base64.StdEncoding.EncodeToString([]byte(userpass)))
}

// configure writes the daemon's configuration.
func (h *host) configure(text string) {
	h.t.Helper()
	dir := filepath.Join(h.root, "config")
	must(h.t, os.MkdirAll(dir, 0o755))
	must(h.t, os.WriteFile(filepath.Join(dir, "config.toml"), []byte(text), 0o644))
}

// hides checks that words are nowhere that the daemon writes: not in its
// directories, the log among them, not in its metrics and what it says of mounts.
func (h *host) hides(words ...string) {
	h.t.Helper()
	for _, word := range slices.Clone(words) {
		words = append(words, base64.StdEncoding.EncodeToString([]byte(word)))
	}
	check := func(where, text string) {
		for _, word := range words {
			if strings.Contains(text, word) {
				h.t.Errorf("%q is in %s", word, where)
			}
		}
	}
	for _, dir := range []string{"state", "cache"} {
		must(h.t, filepath.WalkDir(filepath.Join(h.root, dir), func(p string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) || err == nil && !d.Type().IsRegular() {
				return nil
			}
			if err == nil {
				var b []byte
				if b, err = os.ReadFile(p); err == nil {
					check(p, string(b))
				} else if errors.Is(err, fs.ErrNotExist) {
					return nil // it has gone meanwhile
				}
			}
			return err
		}))
	}
	over := h.overSocket()
	defer over.CloseIdleConnections()
	for _, path := range []string{"/metrics", "/v1/mounts", "/v1/version"} {
		check(path, scrape(h.t, over, "http://varve"+path))
	}
	check("ps", h.ok("ps", "--no-trunc"))
}

// TestTokensRunOut reads a cold image while every token is good for a few requests
// only: readers see nothing of it.
func TestTokensRunOut(t *testing.T) {
	needRoot(t)
	for _, face := range faces {
		t.Run(face, func(t *testing.T) {
			const secret = "s3cret-word"
			p := newPrivate(t, 20, "u:"+secret)
			l := newLayer(t)
			l.file("large", content("large", 12<<20))
			for i := range 40 {
				l.file(fmt.Sprintf("files/%d", i), content(fmt.Sprint(i), 300_000))
			}
			ref := p.push(t, "private/image:1", build(t, forms.EStargz, l.bytes()))
			h := newHost(t)
			h.ok("ps") // the daemon knows nothing of what comes
			h.env = append(h.env, "DOCKER_AUTH_CONFIG="+dockerConfig(p.addr(), "u:"+secret))
			dir := h.ok("mount", "--face", face, "--prefetch", "none", ref)
			var wg sync.WaitGroup
			for i := range 40 {
				wg.Go(func() {
					if got := helper(t, "sum", filepath.Join(dir, fmt.Sprintf("files/%d", i))); got != sumOf(content(fmt.Sprint(i), 300_000)) {
						t.Errorf("file %d: digest %s", i, got)
					}
				})
			}
			wg.Wait()
			if got := helper(t, "sum", filepath.Join(dir, "large")); got != sumOf(content("large", 12<<20)) {
				t.Errorf("digest %s", got)
			}
			if n := p.tokens(); n < 3 {
				t.Errorf("%d tokens were asked for: none ran out", n)
			}
			if log := h.logText(); strings.Contains(log, "read failed") || strings.Contains(log, "refused") {
				t.Errorf("log: %s", log)
			}
			h.hides(secret, "u:"+secret)
			h.ok("umount", dir)
		})
	}
}

// TestPasswordTakenBack revokes a password under a mount and gives another one. Who
// reads meanwhile sees an error, or nothing but delay where the token service is
// what refuses.
func TestPasswordTakenBack(t *testing.T) {
	needRoot(t)
	for _, uses := range []int{0, 1000} {
		t.Run(fmt.Sprintf("uses %d", uses), func(t *testing.T) {
			p := newPrivate(t, uses, "u:first-word")
			l, names := small(t, 8, 400_000)
			ref := p.push(t, "private/image:1", build(t, forms.EStargz, l))
			h := newHost(t)
			config := filepath.Join(h.root, "docker")
			must(t, os.Mkdir(config, 0o700))
			login := func(userpass string) {
				must(t, os.WriteFile(filepath.Join(config, "config.json"), []byte(dockerConfig(p.addr(), userpass)), 0o600))
			}
			login("u:first-word")
			h.env = append(h.env, "DOCKER_CONFIG="+config)
			dir := h.ok("mount", "--prefetch", "none", ref)
			path := filepath.Join(dir, names[0])
			p.let()
			read := make(chan error, 1)
			go func() {
				_, err := os.ReadFile(path)
				read <- err
			}()
			h.logged(`credentials are refused.*` + filepath.Join(config, "config.json"))
			if uses == 0 {
				if err := <-read; !errors.Is(err, syscall.EIO) {
					t.Errorf("a file that is not here, and a password that is good for nothing: %v", err)
				}
				h.logged(`read failed.*` + names[0])
			}
			p.let("u:second-word")
			login("u:second-word")
			if uses > 0 {
				must(t, <-read)
			}
			reads(t, path, sumOf(content(names[0], 400_000)))
			h.hides("first-word", "second-word", "u:first-word", "u:second-word")
			h.ok("umount", dir)
		})
	}
}

// reads waits until a file can be read, and compares it.
func reads(t *testing.T, path, want string) {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		b, err := os.ReadFile(path)
		if err == nil {
			if got := sumOf(b); got != want {
				t.Errorf("%s: digest %s, want %s", path, got, want)
			}
			return
		}
		if time.Now().After(end) {
			t.Fatalf("it is not read again: %v", err)
		}
	}
}

// TestOwnConfigOfTheDaemon mounts for a caller who has nothing: the daemon has a
// configuration file of its own, and it is asked when the caller's is refused.
func TestOwnConfigOfTheDaemon(t *testing.T) {
	needRoot(t)
	p := newPrivate(t, 0, "node:node-word")
	l, names := small(t, 3, 1000)
	ref := p.push(t, "private/image:1", build(t, forms.EStargz, l))
	h := newHost(t)
	config := filepath.Join(h.root, "node")
	must(t, os.Mkdir(config, 0o700))
	must(t, os.WriteFile(filepath.Join(config, "config.json"), []byte(dockerConfig(p.addr(), "node:node-word")), 0o600))
	plain := slices.Clone(h.env)
	h.env = append(h.env, "DOCKER_CONFIG="+config)
	h.ok("ps")
	h.env = append(slices.Clone(plain), "DOCKER_AUTH_CONFIG="+dockerConfig(p.addr(), "caller:wrong-word"))
	dir := h.ok("mount", ref)
	helper(t, "sum", filepath.Join(dir, names[0]))
	if n := p.loginsOf("caller"); n != 1 {
		t.Errorf("the caller's password, which is wrong, was tried %d times", n)
	}
	h.env = plain
	h.ok("ls", ref)
	h.hides("node-word", "wrong-word", "node:node-word", "caller:wrong-word")
	h.ok("umount", dir)
}

// TestCredentialProvider mounts by what a plugin of the kubelet's gives, and reads
// on when that has changed.
func TestCredentialProvider(t *testing.T) {
	needRoot(t)
	p := newPrivate(t, 0, "u:first-word")
	l, names := small(t, 8, 400_000)
	ref := p.push(t, "private/image:1", build(t, forms.EStargz, l))
	h := newHost(t)
	bin := filepath.Join(h.root, "bin")
	must(t, os.Mkdir(bin, 0o700))
	must(t, os.WriteFile(filepath.Join(bin, "ours"), fmt.Appendf(nil, `#!/bin/sh
cat >> %[1]s/asked; echo >> %[1]s/asked
printf '{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1","cacheKeyType":"Registry","auth":{"%%s":{"username":"u","password":"%%s"}}}' "$HOST" "$(cat %[1]s/word)"
`, bin), 0o700))
	word := func(w string) { must(t, os.WriteFile(filepath.Join(bin, "word"), []byte(w), 0o600)) }
	word("first-word")
	providers := filepath.Join(h.root, "providers.yaml")
	must(t, os.WriteFile(providers, fmt.Appendf(nil, `apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
- name: ours
  apiVersion: credentialprovider.kubelet.k8s.io/v1
  matchImages: ["*.0.0.*:%s"]
  defaultCacheDuration: 12h
  env: [{name: HOST, value: "%[2]s"}]
`, p.addr()[strings.LastIndex(p.addr(), ":")+1:], p.addr()), 0o600))
	h.configure(fmt.Sprintf("image_credential_provider_config = %q\nimage_credential_provider_bin_dir = %q\n", providers, bin))
	dir := h.ok("mount", "--prefetch", "none", ref)
	helper(t, "sum", filepath.Join(dir, names[0]))
	runs := func() int {
		b, err := os.ReadFile(filepath.Join(bin, "asked"))
		must(t, err)
		if !strings.Contains(string(b), p.addr()+"/private/image\"") {
			t.Errorf("it was asked for %s", b)
		}
		return strings.Count(string(b), "\n")
	}
	if n := runs(); n != 1 {
		t.Errorf("%d runs", n)
	}
	word("second-word")
	p.let("u:second-word")
	if got := helper(t, "sum", filepath.Join(dir, names[7])); got != sumOf(content(names[7], 400_000)) {
		t.Errorf("digest %s", got)
	}
	if n := runs(); n != 2 {
		t.Errorf("%d runs after the password had changed", n)
	}
	h.hides("first-word", "second-word")
	h.ok("umount", dir)

	h.stop()
	h.configure(fmt.Sprintf("image_credential_provider_config = %q\n", providers))
	if line := h.run("ps").err; !strings.Contains(line, "image_credential_provider_bin_dir") {
		t.Errorf("half a configuration: %s", line)
	}
	h.configure("")
}

// TestHostsDir has the daemon's configuration lead to a mirror.
func TestHostsDir(t *testing.T) {
	needRoot(t)
	l, names := small(t, 3, 1000)
	r := newRegistry(t)
	r.push("test/image:1", build(t, forms.EStargz, l))
	h := newHost(t)
	dir := filepath.Join(h.root, "certs.d", "reg.test")
	must(t, os.MkdirAll(dir, 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "hosts.toml"), fmt.Appendf(nil, "server = \"http://%s\"\n", r.rec.Addr()), 0o644))
	h.configure(fmt.Sprintf("hosts_dir = %q\n", filepath.Join(h.root, "none")+":"+filepath.Dir(dir)))
	at := h.ok("mount", "reg.test/test/image:1")
	helper(t, "sum", filepath.Join(at, names[0]))
	h.ok("umount", at)
}
