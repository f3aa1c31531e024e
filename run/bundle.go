package run

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// A Bundle is a container as a runtime takes it.
type Bundle struct {
	Dir      string      // with config.json; the runtime's --bundle
	Spec     *specs.Spec // what config.json holds
	Warnings []string    // what was not done as asked, for the user
	// NoCgroups says that the control groups here cannot be had: crun wants
	// --cgroup-manager=disabled then. A limit that was asked for is an error of
	// Make's instead.
	NoCgroups bool
}

const bundleDir = "bundle"

// Make writes the bundle of c, in the place of an older one: the volumes (with
// what the image has at their places, where they are new), the files that are
// mounted over the root's own (/etc/hostname, hosts, resolv.conf), the mount
// points that the root lacks, config.json. Errors are the user's to read and name
// what to do; nothing need be undone after one but [Tidy].
func Make(ctx context.Context, c Container) (*Bundle, error) {
	if err := c.Options.Check(); err != nil {
		return nil, err
	}
	for _, dir := range []string{c.Root, c.Dir} {
		if !filepath.IsAbs(dir) {
			return nil, fmt.Errorf("container %s: directory %q is not absolute", c.ID, dir)
		}
	}
	m := &maker{c: &c}
	var err error
	if m.args, err = Command(c.Options, c.Image); err != nil {
		return nil, err
	}
	if m.priv, err = readPrivilege(); err != nil {
		return nil, err
	}
	if m.cgroups, err = readCgroups(); err != nil {
		return nil, fmt.Errorf("look at the control groups: %w", err)
	}
	if m.hostname, err = c.hostname(); err != nil {
		return nil, err
	}
	t, err := openTree(c.Root)
	if err != nil {
		return nil, fmt.Errorf("the root of container %s: %w", c.ID, err)
	}
	defer t.Close()
	if m.user, m.home, err = lookup(t, c.user(), c.Options.Groups); err != nil {
		return nil, err
	}
	if err := m.priv.check(c.Root, &m.user); err != nil {
		return nil, err
	}
	if m.priv.plain && len(c.Options.Groups) > 0 {
		m.warn("A plain user's container has no further groups: those asked for are left out.")
	}
	users, err := places(c.Options, c.Image)
	if err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return m.write(t, users)
}

// user is who runs the container.
func (c *Container) user() string {
	if c.Options.User != "" {
		return c.Options.User
	}
	return c.Image.User
}

// write puts everything where it belongs.
func (m *maker) write(t *tree, users []place) (*Bundle, error) {
	c := m.c
	s, err := m.spec()
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(c.Dir, bundleDir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if err := c.prepare(t, users, m.priv); err != nil {
		return nil, err
	}
	if err := c.makeWorkdir(t, s.Process.Cwd, users); err != nil {
		return nil, err
	}
	etc, err := c.etc(dir, m.hostname)
	if err != nil {
		return nil, err
	}
	usual := c.kernelMounts(m.priv, m.cgroups)
	if s.Mounts, err = c.mounts(usual, etc, users, m.priv); err != nil {
		return nil, err
	}
	s.Linux.RootfsPropagation = propagation(users)
	if c.Options.Init {
		file, err := findInit()
		if err != nil {
			return nil, err
		}
		s.Mounts = append(s.Mounts, specs.Mount{Destination: initPath, Type: "bind", Source: file, Options: []string{"bind", "ro"}})
		s.Process.Args = append([]string{initPath, "--"}, s.Process.Args...)
	}
	if err := mountPoints(t, dir, s.Mounts); err != nil {
		return nil, err
	}
	raw, err := json.MarshalIndent(s, "", "\t")
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), raw, 0o600); err != nil {
		return nil, err
	}
	return &Bundle{Dir: dir, Spec: s, Warnings: m.warnings, NoCgroups: s.Linux.CgroupsPath == ""}, nil
}

// makeWorkdir makes the working directory in the root, or in the volume that it
// lies in, where it stays, as docker does. In a host's directory or a tmpfs the
// runtime makes it.
func (c *Container) makeWorkdir(t *tree, dir string, users []place) error {
	if dir == "/" {
		return nil
	}
	var in place
	for _, u := range users { // upper ones first
		if dir == u.dest || strings.HasPrefix(dir, u.dest+"/") {
			in = u
		}
	}
	if in.dest != "" {
		if in.kind != volumePlace || dir == in.dest {
			return nil
		}
		volume, err := openTree(in.source)
		if err != nil {
			return err
		}
		defer volume.Close()
		t, dir = volume, strings.TrimPrefix(dir, in.dest)
	}
	for _, kernels := range []string{"/proc", "/sys", "/dev"} {
		if dir == kernels || strings.HasPrefix(dir, kernels+"/") {
			return nil
		}
	}
	_, err := t.make(dir, true, 0o755)
	if errors.Is(err, unix.ENOTDIR) {
		return fmt.Errorf("Cannot mkdir: %s is not a directory", path.Clean(dir))
	} else if err != nil {
		return fmt.Errorf("make the working directory: %w", err)
	}
	return nil
}

// Load reads the config.json that Make wrote below dir, which is Container.Dir.
func Load(dir string) (*specs.Spec, error) {
	raw, err := os.ReadFile(filepath.Join(dir, bundleDir, "config.json"))
	if err != nil {
		return nil, err
	}
	var s specs.Spec
	if err := json.Unmarshal(raw, &s); err != nil {
		return nil, fmt.Errorf("read the bundle in %s: %w", dir, err)
	}
	if s.Process == nil || s.Linux == nil || s.Root == nil {
		return nil, fmt.Errorf("read the bundle in %s: it is not a container's", dir)
	}
	return &s, nil
}
