package commit

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	specs "github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/varvefs/varve/image"
)

// SaveImage is one image to be put into an archive.
type SaveImage struct {
	Manifest *image.Manifest
	Config   []byte
	// Names are of a registry, with a tag or a digest; none: the image can be
	// loaded by its digest only.
	Names []image.Name
	Blobs Blobs
}

// SaveOptions are for Save. The zero value works.
type SaveOptions struct {
	// Report is told "Saving" and "Saved" of each layer; nil: nobody is.
	Report Report
}

// annotationImageName is where containerd keeps the whole name (core/images).
const annotationImageName = "io.containerd.image.name"

// Save writes images as one tar that is an OCI layout and an archive of docker
// save at once, as containerd's exporter does (core/images/archive/exporter.go):
// "docker load", podman, skopeo and ctr each read the part they know. Blobs are
// kept as they are in the registry, each once, and members are sorted and have
// no times, so the same images give the same bytes.
//
// Blobs that are not here are streamed through. All are checked against size and
// digest: one that is wrong ends Save with an error that wraps image.ErrMalformed,
// and the tar has no end, as after any error. Save does not close w.
func Save(ctx context.Context, w io.Writer, images []SaveImage, o SaveOptions) error {
	if len(images) == 0 {
		return pushErrorf(image.ErrNotFound, nil, "save: no image is named")
	}
	s := &saver{o: o, members: map[string]saveFile{}, names: map[string]digest.Digest{}}
	for _, img := range images {
		if err := s.add(img); err != nil {
			return err
		}
	}
	if err := s.documents(); err != nil {
		return err
	}
	return s.write(ctx, w)
}

// saver collects the members of an archive before the first is written.
type saver struct {
	o       SaveOptions
	members map[string]saveFile
	names   map[string]digest.Digest // manifest of each name
	index   []ocispec.Descriptor
	images  []*savedImage
}

// saveFile is a file of the archive: data, or a blob to be read from somewhere.
type saveFile struct {
	data  []byte
	layer image.Layer
	blobs Blobs
}

func (m saveFile) size() int64 {
	if m.blobs != nil {
		return m.layer.Size
	}
	return int64(len(m.data))
}

// savedImage is an entry of manifest.json.
type savedImage struct {
	Config   string
	RepoTags []string
	Layers   []string
	manifest digest.Digest
}

func blobPath(d digest.Digest) string {
	return ocispec.ImageBlobsDir + "/" + d.Algorithm().String() + "/" + d.Encoded()
}

func (s *saver) add(img SaveImage) error {
	m := img.Manifest
	label := m.Digest.String()
	if len(img.Names) > 0 {
		label = img.Names[0].Familiar()
	}
	bad := func(format string, args ...any) error {
		return pushErrorf(image.ErrMalformed, nil, "save %s: "+format, append([]any{label}, args...)...)
	}
	switch {
	case digest.FromBytes(m.Raw) != m.Digest:
		return bad("the manifest is not %s, it is damaged", m.Digest)
	case digest.FromBytes(img.Config) != m.ConfigDesc.Digest || int64(len(img.Config)) != m.ConfigDesc.Size:
		return bad("the config is not %s, it is damaged", m.ConfigDesc.Digest)
	case img.Blobs == nil && len(m.Layers) > 0:
		return bad("no blobs given")
	}
	s.members[blobPath(m.Digest)] = saveFile{data: m.Raw}
	s.members[blobPath(m.ConfigDesc.Digest)] = saveFile{data: img.Config}
	for _, l := range m.Layers {
		p := blobPath(l.Digest)
		had, ok := s.members[p]
		if ok && had.size() != l.Size {
			return bad("layer %s has %d bytes by this manifest and %d by another", l.Digest, l.Size, had.size())
		}
		// Of two places the one that is here.
		if !ok || had.blobs != nil && !had.blobs.Local(l.Digest) {
			s.members[p] = saveFile{layer: l, blobs: img.Blobs}
		}
	}
	entry := s.entry(m)
	desc := ocispec.Descriptor{MediaType: m.MediaType, Digest: m.Digest, Size: int64(len(m.Raw))}
	if len(img.Names) == 0 && !slices.ContainsFunc(s.index, func(d ocispec.Descriptor) bool { return d.Digest == m.Digest }) {
		s.index = append(s.index, desc)
	}
	for _, n := range img.Names {
		full := n.String()
		if n.Registry() == "" {
			return bad("%s is no name that can be loaded, give it one with a repository", full)
		}
		switch had, ok := s.names[full]; {
		case ok && had == m.Digest:
			continue
		case ok:
			return bad("%s names two images", full)
		}
		s.names[full] = m.Digest
		ref := n.Tag()
		if n.Digest() != "" {
			ref = full
		} else {
			entry.RepoTags = append(entry.RepoTags, n.Familiar())
		}
		named := desc
		named.Annotations = map[string]string{annotationImageName: full, ocispec.AnnotationRefName: ref}
		s.index = append(s.index, named)
	}
	return nil
}

// entry gives the one entry of an image, however many names it was saved by.
func (s *saver) entry(m *image.Manifest) *savedImage {
	for _, e := range s.images {
		if e.manifest == m.Digest {
			return e
		}
	}
	e := &savedImage{manifest: m.Digest, Config: blobPath(m.ConfigDesc.Digest)}
	for _, l := range m.Layers {
		e.Layers = append(e.Layers, blobPath(l.Digest))
	}
	s.images = append(s.images, e)
	return e
}

// documents adds what names the rest.
func (s *saver) documents() error {
	for _, doc := range []struct {
		path string
		v    any
	}{
		{ocispec.ImageLayoutFile, ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion}},
		{ocispec.ImageIndexFile, ocispec.Index{
			Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: s.index,
		}},
		{"manifest.json", s.images},
	} {
		b, err := json.Marshal(doc.v)
		if err != nil {
			return fmt.Errorf("write %s: %w", doc.path, err)
		}
		s.members[doc.path] = saveFile{data: b}
	}
	return nil
}

func (s *saver) write(ctx context.Context, w io.Writer) error {
	dirs := []string{ocispec.ImageBlobsDir + "/", ocispec.ImageBlobsDir + "/" + digest.SHA256.String() + "/"}
	paths := slices.Clone(dirs)
	for p := range s.members {
		paths = append(paths, p)
	}
	slices.Sort(paths)
	tw := tar.NewWriter(w)
	for _, p := range paths {
		h := &tar.Header{Name: p, Mode: 0o755, Typeflag: tar.TypeDir}
		m, file := s.members[p]
		if file {
			h.Typeflag, h.Mode, h.Size = tar.TypeReg, 0o444, m.size()
		}
		if err := tw.WriteHeader(h); err != nil {
			return fmt.Errorf("save %s: %w", p, err)
		}
		if !file {
			continue
		}
		if err := s.copy(ctx, tw, m); err != nil {
			return pushErrorf(kindOf(err), err, "save %s: %s", strings.TrimPrefix(p, dirs[1]), err)
		}
	}
	if err := tw.Close(); err != nil {
		return fmt.Errorf("save: %w", err)
	}
	return nil
}

// copy writes a member and proves a blob on the way.
func (s *saver) copy(ctx context.Context, w io.Writer, m saveFile) error {
	if m.blobs == nil {
		_, err := io.Copy(w, bytes.NewReader(m.data))
		return err
	}
	l := m.layer
	src, err := m.blobs.Open(ctx, l, 0)
	if err != nil {
		return fmt.Errorf("read: %w", err)
	}
	defer src.Close()
	if l.Size == 0 && l.Digest != digest.FromBytes(nil) {
		return pushErrorf(image.ErrMalformed, nil, "a blob of 0 bytes cannot have this digest")
	}
	hash, buf, shown := sha256.New(), make([]byte, 256<<10), int64(0)
	s.report(l, "Saving", 0)
	for n := int64(0); n < l.Size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		k, err := src.Read(buf[:min(int64(len(buf)), l.Size-n)])
		hash.Write(buf[:k])
		n += int64(k)
		if n == l.Size {
			// The last bytes are not given out before the whole is proven.
			if got := digest.NewDigest(digest.SHA256, hash); got != l.Digest {
				return pushErrorf(image.ErrMalformed, nil, "the bytes have the digest %s, the blob is damaged or was tampered with", got)
			}
		}
		if _, werr := w.Write(buf[:k]); werr != nil {
			return werr
		}
		if n-shown >= showEvery {
			shown = n
			s.report(l, "Saving", n)
		}
		switch {
		case err == io.EOF && n < l.Size:
			return pushErrorf(image.ErrMalformed, io.ErrUnexpectedEOF, "the blob ends after %d of its %d bytes", n, l.Size)
		case err != nil && n < l.Size:
			return fmt.Errorf("read: %w", err)
		}
	}
	s.report(l, "Saved", l.Size)
	return nil
}

func (s *saver) report(l image.Layer, status string, n int64) {
	if s.o.Report != nil {
		s.o.Report(shortID(l.Digest), status, n, l.Size)
	}
}
