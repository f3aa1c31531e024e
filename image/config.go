package image

import (
	"encoding/json"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// MaxConfig is the most bytes an image config may have.
const MaxConfig = 8 << 20

// Config is what varve itself reads of an image config. It is not for writing
// one: the fields it does not know must be kept, so a new config is made from
// the raw bytes of the old.
type Config struct {
	Created      *time.Time        `json:"created"`
	Author       string            `json:"author"`
	Architecture string            `json:"architecture"`
	OS           string            `json:"os"`
	OSVersion    string            `json:"os.version"`
	Variant      string            `json:"variant"`
	Config       RunConfig         `json:"config"`
	RootFS       ocispec.RootFS    `json:"rootfs"`
	History      []ocispec.History `json:"history"`
}

// RunConfig says how to run the image: the keys of OCI, and those of docker
// that OCI only reserves.
type RunConfig struct {
	ocispec.ImageConfig
	Healthcheck json.RawMessage `json:",omitempty"`
	OnBuild     []string        `json:",omitempty"`
	Shell       []string        `json:",omitempty"`
}

// ParseConfig reads an image config, docker's or OCI's.
func ParseConfig(raw []byte) (Config, error) {
	var c Config
	if len(raw) > MaxConfig {
		return c, malformed("image config of %d bytes, the limit is %d", len(raw), MaxConfig)
	}
	if err := json.Unmarshal(raw, &c); err != nil {
		return Config{}, failf(ErrMalformed, err, "image config: %s", err)
	}
	if c.RootFS.Type != "" && c.RootFS.Type != "layers" {
		return Config{}, malformed("image config: root filesystem of type %q, only \"layers\" is known", clip(c.RootFS.Type))
	}
	for _, d := range c.RootFS.DiffIDs {
		if err := d.Validate(); err != nil {
			return Config{}, failf(ErrMalformed, err, "image config: diffID %q: %s", clip(string(d)), err)
		}
	}
	return c, nil
}

// DiffIDs gives the digests of the uncompressed layers, lowest first, of an
// image whose manifest has so many layers.
func (c Config) DiffIDs(layers int) ([]digest.Digest, error) {
	if n := len(c.RootFS.DiffIDs); n != layers {
		return nil, malformed("image config names %d layers, the manifest %d", n, layers)
	}
	return c.RootFS.DiffIDs, nil
}

// Platform is the config's own platform, "" if it does not say.
func (c Config) Platform() string { return formatPlatform(c.platform()) }

func (c Config) platform() ocispec.Platform {
	return ocispec.Platform{OS: c.OS, Architecture: c.Architecture, Variant: c.Variant, OSVersion: c.OSVersion}
}

// MatchPlatform checks an image that has only one manifest against the
// platform that was asked; "" is this machine's. A config that does not name a
// platform passes.
func (c Config) MatchPlatform(platform string) error {
	m, err := newMatcher(platform)
	if err != nil {
		return err
	}
	p := c.platform()
	if formatPlatform(p) == "" || m.match(p) {
		return nil
	}
	return failf(ErrNoPlatform, nil, "the image is for %s, not for %s", formatPlatform(p), m.asked)
}
