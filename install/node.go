// Package install writes what makes the services of a node use a snapshotter: drop-in
// files for containerd, also that of k3s and rke2, keys for Docker, units for systemd.
// It changes as little as can be of what others wrote, says before what it will
// change, and puts everything back if the service refuses it.
package install

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// Node is the machine that something is installed on. The zero value is this one.
type Node struct {
	// Prefix is a directory that holds a machine's files, "" for this machine's own.
	// All paths that are given and told are the machine's.
	Prefix string
	// Offline has nothing run: files are written and that is all.
	Offline bool
	// Run runs a program and gives what it printed; its error has what the program
	// said on stderr. nil runs it on this machine.
	Run func(ctx context.Context, name string, args ...string) ([]byte, error)
}

// real gives where a path of the machine's lies.
func (n *Node) real(path string) string {
	if n.Prefix == "" {
		return path
	}
	return filepath.Join(n.Prefix, path)
}

// run runs a program for at most a minute and a half, systemd's own patience.
func (n *Node) run(ctx context.Context, name string, args ...string) ([]byte, error) {
	if n.Run != nil {
		return n.Run(ctx, name, args...)
	}
	ctx, cancel := context.WithTimeout(ctx, 90*time.Second)
	defer cancel()
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	cmd.WaitDelay = 5 * time.Second
	err := cmd.Run()
	if err == nil {
		return out.Bytes(), nil
	}
	if said := lastLines(errs.String(), 3); said != "" {
		err = fmt.Errorf("%w: %s", err, said)
	}
	return out.Bytes(), fmt.Errorf("%s %s: %w", filepath.Base(name), strings.Join(args, " "), err)
}

// lastLines gives the end of what a program said, bounded.
func lastLines(s string, n int) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	s = strings.Join(lines[max(0, len(lines)-n):], "\n")
	return s[max(0, len(s)-2000):]
}

// booted reports whether systemd runs the machine, as sd_booted(3) does.
func (n *Node) booted() bool {
	st, err := os.Lstat(n.real("/run/systemd/system"))
	return !n.Offline && err == nil && st.IsDir()
}

// active gives the first of the units that runs, "" if none does.
func (n *Node) active(ctx context.Context, units ...string) string {
	for _, u := range units {
		if out, _ := n.run(ctx, "systemctl", "is-active", u); strings.TrimSpace(string(out)) == "active" {
			return u
		}
	}
	return ""
}

// maxFile is the most of a configuration that is read, in bytes.
const maxFile = 1 << 20

// read gives a file's contents, nil if there is none.
func (n *Node) read(path string) ([]byte, error) {
	st, err := os.Stat(n.real(path))
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, err
	case !st.Mode().IsRegular():
		return nil, fmt.Errorf("%s is not a file", path)
	case st.Size() > maxFile:
		return nil, fmt.Errorf("%s has %d bytes: at most %d are read", path, st.Size(), maxFile)
	}
	b, err := os.ReadFile(n.real(path))
	if b == nil && err == nil {
		b = []byte{}
	}
	return b, err
}

// exists reports whether there is something at a path.
func (n *Node) exists(path string) bool {
	_, err := os.Lstat(n.real(path))
	return err == nil
}
