package commit

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/varvefs/varve/image"
	"github.com/varvefs/varve/index"
)

// TestConvertKeepsAll converts everything from each form to each, holds the tars
// against one another, and does it again with other numbers of CPUs.
func TestConvertKeepsAll(t *testing.T) {
	tars := [][]byte{plainTar(t, some()), kinds(t), sparse(t, "gnu"), sparse(t, "posix")}
	for _, to := range compressions {
		for i, docker := range []bool{false, true, false} {
			from := [][]string{{"gzip", "zstd", "tar"}, {"tar", "gzip"}, {"estargz", "zstd:chunked"}}[i]
			t.Run(fmt.Sprintf("%s from %s", to, from), func(t *testing.T) {
				s := sourceOf(t, docker, from, tars...)
				o := ConvertOptions{To: to, Force: true}
				defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
				got := convertAll(t, s, o)
				if len(got.warned) > 0 || got.done.Converted != len(tars) {
					t.Fatal(got.warned, got.done)
				}
				for i, blob := range got.layers {
					l := got.Layers[i]
					if d := cmp.Diff(bare(listing(t, tars[i])), bare(listing(t, untarred(t, blob)))); d != "" {
						t.Errorf("layer %d: %s", i, d)
					}
					if l.Annotations["keep"] != "<me>" || (l.Annotations[estargz.TOCJSONDigestAnnotation] != "") != (to == EStargz) || (l.Annotations[chunkedChecksum] != "") != (to == ZstdChunked) {
						t.Errorf("annotations of layer %d: %v", i, l.Annotations)
					}
					if to == EStargz {
						verified(t, blob, l.Annotations)
					}
				}
				if zstd := to == Zstd || to == ZstdChunked; got.IsDocker() != (docker && !zstd) {
					t.Errorf("it is of the type %s", got.MediaType)
				}
				runtime.GOMAXPROCS(4)
				o.Workers = 3
				if again := convertAll(t, s, o); again.Digest != got.Digest {
					t.Errorf("%s, and again %s", got.Digest, again.Digest)
				}
			})
		}
	}
}

// bare makes two listings alike where they differ in writing alone: file types in
// the mode, which nobody reads.
func bare(lines []string) []string {
	for i := range lines {
		lines[i] = strings.Replace(lines[i], " 100644 ", " 644 ", 1)
	}
	return lines
}

// verified reads all of a layer with eStargz's library, which holds the table
// against its digest, and all chunks against theirs.
func verified(t *testing.T, blob []byte, annotations map[string]string) *estargz.Reader {
	t.Helper()
	r, err := estargz.Open(io.NewSectionReader(bytes.NewReader(blob), 0, int64(len(blob))))
	if err != nil {
		t.Fatal(err)
	}
	v, err := r.VerifyTOC(digest.Digest(annotations[estargz.TOCJSONDigestAnnotation]))
	if err != nil {
		t.Fatal(err)
	}
	entries, _ := stargzEntries(t, blob)
	last := map[string]int{}
	for i, e := range entries {
		if e.Type == "reg" {
			last[e.Name] = i
		}
	}
	for i, e := range entries {
		if e.Type != "reg" || e.Size == 0 || last[e.Name] != i {
			continue
		}
		f, err := r.OpenFile(e.Name)
		if err != nil {
			t.Fatal(err)
		}
		for off := int64(0); off < e.Size; {
			c, ok := r.ChunkEntryForOffset(e.Name, off)
			if !ok {
				t.Fatalf("%s has no chunk at %d", e.Name, off)
			}
			check, err := v.Verifier(c)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.Copy(check, io.NewSectionReader(f, c.ChunkOffset, c.ChunkSize)); err != nil || !check.Verified() {
				t.Errorf("%s at %d: not as the table says (%v)", e.Name, off, err)
			}
			off += c.ChunkSize
		}
	}
	return r
}

// TestConvertKeepsLayers leaves alone what has the form already, and then the whole
// image.
func TestConvertKeepsLayers(t *testing.T) {
	raw := kinds(t)
	for _, tc := range []struct {
		to   Compression
		from string
		kept bool
	}{
		{EStargz, "estargz", true}, {EStargz, "gzip", false}, {EStargz, "zstd:chunked", false},
		{ZstdChunked, "zstd:chunked", true}, {ZstdChunked, "zstd", false}, {ZstdChunked, "estargz", false},
		{Gzip, "gzip", true}, {Gzip, "estargz", true}, {Gzip, "tar", false}, {Gzip, "zstd", false},
		{Zstd, "zstd", true}, {Zstd, "zstd:chunked", true}, {Zstd, "gzip", false},
	} {
		s := sourceOf(t, false, []string{tc.from}, raw)
		got := convertAll(t, s, ConvertOptions{To: tc.to})
		if kept := got.Digest == s.base.Digest; kept != tc.kept || kept != (got.done == Conversions{Kept: 1}) || kept != (s.opens[s.base.Layers[0].Digest] == 0) {
			t.Errorf("%s to %s: %+v", tc.from, tc.to, got.done)
		}
	}
	// Docker's family has no zstd, and --oci wants none of it.
	s := sourceOf(t, true, []string{"estargz", "gzip"}, raw, plainTar(t, nil))
	got := convertAll(t, s, ConvertOptions{OCI: true})
	checkFamily(t, got, false)
	if got.done.Kept != 1 || got.Layers[0].Digest != s.base.Layers[0].Digest || got.Layers[0].MediaType != ocispec.MediaTypeImageLayerGzip {
		t.Errorf("%+v, %+v", got.done, got.Layers[0])
	}
	checkFamily(t, convertAll(t, s, ConvertOptions{}), true)
	checkFamily(t, convertAll(t, s, ConvertOptions{To: Zstd}), false)
}

// TestConvertTwice has two entries of one name, of which the last counts. The
// name between them is one of the first's.
func TestConvertTwice(t *testing.T) {
	raw := plainTar(t, []packEntry{
		dir("d/"), regular("d/twice", []byte("1")), {h: tar.Header{Typeflag: tar.TypeLink, Name: "link", Linkname: "d/twice"}}, dir("d/"), regular("d/twice", []byte("2")),
	})
	for _, to := range compressions {
		got := convertAll(t, sourceOf(t, false, []string{"tar"}, raw), ConvertOptions{To: to})
		if to == ZstdChunked {
			if len(got.warned) != 1 || got.done.Kept != 1 {
				t.Errorf("%s: %q, %+v", to, got.warned, got.done)
			}
			continue
		}
		if d := cmp.Diff(listing(t, raw), listing(t, untarred(t, got.layers[0]))); d != "" {
			t.Errorf("%s: %s", to, d)
		}
		if to == EStargz {
			verified(t, got.layers[0], got.Layers[0].Annotations)
		}
	}
}

func checkFamily(t *testing.T, m converted, docker bool) {
	t.Helper()
	want := ocispec.MediaTypeImageConfig
	if docker {
		want = image.MediaTypeDockerConfig
	}
	if m.IsDocker() != docker || m.ConfigDesc.MediaType != want {
		t.Errorf("manifest of type %s, config of type %s", m.MediaType, m.ConfigDesc.MediaType)
	}
	for _, l := range m.Layers {
		if same, ok := image.LayerType(l.MediaType, docker); !ok || same != l.MediaType {
			t.Errorf("layer of type %s", l.MediaType)
		}
	}
}

// TestConvertOnce has an image with the same layer twice, and two images with it.
func TestConvertOnce(t *testing.T) {
	a, b := kinds(t), plainTar(t, []packEntry{regular("b", []byte("b"))})
	s := sourceOf(t, false, []string{"gzip"}, a, b, a)
	for _, profile := range []string{"", "b\n"} {
		s.opens = map[digest.Digest]int{}
		o := ConvertOptions{}
		if profile != "" {
			o.Profile = mustProfile(t, profile)
		}
		c, err := NewConverter(store(t), o)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Discard()
		first, _, err := c.Image(t.Context(), s.base, s.config, s)
		if err != nil {
			t.Fatal(err)
		}
		second, _, err := c.Image(t.Context(), s.base, s.config, s)
		if err != nil || first.Digest != second.Digest {
			t.Error(err, first.Digest, second.Digest)
		}
		if first.Layers[0].Digest != first.Layers[2].Digest || first.Layers[0].Digest == first.Layers[1].Digest || c.Done().Converted != 2 {
			t.Errorf("%+v", c.Done())
		}
		for d, n := range s.opens {
			if want := map[string]int{"": 1, "b\n": 2}[profile]; n != want {
				t.Errorf("%q: %s was read %d times", profile, d, n)
			}
		}
	}
}

// TestConvertManifest says what of manifest and config stays.
func TestConvertManifest(t *testing.T) {
	s := sourceOf(t, false, []string{"gzip", "estargz"}, plainTar(t, nil), kinds(t))
	got := convertAll(t, s, ConvertOptions{To: ZstdChunked})
	for _, want := range []string{`"later":{"<":1}`, `"keep":"<me>"`, `"annotations":{"keep":"<me>","org.opencontainers.image.created":"2001-01-01T00:00:00Z"`} {
		if !strings.Contains(string(got.Raw), want) {
			t.Errorf("%s is not in %s", want, got.Raw)
		}
	}
	for _, gone := range []string{`"subject"`, "stargz/toc.digest", "uncompressed-size", "+gzip"} {
		if strings.Contains(string(got.Raw), gone) {
			t.Errorf("%s is in %s", gone, got.Raw)
		}
	}
	was, is := string(s.config), string(got.config)
	from, to := strings.Index(was, `"diff_ids"`), strings.Index(was, `"history"`)
	if !strings.HasPrefix(is, was[:from]) || !strings.HasSuffix(is, was[to:]) {
		t.Errorf("config %s became %s", was, is)
	}
	if len(got.Sources) != 1 || got.Sources[0] != s.base.Name || got.Platform != "linux/amd64" {
		t.Errorf("sources %v, platform %s", got.Sources, got.Platform)
	}
}

// TestConvertUnfit has layers that no table of contents can hold.
func TestConvertUnfit(t *testing.T) {
	latin := regular("caf\xe9", []byte("x"))
	old := regular("old", nil)
	old.h.Format, old.h.ModTime = tar.FormatPAX, time.Date(12000, 1, 1, 0, 0, 0, 0, time.UTC)
	for name, e := range map[string]packEntry{"latin": latin, "time": old} {
		for _, to := range compressions {
			s := sourceOf(t, false, []string{"tar"}, plainTar(t, []packEntry{regular("good", []byte("g")), e}))
			got := convertAll(t, s, ConvertOptions{To: to})
			lazy := to == EStargz || to == ZstdChunked
			if kept := got.Digest == s.base.Digest; kept != lazy || len(got.warned) != got.done.Kept || got.done.Kept+got.done.Converted != 1 {
				t.Errorf("%s to %s: %+v, %q", name, to, got.done, got.warned)
			}
		}
	}
}

// TestConvertFails has layers that are not what they should be, and sees that
// nothing stays of them.
func TestConvertFails(t *testing.T) {
	good := plainTar(t, []packEntry{regular("a", bytes.Repeat([]byte("a"), 300<<10)), regular("b", noise(seed(t, 5), 2*mib))})
	down := errors.New("the network is down")
	change := func(s *source, f func([]byte) []byte) {
		d := s.base.Layers[0].Digest
		s.blobs[d] = f(bytes.Clone(s.blobs[d]))
	}
	cases := map[string]struct {
		tar  []byte
		mess func(*source)
		want error
	}{
		"bit":      {good, func(s *source) { change(s, func(b []byte) []byte { b[len(b)/2] ^= 1; return b }) }, index.ErrMalformed},
		"last bit": {good, func(s *source) { change(s, func(b []byte) []byte { b[len(b)-1] ^= 1; return b }) }, index.ErrMalformed},
		"cut":      {good, func(s *source) { change(s, func(b []byte) []byte { return b[:len(b)/2] }) }, index.ErrMalformed},
		"no blob":  {good, func(s *source) { change(s, func(b []byte) []byte { return nil }) }, index.ErrMalformed},
		"other": {good, func(s *source) {
			change(s, func([]byte) []byte { z, _ := newGzip(); b, _ := z.member(nil, kinds(t)); return b })
		}, index.ErrMalformed},
		"network":   {good, func(s *source) { s.fail = down }, down},
		"cut tar":   {good[:len(good)/2], nil, index.ErrMalformed},
		"no tar":    {bytes.Repeat([]byte("no tar "), 1000), nil, index.ErrMalformed},
		"climbs":    {plainTar(t, []packEntry{regular("../a", nil)}), nil, index.ErrMalformed},
		"type":      {plainTar(t, []packEntry{{h: tar.Header{Typeflag: 'V', Name: "volume"}}}), nil, index.ErrMalformed},
		"device":    {plainTar(t, []packEntry{{h: tar.Header{Typeflag: tar.TypeChar, Name: "c", Devmajor: 5000}}}), nil, index.ErrMalformed},
		"owner":     {plainTar(t, []packEntry{{h: tar.Header{Typeflag: tar.TypeDir, Name: "d/", Uid: 1 << 33}}}), nil, index.ErrMalformed},
		"bad xattr": {plainTar(t, []packEntry{{h: tar.Header{Typeflag: tar.TypeDir, Name: "d/", PAXRecords: map[string]string{"LIBARCHIVE.xattr.user.x": "%%"}}}}), nil, index.ErrMalformed},
	}
	for name, tc := range cases {
		for _, form := range []string{"gzip", "zstd", "tar"} {
			for _, profile := range []*Profile{nil, mustProfile(t, "b\n")} {
				s := sourceOf(t, false, []string{form}, tc.tar)
				if tc.mess != nil {
					tc.mess(s)
				}
				dir, scratch := t.TempDir(), t.TempDir()
				to, err := image.OpenStore(dir)
				if err != nil {
					t.Fatal(err)
				}
				joined(t, func() {
					c, err := NewConverter(to, ConvertOptions{Profile: profile, Dir: scratch})
					if err != nil {
						t.Fatal(err)
					}
					m, _, err := c.Image(t.Context(), s.base, s.config, s)
					if c.Discard(); !errors.Is(err, tc.want) {
						t.Errorf("%s, %s: %v, %v", name, form, m, err)
					}
				})
				left, _ := filepath.Glob(filepath.Join(dir, "blobs", "*", "*"))
				more, _ := os.ReadDir(scratch)
				temps, _ := filepath.Glob(filepath.Join(dir, "blobs", ".*"))
				if len(left)+len(more)+len(temps) > 0 {
					t.Errorf("%s, %s: left behind: %v %v %v", name, form, left, more, temps)
				}
			}
		}
	}
}

func TestConvertCancelled(t *testing.T) {
	s := sourceOf(t, false, []string{"gzip"}, plainTar(t, some()))
	for _, profile := range []*Profile{nil, mustProfile(t, "same\n")} {
		ctx, cancel := context.WithCancel(t.Context())
		c, err := NewConverter(store(t), ConvertOptions{Profile: profile, Dir: t.TempDir(), Report: func(_, status string, n, _ int64) {
			if n > 0 {
				cancel()
			}
		}})
		if err != nil {
			t.Fatal(err)
		}
		joined(t, func() {
			if _, _, err := c.Image(ctx, s.base, s.config, s); !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		})
		c.Discard()
		cancel()
	}
}

// TestConvertLibarchive takes over extended attributes as bsdtar writes them.
func TestConvertLibarchive(t *testing.T) {
	raw := plainTar(t, []packEntry{{h: tar.Header{Typeflag: tar.TypeDir, Name: "d/", PAXRecords: map[string]string{
		"LIBARCHIVE.xattr.user.a%25": "AP8", "LIBARCHIVE.xattr.user.b": "eA", "SCHILY.xattr.user.b": "wins",
	}}}})
	got := convertAll(t, sourceOf(t, false, []string{"tar"}, raw), ConvertOptions{})
	entries, _ := stargzEntries(t, got.layers[0])
	want := map[string][]byte{"user.a%": {0, 0xff}, "user.b": []byte("wins")}
	if d := cmp.Diff(want, entries[1].Xattrs); d != "" {
		t.Error(d)
	}
}

func TestConvertedList(t *testing.T) {
	old := digest.FromString("old")
	m := &image.Manifest{Digest: digest.FromString("new"), MediaType: ocispec.MediaTypeImageManifest, Raw: []byte("12345")}
	raw := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"later":1,"subject":{},"manifests":[{"mediaType":%q,"digest":%q,"size":99,"platform":{"os":"linux","architecture":"arm64","variant":"v8"},"annotations":{"a":"<b>"},"data":"eA=="},`+
		`{"mediaType":"x","digest":%q,"size":1,"annotations":{"vnd.docker.reference.digest":%q}}],"annotations":{"k":"v"}}`,
		image.MediaTypeDockerList, image.MediaTypeDockerManifest, old, digest.FromString("other"), old)
	got, mt, err := ConvertedList([]byte(raw), map[digest.Digest]*image.Manifest{old: m})
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"later":1,"manifests":[{"mediaType":%q,"digest":%q,"size":5,"platform":{"os":"linux","architecture":"arm64","variant":"v8"},"annotations":{"a":"<b>"}},`+
		`{"mediaType":"x","digest":%q,"size":1,"annotations":{"vnd.docker.reference.digest":%q}}],"annotations":{"k":"v"}}`,
		ocispec.MediaTypeImageIndex, ocispec.MediaTypeImageManifest, m.Digest, digest.FromString("other"), old)
	if d := cmp.Diff(want, string(got)); d != "" || mt != ocispec.MediaTypeImageIndex {
		t.Error(d, mt)
	}
	same, mt, err := ConvertedList([]byte(raw), map[digest.Digest]*image.Manifest{old: {Digest: old, MediaType: image.MediaTypeDockerManifest}})
	if err != nil || string(same) != raw || mt != image.MediaTypeDockerList {
		t.Error(err, mt, string(same))
	}
}

// FuzzConvertTar reads what calls itself a tar. Contents are left out: of sparse
// files they can be long.
func FuzzConvertTar(f *testing.F) {
	f.Add(plainTar(f, some()[:12]))
	f.Add(kinds(f)[:12<<10])
	f.Add(plainTar(f, []packEntry{{h: tar.Header{Typeflag: tar.TypeCont, Name: "old/"}}}))
	f.Fuzz(func(t *testing.T, raw []byte) {
		r := newLayerReader(bytes.NewReader(raw))
		for {
			e, err := r.next()
			if err != nil {
				break
			}
			if clean, err := index.Clean(e.head.Name); err != nil || clean != e.name {
				t.Errorf("%q: %q, %v", e.head.Name, clean, err)
			}
			if err := tar.NewWriter(io.Discard).WriteHeader(e.head); err != nil {
				t.Errorf("%q cannot be written again: %v", e.head.Name, err)
			}
		}
	})
}
