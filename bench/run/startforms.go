package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// target is an image in the registry.
type target struct{ repo, tag string }

// Where the forms of a corpus image are that only starts have a use for.
const (
	repoOptimised = "optimised/" // eStargz, by stargz-snapshotter's client and a run of the workload
	repoSorted    = "sorted/"    // eStargz, by our own conversion from names
	repoConverted = "converted/" // eStargz, by `varve convert --from-profile`
	repoSOCI2     = "soci2/"     // with the index of version 2 that soci makes, as tag soci

	tagSOCI = "soci"
)

// platform is what the corpus is made for.
var platform = v1.Platform{OS: "linux", Architecture: "amd64"}

func (b *bench) there(ctx context.Context, t target) bool {
	ref, err := b.reference(t.repo, t.tag)
	if err != nil {
		return false
	}
	_, err = remote.Head(ref, remote.WithContext(ctx))
	return err == nil
}

func (b *bench) named(t target) string { return b.registry + "/" + t.repo + ":" + t.tag }

// optimised makes sure that the registry holds an image as eStargz optimised for
// its workload: by ctr-remote, which runs it, or without that by our own
// conversion from the names that the workload opens.
func (b *bench) optimised(ctx context.Context, image string, names []string) (t target, err error) {
	t = target{repoOptimised + image, tagEStargz}
	from := target{image, tagPlain}
	if !b.rivals.lazyStargz() {
		t.repo = repoSorted + image
	}
	if b.there(ctx, t) {
		return t, nil
	}
	if !b.rivals.lazyStargz() {
		return t, b.convertedBy(ctx, from, t, names)
	}
	start := time.Now()
	c, err := b.containerd(ctx, "")
	if err != nil {
		return t, err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	args, err := json.Marshal([]string{"/bin/sh", "-c", workloads[image]})
	if err != nil {
		return t, err
	}
	for _, cmd := range []*exec.Cmd{
		c.ctr(ctx, "image", "pull", "--plain-http", "--snapshotter", "overlayfs", b.named(from)),
		c.client(ctx, b.rivals.ctrRemote, "image", "optimize", "--oci", "--period", "60", "--args", string(args), b.named(from), b.named(t)),
		c.ctr(ctx, "image", "push", "--plain-http", b.named(t)),
	} {
		cmd.Env = append(os.Environ(), "PATH="+filepath.Dir(b.rivals.ctrRemote)+":"+os.Getenv("PATH"))
		if _, err := output(cmd); err != nil {
			return t, err
		}
	}
	b.say("optimised %s in %s", image, time.Since(start).Round(time.Second))
	return t, nil
}

// convertedBy converts an image with files first, in order.
func (b *bench) convertedBy(ctx context.Context, from, to target, names []string) (err error) {
	list, err := os.CreateTemp(b.dir, "names-")
	if err != nil {
		return err
	}
	defer os.Remove(list.Name())
	for _, n := range names {
		fmt.Fprintln(list, "/"+n)
	}
	if err := list.Close(); err != nil {
		return err
	}
	return b.convertFrom(ctx, from, to, list.Name())
}

// convertFrom runs `varve convert --from-profile`.
func (b *bench) convertFrom(ctx context.Context, from, to target, profile string) (err error) {
	s, err := b.fresh(ctx, "convert")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.discard()) }()
	cmd := exec.CommandContext(ctx, b.varve, "--root", s.root, "convert", "--insecure", "--quiet", "--from-profile", profile, "--push", b.named(from), b.named(to))
	cmd.Dir = "/"
	_, err = output(cmd)
	return err
}

// withSOCI2 makes sure that the registry holds an image with soci's index of all
// its layers.
func (b *bench) withSOCI2(ctx context.Context, image string) (t target, err error) {
	t = target{repoSOCI2 + image, tagSOCI}
	if b.there(ctx, t) {
		return t, nil
	}
	dir, err := os.MkdirTemp(b.dir, "soci-")
	if err != nil {
		return t, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	from, err := b.reference(image, tagPlain)
	if err != nil {
		return t, err
	}
	img, err := remote.Image(from, remote.WithContext(ctx))
	if err != nil {
		return t, err
	}
	in, out := filepath.Join(dir, "in"), filepath.Join(dir, "out")
	p, err := layout.Write(in, empty.Index)
	if err != nil {
		return t, err
	}
	if err := p.AppendImage(img, layout.WithPlatform(platform)); err != nil {
		return t, err
	}
	if _, err := output(exec.CommandContext(ctx, b.rivals.soci, "convert", "--standalone", "--format", "oci-dir", "--min-layer-size", "0", in, out)); err != nil {
		return t, err
	}
	to, err := b.reference(t.repo, t.tag)
	if err != nil {
		return t, err
	}
	index, err := onlyIndex(out)
	if err != nil {
		return t, err
	}
	return t, remote.WriteIndex(to, index, remote.WithContext(ctx))
}

// onlyIndex is the one list of manifests in a layout.
func onlyIndex(dir string) (v1.ImageIndex, error) {
	all, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return nil, err
	}
	m, err := all.IndexManifest()
	if err != nil {
		return nil, err
	}
	if len(m.Manifests) != 1 {
		return nil, fmt.Errorf("%s holds %d images, not one", dir, len(m.Manifests))
	}
	return all.ImageIndex(m.Manifests[0].Digest)
}
