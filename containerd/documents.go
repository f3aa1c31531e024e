package containerd

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/url"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/varvefs/varve/image"
)

// Image is an image of one platform, for containerd.
type Image struct {
	Name     string // canonical, in a registry
	Target   string // digest of what the name points at: a manifest list, or the manifest
	Manifest string // digest
	// Documents are the manifest, its config, and the manifest lists that lead to it,
	// by digest.
	Documents map[string][]byte
}

// parsed is an image whose documents were read.
type parsed struct {
	name     image.Name
	target   ocispec.Descriptor
	manifest *image.Manifest
	diffIDs  []digest.Digest
	docs     []document
}

type document struct {
	ocispec.Descriptor
	raw []byte
}

// parse reads an image's documents. They are checked against their digests, and the
// manifest and config against each other.
func (im Image) parse() (*parsed, error) {
	name, err := image.ParseName(im.Name)
	if err != nil {
		return nil, err
	}
	if name.Registry() == "" {
		return nil, fmt.Errorf("%s is in no registry", name.Familiar())
	}
	p := &parsed{name: name}
	if p.manifest, err = image.ParseManifest(im.Documents[im.Manifest], ""); err != nil {
		return nil, err
	}
	config := p.manifest.ConfigDesc
	c, err := image.ParseConfig(im.Documents[config.Digest.String()])
	if err == nil {
		p.diffIDs, err = c.DiffIDs(len(p.manifest.Layers))
	}
	if err != nil {
		return nil, err
	}
	for _, id := range slices.Sorted(maps.Keys(im.Documents)) {
		d := document{ocispec.Descriptor{Digest: digest.Digest(id)}, im.Documents[id]}
		d.Size = int64(len(d.raw))
		if err := d.Digest.Validate(); err != nil || d.Digest.Algorithm().FromBytes(d.raw) != d.Digest {
			return nil, fmt.Errorf("a document of the image is not %s", id)
		}
		switch id {
		case config.Digest.String():
			d.MediaType = config.MediaType
		case im.Manifest:
			d.MediaType = p.manifest.MediaType
		default:
			d.MediaType = listType(d.raw)
		}
		if id == im.Target {
			p.target = d.Descriptor
		}
		p.docs = append(p.docs, d)
	}
	if p.target.Digest == "" {
		return nil, fmt.Errorf("what %s points at is missing", name.Familiar())
	}
	return p, nil
}

// listType gives the media type of a manifest list: OCI lets it go unsaid.
func listType(raw []byte) string {
	var d struct {
		MediaType string `json:"mediaType"`
	}
	if json.Unmarshal(raw, &d) != nil || d.MediaType == "" {
		return ocispec.MediaTypeImageIndex
	}
	return d.MediaType
}

// layer gives the descriptor of layer i.
func (p *parsed) layer(i int) ocispec.Descriptor {
	l := p.manifest.Layers[i]
	return ocispec.Descriptor{MediaType: l.MediaType, Digest: l.Digest, Size: l.Size, Annotations: l.Annotations, URLs: l.URLs}
}

// putDocuments puts the image's documents into the content store, each with the
// labels by which the garbage collector finds what it leads to.
func (c *Client) putDocuments(ctx context.Context, p *parsed) error {
	for _, d := range p.docs {
		err := c.write(ctx, d.Descriptor, func(off int64, w io.Writer) error {
			_, err := io.Copy(w, bytes.NewReader(d.raw[min(off, d.Size):]))
			return err
		})
		if err == nil {
			err = c.source(ctx, p.name, d.Digest)
		}
		if err == nil {
			_, err = images.SetChildrenLabels(c.content, images.ChildrenHandler(c.content))(ctx, d.Descriptor)
		}
		if err != nil {
			return fmt.Errorf("put %s into containerd: %w", d.Digest, err)
		}
	}
	return nil
}

// write puts a blob into the content store, unless it is there. fill writes the
// blob's bytes from an offset on: what an earlier pull left unfinished is gone on
// with.
func (c *Client) write(ctx context.Context, d ocispec.Descriptor, fill func(off int64, w io.Writer) error) error {
	ref := remotes.MakeRefKey(ctx, d)
	w, err := content.OpenWriter(ctx, c.content, content.WithRef(ref), content.WithDescriptor(d))
	if errdefs.IsAlreadyExists(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer w.Close()
	st, err := w.Status()
	if err != nil {
		return err
	}
	if st.Offset < d.Size {
		b := bufio.NewWriterSize(w, 1<<20) // each write is a call and its answer
		if err := errors.Join(fill(st.Offset, b), b.Flush()); err != nil {
			return err
		}
	}
	if err := w.Commit(ctx, d.Size, d.Digest); err != nil && !errdefs.IsAlreadyExists(err) {
		c.content.Abort(context.WithoutCancel(ctx), ref) // it would be gone on with for ever
		return err
	}
	return nil
}

// source notes on a blob which repository it is in, as containerd does: a push into
// the same registry finds it there.
func (c *Client) source(ctx context.Context, name image.Name, id digest.Digest) error {
	registry := url.URL{Host: name.Registry()}
	key := labels.LabelDistributionSource + "." + registry.Hostname() // without the port: containerd's own form
	info, err := c.content.Info(ctx, id)
	if err != nil {
		return err
	}
	value := addRepository(info.Labels[key], name.Repository())
	if value == info.Labels[key] || labels.Validate(key, value) != nil {
		return nil
	}
	return c.label(ctx, id, key, value)
}

// addRepository adds to a list that has commas.
func addRepository(list, repo string) string {
	var repos []string
	if list != "" {
		repos = strings.Split(list, ",")
	}
	if !slices.Contains(repos, repo) {
		repos = append(repos, repo)
	}
	slices.Sort(repos)
	return strings.Join(repos, ",")
}

// label sets a label of a blob.
func (c *Client) label(ctx context.Context, id digest.Digest, key, value string) error {
	_, err := c.content.Update(ctx, content.Info{Digest: id, Labels: map[string]string{key: value}}, "labels."+key)
	return err
}
