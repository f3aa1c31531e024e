// Package demo shows the main job on any machine, with no outside network: a
// real tree of this machine as an image in a registry behind a slow link,
// mounted, listed, and a program run from it.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/docker/go-units"

	"github.com/varvefs/varve/bench/forms"
	"github.com/varvefs/varve/bench/link"
	"github.com/varvefs/varve/daemon"
)

// Options say what to show.
type Options struct {
	Image   string       // "" for the Go toolchain of this machine
	Command []string     // what to run in a given image; "" for /bin/true
	Link    link.Profile // between the registry and the daemon
	Face    string
	Out     io.Writer
}

// Run shows it. It has a daemon and a store of its own, which are gone when it
// returns.
func Run(ctx context.Context, o Options) (err error) {
	dir, err := os.MkdirTemp("", "varve-demo-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	s := show{Options: o, dir: dir}
	command := s.chrooted
	if o.Image == "" {
		if err := s.pack(ctx); err != nil {
			return err
		}
		defer s.registry.Close()
		command = s.goVersion
	} else if err := s.throughLink(ctx); err != nil {
		return err
	}
	if s.link != nil {
		defer s.link.Close()
	}
	return s.mountAndRun(ctx, command)
}

type show struct {
	Options
	dir      string
	registry *forms.Server
	link     *link.Link
}

func (s *show) say(format string, args ...any) { fmt.Fprintf(s.Out, format+"\n", args...) }

// pack makes the image of the Go toolchain and serves it behind the link.
func (s *show) pack(ctx context.Context) error {
	out, err := exec.CommandContext(ctx, "go", "env", "GOROOT").Output()
	root := strings.TrimSpace(string(out))
	if err != nil || root == "" {
		return fmt.Errorf("find the Go toolchain (go env GOROOT): %w; varve demo IMAGE needs none", err)
	}
	files := 0
	filepath.WalkDir(root, func(string, fs.DirEntry, error) error { files++; return nil })
	s.say("packing %s, %d files, as an eStargz image ...", root, files)
	start := time.Now()
	blobs := filepath.Join(s.dir, "blobs")
	if err := os.Mkdir(blobs, 0o700); err != nil {
		return err
	}
	r, w := io.Pipe()
	go func() { w.CloseWithError(forms.Pack(ctx, root, w)) }()
	img, err := forms.LoadTar(ctx, r, forms.EStargz, forms.Options{Dir: blobs})
	r.Close()
	if err != nil {
		return fmt.Errorf("pack %s: %w", root, err)
	}
	if s.registry, err = forms.Registry(filepath.Join(s.dir, "registry")); err != nil {
		return err
	}
	const name = "/demo/go:latest"
	if err := forms.Push(ctx, img, s.registry.Addr()+name); err != nil {
		return err
	}
	s.say("packed and pushed in %s", round(time.Since(start)))
	if s.link, err = link.Start(ctx, s.registry.Addr(), s.Link); err != nil {
		return err
	}
	s.Image = s.link.Addr() + name
	return nil
}

// throughLink puts the link before the image's registry where that is on this
// machine. A registry elsewhere has a link of its own.
func (s *show) throughLink(ctx context.Context) error {
	host, rest, ok := strings.Cut(s.Image, "/")
	name, _, _ := net.SplitHostPort(host)
	if ip := net.ParseIP(name); !ok || name != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return nil
	}
	l, err := link.Start(ctx, host, s.Link)
	if err != nil {
		return err
	}
	s.link, s.Image = l, l.Addr()+"/"+rest
	return nil
}

func (s *show) mountAndRun(ctx context.Context, command func(context.Context, string) *exec.Cmd) (err error) {
	dirs, err := daemon.DirsFromEnv(s.dir)
	if err != nil {
		return err
	}
	c := daemon.NewClient(dirs)
	if _, err := c.Version(ctx); err != nil { // the daemon's start is not part of it
		return err
	}
	defer func() { err = errors.Join(err, c.Stop(context.WithoutCancel(ctx))) }()
	if s.link != nil {
		s.say("mounting through a link of %s", s.link.Profile())
	}
	start := time.Now()
	m, err := c.Mount(ctx, daemon.MountOptions{ImageOptions: daemon.ImageOptions{Image: s.Image, Auth: daemon.AuthFromEnv()}, Face: s.Face})
	if err != nil {
		return err
	}
	defer func() {
		_, uerr := c.Unmount(context.WithoutCancel(ctx), daemon.UnmountOptions{Mount: m.ID, Force: true})
		err = errors.Join(err, uerr)
	}()
	names, err := os.ReadDir(m.Dir)
	if err != nil {
		return err
	}
	s.say("first listing after %s: %d names, %d files in all (%s face)", round(time.Since(start)), len(names), m.Files, m.Face)
	cmd := command(ctx, m.Dir)
	cmd.Stdout, cmd.Stderr = s.Out, s.Out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("run %s from the mount: %w", strings.Join(cmd.Args, " "), err)
	}
	s.say("the program ended after %s", round(time.Since(start)))
	v, err := c.Inspect(ctx, m.ID)
	if err != nil {
		return err
	}
	s.say("fetched %s of the %s in the image (%.1f %%)", units.HumanSizeWithPrecision(float64(v.Fetched), 3),
		units.HumanSizeWithPrecision(float64(v.Size), 3), 100*float64(v.Fetched)/float64(max(v.Size, 1)))
	return nil
}

func round(d time.Duration) time.Duration { return d.Round(time.Millisecond) }

// The program is started by another one, env(1) or chroot(1), never by this
// process: its threads stand still while a child of Go's execs, and the registry
// and the link that the exec waits for are among them.

func (s *show) goVersion(ctx context.Context, dir string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "env", filepath.Join(dir, "bin", "go"), "version")
	cmd.Env = []string{"GOROOT=" + dir, "GOTOOLCHAIN=local", "HOME=" + s.dir, "PATH=/usr/bin:/bin"}
	cmd.Dir = "/"
	return cmd
}

// chrooted runs a command with the mount as its root, which needs root.
func (s *show) chrooted(ctx context.Context, dir string) *exec.Cmd {
	args := s.Command
	if len(args) == 0 {
		args = []string{"/bin/true"}
	}
	cmd := exec.CommandContext(ctx, "chroot", append([]string{dir}, args...)...)
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/"}
	cmd.Dir = "/"
	return cmd
}
