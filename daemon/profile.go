package daemon

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/varvefs/varve/commit"
	"github.com/varvefs/varve/fetch/profile"
	"github.com/varvefs/varve/image"
)

// ProfileOptions name a start-up profile.
type ProfileOptions struct {
	ImageOptions
	Name   string `json:"name,omitempty"`   // of the workload; "" or "default" for the image's own
	All    bool   `json:"all,omitempty"`    // whatever it is called
	Remote bool   `json:"remote,omitempty"` // in the image's registry, not here
	File   []byte `json:"file,omitempty"`   // what is imported, packed by [PackProfile]
}

// ProfileInfo says what a start-up profile is.
type ProfileInfo struct {
	Image    string    `json:"Image"` // a name of it, "" if it has none here
	Manifest string    `json:"Manifest"`
	Name     string    `json:"Name"` // of the workload, "default" for the image's own
	Created  time.Time `json:"Created"`
	Ranges   int       `json:"Ranges,omitempty"`
	Bytes    int64     `json:"Bytes,omitempty"`  // of files that it names
	Digest   string    `json:"Digest,omitempty"` // of its manifest, where it lies in the registry
}

// ProfileShown is a start-up profile with what it names.
type ProfileShown struct {
	ProfileInfo
	Files []ProfileFile `json:"Files"`
}

// Profiles lists the start-up profiles that are kept here or, if asked, those that
// an image has in its registry; of all images if none is named.
func (c *Client) Profiles(ctx context.Context, o ProfileOptions) (ps []ProfileInfo, err error) {
	return ps, c.get(ctx, http.MethodPost, "/v1/profiles", o, &ps)
}

// ShowProfile gives the files that a profile names.
func (c *Client) ShowProfile(ctx context.Context, o ProfileOptions) (p ProfileShown, err error) {
	return p, c.get(ctx, http.MethodPost, "/v1/profiles/show", o, &p)
}

// PushProfile puts the profile that is kept here beside its image.
func (c *Client) PushProfile(ctx context.Context, o ProfileOptions) (p ProfileInfo, err error) {
	return p, c.get(ctx, http.MethodPost, "/v1/profiles/push", o, &p)
}

// PullProfile keeps the profile that lies beside the image.
func (c *Client) PullProfile(ctx context.Context, o ProfileOptions) (p ProfileInfo, err error) {
	return p, c.get(ctx, http.MethodPost, "/v1/profiles/pull", o, &p)
}

// ImportProfile keeps a profile that comes from a file.
func (c *Client) ImportProfile(ctx context.Context, o ProfileOptions) (*ProfileInfo, error) {
	e, err := c.follow(ctx, "/v1/profiles/import", o)
	return e.Profile, err
}

// RemoveProfiles deletes profiles and gives what they were.
func (c *Client) RemoveProfiles(ctx context.Context, o ProfileOptions) (ps []ProfileInfo, err error) {
	return ps, c.get(ctx, http.MethodPost, "/v1/profiles/rm", o, &ps)
}

func profileInfo(name string, p *profile.Profile) ProfileInfo {
	return ProfileInfo{Image: name, Manifest: p.Manifest, Name: profile.Title(p.Name), Created: p.Created, Ranges: len(p.Uses), Bytes: p.Bytes()}
}

// profileImage finds the image of a profile.
func (d *Daemon) profileImage(ctx context.Context, o *ProfileOptions) (r *resolved, err error) {
	if o.Name, err = profile.ParseName(o.Name); err != nil {
		return nil, fmt.Errorf("%w%w", err, silent{errUsage})
	}
	if r, err = d.resolve(ctx, o.ImageOptions, func(event) {}); err != nil {
		return nil, err
	}
	if o.Remote && (r.name.IsLocal() || r.name.IsID()) {
		r.close()
		return nil, fmt.Errorf("%s is in no registry%w", r.name.Familiar(), silent{errUsage})
	}
	return r, nil
}

func (d *Daemon) noProfile(where string, r *resolved, name string) error {
	return fmt.Errorf("%s has no start-up profile %q %s%w", r.name.Familiar(), profile.Title(name), where, silent{image.ErrNotFound})
}

// storedProfile gives a profile that must be here.
func (d *Daemon) storedProfile(r *resolved, name string) (*profile.Profile, error) {
	p, err := d.localProfile(r.manifest.Digest, name)
	if p == nil && err == nil {
		err = d.noProfile("here: a mount of it records one", r, name)
	}
	return p, err
}

// Profiles lists profiles.
func (d *Daemon) Profiles(ctx context.Context, o ProfileOptions) ([]ProfileInfo, error) {
	out := []ProfileInfo{}
	if o.Image == "" {
		for _, m := range d.profiled() {
			out = append(out, d.listProfiles(d.nameOf(m), m)...)
		}
		slices.SortStableFunc(out, func(a, b ProfileInfo) int { return b.Created.Compare(a.Created) })
		return out, nil
	}
	r, err := d.profileImage(ctx, &o)
	if err != nil {
		return nil, err
	}
	defer r.close()
	if !o.Remote {
		return append(out, d.listProfiles(r.name.Familiar(), r.manifest.Digest)...), nil
	}
	refs, err := r.pushedProfiles("", true)
	for _, ref := range refs {
		out = append(out, ProfileInfo{
			Image: r.name.Familiar(), Manifest: r.manifest.Digest.String(), Name: ref.Annotations[profileName],
			Created: created(ref), Digest: ref.Digest.String(),
		})
	}
	return out, err
}

func (d *Daemon) listProfiles(name string, m digest.Digest) (out []ProfileInfo) {
	for _, n := range d.profileNames(m) {
		p, err := d.localProfile(m, n)
		if err != nil {
			d.log.Warn("start-up profile not listed", "err", err)
		} else if p != nil {
			out = append(out, profileInfo(name, p))
		}
	}
	return out
}

// nameOf gives a name of the image that has a manifest, "" if none has.
func (d *Daemon) nameOf(m digest.Digest) string {
	all, err := d.images.List()
	if err != nil {
		d.log.Warn("image store", "err", err)
	}
	for _, r := range all {
		if r.Manifest == m && !r.Name.IsZero() {
			return r.Name.Familiar()
		}
	}
	return ""
}

// ShowProfile gives the files that a profile names, which needs the image's names.
func (d *Daemon) ShowProfile(ctx context.Context, o ProfileOptions) (*ProfileShown, error) {
	r, err := d.profileImage(ctx, &o)
	if err != nil {
		return nil, err
	}
	p, err := d.anyProfile(ctx, r, o)
	if err != nil {
		r.close()
		return nil, err
	}
	t, err := r.tree(ctx, func(event) {}, false)
	if err != nil {
		return nil, err
	}
	defer t.close()
	if err := p.Check(t.manifest.Digest.String(), profileLayers(t)); err != nil {
		return nil, err
	}
	shown := &ProfileShown{ProfileInfo: profileInfo(r.name.Familiar(), p)}
	shown.Files, err = t.profileFiles(p)
	return shown, err
}

func (d *Daemon) anyProfile(ctx context.Context, r *resolved, o ProfileOptions) (*profile.Profile, error) {
	if !o.Remote {
		return d.storedProfile(r, o.Name)
	}
	p, err := r.pushedProfile(ctx, o.Name)
	if p == nil && err == nil {
		err = d.noProfile("in its registry that can be used", r, o.Name)
	}
	return p, err
}

// PushProfile puts the profile that is kept here beside its image.
func (d *Daemon) PushProfile(ctx context.Context, o ProfileOptions) (*ProfileInfo, error) {
	o.Remote = true
	r, err := d.profileImage(ctx, &o)
	if err != nil {
		return nil, err
	}
	defer r.close()
	p, err := d.storedProfile(r, o.Name)
	if err != nil {
		return nil, err
	}
	ref, err := r.pushProfile(ctx, p)
	if err != nil {
		return nil, err
	}
	info := profileInfo(r.name.Familiar(), p)
	info.Digest = ref.Digest.String()
	return &info, nil
}

// PullProfile keeps the profile that lies beside the image, in the place of what
// was recorded here.
func (d *Daemon) PullProfile(ctx context.Context, o ProfileOptions) (*ProfileInfo, error) {
	o.Remote = true
	r, err := d.profileImage(ctx, &o)
	if err != nil {
		return nil, err
	}
	defer r.close()
	p, err := d.anyProfile(ctx, r, o)
	if err != nil {
		return nil, err
	}
	return d.takeProfile(r, p)
}

func (d *Daemon) takeProfile(r *resolved, p *profile.Profile) (*ProfileInfo, error) {
	d.profileMu.Lock()
	defer d.profileMu.Unlock()
	if err := d.keepProfile(p); err != nil {
		return nil, err
	}
	info := profileInfo(r.name.Familiar(), p)
	return &info, nil
}

// RemoveProfiles deletes profiles, here or in the registry.
func (d *Daemon) RemoveProfiles(ctx context.Context, o ProfileOptions) ([]ProfileInfo, error) {
	r, err := d.profileImage(ctx, &o)
	if err != nil {
		return nil, err
	}
	defer r.close()
	out := []ProfileInfo{}
	info := ProfileInfo{Image: r.name.Familiar(), Manifest: r.manifest.Digest.String()}
	if o.Remote {
		refs, err := r.pushedProfiles(o.Name, o.All)
		for _, ref := range refs {
			if err := d.registries.DeleteReferrer(ctx, r.name, d.imageOptions(o.ImageOptions), r.manifest.Digest, ref.Digest); err != nil {
				return nil, err
			}
			info.Name, info.Digest = ref.Annotations[profileName], ref.Digest.String()
			out = append(out, info)
		}
		if err == nil && len(out) == 0 && !o.All {
			err = d.noProfile("in its registry", r, o.Name)
		}
		return out, err
	}
	d.profileMu.Lock()
	defer d.profileMu.Unlock()
	names := []string{o.Name}
	if o.All {
		names = d.profileNames(r.manifest.Digest)
	}
	for _, n := range names {
		there, err := d.removeProfile(r.manifest.Digest, n)
		if err == nil && !there && !o.All {
			err = d.noProfile("here", r, n)
		}
		if err != nil {
			return nil, err
		}
		info.Name = profile.Title(n)
		out = append(out, info)
	}
	return out, nil
}

// ImportProfile keeps a profile that comes from a file: one of varve's, a list of
// paths, or what stargz-snapshotter records.
func (d *Daemon) ImportProfile(ctx context.Context, o ProfileOptions, n note) (*ProfileInfo, error) {
	raw, err := unpackProfile(o.File)
	if err != nil {
		return nil, fmt.Errorf("%w%w", err, silent{errUsage})
	}
	var p *profile.Profile
	var paths *commit.Profile
	if profile.Is(raw) {
		p, err = profile.Decode(raw)
	} else {
		paths, err = commit.ParseProfile(bytes.NewReader(raw))
	}
	if err != nil {
		return nil, fmt.Errorf("%w%w", err, silent{errUsage})
	}
	r, err := d.profileImage(ctx, &o)
	if err != nil {
		return nil, err
	}
	t, err := r.tree(ctx, n, false)
	if err != nil {
		return nil, err
	}
	defer t.close()
	layers := profileLayers(t)
	if p != nil {
		if err := p.Check(t.manifest.Digest.String(), layers); err != nil {
			return nil, fmt.Errorf("%s: %w%w", r.name.Familiar(), err, silent{errUsage})
		}
		p.Name = o.Name
		return d.takeProfile(r, p)
	}
	p = &profile.Profile{Manifest: t.manifest.Digest.String(), Name: o.Name, Created: time.Now(), Layers: layers}
	names := paths.Paths()
	var missing int
	if p.Uses, missing = t.profileOfPaths(names); len(p.Uses) == 0 {
		return nil, fmt.Errorf("%s has none of the %d paths as a file with contents%w", r.name.Familiar(), len(names), silent{errUsage})
	}
	if missing > 0 {
		n.warn("%d of %d paths are no files of %s", missing, len(names), r.name.Familiar())
	}
	return d.takeProfile(r, p)
}

// unpackProfile undoes [PackProfile].
func unpackProfile(packed []byte) ([]byte, error) {
	const most = 64 << 20 // as of the paths of a conversion
	z, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return nil, fmt.Errorf("profile: %w", err)
	}
	raw, err := io.ReadAll(io.LimitReader(z, most+1))
	if err == nil && len(raw) > most {
		err = errors.New("it is too large")
	}
	if err != nil {
		return nil, fmt.Errorf("profile: %w", err)
	}
	return raw, nil
}
