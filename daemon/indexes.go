package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/opencontainers/go-digest"

	"github.com/varvefs/varve/fetch"
	"github.com/varvefs/varve/image"
	"github.com/varvefs/varve/index"
	"github.com/varvefs/varve/index/soci"
)

// The index of an image's layers is a referrer of the image: an OCI manifest whose
// layers are the indexes of the layers.
const (
	bundleIndexType   = "application/vnd.varve.index.v1"
	bundleLayerType   = "application/vnd.varve.layer-index.v1"
	bundleLayerDigest = "dev.varve.layer-digest"

	maxIndexes = 8       // of one image that are looked into
	maxZTOC    = 1 << 30 // bytes
)

// foundIndex is an index of a layer, as it is remembered.
type foundIndex struct {
	Layer  string `json:"layer"`
	Kind   string `json:"kind"`
	Digest string `json:"digest"`
	Repo   string `json:"repo"` // an image of the repository that has it
	Why    string `json:"why"`
}

// indexes finds the indexes that others made of an image's layers, when the first
// layer needs one.
type indexes struct {
	d    *Daemon
	name image.Name
	o    ImageOptions
	m    *image.Manifest
	once func() ([]foundIndex, error)

	referrers func() ([]image.Referrer, error) // of the image
}

// indexesOf prepares to ask. What was found before for the same manifest is found
// again without asking, unless the image is to be asked for anew.
func (d *Daemon) indexesOf(ctx context.Context, name image.Name, m *image.Manifest, o ImageOptions) *indexes {
	x := &indexes{d: d, name: name, o: o, m: m}
	x.once = sync.OnceValues(func() ([]foundIndex, error) {
		known := d.knownIndexes(m.Digest)
		if len(known) > 0 && o.Pull != "always" || o.Offline || name.IsLocal() {
			return known, nil
		}
		found, err := x.ask(ctx)
		if err != nil {
			return known, err
		}
		if len(found) > 0 {
			d.rememberIndexes(m.Digest, found)
		}
		return found, nil
	})
	return x
}

// find gives the indexes of a layer.
func (x *indexes) find(layer digest.Digest) ([]fetch.Found, error) {
	all, err := x.once()
	var out []fetch.Found
	for _, f := range all {
		if f.Layer != layer.String() || f.Kind == kindPrefetch {
			continue
		}
		out = append(out, fetch.Found{Kind: f.Kind, Digest: f.Digest, Why: f.Why, Bytes: func(ctx context.Context) ([]byte, error) {
			limit := int64(index.MaxBundle)
			if f.Kind == fetch.KindSOCI {
				limit = maxZTOC
			}
			repo, err := image.ParseName(f.Repo)
			if err != nil {
				return nil, err
			}
			if x.o.Offline {
				return nil, fetch.ErrOffline
			}
			return x.d.registries.FetchBlob(ctx, repo, x.d.imageOptions(x.o), digest.Digest(f.Digest), limit)
		}})
	}
	return out, err
}

// ask looks for indexes: one that the manifest names, and those that refer to it.
func (x *indexes) ask(ctx context.Context) ([]foundIndex, error) {
	type document struct {
		digest digest.Digest
		why    string
	}
	var docs []document
	var manifest ocispec.Manifest
	if err := json.Unmarshal(x.m.Raw, &manifest); err == nil {
		if d, err := digest.Parse(manifest.Annotations[soci.IndexDigestAnnotation]); err == nil {
			docs = append(docs, document{d, "by the manifest's annotation (SOCI v2)"})
		}
	}
	refs, rerr := x.referrers()
	for _, r := range refs {
		if len(docs) == maxIndexes {
			break
		}
		if r.ArtifactType == profileType {
			continue
		}
		docs = append(docs, document{r.Digest, "as a referrer of the image"})
	}
	found := make([][]foundIndex, len(docs))
	errs := make([]error, len(docs)+1)
	errs[len(docs)] = rerr
	var eg errgroup.Group
	for i, doc := range docs {
		eg.Go(func() error {
			raw, err := x.d.registries.FetchManifest(ctx, x.name, x.d.imageOptions(x.o), doc.digest, ocispec.MediaTypeImageManifest, image.MaxManifest)
			if err == nil {
				found[i], err = x.read(raw, doc.why)
			}
			if err != nil {
				errs[i] = fmt.Errorf("index %.19s: %w", doc.digest, err)
				x.d.log.Warn("index of an image not used", "image", x.name.Familiar(), "index", doc.digest, "err", err)
			}
			return nil
		})
	}
	eg.Wait()
	var ours, others []foundIndex
	for _, fs := range found {
		for _, f := range fs {
			if f.Kind == fetch.KindBundle {
				ours = append(ours, f)
			} else {
				others = append(others, f)
			}
		}
	}
	return append(ours, others...), errors.Join(errs...)
}

// read gives what an index of an image says of its layers.
func (x *indexes) read(raw []byte, why string) ([]foundIndex, error) {
	var m ocispec.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return nil, fmt.Errorf("%w: %w", index.ErrMalformed, err)
	}
	if m.Subject != nil && m.Subject.Digest != x.m.Digest {
		return nil, fmt.Errorf("%w: it is that of another image (%.19s)", index.ErrMalformed, m.Subject.Digest)
	}
	repo := x.name.Familiar()
	var out []foundIndex
	if m.ArtifactType == bundleIndexType {
		for _, l := range m.Layers {
			if l.MediaType == bundleLayerType {
				out = append(out, foundIndex{Layer: l.Annotations[bundleLayerDigest], Kind: fetch.KindBundle, Digest: l.Digest.String(), Repo: repo, Why: why})
			}
		}
		return out, nil
	}
	_, ztocs, err := soci.ParseIndex(raw)
	for _, z := range ztocs {
		out = append(out, foundIndex{Layer: z.LayerDigest.String(), Kind: fetch.KindSOCI, Digest: z.Digest.String(), Repo: repo, Why: why})
	}
	for _, p := range soci.Prefetches(raw) {
		out = append(out, foundIndex{Layer: p.LayerDigest.String(), Kind: kindPrefetch, Digest: p.Digest.String(), Repo: repo, Why: why})
	}
	return out, err
}

// kindPrefetch is no index but SOCI's list of what a start needs of a layer.
const kindPrefetch = "soci-prefetch"

// prefetch gives what SOCI's lists say that a start needs of a layer, which is read
// by its spans.
func (x *indexes) prefetch(ctx context.Context, h *fetch.Handle) (wants []fetch.Want, err error) {
	all, err := x.once()
	for _, f := range all {
		if f.Layer != h.Digest || f.Kind != kindPrefetch || x.o.Offline {
			continue
		}
		repo, err := image.ParseName(f.Repo)
		if err != nil {
			return nil, err
		}
		raw, err := x.d.registries.FetchBlob(ctx, repo, x.d.imageOptions(x.o), digest.Digest(f.Digest), soci.MaxPrefetch)
		if err != nil {
			return nil, err
		}
		spans, err := soci.ReadPrefetch(raw)
		if err != nil {
			return nil, err
		}
		for _, s := range spans {
			wants = append(wants, h.Spans(s.First, s.Last)...)
		}
		return wants, nil
	}
	return nil, err
}

func (d *Daemon) indexesPath(m digest.Digest) string {
	return filepath.Join(d.dirs.State, "indexes", m.Encoded()+".json")
}

// knownIndexes gives what was remembered of a manifest.
func (d *Daemon) knownIndexes(m digest.Digest) (known []foundIndex) {
	if b, err := os.ReadFile(d.indexesPath(m)); err == nil && json.Unmarshal(b, &known) != nil {
		known = nil // damaged: asked for again
	}
	return known
}

// rememberIndexes keeps what was found, so that a mount needs no network for it
// again, nor one of an image that is made of this one.
func (d *Daemon) rememberIndexes(m digest.Digest, found []foundIndex) {
	b, err := json.Marshal(found)
	if err == nil {
		err = os.MkdirAll(filepath.Dir(d.indexesPath(m)), 0o700)
	}
	if err == nil {
		err = writeWhole(d.indexesPath(m), b)
	}
	if err != nil {
		d.log.Warn("the indexes of an image cannot be remembered", "image", m, "err", err)
	}
}

// forgetIndexes has the indexes of a manifest asked for again.
func (d *Daemon) forgetIndexes(m digest.Digest) { os.Remove(d.indexesPath(m)) }

func (d *Daemon) imageOptions(o ImageOptions) image.Options {
	auth := o.Auth
	auth.Inline = o.AuthConfig
	return image.Options{Insecure: o.Insecure, Auth: auth, Log: d.log}
}
