// Package snapshotter is containerd's snapshotter over images that are mounted
// lazily. What containerd unpacks, builds and runs in lies as its own overlayfs
// snapshotter lays it; layers of images that can be mounted are remote snapshots,
// which have nothing here but their names, and a whole chain of those is one lower
// directory.
package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/errdefs"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/varvefs/varve/daemon"
)

// Images has the images that remote snapshots are of, as [daemon.Chains] does. Its
// methods may be called from any goroutine.
type Images interface {
	// Layers has every layer of an image opened and gives them, the lowest first. An
	// error is why the image cannot be mounted.
	Layers(context.Context, daemon.ImageRef) ([]daemon.LayerID, error)
	// Mount has a chain mounted as one directory and gives that. It stays the same
	// mount until Unmount.
	Mount(context.Context, daemon.Chain) (dir string, err error)
	// Unmount takes away all chains that are mounted but for these.
	Unmount(context.Context, map[daemon.Chain]bool) error
	// Usage gives what a chain's highest layer takes on this machine's disk.
	Usage(context.Context, daemon.Chain) (bytes int64, err error)
	// Forget deletes what is kept of a chain's highest layer, unless one of those
	// that are left needs it, or anybody else.
	Forget(ctx context.Context, gone daemon.Chain, left []daemon.Chain) error
	// Sweep deletes what came for snapshots, of pulls that were given up, and none of
	// those that are left needs, nor anybody else. It says whether some of it is still in
	// use, so that it is worth another try.
	Sweep(ctx context.Context, left []daemon.Chain) (again bool, err error)
}

// Config is what a Snapshotter is made of. All of it is needed but Linger.
type Config struct {
	Root   string // a directory of its own
	Images Images
	Log    *slog.Logger
	Fell   prometheus.Counter // layers that were not lazy
	// Linger is how long a chain stays mounted at most after its last container; 0 for
	// ten minutes.
	Linger time.Duration
}

// Snapshotter is a [snapshots.Snapshotter].
type Snapshotter struct {
	local  snapshots.Snapshotter // containerd's, of everything that lies here
	meta   *storage.MetaStore    // which both use
	root   string
	images Images
	log    *slog.Logger
	fell   prometheus.Counter
	linger time.Duration

	mu     sync.Mutex           // guards what follows; held while chains are taken away
	coming map[daemon.Chain]int // on which snapshots are being made
	idle   *time.Timer
	closed bool
}

// New opens the snapshotter whose state lies in a directory, or makes it.
func New(c Config) (*Snapshotter, error) {
	if err := os.MkdirAll(c.Root, 0o700); err != nil {
		return nil, err
	}
	meta, err := storage.NewMetaStore(filepath.Join(c.Root, "metadata.db"))
	if err != nil {
		return nil, err
	}
	local, err := overlay.NewSnapshotter(c.Root, overlay.WithMetaStore(meta))
	if err != nil {
		meta.Close()
		return nil, fmt.Errorf("snapshotter: %w", err)
	}
	s := &Snapshotter{local: local, meta: meta, root: c.Root, images: c.Images, log: c.Log, fell: c.Fell, linger: c.Linger, coming: map[daemon.Chain]int{}}
	if s.linger == 0 {
		s.linger = 10 * time.Minute
	}
	s.rest() // what was mounted when an earlier one ended may have no container any more
	return s, nil
}

// Stat describes a snapshot.
func (s *Snapshotter) Stat(ctx context.Context, key string) (snapshots.Info, error) {
	return s.local.Stat(ctx, key)
}

// Update changes a snapshot's labels.
func (s *Snapshotter) Update(ctx context.Context, info snapshots.Info, fieldpaths ...string) (snapshots.Info, error) {
	return s.local.Update(ctx, info, fieldpaths...)
}

// Walk calls fn for every snapshot that fits the filters.
func (s *Snapshotter) Walk(ctx context.Context, fn snapshots.WalkFunc, filters ...string) error {
	return s.local.Walk(ctx, fn, filters...)
}

// Usage says what a snapshot takes on the disk: of a remote one that is what was
// fetched of its layer.
func (s *Snapshotter) Usage(ctx context.Context, key string) (snapshots.Usage, error) {
	c, err := s.chain(ctx, key)
	if err != nil || c == nil {
		if err == nil || errdefs.IsNotFound(err) {
			return s.local.Usage(ctx, key)
		}
		return snapshots.Usage{}, err
	}
	n, err := s.images.Usage(ctx, *c)
	return snapshots.Usage{Size: n}, err
}

// Prepare makes a snapshot that can be written. Where it is to become a layer of an
// image that can be mounted, there is nothing to write: the layer's snapshot is made
// at once, and [errdefs.ErrAlreadyExists] says so, as containerd has it of remote
// snapshots.
func (s *Snapshotter) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	done, err := s.prepareRemote(ctx, key, parent, opts)
	if err != nil {
		return nil, err
	}
	if done {
		return nil, fmt.Errorf("layer of %s is mounted lazily: %w", key, errdefs.ErrAlreadyExists)
	}
	return s.make(ctx, key, parent, s.local.Prepare, opts)
}

// View makes a snapshot that can only be read.
func (s *Snapshotter) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return s.make(ctx, key, parent, s.local.View, opts)
}

type maker func(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error)

// make makes a snapshot with what it lies on mounted. One that cannot be mounted is
// not made.
func (s *Snapshotter) make(ctx context.Context, key, parent string, make maker, opts []snapshots.Opt) ([]mount.Mount, error) {
	l, err := s.lower(ctx, parent)
	if err != nil {
		return nil, err
	}
	defer l.release()
	mounts, err := make(ctx, key, parent, opts...)
	if err != nil {
		s.rest() // nobody may lie on it
		return nil, err
	}
	return l.below(ctx, key, mounts)
}

// Mounts gives the mounts of a snapshot that was made, what it lies on mounted anew
// where it is not any more.
func (s *Snapshotter) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	mounts, err := s.local.Mounts(ctx, key)
	if err != nil {
		return nil, err
	}
	info, err := s.local.Stat(ctx, key)
	if err != nil {
		return nil, err
	}
	l, err := s.lower(ctx, info.Parent)
	if err != nil {
		return nil, err
	}
	defer l.release()
	return l.below(ctx, key, mounts)
}

// Commit makes what was written a layer of its own.
func (s *Snapshotter) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	if err := s.local.Commit(ctx, name, key, opts...); err != nil {
		return err
	}
	s.rest()
	return nil
}

// Remove deletes a snapshot on which no other lies. What was fetched of its layer
// goes with it, unless somebody else needs it.
func (s *Snapshotter) Remove(ctx context.Context, key string) error {
	gone, err := s.chain(ctx, key)
	if errors.Is(err, errDamaged) {
		s.log.Warn("what was fetched of a layer stays", "snapshot", key, "err", err)
	} else if err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	if err := s.local.Remove(ctx, key); err != nil {
		return err
	}
	s.rest()
	if gone == nil {
		return nil
	}
	left, err := s.unmountIdle(ctx, true)
	if err == nil {
		err = s.images.Forget(ctx, *gone, left)
	}
	if err != nil { // the snapshot is gone all the same
		s.log.Warn("what was fetched of a layer stays", "image", gone.Name, "layer", gone.Layers, "err", err)
	}
	return nil
}

// Cleanup deletes what removed snapshots have left.
func (s *Snapshotter) Cleanup(ctx context.Context) error {
	if c, ok := s.local.(snapshots.Cleaner); ok {
		return c.Cleanup(ctx)
	}
	return nil
}

// Close ends the snapshotter. What it has mounted stays mounted.
func (s *Snapshotter) Close() error {
	s.mu.Lock()
	s.closed = true
	if s.idle != nil {
		s.idle.Stop()
	}
	s.mu.Unlock()
	return s.local.Close()
}
