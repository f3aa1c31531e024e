package main

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"

	"github.com/varvefs/varve/bench/forms"
	"github.com/varvefs/varve/daemon"
)

// localOptions say how large the local images are.
type localOptions struct {
	files         int    // of the image of many
	megabytes     int    // MiB, of the one file of the other
	fuseOverlayfs string // the rival's program, "" for none
}

// localImage is an image that needs no registry, and what it is made of.
type localImage struct {
	name   string
	layers []func(io.Writer) error // the tars, the same every time
}

// bigFile is the only file of the image of one.
const bigFile = "file"

func (b *bench) localImages(ctx context.Context) (many, big localImage, err error) {
	pool, err := sourceText(ctx)
	if err != nil {
		return many, big, err
	}
	many.name = fmt.Sprintf("many-%d", b.local.files)
	for i := range trees {
		many.layers = append(many.layers, func(w io.Writer) error { return writeTreeOf(w, i, pool, b.local.files) })
	}
	size := int64(b.local.megabytes) << 20
	big.name = fmt.Sprintf("big-%d", b.local.megabytes)
	big.layers = []func(io.Writer) error{func(w io.Writer) error { return writeBig(w, size) }}
	return many, big, nil
}

// writeBig writes a tar of one file of noise, which no file system takes for a
// hole and nothing makes smaller.
func writeBig(w io.Writer, size int64) error {
	out := tar.NewWriter(w)
	if err := out.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: bigFile, Mode: 0o644, Size: size}); err != nil {
		return err
	}
	if _, err := io.CopyN(out, rand.NewChaCha8([32]byte{2}), size); err != nil {
		return err
	}
	return out.Close()
}

// stream gives a layer's tar. The reader's Close ends who writes it.
func stream(write func(io.Writer) error) *io.PipeReader {
	r, w := io.Pipe()
	go func() { w.CloseWithError(write(w)) }()
	return r
}

// layout makes an OCI layout of an image in the scratch directory, once.
func (b *bench) layout(ctx context.Context, i localImage) (path string, err error) {
	path = filepath.Join(b.dir, "local-"+i.name)
	return path, made(path, func(path string) error {
		scratch, err := os.MkdirTemp(b.dir, "local-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(scratch)
		var open []forms.Opener
		for _, write := range i.layers {
			open = append(open, func() (io.ReadCloser, error) { return stream(write), nil })
		}
		img, err := forms.FromLayers(ctx, forms.Zstd, forms.Options{Dir: scratch}, open...)
		if err != nil {
			return err
		}
		l, err := layout.Write(path, empty.Index)
		if err != nil {
			return err
		}
		return l.AppendImage(img)
	})
}

// unpack does with an image what an engine without lazy mounts does.
func (i localImage) unpack(ctx context.Context, dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	for _, write := range i.layers {
		r := stream(write)
		cmd := exec.CommandContext(ctx, "tar", "-x", "-C", dir)
		cmd.Stdin = r
		said, err := cmd.CombinedOutput()
		r.Close()
		if err != nil {
			return fmt.Errorf("unpack %s: %w: %.300s", i.name, err, said)
		}
	}
	return nil
}

// bring mounts an image by the FUSE face and waits until all of it is here. It
// stays in the store.
func (s *server) bring(ctx context.Context, path string) error {
	m, err := s.client.Mount(ctx, daemon.MountOptions{ImageOptions: daemon.ImageOptions{Image: "oci:" + path}, Face: "fuse", Name: "m", Wait: true})
	if err != nil {
		return err
	}
	for _, l := range m.Layers {
		if !l.Whole {
			err = fmt.Errorf("layer %.19s of %s is not whole (%s)", l.Digest, path, l.Reason)
		}
	}
	return errors.Join(err, s.unmount(ctx))
}

// on is this measure with another scratch directory.
func (b *bench) on(dir string) *bench {
	c := *b
	c.dir = dir
	return &c
}
