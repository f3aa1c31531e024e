package snapshotter

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/daemon"
)

// chainFile is in a remote snapshot's directory, and says which layers it stands
// for. Labels would not do: clients of containerd change those.
const chainFile = "image.json"

// remote is what chainFile holds.
type remote struct {
	daemon.Chain
	ID string `json:"chain"` // the chain ID of its layers
}

// maxLabel bounds a label, as containerd does, in bytes.
const maxLabel = 4096

// target says of which layer a snapshot is to become the snapshot, "" if of none
// that an image is named for.
func target(opts []snapshots.Opt) (name string, of daemon.ImageRef, layer string, all map[string]string) {
	var info snapshots.Info
	for _, o := range opts {
		if o(&info) != nil {
			return "", daemon.ImageRef{}, "", nil
		}
	}
	l := info.Labels
	of = daemon.ImageRef{Name: l[snapshotters.TargetRefLabel], Manifest: l[snapshotters.TargetManifestDigestLabel]}
	if of.Name == "" || of.Manifest == "" || len(of.Name) > maxLabel || len(of.Manifest) > maxLabel {
		return "", daemon.ImageRef{}, "", nil
	}
	return l[snapshots.LabelSnapshotRef], of, l[snapshotters.TargetLayerDigestLabel], l
}

// prepareRemote makes the snapshot that one was to become, if it is a layer that can
// be mounted with all that are below it. An image that cannot be is unpacked, as any
// other: then the reason is logged.
func (s *Snapshotter) prepareRemote(ctx context.Context, key, parent string, opts []snapshots.Opt) (done bool, err error) {
	name, of, layer, all := target(opts)
	if name == "" {
		return false, nil
	}
	var below *remote
	if parent != "" {
		if below, err = s.remote(ctx, parent); err != nil {
			return false, err
		}
		if below == nil {
			return false, nil // it lies on one that was unpacked
		}
	}
	if there, err := s.there(ctx, name, parent, of); there || err != nil {
		return there, err
	}
	s.rest() // the pull may be given up
	c, err := s.place(ctx, name, of, layer, below)
	if err != nil {
		if ctx.Err() != nil {
			return false, ctx.Err()
		}
		s.fell.Inc()
		s.log.Warn("an image's layer is not lazy: containerd unpacks it", "image", of.Name, "layer", layer, "err", err)
		return false, nil
	}
	return true, s.commitRemote(ctx, key, parent, remote{*c, name}, snapshots.WithLabels(all))
}

// there reports whether an image's remote snapshot is there already, from another
// namespace or under another name. Then nobody needs to be asked, and no name is kept
// that no snapshot is of.
func (s *Snapshotter) there(ctx context.Context, id, parent string, of daemon.ImageRef) (bool, error) {
	info, err := s.local.Stat(ctx, id)
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	if err != nil || info.Kind != snapshots.KindCommitted || info.Parent != parent {
		return false, err
	}
	r, err := s.remote(ctx, id)
	return r != nil && r.Manifest == of.Manifest, err
}

// place gives the chain with this ID among the layers of an image.
func (s *Snapshotter) place(ctx context.Context, id string, of daemon.ImageRef, layer string, below *remote) (*daemon.Chain, error) {
	ls, err := s.images.Layers(ctx, of)
	if err != nil {
		return nil, err
	}
	diffIDs := make([]digest.Digest, len(ls))
	for i, l := range ls {
		diffIDs[i] = digest.Digest(l.DiffID)
	}
	ids := identity.ChainIDs(diffIDs) // in place
	for i, l := range ls {
		if ids[i].String() != id || layer != "" && l.Digest != layer {
			continue
		}
		if i == 0 && below == nil || i > 0 && below != nil && below.ID == ids[i-1].String() {
			return &daemon.Chain{ImageRef: of, Layers: i + 1}, nil
		}
	}
	return nil, fmt.Errorf("the image has no layer %s in that place", layer)
}

// commitRemote makes a remote snapshot. One that is there by now, from another pull,
// will do.
func (s *Snapshotter) commitRemote(ctx context.Context, key, parent string, r remote, opt snapshots.Opt) error {
	there := false
	err := s.meta.WithTransaction(ctx, true, func(ctx context.Context) (err error) {
		made, err := storage.CreateSnapshot(ctx, snapshots.KindActive, key, parent, opt)
		if err != nil {
			return err
		}
		dir := s.dirOf(made.ID)
		if err := os.RemoveAll(dir); err != nil { // of one that was killed over it, whose ID is free again
			return err
		}
		defer func() {
			if err != nil { // before another is given the ID
				err = errors.Join(err, os.RemoveAll(dir))
			}
		}()
		if err := os.Mkdir(dir, 0o700); err != nil {
			return err
		}
		// A file, where others have a directory: no overlayfs takes it for an empty
		// layer, should chainFile be lost.
		if err := os.WriteFile(filepath.Join(dir, "fs"), nil, 0o444); err != nil {
			return err
		}
		if err := writeChain(filepath.Join(dir, chainFile), r); err != nil {
			return err
		}
		_, err = storage.CommitActive(ctx, key, r.ID, snapshots.Usage{}, opt)
		there = errdefs.IsAlreadyExists(err)
		return err
	})
	if there {
		return nil
	}
	return err
}

func writeChain(path string, r remote) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// errDamaged is that of a remote snapshot of which it is not known any more what it
// stands for.
var errDamaged = errors.New("remove the image and pull it again")

// maxChain bounds chainFile, in bytes.
const maxChain = 1 << 20

// readChain gives what a snapshot with this directory stands for, nil if it is no
// remote one.
func readChain(dir string) (*remote, error) {
	r := &remote{}
	f, err := os.OpenFile(filepath.Join(dir, chainFile), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, os.ErrNotExist) {
		if st, serr := os.Lstat(filepath.Join(dir, "fs")); serr != nil || !st.Mode().IsRegular() {
			return nil, nil
		}
	}
	if err == nil {
		defer f.Close()
		var b []byte
		if b, err = io.ReadAll(io.LimitReader(f, maxChain)); err == nil {
			err = json.Unmarshal(b, r)
		}
	}
	if err == nil && (r.Layers < 1 || r.Name == "" || r.Manifest == "") {
		err = errors.New("no image is named")
	}
	if err != nil {
		return nil, fmt.Errorf("snapshot %s: %s: %w: %w", filepath.Base(dir), chainFile, err, errDamaged)
	}
	return r, nil
}

// dir gives a snapshot's directory.
func (s *Snapshotter) dir(ctx context.Context, key string) (dir string, err error) {
	err = s.meta.WithTransaction(ctx, false, func(ctx context.Context) error {
		id, _, _, err := storage.GetInfo(ctx, key)
		dir = s.dirOf(id)
		return err
	})
	return dir, err
}

func (s *Snapshotter) dirOf(id string) string { return filepath.Join(s.root, "snapshots", id) }

// remote gives what a snapshot stands for, nil if it is no remote one.
func (s *Snapshotter) remote(ctx context.Context, key string) (*remote, error) {
	dir, err := s.dir(ctx, key)
	if err != nil {
		return nil, err
	}
	return readChain(dir)
}

// chain is remote for who only needs the chain.
func (s *Snapshotter) chain(ctx context.Context, key string) (*daemon.Chain, error) {
	r, err := s.remote(ctx, key)
	if r == nil {
		return nil, err
	}
	return &r.Chain, nil
}
