package image

import (
	"encoding/json"
	"slices"
	"strings"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// storeIndex is a store's index.json: a list of records, written so that other
// tools of OCI layouts find the names too.
type storeIndex struct {
	ocispec.Index
}

// maxIndex is the most bytes of an index.json; an entry has about 500, and its
// sources.
const maxIndex = 256 << 20

// parseIndex reads an index.json that a store wrote. What is JSON but not of
// that form is refused too: written anew, it would lose what it still names.
func parseIndex(raw []byte) (ocispec.Index, error) {
	var x ocispec.Index
	if err := json.Unmarshal(raw, &x); err != nil {
		return x, err
	}
	if x.SchemaVersion != 2 || x.Manifests == nil {
		return x, malformed("not a list of images")
	}
	for _, d := range x.Manifests {
		if _, err := parseSources(d.Annotations[annotationSources]); err != nil {
			return x, err
		}
		r, ok := recordOf(d)
		if !ok {
			return x, malformed("an entry is named %q", clip(d.Annotations[annotationImageName]))
		}
		for _, id := range []digest.Digest{r.Target, r.Manifest} {
			if err := id.Validate(); err != nil {
				return x, malformed("digest %q: %s", clip(string(id)), err)
			}
		}
	}
	return x, nil
}

func (x *storeIndex) records() []Record {
	rs := make([]Record, 0, len(x.Manifests))
	for _, d := range x.Manifests {
		if r, ok := recordOf(d); ok {
			rs = append(rs, r)
		}
	}
	return rs
}

func recordOf(d ocispec.Descriptor) (Record, bool) {
	r := Record{
		Target:   d.Digest,
		Manifest: digest.Digest(d.Annotations[annotationManifest]),
		Platform: d.Annotations[annotationPlatform],
	}
	if r.Manifest == "" {
		r.Manifest = r.Target
	}
	var err error
	if r.Sources, err = parseSources(d.Annotations[annotationSources]); err != nil {
		return r, false
	}
	err = r.Name.UnmarshalText([]byte(d.Annotations[annotationImageName]))
	return r, err == nil
}

// set puts a record in the place of the one with its name and platform. What
// that one pointed at stays without a name, if nothing else names it.
func (x *storeIndex) set(r Record, size int64, mediaType string) {
	for _, old := range x.records() {
		if old.Name == r.Name && old.Platform == r.Platform {
			d := x.descriptor(old)
			x.drop(old)
			if old.Manifest != r.Manifest && !slices.ContainsFunc(x.records(), func(o Record) bool { return o.Manifest == old.Manifest }) {
				// Its layers are where they were.
				if more := addSources(old.Sources, Name{}, old.Name); checkSources(more) == nil {
					old.Sources = more
				}
				old.Name = Name{}
				x.add(old, d.Size, d.MediaType)
			}
		}
		// A name found it: it is no longer nameless.
		if old.Name.IsZero() && old.Manifest == r.Manifest {
			x.drop(old)
		}
	}
	x.add(r, size, mediaType)
}

func (x *storeIndex) add(r Record, size int64, mediaType string) {
	d := ocispec.Descriptor{
		MediaType: mediaType,
		Digest:    r.Target,
		Size:      size,
		Annotations: map[string]string{
			annotationManifest: r.Manifest.String(),
			annotationPlatform: r.Platform,
		},
	}
	if len(r.Sources) > 0 {
		d.Annotations[annotationSources] = formatSources(r.Sources)
	}
	if !r.Name.IsZero() {
		d.Annotations[annotationImageName] = r.Name.String()
		if r.Name.tag != "" && r.Name.kind == remoteKind {
			d.Annotations[ocispec.AnnotationRefName] = r.Name.tag
		}
	}
	x.Manifests = append(x.Manifests, d)
}

func (x *storeIndex) descriptor(r Record) ocispec.Descriptor {
	for _, d := range x.Manifests {
		if have, ok := recordOf(d); ok && have.same(r) {
			return d
		}
	}
	return ocispec.Descriptor{}
}

func (x *storeIndex) drop(r Record) {
	x.Manifests = slices.DeleteFunc(x.Manifests, func(d ocispec.Descriptor) bool {
		have, ok := recordOf(d)
		return ok && have.same(r)
	})
}

// find gives the records of one image: those with the name, else those of the
// digest the name pins in its repository, else those with the ID it could be a
// shortening of.
func (x *storeIndex) find(n Name) ([]Record, error) {
	all := x.records()
	filter := func(keep func(Record) bool) []Record {
		return slices.DeleteFunc(slices.Clone(all), func(r Record) bool { return !keep(r) })
	}
	if n.IsZero() {
		return nil, malformed("invalid reference format: the name is empty")
	}
	if found := filter(func(r Record) bool { return r.Name == n }); len(found) > 0 {
		return found, nil
	}
	if n.digest != "" {
		found := filter(func(r Record) bool {
			in := n.kind == idKind || r.Name.kind == remoteKind && r.Name.domain == n.domain && r.Name.repo == n.repo
			return in && (r.Target == n.digest || r.Manifest == n.digest)
		})
		if len(found) > 0 {
			return found, nil
		}
	}
	if id := n.idPrefix(); id != "" {
		found := filter(func(r Record) bool { return strings.HasPrefix(r.Target.Encoded(), id) })
		for _, r := range found {
			if r.Target != found[0].Target {
				return nil, failf(ErrNotFound, nil, "No such image: %s: several images begin with it, give more digits", n.Familiar())
			}
		}
		if len(found) > 0 {
			return found, nil
		}
	}
	return nil, failf(ErrNotFound, nil, "No such image: %s", n.Familiar())
}

func parsePlatform(s string) ocispec.Platform {
	p, err := platforms.Parse(s)
	if err != nil {
		return ocispec.Platform{}
	}
	return platforms.Normalize(p)
}
