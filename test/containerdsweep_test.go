package test

import (
	"errors"
	"fmt"
	"net/http"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	ctrdsnapshots "github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/varvefs/varve/bench/forms"
	"github.com/varvefs/varve/bench/link"
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

// TestContainerdLeavesMine removes an image from containerd that somebody wants for
// himself: by a name of his own, by its ID, or with changes of it.
func TestContainerdLeavesMine(t *testing.T) {
	withContainerd(t, func(t *testing.T, c *ctrd) {
		_, img, ref := c.pushed(forms.EStargz, "mine")
		c.pull(ref)
		id := imageID(t, img)
		dir := c.ok("mount", "--rw", "--name", "i", strings.TrimPrefix(id, "sha256:"))
		helper(t, "sum", filepath.Join(dir, "own/user"))
		helper(t, "change", filepath.Join(dir, "changed"))
		c.ok("umount", "i")
		c.removeImage(ref)
		c.stop()
		dir = c.ok("mount", "--name", "i")
		if got := helper(t, "sum", filepath.Join(dir, "changed/renamed")); got != sumOf(content("changed/2", 5000)) {
			t.Errorf("what was changed has digest %s", got)
		}
		if got := helper(t, "sum", filepath.Join(dir, "own/user")); got != sumOf(content("mine user", 100_000)) {
			t.Errorf("what was not, and is here, has digest %s", got)
		}
		c.ok("umount", "--rm", "i")

		_, img, ref = c.pushed(forms.EStargz, "also-mine")
		c.pull(ref)
		pinned := strings.TrimSuffix(ref, ":1") + "@" + imageID(t, img)
		c.ok("pull", "--full", pinned)
		c.removeImage(ref)
		dir = c.ok("mount", "--offline", pinned)
		if got := helper(t, "sum", filepath.Join(dir, "own/file")); got != sumOf(content("also-mine", 300_000)) {
			t.Errorf("an image that was pulled since has a file with digest %s", got)
		}
		c.ok("umount", dir)
	})
}

// TestContainerdLeavesWhatComes removes an image from containerd while another with
// most of its layers is on its way here.
func TestContainerdLeavesWhatComes(t *testing.T) {
	withContainerd(t, func(t *testing.T, c *ctrd) {
		for what, verb := range map[string][]string{"pull": {"pull"}, "mount": {"mount", "--rw", "--name", "m"}} {
			_, _, gone := c.pushed(forms.EStargz, "gone-for-"+what)
			r, img, ref := c.pushed(forms.EStargz, "comes-by-"+what)
			c.pull(gone)
			layers, _ := blobs(t, img)
			top := layers[len(layers)-1]
			asked, on := make(chan bool, 100), make(chan bool)
			r.rec.SetFault(func(q *http.Request) *link.Fault {
				if path.Base(q.URL.Path) == top {
					asked <- true
					<-on
				}
				return nil
			})
			done := make(chan result, 1)
			go func() { done <- c.run(append(verb, ref)...) }()
			<-asked
			c.removeImage(gone)
			close(on)
			if res := <-done; res.code != 0 {
				t.Errorf("%s: %s", what, res)
			}
			r.rec.SetFault(nil)
			if what == "mount" {
				c.ok("umount", "m")
			}
			dir := c.ok("mount", "--offline", "--name", "again", ref)
			if got, want := len(c.inspect(dir).Layers), len(layers); got != want {
				t.Errorf("%s: %d layers of %d are there", what, got, want)
			}
			c.ok("umount", dir)
		}
	})
}
