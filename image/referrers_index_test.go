package image

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestReadReferrersPassesOverWhatIsUnusable(t *testing.T) {
	good := `{"mediaType":"m","digest":"` + digest.FromString("x").String() + `","size":4194304,"artifactType":"a"}`
	for name, entry := range map[string]string{
		"null":              `null`,
		"number":            `7`,
		"empty":             `{}`,
		"sha512":            `{"digest":"` + digest.SHA512.FromString("x").String() + `","size":1}`,
		"no digest":         `{"digest":"sha256:x","size":1}`,
		"traversal":         `{"digest":"sha256:../../../../etc/passwd","size":1}`,
		"digest of a type":  `{"digest":7,"size":1}`,
		"negative":          `{"digest":"` + digest.FromString("y").String() + `","size":-1}`,
		"large":             `{"digest":"` + digest.FromString("y").String() + `","size":4194305}`,
		"fraction":          `{"digest":"` + digest.FromString("y").String() + `","size":1.5}`,
		"beyond int64":      `{"digest":"` + digest.FromString("y").String() + `","size":1e99}`,
		"long type":         `{"digest":"` + digest.FromString("y").String() + `","size":1,"artifactType":"` + strings.Repeat("a", 256) + `"}`,
		"annotations":       `{"digest":"` + digest.FromString("y").String() + `","size":1,"annotations":{"a":1}}`,
		"many annotations":  `{"digest":"` + digest.FromString("y").String() + `","size":1,"annotations":{"a":"` + strings.Repeat("a", maxAnnotationBytes) + `"}}`,
		"annotations' list": `{"digest":"` + digest.FromString("y").String() + `","size":1,"annotations":[]}`,
	} {
		var got []Referrer
		err := readReferrers([]byte(`{"schemaVersion":2,"manifests":[`+entry+`,`+good+`]}`), func(r Referrer) bool { got = append(got, r); return true })
		if err != nil || len(got) != 1 || got[0].ArtifactType != "a" {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}

func TestEditIndexOfAFullList(t *testing.T) {
	entries := strings.Repeat(`{"digest":"x"},`, maxReferrers)
	d := digest.FromString("x")
	raw := []byte(`{"schemaVersion":2,"manifests":[` + strings.TrimSuffix(entries, ",") + `]}`)
	if _, err := editIndex(raw, d, &ocispec.Descriptor{Digest: d}); !errors.Is(err, ErrMalformed) {
		t.Errorf("one more: %v", err)
	}
	mine := `{"digest":"` + d.String() + `"}`
	out, err := editIndex([]byte(`{"schemaVersion":2,"manifests":[`+entries+mine+`]}`), d, nil)
	if err != nil || strings.Count(string(out), `"x"`) != maxReferrers || strings.Contains(string(out), d.String()) {
		t.Errorf("one less: %v", err)
	}
}

func TestNextLink(t *testing.T) {
	for in, want := range map[string]string{
		``:                              "",
		`</a>`:                          "",
		`</a>; rel="next"`:              "/a",
		`</a>;rel=next`:                 "/a",
		`</a>; REL = "prev Next"`:       "/a",
		`</a>; rel="nextish"`:           "",
		`</a>; rel=prev, </b>;rel=next`: "/b",
		`</a?b=c;d,e>; rel="next"`:      "/a?b=c;d,e",
		`</a; rel="next"`:               "",
		`<</a>; rel="next"`:             "</a",
		`/a; rel="next"`:                "",
	} {
		if got := nextLink(http.Header{"Link": {`</z>; rel="first"`, in}}); got != want {
			t.Errorf("%s: %q, want %q", in, got, want)
		}
	}
}

// Whatever a registry sends as a list: its entries are usable, an edit keeps
// them and is itself a list.
func FuzzReferrersIndex(f *testing.F) {
	f.Add([]byte(listOf(indexType, "a", "b", "a")), "b")
	f.Add([]byte(`{"schemaVersion":2,"manifests":null}`), "x")
	f.Add([]byte(`{"schemaVersion":2,"Manifests":[{}],"manifests":[7,null]}`), "x")
	f.Add([]byte(`{"schemaVersion":2,"manifests":[{"digest":"`+digest.FromString("x").String()+`","size":1,"annotations":{"a":"<\u2028"}}]}`), "x")
	f.Add([]byte(`{"schemaVersion":1}`), "")
	f.Fuzz(func(t *testing.T, raw []byte, text string) {
		read := func(raw []byte) (map[digest.Digest]bool, error) {
			all := map[digest.Digest]bool{}
			err := readReferrers(raw, func(r Referrer) bool {
				if r.Digest.Validate() != nil || r.Size < 0 || r.Size > MaxManifest || len(r.ArtifactType) > 255 {
					t.Fatalf("%+v", r)
				}
				all[r.Digest] = true
				return true
			})
			return all, err
		}
		before, err := read(raw)
		if err != nil && !errors.Is(err, ErrMalformed) {
			t.Fatalf("not of the kind: %v", err)
		}
		c := collector{types: []string{indexType}}
		if readReferrers(raw, c.add) == nil && len(c.list) > maxReferrers {
			t.Fatalf("%d entries", len(c.list))
		}
		d := digest.FromString(text)
		with, eerr := editIndex(raw, d, &ocispec.Descriptor{MediaType: "m", Digest: d, Size: 1, ArtifactType: text})
		if errors.Is(eerr, errUnchanged) {
			with, eerr = raw, nil
		}
		if eerr != nil {
			if !errors.Is(eerr, ErrMalformed) {
				t.Fatalf("edit: %v", eerr)
			}
			return
		}
		if err != nil {
			t.Fatalf("edited what cannot be read: %v", err)
		}
		if !json.Valid(with) {
			t.Fatalf("%q", with)
		}
		after, err := read(with)
		if err != nil || len(string([]rune(text))) < 256 && !after[d] { // as JSON has it, what is no UTF-8 replaced
			t.Fatalf("%q: %v", with, err)
		}
		without, err := editIndex(with, d, nil)
		if err != nil {
			t.Fatal(err)
		}
		left, err := read(without)
		if err != nil || left[d] {
			t.Fatalf("%q: %v", without, err)
		}
		for k := range before {
			if k != d && (!after[k] || !left[k]) {
				t.Fatalf("%s is lost from %q", k, raw)
			}
		}
	})
}

func FuzzReferrersLink(f *testing.F) {
	f.Add(`</v2/a/referrers/x?page=1>; rel="next"`)
	f.Add(`<http://h/>;rel=first,<?x>;rel=next`)
	f.Fuzz(func(t *testing.T, v string) {
		l := &line{session: newSession(host{schemes: []string{"https"}, addr: "reg.test", prefix: "/v2/p"}, nil, lookup{}), repo: "a"}
		a := &reply{head: http.Header{"Link": {v}}, url: &url.URL{Scheme: "https", Host: "reg.test", Path: "/v2/p/a/referrers/x"}}
		u, err := l.next(a)
		if err != nil && !errors.Is(err, ErrMalformed) {
			t.Fatalf("not of the kind: %v", err)
		}
		if u != nil && (u.Scheme != "https" || !strings.EqualFold(u.Host, "reg.test") || u.User != nil) {
			t.Fatalf("%q leads to %s", v, u)
		}
	})
}
