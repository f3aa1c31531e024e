package image

import (
	"bytes"
	"encoding/json"
	"errors"
	"mime"
	"slices"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Limits on a list of referrers. Anybody who may push to a repository may add to
// the list.
const (
	maxReferrers       = 1000   // that are kept
	maxEntries         = 20_000 // that are looked at on one page
	maxPages           = 16
	maxListBytes       = 4 * MaxManifest // of all pages
	maxAnnotationBytes = 64 << 10        // of one entry, as JSON
)

// indexDocument is an OCI index whose entries are not read yet.
type indexDocument struct {
	SchemaVersion int             `json:"schemaVersion"`
	MediaType     string          `json:"mediaType"`
	Manifests     json.RawMessage `json:"manifests"`
	Config        json.RawMessage `json:"config"`
	Layers        json.RawMessage `json:"layers"`
}

// parseIndexDocument reads the outside of an OCI index.
func parseIndexDocument(raw []byte) (indexDocument, error) {
	var d indexDocument
	if len(raw) > MaxManifest {
		return d, malformed("list of referrers of %d bytes, the limit is %d", len(raw), MaxManifest)
	}
	if err := json.Unmarshal(raw, &d); err != nil {
		return d, failf(ErrMalformed, err, "list of referrers: %s", err)
	}
	switch {
	case d.SchemaVersion != 2:
		return d, malformed("list of referrers has the schema version %d", d.SchemaVersion)
	case d.MediaType != "" && d.MediaType != ocispec.MediaTypeImageIndex:
		return d, malformed("list of referrers has the type %q", clip(d.MediaType))
	case d.Config != nil || d.Layers != nil:
		return d, malformed("list of referrers is an image")
	}
	return d, nil
}

// isReferrers reports whether an answer is meant to be a list of referrers: a
// page for people is none.
func isReferrers(a *reply) bool {
	mt, _, _ := mime.ParseMediaType(a.head.Get("Content-Type"))
	if mt == ocispec.MediaTypeImageIndex {
		return true
	}
	_, err := parseIndexDocument(a.body)
	return err == nil
}

// readReferrers gives the entries of an OCI index one by one, so that a hostile
// one costs no more memory than its bytes, until visit is false. Entries that
// cannot be used are passed over, as others beside them can.
func readReferrers(raw []byte, visit func(Referrer) bool) error {
	d, err := parseIndexDocument(raw)
	if err != nil {
		return err
	}
	return eachEntry(d.Manifests, func(entry json.RawMessage) bool {
		r, ok := parseReferrer(entry)
		return !ok || visit(r)
	})
}

// eachEntry gives the elements of an array of JSON; null is an empty one.
func eachEntry(array json.RawMessage, visit func(json.RawMessage) bool) error {
	if len(array) == 0 || bytes.Equal(array, []byte("null")) {
		return nil
	}
	dec := json.NewDecoder(bytes.NewReader(array))
	if t, err := dec.Token(); err != nil || t != json.Delim('[') {
		return malformed("list of referrers has no array of manifests")
	}
	var entry json.RawMessage
	for i := 0; dec.More(); i++ {
		if i == maxEntries {
			return malformed("list of referrers has more than %d entries", maxEntries)
		}
		entry = entry[:0]
		if err := dec.Decode(&entry); err != nil {
			return failf(ErrMalformed, err, "list of referrers: %s", err)
		}
		if !visit(entry) {
			return nil
		}
	}
	return nil
}

// parseReferrer reads one entry. Not ok is one of another algorithm, of a size
// that no manifest has, or that is no descriptor at all.
func parseReferrer(entry json.RawMessage) (r Referrer, ok bool) {
	var e struct {
		MediaType    string          `json:"mediaType"`
		Digest       digest.Digest   `json:"digest"`
		Size         int64           `json:"size"`
		ArtifactType string          `json:"artifactType"`
		Annotations  json.RawMessage `json:"annotations"`
	}
	if json.Unmarshal(entry, &e) != nil || checkSHA256(e.Digest) != nil || e.Size < 0 || e.Size > MaxManifest {
		return r, false
	}
	const most = 255 // of a media type (RFC 6838, 4.2)
	if len(e.MediaType) > most || len(e.ArtifactType) > most || len(e.Annotations) > maxAnnotationBytes {
		return r, false
	}
	r = Referrer{Digest: e.Digest, Size: e.Size, MediaType: e.MediaType, ArtifactType: e.ArtifactType}
	if e.Annotations != nil && json.Unmarshal(e.Annotations, &r.Annotations) != nil {
		return r, false
	}
	return r, true
}

// collector keeps the entries of the wanted types, each once.
type collector struct {
	types []string
	list  []Referrer
	have  map[digest.Digest]bool
	cut   string // why the list is not whole
}

// add is for readReferrers.
func (c *collector) add(r Referrer) bool {
	if len(c.types) > 0 && !slices.Contains(c.types, r.ArtifactType) || c.have[r.Digest] {
		return true
	}
	if len(c.list) == maxReferrers {
		c.cut = "it has more entries than are read"
		return false
	}
	if c.have == nil {
		c.have = map[digest.Digest]bool{}
	}
	c.have[r.Digest] = true
	c.list = append(c.list, r)
	return true
}

// errUnchanged: the list is already as it should be.
var errUnchanged = errors.New("nothing to change")

// editIndex puts an entry into the index of a fallback tag, or with a nil entry
// takes d out of it. raw is nil where there is none yet. The entries of others,
// and what else the index says, stay as they are.
func editIndex(raw []byte, d digest.Digest, entry *ocispec.Descriptor) ([]byte, error) {
	doc := map[string]json.RawMessage{
		"schemaVersion": json.RawMessage("2"),
		"mediaType":     json.RawMessage(`"` + ocispec.MediaTypeImageIndex + `"`),
	}
	var array json.RawMessage
	if raw != nil {
		parsed, err := parseIndexDocument(raw)
		if err != nil {
			return nil, err
		}
		array = parsed.Manifests
		if err := json.Unmarshal(raw, &doc); err != nil {
			return nil, failf(ErrMalformed, err, "list of referrers: %s", err)
		}
	}
	var mine json.RawMessage
	if entry != nil {
		var err error
		if mine, err = json.Marshal(entry); err != nil {
			return nil, err
		}
	}
	list := []json.RawMessage{}
	was, same := 0, false
	err := eachEntry(array, func(e json.RawMessage) bool {
		var known struct {
			Digest digest.Digest `json:"digest"`
		}
		if json.Unmarshal(e, &known) == nil && known.Digest == d {
			was++
			same = bytes.Equal(e, mine)
			return true
		}
		list = append(list, bytes.Clone(e))
		return len(list) <= maxReferrers
	})
	switch {
	case err != nil:
		return nil, err
	case was == 0 && entry == nil, was == 1 && same:
		return nil, errUnchanged
	case entry != nil:
		list = append(list, mine)
	}
	if len(list) > maxReferrers {
		return nil, malformed("list of referrers is full, it has %d entries or more", maxReferrers)
	}
	if doc["manifests"], err = json.Marshal(list); err != nil {
		return nil, err
	}
	out, err := json.Marshal(doc)
	if err == nil && len(out) > MaxManifest {
		err = malformed("list of referrers is full, it has %d bytes", len(out))
	}
	return out, err
}
