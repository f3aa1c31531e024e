package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/varvefs/varve/commit"
	"github.com/varvefs/varve/image"
)

// commonPlatforms are those one of which a manifest list is likely to have.
var commonPlatforms = []string{"linux/amd64", "linux/arm64", "linux/arm/v7", "linux/s390x", "linux/ppc64le", "linux/riscv64", "linux/386", "windows/amd64"}

// entry gives an image of a manifest list, with its config if that is here; nil for
// what is no image and stays as it is.
func (c *converting) entry(ctx context.Context, e ocispec.Descriptor) (*image.Manifest, []byte, error) {
	if !commit.MayBeImage(e) {
		return nil, nil, nil
	}
	platform, err := platformOf(e)
	if err != nil {
		return nil, nil, err
	}
	if id, err := image.ParseName(e.Digest.String()); err == nil {
		m, config, err := c.images.Get(id, platform)
		if err == nil && m.Digest == e.Digest {
			return m, config, nil
		}
	}
	raw, err := c.document(ctx, e)
	if err != nil {
		return nil, nil, err
	}
	if isListType(e.MediaType) {
		return nil, nil, fmt.Errorf("convert %s: %w: a manifest list in its manifest list", c.from.Familiar(), image.ErrMalformed)
	}
	if !commit.IsImage(raw) {
		return nil, nil, nil
	}
	m, err := image.ParseManifest(raw, e.MediaType)
	if err != nil {
		return nil, nil, fmt.Errorf("convert %s: %s: %w", c.from.Familiar(), platform, err)
	}
	m.Name, m.Target, m.Platform, m.Sources = c.base.Name, m.Digest, platform, c.base.Sources
	m.Blobs = map[digest.Digest][]byte{m.Digest: raw}
	return m, nil, nil
}

func isListType(mt string) bool {
	return mt == ocispec.MediaTypeImageIndex || mt == image.MediaTypeDockerList
}

// document reads a manifest from where the image comes from. A source gives blobs
// and images; a manifest that is perhaps none is, in a layout, a blob like any
// other, and in a registry beside the blobs.
func (c *converting) document(ctx context.Context, e ocispec.Descriptor) ([]byte, error) {
	if c.src == nil {
		return nil, c.absent("manifest", e.Digest)
	}
	at, err := c.src.Blob(image.Layer{Digest: e.Digest, Size: e.Size, MediaType: e.MediaType})
	if err != nil {
		return nil, err
	}
	if at.Local != nil {
		return checked(e, io.NewSectionReader(at.Local, 0, at.Size))
	}
	err = c.absent("manifest", e.Digest)
	for _, o := range at.Origins {
		var raw []byte
		if raw, err = c.get(ctx, e, o); err == nil {
			return raw, nil
		}
	}
	return nil, err
}

// documentTime bounds the reading of one manifest.
const documentTime = 2 * time.Minute

func (c *converting) get(ctx context.Context, e ocispec.Descriptor, o image.Origin) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, documentTime)
	defer cancel()
	i := strings.LastIndex(o.URL, "/blobs/")
	if i < 0 {
		return nil, c.absent("manifest", e.Digest)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, o.URL[:i]+"/manifests/"+e.Digest.String(), nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", e.MediaType)
	resp, err := (&http.Client{Transport: o.Transport}).Do(req)
	if err != nil {
		return nil, fmt.Errorf("pull %s: manifest %s: registry %s gives no answer%w", c.from.Familiar(), e.Digest, o.Registry, silent{errors.Join(image.ErrUnreachable, ctx.Err())})
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("pull %s: manifest %s: registry %s says %s%w", c.from.Familiar(), e.Digest, o.Registry, resp.Status, silent{statusKind(resp.StatusCode)})
	}
	return checked(e, resp.Body)
}

func statusKind(code int) error {
	switch {
	case code == http.StatusUnauthorized || code == http.StatusForbidden:
		return image.ErrUnauthorized
	case code == http.StatusNotFound:
		return image.ErrNotFound
	}
	return image.ErrUnreachable
}

// checked reads a document that a list names.
func checked(e ocispec.Descriptor, r io.Reader) ([]byte, error) {
	raw, err := io.ReadAll(io.LimitReader(r, e.Size+1))
	if err != nil {
		return nil, fmt.Errorf("manifest %s: %w", e.Digest, err)
	}
	if int64(len(raw)) != e.Size || e.Digest.Algorithm().FromBytes(raw) != e.Digest {
		return nil, fmt.Errorf("manifest %s: %w: these are other bytes", e.Digest, image.ErrMalformed)
	}
	return raw, nil
}

// other reads what stays in the list as it is, so that it can be pushed.
func (c *converting) other(ctx context.Context, e ocispec.Descriptor) (*image.Manifest, []byte, error) {
	raw, err := c.document(ctx, e)
	if err != nil {
		return nil, nil, err
	}
	m, err := commit.ArtifactManifest(raw, e.MediaType)
	if err != nil {
		return nil, nil, err
	}
	m.Name, m.Sources = c.base.Name, c.base.Sources
	config, err := c.src.Config(ctx, m)
	return m, config, err
}
