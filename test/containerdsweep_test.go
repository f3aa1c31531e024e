package test

import (
	"errors"
	"fmt"
	"sync"
	"testing"

	ctrdsnapshots "github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/varvefs/varve/bench/forms"
)

// TestContainerdGivenUp gives a pull up before there is a snapshot that stands for the
// image: what came goes with the next that is removed.
func TestContainerdGivenUp(t *testing.T) {
	withContainerd(t, func(t *testing.T, c *ctrd) {
		_, img, ref := c.pushed(forms.EStargz, "given")
		_, _, other := c.pushed(forms.EStargz, "other")
		before := c.files()
		labels := map[string]string{
			ctrdsnapshots.LabelSnapshotRef: digest.FromString("no chain of it").String(),
			snapshotters.TargetRefLabel:    ref, snapshotters.TargetManifestDigestLabel: imageID(t, img),
		}
		if _, err := c.varveSnapshots().Prepare(c.ctx, "extract", "", ctrdsnapshots.WithLabels(labels)); err != nil {
			t.Fatal(err)
		}
		must(t, c.varveSnapshots().Remove(c.ctx, "extract"))
		if len(c.taken()) == 0 {
			t.Fatal("nothing came: it proves nothing")
		}
		c.stop() // for a minute the image would be held for its container
		c.ok("ps")
		var pulled error
		soon(t, func() error { _, pulled = c.tryPull(other); return pulled })
		c.removeImage(other)
		c.leftAre("given up", before)
	})
}

// TestContainerdPullsAndRemoves has several clients pull one image and remove it, over
// and over, each for itself.
func TestContainerdPullsAndRemoves(t *testing.T) {
	withContainerd(t, func(t *testing.T, c *ctrd) {
		_, _, ref := c.pushed(forms.EStargz, "over")
		before := c.files()
		errs := make(chan error, 100)
		var all sync.WaitGroup
		for i := range 6 {
			all.Go(func() {
				for n := range 5 {
					img, err := c.tryPull(ref)
					if err == nil && n%2 == i%2 {
						err = c.startable(fmt.Sprintf("c-%d-%d", i, n), img)
					}
					if errdefs.IsNotFound(err) {
						err = nil // another has removed it meanwhile
					}
					if err := errors.Join(err, c.ImageService().Delete(c.ctx, ref)); err != nil && !errdefs.IsNotFound(err) {
						errs <- err
					}
				}
			})
		}
		all.Wait()
		close(errs)
		for err := range errs {
			t.Error(err)
		}
		c.pull(ref)
		c.removeImage(ref)
		if keys := c.snapshotKeys(); len(keys) > 0 {
			t.Errorf("snapshots left: %v", keys)
		}
		c.leftAre("all is removed", before)
	})
}
