package install

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
)

// Containerd is a snapshotter that one containerd is to find.
type Containerd struct {
	Node
	Name    string // of the snapshotter in containerd
	Address string // its socket
	Root    string // where it keeps what it has; containerd tells the kubelet

	// Default has Kubernetes start all pods on it, RuntimeClass those whose
	// RuntimeClass has the handler Name. Else it is there for who asks by its name.
	Default, RuntimeClass bool

	Config  string // containerd's configuration; "" finds it
	Flavor  Flavor // "" finds out
	Program string // containerd; "" finds it
	Version string // of containerd, such as "2.2"; "" asks it
	Socket  string // containerd's own; "" takes it from its configuration
	// NoRestart leaves a restart to somebody else.
	NoRestart bool
	// Force takes the snapshotter, or the name that it had, away from containers that
	// use it.
	Force bool
}

// Flavor is whose containerd it is.
type Flavor string

// The flavors. k3s and rke2 make their containerd's configuration anew at every start.
const (
	Plain Flavor = "containerd"
	K3s   Flavor = "k3s"
	RKE2  Flavor = "rke2"
)

// agentDir is where k3s or rke2 keeps containerd's files.
func (f Flavor) agentDir() string { return "/var/lib/rancher/" + string(f) + "/agent/etc/containerd" }

// units are the units that run a flavor's containerd.
func (f Flavor) units() []string {
	switch f {
	case K3s:
		return []string{"k3s.service", "k3s-agent.service"}
	case RKE2:
		return []string{"rke2-server.service", "rke2-agent.service"}
	}
	return []string{"containerd.service"}
}

// dropInName is the file that is written, in a directory of drop-ins.
const dropInName = "varve.toml"

// header begins every drop-in, by which it is known as ours.
const header = "# Written by varve install containerd; varve uninstall containerd removes it.\n"

var (
	nameForm    = regexp.MustCompile(`^[a-z0-9]+([._-][a-z0-9]+)*$`)
	versionForm = regexp.MustCompile(`(?:^|\s)v?(\d+)\.(\d+)(?:[.~+-]\S*)?(?:\s|$)`)
)

// builtIn are snapshotters of containerd's own, whose names cannot be had.
var builtIn = []string{"aufs", "blockfile", "btrfs", "devmapper", "erofs", "native", "overlayfs", "zfs"}

// release is a version of containerd's.
type release struct{ major, minor int }

func (r release) atLeast(major, minor int) bool {
	return r.major > major || r.major == major && r.minor >= minor
}

func parseRelease(s string) (release, error) {
	m := versionForm.FindStringSubmatch(s)
	if m == nil {
		return release{}, fmt.Errorf("containerd's version %q is not understood: want one such as 2.2", strings.TrimSpace(s))
	}
	major, err1 := strconv.Atoi(m[1])
	minor, err2 := strconv.Atoi(m[2])
	if err := errors.Join(err1, err2); err != nil {
		return release{}, err
	}
	r := release{major, minor}
	if !r.atLeast(1, 6) {
		return r, fmt.Errorf("containerd %d.%d is too old: 1.6 and later are supported", major, minor)
	}
	return r, nil
}

// site is where and on what an installation is made.
type site struct {
	release release
	flavor  Flavor
	main    *config // what containerd reads first
	service bool    // the one that systemd starts reads it
	dropIn  string  // the file that is ours
	pattern string  // by which it is imported where it is not already
	// importIn is the file that gets the import; for k3s and rke2 it is a template.
	importIn string
}

// find finds out about the machine.
func (c *Containerd) find(ctx context.Context) (*site, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	s := &site{flavor: c.Flavor}
	if s.flavor == "" {
		s.flavor = c.detect()
	}
	path := s.flavor.agentDir() + "/config.toml"
	if s.flavor == Plain {
		path = c.unitConfig(ctx)
	}
	if c.Config != "" && !filepath.IsAbs(c.Config) {
		return nil, fmt.Errorf("the configuration %s: want an absolute path", c.Config)
	}
	s.service = c.Config == "" || c.Config == path
	if c.Config != "" {
		path = c.Config
	}
	var err error
	if s.main, err = c.readConfig(path); err != nil {
		return nil, err
	}
	if s.flavor != Plain && s.main.data == nil {
		return nil, fmt.Errorf("%s is not there: %s writes it when it starts, so start it once, then try again", path, s.flavor)
	}
	if s.main.version == 1 {
		return nil, fmt.Errorf("%s is of version 1, which containerd itself gave up: have it converted (containerd config migrate), or write version = 2 into it and the full names of its plugins", path)
	}
	if s.release, err = c.ask(ctx, s.flavor); err != nil {
		return nil, err
	}
	s.place()
	return s, nil
}

func (c *Containerd) check() error {
	if !nameForm.MatchString(c.Name) {
		return fmt.Errorf("the name %q: want small letters and digits, with . - _ between them", c.Name)
	}
	for _, b := range builtIn {
		if c.Name == b {
			return fmt.Errorf("the name %s: containerd has a snapshotter of that name itself", b)
		}
	}
	if !filepath.IsAbs(c.Address) {
		return fmt.Errorf("the socket %q: want an absolute path", c.Address)
	}
	return nil
}

// detect takes k3s or rke2 where nothing else is there.
func (c *Containerd) detect() Flavor {
	if c.Config == "" && !c.exists("/etc/containerd/config.toml") {
		for _, f := range []Flavor{K3s, RKE2} {
			if c.exists(f.agentDir()) {
				return f
			}
		}
	}
	for _, f := range []Flavor{K3s, RKE2} {
		if strings.HasPrefix(c.Config, f.agentDir()+"/") {
			return f
		}
	}
	return Plain
}

var configFlag = regexp.MustCompile(`(?:\s)(?:--config|-c)[= ](\S+)`)

// unitConfig gives the file that the service's command line names, or the default.
func (c *Containerd) unitConfig(ctx context.Context) string {
	const path = "/etc/containerd/config.toml"
	if !c.booted() {
		return path
	}
	out, _ := c.run(ctx, "systemctl", "show", "--property=ExecStart", Plain.units()[0])
	if m := configFlag.FindSubmatch(out); m != nil && filepath.IsAbs(string(m[1])) {
		return string(m[1])
	}
	return path
}

// program gives containerd's path.
func (c *Containerd) program(f Flavor) string {
	switch {
	case c.Program != "":
		return c.Program
	case f != Plain:
		return filepath.Join("/var/lib/rancher", string(f), "data/current/bin/containerd")
	}
	return "containerd"
}

// ask finds containerd's version.
func (c *Containerd) ask(ctx context.Context, f Flavor) (release, error) {
	if c.Version != "" {
		return parseRelease(c.Version)
	}
	if c.Offline {
		return release{}, fmt.Errorf("which containerd will read the files: say its version, such as 2.2")
	}
	out, err := c.run(ctx, c.program(f), "--version")
	if err != nil {
		return release{}, fmt.Errorf("no containerd to ask: %w", err)
	}
	return parseRelease(string(out))
}

// place decides where the drop-in goes and what imports it.
func (s *site) place() {
	dir := filepath.Dir(s.main.path)
	if s.flavor == Plain {
		s.dropIn = filepath.Join(dir, "conf.d", dropInName)
		s.importIn = s.main.path
	} else {
		base := "config.toml"
		if s.main.version >= 3 {
			base = fmt.Sprintf("config-v%d.toml", s.main.version)
		}
		s.dropIn = filepath.Join(dir, base+".d", dropInName)
		s.importIn = filepath.Join(dir, base+".tmpl")
	}
	// A pattern, since containerd does not start where a file that is named is missing.
	s.pattern = strings.TrimSuffix(s.dropIn, ".toml") + "*.toml"
}

// DropIns gives the drop-ins of ours that are on the machine, in the places where
// they are without a configuration of another name.
func (n *Node) DropIns() (paths []string, err error) {
	places := []string{"/etc/containerd/conf.d/" + dropInName}
	for _, f := range []Flavor{K3s, RKE2} {
		for _, base := range []string{"config.toml.d", "config-v3.toml.d", "config-v4.toml.d"} {
			places = append(places, filepath.Join(f.agentDir(), base, dropInName))
		}
	}
	for _, path := range places {
		b, err := n.read(path)
		if err != nil {
			return nil, err
		}
		if strings.HasPrefix(string(b), header) {
			paths = append(paths, path)
		}
	}
	return paths, nil
}

// others gives another containerd of this machine that has the snapshotter, "" if none
// has.
func (c *Containerd) others(s *site) (string, error) {
	paths, err := c.DropIns()
	if err != nil {
		return "", err
	}
	for _, path := range paths {
		if filepath.Dir(filepath.Dir(path)) == filepath.Dir(s.main.path) {
			continue // an older one of the same containerd's
		}
		b, err := c.read(path)
		if err != nil || strings.Contains(string(b), c.Address) {
			return path, err
		}
	}
	return "", nil
}
