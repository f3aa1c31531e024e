package daemon

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/varvefs/varve/commit"
	"github.com/varvefs/varve/fetch/profile"
	"github.com/varvefs/varve/image"
)

// ConvertOptions are what `varve convert` asks for.
type ConvertOptions struct {
	ImageOptions
	Ref          string `json:"ref"`                     // what the new image is called
	To           string `json:"to,omitempty"`            // as a commit's compression; "" for estargz
	AllPlatforms bool   `json:"all_platforms,omitempty"` // of a manifest list; Platform does not count
	OCI          bool   `json:"oci,omitempty"`           // docker's media types become OCI's
	Force        bool   `json:"force,omitempty"`         // layers that have the form already, too
	Push         bool   `json:"push,omitempty"`
	// Profile is the files that come first, as [commit.ParseProfile] reads them or a
	// start-up profile, packed by [PackProfile]; nil: none.
	Profile []byte `json:"profile,omitempty"`
	// Stored is the workload whose start-up profile, which is kept here, says what
	// comes first; "default" for the image's own, "" for none.
	Stored string `json:"stored,omitempty"`
}

// Converted is what came of a conversion.
type Converted struct {
	Digest    string  `json:"Digest"`    // the image ID, of all platforms that of their list
	Converted int     `json:"Converted"` // layers
	Kept      int     `json:"Kept"`      // layers that stay as they are
	From      int64   `json:"From"`      // bytes of the blobs that were converted
	To        int64   `json:"To"`        // bytes of what they became
	Pushed    *Pushed `json:"Pushed,omitempty"`
}

// Convert makes an image with layers of another form.
func (c *Client) Convert(ctx context.Context, o ConvertOptions) (*Converted, error) {
	e, err := c.follow(ctx, "/v1/convert", o)
	return e.Converted, err
}

// PackProfile makes a profile small enough for a request, which has less room than
// a profile may have bytes.
func PackProfile(text []byte) ([]byte, error) {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	if _, err := z.Write(text); err != nil {
		return nil, err
	}
	if err := z.Close(); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// Convert makes an image of another whose layers have another form, keeps it in
// the image store, and pushes it if asked.
func (d *Daemon) Convert(ctx context.Context, o ConvertOptions, n note) (*Converted, error) {
	c := &converting{Daemon: d, ConvertOptions: o, note: n}
	if err := c.check(); err != nil {
		return nil, fmt.Errorf("%w%w", err, silent{errUsage})
	}
	defer c.close()
	if err := c.open(ctx); err != nil {
		return nil, err
	}
	if err := c.begin(ctx); err != nil {
		return nil, err
	}
	defer func() { c.made.Discard() }()
	if err := c.convert(ctx); err != nil {
		return nil, err
	}
	if err := c.store(); err != nil {
		return nil, fmt.Errorf("convert %s: %w", c.from.Familiar(), err)
	}
	did := c.made.Done()
	out := &Converted{Digest: c.target().String(), Converted: did.Converted, Kept: did.Kept, From: did.From, To: did.To}
	d.log.Info("converted", "ref", c.name.Familiar(), "image", out.Digest, "layers", did.Converted, "bytes", did.To)
	if o.Push {
		var err error
		if out.Pushed, err = c.push(ctx); err != nil {
			return nil, fmt.Errorf("%s is converted to %s, but not pushed: %w", c.from.Familiar(), out.Digest, err)
		}
	}
	return out, nil
}

// converting is a conversion on its way.
type converting struct {
	*Daemon
	ConvertOptions
	note note

	from, name image.Name
	how        commit.ConvertOptions
	start      *profile.Profile // that says what comes first; nil: none
	made       *commit.Converter

	src     image.Source // nil when it may not be asked
	base    *image.Manifest
	config  []byte
	opened  []*blobs
	results []converted // in the order of the list

	list     []byte               // the new manifest list, nil for a single image
	listType string               // its media type
	others   []ocispec.Descriptor // what stays in the list as it is
}

// converted is the image of one platform.
type converted struct {
	*image.Manifest
	config []byte
	base   *image.Manifest
}

// check reads what was asked for, before anything is done.
func (c *converting) check() (err error) {
	if c.from, err = image.ParseName(c.Image); err != nil {
		return err
	}
	if c.name, err = image.ParseName(c.Ref); err != nil {
		return err
	}
	if c.name.Familiar() == c.from.Familiar() && !c.Force {
		return fmt.Errorf("%s would hide the image it is made of: choose another name, or --force", c.name.Familiar())
	}
	if c.name.IsLocal() || c.name.IsID() || c.name.Digest() != "" {
		return fmt.Errorf("%s: an image is converted to a name and a tag", c.Ref)
	}
	if c.AllPlatforms {
		c.Platform = ""
	}
	if _, err := image.NormalizePlatform(c.Platform); err != nil {
		return err
	}
	c.how = commit.ConvertOptions{
		To: commit.Compression(c.To), OCI: c.OCI, Force: c.Force, Dir: c.dirs.State,
		Report: c.note.report, Warn: c.note.warn,
	}
	if c.Profile != nil {
		raw, err := unpackProfile(c.Profile)
		if err == nil && profile.Is(raw) {
			c.start, err = profile.Decode(raw)
		} else if err == nil {
			c.how.Profile, err = commit.ParseProfile(bytes.NewReader(raw))
		}
		if err != nil {
			return err
		}
	}
	if c.Stored != "" {
		if _, err := profile.ParseName(c.Stored); err != nil {
			return err
		}
	}
	_, err = commit.ParseCompression(c.To)
	return err
}

// begin makes the converter, when it is known what comes first: a start-up profile
// names parts of layers, and the image's names say which files those are.
func (c *converting) begin(ctx context.Context) (err error) {
	if c.start != nil || c.Stored != "" {
		if c.how.Profile, err = c.firstFiles(ctx); err != nil {
			return err
		}
	}
	c.made, err = commit.NewConverter(c.images, c.how)
	return err
}

func (c *converting) firstFiles(ctx context.Context) (*commit.Profile, error) {
	r, err := c.resolve(ctx, c.ImageOptions, c.note)
	if err != nil {
		return nil, err
	}
	if c.start == nil {
		name, err := profile.ParseName(c.Stored)
		if err == nil {
			c.start, err = c.storedProfile(r, name)
		}
		if err != nil {
			r.close()
			return nil, err
		}
	}
	t, err := r.tree(ctx, c.note, false)
	if err != nil {
		return nil, err
	}
	defer t.close()
	if err := c.start.Check(t.manifest.Digest.String(), profileLayers(t)); err != nil {
		return nil, fmt.Errorf("%s: %w%w", c.from.Familiar(), err, silent{errUsage})
	}
	return t.toConvert(c.start)
}

func (c *converting) close() {
	if c.src != nil {
		c.src.Close()
	}
	for _, b := range c.opened {
		b.Close()
	}
}

// open finds the image.
func (c *converting) open(ctx context.Context) (err error) {
	if c.src, err = c.source(c.from, c.ImageOptions); err != nil && !c.from.IsID() {
		return err
	}
	c.base, c.config, err = c.manifest(ctx, c.src, c.from, c.ImageOptions, c.note)
	// A source finds a list by one of its platforms only.
	for _, p := range commonPlatforms {
		if !c.AllPlatforms || !errors.Is(err, image.ErrNoPlatform) {
			break
		}
		o := c.ImageOptions
		o.Platform = p
		c.base, c.config, err = c.manifest(ctx, c.src, c.from, o, c.note)
	}
	return err
}

// configOf gives an image's config, and sees that the image is of the platform that
// was asked.
func (c *converting) configOf(ctx context.Context, m *image.Manifest, config []byte) ([]byte, error) {
	var err error
	if config == nil {
		if c.src == nil {
			return nil, c.absent("config", m.ConfigDesc.Digest)
		}
		if config, err = c.src.Config(ctx, m); err != nil {
			return nil, err
		}
	}
	parsed, err := image.ParseConfig(config)
	if err == nil && c.Platform != "" {
		err = parsed.MatchPlatform(c.Platform)
	}
	if m.Platform == "" {
		m.Platform = parsed.Platform()
	}
	return config, err
}

func (c *converting) absent(what string, d digest.Digest) error {
	return fmt.Errorf("No such image: the %s %s of %s is not here, and may not be asked for%w", what, d, c.from.Familiar(), silent{image.ErrNotFound})
}

// convert converts the image, or all that the list names.
func (c *converting) convert(ctx context.Context) error {
	list := c.base.Blobs[c.base.Target]
	if !c.AllPlatforms || c.base.Target == c.base.Digest || list == nil {
		return c.one(ctx, c.base, c.config)
	}
	entries, err := commit.Manifests(list)
	if err != nil {
		return fmt.Errorf("convert %s: %w", c.from.Familiar(), err)
	}
	made := map[digest.Digest]*image.Manifest{}
	for _, e := range entries {
		if made[e.Digest] != nil {
			continue
		}
		m, config, err := c.entry(ctx, e)
		if err != nil {
			return err
		}
		if m == nil {
			c.others = append(c.others, e)
			continue
		}
		c.note.report("", "Platform "+m.Platform, 0, 0)
		if err := c.one(ctx, m, config); err != nil {
			return err
		}
		made[e.Digest] = c.results[len(c.results)-1].Manifest
	}
	if len(made) == 0 {
		return fmt.Errorf("convert %s: its manifest list names no image%w", c.from.Familiar(), silent{image.ErrNoPlatform})
	}
	c.list, c.listType, err = commit.ConvertedList(list, made)
	return err
}

// one converts the image of one platform.
func (c *converting) one(ctx context.Context, m *image.Manifest, config []byte) error {
	config, err := c.configOf(ctx, m, config)
	if err != nil {
		return err
	}
	b := c.blobsOf(m, c.ImageOptions, c.note)
	c.opened = append(c.opened, b)
	out, made, err := c.made.Image(ctx, m, config, b)
	if err != nil {
		return err
	}
	c.results = append(c.results, converted{Manifest: out, config: made, base: m})
	return nil
}

// target is the new image's ID.
func (c *converting) target() digest.Digest {
	if c.list != nil {
		return digest.FromBytes(c.list)
	}
	return c.results[0].Digest
}

// store gives the new image its name. From then on it can be mounted.
func (c *converting) store() error {
	for _, r := range c.results {
		r.Name, r.Target = c.name, c.target()
		if c.list != nil {
			r.Blobs[r.Target] = c.list
		}
		if err := c.images.PutFrom(r.Manifest, r.config, sourcesOf(r.base)); err != nil {
			return err
		}
	}
	c.made.Release()
	return nil
}

// push sends the image, of all platforms the list last.
func (c *converting) push(ctx context.Context) (*Pushed, error) {
	to := ImageOptions{Insecure: c.Insecure, Auth: c.Auth, AuthConfig: c.AuthConfig}
	if c.list == nil {
		r := c.results[0]
		b := c.blobsOf(r.Manifest, c.ImageOptions, c.note)
		defer b.Close()
		return c.Daemon.push(ctx, c.name, r.Manifest, r.config, b, to, c.note)
	}
	all := &Pushed{Ref: c.name.Familiar(), Digest: c.target().String(), Size: int64(len(c.list))}
	add := func(m *image.Manifest, config []byte) error {
		b := c.blobsOf(m, c.ImageOptions, c.note)
		defer b.Close()
		p, err := c.Daemon.push(ctx, c.name.WithDigest(m.Digest), m, config, b, to, c.note)
		if err != nil {
			return err
		}
		for sum, k := range map[*Count]Count{&all.Uploaded: p.Uploaded, &all.Mounted: p.Mounted, &all.Existed: p.Existed, &all.Streamed: p.Streamed} {
			sum.Blobs += k.Blobs
			sum.Bytes += k.Bytes
		}
		return nil
	}
	for _, r := range c.results {
		if err := add(r.Manifest, r.config); err != nil {
			return nil, err
		}
	}
	for _, e := range c.others {
		m, config, err := c.other(ctx, e)
		if err == nil {
			err = add(m, config)
		}
		if err != nil {
			return nil, err
		}
	}
	auth := to.Auth
	auth.Inline = to.AuthConfig
	base, transport, err := c.registries.Endpoint(c.name, image.Options{Insecure: to.Insecure, Auth: auth, Log: c.log})
	if err != nil {
		return nil, err
	}
	err = commit.PushList(ctx, c.list, c.listType, commit.PushOptions{Target: c.name, Base: base, Transport: transport})
	if err != nil {
		return nil, err
	}
	c.note(event{Status: &Status{Status: fmt.Sprintf("%s: digest: %s size: %d", c.name.Tag(), all.Digest, all.Size)}})
	return all, nil
}
