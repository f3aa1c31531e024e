package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// tagged is a fallback tag as a registry keeps it, with an ETag for each content.
type tagged struct {
	mu    sync.Mutex
	raw   []byte
	etags bool
	puts  []string                  // If-Match of each
	raced func(t *tagged, puts int) // before a PUT is looked at
}

func (g *tagged) serve(w http.ResponseWriter, r *http.Request) bool {
	if !strings.Contains(r.URL.Path, "/manifests/sha256-") {
		return false
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	etag := func() string { return fmt.Sprintf("%q", digest.FromBytes(g.raw)) }
	switch {
	case r.Method == http.MethodPut:
		g.puts = append(g.puts, r.Header.Get("If-Match"))
		if g.raced != nil {
			g.raced(g, len(g.puts))
		}
		if m := r.Header.Get("If-Match"); m != "" && m != etag() {
			w.WriteHeader(http.StatusPreconditionFailed)
			return true
		}
		g.raw, _ = io.ReadAll(r.Body)
		w.WriteHeader(http.StatusCreated)
	case g.raw == nil:
		http.NotFound(w, r)
	default:
		if g.etags {
			w.Header().Set("ETag", etag())
		}
		writeIndex(w, string(g.raw))
	}
	return true
}

func (g *tagged) digests(t *testing.T) []digest.Digest {
	t.Helper()
	var list []digest.Digest
	if err := readReferrers(g.raw, func(r Referrer) bool { list = append(list, r.Digest); return true }); err != nil {
		t.Fatal(err)
	}
	slices.Sort(list)
	return list
}

func TestPushReferrerKeepsWhatOthersListed(t *testing.T) {
	raw, blobs := artifact(t, theSubject, indexType, "x")
	mine := digest.FromBytes(raw)
	other := `{"mediaType":"m","digest":"` + digest.FromString("other").String() + `","size":3,"data":"QQ==","unknown":[1,2]}`
	long := `{"digest":"` + digest.SHA512.FromString("other").String() + `","size":3}`
	g := &tagged{etags: true, raw: []byte(`{"schemaVersion":2,"mediaType":"` + ocispec.MediaTypeImageIndex + `","annotations":{"a":"b"},"more":1,"manifests":[` +
		other + `,{"digest":"` + mine.String() + `","size":1,"artifactType":"stale"},` + long + `]}`)}
	s := newServer(t)
	s.reset(g.serve)
	r, n, o := newRegistries(), mustName(t, s.addr()+"/a:1"), onlyHosts(t)
	for range 2 { // the second finds all as it should be
		if _, err := r.PushReferrer(t.Context(), n, o, theSubject, raw, blobs); err != nil {
			t.Fatal(err)
		}
	}
	var doc struct {
		Annotations map[string]string
		More        int
		Manifests   []json.RawMessage
	}
	if err := json.Unmarshal(g.raw, &doc); err != nil {
		t.Fatal(err)
	}
	if len(doc.Manifests) != 3 || string(doc.Manifests[0]) != other || string(doc.Manifests[1]) != long || doc.More != 1 || doc.Annotations["a"] != "b" {
		t.Errorf("%s", g.raw)
	}
	var e ocispec.Descriptor
	if err := json.Unmarshal(doc.Manifests[2], &e); err != nil || e.Digest != mine || e.ArtifactType != indexType || e.Size != int64(len(raw)) || e.Annotations["text"] != "x" {
		t.Errorf("%s, %v", doc.Manifests[2], err)
	}
	if len(g.puts) != 1 || g.puts[0] == "" {
		t.Errorf("written with If-Match %q", g.puts)
	}
	if err := r.DeleteReferrer(t.Context(), n, o, theSubject, mine); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(g.raw, &doc); err != nil || len(doc.Manifests) != 2 || string(doc.Manifests[0]) != other {
		t.Errorf("after: %s, %v", g.raw, err)
	}
}

func TestPushReferrerGoesAlongWithAnother(t *testing.T) {
	raw, blobs := artifact(t, theSubject, indexType, "x")
	for races := range 3 {
		g := &tagged{etags: true, raw: []byte(listOf(signatureType, "0"))}
		g.raced = func(g *tagged, puts int) {
			if puts <= races {
				g.raw = []byte(listOf(signatureType, "0", fmt.Sprint(puts)))
			}
		}
		s := newServer(t)
		s.reset(g.serve)
		_, err := newRegistries().PushReferrer(t.Context(), mustName(t, s.addr()+"/a:1"), onlyHosts(t), theSubject, raw, blobs)
		if races == 2 {
			if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "changed by others") || !strings.Contains(err.Error(), "it is there as "+digest.FromBytes(raw).String()) {
				t.Errorf("two races: %v", err)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		want := []digest.Digest{digest.FromString("0"), digest.FromBytes(raw)}
		if races == 1 {
			want = append(want, digest.FromString("1"))
		}
		slices.Sort(want)
		if d := cmp.Diff(want, g.digests(t)); d != "" || len(g.puts) != races+1 {
			t.Errorf("%d races: %s, %d puts", races, d, len(g.puts))
		}
	}
}

// A registry without ETags cannot keep pushes apart; within a process they are.
func TestPushReferrersSideBySide(t *testing.T) {
	s := newServer(t)
	r, n, o := newRegistries(), mustName(t, s.addr()+"/a:1"), onlyHosts(t)
	if got, err := r.Referrers(t.Context(), n, o, theSubject); len(got) != 0 || err != nil {
		t.Fatal(got, err)
	}
	var wg sync.WaitGroup
	for i := range 8 {
		raw, blobs := artifact(t, theSubject, indexType, fmt.Sprint(i))
		wg.Go(func() {
			if _, err := r.PushReferrer(t.Context(), n, o, theSubject, raw, blobs); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if got, err := r.Referrers(t.Context(), n, o, theSubject); len(got) != 8 || err != nil {
		t.Errorf("%v, %v", listed(got), err)
	}
	if len(r.listing.held) != 0 {
		t.Error("still held")
	}
}

func TestPushReferrerSendsWhatIsMissing(t *testing.T) {
	s := newServer(t)
	r, n, o := newRegistries(), mustName(t, s.addr()+"/a:1"), onlyHosts(t)
	subject := func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/manifests/") {
			w.Header().Set("OCI-Subject", theSubject.String())
		}
		return false
	}
	s.reset(subject)
	var raw []byte
	var blobs [][]byte
	for _, want := range []map[string]int{
		{"HEAD": 2, "POST": 2, "PUT": 3}, // two blobs, the manifest, no tag
		{"HEAD": 2, "POST": 1, "PUT": 2}, // the config is there
		{"HEAD": 2, "PUT": 1},
	} {
		if want["POST"] > 0 {
			raw, blobs = artifact(t, theSubject, indexType, fmt.Sprint(want["POST"]))
		}
		if _, err := r.PushReferrer(t.Context(), n, o, theSubject, raw, blobs); err != nil {
			t.Fatal(err)
		}
		got := map[string]int{}
		for _, q := range s.requests() {
			method, _, _ := strings.Cut(q, " ")
			got[method]++
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Error(d, s.requests())
		}
		s.reset(subject)
	}
	if r.listing.of(host{addr: s.addr(), prefix: "/v2"}) != byAPI {
		t.Error("OCI-Subject says that there is an API")
	}
}

func TestPushReferrerIsChecked(t *testing.T) {
	raw, blobs := artifact(t, theSubject, indexType, "x")
	s := newServer(t)
	r, n, o := newRegistries(), mustName(t, s.addr()+"/a:1"), onlyHosts(t)
	for name, tt := range map[string]struct {
		subject digest.Digest
		raw     []byte
		blobs   [][]byte
		want    string
	}{
		"subject":       {digest.FromString("another"), raw, blobs, "subject is not"},
		"blob":          {theSubject, raw, append(blobs, []byte("y")), "blob 3"},
		"no JSON":       {theSubject, []byte("{"), nil, "manifest"},
		"list":          {theSubject, []byte(listOf(indexType, "x")), nil, "not an OCI image manifest"},
		"large":         {theSubject, make([]byte, MaxManifest+1), nil, "the limit is"},
		"other digests": {digest.SHA512.FromString("x"), raw, blobs, "not supported"},
	} {
		if _, err := r.PushReferrer(t.Context(), n, o, tt.subject, tt.raw, tt.blobs); !errors.Is(err, ErrMalformed) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if asked := s.requests(); len(asked) > 0 {
		t.Errorf("asked %v", asked)
	}
}

func TestPushReferrerThatIsRefused(t *testing.T) {
	raw, blobs := artifact(t, theSubject, indexType, "x")
	on := func(method, part string, answer func(w http.ResponseWriter)) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method != method || !strings.Contains(r.URL.Path, part) {
				return false
			}
			answer(w)
			return true
		}
	}
	status := func(code int) func(http.ResponseWriter) {
		return func(w http.ResponseWriter) {
			w.WriteHeader(code)
			fmt.Fprint(w, `{"errors":[{"code":"X","message":"its own text"}]}`)
		}
	}
	header := func(code int, k, v string) func(http.ResponseWriter) {
		return func(w http.ResponseWriter) { w.Header().Set(k, v); w.WriteHeader(code) }
	}
	for name, tt := range map[string]struct {
		first func(http.ResponseWriter, *http.Request) bool
		kind  error
		want  string
	}{
		"401":                {on("POST", "", status(401)), ErrUnauthorized, "docker login"},
		"403 upload":         {on("POST", "", status(403)), ErrUnauthorized, "its own text"},
		"405 upload":         {on("POST", "", status(405)), ErrRefused, "refuses it: its own text"},
		"413 blob":           {on("PUT", "/uploads/", status(413)), ErrRefused, "too large"},
		"400 blob":           {on("PUT", "/uploads/", status(400)), ErrRefused, "refuses it"},
		"500 blob":           {on("PUT", "/uploads/", status(500)), ErrUnreachable, "try again later"},
		"405 manifest":       {on("PUT", "/manifests/sha256:", status(405)), ErrRefused, "refuses it"},
		"413 manifest":       {on("PUT", "/manifests/sha256:", status(413)), ErrRefused, "too large"},
		"404 manifest":       {on("PUT", "/manifests/sha256:", status(404)), ErrNotFound, "its own text"},
		"other manifest":     {on("PUT", "/manifests/sha256:", header(201, "Docker-Content-Digest", "sha256:x")), ErrMalformed, "in place of"},
		"other blob":         {on("HEAD", "/blobs/", header(200, "Docker-Content-Digest", "sha256:x")), ErrMalformed, "in place of"},
		"tag refused":        {on("PUT", "/manifests/sha256-", status(403)), ErrUnauthorized, "but not listed"},
		"tag unreadable":     {on("GET", "/manifests/sha256-", status(500)), ErrUnreachable, "but not listed"},
		"tag of an image":    {on("GET", "/manifests/sha256-", func(w http.ResponseWriter) { w.Write(raw) }), ErrMalformed, "but not listed"},
		"garbage in the tag": {on("GET", "/manifests/sha256-", func(w http.ResponseWriter) { io.WriteString(w, "{") }), ErrMalformed, "tag sha256-"},
		"no location":        {on("POST", "", status(202)), ErrMalformed, "URL of 0 bytes"},
		"file":               {on("POST", "", header(202, "Location", "file:///x")), ErrMalformed, "no URL of http"},
		"password":           {on("POST", "", header(202, "Location", "http://a:b@h/x")), ErrMalformed, "credentials"},
		"metadata":           {on("POST", "", header(202, "Location", "http://169.254.169.254/x")), ErrMalformed, "internal address"},
		"redirected to GET":  {on("POST", "", header(303, "Location", "/x")), ErrMalformed, "redirects POST as GET"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newServer(t)
			s.reset(tt.first)
			_, err := newRegistries().PushReferrer(t.Context(), mustName(t, s.addr()+"/a:1"), onlyHosts(t), theSubject, raw, blobs)
			if !errors.Is(err, tt.kind) || !strings.Contains(err.Error(), tt.want) || !strings.HasPrefix(err.Error(), "push referrer to "+s.addr()+"/a@sha256:") {
				t.Errorf("%v", err)
			}
			for _, q := range s.requests() {
				if strings.HasPrefix(q, "PUT /v2/a/manifests/sha256-") && tt.first != nil && name != "tag refused" {
					t.Errorf("%s after %v", q, err)
				}
			}
		})
	}
}

func TestPushReferrerOutlivesFailures(t *testing.T) {
	raw, blobs := artifact(t, theSubject, indexType, "x")
	s := newServer(t)
	var mu sync.Mutex
	failed := map[string]bool{}
	s.reset(func(w http.ResponseWriter, r *http.Request) bool {
		mu.Lock()
		defer mu.Unlock()
		kind := r.Method
		if strings.Contains(r.URL.Path, "/manifests/") {
			kind += " manifest"
		}
		if r.URL.Path == "/v2/" || failed[kind] {
			return false
		}
		failed[kind] = true
		w.WriteHeader(http.StatusServiceUnavailable)
		return true
	})
	r, n, o := newRegistries(), mustName(t, s.addr()+"/a:1"), onlyHosts(t)
	if _, err := r.PushReferrer(t.Context(), n, o, theSubject, raw, blobs); err != nil {
		t.Fatal(err)
	}
	if got, err := r.Referrers(t.Context(), n, o, theSubject); len(got) != 1 || err != nil {
		t.Errorf("%v, %v", got, err)
	}
	if len(failed) != 6 {
		t.Errorf("failed %v", failed)
	}
}

func TestReferrersAskForTheirTokens(t *testing.T) {
	s := newServer(t)
	b := &bearer{s: s}
	s.reset(b.serve)
	dir := t.TempDir()
	putFile(t, filepath.Join(dir, "config.json"), fmt.Sprintf(`{"auths":{%q:{"auth":"bWU6cA=="}}}`, s.addr()))
	o := Options{Auth: Auth{DockerConfig: dir}, HostsDir: []string{t.TempDir()}}
	r, n := newRegistries(), mustName(t, s.addr()+"/a:1")
	raw, blobs := artifact(t, theSubject, indexType, "x")
	if _, err := r.PushReferrer(t.Context(), n, o, theSubject, raw, blobs); err != nil {
		t.Fatal(err)
	}
	if err := r.DeleteReferrer(t.Context(), n, o, theSubject, digest.FromBytes(raw)); err != nil {
		t.Fatal(err)
	}
	if got, err := r.Referrers(t.Context(), n, o, theSubject); len(got) != 0 || err != nil {
		t.Errorf("%v, %v", got, err)
	}
	var scopes []string
	for _, q := range s.requests() {
		if u, err := url.Parse(strings.TrimPrefix(q, "GET ")); err == nil && u.Path == "/token" {
			scopes = append(scopes, u.Query()["scope"]...)
		}
	}
	if d := cmp.Diff([]string{"repository:a:pull,push", "repository:a:pull,push,delete", "repository:a:pull"}, scopes); d != "" {
		t.Error(d)
	}
}

func TestDeleteReferrerThatIsRefused(t *testing.T) {
	raw, blobs := artifact(t, theSubject, indexType, "x")
	for name, tt := range map[string]struct {
		code int
		body string
		kind error
		want string
	}{
		"405":          {405, "", ErrRefused, "does not delete manifests (405 Method Not Allowed); it is no longer listed"},
		"400":          {400, `{"errors":[{"code":"UNSUPPORTED","message":"The operation is unsupported."}]}`, ErrRefused, "does not delete manifests (The operation is unsupported.)"},
		"501":          {501, "", ErrRefused, "does not delete manifests"},
		"403":          {403, "", ErrUnauthorized, "docker login"},
		"409":          {409, `{"errors":[{"message":"immutable"}]}`, ErrRefused, "refuses it: immutable"},
		"503":          {503, "", ErrUnreachable, "try again later"},
		"404":          {404, "", nil, ""}, // it was listed, and is gone
		"unauthorized": {401, "", ErrUnauthorized, "docker login"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newServer(t)
			r, n, o := newRegistries(), mustName(t, s.addr()+"/a:1"), onlyHosts(t)
			if _, err := r.PushReferrer(t.Context(), n, o, theSubject, raw, blobs); err != nil {
				t.Fatal(err)
			}
			s.reset(func(w http.ResponseWriter, r *http.Request) bool {
				if r.Method != http.MethodDelete {
					return false
				}
				w.WriteHeader(tt.code)
				io.WriteString(w, tt.body)
				return true
			})
			err := r.DeleteReferrer(t.Context(), n, o, theSubject, digest.FromBytes(raw))
			if tt.kind == nil && err != nil || !errors.Is(err, tt.kind) || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v", err)
			}
			if got, err := r.Referrers(t.Context(), n, o, theSubject); len(got) != 0 || err != nil {
				t.Errorf("still listed: %v, %v", got, err)
			}
		})
	}
	// One with the API goes on to list what it does not delete.
	s := newReferrersServer(t)
	s.reset(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodPut {
			w.Header().Set("OCI-Subject", theSubject.String())
		}
		if r.Method == http.MethodDelete {
			w.WriteHeader(http.StatusMethodNotAllowed)
		}
		return r.Method == http.MethodDelete
	})
	r, n, o := newRegistries(), mustName(t, s.addr()+"/a:1"), onlyHosts(t)
	if _, err := r.PushReferrer(t.Context(), n, o, theSubject, raw, blobs); err != nil {
		t.Fatal(err)
	}
	if err := r.DeleteReferrer(t.Context(), n, o, theSubject, digest.FromBytes(raw)); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "it stays") {
		t.Error(err)
	}
}
