package run

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const defaultShm = 64 << 20

// kernelMounts are what every container has.
func (c *Container) kernelMounts(p *privilege, cg cgroups) []specs.Mount {
	o, quiet := &c.Options, []string{"nosuid", "noexec", "nodev"}
	shm := o.ShmSize
	if shm == 0 {
		shm = defaultShm
	}
	pts := []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"}
	if p.has(p.gids, 5) {
		pts = append(pts, "gid=5")
	}
	sys := quiet
	if !o.Security.Privileged {
		sys = slices.Concat(quiet, []string{"ro"})
	}
	all := []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: quiet},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: pts},
		{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: append(slices.Clone(quiet), "mode=1777", fmt.Sprintf("size=%d", shm))},
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: quiet},
	}
	if p.confined() && o.Network != NetworkNone {
		// sysfs is mounted by who owns the network alone.
		return append(all, specs.Mount{Destination: "/sys", Type: "bind", Source: "/sys", Options: slices.Concat([]string{"rbind"}, quiet, []string{"ro"})})
	}
	all = append(all, specs.Mount{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: sys})
	if !p.confined() && !cg.none() {
		all = append(all, specs.Mount{Destination: cgroupRoot, Type: "cgroup", Source: "cgroup", Options: sys})
	}
	return all
}

// mounts are all of a container's, in the order in which they are made: a user's
// in the place of a usual one, upper directories first.
func (c *Container) mounts(usual []specs.Mount, etc, users []place, p *privilege) ([]specs.Mount, error) {
	taken := func(dest string) bool {
		return slices.ContainsFunc(users, func(u place) bool {
			return u.dest == dest || u.dest == "/dev" && strings.HasPrefix(dest, "/dev/")
		})
	}
	out := slices.DeleteFunc(usual, func(m specs.Mount) bool { return taken(m.Destination) })
	etc = slices.DeleteFunc(etc, func(e place) bool { return taken(e.dest) })
	// A user's /etc must not hide what belongs over its files.
	all := slices.Concat(users, etc)
	slices.SortStableFunc(all, func(a, b place) int { return strings.Count(a.dest, "/") - strings.Count(b.dest, "/") })
	for _, u := range all {
		m := specs.Mount{Destination: u.dest, Type: "bind", Source: u.source}
		switch u.kind {
		case tmpfsPlace:
			m.Type, m.Source, m.Options = "tmpfs", "tmpfs", u.options
		default:
			m.Options = []string{"rbind", "rw", "rprivate"}
			if u.propagation != "" {
				m.Options[2] = u.propagation
			}
			if u.readOnly {
				m.Options[1] = "ro"
				// What is mounted below it too. crun 1.8 fails with it on a file.
				if fi, err := os.Stat(u.source); err != nil {
					return nil, err
				} else if fi.IsDir() {
					m.Options = append(m.Options, "rro")
				}
			}
			if p.confined() {
				locked, err := lockedFlags(u.source)
				if err != nil {
					return nil, err
				}
				if slices.Contains(locked, "ro") {
					m.Options[1] = "ro"
				}
				m.Options = append(m.Options, locked...)
			}
		}
		out = append(out, m)
	}
	return out, nil
}

// lockedFlags are a mount's that who is no root of the machine may not take away
// when the mount is bound elsewhere (mount_namespaces(7)).
func lockedFlags(name string) (out []string, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(name, &st); err != nil {
		return nil, &os.PathError{Op: "statfs", Path: name, Err: err}
	}
	for _, f := range []struct {
		flag int64
		name string
	}{{unix.ST_NOSUID, "nosuid"}, {unix.ST_NODEV, "nodev"}, {unix.ST_NOEXEC, "noexec"}, {unix.ST_RDONLY, "ro"}} {
		if int64(st.Flags)&f.flag != 0 {
			out = append(out, f.name)
		}
	}
	return out, nil
}

// propagation is how the root's mounts must be joined to the host's for those of
// the users' that are shared or slaves.
func propagation(users []place) (root string) {
	for _, u := range users {
		switch {
		case strings.HasSuffix(u.propagation, "shared"):
			return "shared"
		case strings.HasSuffix(u.propagation, "slave"):
			root = "rslave"
		}
	}
	return root
}

// prepare makes what users mount: volumes, and host directories that are missing,
// as docker does. Each place then has its source.
func (c *Container) prepare(t *tree, users []place, p *privilege) error {
	for i, u := range users {
		if is, err := t.isTop(u.dest); err != nil || is {
			return errors.Join(err, fmt.Errorf("mount at %s: links of the image lead it to '/', which cannot be mounted over", u.dest))
		}
		switch {
		case u.kind == volumePlace:
			top := path.Join(c.Dir, "volumes")
			if u.source != "" {
				if top = c.Volumes; top == "" {
					return fmt.Errorf("volume %s: nobody said where volumes are", u.source)
				}
			}
			dir, err := u.fill(t, top, p.alone())
			if err != nil {
				return err
			}
			users[i].source = dir
		case u.kind == bindPlace:
			if _, err := os.Stat(u.source); errors.Is(err, os.ErrNotExist) {
				if err := os.MkdirAll(u.source, 0o755); err != nil {
					return fmt.Errorf("error while creating mount source path '%s': %w", u.source, err)
				}
			} else if err != nil {
				return err
			}
		}
	}
	return nil
}

// inits are programs of the host that are a container's first process with Init:
// static ones that need nothing of its root.
var inits = []string{"docker-init", "catatonit", "tini-static", "/usr/libexec/podman/catatonit", "/usr/lib/podman/catatonit"}

// initPath is where the init is in a container: on a filesystem of its own, so
// that nothing of it stays.
const initPath = "/dev/init"

func findInit() (string, error) {
	for _, name := range inits {
		if file, err := exec.LookPath(name); err == nil {
			return file, nil
		}
	}
	return "", errors.New("--init needs a small init program on the host: apt-get install catatonit (docker-init and tini-static are taken too)")
}
