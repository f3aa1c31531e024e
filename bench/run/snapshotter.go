package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// snapshotterKind is a lazy snapshotter of containerd.
type snapshotterKind struct {
	name      string
	program   func(*rivals) string
	pullFlags []string
	// config is the text of its configuration, for a registry at an address.
	config func(registry string) string
}

var kindOverlayfs = snapshotterKind{name: "overlayfs"}

// kindStargz has the settings that it comes with: prefetch of what an optimised
// image puts first, background fetch once that is done.
var kindStargz = snapshotterKind{
	name:    "stargz",
	program: func(r *rivals) string { return r.stargz },
	config: func(registry string) string {
		return fmt.Sprintf("[[resolver.host.%q.mirrors]]\nhost = %q\ninsecure = true\n", registry, registry)
	},
}

// kindSOCI has the settings that it comes with, which take indexes of version 2.
var kindSOCI = snapshotterKind{
	name:      "soci",
	program:   func(r *rivals) string { return r.sociGRPC },
	pullFlags: []string{"--use-containerd-labels"},
	config: func(registry string) string {
		return fmt.Sprintf("[[resolver.host.%q.mirrors]]\nhost = %q\ninsecure = true\n", registry, "http://"+registry)
	},
}

// snapshotter is one that runs, with a root and a socket of its own.
type snapshotter struct {
	b    *bench
	kind snapshotterKind
	dir  string
	cmd  *exec.Cmd
}

func (s *snapshotter) socket() string { return filepath.Join(s.dir, "sock") }

// snapshotter starts one on an empty root. Its start is no part of any figure.
func (b *bench) snapshotter(ctx context.Context, w *wire, kind snapshotterKind) (*snapshotter, error) {
	s := &snapshotter{b: b, kind: kind, dir: filepath.Join(b.dir, kind.name)}
	if err := errors.Join(unmountBelow(s.dir), b.remove(s.dir)); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(s.dir, 0o711); err != nil {
		return nil, err
	}
	config := filepath.Join(s.dir, "config.toml")
	if err := os.WriteFile(config, []byte(kind.config(w.link.Addr())), 0o644); err != nil {
		return nil, err
	}
	log, err := os.Create(filepath.Join(s.dir, "log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	s.cmd = exec.Command(kind.program(&b.rivals), "--address", s.socket(), "--config", config, "--root", filepath.Join(s.dir, "root"), "--log-level", "warn")
	s.cmd.Dir = "/"
	s.cmd.Stdout, s.cmd.Stderr = log, log
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(20 * time.Second); ; {
		c, err := net.Dial("unix", s.socket())
		if err == nil {
			return s, c.Close()
		}
		if perr := pause(ctx); perr != nil || time.Now().After(deadline) {
			said, _ := os.ReadFile(log.Name())
			return nil, errors.Join(fmt.Errorf("%s does not listen: %w: %.500s", kind.name, err, said), perr, s.close())
		}
	}
}

// close ends it, waits for it and removes what it kept. On SIGINT both unmount
// what they serve.
func (s *snapshotter) close() error {
	if s == nil {
		return nil
	}
	err := s.cmd.Process.Signal(syscall.SIGINT)
	late := time.AfterFunc(20*time.Second, func() { s.cmd.Process.Kill() })
	var exit *exec.ExitError
	if werr := s.cmd.Wait(); !errors.As(werr, &exit) {
		err = errors.Join(err, werr)
	}
	late.Stop()
	if said, rerr := os.ReadFile(filepath.Join(s.dir, "log")); rerr == nil && len(said) > 0 {
		s.b.log.Write(said[:min(len(said), 64<<10)]) // why it was not lazy, for who wonders
	}
	return errors.Join(err, unmountBelow(s.dir), s.b.remove(s.dir))
}
