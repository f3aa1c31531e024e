package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// capabilities are those that containers of containerd and docker have.
var capabilities = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID", "CAP_SETUID",
	"CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
}

// The parts of an OCI bundle's config.json that are used, as the runtime
// specification names them.
type (
	spec struct {
		Version string      `json:"ociVersion"`
		Process specProcess `json:"process"`
		Root    specRoot    `json:"root"`
		Host    string      `json:"hostname"`
		Mounts  []specMount `json:"mounts"`
		Linux   specLinux   `json:"linux"`
	}
	specProcess struct {
		User         specUser            `json:"user"`
		Args         []string            `json:"args"`
		Env          []string            `json:"env"`
		Cwd          string              `json:"cwd"`
		Capabilities map[string][]string `json:"capabilities"`
	}
	specUser struct {
		UID int `json:"uid"`
		GID int `json:"gid"`
	}
	specRoot struct {
		Path string `json:"path"`
	}
	specMount struct {
		Destination string   `json:"destination"`
		Type        string   `json:"type"`
		Source      string   `json:"source"`
		Options     []string `json:"options,omitempty"`
	}
	specNamespace struct {
		Type string `json:"type"`
	}
	specLinux struct {
		Namespaces []specNamespace `json:"namespaces"`
	}
)

// containerSpec is a container with the namespaces, file systems and capabilities
// that `ctr run` gives one, the loopback interface and nothing else of a network.
func containerSpec(root, workload string) spec {
	s := spec{Version: "1.0.2", Root: specRoot{root}, Host: "varve"}
	s.Process.Args = []string{"/bin/sh", "-c", workload}
	s.Process.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	s.Process.Cwd = "/"
	s.Process.Capabilities = map[string][]string{"bounding": capabilities, "effective": capabilities, "permitted": capabilities}
	s.Mounts = []specMount{
		{"/proc", "proc", "proc", []string{"nosuid", "noexec", "nodev"}},
		{"/dev", "tmpfs", "tmpfs", []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{"/dev/pts", "devpts", "devpts", []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
		{"/dev/shm", "tmpfs", "shm", []string{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"}},
		{"/dev/mqueue", "mqueue", "mqueue", []string{"nosuid", "noexec", "nodev"}},
		{"/sys", "sysfs", "sysfs", []string{"nosuid", "noexec", "nodev", "ro"}},
		{"/run", "tmpfs", "tmpfs", []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
	}
	for _, n := range []string{"pid", "ipc", "uts", "mount", "network"} {
		s.Linux.Namespaces = append(s.Linux.Namespaces, specNamespace{n})
	}
	return s
}

// contain runs a workload in a container whose root is a directory, until it has
// ended. It is the same for ours and the rivals. The runtime is a process of its
// own, and what it executes from the root too: this one runs the link that such an
// exec waits for.
func (b *bench) contain(ctx context.Context, root, workload string) (err error) {
	bundle, err := os.MkdirTemp(b.dir, "bundle-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(bundle)) }()
	text, err := json.Marshal(containerSpec(root, workload))
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(bundle, "config.json"), text, 0o600); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, b.rivals.runtime, "--root", filepath.Join(bundle, "state"), "run", "--bundle", bundle, filepath.Base(bundle))
	cmd.Dir = "/"
	said, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %.500s", workload, err, said)
	}
	b.say("  %s: %.200q", workload, strings.TrimSpace(string(said)))
	return nil
}
