package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"

	"github.com/varvefs/varve/bench/forms"
)

const (
	copyUpSize   = 100_000_000
	copyUpTarget = 1.3 // times cp
)

// copyUp has the one large file of an image opened for writing.
func (b *bench) copyUp(ctx context.Context, s *server, out *section) error {
	plain, image, err := b.largeFile(ctx)
	if err != nil {
		return err
	}
	unions := s.contenders("oci:"+image, plain)
	from, to := filepath.Join(plain, "file"), filepath.Join(b.dir, "copied")
	copies := map[string]string{"cp": `cp "$0" "$1"`, "cp, sync": `cp "$0" "$1" && sync "$1"`}
	names := []string{"cp", "cp, sync", "overlayfs", "varve kernel", "fuse-overlayfs", "varve fuse"}
	got := map[string][]time.Duration{}
	for i := range b.n {
		for _, name := range turn(names, i) {
			var took time.Duration
			if script := copies[name]; script != "" {
				took, err = timeShell(ctx, from, script, to)
				err = errors.Join(err, os.Remove(to))
			} else {
				for _, c := range unions {
					if c.name == name {
						took, err = c.copyUp(ctx, b)
					}
				}
			}
			if err != nil {
				return fmt.Errorf("copy-up, %s: %w", name, err)
			}
			got[name] = append(got[name], took)
		}
	}
	out.line("")
	out.line("**Copy-up** of a file of %d MB, the only one of its image (eStargz, from an OCI layout): `sh -c ': >> FILE'` in a mount with an empty upper. The file was read once through the mount, or from ext4, just before, so that it is local and in the page cache. *cp* is `sh -c 'cp FILE COPY'` within the ext4 that the store and the uppers lie on, *cp, sync* with `sync COPY` after it: a copy-up ends with an fsync of the copy, the kernel's own too, since what was there before must survive the machine's fall. n=%d, in turns.", copyUpSize/1_000_000, b.n)
	out.line("")
	out.line("| | ms | least | / cp | target | / (cp, sync) | by least | target |")
	out.line("|---|--:|--:|--:|---|--:|--:|---|")
	for _, name := range names {
		v := got[name]
		cp := float64(median(v)) / float64(median(got["cp"]))
		synced := float64(median(v)) / float64(median(got["cp, sync"]))
		least := float64(lowest(v)) / float64(lowest(got["cp, sync"]))
		bare, whole := "", ""
		if strings.HasPrefix(name, "varve") {
			bare = fmt.Sprintf("<= %.1f %s", copyUpTarget, verdict(cp, copyUpTarget))
			whole = fmt.Sprintf("<= %.1f %s", copyUpTarget, verdict(synced, copyUpTarget))
		}
		out.line("| %s | %s | %s | %.2f | %s | %.2f | %.2f | %s |", name, ms(median(v)), ms(lowest(v)), cp, bare, synced, least, whole)
		b.say("copy-up %s: ms %s", name, all(v, ms))
	}
	return nil
}

func (c contender) copyUp(ctx context.Context, b *bench) (took time.Duration, err error) {
	upper, err := os.MkdirTemp(b.dir, "upper-")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, b.remove(upper)) }()
	dir, err := c.open(ctx, upper)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, c.close(context.WithoutCancel(ctx))) }()
	return timeShell(ctx, filepath.Join(dir, "file"), `: >> "$0"`)
}

// timeShell runs a script on a file that was just read.
func timeShell(ctx context.Context, file, script string, args ...string) (time.Duration, error) {
	if err := readAll(file); err != nil {
		return 0, err
	}
	syscall.Sync()
	cmd := exec.CommandContext(ctx, "sh", append([]string{"-c", script, file}, args...)...)
	cmd.Dir = "/"
	start := time.Now()
	if said, err := cmd.CombinedOutput(); err != nil {
		return 0, fmt.Errorf("%s: %w: %.300s", script, err, said)
	}
	return time.Since(start), nil
}

// largeFile makes a directory with one large file, and a layout with an image of
// it.
func (b *bench) largeFile(ctx context.Context) (tree, image string, err error) {
	tree, image = filepath.Join(b.dir, "copyup-tree"), filepath.Join(b.dir, "copyup-oci")
	if err := made(tree, func(path string) error {
		if err := os.Mkdir(path, 0o755); err != nil {
			return err
		}
		f, err := os.Create(filepath.Join(path, "file"))
		if err != nil {
			return err
		}
		defer f.Close()
		if _, err := io.CopyN(f, rand.NewChaCha8([32]byte{1}), copyUpSize); err != nil {
			return err
		}
		return f.Close()
	}); err != nil {
		return "", "", err
	}
	return tree, image, made(image, func(path string) error {
		scratch, err := os.MkdirTemp(b.dir, "copyup-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(scratch)
		r, w := io.Pipe()
		go func() { w.CloseWithError(forms.Pack(ctx, tree, w)) }()
		img, err := forms.LoadTar(ctx, r, forms.EStargz, forms.Options{Dir: scratch})
		r.Close() // so that the packer ends, if it has not
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
