package test

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/varvefs/varve/bench/forms"
)

// collect has containerd delete what nothing refers to, and waits for it.
func (c *ctrd) collect() {
	c.t.Helper()
	l := mustGet[leases.Lease](c.t)(c.LeasesService().Create(c.ctx, leases.WithRandomID()))
	must(c.t, c.LeasesService().Delete(c.ctx, l, leases.SynchronousDelete))
}

// removeImage removes an image and has everything collected that nothing needs.
func (c *ctrd) removeImage(name string) {
	c.t.Helper()
	must(c.t, c.ImageService().Delete(c.ctx, name))
	c.collect()
}

// snapshotKeys gives the names of the snapshots that containerd knows.
func (c *ctrd) snapshotKeys() (names []string) {
	c.t.Helper()
	must(c.t, c.varveSnapshots().Walk(c.ctx, func(_ context.Context, i snapshots.Info) error {
		names = append(names, i.Name)
		return nil
	}))
	return names
}

// taken gives what the files of layers take on the disk, by digest, in bytes.
func (h *host) taken() map[string]int64 {
	h.t.Helper()
	dirs, err := filepath.Glob(filepath.Join(h.root, "cache/layers/*"))
	must(h.t, err)
	all := map[string]int64{}
	for _, dir := range dirs {
		name := filepath.Base(dir)[:len("sha256-")+64] // then, what vouches for it
		files, err := filepath.Glob(dir + "/*")
		must(h.t, err)
		for _, f := range files {
			all[name] += stat(h.t, f).Blocks * 512
		}
	}
	return all
}

// files gives the names of all that lies below varve's directories, without what is
// mounted there, what is made once, and the profiles of starts, which outlive images.
func (h *host) files() []string {
	h.t.Helper()
	var all []string
	var walk func(rel string)
	walk = func(rel string) {
		switch rel {
		case "run/data", "state/containerd/metadata.db", "state/containerd/pulled", "state/containerd/layers", "state/images/index.json", "state/profiles":
			return
		}
		all = append(all, rel)
		if st, err := os.Lstat(filepath.Join(h.root, rel)); err != nil || !st.IsDir() {
			return
		}
		if strings.HasPrefix(rel, "run/") && rel != "run/lower" && rel != "run/mnt" {
			return
		}
		names, _ := os.ReadDir(filepath.Join(h.root, rel))
		for _, d := range names {
			walk(filepath.Join(rel, d.Name()))
		}
	}
	walk(".")
	slices.Sort(all)
	return all
}

// leftAre waits until varve's directories hold what they did.
func (c *ctrd) leftAre(what string, before []string) {
	c.t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		after := c.files()
		if slices.Equal(after, before) {
			return
		}
		if time.Now().After(end) {
			more := slices.DeleteFunc(after, func(n string) bool { return slices.Contains(before, n) })
			c.t.Errorf("%s: left: %s", what, strings.Join(more, "\n\t"))
			return
		}
	}
}

// TestContainerdRemove removes images while containers run, and containers then:
// nothing of them is left.
func TestContainerdRemove(t *testing.T) {
	withContainerd(t, func(t *testing.T, c *ctrd) {
		_, _, first := c.pushed(forms.EStargz, "first")
		_, _, second := c.pushed(forms.EStargz, "second")
		_, _, third := c.pushed(forms.Gzip, "third")
		before := c.files()
		imgs := map[string]client.Image{}
		for _, ref := range []string{first, second, third} {
			imgs[ref] = c.pull(ref)
		}
		one, two := c.running("one", imgs[first]), c.running("two", imgs[second])
		c.does("three", imgs[third], "/bin/child", "sum", "/own/file")
		c.lowersAre("three images", 3)

		c.removeImage(first)
		c.removeImage(third)
		c.lowersAre("one image is removed, one in use is", 2)
		if got := one.exec("/bin/child", "sum", "/own/user"); got != sumOf(content("first user", 100_000)) {
			t.Errorf("a container whose image was removed sees digest %s", got)
		}
		one.kill()
		c.collect()
		c.lowersAre("its container is, too", 1)
		// The other image has its lowest layers, of which not all was fetched.
		if got := two.exec("/bin/child", "sum", "/kinds/file"); got != sumOf(content("kinds", 70_000)) {
			t.Errorf("an image that shares layers with one that was removed: digest %s", got)
		}
		two.kill()
		if got := c.does("again", imgs[second], "/bin/child", "sum", "/own/file"); got != sumOf(content("second", 300_000)) {
			t.Errorf("a new container of it: digest %s", got)
		}
		c.removeImage(second)
		c.lowersAre("all are removed", 0)
		if keys := c.snapshotKeys(); len(keys) > 0 {
			t.Errorf("snapshots left: %v", keys)
		}
		c.leftAre("all are removed", before)

		// As if nothing had been.
		if got := c.does("anew", c.pull(first), "/bin/child", "sum", "/own/file"); got != sumOf(content("first", 300_000)) {
			t.Errorf("pulled again: digest %s", got)
		}
		c.removeImage(first)
		c.leftAre("pulled again, removed again", before)
	})
}

// TestContainerdUsage compares what snapshots are said to take with what the disk
// does, and with what their removal gives back.
func TestContainerdUsage(t *testing.T) {
	withContainerd(t, func(t *testing.T, c *ctrd) {
		r, made, ref := c.pushed(forms.EStargz, "usage")
		before := c.files()
		img := c.pull(ref)
		digests, _ := blobs(t, made)
		said := func() (all []int64) {
			parent := c.top(img)
			for range digests {
				all = append(all, mustGet[snapshots.Usage](t)(c.varveSnapshots().Usage(c.ctx, parent)).Size)
				parent = mustGet[snapshots.Info](t)(c.varveSnapshots().Stat(c.ctx, parent)).Parent
			}
			if parent != "" {
				t.Errorf("below the lowest layer lies %s", parent)
			}
			slices.Reverse(all)
			return all
		}
		check := func(what string) (sum int64) {
			t.Helper()
			taken, now := c.taken(), said()
			for after := c.taken(); !maps.Equal(taken, after); after = c.taken() { // what a start needs comes from the pull on
				taken, now = after, said()
			}
			for i, d := range digests {
				if want := taken[strings.Replace(d, ":", "-", 1)]; now[i] != want {
					t.Errorf("%s: layer %d is said to take %d bytes, and takes %d", what, i, now[i], want)
				}
				sum += now[i]
			}
			return sum
		}
		pulled := check("pulled")
		k := c.running("one", img)
		k.exec("/bin/child", "sum", "/own/file")
		r.settled()
		if started := check("started"); started < pulled+300_000 {
			t.Errorf("it takes %d bytes when it was pulled, and %d when it has started", pulled, started)
		}
		// A container's own is what it has written.
		k.exec("/bin/child", "change", "/changed")
		if u := mustGet[snapshots.Usage](t)(c.varveSnapshots().Usage(c.ctx, "one")); u.Size < 4096 || u.Size > 200_000 || u.Inodes < 5 {
			t.Errorf("what a container has written takes %+v", u)
		}
		k.kill()
		c.removeImage(ref)
		c.leftAre("removed", before)
	})
}

// TestContainerdSameLayers has two images of the same layers in different forms,
// which are the same snapshots: whichever of them goes first, the other works.
func TestContainerdSameLayers(t *testing.T) {
	withContainerd(t, func(t *testing.T, c *ctrd) {
		r := newRegistry(t)
		layers := append([][]byte{bootable(t)}, stacked(t)...)
		var refs []string
		for i, form := range []forms.Form{forms.Gzip, forms.ZstdChunkedContainers} {
			refs = append(refs, r.push(fmt.Sprintf("same/%d:1", i), build(t, form, layers...)))
		}
		before := c.files()
		for _, order := range [][]string{{refs[0], refs[1]}, {refs[1], refs[0]}} {
			a, b := c.pull(order[0]), c.pull(order[1])
			if c.top(a) != c.top(b) {
				t.Fatal("the images' layers are not the same")
			}
			c.does("a", a, "/bin/child", "sum", "/kinds/file")
			c.removeImage(order[0])
			if got := c.does("b", b, "/bin/child", "sum", "/twice"); got != sumOf(content("third", 9000)) {
				t.Errorf("the second image: digest %s", got)
			}
			c.removeImage(order[1])
			c.leftAre("both are removed", before)
		}
	})
}

// TestContainerdTwoNames pulls one image under two names: with both removed nothing
// of it is left.
func TestContainerdTwoNames(t *testing.T) {
	withContainerd(t, func(t *testing.T, c *ctrd) {
		r := newRegistry(t)
		img := booted(t, forms.EStargz, "names")
		refs := []string{r.push("one/image:1", img), r.push("two/image:1", img)}
		before := c.files()
		for _, ref := range refs {
			c.ok(c.into(ref)...)
		}
		c.removeImage(refs[0])
		if got := c.does("one", c.pull(refs[1]), "/bin/child", "sum", "/own/file"); got != sumOf(content("names", 300_000)) {
			t.Errorf("under its second name: digest %s", got)
		}
		c.removeImage(refs[1])
		c.leftAre("both are removed", before)
	})
}
