// Package daemon is the long-lived process: it wires a mount together from an
// image, its layers, their index and a face, holds mounts across restarts, and
// answers on a unix socket. The client of that socket is here too.
package daemon

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// Dirs are the directories of one daemon. The state is names, manifests and
// what is mounted; the cache may be deleted while no daemon runs.
type Dirs struct {
	Config string
	State  string
	Cache  string
	Run    string
	Socket string
}

// Snapshots is the socket on which containerd finds its snapshotter.
func (d *Dirs) Snapshots() string { return filepath.Join(d.Run, "snapshotter.sock") }

// DirsFromEnv gives the directories of this user: the system's for root, those
// of the XDG base directory specification for others. root, if not empty, puts
// state, cache and runtime files below one directory; VARVE_ROOT is its
// environment form, VARVE_CACHE, VARVE_CONFIG and VARVE_HOST name single ones.
func DirsFromEnv(root string) (Dirs, error) {
	if root == "" {
		root = os.Getenv("VARVE_ROOT")
	}
	d := Dirs{Config: "/etc/varve", State: "/var/lib/varve", Cache: "/var/cache/varve", Run: "/run/varve"}
	if os.Geteuid() != 0 {
		home, err := os.UserHomeDir()
		if err != nil && root == "" {
			return d, fmt.Errorf("find the home directory: %w", err)
		}
		d.Config = filepath.Join(env("XDG_CONFIG_HOME", filepath.Join(home, ".config")), "varve")
		d.State = filepath.Join(env("XDG_DATA_HOME", filepath.Join(home, ".local/share")), "varve")
		d.Cache = filepath.Join(env("XDG_CACHE_HOME", filepath.Join(home, ".cache")), "varve")
		d.Run = filepath.Join(env("XDG_RUNTIME_DIR", filepath.Join(os.TempDir(), fmt.Sprintf("varve-%d", os.Geteuid()))), "varve")
	}
	if root != "" {
		abs, err := filepath.Abs(root)
		if err != nil {
			return d, err
		}
		d.State, d.Cache, d.Run = filepath.Join(abs, "state"), filepath.Join(abs, "cache"), filepath.Join(abs, "run")
	}
	d.Config = env("VARVE_CONFIG", d.Config)
	d.Cache = env("VARVE_CACHE", d.Cache)
	d.Socket = filepath.Join(d.Run, "varve.sock")
	// A socket's path has 107 bytes at most (unix(7)).
	if len(d.Socket) > 107 {
		sum := sha256.Sum256([]byte(d.Socket))
		d.Socket = filepath.Join(os.TempDir(), fmt.Sprintf("varve-%d-%x.sock", os.Geteuid(), sum[:8]))
	}
	if host := os.Getenv("VARVE_HOST"); host != "" {
		return d, d.SetHost(host)
	}
	return d, nil
}

// SetHost takes the socket from a unix:// address, as --host gives it.
func (d *Dirs) SetHost(host string) error {
	const scheme = "unix://"
	if len(host) <= len(scheme) || host[:len(scheme)] != scheme || !filepath.IsAbs(host[len(scheme):]) {
		return fmt.Errorf("host %q: want unix:///path/to/varve.sock", host)
	}
	d.Socket = host[len(scheme):]
	return nil
}

// Mounts is where mounts without a directory of their own are put.
func (d *Dirs) Mounts() string { return filepath.Join(d.Run, "mnt") }

// Lowers is where the images are mounted that other mounts lie on.
func (d *Dirs) Lowers() string { return filepath.Join(d.Run, "lower") }

// make creates the directories. Only the runtime directory, which mounts are
// reached through, may be entered by others.
func (d *Dirs) make() error {
	var errs []error
	for _, p := range []struct {
		path string
		mode os.FileMode
	}{{d.State, 0o700}, {filepath.Join(d.State, "mounts"), 0o700}, {d.Cache, 0o700}, {filepath.Join(d.Cache, "index"), 0o700}, {d.Run, 0o755}, {d.Mounts(), 0o755}, {d.Lowers(), 0o700}, {filepath.Dir(d.Socket), 0o755}} {
		if err := os.MkdirAll(p.path, p.mode); err != nil {
			errs = append(errs, fmt.Errorf("make %s: %w", p.path, err))
		}
	}
	return errors.Join(errs...)
}

func env(key, otherwise string) string {
	if v := os.Getenv(key); v != "" {
		return v
	}
	return otherwise
}
