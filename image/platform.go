package image

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// attestationType marks what BuildKit puts beside an image, on its descriptor
// in the manifest list.
const attestationType = "vnd.docker.reference.type"

// matcher ranks platforms for one that was asked: "" is this machine's, for
// which every platform its CPU runs will do, the best first. One that was
// named is not answered by another architecture, only by an older variant.
type matcher struct {
	asked  string
	spec   ocispec.Platform
	any    platforms.MatchComparer
	strict bool
}

func newMatcher(platform string) (matcher, error) {
	if platform == "" {
		spec := platforms.DefaultSpec()
		return matcher{asked: platforms.Format(spec), spec: spec, any: platforms.Only(spec)}, nil
	}
	spec, err := platforms.Parse(platform)
	if err != nil {
		return matcher{}, failf(ErrMalformed, err, "platform %q: %s", clip(platform), err)
	}
	spec = platforms.Normalize(spec)
	return matcher{asked: platforms.Format(spec), spec: spec, any: platforms.Only(spec), strict: true}, nil
}

func (m matcher) match(p ocispec.Platform) bool {
	p = platforms.Normalize(p)
	if m.strict && p.Architecture != m.spec.Architecture {
		return false
	}
	return m.any.Match(p)
}

// choose takes the best entry of a manifest list, in the list's own order
// among equals. An entry without a platform is taken only if there is nothing
// else in the list: it may be anything.
func (m matcher) choose(entries []ocispec.Descriptor) (ocispec.Descriptor, error) {
	var fit, bare []ocispec.Descriptor
	var have []string
	for _, e := range entries {
		switch {
		case isAttestation(e), isArtifact(e), !isManifest(e.MediaType) && !isList(e.MediaType):
		case e.Platform == nil || e.Platform.OS == "" && e.Platform.Architecture == "":
			bare = append(bare, e)
		default:
			if name := formatPlatform(*e.Platform); !slices.Contains(have, name) {
				have = append(have, name)
			}
			if m.match(*e.Platform) {
				fit = append(fit, e)
			}
		}
	}
	switch {
	case len(fit) > 0:
		slices.SortStableFunc(fit, func(a, b ocispec.Descriptor) int {
			pa, pb := platforms.Normalize(*a.Platform), platforms.Normalize(*b.Platform)
			switch {
			case m.any.Less(pa, pb):
				return -1
			case m.any.Less(pb, pa):
				return 1
			}
			return 0
		})
		return fit[0], nil
	case len(have) == 0 && len(bare) == 1:
		return bare[0], nil
	case len(have) == 0:
		return ocispec.Descriptor{}, fmt.Errorf("the manifest list names no platform, ask for one manifest by its digest")
	}
	return ocispec.Descriptor{}, fmt.Errorf("there is none for %s, only for %s", m.asked, strings.Join(have, ", "))
}

// isArtifact tells what lies beside an image in its list and says its platform, as
// an index of SOCI v2 does, from the image.
func isArtifact(d ocispec.Descriptor) bool {
	return d.ArtifactType != "" && d.ArtifactType != ocispec.MediaTypeImageConfig && d.ArtifactType != MediaTypeDockerConfig
}

func isAttestation(d ocispec.Descriptor) bool {
	if d.Annotations[attestationType] != "" {
		return true
	}
	return d.Platform != nil && d.Platform.OS == "unknown" && d.Platform.Architecture == "unknown"
}

// formatPlatform is "linux/arm64" or "linux/arm/v7", normalised; "" for none.
func formatPlatform(p ocispec.Platform) string {
	if p.OS == "" && p.Architecture == "" {
		return ""
	}
	return platforms.Format(platforms.Normalize(p))
}

// NormalizePlatform gives the form in which platforms are stored and shown;
// "" is this machine's.
func NormalizePlatform(platform string) (string, error) {
	m, err := newMatcher(platform)
	return m.asked, err
}
