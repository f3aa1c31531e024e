package fetch

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/varvefs/varve/bench/forms"
	"github.com/varvefs/varve/bench/link"
)

// cdn is what registries lead to: blobs behind signatures that run out, at
// another host.
type cdn struct {
	*httptest.Server
	registry   *httptest.Server
	generation atomic.Int64 // the signature that is good
	broken     atomic.Bool  // the next request fails
	mu         sync.Mutex
	log        []string // "registry" or "cdn", and the range
}

const token = "Bearer of-the-registry"

func (c *cdn) note(host string, r *http.Request) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.log = append(c.log, host+" "+r.Header.Get("Range"))
}

func redirecting(t *testing.T, s *site) *cdn {
	c := &cdn{}
	c.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c.note("cdn", r)
		if a := r.Header.Get("Authorization"); a != "" {
			t.Errorf("the redirect's target was given %q", a)
		}
		if c.broken.Swap(false) {
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		if r.URL.Query().Get("signature") != fmt.Sprint(c.generation.Load()) {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		s.ServeHTTP(w, r)
	}))
	t.Cleanup(c.Server.Close)
	c.registry = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c.note("registry", r)
		if r.Header.Get("Authorization") != token {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		http.Redirect(w, r, fmt.Sprintf("%s%s?signature=%d", c.Server.URL, r.URL.Path, c.generation.Load()), http.StatusTemporaryRedirect)
	}))
	t.Cleanup(c.registry.Close)
	return c
}

// forHost authenticates to one host.
type forHost struct {
	host string
	next http.RoundTripper
}

func (f forHost) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.Host == f.host {
		r = r.Clone(r.Context())
		r.Header.Set("Authorization", token)
	}
	return f.next.RoundTrip(r)
}

func (c *cdn) origin(t *testing.T, s *site, l *layer) Origin {
	u, err := url.Parse(s.origin(l).URL)
	if err != nil {
		t.Fatal(err)
	}
	host := strings.TrimPrefix(c.registry.URL, "http://")
	return Origin{URL: c.registry.URL + u.Path, Transport: forHost{host, s.transport}}
}

func (c *cdn) take() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	log := c.log
	c.log = nil
	return log
}

func TestRedirects(t *testing.T) {
	l := makeLayer(t, forms.EStargz, files())
	s := serve(t, l)
	c := redirecting(t, s)
	m := on(t, t.TempDir(), quick)
	h := m.open(t, l, c.origin(t, s, l))
	read := func(name string) (string, []string) {
		t.Helper()
		r := span(t, h, name)
		c.take()
		checkFile(t, h, find(t, l, name))
		return r, c.take()
	}
	// Where it leads is known by now.
	r, log := read("small")
	if diff := cmp.Diff([]string{"cdn " + r}, log); diff != "" {
		t.Error(diff)
	}
	// The signature runs out.
	c.generation.Add(1)
	r, log = read("copy")
	if diff := cmp.Diff([]string{"cdn " + r, "registry " + r, "cdn " + r}, log); diff != "" {
		t.Error(diff)
	}
	// It runs out in the middle of a body.
	s.SetFault(func(*http.Request) *link.Fault {
		s.SetFault(nil)
		c.generation.Add(1)
		return &link.Fault{Break: link.AbortBody, After: 100}
	})
	r, log = read("big")
	from, end := bounds(t, r)
	rest := asked(from+100, end)
	if diff := cmp.Diff([]string{"cdn " + r, "cdn " + rest, "registry " + rest, "cdn " + rest}, log); diff != "" {
		t.Error(diff)
	}
	// The other host fails: the registry may know of another.
	c.broken.Store(true)
	r, log = read("last")
	if diff := cmp.Diff([]string{"cdn " + r, "registry " + r, "cdn " + r}, log); diff != "" {
		t.Error(diff)
	}
}

// TestNoSecretsInErrors fails in every way at a redirect's target.
func TestNoSecretsInErrors(t *testing.T) {
	l := makeLayer(t, forms.EStargz, files())
	const secret = "X-Signature=deadbeef"
	gone := httptest.NewServer(http.NotFoundHandler())
	gone.Close()
	for name, target := range map[string]string{
		"gone":     gone.URL + "/blob?" + secret,
		"nonsense": "http://%zz/blob?" + secret,
		"scheme":   "gopher://host/blob?" + secret,
		"loop":     "/again?" + secret,
	} {
		t.Run(name, func(t *testing.T) {
			registry := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Location", target)
				w.WriteHeader(http.StatusFound)
			}))
			defer registry.Close()
			m := on(t, t.TempDir(), hasty)
			_, err := m.Open(context.Background(), m.request(l, Origin{URL: registry.URL + "/first", Transport: http.DefaultTransport}))
			if err == nil || strings.Contains(err.Error(), "deadbeef") {
				t.Errorf("got %v", err)
			}
		})
	}
}
