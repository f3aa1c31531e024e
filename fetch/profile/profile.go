// Package profile is what a start of an image reads, in the order of first use:
// recorded by one mount, fetched ahead of need by the next.
package profile

import (
	"errors"
	"fmt"
	"regexp"
	"time"
)

// Profile is a recorded start.
type Profile struct {
	Manifest string    // digest of the platform's manifest
	Name     string    // of the workload, "" for the image's own
	Created  time.Time // when it was recorded last
	Layers   []Layer   // the lowest first, all of them
	Uses     []Use     // by first use; no two have a byte in common
}

// Layer names a layer of the image that a profile is of.
type Layer struct {
	Digest string
	Size   int64 // bytes of the data file, for ranges to be held against
}

// Use is a range of a layer's data file that was read.
type Use struct {
	Layer  int   // place in Layers
	Off, N int64 // bytes, whole blocks of 4 KiB
	After  time.Duration
	Missed int // starts in a row that had it fetched and did not read it
}

// Limits of a profile. A start reads some thousand ranges.
const (
	MaxBytes  = 4 << 20 // of one as it is kept
	MaxUses   = 1 << 17
	MaxMissed = 3 // starts that may miss a range, see [Merge]

	maxLayers = 1000
	maxName   = 64
	maxAfter  = 1 << 31 * time.Millisecond
	block     = 4096
)

// Why a profile is not used.
var (
	ErrMalformed = errors.New("malformed profile")
	ErrForeign   = errors.New("profile of another image")
	ErrOutdated  = errors.New("outdated profile")
)

var validName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]*$`)

// Default is what people call the profile without a name.
const Default = "default"

// ParseName reads the name of a workload as people write it.
func ParseName(s string) (string, error) {
	switch {
	case s == "" || s == Default:
		return "", nil
	case len(s) > maxName || !validName.MatchString(s):
		return "", fmt.Errorf("profile %.80q: want letters, digits, '_', '.' and '-', a letter or digit first, %d at most", s, maxName)
	}
	return s, nil
}

// Title is a name as people read it.
func Title(name string) string {
	if name == "" {
		return Default
	}
	return name
}

// Bytes sums the ranges.
func (p *Profile) Bytes() (n int64) {
	for i := range p.Uses {
		n += p.Uses[i].N
	}
	return n
}

// Check says why the profile is not one of an image with this manifest and these
// layers, or nil. The size of a layer is 0 where it is not known.
func (p *Profile) Check(manifest string, layers []Layer) error {
	switch {
	case p.Manifest != manifest:
		return fmt.Errorf("%w: of %.19s", ErrForeign, p.Manifest)
	case len(p.Layers) != len(layers):
		return fmt.Errorf("%w: it has %d layers, not %d", ErrForeign, len(p.Layers), len(layers))
	}
	for i, l := range p.Layers {
		switch {
		case l.Digest != layers[i].Digest:
			return fmt.Errorf("%w: its layer %d is %.19s", ErrForeign, i, l.Digest)
		case l.Size != layers[i].Size && layers[i].Size > 0:
			return fmt.Errorf("%w: layer %.19s had %d bytes when it was recorded, and has %d as it is read now", ErrOutdated, l.Digest, l.Size, layers[i].Size)
		}
	}
	return nil
}
