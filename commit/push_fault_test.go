package commit

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/varvefs/varve/image"
)

// What the registry has taken is not sent again, however often a request breaks.
func TestPushResumesBrokenUpload(t *testing.T) {
	s := newPushRegistry(t)
	const size = 9 << 20
	img := newPushImage(t, false, size)
	s.cuts = []int64{0, 1000, 5<<20 + 17, 1, 3}
	o, waits := pushTo(t, s, img, "a/b")
	p, err := Push(t.Context(), img.m, img.config, o)
	if err != nil {
		t.Fatal(err)
	}
	if want := int64(size + len(img.config)); s.received != want {
		t.Errorf("the registry got %d bytes, want %d", s.received, want)
	}
	if p.Uploaded.Blobs != 2 || len(*waits) != 5 {
		t.Errorf("%+v, %d pauses", p, len(*waits))
	}
	if n := s.count("POST"); n != 2 {
		t.Errorf("%d uploads were opened", n)
	}
	for i, a := range s.requests() {
		got := s.headers[i].Get("Content-Range")
		if strings.HasPrefix(a, "PATCH") && got != "" && !strings.HasSuffix(got, fmt.Sprintf("-%d", size-1)) {
			t.Errorf("Content-Range %q", got)
		}
	}
}

// A second push goes on where the first one was given up, also when what is
// uploaded comes from elsewhere.
func TestPushResumesStoredUpload(t *testing.T) {
	for _, local := range []bool{true, false} {
		s := newPushRegistry(t)
		const size, before = 76 << 20, 70<<20 + 5
		img := newPushImage(t, false, size)
		img.blobs.here = local
		var down atomic.Bool
		s.first = func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodGet && down.Load() {
				w.WriteHeader(http.StatusServiceUnavailable)
				return true
			}
			return false
		}
		down.Store(true)
		s.cuts = []int64{before}
		o, _ := pushTo(t, s, img, "a/b")
		sessions := &pushSessions{m: map[string][]byte{}}
		o.Sessions = sessions
		_, err := Push(t.Context(), img.m, img.config, o)
		if !errors.Is(err, image.ErrUnreachable) {
			t.Fatalf("first push: %v", err)
		}
		if len(sessions.m) != 1 {
			t.Fatalf("%d sessions", len(sessions.m))
		}
		down.Store(false)
		p, err := Push(t.Context(), img.m, img.config, o)
		if err != nil {
			t.Fatal(err)
		}
		if s.received != int64(size+len(img.config)) {
			t.Errorf("the registry got %d bytes", s.received)
		}
		if p.Resumed != before {
			t.Errorf("resumed at %d, want %d", p.Resumed, before)
		}
		// The stored marks spare all but the last part of the source.
		if most := int64(size - 64<<20 + 8<<20); !local && p.Received > most {
			t.Errorf("%d bytes were read, want at most %d", p.Received, most)
		}
		if len(sessions.m) != 0 {
			t.Error("the session was kept")
		}
	}
}

func TestPushWithLostSession(t *testing.T) {
	for what, code := range map[string]int{"gone": 404, "bad state": 400, "not supported": 405, "fails": 500} {
		t.Run(what, func(t *testing.T) {
			s := newPushRegistry(t)
			img := newPushImage(t, false, 3<<20)
			s.cuts = []int64{2 << 20}
			s.first = func(w http.ResponseWriter, r *http.Request) bool {
				if r.Method == http.MethodGet {
					w.WriteHeader(code)
				}
				return r.Method == http.MethodGet
			}
			o, _ := pushTo(t, s, img, "a/b")
			if _, err := Push(t.Context(), img.m, img.config, o); err != nil {
				t.Fatal(err)
			}
			if want := int64(5<<20 + len(img.config)); s.received != want {
				t.Errorf("the registry got %d bytes, want %d", s.received, want)
			}
		})
	}
}

// A stored session that is of no use costs a request, no more.
func TestPushWithStaleSession(t *testing.T) {
	for _, place := range []string{"/v2/a/b/blobs/uploads/77", "://", "ftp://x/y", "http://user:pw@x/"} {
		s := newPushRegistry(t)
		img := newPushImage(t, false, 2<<20)
		o, _ := pushTo(t, s, img, "a/b")
		sessions := &pushSessions{m: map[string][]byte{}}
		if strings.HasPrefix(place, "/") {
			place = s.URL + place
		}
		sessions.Store(s.addr()+"/a/b@"+img.m.Layers[0].Digest.String(), Session{Location: place, Marks: []Mark{{5, []byte("junk")}, {3, nil}}})
		o.Sessions = sessions
		p, err := Push(t.Context(), img.m, img.config, o)
		if err != nil {
			t.Fatalf("%s: %v", place, err)
		}
		if p.Resumed != 0 || p.Uploaded.Blobs != 2 || len(sessions.m) != 0 {
			t.Errorf("%s: %+v", place, p)
		}
	}
}

// Answers that break the protocol end a push by name, and soon.
func TestPushHostileRegistry(t *testing.T) {
	other := digest.FromString("other")
	is := func(method, part string) func(*http.Request) bool {
		return func(r *http.Request) bool { return r.Method == method && strings.Contains(r.URL.Path, part) }
	}
	mounting := func(r *http.Request) bool { return r.Method == http.MethodPost && r.URL.Query().Has("mount") }
	for _, c := range []struct {
		what  string
		when  func(*http.Request) bool
		code  int
		head  [2]string
		kind  error
		words string
	}{
		{"has another digest", is("HEAD", "/blobs/"), 200, [2]string{"Docker-Content-Digest", other.String()}, image.ErrMalformed, "in place of"},
		{"has another size", is("HEAD", "/blobs/"), 200, [2]string{"Content-Length", "5"}, image.ErrMalformed, "with 5 bytes"},
		{"mounts another digest", mounting, 201, [2]string{"Docker-Content-Digest", other.String()}, image.ErrMalformed, "mount it from base"},
		{"mounts another place", mounting, 201, [2]string{"Location", "/v2/a/b/blobs/" + other.String()}, image.ErrMalformed, "gives " + other.String()},
		{"200 to a POST", is("POST", "/uploads/"), 200, [2]string{}, image.ErrMalformed, "does not answer as a registry: 200"},
		{"no location", is("POST", "/uploads/"), 202, [2]string{}, image.ErrMalformed, "location of 0 bytes"},
		{"a location that is none", is("POST", "/uploads/"), 202, [2]string{"Location", "http://[::1"}, image.ErrMalformed, "no URL"},
		{"a location of a file", is("POST", "/uploads/"), 202, [2]string{"Location", "file:///etc/passwd"}, image.ErrMalformed, "http or https"},
		{"a location with a password", is("POST", "/uploads/"), 202, [2]string{"Location", "http://a:b@x/"}, image.ErrMalformed, "credentials"},
		{"a long location", is("POST", "/uploads/"), 202, [2]string{"Location", "/" + strings.Repeat("x", 9000)}, image.ErrMalformed, "9001 bytes"},
		{"a circle", is("PATCH", ""), 307, [2]string{"Location", "?again=1"}, image.ErrMalformed, "redirects more than 5 times"},
		{"another method", is("POST", "/uploads/"), 303, [2]string{"Location", "/x"}, image.ErrMalformed, "redirects POST as GET"},
		{"more than was sent", is("PATCH", ""), 202, [2]string{"Range", "0-3000000"}, image.ErrMalformed, "3000001 bytes, of which"},
		{"ends with another digest", is("PUT", "/uploads/"), 201, [2]string{"Docker-Content-Digest", other.String()}, image.ErrMalformed, "in place of"},
		{"200 to the end", is("PUT", "/uploads/"), 200, [2]string{}, image.ErrMalformed, "does not answer as a registry"},
		{"refuses the end", is("PUT", "/uploads/"), 400, [2]string{}, image.ErrMalformed, "refuses it"},
		{"forbidden", is("POST", "/uploads/"), 403, [2]string{}, image.ErrUnauthorized, "push access denied"},
		{"unauthorized", is("PATCH", ""), 401, [2]string{}, image.ErrUnauthorized, "push access denied"},
		{"down", is("POST", "/uploads/"), 502, [2]string{}, image.ErrUnreachable, "try again later"},
		{"busy", is("HEAD", ""), 429, [2]string{"Retry-After", "9999999"}, image.ErrUnreachable, "slow down"},
		{"manifest of another digest", is("PUT", "/manifests/"), 201, [2]string{"Docker-Content-Digest", other.String()}, image.ErrMalformed, "put manifest"},
		{"refuses the manifest", is("PUT", "/manifests/"), 400, [2]string{}, image.ErrMalformed, "put manifest"},
	} {
		t.Run(c.what, func(t *testing.T) {
			s := newPushRegistry(t)
			img := newPushImage(t, false, 2<<20)
			s.first = func(w http.ResponseWriter, r *http.Request) bool {
				if !c.when(r) {
					return false
				}
				if c.head[0] != "" {
					w.Header().Set(c.head[0], c.head[1])
				}
				io.Copy(io.Discard, r.Body)
				w.WriteHeader(c.code)
				return true
			}
			o, waits := pushTo(t, s, img, "a/b")
			o.MountFrom = []string{"base"}
			_, err := Push(t.Context(), img.m, img.config, o)
			if err == nil || !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.words) {
				t.Errorf("error %v", err)
			}
			if n := len(s.requests()); n > 60 {
				t.Errorf("%d requests", n)
			}
			for _, d := range *waits {
				if d > maxPause {
					t.Errorf("a pause of %s", d)
				}
			}
		})
	}
}

func TestPushFollowsRetryAfter(t *testing.T) {
	s := newPushRegistry(t)
	img := newPushImage(t, false, 2<<20)
	var left atomic.Int32
	left.Store(2)
	s.first = func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodPatch || left.Add(-1) < 0 {
			return false
		}
		io.Copy(io.Discard, r.Body)
		w.Header().Set("Retry-After", "7")
		w.WriteHeader(429)
		return true
	}
	o, waits := pushTo(t, s, img, "a/b")
	if _, err := Push(t.Context(), img.m, img.config, o); err != nil {
		t.Fatal(err)
	}
	if want := []time.Duration{7 * time.Second, 7 * time.Second}; !slices.Equal(*waits, want) {
		t.Errorf("pauses %v, want %v", *waits, want)
	}
	now := time.Date(2020, 1, 2, 3, 4, 5, 0, time.UTC)
	for v, want := range map[string]time.Duration{
		"": 0, "-4": 0, "x": 0, "3": 3 * time.Second, "600": maxPause, "Thu, 02 Jan 2020 03:04:15 GMT": 10 * time.Second,
		"Thu, 02 Jan 2020 03:04:00 GMT": 0,
	} {
		if got := retryAfter(http.Header{"Retry-After": {v}}, now); got != want {
			t.Errorf("%q: %s, want %s", v, got, want)
		}
	}
}

// A proxy with a limit on bodies gets parts that it takes.
func TestPushInParts(t *testing.T) {
	s := newPushRegistry(t)
	const size = 9 << 20
	img := newPushImage(t, false, size)
	s.most = 1 << 20
	o, _ := pushTo(t, s, img, "a/b")
	if _, err := Push(t.Context(), img.m, img.config, o); err != nil {
		t.Fatal(err)
	}
	if s.received != int64(size+len(img.config)) {
		t.Errorf("the registry got %d bytes", s.received)
	}
	s = newPushRegistry(t)
	s.most = 1 << 19
	o, _ = pushTo(t, s, img, "a/b")
	if _, err := Push(t.Context(), img.m, img.config, o); err == nil || !strings.Contains(err.Error(), "413") {
		t.Errorf("error %v", err)
	}
}

// Amazon's registry answers parts with 201, keeps the first, and tells nothing
// of the others; others tell nothing at all.
func TestPushWithOddRanges(t *testing.T) {
	for what, told := range map[string]func(*http.Request, int) string{
		"none":         func(*http.Request, int) string { return "" },
		"always empty": func(*http.Request, int) string { return "0-0" },
		"of the part": func(r *http.Request, have int) string {
			if r.Method == http.MethodPatch {
				return "0-5"
			}
			return fmt.Sprintf("0-%d", max(have-1, 0))
		},
		"bytes": func(_ *http.Request, have int) string { return fmt.Sprintf("bytes=0-%d", max(have-1, 0)) },
		"junk":  func(*http.Request, int) string { return "0-99999999999999999999" },
	} {
		t.Run(what, func(t *testing.T) {
			s := newPushRegistry(t)
			s.told = told
			img := newPushImage(t, false, 3<<20)
			o, _ := pushTo(t, s, img, "a/b")
			if _, err := Push(t.Context(), img.m, img.config, o); err != nil {
				t.Fatal(err)
			}
			if s.received != int64(3<<20+len(img.config)) {
				t.Errorf("the registry got %d bytes", s.received)
			}
		})
	}
	t.Run("drops later parts", func(t *testing.T) {
		s := newPushRegistry(t)
		img := newPushImage(t, false, 3<<20)
		s.cuts = []int64{1 << 20}
		s.first = func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method != http.MethodPatch || r.Header.Get("Content-Range") == "" {
				return false
			}
			io.Copy(io.Discard, r.Body)
			w.Header().Set("Range", "0-1048575")
			w.WriteHeader(201)
			return true
		}
		o, _ := pushTo(t, s, img, "a/b")
		if _, err := Push(t.Context(), img.m, img.config, o); err != nil {
			t.Fatal(err)
		}
		if n := s.count("POST"); n != 3 {
			t.Errorf("%d uploads were opened", n)
		}
	})
}

// The answer to the end of an upload is lost, but the blob is there.
func TestPushWithLostAnswer(t *testing.T) {
	for _, size := range []int{100, 2 << 20} {
		s := newPushRegistry(t)
		img := newPushImage(t, false, size)
		s.first = func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/uploads/") {
				s.serve(discardWriter{http.Header{}}, r)
				panic(http.ErrAbortHandler)
			}
			return false
		}
		o, _ := pushTo(t, s, img, "a/b")
		p, err := Push(t.Context(), img.m, img.config, o)
		if err != nil {
			t.Fatal(err)
		}
		if p.Uploaded.Blobs != 2 || s.received != int64(size+len(img.config)) {
			t.Errorf("%+v, %d bytes", p, s.received)
		}
	}
}

type discardWriter struct{ h http.Header }

func (d discardWriter) Header() http.Header         { return d.h }
func (d discardWriter) Write(b []byte) (int, error) { return len(b), nil }
func (d discardWriter) WriteHeader(int)             {}

// A registry that stops reading is left and asked again; so is one that gives
// no answer. A source that fails is not.
func TestPushStalls(t *testing.T) {
	s := newPushRegistry(t)
	img := newPushImage(t, false, 9<<20)
	var stalled atomic.Int32
	release := make(chan struct{})
	t.Cleanup(func() { close(release) })
	s.first = func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodPatch && stalled.Add(1) == 1 {
			select {
			case <-release:
			case <-r.Context().Done():
			}
			return true
		}
		return false
	}
	o, waits := pushTo(t, s, img, "a/b")
	o.stall = 5 * time.Second // a busy machine may take a while for what does not stall
	if _, err := Push(t.Context(), img.m, img.config, o); err != nil {
		t.Fatal(err)
	}
	if len(*waits) != 1 {
		t.Errorf("pauses %v", *waits)
	}

	s = newPushRegistry(t)
	o, waits = pushTo(t, s, img, "a/b")
	img.blobs.wrap = func(r io.Reader) io.Reader { return io.MultiReader(io.LimitReader(r, 5<<20), brokenReader{}) }
	_, err := Push(t.Context(), img.m, img.config, o)
	if !errors.Is(err, errSource) || len(*waits) > 0 {
		t.Errorf("%v after pauses %v", err, *waits)
	}
}

var errSource = errors.New("the source is broken")

type brokenReader struct{}

func (brokenReader) Read([]byte) (int, error) { return 0, errSource }

func TestPushCancelled(t *testing.T) {
	s := newPushRegistry(t)
	img := newPushImage(t, false, 20<<20)
	ctx, cancel := context.WithCancel(t.Context())
	img.blobs.wrap = func(r io.Reader) io.Reader {
		return io.MultiReader(io.LimitReader(r, 8<<20), readerFunc(func([]byte) (int, error) { cancel(); return 0, nil }), r)
	}
	o, _ := pushTo(t, s, img, "a/b")
	o.Sessions = &pushSessions{m: map[string][]byte{}}
	if _, err := Push(ctx, img.m, img.config, o); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	img.blobs.wrap = nil
	p, err := Push(t.Context(), img.m, img.config, o)
	if err != nil {
		t.Fatal(err)
	}
	if p.Resumed == 0 || p.Resumed+p.Sent > 20<<20+int64(len(img.config)) {
		t.Errorf("%+v", p)
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// Errors tell no part of a URL that may be signed.
func TestPushErrorsTellNoSecret(t *testing.T) {
	s := newPushRegistry(t)
	img := newPushImage(t, false, 2<<20)
	o, _ := pushTo(t, s, img, "a/b")
	s.first = func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodPost {
			w.Header().Set("Location", "http://127.0.0.1:1/x?sig=SECRET")
			w.WriteHeader(202)
			return true
		}
		return false
	}
	_, err := Push(t.Context(), img.m, img.config, o)
	if err == nil || strings.Contains(err.Error(), "SECRET") {
		t.Errorf("error %v", err)
	}
}

func TestCheckPlace(t *testing.T) {
	for _, c := range []struct {
		from, to string
		ok       bool
	}{
		{"https://r.example/v2/", "https://r.example/x", true},
		{"https://r.example/", "https://storage.example/x?sig=1", true},
		{"https://r.example/", "http://storage.example/", false},
		{"https://r.example/", "https://169.254.169.254/", false},
		{"https://r.example/", "https://10.0.0.1/", false},
		{"https://r.example/", "https://localhost/", false},
		{"https://r.example/", "https://[::ffff:127.0.0.1]/", false},
		{"http://127.0.0.1:5000/", "http://127.0.0.1:9000/x", true},
		{"http://10.0.0.2:5000/", "http://10.0.0.1:9000/x", true},
		{"https://r.example/", "ftp://r.example/", false},
		{"https://r.example/", "https://u:p@r.example/", false},
	} {
		from, _ := url.Parse(c.from)
		to, _ := url.Parse(c.to)
		if err := checkPlace(from, to); (err == nil) != c.ok {
			t.Errorf("from %s to %s: %v", c.from, c.to, err)
		}
	}
	a := &answer{head: http.Header{"Location": {"http://r.example/up?_state=a%3D"}}}
	a.url, _ = url.Parse("https://r.example/v2/")
	if u, err := a.location(); err != nil || u.String() != "https://r.example/up?_state=a%3D" {
		t.Errorf("%v, %v", u, err)
	}
}

// The tally of any reading, taken back any number of times, is that of the bytes.
func TestTallyGoesBack(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	data := make([]byte, 21<<20)
	for i := 0; i < len(data); i += 97 {
		data[i] = byte(rnd.Uint32())
	}
	tl := newTally()
	for range 15 {
		n := rnd.IntN(len(data) + 1)
		before := tl.n
		tl.back(int64(n))
		if tl.n > int64(n) || tl.n < 0 || before > int64(n) && int64(n)-tl.n > markEvery+1<<20 {
			t.Fatalf("back to %d gave %d", n, tl.n)
		}
		for tl.n < int64(n) {
			k := min(1+rnd.Int64N(1<<20), int64(n)-tl.n)
			tl.write(data[tl.n : tl.n+k])
		}
		if got, want := tl.sum(), digest.NewDigestFromBytes(digest.SHA256, sum(data[:n])); got != want {
			t.Fatalf("sum of %d bytes", n)
		}
		if rnd.IntN(4) == 0 {
			marks := slices.Clone(tl.marks)
			tl.load(marks, int64(len(data)))
		}
	}
}

func sum(b []byte) []byte {
	s := sha256.Sum256(b)
	return s[:]
}
