package test

import (
	"bytes"
	"compress/gzip"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/varvefs/varve/daemon"
	"github.com/varvefs/varve/index/soci"
)

// raw is a layer whose every byte is given.
type raw struct {
	blob, tar []byte
	mediaType types.MediaType
}

func rawHash(b []byte) (v1.Hash, error) {
	h, _, err := v1.SHA256(bytes.NewReader(b))
	return h, err
}

func (l raw) Digest() (v1.Hash, error)             { return rawHash(l.blob) }
func (l raw) DiffID() (v1.Hash, error)             { return rawHash(l.tar) }
func (l raw) Size() (int64, error)                 { return int64(len(l.blob)), nil }
func (l raw) MediaType() (types.MediaType, error)  { return l.mediaType, nil }
func (l raw) Compressed() (io.ReadCloser, error)   { return nopCloser{bytes.NewReader(l.blob)}, nil }
func (l raw) Uncompressed() (io.ReadCloser, error) { return nopCloser{bytes.NewReader(l.tar)}, nil }

// ofLayer makes an image of one layer.
func ofLayer(t *testing.T, l v1.Layer) v1.Image {
	t.Helper()
	base := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	base = mustGet[v1.Image](t)(mutate.ConfigFile(base, &v1.ConfigFile{OS: "linux", Architecture: runtime.GOARCH, RootFS: v1.RootFS{Type: "layers"}}))
	return mustGet[v1.Image](t)(mutate.AppendLayers(base, l))
}

func gunzip(t *testing.T, b []byte) []byte {
	t.Helper()
	z, err := gzip.NewReader(bytes.NewReader(b))
	must(t, err)
	return mustGet[[]byte](t)(io.ReadAll(z))
}

// ztocs pushes zTOCs of an image's layers, lowest first, as SOCI does: its first
// version refers to the image, its second is named by an image of another tag.
func (r *registry) ztocs(repo, tag string, version int, ztocs ...[]byte) digest.Digest {
	r.t.Helper()
	image := r.manifest(repo, tag)
	index := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: r.put(repo, []byte(soci.Config))}
	for i, z := range ztocs {
		d := r.put(repo, z)
		d.Annotations = map[string]string{
			soci.LayerDigestAnnotation: image.Layers[i].Digest.String(), soci.LayerMediaTypeAnnotation: image.Layers[i].MediaType,
			soci.SpanSizeAnnotation: "65536",
		}
		index.Layers = append(index.Layers, d)
	}
	if version == 1 {
		raw := r.document(repo + "/manifests/" + tag)
		index.Config.MediaType = soci.TypeIndexV1
		index.Subject = &ocispec.Descriptor{MediaType: image.MediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
		return r.tag(repo, "", index)
	}
	index.Config.MediaType = soci.TypeIndexV2
	id := r.tag(repo, "", index)
	image.Annotations = map[string]string{soci.IndexDigestAnnotation: id.String()}
	r.tag(repo, tag+"-soci", image)
	return id
}

// golden reads what SOCI's own library made.
func golden(t *testing.T, name string) []byte {
	t.Helper()
	return mustGet[[]byte](t)(os.ReadFile(filepath.Join("../index/soci/testdata", name)))
}

// contents gives the digests of all files of a tree.
func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			var b []byte
			b, err = os.ReadFile(path)
			out[strings.TrimPrefix(path, dir)] = sumOf(b)
		}
		return err
	}))
	return out
}

// TestSOCIOfOthers mounts images by the indexes that SOCI's own library made of
// their layers: the tree is that of the image read whole.
func TestSOCIOfOthers(t *testing.T) {
	needRoot(t)
	one, members := golden(t, "one.tar.gz"), golden(t, "members.tar.gz")
	for _, c := range []struct {
		name, ztoc string
		layer      raw
	}{
		{"one", "one.tar.gz.ztoc.gz", raw{one, gunzip(t, one), types.OCILayer}},
		{"no-first-point", "v1.tar.gz.ztoc.gz", raw{one, gunzip(t, one), types.OCILayer}},
		{"members", "members.tar.gz.ztoc.gz", raw{members, gunzip(t, members), types.OCILayer}},
		{"plain", "plain.tar.ztoc.gz", raw{gunzip(t, one), gunzip(t, one), types.OCIUncompressedLayer}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRegistry(t)
			ref := r.push("soci/image:1", ofLayer(t, c.layer))
			h := newHost(t)
			files, tree := contents(t, h.ok("mount", "--wait", "--index=none", ref)), h.ok("export", "image")
			h.ok("umount", "--all")
			z := gunzip(t, golden(t, c.ztoc))
			r.ztocs("soci/image", "1", 1, z)
			r.ztocs("soci/image", "1", 2, z)
			for version, ref := range map[string]string{"v1": ref, "v2": ref + "-soci"} {
				for _, face := range faces {
					h := newHost(t)
					dir := h.ok("mount", "--face", face, "--index=require", ref)
					l := h.inspect(dir).Layers[0]
					if l.Index != "soci" || !l.Unproven || l.Local != 0 || !strings.Contains(l.Reason, map[string]string{"v1": "referrer", "v2": "SOCI v2"}[version]) {
						t.Errorf("%s, %s: %+v", version, face, l)
					}
					same := func(dir string) {
						t.Helper()
						if got := contents(t, dir); !maps.Equal(got, files) || len(got) < 5 {
							t.Errorf("%s, %s: files %v, want %v", version, face, got, files)
						}
						if h.ok("export", "image") != tree {
							t.Errorf("%s, %s: the tree differs", version, face)
						}
					}
					same(dir)
					m := h.until(dir, func(m daemon.Mount) bool { return !m.Layers[0].Unproven })
					if l := m.Layers[0]; !l.Whole || l.DiffID != digest.FromBytes(c.layer.tar).String() {
						t.Errorf("%s, %s: proven: %+v", version, face, l)
					}
					same(dir)
					h.ok("umount", dir)
					dir = h.ok("mount", "--face", face, ref)
					same(dir)
					h.ok("umount", dir)
				}
			}
		})
	}
}
