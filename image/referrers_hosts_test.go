package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
)

func TestReferrersErrors(t *testing.T) {
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
	index := func(body string) func(http.ResponseWriter, *http.Request) bool {
		return api(func(w http.ResponseWriter, r *http.Request) { writeIndex(w, body) })
	}
	dead := httptest.NewServer(nil)
	dead.Close()
	for _, tt := range []struct {
		name  string
		first func(http.ResponseWriter, *http.Request) bool
		kind  error
		want  string
	}{
		{"401", status(401), ErrUnauthorized, "docker login"},
		{"403", status(403), ErrUnauthorized, "its own text"},
		{"429", status(429), ErrUnreachable, "slow down"},
		{"503", status(503), ErrUnreachable, "its own text"},
		{"dial", nil, ErrUnreachable, "refused"},
		{"cut", index(`{"schemaVersion":2,"manifests":[{`), ErrMalformed, "list of referrers"},
		{"no array", index(`{"schemaVersion":2,"manifests":{}}`), ErrMalformed, "no array"},
		{"image", index(`{"schemaVersion":2,"manifests":[],"layers":[]}`), ErrMalformed, "is an image"},
		{"version", index(`{"manifests":[]}`), ErrMalformed, "schema version"},
		{"type", index(`{"schemaVersion":2,"mediaType":"x","manifests":[]}`), ErrMalformed, `type "x"`},
		{"large", index(strings.Repeat(" ", MaxManifest+1)), ErrMalformed, "more than"},
		{"crumbs", index(`{"schemaVersion":2,"manifests":[` + strings.Repeat("{},", maxEntries) + "{}]}"), ErrMalformed, "more than"},
		{"circle", api(func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, r.URL.Path, http.StatusFound) }), ErrMalformed, "redirects more than"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newServer(t)
			s.reset(tt.first)
			addr := s.addr()
			if tt.first == nil {
				addr = strings.TrimPrefix(dead.URL, "http://")
			}
			got, err := newRegistries().Referrers(t.Context(), mustName(t, addr+"/a"), onlyHosts(t), theSubject)
			if got != nil || !errors.Is(err, tt.kind) || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "\n") ||
				!strings.HasPrefix(err.Error(), "list referrers of "+addr+"/a@sha256:") {
				t.Errorf("%v, %v", got, err)
			}
		})
	}
	s := newServer(t)
	ctx, cancel := context.WithCancel(t.Context())
	s.reset(api(func(w http.ResponseWriter, r *http.Request) {
		cancel()
		<-r.Context().Done()
	}))
	if _, err := newRegistries().Referrers(ctx, mustName(t, s.addr()+"/a"), onlyHosts(t), theSubject); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	// What fails and passes is asked again.
	failed := false
	s.reset(api(func(w http.ResponseWriter, r *http.Request) {
		if !failed {
			failed = true
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		writeIndex(w, listOf(indexType, "x"))
	}))
	if got, err := newRegistries().Referrers(t.Context(), mustName(t, s.addr()+"/a"), onlyHosts(t), theSubject); len(got) != 1 || err != nil {
		t.Errorf("502 once: %v, %v", got, err)
	}
}

func TestReferrersOfMirrors(t *testing.T) {
	mirror, upstream := newServer(t), newServer(t)
	list := func(text string) func(http.ResponseWriter, *http.Request) bool {
		return api(func(w http.ResponseWriter, r *http.Request) {
			if text == "" {
				writeIndex(w, listOf(indexType))
			} else {
				writeIndex(w, listOf(indexType, text))
			}
		})
	}
	broken := func(w http.ResponseWriter, r *http.Request) bool { w.WriteHeader(500); return true }
	for name, tt := range map[string]struct {
		mirror, upstream func(http.ResponseWriter, *http.Request) bool
		capabilities     string
		want             []string
		kind             error
	}{
		"mirror":          {mirror: list("m"), upstream: broken, want: []string{indexType + " m"}},
		"mirror's none":   {mirror: list(""), upstream: broken, want: []string{}},
		"mirror has none": {upstream: list("u"), want: []string{indexType + " u"}},
		"mirror broken":   {mirror: broken, upstream: list("u"), want: []string{indexType + " u"}},
		"blobs only":      {mirror: list("m"), upstream: list("u"), capabilities: `["pull"]`, want: []string{indexType + " u"}},
		"neither":         {want: []string{}},
		"upstream broken": {upstream: broken, kind: ErrUnreachable},
		"mirror's broken": {mirror: broken, want: []string{}},
	} {
		t.Run(name, func(t *testing.T) {
			mirror.reset(tt.mirror)
			upstream.reset(tt.upstream)
			dir := t.TempDir()
			toml := fmt.Sprintf("server = %q\n[host.%q]\n", upstream.URL, mirror.URL)
			if tt.capabilities != "" {
				toml += "capabilities = " + tt.capabilities + "\n"
			}
			putFile(t, filepath.Join(dir, "reg.test", "hosts.toml"), toml)
			got, err := newRegistries().Referrers(t.Context(), mustName(t, "reg.test/a:1"), Options{HostsDir: []string{dir}}, theSubject)
			if tt.kind != nil {
				if !errors.Is(err, tt.kind) {
					t.Errorf("%v, %v", got, err)
				}
				return
			}
			if d := cmp.Diff(tt.want, listed(got)); d != "" || err != nil {
				t.Error(d, err)
			}
		})
	}
}

// The pages of a mirror with a path of its own are asked for under it, however
// it writes them.
func TestReferrersPagesOfAMirrorWithAPath(t *testing.T) {
	for _, link := range []string{"/v2/cache/a/referrers/" + theSubject.String() + "?page=1", "?page=1"} {
		s := newServer(t)
		s.reset(func(w http.ResponseWriter, r *http.Request) bool {
			if r.URL.Path != "/v2/cache/a/referrers/"+theSubject.String() {
				return false
			}
			if r.URL.Query().Get("page") == "" {
				w.Header().Set("Link", "<"+link+`>; rel="next"`)
				return writeIndex(w, listOf(indexType, "0"))
			}
			return writeIndex(w, listOf(indexType, "1"))
		})
		dir := t.TempDir()
		putFile(t, filepath.Join(dir, "reg.test", "hosts.toml"), fmt.Sprintf("[host.%q]\noverride_path = true\n", s.URL+"/v2/cache"))
		got, err := newRegistries().Referrers(t.Context(), mustName(t, "reg.test/a:1"), Options{HostsDir: []string{dir}}, theSubject)
		if len(got) != 2 || err != nil {
			t.Errorf("%s: %v, %v", link, listed(got), err)
		}
	}
}

func TestReferrersOfWhatIsInNoRegistry(t *testing.T) {
	r, ctx, o := newRegistries(), t.Context(), onlyHosts(t)
	raw, blobs := artifact(t, theSubject, indexType, "x")
	for _, ref := range []string{"oci:/x:1", "docker-archive:/x", theSubject.String()} {
		n, err := ParseName(ref)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := r.Referrers(ctx, n, o, theSubject); got != nil || err != nil {
			t.Errorf("%s: %v, %v", ref, got, err)
		}
		for what, err := range map[string]error{
			"push":     second(r.PushReferrer(ctx, n, o, theSubject, raw, blobs)),
			"delete":   r.DeleteReferrer(ctx, n, o, theSubject, theSubject),
			"manifest": second(r.FetchManifest(ctx, n, o, theSubject, "", 1)),
			"blob":     second(r.FetchBlob(ctx, n, o, theSubject, 1)),
		} {
			if !errors.Is(err, ErrMalformed) || !strings.Contains(err.Error(), "is in no registry") {
				t.Errorf("%s of %s: %v", what, ref, err)
			}
		}
	}
	if _, err := r.Referrers(ctx, Name{}, o, theSubject); !errors.Is(err, ErrMalformed) {
		t.Errorf("no name: %v", err)
	}
	for _, d := range []digest.Digest{"", "sha256:x", digest.SHA512.FromString("x")} {
		if _, err := r.Referrers(ctx, mustName(t, "reg.test/a"), o, d); !errors.Is(err, ErrMalformed) {
			t.Errorf("%q: %v", d, err)
		}
	}
}

func second[T any](_ T, err error) error { return err }

func TestFetchedDocumentsAreVerified(t *testing.T) {
	s := newServer(t)
	s.reset(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path == "/v2/" {
			return false
		}
		io.WriteString(w, "bytes")
		return true
	})
	r, n, o, ctx := newRegistries(), mustName(t, s.addr()+"/a:1"), onlyHosts(t), t.Context()
	right, wrong := digest.FromString("bytes"), digest.FromString("others")
	for _, tt := range []struct {
		d     digest.Digest
		limit int64
		want  string
	}{
		{right, 5, ""},
		{right, 4, "more than 4 bytes"},
		{wrong, 5, "holds other bytes"},
		{digest.SHA512.FromString("bytes"), 5, "sha512 is not supported"},
	} {
		b, berr := r.FetchBlob(ctx, n, o, tt.d, tt.limit)
		m, merr := r.FetchManifest(ctx, n, o, tt.d, "", tt.limit)
		if tt.want == "" {
			if string(b) != "bytes" || string(m) != "bytes" || berr != nil || merr != nil {
				t.Errorf("%q, %q, %v, %v", b, m, berr, merr)
			}
			continue
		}
		for _, err := range []error{berr, merr} {
			if b != nil || m != nil || !errors.Is(err, ErrMalformed) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q", err, tt.want)
			}
		}
	}
}

func TestListingsAreBounded(t *testing.T) {
	var k listings
	for i := range 2 * maxListings {
		k.set(host{addr: fmt.Sprint(i)}, byAPI)
	}
	if len(k.hosts) != maxListings || k.of(host{addr: fmt.Sprint(2*maxListings - 1)}) != byAPI {
		t.Errorf("%d hosts", len(k.hosts))
	}
	h := host{addr: "old"}
	k.set(h, byTag)
	k.hosts[listingKey(h)] = listing{way: byTag, until: time.Now().Add(-time.Second)}
	if k.of(h) != byBoth {
		t.Error("never forgets")
	}
}
