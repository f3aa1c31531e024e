package test

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/client"
	ctrdcontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/rootfs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/varvefs/varve/bench/forms"
)

// changes are what test/child's change leaves, as a layer names it.
var changes = []string{
	"changed/", "changed/.wh.1", "changed/.wh.2", "changed/0", "changed/3", "changed/4", "changed/5",
	"changed/dir/", "changed/dir/.wh.old", "changed/dir/.wh.older", "changed/dir/again",
	"changed/linked", "changed/new", "changed/renamed", "changed/symlink",
}

// TestContainerdCommit makes an image of what a container has written, as nerdctl
// does, and runs it: a layer that was unpacked on layers that were not.
func TestContainerdCommit(t *testing.T) {
	withContainerd(t, func(t *testing.T, c *ctrd) {
		_, _, ref := c.pushed(forms.EStargz, "commit")
		img := c.pull(ref)
		k := c.running("one", img)
		k.exec("/bin/child", "change", "/changed")

		names := tarNames(t, strings.NewReader(c.ctrOK("snapshots", "--snapshotter", "varve", "diff", "--media-type", ocispec.MediaTypeImageLayer, "one")))
		if !slices.Equal(names, changes) {
			t.Errorf("ctr snapshot diff: %v, want %v", names, changes)
		}

		made := c.commit(img, "one", "made/here:1")
		want := readTree(t, k.rootfs("changed")).wholeSeconds()
		k.kill()
		must(t, made.Unpack(c.ctx, "varve"))
		c.lowersAre("unpacked", 1)
		c.seen("varve", c.top(made), func(dir string) {
			sameTree(t, want, readTree(t, filepath.Join(dir, "changed")).wholeSeconds())
		})
		if got := c.does("two", made, "/bin/child", "sum", "/changed/renamed"); got != sumOf(content("changed/2", 5000)) {
			t.Errorf("in the image that was made: digest %s", got)
		}
		if got := c.does("three", made, "/bin/child", "sum", "/own/file"); got != sumOf(content("commit", 300_000)) {
			t.Errorf("of the image below: digest %s", got)
		}
		// The one below goes with the one above.
		c.removeImage(ref)
		if got := c.does("four", made, "/bin/child", "sum", "/own/user"); got != sumOf(content("commit user", 100_000)) {
			t.Errorf("of an image below that was removed: digest %s", got)
		}
		c.removeImage("made/here:1")
		c.lowersAre("both are removed", 0)
		if keys := c.snapshotKeys(); len(keys) > 0 {
			t.Errorf("snapshots left: %v", keys)
		}
	})
}

// tarNames gives a layer's names in their order.
func tarNames(t *testing.T, r io.Reader) (names []string) {
	t.Helper()
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			slices.Sort(names)
			return names
		}
		must(t, err)
		names = append(names, h.Name)
	}
}

// commit makes an image of a base and what was written to a snapshot.
func (c *ctrd) commit(base client.Image, key, name string) client.Image {
	t := c.t
	t.Helper()
	ctx, done, err := c.WithLease(c.ctx)
	must(t, err)
	defer done(ctx)
	cs := c.ContentStore()
	layer := mustGet[ocispec.Descriptor](t)(rootfs.CreateDiff(ctx, key, c.varveSnapshots(), c.DiffService()))
	info := mustGet[ctrdcontent.Info](t)(cs.Info(ctx, layer.Digest))
	diffID := digest.Digest(info.Labels["containerd.io/uncompressed"])

	manifest := mustGet[ocispec.Manifest](t)(images.Manifest(ctx, cs, base.Target(), base.Platform()))
	var config ocispec.Image
	must(t, json.Unmarshal(mustGet[[]byte](t)(ctrdcontent.ReadBlob(ctx, cs, manifest.Config)), &config))
	config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, diffID)
	manifest.Layers = append(manifest.Layers, layer)
	manifest.Config = c.put(ctx, ocispec.MediaTypeImageConfig, config, map[string]string{})
	refs := map[string]string{"containerd.io/gc.ref.content.config": manifest.Config.Digest.String(), "containerd.io/gc.ref.content.l.new": layer.Digest.String()}
	target := c.put(ctx, ocispec.MediaTypeImageManifest, manifest, refs)
	made := mustGet[images.Image](t)(c.ImageService().Create(ctx, images.Image{Name: name, Target: target}))
	return client.NewImage(c.Client, made)
}

// put writes a document into containerd's content store.
func (c *ctrd) put(ctx context.Context, mediaType string, v any, labels map[string]string) ocispec.Descriptor {
	c.t.Helper()
	b := mustGet[[]byte](c.t)(json.Marshal(v))
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	must(c.t, ctrdcontent.WriteBlob(ctx, c.ContentStore(), d.Digest.String(), bytes.NewReader(b), d, ctrdcontent.WithLabels(labels)))
	return d
}

// TestContainerdWithoutLabels unpacks what is not known to be in a registry as any
// snapshotter does: images of a tar, and those of clients that do not say which
// image a layer is of.
func TestContainerdWithoutLabels(t *testing.T) {
	withContainerd(t, func(t *testing.T, c *ctrd) {
		_, img, ref := c.pushed(forms.Gzip, "plain")
		layers, _ := blobs(t, img)
		file := filepath.Join(t.TempDir(), "image.tar")
		must(t, tarball.WriteToFile(file, mustGet[name.Tag](t)(name.NewTag("example.org/loaded:1")), img))
		before := c.files()

		load := []string{"image", "import", "--snapshotter", "varve", file}
		if c.major > 1 {
			load = slices.Insert(load, 2, "--local")
		}
		c.ctrOK(load...)
		c.ordinary("example.org/loaded:1", "plain", layers)
		c.removeImage("example.org/loaded:1")
		c.leftAre("the loaded one is removed", before)

		pull := []string{"image", "pull", "--snapshotter", "varve", ref}
		if c.major > 1 {
			pull = slices.Insert(pull, 2, "--local")
		}
		c.ctrOK(pull...)
		c.ordinary(ref, "plain", layers)
		// A client that says it finds the snapshots there.
		again := c.pull(ref)
		c.does("again", again, "/bin/child", "sum", "/own/file")
		c.lowersAre("the layers are unpacked already", 0)
		c.removeImage(ref)
		c.leftAre("all is removed", before)
	})
}

// ordinary runs a container of an image that was unpacked, which must be what
// overlayfs does.
func (c *ctrd) ordinary(ref, seed string, layers []string) {
	t := c.t
	t.Helper()
	img := mustGet[client.Image](t)(c.GetImage(c.ctx, ref))
	for i, l := range layers {
		if strings.HasSuffix(ref, "/image:1") && !c.contents()[l] {
			t.Errorf("%s: containerd does not have layer %d", ref, i)
		}
	}
	if got := c.does("ordinary", img, "/bin/child", "sum", "/own/file"); got != sumOf(content(seed, 300_000)) {
		t.Errorf("%s: digest %s", ref, got)
	}
	c.lowersAre(ref, 0)
	must(t, img.Unpack(c.ctx, "overlayfs"))
	want, got := c.view("overlayfs", img), c.view("varve", img)
	got["."] = want["."]
	sameTree(t, want, got)
	for _, key := range c.snapshotKeys() {
		if u := mustGet[snapshots.Usage](t)(c.varveSnapshots().Usage(c.ctx, key)); u.Inodes == 0 {
			t.Errorf("%s: snapshot %s is said to take %+v", ref, key, u)
		}
	}
}

// TestContainerdTransfer pulls by containerd's transfer service, which gives the
// labels where the configuration says so.
func TestContainerdTransfer(t *testing.T) {
	withContainerd(t, func(t *testing.T, c *ctrd) {
		if c.major == 1 {
			return // has no such service
		}
		r, img, ref := c.pushed(forms.EStargz, "transfer")
		layers, _ := blobs(t, img)
		c.ctrOK("image", "pull", "--snapshotter", "varve", ref)
		for i, l := range layers {
			if c.contents()[l] {
				t.Errorf("containerd has layer %d itself", i)
			}
		}
		got, _ := r.requests(img)
		withoutLookups(got, 3)
		asked(t, "pull", got, map[string]int{"manifest": 3, "config": 2, "blob": len(layers)})
		if got := c.sums("varve", ref, "/own/file"); got != sumOf(content("transfer", 300_000)) {
			t.Errorf("ctr run sees digest %s", got)
		}
		c.lowersAre("it has run", 1)
	})
}

// TestContainerdAtOnce has several pull one image at once, in two namespaces, and
// start containers of it at once.
func TestContainerdAtOnce(t *testing.T) {
	withContainerd(t, func(t *testing.T, c *ctrd) {
		r, made, ref := c.pushed(forms.EStargz, "once")
		before := c.files()
		other := *c
		other.namespace += "-b"
		other.ctx = namespaces.WithNamespace(c.ctx, other.namespace)
		both := []*ctrd{c, &other}
		imgs := make([]client.Image, len(both))
		var wg sync.WaitGroup
		for i, c := range both {
			for n := range 3 {
				wg.Go(func() {
					img, err := c.tryPull(ref)
					if err != nil {
						t.Errorf("pull: %v", err)
					}
					if n == 0 { // the others give the same
						imgs[i] = img
					}
				})
			}
		}
		wg.Wait()
		if t.Failed() {
			return
		}
		r.settled()
		got, ranges := r.requests(made)
		fetched(t, "pulls", ranges)
		if got["blob"] != 5 {
			t.Errorf("six pulls: requests %v", got)
		}
		for i, c := range both {
			for n := range 4 {
				wg.Go(func() {
					k, err := c.create("c"+string(rune('0'+n)), imgs[i], launch{}, "/bin/child", "sum", "/own/file")
					if err != nil {
						t.Errorf("create: %v", err)
						return
					}
					if code, out := c.begin(k).ended(); code != 0 || strings.TrimSpace(out) != sumOf(content("once", 300_000)) {
						t.Errorf("exit %d: %s", code, out)
					}
				})
			}
		}
		wg.Wait()
		c.lowersAre("eight containers", 1)
		r.settled()
		_, ranges = r.requests(made)
		fetched(t, "eight containers", ranges)

		c.removeImage(ref)
		if got := other.does("after", imgs[1], "/bin/child", "sum", "/own/user"); got != sumOf(content("once user", 100_000)) {
			t.Errorf("when the other namespace's has gone: digest %s", got)
		}
		other.removeImage(ref)
		c.lowersAre("both are removed", 0)
		c.leftAre("both are removed", before)
	})
}

// TestContainerdDeep has a container lie on as many unpacked layers, above lazy ones,
// as an image may have: what names them to the kernel is one page.
func TestContainerdDeep(t *testing.T) {
	withContainerd(t, func(t *testing.T, c *ctrd) {
		_, _, ref := c.pushed(forms.EStargz, "deep")
		img := c.pull(ref)
		s, parent := c.varveSnapshots(), c.top(img)
		ctx, done, err := c.WithLease(c.ctx)
		must(t, err)
		defer done(c.ctx)
		for i := range 122 {
			key, layer := fmt.Sprintf("making %d", i), fmt.Sprintf("layer %d", i)
			_, err := s.Prepare(ctx, key, parent)
			must(t, err)
			must(t, s.Commit(ctx, layer, key))
			parent = layer
		}
		_, err = s.Prepare(ctx, "deep", parent)
		must(t, err)
		k := c.startAs("deep", img, launch{snapshot: client.WithSnapshot("deep")}, "/bin/child", "sum", "/own/file")
		if code, out := k.ended(); code != 0 || strings.TrimSpace(out) != sumOf(content("deep", 300_000)) {
			t.Errorf("exit %d: %s", code, out)
		}
	})
}
