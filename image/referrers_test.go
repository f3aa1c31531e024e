package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net/http"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	indexType     = "application/vnd.example.index.v1+json"
	signatureType = "application/vnd.example.signature.v1+json"
)

// newReferrersServer is a registry that has the referrers API.
func newReferrersServer(t *testing.T) *server {
	s := newServer(t)
	s.store = ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0)), ggcr.WithReferrersSupport(true))
	return s
}

// artifact makes a manifest that refers to subject, with its config and a blob.
func artifact(t *testing.T, subject digest.Digest, artifactType, text string) ([]byte, [][]byte) {
	t.Helper()
	blobs := [][]byte{[]byte("{}"), []byte(text)}
	desc := func(mt string, b []byte) ocispec.Descriptor {
		return ocispec.Descriptor{MediaType: mt, Digest: digest.FromBytes(b), Size: int64(len(b))}
	}
	raw, err := json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config:      desc(artifactType, blobs[0]),
		Layers:      []ocispec.Descriptor{desc("application/octet-stream", blobs[1])},
		Subject:     &ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: subject, Size: 1},
		Annotations: map[string]string{"text": text},
	})
	if err != nil {
		t.Fatal(err)
	}
	return raw, blobs
}

func listed(refs []Referrer) []string {
	list := []string{}
	for _, r := range refs {
		list = append(list, r.ArtifactType+" "+r.Annotations["text"])
	}
	slices.Sort(list)
	return list
}

// listOf is an index of entries of a type, named by the digests of texts.
func listOf(artifactType string, texts ...string) string {
	var entries []string
	for _, s := range texts {
		entries = append(entries, fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":7,"artifactType":%q,"annotations":{"text":%q}}`,
			ocispec.MediaTypeImageManifest, digest.FromString(s), artifactType, s))
	}
	return fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"manifests":[%s]}`, ocispec.MediaTypeImageIndex, strings.Join(entries, ","))
}

func writeIndex(w http.ResponseWriter, body string) bool {
	w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
	io.WriteString(w, body)
	return true
}

// api answers the referrers API, and nothing else.
func api(answer func(w http.ResponseWriter, r *http.Request)) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, "/referrers/") {
			answer(w, r)
			return true
		}
		return false
	}
}

func onlyHosts(t *testing.T) Options { return Options{HostsDir: []string{t.TempDir()}} }

var theSubject = digest.FromString("subject")

func TestReferrersArePushedFoundAndDeleted(t *testing.T) {
	for name, s := range map[string]*server{"api": newReferrersServer(t), "tag": newServer(t)} {
		t.Run(name, func(t *testing.T) {
			s.pushed("a/b")
			r, ctx := newRegistries(), t.Context()
			n, o := mustName(t, s.addr()+"/a/b:one"), onlyHosts(t)
			m, err := open(t, r, n.String(), o).Resolve(ctx, "linux/amd64")
			if err != nil {
				t.Fatal(err)
			}
			if got, err := r.Referrers(ctx, n, o, m.Digest); err != nil || len(got) != 0 {
				t.Fatalf("before: %v, %v", got, err)
			}
			var pushed []Referrer
			for _, a := range []struct{ typ, text string }{{indexType, "one"}, {signatureType, "two"}, {indexType, "three"}} {
				raw, blobs := artifact(t, m.Digest, a.typ, a.text)
				ref, err := r.PushReferrer(ctx, n, o, m.Digest, raw, blobs)
				if err != nil {
					t.Fatal(err)
				}
				if ref.Digest != digest.FromBytes(raw) || ref.ArtifactType != a.typ || ref.Size != int64(len(raw)) {
					t.Errorf("pushed %+v", ref)
				}
				pushed = append(pushed, ref)
			}
			for _, tt := range []struct{ types, want []string }{
				{nil, []string{indexType + " one", indexType + " three", signatureType + " two"}},
				{[]string{indexType}, []string{indexType + " one", indexType + " three"}},
				{[]string{signatureType, "other"}, []string{signatureType + " two"}},
				{[]string{"other"}, []string{}},
			} {
				got, err := r.Referrers(ctx, n, o, m.Digest, tt.types...)
				if err != nil {
					t.Fatal(err)
				}
				if d := cmp.Diff(tt.want, listed(got)); d != "" {
					t.Errorf("%v: %s", tt.types, d)
				}
				for _, ref := range got {
					if !slices.ContainsFunc(pushed, func(p Referrer) bool { return cmp.Equal(p, ref) }) {
						t.Errorf("listed %+v", ref)
					}
				}
			}
			raw, err := r.FetchManifest(ctx, n, o, pushed[0].Digest, pushed[0].MediaType, pushed[0].Size)
			if err != nil || verify(pushed[0].Digest, raw) != nil {
				t.Fatalf("manifest: %v", err)
			}
			if b, err := r.FetchBlob(ctx, n, o, digest.FromString("one"), 3); err != nil || string(b) != "one" {
				t.Errorf("blob: %q, %v", b, err)
			}
			if err := r.DeleteReferrer(ctx, n, o, m.Digest, pushed[0].Digest); err != nil {
				t.Fatal(err)
			}
			got, err := r.Referrers(ctx, n, o, m.Digest)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff([]string{indexType + " three", signatureType + " two"}, listed(got)); d != "" {
				t.Errorf("after: %s", d)
			}
			if _, err := r.FetchManifest(ctx, n, o, pushed[0].Digest, "", MaxManifest); !errors.Is(err, ErrNotFound) || strings.Contains(err.Error(), "No such image") {
				t.Errorf("deleted: %v", err)
			}
			if err := r.DeleteReferrer(ctx, n, o, m.Digest, pushed[0].Digest); !errors.Is(err, ErrNotFound) {
				t.Errorf("deleted twice: %v", err)
			}
		})
	}
}

// A mount waits for the answer: what is not known is asked for at once, on the
// connections and the token that the image was resolved by.
func TestReferrersAskBothAtOnceThenOne(t *testing.T) {
	tag := "GET /v2/a/manifests/" + fallbackTag(theSubject)
	path := "GET /v2/a/referrers/" + theSubject.String()
	for name, tt := range map[string]struct {
		s    *server
		then string
	}{
		"api": {newReferrersServer(t), path},
		"tag": {newServer(t), tag},
	} {
		t.Run(name, func(t *testing.T) {
			s := tt.s
			s.pushed("a")
			if name == "tag" { // the library's says NAME_UNKNOWN for a path it does not know
				s.store = withoutAPI(s.store)
			}
			b := &bearer{s: s}
			both := make(chan struct{})
			var mu sync.Mutex
			waiting := 0
			s.reset(func(w http.ResponseWriter, r *http.Request) bool {
				if b.serve(w, r) {
					return true
				}
				if !strings.HasSuffix(r.URL.Path, theSubject.Encoded()) {
					return false
				}
				mu.Lock()
				if waiting++; waiting == 2 {
					close(both)
				}
				mu.Unlock()
				select {
				case <-both:
				case <-time.After(time.Minute):
					t.Error("not side by side")
				}
				return false
			})
			dir := t.TempDir()
			putFile(t, filepath.Join(dir, "config.json"), fmt.Sprintf(`{"auths":{%q:{"auth":"bWU6cA=="}}}`, s.addr()))
			r, ctx := newRegistries(), t.Context()
			o := Options{Auth: Auth{DockerConfig: dir}, HostsDir: []string{t.TempDir()}}
			n := mustName(t, s.addr()+"/a:one")
			if _, err := open(t, r, n.String(), o).Resolve(ctx, "linux/amd64"); err != nil {
				t.Fatal(err)
			}
			was := len(s.requests())
			for _, want := range [][]string{{tag, path}, {tt.then}, {tt.then}} {
				if got, err := r.Referrers(ctx, n, o, theSubject); err != nil || len(got) != 0 {
					t.Fatalf("%v, %v", got, err)
				}
				asked := s.requests()[was:]
				slices.Sort(asked)
				if d := cmp.Diff(want, asked); d != "" {
					t.Error(d)
				}
				was += len(asked)
			}
		})
	}
}

// withoutAPI is a registry whose router does not know the referrers API.
func withoutAPI(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "/referrers/") {
			http.NotFound(w, r)
			return
		}
		h.ServeHTTP(w, r)
	})
}

func TestReferrersOfRegistriesWithoutTheAPI(t *testing.T) {
	subject := []byte(listOf("", "child"))
	for name, tt := range map[string]struct {
		api    func(w http.ResponseWriter, r *http.Request)
		tag    string // "": there is none
		want   []string
		known  way
		digest digest.Digest
	}{
		"404":       {api: http.NotFound, tag: listOf(indexType, "x"), want: []string{indexType + " x"}, known: byTag},
		"404, none": {api: http.NotFound, want: []string{}, known: byTag},
		"405":       {api: func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(405) }, tag: listOf(indexType, "x"), want: []string{indexType + " x"}, known: byTag},
		"501":       {api: func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(501) }, tag: listOf(indexType, "x"), want: []string{indexType + " x"}, known: byTag},
		"400":       {api: func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(400) }, tag: listOf(indexType, "x"), want: []string{indexType + " x"}},
		"repository": {api: func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(404)
			io.WriteString(w, `{"errors":[{"code":"NAME_UNKNOWN"}]}`)
		}, want: []string{}},
		"page": {api: func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "<html>") }, tag: listOf(indexType, "x"), want: []string{indexType + " x"}, known: byTag},
		"away": {api: func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://web.example.test/packages", http.StatusSeeOther)
		}, tag: listOf(indexType, "x"), want: []string{indexType + " x"}, known: byTag},
		"image in its place":   {api: http.NotFound, tag: `{"schemaVersion":2,"config":{},"layers":[]}`, want: []string{}, known: byTag},
		"garbage in its place": {api: http.NotFound, tag: `{"schemaVersion":2,"manifests":[`, want: []string{}, known: byTag},
		"subject in its place": {api: http.NotFound, tag: string(subject), digest: digest.FromBytes(subject), want: []string{}, known: byTag},
	} {
		t.Run(name, func(t *testing.T) {
			d := tt.digest
			if d == "" {
				d = theSubject
			}
			s := newServer(t)
			s.reset(func(w http.ResponseWriter, r *http.Request) bool {
				switch {
				case strings.Contains(r.URL.Path, "/referrers/"):
					tt.api(w, r)
				case r.URL.Path == "/v2/a/manifests/"+fallbackTag(d) && tt.tag != "":
					writeIndex(w, tt.tag)
				default:
					return false
				}
				return true
			})
			r, n, o := newRegistries(), mustName(t, s.addr()+"/a"), onlyHosts(t)
			// As a mount does; a 400 to the very first request would be TLS'.
			if _, err := open(t, r, n.String(), o).Resolve(t.Context(), ""); !errors.Is(err, ErrNotFound) {
				t.Fatal(err)
			}
			got, err := r.Referrers(t.Context(), n, o, d)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(tt.want, listed(got)); d != "" {
				t.Error(d)
			}
			if got := r.listing.of(host{addr: s.addr(), prefix: "/v2"}); got != tt.known {
				t.Errorf("remembered %v, want %v", got, tt.known)
			}
		})
	}
}

// A registry that lost its API, after an older version was put in its place, is
// asked by the tag again.
func TestReferrersAPIThatWentAway(t *testing.T) {
	s := newServer(t)
	r, n, o := newRegistries(), mustName(t, s.addr()+"/a"), onlyHosts(t)
	gone := false
	s.reset(func(w http.ResponseWriter, r *http.Request) bool {
		switch {
		case strings.Contains(r.URL.Path, "/referrers/") && gone:
			http.NotFound(w, r)
		case strings.Contains(r.URL.Path, "/referrers/"):
			writeIndex(w, listOf(indexType, "api"))
		case strings.Contains(r.URL.Path, "/manifests/sha256-"):
			writeIndex(w, listOf(indexType, "tag"))
		default:
			return false
		}
		return true
	})
	for _, want := range []string{"api", "tag"} {
		got, err := r.Referrers(t.Context(), n, o, theSubject)
		if d := cmp.Diff([]string{indexType + " " + want}, listed(got)); d != "" || err != nil {
			t.Error(d, err)
		}
		gone = true
	}
}

func TestReferrersAreFilteredHere(t *testing.T) {
	s := newServer(t)
	r, n, o := newRegistries(), mustName(t, s.addr()+"/a"), onlyHosts(t)
	var query url.Values
	s.reset(api(func(w http.ResponseWriter, r *http.Request) {
		query = r.URL.Query()
		w.Header().Set("OCI-Filters-Applied", "artifactType")
		writeIndex(w, strings.Replace(listOf(signatureType, "wrong", "also"), "]}", `,{"digest":"`+digest.FromString("y").String()+`","size":1},`+
			strings.TrimPrefix(listOf(indexType, "right"), `{"schemaVersion":2,"mediaType":"`+ocispec.MediaTypeImageIndex+`","manifests":[`), 1))
	}))
	got, err := r.Referrers(t.Context(), n, o, theSubject, indexType)
	if d := cmp.Diff([]string{indexType + " right"}, listed(got)); d != "" || err != nil {
		t.Error(d, err)
	}
	if query.Get("artifactType") != indexType {
		t.Errorf("asked %v", query)
	}
	if got, err = r.Referrers(t.Context(), n, o, theSubject, indexType, "other"); len(got) != 1 || err != nil || query.Has("artifactType") {
		t.Errorf("two types: %v, %v, asked %v", got, err, query)
	}
	// What does not say its type is in the list of all.
	if got, err = r.Referrers(t.Context(), n, o, theSubject); len(got) != 4 || err != nil {
		t.Errorf("all: %v, %v", listed(got), err)
	}
}

func TestReferrersPages(t *testing.T) {
	many := func(from, n int) string {
		var texts []string
		for i := range n {
			texts = append(texts, fmt.Sprint(from+i))
		}
		return listOf(indexType, texts...)
	}
	for name, tt := range map[string]struct {
		page func(s *server, i int) (link, body string)
		want int // entries
		asks int
		cut  string
	}{
		"one": {page: func(*server, int) (string, string) { return "", many(0, 3) }, want: 3, asks: 1},
		"three": {page: func(s *server, i int) (string, string) {
			// Absolute, a path, a query; the same entry on all.
			link := []string{`<` + s.URL + "/v2/a/referrers/" + theSubject.String() + `?page=1>; rel="next"`,
				`</first>; rel=first, </v2/a/referrers/` + theSubject.String() + `?page=2>;title="x";rel="next"`, ""}[i]
			return link, listOf(indexType, "same", fmt.Sprint(i))
		}, want: 4, asks: 3},
		"relative": {page: func(_ *server, i int) (string, string) {
			return []string{`<?page=1>; rel=next`, `<?page=0>; rel=prev`}[i], many(i, 1)
		}, want: 2, asks: 2},
		"loop": {page: func(_ *server, i int) (string, string) {
			return fmt.Sprintf(`<?page=%d>; rel="next"`, 1+i%2), many(i, 1)
		}, want: 3, asks: 3, cut: "earlier one"},
		"itself":  {page: func(s *server, i int) (string, string) { return `<>; rel="next"`, many(0, 1) }, want: 1, asks: 1},
		"endless": {page: func(_ *server, i int) (string, string) { return fmt.Sprintf(`<?page=%d>; rel="next"`, i+1), many(i, 1) }, want: maxPages, asks: maxPages, cut: "more pages"},
		"elsewhere": {page: func(*server, int) (string, string) {
			return `<http://127.0.0.1:1/v2/a/referrers/x>; rel="next"`, many(0, 2)
		}, want: 2, asks: 1, cut: "another host"},
		"file":      {page: func(*server, int) (string, string) { return `<file:///etc/passwd>; rel="next"`, many(0, 2) }, want: 2, asks: 1, cut: "no URL of http"},
		"thousands": {page: func(*server, int) (string, string) { return `<?page=1>; rel="next"`, many(0, 5000) }, want: maxReferrers, asks: 1, cut: "more entries"},
		"over thousand": {page: func(_ *server, i int) (string, string) {
			return fmt.Sprintf(`<?page=%d>; rel="next"`, i+1), many(i*300, 300)
		}, want: maxReferrers, asks: 4, cut: "more entries"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newServer(t)
			s.reset(api(func(w http.ResponseWriter, r *http.Request) {
				i := 0
				fmt.Sscan(r.URL.Query().Get("page"), &i)
				link, body := tt.page(s, i)
				if link != "" {
					w.Header().Set("Link", link)
				}
				writeIndex(w, body)
			}))
			var log strings.Builder
			r := NewRegistries(slog.New(slog.NewTextHandler(&log, nil)), nil)
			got, err := r.Referrers(t.Context(), mustName(t, s.addr()+"/a"), onlyHosts(t), theSubject, indexType, signatureType)
			if err != nil || len(got) != tt.want {
				t.Errorf("%d entries, %v", len(got), err)
			}
			asks := 0
			for _, q := range s.requests() {
				if strings.Contains(q, "/referrers/") {
					asks++
				}
			}
			if asks != tt.asks {
				t.Errorf("asked %d times, want %d", asks, tt.asks)
			}
			if tt.cut == "" && log.Len() > 0 || !strings.Contains(log.String(), tt.cut) || strings.Count(log.String(), "\n") > 1 {
				t.Errorf("log: %s", log.String())
			}
		})
	}
}
