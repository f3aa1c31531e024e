package forms

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"github.com/klauspost/compress/zstd"
	"github.com/vbatts/tar-split/tar/asm"
	"github.com/vbatts/tar-split/tar/storage"
)

// plain is an image of two gzip layers, and the tars they came from.
func plain(t *testing.T) (v1.Image, [][]byte) {
	t.Helper()
	over := t.TempDir()
	if err := os.WriteFile(over+"/.wh.gone", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	tars := [][]byte{pack(t, tree(t)), pack(t, over)}
	open := func(i int) Opener {
		return func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(tars[i])), nil }
	}
	img, err := FromLayers(context.Background(), Gzip, Options{Dir: t.TempDir()}, open(0), open(1))
	if err != nil {
		t.Fatal(err)
	}
	return img, tars
}

func serve(t *testing.T) string {
	t.Helper()
	s, err := Registry(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s.Addr()
}

func TestEveryForm(t *testing.T) {
	ctx := context.Background()
	from, tars := plain(t)
	addr := serve(t)
	for _, form := range Forms() {
		t.Run(string(form), func(t *testing.T) {
			dir := t.TempDir()
			img, err := Convert(ctx, from, form, Options{Dir: dir, ChunkSize: 64 << 10})
			if err != nil {
				t.Fatal(err)
			}
			checkImage(t, img, form)
			again, err := Convert(ctx, from, form, Options{Dir: t.TempDir(), ChunkSize: 64 << 10})
			if err != nil {
				t.Fatal(err)
			}
			if a, b := digestOfImage(t, img), digestOfImage(t, again); a != b {
				t.Errorf("converted twice: %s and %s", a, b)
			}
			if left, _ := os.ReadDir(dir); len(left) != len(tars) {
				t.Errorf("%d files in the directory, want %d blobs", len(left), len(tars))
			}

			ref := addr + "/some/tree:" + string(form)
			if err := Push(ctx, img, ref); err != nil {
				t.Fatal(err)
			}
			pulled, err := From(ctx, ref)
			if err != nil {
				t.Fatal(err)
			}
			if a, b := digestOfImage(t, img), digestOfImage(t, pulled); a != b {
				t.Errorf("pushed %s, pulled %s", a, b)
			}
			layers, err := pulled.Layers()
			if err != nil {
				t.Fatal(err)
			}
			manifest, err := pulled.Manifest()
			if err != nil {
				t.Fatal(err)
			}
			for i, l := range layers {
				checkLayer(t, form, l, manifest.Layers[i], tars[i])
			}
			config, err := pulled.ConfigFile()
			if err != nil {
				t.Fatal(err)
			}
			if len(config.History) != 2 || config.History[1].CreatedBy != "layer 1" {
				t.Errorf("history %v", config.History)
			}
			inspect(t, ref)
		})
	}
}

// checkImage asks ggcr; its check of contents knows gzip alone.
func checkImage(t *testing.T, img v1.Image, form Form) {
	t.Helper()
	var opts []validate.Option
	if form.mediaType() != types.OCILayer {
		opts = append(opts, validate.Fast)
	}
	if err := validate.Image(img, opts...); err != nil {
		t.Error(err)
	}
}

func digestOfImage(t *testing.T, img v1.Image) v1.Hash {
	t.Helper()
	d, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func checkLayer(t *testing.T, form Form, l v1.Layer, d v1.Descriptor, want []byte) {
	t.Helper()
	r, err := l.Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	got, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(items(t, bytes.NewReader(want)), items(t, bytes.NewReader(got))); diff != "" {
		t.Errorf("tree changed: %s", diff)
	}
	if diffID, err := l.DiffID(); err != nil || diffID != hashBytes(got) {
		t.Errorf("diffID %v, %v; the stream has %v", diffID, err, hashBytes(got))
	}
	blob := compressed(t, l)
	switch form {
	case EStargz:
		openStargz(t, blob, d.Annotations)
	case ZstdChunked:
		openStargz(t, blob, d.Annotations, new(zstdchunked.Decompressor))
		if d.Annotations[zstdchunked.ManifestChecksumAnnotation] == "" || d.Annotations[zstdchunked.ManifestPositionAnnotation] == "" {
			t.Errorf("annotations %v", d.Annotations)
		}
	default:
		if !bytes.Equal(got, want) {
			t.Error("the stream is not the tar")
		}
		if form == ZstdChunkedContainers {
			checkContainers(t, blob, d.Annotations, want)
		} else if d.Annotations != nil {
			t.Errorf("annotations %v", d.Annotations)
		}
	}
	wantType := map[Form]types.MediaType{
		Gzip: "application/vnd.oci.image.layer.v1.tar+gzip", EStargz: "application/vnd.oci.image.layer.v1.tar+gzip",
		Tar: "application/vnd.oci.image.layer.v1.tar",
	}[form]
	if wantType == "" {
		wantType = "application/vnd.oci.image.layer.v1.tar+zstd"
	}
	if d.MediaType != wantType {
		t.Errorf("media type %s, want %s", d.MediaType, wantType)
	}
}

func hashBytes(b []byte) v1.Hash {
	h, _, _ := v1.SHA256(bytes.NewReader(b))
	return h
}

func compressed(t *testing.T, l v1.Layer) []byte {
	t.Helper()
	r, err := l.Compressed()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func openStargz(t *testing.T, blob []byte, annotations map[string]string, d ...estargz.Decompressor) {
	t.Helper()
	r, err := estargz.Open(io.NewSectionReader(bytes.NewReader(blob), 0, int64(len(blob))), estargz.WithDecompressors(d...))
	if err != nil {
		t.Fatal(err)
	}
	if got, want := r.TOCDigest().String(), annotations[estargz.TOCJSONDigestAnnotation]; got != want {
		t.Errorf("TOC %s, annotated as %s", got, want)
	}
	if annotations[estargz.StoreUncompressedSizeAnnotation] == "" {
		t.Error("uncompressed size not annotated")
	}
}

// checkContainers reads the blob as a client of the format would: by its
// annotations, each frame on its own.
func checkContainers(t *testing.T, blob []byte, annotations map[string]string, want []byte) {
	t.Helper()
	dec, err := zstd.NewReader(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer dec.Close()
	unpack := func(begin, end int64) []byte {
		b, err := dec.DecodeAll(blob[begin:end], nil)
		if err != nil {
			t.Fatalf("%d to %d: %v", begin, end, err)
		}
		return b
	}
	section := func(key, format string) (values [4]int64, raw []byte) {
		n, err := fmt.Sscanf(annotations[key], format, &values[0], &values[1], &values[2], &values[3])
		if n < 3 {
			t.Fatalf("%s: %q: %v", key, annotations[key], err)
		}
		raw = unpack(values[0], values[0]+values[1])
		if int64(len(raw)) != values[2] {
			t.Errorf("%s: %d bytes, want %d", key, len(raw), values[2])
		}
		return values, raw
	}
	at, raw := section(containersPosition, "%d:%d:%d:%d")
	split, rawSplit := section(containersTarSplit, "%d:%d:%d")
	if got := hashBytes(blob[at[0] : at[0]+at[1]]).String(); got != annotations[containersChecksum] {
		t.Errorf("TOC has %s, annotated as %s", got, annotations[containersChecksum])
	}
	footer := blob[len(blob)-64:]
	for i, v := range append(at[:], split[:3]...) {
		if got := binary.LittleEndian.Uint64(footer[8*i:]); got != uint64(v) {
			t.Errorf("footer field %d is %d, want %d", i, got, v)
		}
	}
	if string(footer[56:]) != "GNUlInUx" || len(footer) != 64 {
		t.Errorf("footer ends in %q", footer[56:])
	}

	var toc containersTOC
	if err := json.Unmarshal(raw, &toc); err != nil {
		t.Fatal(err)
	}
	if got := hashBytes(blob[split[0] : split[0]+split[1]]).String(); got != toc.TarSplitDigest || toc.Version != 1 {
		t.Errorf("version %d, tar-split has %s, listed as %s", toc.Version, got, toc.TarSplitDigest)
	}
	tree := items(t, bytes.NewReader(want))
	files := filesOf{}
	for i := 0; i < len(toc.Entries); i++ {
		e := toc.Entries[i]
		if e.Type != "reg" || e.Size == 0 {
			continue
		}
		var content []byte
		if e.ChunkSize == 0 {
			content = unpack(e.Offset, e.EndOffset)
		} else {
			chunks := []containersEntry{e}
			for i+1 < len(toc.Entries) && toc.Entries[i+1].Type == "chunk" {
				i++
				chunks = append(chunks, toc.Entries[i])
			}
			for k, c := range chunks {
				end := e.EndOffset
				if k+1 < len(chunks) {
					end = chunks[k+1].Offset
				}
				p := unpack(c.Offset, end)
				if c.Name != e.Name || c.ChunkOffset != int64(len(content)) || c.ChunkSize != int64(len(p)) || c.ChunkDigest != hashBytes(p).String() {
					t.Errorf("%s: chunk %d: %+v does not say what it is", e.Name, k, c)
				}
				if (c.ChunkType == "zeros") != (len(p) >= minHole && len(bytes.Trim(p, "\x00")) == 0) {
					t.Errorf("%s: chunk %d of type %q", e.Name, k, c.ChunkType)
				}
				content = append(content, p...)
			}
		}
		if int64(len(content)) != e.Size || e.Digest != hashBytes(content).String() || e.Digest != "sha256:"+tree[e.Name].Sum {
			t.Errorf("%s: content is not what the TOC or the tar says", e.Name)
		}
		files[e.Name] = content
	}
	// With the files, tar-split gives the tar back to the bit.
	tar := asm.NewOutputTarStream(files, storage.NewJSONUnpacker(bytes.NewReader(rawSplit)))
	defer tar.Close()
	if got, err := io.ReadAll(tar); err != nil || !bytes.Equal(got, want) {
		t.Errorf("tar-split gives another tar: %v", err)
	}
}

type filesOf map[string][]byte

type noClose struct{ io.ReadSeeker }

func (noClose) Close() error { return nil }

func (f filesOf) Get(name string) (io.ReadCloser, error) {
	b, ok := f[name]
	if !ok {
		return nil, os.ErrNotExist
	}
	return noClose{bytes.NewReader(b)}, nil
}

// inspect asks a client that is not ours.
func inspect(t *testing.T, ref string) {
	t.Helper()
	skopeo, err := exec.LookPath("skopeo")
	if err != nil {
		t.Log("skopeo is not installed: not asked")
		return
	}
	if out, err := exec.Command(skopeo, "inspect", "--tls-verify=false", "docker://"+ref).CombinedOutput(); err != nil {
		t.Errorf("skopeo: %v: %s", err, out)
	}
}

func TestPrioritizedComeFirst(t *testing.T) {
	from, _ := plain(t)
	img, err := Convert(context.Background(), from, EStargz, Options{Dir: t.TempDir(), Prioritized: []string{"usr/small", "not/there"}})
	if err != nil {
		t.Fatal(err)
	}
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	blob := compressed(t, layers[0])
	r, err := estargz.Open(io.NewSectionReader(bytes.NewReader(blob), 0, int64(len(blob))))
	if err != nil {
		t.Fatal(err)
	}
	first, ok := r.Lookup("usr/small")
	landmark, ok2 := r.Lookup(estargz.PrefetchLandmark)
	if !ok || !ok2 || first.Offset > landmark.Offset {
		t.Errorf("entry %v, landmark %v", first, landmark)
	}
}

func TestLoadTarAndErrors(t *testing.T) {
	ctx := context.Background()
	img, err := LoadTar(ctx, bytes.NewReader(pack(t, tree(t))), Tar, Options{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	checkImage(t, img, Tar)
	for _, form := range Forms() {
		dir := t.TempDir()
		bad := func() (io.ReadCloser, error) {
			return io.NopCloser(io.MultiReader(bytes.NewReader(make([]byte, 100)), errReader{})), nil
		}
		if _, err := FromLayers(ctx, form, Options{Dir: dir}, bad); !errors.Is(err, errBad) {
			t.Errorf("%s: error %v", form, err)
		}
		stopped, cancel := context.WithCancel(ctx)
		cancel()
		if _, err := Convert(stopped, img, form, Options{Dir: dir}); !errors.Is(err, context.Canceled) {
			t.Errorf("%s: error %v", form, err)
		}
		if left, _ := os.ReadDir(dir); len(left) != 0 {
			t.Errorf("%s: left %v", form, left)
		}
	}
	if _, err := ParseForm("zip"); err == nil || !strings.Contains(err.Error(), "estargz") {
		t.Errorf("error %v", err)
	}
}

var errBad = errors.New("bad source")

type errReader struct{}

func (errReader) Read([]byte) (int, error) { return 0, errBad }
