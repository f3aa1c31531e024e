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

	"golang.org/x/sync/errgroup"

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

// ReaderAt lets containerd's code read the document, as if from a store.
func (d document) ReaderAt(context.Context, ocispec.Descriptor) (content.ReaderAt, error) {
	return inMemory{bytes.NewReader(d.raw)}, nil
}

type inMemory struct{ *bytes.Reader }

func (inMemory) Close() error { return nil }

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
// labels by which the garbage collector finds what it leads to, side by side: each is
// several of containerd's transactions.
func (c *Client) putDocuments(ctx context.Context, p *parsed) error {
	eg, ctx := errgroup.WithContext(ctx)
	for _, d := range p.docs {
		eg.Go(func() error {
			if err := c.putDocument(ctx, p, d); err != nil {
				return fmt.Errorf("put %s into containerd: %w", d.Digest, err)
			}
			return nil
		})
	}
	return eg.Wait()
}

func (c *Client) putDocument(ctx context.Context, p *parsed, d document) error {
	children, err := labelsOf(ctx, d)
	if err != nil {
		return err
	}
	key, repo := sourceLabel(p.name)
	with := maps.Clone(children)
	if labels.Validate(key, repo) == nil {
		with[key] = repo
	}
	there, err := c.write(ctx, d.Descriptor, content.WithLabels(with), func(off int64, w io.Writer) error {
		_, err := io.Copy(w, bytes.NewReader(d.raw[min(off, d.Size):]))
		return err
	})
	if err != nil || !there {
		return err
	}
	// Somebody else put it there, perhaps without labels.
	if err := c.source(ctx, p.name, d.Digest); err != nil || len(children) == 0 {
		return err
	}
	var fields []string
	for key := range children {
		fields = append(fields, "labels."+key)
	}
	_, err = c.content.Update(ctx, content.Info{Digest: d.Digest, Labels: children}, fields...)
	return err
}

// labelsOf gives the labels by which containerd's garbage collector finds what a
// document leads to.
func labelsOf(ctx context.Context, d document) (map[string]string, error) {
	all := collector{labels: map[string]string{}}
	_, err := images.SetChildrenLabels(all, images.ChildrenHandler(d))(ctx, d.Descriptor)
	return all.labels, err
}

// collector takes labels that containerd's code means to set, which is all that it
// does with a store.
type collector struct {
	content.Manager
	labels map[string]string
}

func (c collector) Update(_ context.Context, info content.Info, _ ...string) (content.Info, error) {
	maps.Copy(c.labels, info.Labels)
	return info, nil
}

// write puts a blob with labels into the content store, or reports that it was there.
// fill writes the blob's bytes from an offset on: what an earlier pull left unfinished
// is gone on with.
func (c *Client) write(ctx context.Context, d ocispec.Descriptor, with content.Opt, fill func(off int64, w io.Writer) error) (there bool, err error) {
	ref := remotes.MakeRefKey(ctx, d)
	w, err := content.OpenWriter(ctx, c.content, content.WithRef(ref), content.WithDescriptor(d))
	if errdefs.IsAlreadyExists(err) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	defer w.Close()
	st, err := w.Status()
	if err != nil {
		return false, err
	}
	if st.Offset < d.Size {
		b := bufio.NewWriterSize(w, 1<<20) // each write is a call and its answer
		if err := errors.Join(fill(st.Offset, b), b.Flush()); err != nil {
			return false, err
		}
	}
	err = w.Commit(ctx, d.Size, d.Digest, with)
	if errdefs.IsAlreadyExists(err) {
		return true, nil
	}
	if err != nil {
		c.content.Abort(context.WithoutCancel(ctx), ref) // it would be gone on with for ever
	}
	return false, err
}

// source notes on a blob which repository it is in, as containerd does: a push into
// the same registry finds it there.
func (c *Client) source(ctx context.Context, name image.Name, id digest.Digest) error {
	key, repo := sourceLabel(name)
	info, err := c.content.Info(ctx, id)
	if err != nil {
		return err
	}
	value := addRepository(info.Labels[key], repo)
	if value == info.Labels[key] || labels.Validate(key, value) != nil {
		return nil
	}
	return c.label(ctx, id, key, value)
}

func sourceLabel(name image.Name) (key, repo string) {
	registry := url.URL{Host: name.Registry()}
	return labels.LabelDistributionSource + "." + registry.Hostname(), name.Repository() // without the port: containerd's own form
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
