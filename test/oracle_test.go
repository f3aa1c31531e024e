package test

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"testing"

	"github.com/containerd/containerd/v2/pkg/archive"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
)

// extracted gives an image's tree as go-containerregistry flattens it and GNU tar
// unpacks it. That flattening knows neither opaque directories nor hard links
// across layers, and lets names of a directory come back that was a file in
// between.
func extracted(t *testing.T, img v1.Image) tree {
	t.Helper()
	dir := t.TempDir()
	r := mutate.Extract(img)
	defer r.Close()
	return untar(t, dir, r)
}

func untar(t *testing.T, dir string, r interface{ Read([]byte) (int, error) }, more ...string) tree {
	t.Helper()
	args := append([]string{"--xattrs", "--xattrs-include=*", "--numeric-owner", "--same-owner", "--delay-directory-restore", "-xpf", "-", "-C", dir}, more...)
	cmd := exec.Command("tar", args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8")
	cmd.Stdin = r
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("tar: %v\n%s", err, out)
	}
	return readTree(t, dir)
}

// applied gives the tree that containerd unpacks layers to. It does not set
// trusted.* nor what the image says of the root, and knows no time before 1970.
func applied(t *testing.T, layers ...[]byte) tree {
	t.Helper()
	dir := t.TempDir()
	for _, l := range layers {
		_, err := archive.Apply(context.Background(), dir, bytes.NewReader(l))
		must(t, err)
	}
	return readTree(t, dir)
}
