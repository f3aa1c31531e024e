package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/varvefs/varve/daemon"
	"github.com/varvefs/varve/fetch"
)

// Copies of a corpus image, as tag plain, in repositories of their own: what refers
// to an image is found in its repository, so they differ in that.
const (
	repoUnindexed = "unindexed/" // nothing does
	repoIndexed   = "indexed/"   // both indexes that `varve index --push` makes
	repoSOCI      = "soci/"      // the one of these that is SOCI's
)

func (b *bench) reference(repo, tag string) (name.Reference, error) {
	return name.ParseReference(b.registry+"/"+repo+":"+tag, name.Insecure)
}

// copied makes sure that the registry holds the copy of an image in kind, one of
// the repositories above. Its blobs are not moved.
func (b *bench) copied(ctx context.Context, kind, image string) error {
	from, err := b.reference(image, tagPlain)
	if err != nil {
		return err
	}
	to, err := b.reference(kind+image, tagPlain)
	if err != nil {
		return err
	}
	img, err := remote.Image(from, remote.WithContext(ctx))
	if err != nil {
		return fmt.Errorf("read %s (%s): %w", from, needs, err)
	}
	digest, err := img.Digest()
	if err != nil {
		return err
	}
	if there, err := remote.Head(to, remote.WithContext(ctx)); err == nil && there.Digest == digest {
		return nil
	}
	if err := remote.Write(to, img, remote.WithContext(ctx)); err != nil {
		return fmt.Errorf("copy %s to %s: %w", from, to, err)
	}
	return nil
}

// indexed makes the indexes of a repository's image anew, as the varve under test
// does, and pushes them.
func (b *bench) indexed(ctx context.Context, repo string) (x *daemon.Indexed, err error) {
	s, err := b.fresh(ctx, "index")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.discard()) }()
	o := daemon.ImageOptions{Image: b.registry + "/" + repo + ":" + tagPlain, Insecure: true}
	if err := s.unindex(ctx, o); err != nil {
		return nil, err
	}
	return s.client.Index(ctx, daemon.IndexOptions{ImageOptions: o, Push: true})
}

// unindex deletes what indexes an image has.
func (s *server) unindex(ctx context.Context, o daemon.ImageOptions) error {
	there, err := s.client.Indexes(ctx, o)
	if err != nil || len(there) == 0 {
		return err
	}
	_, err = s.client.RemoveIndexes(ctx, daemon.IndexRemoval{ImageOptions: o})
	return err
}

// withSOCI copies an image, with the SOCI index alone of those that were pushed for
// its other copy.
func (b *bench) withSOCI(ctx context.Context, image string, x *daemon.Indexed) (err error) {
	if err := b.copied(ctx, repoSOCI, image); err != nil {
		return err
	}
	s, err := b.fresh(ctx, "index")
	if err != nil {
		return err
	}
	err = s.unindex(ctx, daemon.ImageOptions{Image: b.registry + "/" + repoSOCI + image + ":" + tagPlain, Insecure: true})
	if err = errors.Join(err, s.discard()); err != nil {
		return err
	}
	img, err := b.pushed(ctx, repoIndexed+image, x, fetch.KindSOCI)
	if err != nil {
		return err
	}
	digest, err := img.Digest()
	if err != nil {
		return err
	}
	to, err := name.NewRepository(b.registry+"/"+repoSOCI+image, name.Insecure)
	if err != nil {
		return err
	}
	if err := remote.Write(to.Digest(digest.String()), img, remote.WithContext(ctx)); err != nil {
		return fmt.Errorf("copy the SOCI index of %s: %w", image, err)
	}
	return nil
}

// pushed gives the index of a kind that was pushed for a repository's image.
func (b *bench) pushed(ctx context.Context, repo string, x *daemon.Indexed, kind string) (v1.Image, error) {
	for _, p := range x.Pushed {
		if p.Kind == kind {
			ref, err := name.NewDigest(b.registry+"/"+repo+"@"+p.Digest, name.Insecure)
			if err != nil {
				return nil, err
			}
			return remote.Image(ref, remote.WithContext(ctx))
		}
	}
	return nil, fmt.Errorf("no index of kind %s was pushed for %s", kind, repo)
}
