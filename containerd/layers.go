package containerd

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"sync"
	"time"

	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/varvefs/varve/image"
)

// unpacking makes the snapshots of an image's layers.
type unpacking struct {
	*Client
	*parsed
	Options
	chain []digest.Digest // chain IDs, by layer

	mu sync.Mutex // held while Status is called
}

// active is a snapshot into which a layer is to be unpacked.
type active struct {
	key    string
	mounts []mount.Mount
	labels snapshots.Opt
}

// all makes the snapshots of all layers, the lowest first, and gives those layers
// that the snapshotter has not taken, which were fetched and unpacked, and on which
// they lie.
func (u *unpacking) all(ctx context.Context) (unpacked []string, on string, err error) {
	for i, l := range u.manifest.Layers {
		a, err := u.prepare(ctx, i)
		if err != nil {
			return nil, "", err
		}
		if a != nil { // nor will it take what lies above
			unpacked, err = u.unpack(ctx, i, a)
			return unpacked, on, err
		}
		on = l.Digest.String()
	}
	return nil, "", nil
}

// tries is how often a snapshot is asked for that is said to be there and is not:
// somebody removes it just then.
const tries = 3

// prepare has the snapshot of layer i made. It gives nil if that is there, because
// the snapshotter can do without the layer's bytes or because it was made before.
func (u *unpacking) prepare(ctx context.Context, i int) (*active, error) {
	id, parent := u.chain[i].String(), ""
	if i > 0 {
		parent = u.chain[i-1].String()
	}
	var err error
	for range tries {
		// The form of the key is that by which clients know what it is for.
		a := &active{key: fmt.Sprintf(snapshots.UnpackKeyFormat, rand.Text(), id), labels: snapshots.WithLabels(u.labels(i))}
		if a.mounts, err = u.snapshots.Prepare(ctx, a.key, parent, a.labels); err == nil {
			return a, nil
		}
		if !errdefs.IsAlreadyExists(err) {
			break
		}
		if _, err = u.snapshots.Stat(ctx, id); err == nil {
			return nil, nil
		}
		if !errdefs.IsNotFound(err) {
			break
		}
	}
	return nil, fmt.Errorf("snapshot of layer %s: %w", u.manifest.Layers[i].Digest, err)
}

// labels are what CRI tells a snapshotter of layer i.
func (u *unpacking) labels(i int) map[string]string {
	ls := map[string]string{
		snapshots.LabelSnapshotRef:    u.chain[i].String(),
		snapshots.LabelSnapshotDiffID: u.diffIDs[i].String(),
	}
	if !u.NotLazy {
		ls[snapshotters.TargetRefLabel] = u.name.String()
		ls[snapshotters.TargetManifestDigestLabel] = u.manifest.Digest.String()
		ls[snapshotters.TargetLayerDigestLabel] = u.manifest.Layers[i].Digest.String()
		ls[snapshotters.TargetImageLayersLabel] = listLayers(u.manifest.Layers[i:])
	}
	return ls
}

// listLayers names the layers, as many as a label has room for.
func listLayers(ls []image.Layer) (list string) {
	for _, l := range ls {
		longer := l.Digest.String()
		if list != "" {
			longer = list + "," + longer
		}
		if labels.Validate(snapshotters.TargetImageLayersLabel, longer) != nil {
			break
		}
		list = longer
	}
	return list
}

// unpack fetches the layers from one on, several at a time, and unpacks them, one
// after the other. Of the first, the snapshot is prepared.
func (u *unpacking) unpack(ctx context.Context, first int, a *active) ([]string, error) {
	eg, ctx := errgroup.WithContext(ctx)
	fetched := make([]chan error, len(u.chain))
	for i := range fetched {
		fetched[i] = make(chan error, 1)
	}
	eg.Go(func() error {
		feg, ctx := errgroup.WithContext(ctx)
		feg.SetLimit(atOnce)
		for i := first; i < len(fetched); i++ {
			feg.Go(func() error {
				err := u.fetch(ctx, i)
				fetched[i] <- err
				return err
			})
		}
		return feg.Wait()
	})
	var unpacked []string
	eg.Go(func() error {
		for i := first; i < len(fetched); i++ {
			var err error
			if i > first {
				if a, err = u.prepare(ctx, i); err != nil {
					return err
				}
			}
			err = <-fetched[i]
			if a == nil && err == nil { // another pull was faster
				continue
			}
			if err == nil {
				err = u.apply(ctx, i, a)
			}
			if err != nil {
				u.drop(ctx, a)
				return err
			}
			unpacked = append(unpacked, u.manifest.Layers[i].Digest.String())
		}
		return nil
	})
	err := eg.Wait()
	return unpacked, err
}

// atOnce is how many layers are fetched side by side: docker's number.
const atOnce = 3

// fetch puts a layer's blob into the content store.
func (u *unpacking) fetch(ctx context.Context, i int) error {
	d := u.layer(i)
	id := d.Digest.String()
	u.status(id, "Pulling fs layer", 0, 0)
	_, err := u.write(ctx, d, content.WithLabels(nil), func(off int64, w io.Writer) error {
		c := &counted{w: w, n: off, tell: func(n int64) { u.status(id, "Downloading", n, d.Size) }}
		return u.Fetch(ctx, id, off, c)
	})
	if err == nil {
		err = u.source(ctx, u.name, d.Digest)
	}
	if err != nil {
		return fmt.Errorf("fetch layer %s: %w", id, err)
	}
	u.status(id, "Download complete", 0, 0)
	return nil
}

// apply has containerd unpack a layer whose blob it has, and makes its snapshot.
func (u *unpacking) apply(ctx context.Context, i int, a *active) error {
	d := u.layer(i)
	id := d.Digest.String()
	fail := func(err error) error { return fmt.Errorf("unpack layer %s: %w", id, err) }
	u.status(id, "Extracting", 0, 0)
	r, err := u.diff.Apply(ctx, &diffapi.ApplyRequest{
		Diff:   &types.Descriptor{MediaType: d.MediaType, Digest: id, Size: d.Size, Annotations: d.Annotations},
		Mounts: mount.ToProto(a.mounts),
	})
	if err != nil {
		return fail(plain(err))
	}
	if got := r.GetApplied().GetDigest(); got != u.diffIDs[i].String() {
		return fail(fmt.Errorf("its contents are %s, and not %s as the image's config says", got, u.diffIDs[i]))
	}
	err = u.snapshots.Commit(ctx, u.chain[i].String(), a.key, a.labels)
	if errdefs.IsAlreadyExists(err) { // another pull was faster
		u.drop(ctx, a)
		err = nil
	}
	if err == nil {
		err = u.label(ctx, d.Digest, labels.LabelUncompressed, u.diffIDs[i].String())
	}
	if err != nil {
		return fail(err)
	}
	u.status(id, "Pull complete", 0, 0)
	return nil
}

// drop removes a snapshot that comes to nothing, if there is one. What fails to be
// removed is collected after the lease.
func (u *unpacking) drop(ctx context.Context, a *active) {
	if a == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lag)
	defer cancel()
	u.snapshots.Remove(ctx, a.key)
}

func (u *unpacking) status(layer, status string, done, total int64) {
	if u.Status == nil {
		return
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.Status(layer, status, done, total)
}

// beat is how often is told how far something is.
const beat = 100 * time.Millisecond

// counted tells how many bytes were written.
type counted struct {
	w    io.Writer
	n    int64
	tell func(n int64)
	told time.Time
}

func (c *counted) Write(b []byte) (int, error) {
	n, err := c.w.Write(b)
	c.n += int64(n)
	if now := time.Now(); now.Sub(c.told) > beat {
		c.told = now
		c.tell(c.n)
	}
	return n, err
}
