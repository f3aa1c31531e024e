package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/empty"
	ggcrlayout "github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/opencontainers/go-digest"
)

// file is a member of a tar made for a test.
type file struct {
	name, body string
	link       string // a symlink
}

func makeTar(files ...file) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Mode: 0o644, Size: int64(len(f.body)), Typeflag: tar.TypeReg}
		if f.link != "" {
			h.Typeflag, h.Linkname = tar.TypeSymlink, f.link
		}
		w.WriteHeader(h)
		io.WriteString(w, f.body)
	}
	w.Close()
	return b.Bytes()
}

func gzipped(s string) string {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	io.WriteString(w, s)
	w.Close()
	return b.String()
}

func hexOf(s string) string { return digest.FromString(s).Encoded() }

// savedConfig is a config whose layers are the strings.
func savedConfig(layers ...string) string {
	var ds []string
	for _, l := range layers {
		ds = append(ds, `"`+digest.FromString(l).String()+`"`)
	}
	return `{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[` + strings.Join(ds, ",") + `]}}`
}

func writeTemp(t *testing.T, b []byte) string {
	t.Helper()
	return putFile(t, filepath.Join(t.TempDir(), "x.tar"), string(b))
}

func TestArchive(t *testing.T) {
	one, two := strings.Repeat("one", 500), strings.Repeat("two", 700)
	conf := savedConfig(one, two, one)
	zipped := gzipped(two)
	old := makeTar(
		file{name: "aaa/layer.tar", body: one},
		file{name: "bbb/layer.tar", body: two},
		file{name: "ccc/layer.tar", link: "../aaa/layer.tar"},
		file{name: hexOf(conf) + ".json", body: conf},
		file{name: "manifest.json", body: fmt.Sprintf(`[{"Config":"%s.json","RepoTags":["app:1","x.test/app:1"],"Layers":["aaa/layer.tar","bbb/layer.tar","ccc/layer.tar"]}]`, hexOf(conf))},
	)
	for name, tt := range map[string]struct {
		tar  []byte
		want []string
	}{
		"old": {old, []string{one, two, one}},
		"new": {makeTar(
			file{name: "blobs/sha256/" + hexOf(one), body: one},
			file{name: "blobs/sha256/" + hexOf(zipped), body: zipped},
			file{name: "blobs/sha256/" + hexOf(conf), body: conf},
			file{name: "manifest.json", body: fmt.Sprintf(`[{"Config":"blobs/sha256/%s","RepoTags":["app:1"],"Layers":["blobs/sha256/%[2]s","blobs/sha256/%s","blobs/sha256/%[2]s"]}]`, hexOf(conf), hexOf(one), hexOf(zipped))},
		), []string{one, zipped, one}},
		"hashed": {makeTar(
			file{name: "a", body: one}, file{name: "b", body: zipped}, file{name: "c.json", body: conf},
			file{name: "manifest.json", body: `[{"Config":"c.json","RepoTags":null,"Layers":["a","b","a"]}]`},
		), []string{one, zipped, one}},
	} {
		path := writeTemp(t, tt.tar)
		src := open(t, newRegistries(), "docker-archive:"+path, Options{})
		m, err := src.Resolve(t.Context(), "")
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if len(m.Layers) != len(tt.want) {
			t.Fatalf("%s: %d layers", name, len(m.Layers))
		}
		if raw, err := src.Config(t.Context(), m); err != nil || string(raw) != conf {
			t.Errorf("%s: config: %v", name, err)
		}
		for i, l := range m.Layers {
			b, err := src.Blob(l)
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(io.NewSectionReader(b.Local, 0, b.Size))
			if err != nil || string(got) != tt.want[i] || verify(l.Digest, got) != nil {
				t.Errorf("%s: layer %d (%s): %d bytes, %v", name, i, l.Digest, len(got), err)
			}
			if zip := strings.HasSuffix(l.MediaType, ".gzip"); zip != (tt.want[i] == zipped) {
				t.Errorf("%s: layer %d: %s", name, i, l.MediaType)
			}
		}
		again, err := open(t, newRegistries(), "docker-archive:"+path, Options{}).Resolve(t.Context(), "")
		if err != nil || again.Digest != m.Digest {
			t.Errorf("%s: not the same manifest: %v", name, err)
		}
	}
	path := writeTemp(t, old)
	open(t, newRegistries(), "docker-archive:"+path+":app:1", Options{})
	if _, err := newRegistries().Source(mustName(t, "docker-archive:"+path+":app:2"), Options{}); !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), "x.test/app:1") {
		t.Errorf("another tag: %v", err)
	}
}

func TestArchiveRefuses(t *testing.T) {
	conf := savedConfig("x")
	mf := file{name: "manifest.json", body: `[{"Config":"c.json","Layers":["l"]}]`}
	for name, tt := range map[string]struct {
		tar  []byte
		want string
	}{
		"gzip":       {[]byte(gzipped("x")), "gunzip"},
		"empty":      {nil, "manifest.json"},
		"not a tar":  {bytes.Repeat([]byte("x"), 2000), "tar"},
		"cut":        {makeTar(mf, file{name: "l", body: strings.Repeat("x", 5000)})[:3000], "tar"},
		"climbs":     {makeTar(file{name: "../x", body: "x"}), "leads out"},
		"absolute":   {makeTar(file{name: "/etc/x", body: "x"}), "leads out"},
		"link out":   {makeTar(file{name: "a/l", link: "../../x"}), "out of the tar"},
		"loop":       {makeTar(mf, file{name: "c.json", link: "c.json"}), "links"},
		"no config":  {makeTar(mf), "not complete"},
		"no layer":   {makeTar(mf, file{name: "c.json", body: conf}), "not complete"},
		"two diffs":  {makeTar(mf, file{name: "c.json", body: savedConfig("a", "b")}), "2 layers"},
		"wrong name": {makeTar(file{name: hexOf("x") + ".json", body: conf}, file{name: "manifest.json", body: `[{"Config":"` + hexOf("x") + `.json"}]`}), "damaged"},
		"json":       {makeTar(file{name: "manifest.json", body: "{"}), "manifest.json"},
	} {
		_, err := newRegistries().Source(mustName(t, "docker-archive:"+writeTemp(t, tt.tar)), Options{})
		if !errors.Is(err, ErrMalformed) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
	}
	if _, err := newRegistries().Source(mustName(t, "docker-archive:/no/such"), Options{}); !errors.Is(err, ErrNotFound) {
		t.Errorf("no file: %v", err)
	}
}

func TestLayout(t *testing.T) {
	dir := t.TempDir()
	p, err := ggcrlayout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	add := func(tag string) {
		img, err := random.Image(100, 1)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.AppendImage(img, ggcrlayout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": tag})); err != nil {
			t.Fatal(err)
		}
	}
	add("v1")
	check := func(ref string) {
		t.Helper()
		src := open(t, newRegistries(), ref, Options{})
		m, err := src.Resolve(t.Context(), "")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := src.Config(t.Context(), m); err != nil {
			t.Error(err)
		}
		b, err := src.Blob(m.Layers[0])
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(io.NewSectionReader(b.Local, 0, b.Size))
		if err != nil || verify(b.Digest, got) != nil {
			t.Errorf("%s: layer: %v", ref, err)
		}
	}
	check("oci:" + dir)
	add("v2")
	check("oci:" + dir + ":v2")
	for ref, want := range map[string]string{"oci:" + dir: "v1, v2", "oci:" + dir + ":v3": "v1, v2"} {
		if _, err := newRegistries().Source(mustName(t, ref), Options{}); !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", ref, err)
		}
	}
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	if err := w.AddFS(os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	w.Close()
	check("oci:" + writeTemp(t, buf.Bytes()) + ":v1")

	// A link out of the layout is not followed; damage is seen.
	blobs, _ := filepath.Glob(filepath.Join(dir, "blobs/sha256/*"))
	for _, b := range blobs {
		os.Remove(b)
		os.Symlink("/etc/passwd", b)
	}
	if _, err := open(t, newRegistries(), "oci:"+dir+":v1", Options{}).Resolve(t.Context(), ""); err == nil {
		t.Error("a link out was followed")
	}
	for _, b := range blobs {
		os.Remove(b)
		os.WriteFile(b, []byte("{}"), 0o644)
	}
	if _, err := open(t, newRegistries(), "oci:"+dir+":v1", Options{}).Resolve(t.Context(), ""); !errors.Is(err, ErrMalformed) {
		t.Errorf("damaged: %v", err)
	}
}

func testImage(t *testing.T, ref, seed string) (*Manifest, []byte) {
	t.Helper()
	conf := savedConfig(seed)
	path := writeTemp(t, makeTar(file{name: "l", body: seed}, file{name: "c", body: conf},
		file{name: "manifest.json", body: `[{"Config":"c","Layers":["l"]}]`}))
	m, err := open(t, newRegistries(), "docker-archive:"+path, Options{}).Resolve(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	m.Name = mustName(t, ref)
	return m, []byte(conf)
}

func TestStore(t *testing.T) {
	dir := t.TempDir()
	s, err := OpenStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	a, ac := testImage(t, "nginx:1", "a")
	b, bc := testImage(t, "nginx:1", "b")
	if err := s.Put(a, ac); err != nil {
		t.Fatal(err)
	}
	if err := s.Put(b, ac); !errors.Is(err, ErrMalformed) {
		t.Errorf("another config: %v", err)
	}
	if s, err = OpenStore(dir); err != nil {
		t.Fatal(err)
	}
	for _, ref := range []string{"nginx:1", a.Target.String(), a.Target.Encoded(), a.Target.Encoded()[:12], "sha256:" + a.Target.Encoded()[:20], "nginx@" + a.Target.String()} {
		m, c, err := s.Get(mustName(t, ref), "linux/amd64")
		if err != nil || m.Digest != a.Digest || string(c) != string(ac) || m.Name != a.Name {
			t.Errorf("%s: %v", ref, err)
		}
	}
	if _, _, err := s.Get(mustName(t, "nginx:1"), ""); err != nil {
		t.Errorf("this machine's: %v", err)
	}
	for _, ref := range []string{"nginx:2", "other@" + a.Target.String(), a.Target.Encoded()[:11], hexOf("z")} {
		if _, _, err := s.Get(mustName(t, ref), ""); !errors.Is(err, ErrNotFound) || !strings.HasPrefix(err.Error(), "No such image: ") {
			t.Errorf("%s: %v", ref, err)
		}
	}
	if _, _, err := s.Get(a.Name, "linux/s390x"); !errors.Is(err, ErrNoPlatform) {
		t.Errorf("platform: %v", err)
	}

	// The name moves, the old image stays without one.
	if err := s.Put(b, bc); err != nil {
		t.Fatal(err)
	}
	if err := s.Tag(b.Name, mustName(t, "mine")); err != nil {
		t.Fatal(err)
	}
	list, err := s.List()
	if err != nil || len(list) != 3 || list[0].Name.Familiar() != "mine:latest" || !list[2].Name.IsZero() || list[2].Target != a.Target {
		t.Errorf("list: %+v, %v", list, err)
	}
	if gone, err := s.Remove(mustName(t, "mine")); err != nil || len(gone) != 0 {
		t.Errorf("remove a tag: %v, %v", gone, err)
	}
	if gone, err := s.Remove(mustName(t, a.Target.String())); err != nil || len(gone) != 2 {
		t.Errorf("remove an ID: %v, %v", gone, err)
	}
	blob := filepath.Join(dir, blobPath(b.Digest))
	if err := os.WriteFile(blob, []byte("{}"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.Get(b.Name, ""); !errors.Is(err, ErrMalformed) || !strings.Contains(err.Error(), b.Digest.String()) || !strings.Contains(err.Error(), "mount it with --pull always") {
		t.Errorf("damaged: %v", err)
	}
	if err := s.Put(b, bc); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.Get(b.Name, ""); err != nil {
		t.Errorf("put again: %v", err)
	}
}

func TestStoreConcurrent(t *testing.T) {
	s, err := OpenStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	const n = 8
	var wg sync.WaitGroup
	for i := range n {
		m, c := testImage(t, fmt.Sprintf("x:%d", i), fmt.Sprint(i%3))
		wg.Go(func() {
			if err := s.Put(m, c); err != nil {
				t.Error(err)
			}
			if _, _, err := s.Get(m.Name, ""); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if list, err := s.List(); err != nil || len(list) != n {
		t.Errorf("%d images, %v", len(list), err)
	}
}

func FuzzScanMembers(f *testing.F) {
	f.Add(makeTar(file{name: "a", body: "x"}, file{name: "b/c", link: "../a"}))
	f.Add(makeTar(file{name: "../a", body: "x"}))
	f.Fuzz(func(t *testing.T, b []byte) {
		where, err := scanMembers(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			return
		}
		for name, m := range where {
			if strings.HasPrefix(name, "..") && !strings.HasPrefix(name, "...") && (name == ".." || name[2] == '/') || m.off < 0 || m.size < 0 || m.off+m.size > int64(len(b)) {
				t.Errorf("%q: %+v of %d bytes", name, m, len(b))
			}
		}
	})
}

func FuzzChooseSaved(f *testing.F) {
	f.Add([]byte(`[{"Config":"c","RepoTags":["a:b"],"Layers":["l"]}]`), "a:b")
	f.Fuzz(func(t *testing.T, raw []byte, ref string) {
		if _, err := chooseSaved(raw, ref); err == nil && !json.Valid(raw) {
			t.Error("not JSON")
		}
	})
}
