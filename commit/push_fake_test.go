package commit

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/varvefs/varve/image"
)

// pushRegistry is a registry that keeps what it got of a broken request, tells
// how far an upload is, and can be told to misbehave.
type pushRegistry struct {
	*httptest.Server
	t *testing.T

	mu        sync.Mutex // guards what follows
	asked     []string
	headers   []http.Header
	blobs     map[string][]byte // repository@digest
	uploads   map[string][]byte
	manifests map[string][]byte
	received  int64   // bytes of all bodies of blobs
	cuts      []int64 // the next PATCHes break after so many bytes
	most      int64   // a larger body is answered with 413
	mounts    bool
	next      int
	// first may answer in place of the registry; it is called without mu.
	first func(w http.ResponseWriter, r *http.Request) bool
	// told may change the Range that an upload is said to have.
	told func(r *http.Request, have int) string
}

func newPushRegistry(t *testing.T) *pushRegistry {
	s := &pushRegistry{t: t, blobs: map[string][]byte{}, uploads: map[string][]byte{}, manifests: map[string][]byte{}}
	s.Server = httptest.NewServer(s)
	t.Cleanup(s.Close)
	return s
}

func (s *pushRegistry) addr() string { return strings.TrimPrefix(s.URL, "http://") }

func (s *pushRegistry) base() *url.URL {
	u, err := url.Parse(s.URL)
	if err != nil {
		s.t.Fatal(err)
	}
	return u
}

func (s *pushRegistry) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	s.asked = append(s.asked, r.Method+" "+r.URL.Path)
	s.headers = append(s.headers, r.Header.Clone())
	first := s.first
	s.mu.Unlock()
	if first != nil && first(w, r) {
		return
	}
	if s.serve(w, r) {
		panic(http.ErrAbortHandler)
	}
}

// serve answers, and reports whether the connection is to break.
func (s *pushRegistry) serve(w http.ResponseWriter, r *http.Request) (broken bool) {
	path := strings.TrimPrefix(r.URL.Path, "/v2/")
	if repo, rest, ok := strings.Cut(path, "/blobs/uploads/"); ok {
		return s.upload(w, r, repo, rest)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if repo, d, ok := strings.Cut(path, "/blobs/"); ok {
		b, ok := s.blobs[repo+"@"+d]
		if !ok {
			w.WriteHeader(404)
			return false
		}
		w.Header().Set("Docker-Content-Digest", d)
		w.Header().Set("Content-Length", fmt.Sprint(len(b)))
		return false
	}
	if repo, tag, ok := strings.Cut(path, "/manifests/"); ok && r.Method == http.MethodPut {
		b, _ := io.ReadAll(r.Body)
		s.manifests[repo+":"+tag+" "+r.Header.Get("Content-Type")] = b
		w.Header().Set("Docker-Content-Digest", digest.FromBytes(b).String())
		w.WriteHeader(201)
		return false
	}
	w.WriteHeader(404)
	return false
}

func (s *pushRegistry) upload(w http.ResponseWriter, r *http.Request, repo, id string) (broken bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	have, known := s.uploads[id]
	if r.Method == http.MethodPost {
		q := r.URL.Query()
		if b, ok := s.blobs[q.Get("from")+"@"+q.Get("mount")]; ok && s.mounts {
			s.blobs[repo+"@"+q.Get("mount")] = b
			w.Header().Set("Location", "/v2/"+repo+"/blobs/"+q.Get("mount"))
			w.WriteHeader(201)
			return false
		}
		s.next++
		id, known = fmt.Sprint(s.next), true
		s.uploads[id] = nil
	}
	if !known {
		w.WriteHeader(404)
		io.WriteString(w, `{"errors":[{"code":"BLOB_UPLOAD_UNKNOWN","message":"upload unknown"}]}`)
		return false
	}
	if cr := r.Header.Get("Content-Range"); cr != "" && r.Method == http.MethodPatch {
		var a, b int64
		if fmt.Sscanf(cr, "%d-%d", &a, &b); int(a) != len(have) || b-a+1 != r.ContentLength {
			w.WriteHeader(416)
			return false
		}
	}
	if s.most > 0 && r.ContentLength > s.most {
		w.WriteHeader(413)
		return false
	}
	if r.Method == http.MethodPatch || r.Method == http.MethodPut {
		limit := int64(1 << 40)
		if len(s.cuts) > 0 && r.Method == http.MethodPatch {
			limit, s.cuts, broken = s.cuts[0], s.cuts[1:], true
		}
		b, _ := io.ReadAll(io.LimitReader(r.Body, limit))
		s.received += int64(len(b))
		have = append(have, b...)
		s.uploads[id] = have
		if broken {
			return true
		}
	}
	switch r.Method {
	case http.MethodDelete:
		delete(s.uploads, id)
		w.WriteHeader(204)
		return false
	case http.MethodPut:
		d := r.URL.Query().Get("digest")
		delete(s.uploads, id)
		if digest.FromBytes(have).String() != d {
			w.WriteHeader(400)
			io.WriteString(w, `{"errors":[{"code":"DIGEST_INVALID","message":"provided digest did not match uploaded content"}]}`)
			return false
		}
		s.blobs[repo+"@"+d] = have
		w.Header().Set("Docker-Content-Digest", d)
		w.WriteHeader(201)
		return false
	}
	// As distribution: the state is in the query, and the last one counts.
	w.Header().Set("Location", fmt.Sprintf("/v2/%s/blobs/uploads/%s?_state=%d%%3D", repo, id, len(have)))
	told := fmt.Sprintf("0-%d", max(len(have)-1, 0))
	if s.told != nil {
		told = s.told(r, len(have))
	}
	w.Header().Set("Range", told)
	w.WriteHeader(map[string]int{"GET": 204, "POST": 202, "PATCH": 202}[r.Method])
	return false
}

func (s *pushRegistry) requests() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.asked...)
}

// count counts the requests so far that begin so.
func (s *pushRegistry) count(prefix string) int {
	n := 0
	for _, a := range s.requests() {
		if strings.HasPrefix(a, prefix) {
			n++
		}
	}
	return n
}

// pushBlobs has blobs in memory.
type pushBlobs struct {
	data map[digest.Digest][]byte
	here bool
	wrap func(io.Reader) io.Reader
}

func (b *pushBlobs) Local(digest.Digest) bool { return b.here }

func (b *pushBlobs) Open(_ context.Context, l image.Layer, off int64) (io.ReadCloser, error) {
	data, ok := b.data[l.Digest]
	if !ok {
		return nil, fmt.Errorf("blob %s: %w", l.Digest, image.ErrUnreachable)
	}
	var r io.Reader = bytes.NewReader(data[off:])
	if b.wrap != nil {
		r = b.wrap(r)
	}
	return io.NopCloser(r), nil
}

// pushImage is an image of random layers.
type pushImage struct {
	m      *image.Manifest
	config []byte
	blobs  *pushBlobs
}

func newPushImage(t *testing.T, docker bool, sizes ...int) *pushImage {
	t.Helper()
	rnd := rand.NewChaCha8([32]byte{7})
	img := &pushImage{blobs: &pushBlobs{data: map[digest.Digest][]byte{}, here: true}}
	types := [3]string{ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageConfig, ocispec.MediaTypeImageLayerGzip}
	if docker {
		types = [3]string{image.MediaTypeDockerManifest, image.MediaTypeDockerConfig, image.MediaTypeDockerLayer + ".gzip"}
	}
	m := ocispec.Manifest{MediaType: types[0]}
	m.SchemaVersion = 2
	var diffs []digest.Digest
	for _, n := range sizes {
		b := make([]byte, n)
		rnd.Read(b)
		d := digest.FromBytes(b)
		img.blobs.data[d] = b
		diffs = append(diffs, d)
		m.Layers = append(m.Layers, ocispec.Descriptor{MediaType: types[2], Digest: d, Size: int64(n)})
	}
	var err error
	img.config, err = json.Marshal(ocispec.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"},
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: diffs},
	})
	if err != nil {
		t.Fatal(err)
	}
	m.Config = ocispec.Descriptor{MediaType: types[1], Digest: digest.FromBytes(img.config), Size: int64(len(img.config))}
	img.set(t, m)
	return img
}

func (img *pushImage) set(t *testing.T, m ocispec.Manifest) {
	t.Helper()
	raw, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	if img.m, err = image.ParseManifest(raw, m.MediaType); err != nil {
		t.Fatal(err)
	}
}

func pushName(t *testing.T, s string) image.Name {
	t.Helper()
	n, err := image.ParseName(s)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// pushTo gives options to push to repo:v1 with no waiting, and the pauses.
func pushTo(t *testing.T, s *pushRegistry, img *pushImage, repo string) (PushOptions, *[]time.Duration) {
	var mu sync.Mutex
	var waits []time.Duration
	return PushOptions{
		Target: pushName(t, s.addr()+"/"+repo+":v1"), Base: s.base(), Transport: &http.Transport{DisableKeepAlives: true}, Blobs: img.blobs,
		wait: func(ctx context.Context, d time.Duration) error {
			mu.Lock()
			defer mu.Unlock()
			waits = append(waits, d)
			return ctx.Err()
		},
	}, &waits
}

// pushSessions keeps sessions as a file would: as JSON.
type pushSessions struct {
	mu sync.Mutex
	m  map[string][]byte
}

func (p *pushSessions) Load(key string) (s Session, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	b, ok := p.m[key]
	return s, ok && json.Unmarshal(b, &s) == nil
}

func (p *pushSessions) Store(key string, s Session) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.m[key], _ = json.Marshal(s)
}

func (p *pushSessions) Drop(key string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.m, key)
}
