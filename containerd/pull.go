package containerd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/opencontainers/image-spec/identity"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Options are what a pull has beside its image. Fetch is needed.
type Options struct {
	// Fetch writes a layer's blob from an offset to its end: of layers that are not
	// lazy. It may be called from several goroutines.
	Fetch func(ctx context.Context, layer string, off int64, w io.Writer) error
	// NotLazy is for an image that the snapshotter could not make lazy: it is not told
	// which image it is.
	NotLazy bool
	// Status is told of what is done with layers that are not lazy, by their digests
	// and in docker's words; total is 0 where nothing is counted. It may be nil, and
	// is called by one goroutine at a time.
	Status func(layer, status string, done, total int64)
}

// Pulled is what came of a pull.
type Pulled struct {
	Familiar string   // the image's name as docker shows it
	Changed  bool     // the name was not there, or stood for something else
	Layers   int      // that the image has
	Unpacked []string // digests of the layers that were fetched and unpacked, the lowest first
	On       string   // digest of the layer that those lie on, which was there; "" if they lie on none
}

// leaseFor is how long what a pull has made is safe from the garbage collector if the
// pull is killed: containerd's clients' own time.
const leaseFor = 24 * time.Hour

// lag is how long is taken for tidying up.
const lag = 10 * time.Second

// Pull puts an image into containerd under its name. A pull that breaks leaves
// nothing that containerd's garbage collector does not take; one that is repeated
// goes on with what is there.
func (c *Client) Pull(ctx context.Context, im Image, o Options) (out Pulled, err error) {
	p, err := im.parse()
	if err != nil {
		return out, fmt.Errorf("image %s: %w", im.Name, err)
	}
	out.Familiar, out.Layers = p.name.Familiar(), len(p.diffIDs)
	defer func() {
		if err != nil && ctx.Err() != nil && !errors.Is(err, ctx.Err()) { // gRPC's own word for it
			err = fmt.Errorf("%w: %w", ctx.Err(), err)
		}
	}()
	ctx = namespaces.WithNamespace(ctx, c.Namespace)
	lease, err := c.leases.Create(ctx, leases.WithRandomID(), leases.WithExpiration(leaseFor))
	if err != nil {
		return out, fmt.Errorf("containerd: lease: %w", err)
	}
	defer func() {
		tidy, cancel := context.WithTimeout(context.WithoutCancel(ctx), lag)
		defer cancel()
		if derr := c.leases.Delete(tidy, lease); derr != nil && err == nil {
			err = fmt.Errorf("containerd: lease: %w", derr)
		}
	}()
	leased := leases.WithLease(ctx, lease.ID)
	if err := c.putDocuments(leased, p); err != nil {
		return out, err
	}
	u := &unpacking{Client: c, parsed: p, Options: o, chain: identity.ChainIDs(slices.Clone(p.diffIDs))}
	if out.Unpacked, out.On, err = u.all(leased); err != nil {
		return out, err
	}
	if n := len(u.chain); n > 0 {
		err = c.label(leased, p.manifest.ConfigDesc.Digest, "containerd.io/gc.ref.snapshot."+c.Config.Snapshotter, u.chain[n-1].String())
	}
	if err == nil {
		out.Changed, err = c.setNames(leased, p)
	}
	return out, err
}

// plain gives a gRPC call's error without what gRPC says around it.
func plain(err error) error {
	s, ok := status.FromError(err)
	switch {
	case !ok || err == nil:
		return err
	case s.Code() == codes.Canceled:
		return context.Canceled
	}
	return errors.New(s.Message())
}
