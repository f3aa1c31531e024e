package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// archive is one image of a tar of docker save. It has no manifest, so one is
// made from what is there: the same for the same tar.
type archive struct {
	name   Name
	tar    *tarfile
	config []byte
	raw    []byte // the manifest made
	where  map[digest.Digest]string
}

// savedImage is an entry of manifest.json.
type savedImage struct {
	Config   string
	RepoTags []string
	Layers   []string
}

func openArchive(n Name) (*archive, error) {
	t, err := openTar(n.path)
	if err != nil {
		return nil, localError(n, err)
	}
	a := &archive{name: n, tar: t, where: map[digest.Digest]string{}}
	if err := a.load(); err != nil {
		t.Close()
		return nil, localError(n, err)
	}
	return a, nil
}

func (a *archive) load() error {
	raw, err := readMember(a.tar, "manifest.json", MaxManifest)
	if errors.Is(err, os.ErrNotExist) {
		return malformed("not an archive of docker save, it has no manifest.json")
	}
	if err != nil {
		return err
	}
	saved, err := chooseSaved(raw, a.name.tag)
	if err != nil {
		return err
	}
	if a.config, err = readMember(a.tar, saved.Config, MaxConfig); err != nil {
		return missing(err)
	}
	// Both forms name the config by its digest.
	id := digest.FromBytes(a.config)
	if h := strings.TrimSuffix(path.Base(saved.Config), ".json"); hexID.MatchString(h) && h != id.Encoded() {
		return malformed("config %s holds other bytes (%s), the archive is damaged", clip(saved.Config), id)
	}
	conf, err := ParseConfig(a.config)
	if err != nil {
		return err
	}
	if len(saved.Layers) > MaxLayers {
		return malformed("image with %d layers, the limit is %d", len(saved.Layers), MaxLayers)
	}
	diffs, err := conf.DiffIDs(len(saved.Layers))
	if err != nil {
		return err
	}
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: MediaTypeDockerManifest,
		Config:    ocispec.Descriptor{MediaType: MediaTypeDockerConfig, Digest: id, Size: int64(len(a.config))},
		Layers:    make([]ocispec.Descriptor, 0, len(diffs)),
	}
	for i, file := range saved.Layers {
		d, err := a.layer(file, diffs[i])
		if err != nil {
			return missing(err)
		}
		a.where[d.Digest] = file
		m.Layers = append(m.Layers, d)
	}
	a.raw, err = json.Marshal(m)
	return err
}

// missing makes of a member that is not there a damaged archive: that the
// image itself is not there is another thing.
func missing(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return failf(ErrMalformed, nil, "the archive is not complete: %s", err)
	}
	return err
}

// layer describes a member. A plain tar has its diffID as digest, a member
// under blobs/ its name; other compressed ones are read once to know it.
func (a *archive) layer(file string, diff digest.Digest) (ocispec.Descriptor, error) {
	r, size, err := a.tar.open(file)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	d := ocispec.Descriptor{MediaType: MediaTypeDockerLayer, Digest: diff, Size: size}
	kind, how := compression(r)
	switch kind {
	case "":
	case "gzip":
		d.MediaType = mediaTypeDockerLayerGzip
	case "zstd":
		d.MediaType = mediaTypeDockerLayerZstd
	default:
		return d, malformed("layer %s is compressed with %s, run %q and save it anew", clip(file), kind, how)
	}
	if rest, ok := strings.CutPrefix(path.Clean(file), "blobs/sha256/"); ok && hexID.MatchString(rest) {
		d.Digest = digest.NewDigestFromEncoded(digest.SHA256, rest)
	} else if kind != "" {
		if d.Digest, err = digest.FromReader(io.NewSectionReader(r, 0, size)); err != nil {
			return d, fmt.Errorf("read layer %s: %w", clip(file), err)
		}
	}
	return d, nil
}

// chooseSaved finds the image called ref in a manifest.json; "" is the only
// one.
func chooseSaved(raw []byte, ref string) (savedImage, error) {
	var all []savedImage
	if err := json.Unmarshal(raw, &all); err != nil {
		return savedImage{}, failf(ErrMalformed, err, "manifest.json: %s", err)
	}
	var tags []string
	for _, s := range all {
		for _, t := range s.RepoTags {
			if ref != "" && canonical(t) == canonical(ref) {
				return s, nil
			}
			tags = append(tags, t)
		}
	}
	switch {
	case len(all) == 0:
		return savedImage{}, failf(ErrNotFound, nil, "the archive holds no image")
	case ref != "":
		return savedImage{}, failf(ErrNotFound, nil, "No such image: no %s, there is %s", clip(ref), listTags(tags))
	case len(all) > 1:
		return savedImage{}, failf(ErrNotFound, nil, "the archive holds %d images, name one as docker-archive:PATH:REF, there is %s", len(all), listTags(tags))
	}
	return all[0], nil
}

func (a *archive) Resolve(_ context.Context, platform string) (*Manifest, error) {
	return resolve(a.name, platform, func(*ocispec.Descriptor) ([]byte, string, error) {
		return slices.Clone(a.raw), MediaTypeDockerManifest, nil
	})
}

func (a *archive) Config(_ context.Context, m *Manifest) ([]byte, error) {
	if err := verify(m.ConfigDesc.Digest, a.config); err != nil {
		return nil, localError(a.name, err)
	}
	return slices.Clone(a.config), nil
}

func (a *archive) Blob(l Layer) (Blob, error) {
	file, ok := a.where[l.Digest]
	if !ok {
		return Blob{}, failf(ErrNotFound, nil, "image %s: has no layer %s", a.name.Familiar(), l.Digest)
	}
	r, size, err := a.tar.open(file)
	if err != nil {
		return Blob{}, localError(a.name, err)
	}
	return Blob{Digest: l.Digest, Size: size, Local: r}, nil
}

func (a *archive) Close() error { return a.tar.Close() }
