package test

import (
	"archive/tar"
	"os"
	"path"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/opencontainers/runtime-spec/specs-go"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/varvefs/varve/bench/forms"
	"github.com/varvefs/varve/bench/link"
)

// withIndex is the form of layers that have no table of contents, but an index of
// varve's beside them.
const withIndex = "indexed"

// booted makes an image that containers run from: what [bootable] gives, what
// [stacked] does above it, and a layer of its own on top.
func booted(t *testing.T, form forms.Form, seed string) v1.Image {
	own := newLayer(t)
	own.dir("own")
	own.file("own/file", content(seed, 300_000))
	own.add(tar.Header{Typeflag: tar.TypeReg, Name: "own/user", Uid: 1000, Gid: 100, Mode: 0o4750, PAXRecords: xattrs("user.of", seed)}, content(seed+" user", 100_000))
	return build(t, form, append([][]byte{bootable(t)}, append(stacked(t), own.bytes())...)...)
}

// pushed makes such an image and puts it into a registry.
func (c *ctrd) pushed(form forms.Form, seed string) (*registry, v1.Image, string) {
	img := booted(c.t, form, seed)
	r := newRegistry(c.t)
	return r, img, r.push(seed+"/image:1", img)
}

// TestContainerdPull pulls images in every form, runs containers on them and
// compares what is fetched, and what they see with what containerd unpacks.
func TestContainerdPull(t *testing.T) {
	withContainerd(t, func(t *testing.T, c *ctrd) {
		for _, form := range []string{string(forms.EStargz), string(forms.ZstdChunkedContainers), withIndex, string(forms.Gzip)} {
			c.pulls(form)
		}
	})
}

func (c *ctrd) pulls(form string) {
	t := c.t
	written := forms.Form(form)
	if form == withIndex {
		written = forms.Gzip
	}
	r, img, ref := c.pushed(written, form)
	if form == withIndex {
		newHost(t).ok("index", "--push", ref)
		r.rec.Reset()
	}
	layers, sizes := blobs(t, img)
	var whole int64
	for _, n := range sizes {
		whole += n
	}

	pulled := c.pull(ref)
	if form == string(forms.Gzip) { // they are still read
		c.eventually("layers that are not here", func() (missing string) {
			for _, l := range layers {
				if len(c.below("cache/layers/"+strings.Replace(l, ":", "-", 1))) == 0 {
					missing += l + " "
				}
			}
			return missing
		}, "")
	}
	r.settled()
	got, ranges := r.requests(img)
	n := fetched(t, form+": pull", ranges)
	withoutLookups(got, 3)
	// The client and the daemon ask for the documents, nobody twice.
	switch form {
	case withIndex:
		for _, q := range ranges {
			for i, l := range layers {
				if path.Base(q.Path) == l {
					t.Errorf("%s: layer %d was asked for: %+v", form, i, q)
				}
			}
		}
	case string(forms.Gzip):
		asked(t, form+": pull", got, map[string]int{"manifest": 3, "config": 2, "blob": len(layers)})
		if n != whole {
			t.Errorf("%s: pull took %d bytes of %d", form, n, whole)
		}
	default:
		asked(t, form+": pull", got, map[string]int{"manifest": 3, "config": 2, "blob": len(layers)})
		if n > whole/8 {
			t.Errorf("%s: pull took %d bytes of %d", form, n, whole)
		}
	}
	have := c.contents()
	for i, l := range layers {
		if have[l] {
			t.Errorf("%s: containerd has layer %d itself", form, i)
		}
	}

	if got := c.does(form, pulled, "/bin/child", "sum", "/own/file"); got != sumOf(content(form, 300_000)) {
		t.Errorf("%s: a container sees digest %s", form, got)
	}
	r.settled()
	got, ranges = r.requests(img)
	fetched(t, form+": run", ranges)
	if got["config"] != 0 || form == string(forms.Gzip) && got["blob"] != 0 {
		t.Errorf("%s: a start asked for %v", form, got)
	}
	for _, q := range ranges {
		if l := path.Base(q.Path); l != layers[0] && l != layers[4] {
			t.Errorf("%s: a start reads from layer %s", form, l)
		}
	}

	lazy := c.view("varve", pulled)
	want := c.view("overlayfs", c.pullWhole(ref))
	if secondsOnly(written) {
		want, lazy = want.roundSeconds(), lazy.roundSeconds()
	}
	lazy["."] = want["."] // of which no layer says anything
	for _, name := range []string{".no.prefetch.landmark", "stargz.index.json"} {
		delete(want, name) // of the form, not of the image
	}
	sameTree(t, want, lazy)
	c.removeImage(ref)
}

// withoutLookups takes away what is not always asked: how to speak to the registry,
// and once what refers to the image, with the tag that stands in for that beside it,
// which counts among the manifests that are asked for otherwise.
func withoutLookups(asked map[string]int, manifests int) {
	delete(asked, "ping")
	if asked["referrer"] == 1 {
		delete(asked, "referrer")
		if asked["manifest"] == manifests+1 {
			asked["manifest"]--
		}
	}
}

// fetched sums what came of blobs, of which nothing may come twice.
func fetched(t *testing.T, what string, ranges []link.Request) (n int64) {
	t.Helper()
	seen := map[string]bool{}
	for _, q := range ranges {
		if k := q.Path + " " + q.Range; seen[k] {
			t.Errorf("%s: %s was asked for twice", what, k)
		} else {
			seen[k] = true
		}
		n += q.Bytes
	}
	return n
}

// TestContainerdRun runs containers of an image with both runtimes: they lie on one
// mount, however many they are.
func TestContainerdRun(t *testing.T) {
	withContainerd(t, func(t *testing.T, c *ctrd) {
		_, _, ref := c.pushed(forms.EStargz, "run")
		img := c.pull(ref)
		c.lowersAre("pulled", 0)
		var all []*contained
		for _, runtime := range []string{"runc", "crun"} {
			if c.runc = runtime; runtime == "crun" {
				c.runc = c.path(runtime)
			}
			for _, n := range []string{"1", "2", "3"} {
				all = append(all, c.running(runtime+n, img))
			}
		}
		c.lowersAre("six containers", 1)
		for _, r := range []*contained{all[0], all[5]} {
			if got := r.exec("/bin/child", "sum", "/own/file"); got != sumOf(content("run", 300_000)) {
				t.Errorf("exec sees digest %s", got)
			}
			r.exec("/bin/child", "change", "/changed")
			if got := r.exec("/bin/child", "sum", "/changed/renamed"); got != sumOf(content("changed/2", 5000)) {
				t.Errorf("a file that was renamed has digest %s", got)
			}
		}
		// What one writes the others do not see, nor the next.
		for _, r := range []*contained{all[1], all[4], c.running("last", img)} {
			if got := r.exec("/bin/child", "sum", "/changed/2"); got != sumOf(content("changed/2", 5000)) {
				t.Errorf("%s: a file that another has renamed has digest %s", r.ID(), got)
			}
			if r.ID() == "last" {
				all = append(all, r)
			}
		}
		for _, r := range all {
			r.kill()
		}
		c.lowersAre("a moment after the last container", 1)

		for range 2 { // the second one with the key of the first
			if got := c.sums("varve", ref, "/own/file"); got != sumOf(content("run", 300_000)) {
				t.Errorf("ctr run sees digest %s", got)
			}
		}
		if r := c.ctrRun("varve", ref, "/bin/child"); r.code != 2 { // its own code, ctr's is 1
			t.Errorf("a program that fails: %s", r)
		}
	})
}

// TestContainerdReadOnly runs containers on a view of an image, and with a root that
// they may not write.
func TestContainerdReadOnly(t *testing.T) {
	withContainerd(t, func(t *testing.T, c *ctrd) {
		_, _, ref := c.pushed(forms.EStargz, "readonly")
		img := c.pull(ref)
		for id, l := range map[string]launch{
			"view":     {snapshot: client.WithNewSnapshotView("view", img), spec: []oci.SpecOpts{oci.WithRootFSReadonly()}},
			"readonly": {spec: []oci.SpecOpts{oci.WithRootFSReadonly()}},
		} {
			if code, out := c.startAs(id, img, l, "/bin/child", "sum", "/own/file").ended(); code != 0 || strings.TrimSpace(out) != sumOf(content("readonly", 300_000)) {
				t.Errorf("%s: exit %d: %s", id, code, out)
			}
			if code, out := c.startAs(id, img, l, "/bin/child", "change", "/changed").ended(); code != 1 || !strings.Contains(out, "read-only file system") {
				t.Errorf("%s: a write: exit %d: %s", id, code, out)
			}
		}
		c.lowersAre("four containers", 1)
	})
}

// TestContainerdUserNamespace runs a container whose root is somebody else outside.
func TestContainerdUserNamespace(t *testing.T) {
	withContainerd(t, func(t *testing.T, c *ctrd) {
		_, _, ref := c.pushed(forms.EStargz, "mapped")
		img := c.pull(ref)
		ids := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100_000, Size: 131_072}}
		must(t, os.Chmod(c.dir, 0o711)) // its root comes there as somebody else
		k := c.startAs("mapped", img, launch{
			snapshot: client.WithNewSnapshot("mapped", img, client.WithRemapperLabels(0, 100_000, 0, 100_000, 131_072)),
			spec:     []oci.SpecOpts{oci.WithUserNamespace(ids, ids)}, network: true,
		}, "/bin/child", "wait", "/etc")
		if got := k.exec("/bin/child", "sum", "/own/file"); got != sumOf(content("mapped", 300_000)) {
			t.Errorf("digest %s", got)
		}
		k.exec("/bin/child", "change", "/changed")
		for name, uid := range map[string]uint32{"own/file": 100_000, "own/user": 101_000, "changed/new": 100_000} {
			if st := stat(t, k.rootfs(name)); st.Uid != uid {
				t.Errorf("%s is of %d, want %d", name, st.Uid, uid)
			}
		}
		k.kill()
		c.removeImage(ref)
		if keys := c.snapshotKeys(); len(keys) > 0 {
			t.Errorf("snapshots left: %v", keys)
		}
		c.lowersAre("all is removed", 0)
	})
}
