package image

import (
	"encoding/json"
	"slices"
)

// annotationSources is where an entry of the store's index.json keeps the
// sources of its layers: a JSON list of canonical names. It is never in a
// manifest, where it would tell others where an image comes from.
const annotationSources = "dev.varve.sources"

// Bounds on the sources of one image.
const (
	maxSources     = 100
	maxSourceBytes = 64 << 10 // of the annotation
)

// sameRepository reports whether two names are of one place that blobs are had
// from: one repository of one registry, one layout, one archive.
func (n Name) sameRepository(o Name) bool {
	return n.kind == o.kind && n.domain == o.domain && n.repo == o.repo && n.path == o.path
}

// addSources appends the names of places that are not in the list yet. A name
// that is no place, none or an ID, is left out, and so is what lies in the
// repository of own.
func addSources(list []Name, own Name, more ...Name) []Name {
	list = slices.Clone(list)
	for _, n := range more {
		if n.kind != none && n.kind != idKind && !n.sameRepository(own) && !slices.ContainsFunc(list, n.sameRepository) {
			list = append(list, n)
		}
	}
	return list
}

// checkSources bounds what is about to be written as what is read.
func checkSources(list []Name) error {
	if len(list) > maxSources || len(formatSources(list)) > maxSourceBytes {
		return malformed("its layers come from %d repositories, more than are kept: push it whole to one, and begin there", len(list))
	}
	return nil
}

func formatSources(list []Name) string {
	b, err := json.Marshal(list)
	if err != nil { // a Name's text cannot fail
		return "[]"
	}
	return string(b)
}

// parseSources reads the annotation; "" is an image that has all its layers
// where its name says.
func parseSources(s string) ([]Name, error) {
	if s == "" {
		return nil, nil
	}
	if len(s) > maxSourceBytes {
		return nil, malformed("sources of %d bytes, the limit is %d", len(s), maxSourceBytes)
	}
	var list []Name
	if err := json.Unmarshal([]byte(s), &list); err != nil {
		return nil, failf(ErrMalformed, err, "sources %q: %s", clip(s), err)
	}
	if len(list) > maxSources {
		return nil, malformed("%d sources, the limit is %d", len(list), maxSources)
	}
	for _, n := range list {
		if n.kind == none || n.kind == idKind {
			return nil, malformed("source %q is no place", clip(n.String()))
		}
	}
	return list, nil
}
