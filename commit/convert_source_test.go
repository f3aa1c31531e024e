package commit

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/varvefs/varve/image"
)

// heap is Blobs of memory.
type heap struct {
	mu    sync.Mutex
	blobs map[digest.Digest][]byte
	opens map[digest.Digest]int
	fail  error // what the last byte is read with
}

func newHeap() *heap { return &heap{blobs: map[digest.Digest][]byte{}, opens: map[digest.Digest]int{}} }

func (h *heap) Local(digest.Digest) bool { return false }

func (h *heap) Open(_ context.Context, l image.Layer, off int64) (io.ReadCloser, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.opens[l.Digest]++
	b := h.blobs[l.Digest][off:]
	if h.fail != nil {
		return io.NopCloser(io.MultiReader(bytes.NewReader(b[:len(b)-1]), broken{h.fail})), nil
	}
	return io.NopCloser(bytes.NewReader(b)), nil
}

type broken struct{ error }

func (b broken) Read([]byte) (int, error) { return 0, b.error }

// source is an image to be converted.
type source struct {
	*heap
	base   *image.Manifest
	config []byte
}

// sourceOf makes an image of tars, packed in turn as the forms say: gzip, zstd, tar
// or one of a Packer's.
func sourceOf(t testing.TB, docker bool, forms []string, tars ...[]byte) *source {
	t.Helper()
	s := &source{heap: newHeap()}
	var layers, ids []string
	for i, raw := range tars {
		mt, blob, id := ocispec.MediaTypeImageLayer, raw, digest.FromBytes(raw)
		annotations := `"keep":"<me>"`
		switch form := forms[i%len(forms)]; form {
		case "tar":
		case "gzip", "zstd":
			codec, err := map[string]func() (codec, error){"gzip": newGzip, "zstd": newZstd}[form]()
			if err != nil {
				t.Fatal(err)
			}
			if blob, err = codec.member(nil, raw); err != nil {
				t.Fatal(err)
			}
			mt += "+" + form
		default:
			var b bytes.Buffer
			p := NewPacker(&b, PackOptions{Compression: Compression(form)})
			r := newLayerReader(bytes.NewReader(raw))
			if err := repack(t.Context(), p, r, nil); err != nil {
				t.Fatal(err)
			}
			packed, err := p.Close()
			if err != nil {
				t.Fatal(err)
			}
			blob, id = b.Bytes(), packed.DiffID
			if mt, err = packed.Compression.MediaType(false); err != nil {
				t.Fatal(err)
			}
			for _, k := range slices.Sorted(maps.Keys(packed.Annotations)) {
				annotations += fmt.Sprintf(",%q:%q", k, packed.Annotations[k])
			}
		}
		mt, ok := image.LayerType(mt, docker)
		if !ok {
			t.Fatal(mt)
		}
		d := digest.FromBytes(blob)
		s.blobs[d] = blob
		layers = append(layers, fmt.Sprintf(`{"later":{"<":1},"size":%d,"mediaType":%q,"digest":%q,"annotations":{%s}}`, len(blob), mt, d, annotations))
		ids = append(ids, fmt.Sprintf("%q", id))
	}
	config := fmt.Sprintf(`{"os":"linux","architecture":"amd64","created":"2001-02-03T04:05:06Z","later":[1, 2],"rootfs":{"type":"layers","diff_ids":[%s]},"history":[{"created_by":"<x>"}]}`,
		strings.Join(ids, ","))
	s.config = []byte(config)
	s.base = testBase(t, docker, config, layers...)
	return s
}

func store(t testing.TB) *image.Store {
	t.Helper()
	s, err := image.OpenStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// converted is an image that was made, and the bytes of its layers.
type converted struct {
	*image.Manifest
	config []byte
	layers [][]byte
	done   Conversions
	warned []string
}

func convertAll(t testing.TB, s *source, o ConvertOptions) converted {
	t.Helper()
	to := store(t)
	var out converted
	o.Dir = t.TempDir()
	o.Warn = func(format string, args ...any) { out.warned = append(out.warned, fmt.Sprintf(format, args...)) }
	c, err := NewConverter(to, o)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Discard()
	if out.Manifest, out.config, err = c.Image(t.Context(), s.base, s.config, s); err != nil {
		t.Fatal(err)
	}
	out.done = c.Done()
	cfg, err := image.ParseConfig(out.config)
	if err != nil {
		t.Fatal(err)
	}
	for i, l := range out.Layers {
		blob := s.blobs[l.Digest]
		if blob == nil {
			f, _, err := to.OpenBlob(l.Digest)
			if err != nil {
				t.Fatal(err)
			}
			blob, err = io.ReadAll(f)
			f.Close()
			if err != nil {
				t.Fatal(err)
			}
		}
		if digest.FromBytes(blob) != l.Digest || int64(len(blob)) != l.Size {
			t.Errorf("layer %d: %d bytes are not %s", i, len(blob), l.Digest)
		}
		if got := digest.FromBytes(untarred(t, blob)); got != cfg.RootFS.DiffIDs[i] {
			t.Errorf("layer %d holds %s, the config says %s", i, got, cfg.RootFS.DiffIDs[i])
		}
		out.layers = append(out.layers, blob)
	}
	if out.Digest != digest.FromBytes(out.Raw) || out.Target != out.Digest || out.ConfigDesc.Digest != digest.FromBytes(out.config) || out.ConfigDesc.Size != int64(len(out.config)) {
		t.Errorf("manifest %s, target %s, config %+v", out.Digest, out.Target, out.ConfigDesc)
	}
	if left, err := os.ReadDir(o.Dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	return out
}

// untarred decompresses a blob.
func untarred(t testing.TB, blob []byte) []byte {
	t.Helper()
	r, done, err := decompress(bytes.NewReader(blob))
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	raw, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// listing says all that a tar says of its entries, in their order.
func listing(t testing.TB, raw []byte) (lines []string) {
	t.Helper()
	tr := tar.NewReader(bytes.NewReader(raw))
	for {
		h, err := tr.Next()
		if err == io.EOF {
			return lines
		}
		if err != nil {
			t.Fatal(err)
		}
		if slices.Contains(lazyNames, h.Name) || h.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		sum := sha256.New()
		if _, err := io.Copy(sum, tr); err != nil {
			t.Fatal(err)
		}
		typ := h.Typeflag
		if typ == tar.TypeGNUSparse {
			typ = tar.TypeReg
		}
		pax := maps.Clone(h.PAXRecords)
		maps.DeleteFunc(pax, func(k, _ string) bool {
			return strings.HasPrefix(k, "GNU.sparse.") || slices.Contains([]string{"path", "linkpath", "size", "uid", "gid", "uname", "gname", "mtime", "atime", "ctime"}, k)
		})
		lines = append(lines, fmt.Sprintf("%q %c %q %o %d:%d %s:%s %d %d:%d %s %s %s %q %x", h.Name, typ, h.Linkname, h.Mode, h.Uid, h.Gid, h.Uname, h.Gname,
			h.Size, h.Devmajor, h.Devminor, stamp(h.ModTime), stamp(h.AccessTime), stamp(h.ChangeTime), fmt.Sprint(pax), sum.Sum(nil)[:6]))
	}
}

func stamp(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.UTC().Format(time.RFC3339Nano)
}

// some is what of sample is enough where much is done with it.
func some() []packEntry {
	return slices.DeleteFunc(sample(), func(e packEntry) bool {
		n := e.h.Name
		return n >= "big/05" && n < "big0" || n >= "small/0040" && n < "small0" || n >= "links/0040" && n < "links0" || n == "noise" || n == "same"
	})
}

// kinds is a tar of everything, written by several hands, as in the field.
func kinds(t testing.TB) []byte {
	t.Helper()
	var b bytes.Buffer
	add := func(format tar.Format, hs ...tar.Header) {
		w := tar.NewWriter(&b)
		for _, h := range hs {
			h.Format = format
			if err := w.WriteHeader(&h); err != nil {
				t.Fatal(err)
			}
			if _, err := w.Write(bytes.Repeat([]byte{'q'}, int(h.Size))); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	when := time.Unix(1700000000, 123456789)
	add(tar.FormatPAX, tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: "pax_global_header", PAXRecords: map[string]string{"comment": "of git"}})
	add(tar.FormatPAX,
		tar.Header{Typeflag: tar.TypeDir, Name: "./", Mode: 0o755, ModTime: when},
		tar.Header{Typeflag: tar.TypeDir, Name: "./d/", Mode: 0o1777, ModTime: when, PAXRecords: map[string]string{"SCHILY.xattr.user.empty": "", "vendor.unknown": "kept"}},
		tar.Header{Typeflag: tar.TypeReg, Name: "/d/.wh.gone", ModTime: time.Unix(0, 0)},
		tar.Header{Typeflag: tar.TypeReg, Name: "d/late", Size: 70, ModTime: time.Unix(-5, 7), AccessTime: when, ChangeTime: when},
	)
	add(tar.FormatGNU,
		tar.Header{Typeflag: tar.TypeReg, Name: "d/" + strings.Repeat("n", 200), Size: 7, Uid: 1 << 30, Uname: "a", Gname: "b", Mode: 0o100644, ModTime: when.Truncate(time.Second)},
		tar.Header{Typeflag: tar.TypeSymlink, Name: "d/l", Linkname: strings.Repeat("t", 300), ModTime: when.Truncate(time.Second)},
	)
	add(tar.FormatUSTAR,
		tar.Header{Typeflag: tar.TypeReg, Name: "plain", Size: 300 << 10, Mode: 0o600, ModTime: when.Truncate(time.Second)},
		tar.Header{Typeflag: tar.TypeLink, Name: "link", Linkname: "plain", ModTime: when.Truncate(time.Second)},
	)
	return append(b.Bytes(), make([]byte, 10240)...) // as GNU tar pads it
}

// sparse is a tar of a file with holes, as GNU tar writes it.
func sparse(t testing.TB, format string) []byte {
	t.Helper()
	dir := t.TempDir()
	f, err := os.Create(filepath.Join(dir, "holes"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("island"), 3<<20); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(5<<20), f.Close(), os.WriteFile(filepath.Join(dir, "after"), []byte("after"), 0o644)); err != nil {
		t.Fatal(err)
	}
	raw, err := exec.Command("tar", "-S", "--format="+format, "-C", dir, "-cf", "-", "holes", "after").Output()
	if err != nil {
		t.Skip("no GNU tar that writes sparse files: scripts/deps installs it: ", err)
	}
	if len(raw) > 1<<20 {
		t.Fatal("it is not sparse")
	}
	return raw
}
