package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// annotationImageName is where containerd and docker write an image's full
// name in an index.json.
const annotationImageName = "io.containerd.image.name"

// layout is an OCI layout, a directory or a tar.
type layout struct {
	name    Name
	members members
	root    ocispec.Descriptor
}

func openLayout(n Name) (*layout, error) {
	l := &layout{name: n}
	info, err := os.Stat(n.path)
	switch {
	case err != nil:
	case info.IsDir():
		l.members, err = openDir(n.path)
	default:
		l.members, err = openTar(n.path)
	}
	if err != nil {
		return nil, localError(n, err)
	}
	if err := l.choose(); err != nil {
		l.Close()
		return nil, localError(n, err)
	}
	return l, nil
}

// localError names the image and makes a file that is not there an image that
// is not there.
func localError(n Name, err error) error {
	var f *failure
	switch {
	case errors.As(err, &f):
		return about(n, err)
	case errors.Is(err, os.ErrNotExist):
		return failf(ErrNotFound, err, "No such image: %s: %s", n.Familiar(), err)
	}
	return fmt.Errorf("image %s: %w", n.Familiar(), err)
}

// choose finds the entry of index.json for the tag. All entries of one tag are
// taken together as a list of platforms.
func (l *layout) choose() error {
	raw, err := readMember(l.members, "index.json", MaxManifest)
	if errors.Is(err, os.ErrNotExist) {
		return malformed("not an OCI layout, it has no index.json (docker save makes docker-archive:%s)", l.name.path)
	}
	if err != nil {
		return err
	}
	doc, err := parseDocument(raw, ocispec.MediaTypeImageIndex)
	if err != nil {
		return err
	}
	if !isList(doc.MediaType) {
		return malformed("index.json is no OCI index")
	}
	var fit []ocispec.Descriptor
	var tags []string
	images := 0
	for _, d := range doc.Manifests {
		if !isList(d.MediaType) && !isManifest(d.MediaType) || isAttestation(d) {
			continue
		}
		images++
		for _, t := range []string{d.Annotations[ocispec.AnnotationRefName], d.Annotations[annotationImageName]} {
			if t != "" && !slices.Contains(tags, t) {
				tags = append(tags, t)
			}
		}
		if l.name.tag == "" || tagFits(l.name.tag, d) {
			fit = append(fit, d)
		}
	}
	switch {
	case images == 0:
		return failf(ErrNotFound, nil, "the layout holds no image")
	case len(fit) == 0:
		return failf(ErrNotFound, nil, "No such image: no tag %q, there is %s", clip(l.name.tag), listTags(tags))
	case len(fit) > 1:
		return failf(ErrNotFound, nil, "the layout holds %d images, name one as oci:PATH:TAG, there is %s", len(fit), listTags(tags))
	}
	l.root = fit[0]
	return nil
}

func listTags(tags []string) string {
	const most = 20
	if len(tags) == 0 {
		return "no tag at all"
	}
	s := strings.Join(tags[:min(len(tags), most)], ", ")
	if len(tags) > most {
		s += ", …"
	}
	return s
}

// tagFits compares a tag with both annotations, names also in their canonical
// form.
func tagFits(tag string, d ocispec.Descriptor) bool {
	for _, have := range []string{d.Annotations[ocispec.AnnotationRefName], d.Annotations[annotationImageName]} {
		if have != "" && (have == tag || canonical(have) == canonical(tag)) {
			return true
		}
	}
	return d.Digest.String() == tag
}

func canonical(s string) string {
	if ref, err := reference.ParseDockerRef(s); err == nil {
		return ref.String()
	}
	return s
}

func blobPath(d digest.Digest) string { return "blobs/" + d.Algorithm().String() + "/" + d.Encoded() }

func (l *layout) Resolve(_ context.Context, platform string) (*Manifest, error) {
	m, err := resolve(l.name, platform, func(want *ocispec.Descriptor) ([]byte, string, error) {
		d := l.root
		if want != nil {
			d = *want
		}
		raw, err := readMember(l.members, blobPath(d.Digest), MaxManifest)
		if err == nil {
			err = verify(d.Digest, raw)
		}
		if err != nil {
			return nil, "", localError(l.name, err)
		}
		return raw, d.MediaType, nil
	})
	if err == nil && m.Platform == "" && m.Target == m.Digest && l.root.Platform != nil {
		m.Platform = formatPlatform(*l.root.Platform)
	}
	return m, err
}

func (l *layout) Config(_ context.Context, m *Manifest) ([]byte, error) {
	raw, err := readMember(l.members, blobPath(m.ConfigDesc.Digest), MaxConfig)
	if err == nil {
		err = verify(m.ConfigDesc.Digest, raw)
	}
	if err != nil {
		return nil, localError(l.name, err)
	}
	return raw, nil
}

func (l *layout) Blob(y Layer) (Blob, error) {
	if err := y.Digest.Validate(); err != nil {
		return Blob{}, failf(ErrMalformed, err, "layer %q: %s", clip(string(y.Digest)), err)
	}
	r, size, err := l.members.open(blobPath(y.Digest))
	if err != nil {
		return Blob{}, localError(l.name, err)
	}
	if size != y.Size {
		return Blob{}, about(l.name, malformed("layer %s has %d bytes, the manifest says %d", y.Digest, size, y.Size))
	}
	return Blob{Digest: y.Digest, Size: size, Local: r}, nil
}

func (l *layout) Close() error { return l.members.Close() }

// dir is a layout's directory. Links that lead out of it are not followed.
type dir struct {
	root *os.Root

	mu   sync.Mutex // guards open files
	kept map[string]*os.File
}

func openDir(path string) (*dir, error) {
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, err
	}
	return &dir{root: root, kept: map[string]*os.File{}}, nil
}

func (d *dir) open(name string) (io.ReaderAt, int64, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f := d.kept[name]
	if f == nil {
		// A pipe would keep open waiting for its writer.
		info, err := d.root.Stat(name)
		if err != nil {
			return nil, 0, err
		}
		if !info.Mode().IsRegular() {
			return nil, 0, malformed("%s is not a regular file", clip(name))
		}
		if f, err = d.root.Open(name); err != nil {
			return nil, 0, err
		}
		d.kept[name] = f
	}
	info, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	return f, info.Size(), nil
}

func (d *dir) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	errs := []error{d.root.Close()}
	for _, f := range d.kept {
		errs = append(errs, f.Close())
	}
	clear(d.kept)
	return errors.Join(errs...)
}
