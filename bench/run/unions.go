package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/daemon"
)

// union is a writable tree over one that is not: a mount of ours, or a rival's
// over the same tree on ext4.
type union interface {
	// open mounts it with nothing written yet. What will be goes to a directory
	// that is there.
	open(ctx context.Context, upper string) (dir string, err error)
	// close unmounts it and removes what was written.
	close(ctx context.Context) error
	// cpu is what its daemon has computed so far; 0 without one.
	cpu() (time.Duration, error)
}

// contender is a union in a comparison.
type contender struct {
	name  string
	rival string // the one whose time is the measure; "" of a rival
	union
}

// contenders are both writers of ours over an image, each after its rival over
// dir, which holds the image's tree.
func (s *server) contenders(image, dir string) []contender {
	b := s.bench
	return []contender{
		{"overlayfs", "", &overlayfs{over{b: b, lower: dir}}},
		{"varve kernel", "overlayfs", &ours{s: s, image: image, overlay: "kernel"}},
		{"fuse-overlayfs", "", &fuseOverlayfs{over: over{b: b, lower: dir}}},
		{"varve fuse", "fuse-overlayfs", &ours{s: s, image: image, overlay: "fuse"}},
	}
}

// turn gives the contenders of one turn: each begins a turn as often as the others.
func turn[T any](v []T, i int) []T {
	i %= len(v)
	return append(append([]T{}, v[i:]...), v[:i]...)
}

type ours struct {
	s              *server
	image, overlay string
}

func (o *ours) open(ctx context.Context, upper string) (string, error) {
	m, err := o.s.client.Mount(ctx, daemon.MountOptions{
		ImageOptions: daemon.ImageOptions{Image: o.image, Insecure: true},
		Name:         "m", RW: true, Overlay: o.overlay, Upper: filepath.Join(upper, "varve"),
	})
	if err != nil {
		return "", err
	}
	return m.Dir, nil
}

func (o *ours) close(ctx context.Context) error {
	_, err := o.s.client.Unmount(ctx, daemon.UnmountOptions{Mount: "m", Remove: true})
	return err
}

func (o *ours) cpu() (time.Duration, error) { return o.s.cpu() }

// over is what both rivals have: directories of their own.
type over struct {
	b          *bench
	lower, dir string
}

func (o *over) path(name string) string { return filepath.Join(o.dir, name) }

func (o *over) options() string {
	return fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", o.lower, o.path("upper"), o.path("work"))
}

func (o *over) make(upper string) error {
	o.dir = filepath.Join(upper, "rival")
	for _, name := range []string{"upper", "work", "merged"} {
		if err := os.MkdirAll(o.path(name), 0o755); err != nil {
			return err
		}
	}
	return nil
}

func (o *over) unmake() error {
	if err := unix.Unmount(o.path("merged"), 0); err != nil {
		return fmt.Errorf("unmount %s: %w", o.path("merged"), err)
	}
	return nil
}

type overlayfs struct{ over }

func (o *overlayfs) open(_ context.Context, upper string) (string, error) {
	if err := o.make(upper); err != nil {
		return "", err
	}
	// As a container engine mounts it; the rest is the kernel's default.
	return o.path("merged"), unix.Mount("overlay", o.path("merged"), "overlay", 0, o.options())
}

func (o *overlayfs) close(context.Context) error {
	if err := o.unmake(); err != nil {
		return err
	}
	return o.b.remove(o.dir)
}

func (o *overlayfs) cpu() (time.Duration, error) { return 0, nil }

type fuseOverlayfs struct {
	over
	program string // "" for the one in PATH
	process *exec.Cmd
}

func (o *fuseOverlayfs) open(ctx context.Context, upper string) (string, error) {
	if err := o.make(upper); err != nil {
		return "", err
	}
	dir := o.path("merged")
	var said bytes.Buffer
	o.process = exec.Command(cmp.Or(o.program, "fuse-overlayfs"), "-f", "-o", o.options(), dir)
	o.process.Dir = "/"
	o.process.Stdout, o.process.Stderr = &said, &said
	o.process.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := o.process.Start(); err != nil {
		return "", err
	}
	for deadline := time.Now().Add(10 * time.Second); ; {
		var st unix.Statfs_t
		if err := unix.Statfs(dir, &st); err == nil && st.Type == unix.FUSE_SUPER_MAGIC {
			return dir, nil
		}
		err := pause(ctx)
		if err == nil && time.Now().After(deadline) {
			err = errors.New("fuse-overlayfs does not mount")
		}
		if err != nil {
			o.process.Process.Kill()
			return "", errors.Join(err, o.process.Wait(), errors.New(said.String()))
		}
	}
}

func (o *fuseOverlayfs) close(context.Context) error {
	if err := errors.Join(o.unmake(), o.process.Wait()); err != nil {
		return err
	}
	return o.b.remove(o.dir)
}

func (o *fuseOverlayfs) cpu() (time.Duration, error) { return (&server{cmd: o.process}).cpu() }
