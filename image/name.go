package image

import (
	"fmt"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// A Name is what a user calls an image: a registry reference, "oci:PATH[:TAG]"
// for an OCI layout (a directory or an uncompressed tar),
// "docker-archive:PATH[:REF]" for a tar of docker save, or an image ID. It can
// be compared with == and be the key of a map. The zero Name names nothing.
type Name struct {
	kind   kind
	domain string // registry as in the name: "docker.io", "localhost:5000"
	repo   string // repository in it: "library/nginx"
	tag    string // of a reference, of a layout ("" if not given), of an archive (a REF)
	digest digest.Digest
	path   string // absolute, of a layout or archive
}

type kind uint8

const (
	none kind = iota
	remoteKind
	layoutKind
	archiveKind
	idKind
)

const (
	layoutPrefix  = "oci:"
	archivePrefix = "docker-archive:"
)

var hexID = regexp.MustCompile(`^[0-9a-f]{64}$`)

// ParseName reads a name as docker would: docker.io, library/ and :latest are
// added where they are missing, a digest wins over a tag, 64 hexadecimal
// digits are an ID. Relative paths are taken from the working directory. As
// in skopeo, the first colon after "oci:" or "docker-archive:" ends the path.
func ParseName(s string) (Name, error) { return ParseNameIn("", s) }

// ParseNameIn is [ParseName] for a caller elsewhere: relative paths are taken
// from cwd, which must be absolute.
func ParseNameIn(cwd, s string) (Name, error) {
	switch {
	case s == "":
		return Name{}, malformed("invalid reference format: the name is empty")
	case strings.HasPrefix(s, layoutPrefix):
		return localName(layoutKind, cwd, s, strings.TrimPrefix(s, layoutPrefix))
	case strings.HasPrefix(s, archivePrefix):
		return localName(archiveKind, cwd, s, strings.TrimPrefix(s, archivePrefix))
	case hexID.MatchString(s):
		return Name{kind: idKind, digest: digest.NewDigestFromEncoded(digest.SHA256, s)}, nil
	}
	if d, err := digest.Parse(s); err == nil {
		return Name{kind: idKind, digest: d}, nil
	}
	ref, err := reference.ParseDockerRef(s)
	if err != nil {
		return Name{}, failf(ErrMalformed, err, "%q is no image name: %s", clip(s), err)
	}
	n := Name{kind: remoteKind, domain: reference.Domain(ref), repo: reference.Path(ref)}
	switch ref := ref.(type) {
	case reference.Canonical:
		n.digest = ref.Digest()
	case reference.Tagged:
		n.tag = ref.Tag()
	}
	return n, nil
}

func localName(k kind, cwd, s, rest string) (Name, error) {
	p, tag, _ := strings.Cut(rest, ":")
	if p == "" || strings.IndexByte(p, 0) >= 0 {
		return Name{}, malformed("%q names no path", clip(s))
	}
	if !filepath.IsAbs(p) && cwd != "" {
		if !filepath.IsAbs(cwd) {
			return Name{}, fmt.Errorf("working directory %q is not absolute", cwd)
		}
		p = filepath.Join(cwd, p)
	}
	p, err := filepath.Abs(p)
	if err != nil {
		return Name{}, fmt.Errorf("path of %q: %w", clip(s), err)
	}
	// The REF of an archive is an image name and is kept in its stored form, so
	// that "nginx" finds what was saved as "docker.io/library/nginx:latest".
	if k == archiveKind && tag != "" {
		ref, err := reference.ParseDockerRef(tag)
		if err != nil {
			return Name{}, failf(ErrMalformed, err, "%q: %q is no image name: %s", clip(s), clip(tag), err)
		}
		tag = ref.String()
	}
	return Name{kind: k, path: p, tag: tag}, nil
}

// String gives the canonical name, the one that is stored. [ParseName] gives
// the same Name for it again.
func (n Name) String() string {
	switch n.kind {
	case remoteKind:
		return n.domain + "/" + n.repo + n.suffix()
	case layoutKind:
		return layoutPrefix + n.path + n.suffix()
	case archiveKind:
		return archivePrefix + n.path + n.suffix()
	case idKind:
		return n.digest.String()
	}
	return ""
}

func (n Name) suffix() string {
	switch {
	case n.digest != "":
		return "@" + n.digest.String()
	case n.tag != "":
		return ":" + n.tag
	}
	return ""
}

// Familiar gives the name as docker shows it: without docker.io and library/.
func (n Name) Familiar() string {
	if n.kind != remoteKind {
		return n.String()
	}
	return n.FamiliarRepository() + n.suffix()
}

// FamiliarRepository is [Name.Familiar] without tag and digest, the first
// column of a list of images. It is empty for an ID.
func (n Name) FamiliarRepository() string {
	switch n.kind {
	case remoteKind:
		if named, err := reference.WithName(n.domain + "/" + n.repo); err == nil {
			return reference.FamiliarName(named)
		}
		return n.domain + "/" + n.repo
	case layoutKind:
		return layoutPrefix + n.path
	case archiveKind:
		return archivePrefix + n.path
	}
	return ""
}

// IsZero reports whether n names nothing.
func (n Name) IsZero() bool { return n.kind == none }

// IsLocal reports whether n is an OCI layout or an archive on this machine.
func (n Name) IsLocal() bool { return n.kind == layoutKind || n.kind == archiveKind }

// IsID reports whether n is an image ID, which only a [Store] can find.
func (n Name) IsID() bool { return n.kind == idKind }

// Registry is the registry as it stands in the name ("docker.io"), empty if
// the image comes from none.
func (n Name) Registry() string { return n.domain }

// Repository is the path in the registry ("library/nginx").
func (n Name) Repository() string { return n.repo }

// Tag is the tag of a reference or layout, the image name asked of an archive.
func (n Name) Tag() string { return n.tag }

// Digest is the digest the name pins, or the ID.
func (n Name) Digest() digest.Digest { return n.digest }

// Path is the absolute path of a layout or archive.
func (n Name) Path() string { return n.path }

// WithDigest names the manifest d in the same repository.
func (n Name) WithDigest(d digest.Digest) Name {
	n.tag, n.digest = "", d
	return n
}

// MarshalText gives the canonical name.
func (n Name) MarshalText() ([]byte, error) { return []byte(n.String()), nil }

// UnmarshalText undoes [Name.MarshalText].
func (n *Name) UnmarshalText(b []byte) error {
	if len(b) == 0 {
		*n = Name{}
		return nil
	}
	v, err := ParseName(string(b))
	if err != nil {
		return err
	}
	*n = v
	return nil
}

// idPrefix gives the hexadecimal digits if n could be a shortened image ID:
// "0123456789ab" parses as a repository of Docker Hub, "sha256:0123456789ab"
// as one called sha256.
func (n Name) idPrefix() string {
	var s string
	switch {
	case n.kind == idKind:
		s = n.digest.Encoded()
	case n.kind != remoteKind || n.domain != "docker.io":
		return ""
	case n.repo == "library/sha256":
		s = n.tag
	case n.tag == "latest":
		s = strings.TrimPrefix(n.repo, "library/")
	}
	if len(s) < 12 || strings.Trim(s, "0123456789abcdef") != "" {
		return ""
	}
	return s
}
