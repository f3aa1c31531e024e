package image

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
)

func TestErrorsTellNoSignature(t *testing.T) {
	s := newServer(t)
	s.pushed("a")
	for _, location := range []string{
		"http://h/%zz?sig=SECRETSIG",
		"http://h/%zz?a b&sig=SECRETSIG",
		`http://h/%zz?a"b&sig=SECRETSIG`,
		"http://user:SECRETSIG@h/%zz",
		"http://127.0.0.1:1/x?sig=SECRETSIG",
	} {
		redirect := func(w http.ResponseWriter) {
			w.Header()["Location"] = []string{location}
			w.WriteHeader(http.StatusTemporaryRedirect)
		}
		s.reset(func(w http.ResponseWriter, r *http.Request) bool { redirect(w); return true })
		src := open(t, newRegistries(), s.addr()+"/a:one", Options{})
		_, err := src.Resolve(t.Context(), "")
		if !errors.Is(err, ErrUnreachable) || strings.Contains(err.Error(), "SECRET") {
			t.Errorf("manifest: %s: %v", location, err)
		}
		// The same of a token service, as one who reads a blob meets it.
		s.reset(func(w http.ResponseWriter, r *http.Request) bool {
			if strings.HasPrefix(r.URL.Path, "/token") {
				redirect(w)
				return true
			}
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token"`, s.URL))
			w.WriteHeader(http.StatusUnauthorized)
			return true
		})
		src = open(t, newRegistries(), s.addr()+"/a:one", Options{})
		if _, err = src.Resolve(t.Context(), ""); err == nil || strings.Contains(err.Error(), "SECRET") {
			t.Errorf("token: %s: %v", location, err)
		}
		b, err := src.Blob(Layer{Digest: digest.FromString("x"), Size: 1})
		if err != nil {
			t.Fatal(err)
		}
		_, err = (&http.Client{Transport: b.Origins[0].Transport}).Get(b.Origins[0].URL)
		if err == nil || strings.Contains(err.Error(), "SECRET") {
			t.Errorf("token of a blob: %s: %v", location, err)
		}
	}
	u := &url.Error{Op: "Get", URL: "https://a/b", Err: errors.New(`parse "http://h/%zz?sig=SECRET"`)}
	if got := networkText("a", u); got != `parse "http://h/%zz?..."` {
		t.Error(got)
	}
}

func TestLongErrorPageHasAStatus(t *testing.T) {
	s := newServer(t)
	s.pushed("a")
	page := func(code int) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			w.WriteHeader(code)
			fmt.Fprint(w, strings.Repeat("<html>", 100<<10))
			return true
		}
	}
	for code, kind := range map[int]error{404: ErrNotFound, 403: ErrUnauthorized, 429: ErrUnreachable, 500: ErrUnreachable} {
		s.reset(page(code))
		_, err := open(t, newRegistries(), s.addr()+"/a:one", Options{}).Resolve(t.Context(), "")
		if !errors.Is(err, kind) || len(err.Error()) > 700 {
			t.Errorf("%d: %v", code, err)
		}
	}
	s.reset(func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("Content-Length", "1000")
		w.WriteHeader(http.StatusNotFound)
		http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler) // in the middle of the page
	})
	if _, err := open(t, newRegistries(), s.addr()+"/a:one", Options{}).Resolve(t.Context(), ""); !errors.Is(err, ErrNotFound) {
		t.Errorf("page that breaks off: %v", err)
	}
	n := 0
	s.reset(func(w http.ResponseWriter, r *http.Request) bool {
		if n++; n == 1 {
			return page(503)(w, r)
		}
		return false
	})
	if _, err := open(t, newRegistries(), s.addr()+"/a:one", Options{}).Resolve(t.Context(), "linux/amd64"); err != nil {
		t.Errorf("503 once: %v", err)
	}
}

func TestForeignLayerOfLinkLocalIsNotAsked(t *testing.T) {
	public := httptest.NewServer(http.RedirectHandler("http://169.254.169.254/latest", http.StatusFound))
	defer public.Close()
	for _, tt := range []struct {
		url                  string
		byDefault, ifAllowed bool
	}{
		{"https://layers.test/x", true, true},
		{public.URL, false, true},
		{"http://10.0.0.1/x", false, true},
		{"http://169.254.169.254/x", false, false},
		{"http://169.254.0.1:8080/x", false, false},
		{"http://169.254.169.254./x", false, false},
		{"http://[fe80::1]/x", false, false},
		{"http://[fe80::1%25eth0]:80/x", false, false},
		{"http://[febf::1]/x", false, false},
		{"http://[::ffff:169.254.169.254]/x", false, false},
		{"http://[fd00:ec2::254]/x", false, false},
	} {
		for insecure, want := range map[bool]bool{false: tt.byDefault, true: tt.ifAllowed} {
			src := open(t, newRegistries(), "reg.test/a:one", Options{Insecure: insecure})
			b, err := src.Blob(Layer{Digest: digest.FromString("x"), Size: 1, URLs: []string{tt.url}})
			if err != nil {
				t.Fatal(err)
			}
			if got := b.Origins[0].URL == tt.url; got != want {
				t.Errorf("%s, insecure %v: asked %v", tt.url, insecure, got)
			}
			if got := b.Origins[0]; got.URL == public.URL {
				if _, err := (&http.Client{Transport: got.Transport}).Get(got.URL); !errors.Is(err, ErrMalformed) {
					t.Errorf("redirected: %v", err)
				}
			}
		}
	}
}

func TestResolveRefusesOtherDigests(t *testing.T) {
	s := newServer(t)
	s.pushed("a")
	long := digest.SHA512.FromString("x").String()
	const want = "digest algorithm sha512 is not supported"
	_, err := open(t, newRegistries(), s.addr()+"/a@"+long, Options{}).Resolve(t.Context(), "")
	if !errors.Is(err, ErrMalformed) || !strings.Contains(err.Error(), want) {
		t.Errorf("name: %v", err)
	}
	s.reset(func(w http.ResponseWriter, r *http.Request) bool {
		fmt.Fprintf(w, `{"schemaVersion":2,"manifests":[{"mediaType":%q,"digest":%q,"size":1,"platform":{"os":"linux","architecture":"amd64"}}]}`, MediaTypeDockerManifest, long)
		return true
	})
	_, err = open(t, newRegistries(), s.addr()+"/a:one", Options{}).Resolve(t.Context(), "linux/amd64")
	if !errors.Is(err, ErrMalformed) || !strings.Contains(err.Error(), want) {
		t.Errorf("list: %v", err)
	}
}
