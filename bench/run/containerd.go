package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// containerd is a daemon of that name with a root, a state and a socket of its own,
// which end with it.
type containerd struct {
	b   *bench
	dir string
	cmd *exec.Cmd
}

// containerdConfig has nothing but what a pull needs: CRI wants a network.
const containerdConfig = `version = 2
root = %q
state = %q
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.aufs", "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.opt"]
[grpc]
  address = %q
[debug]
  level = "error"
`

// containerd starts one on an empty root, with more configuration. Its start is no
// part of any figure.
func (b *bench) containerd(ctx context.Context, more string) (c *containerd, err error) {
	c = &containerd{b: b, dir: filepath.Join(b.dir, "containerd")}
	if err := b.remove(c.dir); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(c.dir, 0o711); err != nil {
		return nil, err
	}
	config := filepath.Join(c.dir, "config.toml")
	text := fmt.Sprintf(containerdConfig, filepath.Join(c.dir, "root"), filepath.Join(c.dir, "state"), c.socket())
	if err := os.WriteFile(config, []byte(text+more), 0o644); err != nil {
		return nil, err
	}
	log, err := os.Create(filepath.Join(c.dir, "log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	c.cmd = exec.Command(b.rivals.containerd, "--config", config)
	c.cmd.Dir = "/"
	c.cmd.Env = append(os.Environ(), "PATH="+filepath.Dir(b.rivals.containerd)+":"+os.Getenv("PATH")) // its shim
	c.cmd.Stdout, c.cmd.Stderr = log, log
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := c.cmd.Start(); err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(20 * time.Second); ; {
		said, err := c.ctr(ctx, "version").CombinedOutput()
		if err == nil {
			return c, nil
		}
		err = fmt.Errorf("ctr version: %w: %.300s", err, said)
		if perr := pause(ctx); perr != nil || time.Now().After(deadline) {
			return nil, errors.Join(err, perr, c.close())
		}
	}
}

func (c *containerd) socket() string { return filepath.Join(c.dir, "sock") }

// ctr is a call of its client.
func (c *containerd) ctr(ctx context.Context, args ...string) *exec.Cmd {
	return c.client(ctx, c.b.rivals.ctr, args...)
}

// client is a call of any program that takes containerd's address as ctr does.
func (c *containerd) client(ctx context.Context, program string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, program, append([]string{"--address", c.socket()}, args...)...)
	cmd.Dir = "/"
	return cmd
}

// cpu is what it and those that it has started and that ended have computed, to
// 10 ms: it decompresses in processes of their own.
func (c *containerd) cpu() (time.Duration, error) {
	const tick = 10 * time.Millisecond // USER_HZ is 100 for whoever reads /proc
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", c.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	// The second field is a name in parentheses, which may hold anything.
	f := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	if len(f) < 15 {
		return 0, fmt.Errorf("/proc/%d/stat has %d fields", c.cmd.Process.Pid, len(f))
	}
	var sum int64
	for _, v := range f[11:15] { // utime, stime, cutime, cstime: proc(5)
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return time.Duration(sum) * tick, nil
}

// close ends it, waits for it and removes what it kept.
func (c *containerd) close() error {
	err := c.cmd.Process.Signal(syscall.SIGTERM)
	var exit *exec.ExitError
	if werr := c.cmd.Wait(); !errors.As(werr, &exit) {
		err = errors.Join(err, werr)
	}
	return errors.Join(err, c.b.remove(c.dir))
}

func (b *bench) containerdVersion(ctx context.Context) string {
	text, err := exec.CommandContext(ctx, b.rivals.containerd, "--version").Output()
	if f := strings.Fields(string(text)); err == nil && len(f) > 2 {
		return f[2]
	}
	return "?"
}
