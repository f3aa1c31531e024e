package test

import (
	"context"
	"fmt"
	"path"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/leases"
	ctrdsnapshots "github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"

	"github.com/varvefs/varve/bench/forms"
)

// into gives the arguments that pull an image into containerd.
func (c *ctrd) into(args ...string) []string {
	return append([]string{"pull", "--containerd=" + c.namespace, "--containerd-address", c.socket()}, args...)
}

// chainIDs gives the names that the snapshots of an image's layers have, in the
// order of names.
func chainIDs(t *testing.T, img v1.Image) (ids []string) {
	t.Helper()
	var diffIDs []digest.Digest
	for _, id := range mustGet[*v1.ConfigFile](t)(img.ConfigFile()).RootFS.DiffIDs {
		diffIDs = append(diffIDs, digest.Digest(id.String()))
	}
	for _, id := range identity.ChainIDs(diffIDs) {
		ids = append(ids, id.String())
	}
	slices.Sort(ids)
	return ids
}

// has compares what containerd has with what it should have when everything was
// collected: snapshots, blobs, and no lease.
func (c *ctrd) has(what, snapshotter string, snapshots, contents []string) {
	c.t.Helper()
	c.collect()
	var keys []string
	must(c.t, c.SnapshotService(snapshotter).Walk(c.ctx, func(_ context.Context, i ctrdsnapshots.Info) error {
		keys = append(keys, i.Name)
		return nil
	}))
	slices.Sort(keys)
	if diff := cmp.Diff(snapshots, keys); diff != "" {
		c.t.Errorf("%s: snapshots: %s", what, diff)
	}
	want := map[string]bool{}
	for _, d := range contents {
		want[d] = true
	}
	if diff := cmp.Diff(want, c.contents()); diff != "" {
		c.t.Errorf("%s: contents: %s", what, diff)
	}
	if ls := mustGet[[]leases.Lease](c.t)(c.LeasesService().List(c.ctx)); len(ls) > 0 {
		c.t.Errorf("%s: leases are left: %v", what, ls)
	}
}

// target gives what a name stands for in containerd.
func (c *ctrd) target(name string) string {
	c.t.Helper()
	return mustGet[client.Image](c.t)(c.GetImage(c.ctx, name)).Target().Digest.String()
}

// sums has ctr run a container that reads a file.
func (c *ctrd) sums(snapshotter, ref, file string) string {
	c.t.Helper()
	r := c.ctrRun(snapshotter, ref, "/bin/child", "sum", file)
	if r.code != 0 {
		c.t.Fatal(r)
	}
	return strings.TrimSpace(r.out)
}

// documents gives the digests of an image's manifest and config.
func documents(t *testing.T, img v1.Image) []string {
	t.Helper()
	return []string{imageID(t, img), mustGet[v1.Hash](t)(img.ConfigName()).String()}
}

// TestPullInto pulls a manifest list's image into containerd, runs it, lets its tag
// move on, and removes it.
func TestPullInto(t *testing.T) {
	withContainerd(t, func(t *testing.T, c *ctrd) {
		img := booted(t, forms.EStargz, "into")
		list := mutate.AppendManifests(empty.Index,
			mutate.IndexAddendum{Add: booted(t, forms.Gzip, "other"), Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "s390x"}}},
			mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: runtime.GOARCH}}})
		listID := mustGet[v1.Hash](t)(list.Digest()).String()
		r := newRegistry(t)
		must(t, remote.WriteIndex(r.reference("into/image:1"), list))
		r.rec.Reset()
		ref := r.rec.Addr() + "/into/image:1"
		id := ids(t, img)

		lines := []string{"1: Pulling from into/image"}
		for _, state := range []string{": Pulling fs layer", ": Indexed"} {
			for _, l := range id {
				lines = append(lines, l+state)
			}
		}
		res := c.run(c.into(ref)...)
		said(t, res, append(lines, "Digest: "+listID, "Status: Downloaded newer image for "+ref, ref)...)
		if res.err != "" {
			t.Errorf("it has something to say: %s", res)
		}
		r.settled()
		got, ranges := r.requests(img)
		withoutLookups(got, 2)
		layers, sizes := blobs(t, img)
		var whole int64
		for _, n := range sizes {
			whole += n
		}
		if n := fetched(t, "pull", ranges); got["manifest"] != 2 || got["config"] != 1 || n > whole/8 {
			t.Errorf("%d bytes of %d, requests %v", n, whole, got)
		}
		docs := append(documents(t, img), listID)
		c.has("pulled", "varve", chainIDs(t, img), docs)
		if got := c.target(ref); got != listID {
			t.Errorf("the name stands for %s", got)
		}

		if got := c.sums("varve", ref, "/own/file"); got != sumOf(content("into", 300_000)) {
			t.Errorf("a container sees digest %s", got)
		}
		r.settled()
		got, ranges = r.requests(img)
		fetched(t, "run", ranges)
		if got["config"] > 0 {
			t.Errorf("a start asked for %v", got)
		}
		for _, q := range ranges {
			if l := path.Base(q.Path); l != layers[0] && l != layers[len(layers)-1] {
				t.Errorf("a start reads from layer %s", l)
			}
		}
		c.has("run", "varve", chainIDs(t, img), docs)

		lines = []string{"1: Pulling from into/image"}
		for _, l := range id {
			lines = append(lines, l+": Already exists")
		}
		said(t, c.run(c.into(ref)...), append(lines, "Digest: "+listID, "Status: Image is up to date for "+ref, ref)...)
		if got, _ := r.requests(img); got["config"]+got["blob"] > 0 {
			t.Errorf("the second pull asked for %v", got)
		}

		next := booted(t, forms.EStargz, "next")
		r.push("into/image:1", next)
		if out := c.ok(c.into("-q", ref)...); out != ref {
			t.Errorf("-q prints %q", out)
		}
		c.has("moved", "varve", chainIDs(t, next), documents(t, next))
		if got := c.target(ref); got != imageID(t, next) {
			t.Errorf("the name stands for %s", got)
		}
		if got := c.sums("varve", ref, "/own/file"); got != sumOf(content("next", 300_000)) {
			t.Errorf("a container of what the tag moved to sees digest %s", got)
		}

		c.removeImage(ref)
		c.has("removed", "varve", nil, nil)
		c.eventually("what is left of images that were removed", func() string {
			return strings.Join(c.below("cache/layers/*", "state/containerd/pulled/*", "state/images/blobs/sha256/*"), " ")
		}, "")
	})
}

// TestPullIntoNotLazy pulls what is not lazy, which is said, and unpacked as ever.
func TestPullIntoNotLazy(t *testing.T) {
	withContainerd(t, func(t *testing.T, c *ctrd) {
		r := newRegistry(t)
		// unpacked pulls, and looks at what is unpacked of an image, and at the reason.
		unpacked := func(snapshotter, ref string, img v1.Image, n int, why string) {
			t.Helper()
			res := c.run(c.into("--snapshotter", snapshotter, ref)...)
			if got, _ := r.requests(img); snapshotter == "overlayfs" {
				withoutLookups(got, 1)
				asked(t, "a pull that is not lazy", got, map[string]int{"manifest": 1, "config": 1, "blob": got["blob"]})
			}
			layers, _ := blobs(t, img)
			short, upper := ids(t, img), len(layers)-n
			want := fmt.Sprintf("warning: %d of %d layers are not lazy, containerd has unpacked them: %s: ", n, len(layers), strings.Join(short[upper:], ", "))
			if res.code != 0 || !strings.Contains(res.err, want) || !strings.Contains(res.err, why) || !strings.HasSuffix(res.out, "Status: Downloaded newer image for "+ref+"\n"+ref+"\n") {
				t.Fatalf("want %q and %q: %s", want, why, res)
			}
			for _, id := range short[upper:] {
				for _, state := range []string{"Download complete", "Extracting", "Pull complete"} {
					if !strings.Contains(res.out, id+": "+state+"\n") {
						t.Errorf("%s: %s is not said: %s", id, state, res)
					}
				}
			}
			diffIDs := mustGet[*v1.ConfigFile](t)(img.ConfigFile()).RootFS.DiffIDs
			for i, l := range layers[upper:] {
				info, err := c.ContentStore().Info(c.ctx, digest.Digest(l))
				if err != nil || info.Labels[labels.LabelUncompressed] != diffIDs[upper+i].String() {
					t.Errorf("layer %d: labels %v: %v", upper+i, info.Labels, err)
				}
			}
			if got := c.sums(snapshotter, ref, "/own/file"); got != sumOf(content("unpacked", 300_000)) {
				t.Errorf("a container sees digest %s", got)
			}
			if res := c.run(c.into("--snapshotter", snapshotter, ref)...); res.code != 0 || strings.Contains(res.err, "unpacked") || !strings.Contains(res.out, "Status: Image is up to date for ") {
				t.Errorf("again: %s", res)
			}
			c.removeImage(ref)
		}

		img := booted(t, forms.EStargz, "unpacked")
		unpacked("overlayfs", r.push("a/image:1", img), img, 5, "overlayfs is containerd's own")
		c.has("removed", "overlayfs", nil, nil)

		// Its lower layers were unpacked by a client that names no image.
		lower := newLayer(t)
		lower.dir("lower")
		own := newLayer(t)
		own.dir("own")
		own.file("own/file", content("unpacked", 300_000))
		base := build(t, forms.EStargz, bootable(t), lower.bytes())
		whole := mustGet[client.Image](t)(c.Pull(c.ctx, r.push("b/base:1", base), client.WithPullUnpack, client.WithPullSnapshotter("varve")))
		img = build(t, forms.EStargz, bootable(t), lower.bytes(), own.bytes())
		unpacked("varve", r.push("b/image:1", img), img, 1, "they lie on "+ids(t, img)[1]+", which was unpacked before")
		c.removeImage(whole.Name())
		c.has("removed", "varve", nil, nil)

		// What varve cannot mount: more than it reads behind the end of a tar.
		own = newLayer(t)
		own.dir("own")
		own.file("own/file", content("unpacked", 300_000))
		tar := own.bytes()
		img = build(t, forms.Gzip, bootable(t), append(slices.Clone(tar), make([]byte, 64<<20+1)...))
		unpacked("varve", r.push("c/image:1", img), img, 2, "follow the end of the tar")
		c.has("removed", "varve", nil, nil)

		// What nobody can: its layers are not what the config says.
		img = changeConfig(t, build(t, forms.Gzip, bootable(t), tar), func(f map[string]any) {
			ids := f["rootfs"].(map[string]any)["diff_ids"].([]any)
			ids[1] = "sha256:" + strings.Repeat("5", 64)
		})
		ref := r.push("d/image:1", img)
		if res := c.run(c.into(ref)...); res.code == 0 || !strings.Contains(res.err, "as the image's config says") || strings.Contains(res.out, "Status:") {
			t.Errorf("wrong contents: %s", res)
		}
		c.has("wrong contents", "varve", nil, nil)
		if _, err := c.GetImage(c.ctx, ref); err == nil {
			t.Error("an image that could not be pulled has its name")
		}
	})
}
