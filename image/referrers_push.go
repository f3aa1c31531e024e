package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

// blobsAtOnce is how many blobs of a referrer are on their way at a time.
const blobsAtOnce = 4

// PushReferrer puts a manifest that refers to subject, which need not be there,
// into n's repository. The manifest is an OCI image manifest whose subject field
// names it; blobs are those that it names and the repository may not have yet,
// in memory. What is there already is not sent again. A registry without the
// referrers API gets the manifest into the index of the fallback tag too, beside
// what others put there.
//
// The place is that of [Registries.Endpoint]. ErrRefused is a registry that does
// not take such a manifest, or blobs so large.
func (r *Registries) PushReferrer(ctx context.Context, n Name, o Options, subject digest.Digest, manifest []byte, blobs [][]byte) (Referrer, error) {
	ref, bodies, err := checkReferrer(subject, manifest, blobs)
	if err != nil {
		return Referrer{}, failf(ErrMalformed, err, "push referrer: %s", err)
	}
	l, err := r.pushLine(n, o, "pull,push", "push referrer to "+n.FamiliarRepository()+"@"+subject.String())
	if err != nil {
		return Referrer{}, err
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(blobsAtOnce)
	for d, b := range bodies {
		g.Go(func() error { return l.putBlob(gctx, d, b) })
	}
	if err := g.Wait(); err != nil {
		return Referrer{}, l.failed(err)
	}
	a, err := l.putManifest(ctx, ref.Digest.String(), ref.MediaType, manifest, "")
	if err == nil {
		err = l.sameDigest(a, ref.Digest)
	}
	if err != nil {
		return Referrer{}, l.failed(err)
	}
	if a.head.Get("OCI-Subject") != "" {
		r.listing.set(l.host, byAPI)
		return ref, nil
	}
	_, err = l.editTag(ctx, &r.listing, subject, ref.Digest, &ocispec.Descriptor{
		MediaType: ref.MediaType, Digest: ref.Digest, Size: ref.Size, ArtifactType: ref.ArtifactType, Annotations: ref.Annotations,
	})
	if err = l.failed(err); err != nil {
		return Referrer{}, failf(kindOf(err), err, "%s: it is there as %s, but not listed: %s", l.doing, ref.Digest, tail(err, l.doing))
	}
	return ref, nil
}

// DeleteReferrer takes a manifest that refers to subject out of n's repository,
// and before that out of the index of the fallback tag, if it is there.
// ErrRefused is a registry that deletes nothing; the manifest is then no longer
// in that index all the same.
func (r *Registries) DeleteReferrer(ctx context.Context, n Name, o Options, subject, d digest.Digest) error {
	for _, d := range []digest.Digest{subject, d} {
		if err := checkSHA256(d); err != nil {
			return about(n, err)
		}
	}
	// Distribution's tokens have an action of its own for it.
	l, err := r.pushLine(n, o, "pull,push,delete", "delete referrer "+d.String()+" of "+n.FamiliarRepository()+"@"+subject.String())
	if err != nil {
		return err
	}
	unlisted, err := l.editTag(ctx, &r.listing, subject, d, nil)
	if err != nil {
		return l.failed(err)
	}
	_, err = l.again(ctx, func() (*reply, error) {
		return l.once(ctx, call{
			method: http.MethodDelete, url: l.at("manifests/" + d.String()),
			codes: []int{http.StatusAccepted, http.StatusOK, http.StatusNoContent},
		})
	})
	var answer *transport.Error
	if !errors.As(err, &answer) {
		return l.failed(err)
	}
	switch code := answer.StatusCode; {
	case code == http.StatusNotFound && unlisted:
		return nil
	case code == http.StatusMethodNotAllowed, code == http.StatusNotImplemented, slices.Contains(codesOf(err), string(transport.UnsupportedErrorCode)):
		stays := "it stays"
		if unlisted {
			stays = "it is no longer listed, but its bytes stay"
		}
		return failf(ErrRefused, err, "%s: %s does not delete manifests (%s); %s until its operator allows that", l.doing, l.host.addr, answerText(answer), stays)
	}
	return l.failed(err)
}

// pushLine gives the line to where n is pushed to.
func (r *Registries) pushLine(n Name, o Options, actions, doing string) (*line, error) {
	if err := checkRemote(n); err != nil {
		return nil, failf(ErrMalformed, err, "%s: %s", doing, err)
	}
	s, err := r.pushSession(n, o, nil)
	if err != nil {
		return nil, err
	}
	if scope := scopeOf(n.repo, actions); !slices.Contains(s.scopes, scope) {
		if s, err = r.session(n, s.host, o, []string{scope}); err != nil {
			return nil, err
		}
	}
	return &line{session: s, wait: r.wait, repo: n.repo, doing: doing}, nil
}

// checkReferrer reads a manifest to be pushed, and gives the blobs by digest.
func checkReferrer(subject digest.Digest, manifest []byte, blobs [][]byte) (Referrer, map[digest.Digest][]byte, error) {
	var m ocispec.Manifest
	if err := checkSHA256(subject); err != nil {
		return Referrer{}, nil, err
	}
	if len(manifest) > MaxManifest {
		return Referrer{}, nil, malformed("manifest of %d bytes, the limit is %d", len(manifest), MaxManifest)
	}
	if err := json.Unmarshal(manifest, &m); err != nil {
		return Referrer{}, nil, fmt.Errorf("manifest: %w", err)
	}
	switch {
	case m.MediaType != ocispec.MediaTypeImageManifest || m.SchemaVersion != 2:
		return Referrer{}, nil, malformed("not an OCI image manifest but %q", clip(m.MediaType))
	case m.Subject == nil || m.Subject.Digest != subject:
		return Referrer{}, nil, malformed("the manifest's subject is not %s", subject)
	}
	ref := Referrer{
		Digest: digest.FromBytes(manifest), Size: int64(len(manifest)),
		MediaType: m.MediaType, ArtifactType: m.ArtifactType, Annotations: m.Annotations,
	}
	if ref.ArtifactType == "" {
		ref.ArtifactType = m.Config.MediaType
	}
	sizes := map[digest.Digest]int64{m.Config.Digest: m.Config.Size}
	for _, l := range m.Layers {
		sizes[l.Digest] = l.Size
	}
	bodies := map[digest.Digest][]byte{}
	for i, b := range blobs {
		d := digest.FromBytes(b)
		if size, ok := sizes[d]; !ok || size != int64(len(b)) {
			return Referrer{}, nil, malformed("blob %d (%s, %d bytes) is not in the manifest", i+1, d, len(b))
		}
		bodies[d] = b
	}
	return ref, bodies, nil
}

// putBlob sends a blob that is not there yet. Before another attempt it is asked
// for again: only the answer may have been lost.
func (l *line) putBlob(ctx context.Context, d digest.Digest, b []byte) error {
	there := func() (*reply, error) {
		a, err := l.once(ctx, call{method: http.MethodHead, url: l.at("blobs/" + d.String())})
		if err != nil {
			return a, err
		}
		return a, l.sameDigest(a, d)
	}
	// Whoever may not answer that, or cannot, is asked to take it: that counts.
	if a, err := l.again(ctx, there); err == nil || a == nil || passing(err) || errors.Is(err, ErrMalformed) {
		return err
	}
	first := true
	_, err := l.again(ctx, func() (*reply, error) {
		if !first {
			if a, err := there(); err == nil {
				return a, nil
			}
		}
		first = false
		return l.upload(ctx, d, b)
	})
	return err
}

// upload sends a blob once, in one piece.
func (l *line) upload(ctx context.Context, d digest.Digest, b []byte) (*reply, error) {
	a, err := l.once(ctx, call{method: http.MethodPost, url: l.at("blobs/uploads/"), codes: []int{http.StatusAccepted}})
	if err != nil {
		return a, err
	}
	u, err := l.reference(a, a.head.Get("Location"))
	if err != nil {
		return nil, err
	}
	// Appended, as the query may be signed in the order it has.
	if u.RawQuery != "" {
		u.RawQuery += "&"
	}
	u.RawQuery += "digest=" + url.QueryEscape(d.String())
	a, err = l.once(ctx, call{
		method: http.MethodPut, url: u, body: b, codes: []int{http.StatusCreated},
		head: http.Header{"Content-Type": {"application/octet-stream"}},
	})
	if err != nil {
		return a, err
	}
	return a, l.sameDigest(a, d)
}

// putManifest writes a manifest, or an index, under a tag or digest. With an
// etag it does so only if the tag is still what was read.
func (l *line) putManifest(ctx context.Context, id, mediaType string, raw []byte, etag string) (*reply, error) {
	head := http.Header{"Content-Type": {mediaType}}
	if etag != "" {
		head.Set("If-Match", etag)
	}
	return l.again(ctx, func() (*reply, error) {
		return l.once(ctx, call{
			method: http.MethodPut, url: l.at("manifests/" + id), head: head, body: raw,
			codes: []int{http.StatusCreated, http.StatusOK, http.StatusAccepted},
		})
	})
}

// editTag puts an entry into the index of subject's fallback tag, or with a nil
// entry takes d out of it, and reports whether it changed. Another's change in
// between is noticed by its ETag, where the registry has such, and gone along
// with once.
func (l *line) editTag(ctx context.Context, known *listings, subject, d digest.Digest, entry *ocispec.Descriptor) (bool, error) {
	tag := fallbackTag(subject)
	release, err := known.hold(ctx, l.host.addr+"/"+l.repo+":"+tag)
	if err != nil {
		return false, err
	}
	defer release()
	for try := 1; ; try++ {
		raw, etag, err := l.readTag(ctx, subject, tag)
		if err != nil {
			return false, err
		}
		changed, err := editIndex(raw, d, entry)
		if errors.Is(err, errUnchanged) {
			return false, nil
		}
		if err != nil {
			return false, failf(ErrMalformed, err, "tag %s: %s", tag, err)
		}
		a, err := l.putManifest(ctx, tag, ocispec.MediaTypeImageIndex, changed, etag)
		switch {
		case err == nil:
			return true, l.sameDigest(a, digest.FromBytes(changed))
		case a == nil || a.code != http.StatusPreconditionFailed:
			return false, err
		case try == 2:
			return false, failf(ErrRefused, err, "tag %s is being changed by others, try again", tag)
		}
	}
}

// readTag gives the index that a fallback tag names, nil if there is none.
func (l *line) readTag(ctx context.Context, subject digest.Digest, tag string) (raw []byte, etag string, err error) {
	a, err := l.again(ctx, func() (*reply, error) {
		return l.once(ctx, call{method: http.MethodGet, url: l.at("manifests/" + tag), head: acceptIndex(), most: MaxManifest})
	})
	switch {
	case a != nil && a.code == http.StatusNotFound:
		return nil, "", nil
	case err != nil:
		return nil, "", err
	case digest.FromBytes(a.body) == subject:
		return nil, "", nil // as in lister.tag
	}
	// A weak one never matches (RFC 9110, 13.1.1).
	if etag = a.head.Get("ETag"); strings.HasPrefix(etag, "W/") {
		etag = ""
	}
	return a.body, etag, nil
}

// kindOf is the kind of an error.
func kindOf(err error) error {
	for _, k := range []error{ErrRefused, ErrUnauthorized, ErrNotFound, ErrUnreachable} {
		if errors.Is(err, k) {
			return k
		}
	}
	return ErrMalformed
}

// tail is an error's text without what it begins with.
func tail(err error, doing string) string { return strings.TrimPrefix(err.Error(), doing+": ") }
