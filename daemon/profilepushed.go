package daemon

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/varvefs/varve/fetch/profile"
	"github.com/varvefs/varve/image"
)

// A pushed profile is a referrer of the image: an OCI manifest whose only layer is
// the profile. A small one stands in an annotation as well, which the list of
// referrers repeats: then the list, which is asked for beside the layers' tables of
// contents, brings it.
//
// What a list says is not proven by a digest. It need not be: a profile says only
// in what order bytes are fetched, each of which is verified.
const (
	profileType      = "application/vnd.varve.profile.v1"
	profileLayerType = "application/vnd.varve.profile.v1+gzip"
	profileInline    = "dev.varve.profile"      // base64
	profileName      = "dev.varve.profile.name" // of the workload, "default" for the image's own

	maxInline = 24 << 10 // bytes of a profile that stands in an annotation
	maxTried  = 4        // pushed profiles that are looked into
)

// pushedProfiles gives the profiles that an image has in its registry, of one
// workload or, with all, of any; the newest first.
func (r *resolved) pushedProfiles(name string, all bool) ([]image.Referrer, error) {
	refs, err := r.referrers()
	var out []image.Referrer
	for _, ref := range refs {
		is, nerr := profile.ParseName(ref.Annotations[profileName])
		if ref.ArtifactType == profileType && nerr == nil && (all || is == name) {
			out = append(out, ref)
		}
	}
	slices.SortStableFunc(out, func(a, b image.Referrer) int { return created(b).Compare(created(a)) })
	return out, err
}

func created(ref image.Referrer) time.Time {
	t, _ := time.Parse(time.RFC3339, ref.Annotations[ocispec.AnnotationCreated])
	return t
}

// pushedProfile gives the newest profile of a workload that is the image's, nil if
// there is none.
func (r *resolved) pushedProfile(ctx context.Context, name string) (*profile.Profile, error) {
	refs, err := r.pushedProfiles(name, false)
	if err != nil {
		return nil, err
	}
	layers := make([]profile.Layer, len(r.manifest.Layers))
	for i, l := range r.manifest.Layers {
		layers[i].Digest = l.Digest.String()
	}
	for _, ref := range refs[:min(len(refs), maxTried)] {
		p, err := r.readPushed(ctx, ref)
		if err == nil {
			err = p.Check(r.manifest.Digest.String(), layers)
		}
		if err == nil {
			p.Name = name
			return p, nil
		}
		if ctx.Err() != nil {
			return nil, err
		}
		r.d.log.Warn("pushed start-up profile not used", "image", r.name.Familiar(), "digest", ref.Digest, "err", err)
	}
	return nil, nil
}

func (r *resolved) readPushed(ctx context.Context, ref image.Referrer) (*profile.Profile, error) {
	if text := ref.Annotations[profileInline]; text != "" && len(text) <= base64.StdEncoding.EncodedLen(maxInline) {
		raw, err := base64.StdEncoding.DecodeString(text)
		if err == nil {
			var p *profile.Profile
			if p, err = profile.Decode(raw); err == nil {
				return p, nil
			}
		}
		r.d.log.Warn("start-up profile in a list of referrers not used", "image", r.name.Familiar(), "digest", ref.Digest, "err", err)
	}
	o := r.d.imageOptions(r.o)
	raw, err := r.d.registries.FetchManifest(ctx, r.name, o, ref.Digest, ocispec.MediaTypeImageManifest, image.MaxManifest)
	if err != nil {
		return nil, err
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return nil, fmt.Errorf("%w: %w", profile.ErrMalformed, err)
	}
	if m.Subject == nil || m.Subject.Digest != r.manifest.Digest {
		return nil, fmt.Errorf("%w: its subject is another", profile.ErrForeign)
	}
	if len(m.Layers) != 1 || m.Layers[0].MediaType != profileLayerType || m.Layers[0].Size < 0 || m.Layers[0].Size > profile.MaxBytes {
		return nil, fmt.Errorf("%w: not one layer of type %s and at most %d bytes", profile.ErrMalformed, profileLayerType, profile.MaxBytes)
	}
	if raw, err = r.d.registries.FetchBlob(ctx, r.name, o, m.Layers[0].Digest, m.Layers[0].Size); err != nil {
		return nil, err
	}
	return profile.Decode(raw)
}

// unpushed remembers for a while which workloads have no profile in their image's
// registry, so that mounts one after another do not ask each. The zero value is empty.
type unpushed struct {
	mu    sync.Mutex           // guards what follows
	until map[string]time.Time // by manifest and name
}

const (
	unpushedTime = time.Hour
	maxUnpushed  = 4096
)

// pushedOnce is pushedProfile for mounts. An image that is to be asked for anew is
// asked for its profiles as well.
func (d *Daemon) pushedOnce(ctx context.Context, r *resolved, name string) (*profile.Profile, error) {
	key := r.manifest.Digest.String() + " " + r.name.FamiliarRepository() + " " + name
	u := &d.unpushed
	u.mu.Lock()
	known := time.Now().Before(u.until[key]) && r.o.Pull != "always"
	u.mu.Unlock()
	if known {
		return nil, nil
	}
	p, err := r.pushedProfile(ctx, name)
	if p == nil && err == nil {
		u.mu.Lock()
		defer u.mu.Unlock()
		if u.until == nil || len(u.until) >= maxUnpushed {
			u.until = map[string]time.Time{}
		}
		u.until[key] = time.Now().Add(unpushedTime)
	}
	return p, err
}

// pushProfile puts a profile beside its image, in the place of what the workload
// had there, as far as the registry deletes anything.
func (r *resolved) pushProfile(ctx context.Context, p *profile.Profile) (image.Referrer, error) {
	raw, err := p.Encode()
	if err != nil {
		return image.Referrer{}, err
	}
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, ArtifactType: profileType,
		Config:  ocispec.DescriptorEmptyJSON,
		Subject: &ocispec.Descriptor{MediaType: r.manifest.MediaType, Digest: r.manifest.Digest, Size: int64(len(r.manifest.Raw))},
		Layers:  []ocispec.Descriptor{{MediaType: profileLayerType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}},
		Annotations: map[string]string{
			profileName: profile.Title(p.Name), ocispec.AnnotationCreated: p.Created.UTC().Format(time.RFC3339),
		},
	}
	m.Config.MediaType = profileType // which some registries list as the artifact's type
	if len(raw) <= maxInline {
		m.Annotations[profileInline] = base64.StdEncoding.EncodeToString(raw)
	}
	doc, err := json.Marshal(m)
	if err != nil {
		return image.Referrer{}, err
	}
	o := r.d.imageOptions(r.o)
	ref, err := r.d.registries.PushReferrer(ctx, r.name, o, r.manifest.Digest, doc, [][]byte{[]byte("{}"), raw})
	if err != nil {
		return ref, err
	}
	old, err := r.pushedProfiles(p.Name, false)
	if err != nil {
		r.d.log.Warn("older start-up profiles stay", "image", r.name.Familiar(), "err", err)
	}
	for _, was := range old {
		if was.Digest == ref.Digest {
			continue
		}
		if err := r.d.registries.DeleteReferrer(ctx, r.name, o, r.manifest.Digest, was.Digest); err != nil {
			r.d.log.Info("an older start-up profile stays", "image", r.name.Familiar(), "digest", was.Digest, "err", strings.TrimSpace(err.Error()))
		}
	}
	return ref, nil
}
