package image

import (
	"errors"
	"fmt"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/pelletier/go-toml/v2"
)

// criRegistry is the registry table of containerd's CRI plugin. All but
// config_path is older than hosts.toml and out of use with it, but a node that
// has it pulls by it, k3s among them.
type criRegistry struct {
	ConfigPath string               `toml:"config_path"` // directories of hosts.toml, with colons between
	Mirrors    map[string]criMirror `toml:"mirrors"`     // by registry, "*" for all
	Configs    map[string]criConfig `toml:"configs"`     // by host
}

type criMirror struct {
	Endpoints []string `toml:"endpoint"`
}

type criConfig struct {
	Auth *criAuth `toml:"auth"`
	TLS  *criTLS  `toml:"tls"`
}

type criAuth struct {
	Username      string `toml:"username"`
	Password      string `toml:"password"`
	Auth          string `toml:"auth"`
	IdentityToken string `toml:"identitytoken"`
}

type criTLS struct {
	SkipVerify bool   `toml:"insecure_skip_verify"`
	CA         string `toml:"ca_file"`
	Cert       string `toml:"cert_file"`
	Key        string `toml:"key_file"`
}

// criFile is what is read of containerd's configuration: the table has had three
// places.
type criFile struct {
	Imports []string `toml:"imports"`
	Plugins struct {
		V1 criPlugin `toml:"cri"`
		V2 criPlugin `toml:"io.containerd.grpc.v1.cri"`
		V3 criPlugin `toml:"io.containerd.cri.v1.images"`
	} `toml:"plugins"`
}

type criPlugin struct {
	Registry criRegistry `toml:"registry"`
}

// maxImports bounds the files that a configuration is made of.
const maxImports = 64

// readCRI reads containerd's configuration with all that it imports, later files
// over earlier ones. One that does not exist says nothing.
func readCRI(file string) (criRegistry, error) {
	out := criRegistry{Mirrors: map[string]criMirror{}, Configs: map[string]criConfig{}}
	var seen []string
	for todo := []string{filepath.Clean(file)}; len(todo) > 0; {
		file, todo = todo[0], todo[1:]
		if slices.Contains(seen, file) {
			continue
		}
		if seen = append(seen, file); len(seen) > maxImports {
			return out, malformed("%s imports more than %d files", seen[0], maxImports)
		}
		b, err := readBounded(file, maxConfig)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return out, fmt.Errorf("containerd's registries: %w", err)
		}
		f, err := parseCRI(b)
		if err != nil {
			return out, failf(ErrMalformed, nil, "containerd's registries: %s: %s", file, err)
		}
		for _, p := range []criPlugin{f.Plugins.V1, f.Plugins.V2, f.Plugins.V3} {
			if p.Registry.ConfigPath != "" {
				out.ConfigPath = p.Registry.ConfigPath
			}
			maps.Copy(out.Mirrors, p.Registry.Mirrors)
			maps.Copy(out.Configs, p.Registry.Configs)
		}
		for _, im := range f.Imports {
			if !filepath.IsAbs(im) {
				im = filepath.Join(filepath.Dir(file), im)
			}
			more, err := filepath.Glob(im)
			if err != nil {
				return out, malformed("containerd's registries: %s imports %q", file, clip(im))
			}
			todo = append(todo, more...)
		}
	}
	return out, nil
}

// parseCRI reads one file. No error of it holds anything of the file but a line's
// number: passwords stand there.
func parseCRI(b []byte) (f criFile, err error) {
	err = toml.Unmarshal(b, &f)
	var at *toml.DecodeError
	if errors.As(err, &at) {
		row, _ := at.Position()
		return f, fmt.Errorf("line %d is not as it should be", row)
	}
	if err != nil {
		return f, errors.New("not TOML of the expected form")
	}
	return f, nil
}

// dirs gives the directories of hosts.toml, nil for the usual ones.
func (c criRegistry) dirs() []string {
	return slices.DeleteFunc(filepath.SplitList(c.ConfigPath), func(s string) bool { return s == "" })
}

// hosts gives the mirrors of a registry and the registry, nil if there are none.
func (c criRegistry) hosts(registry string) ([]host, error) {
	m, ok := c.Mirrors[registry]
	if !ok {
		m, ok = c.Mirrors["*"]
	}
	if !ok || len(m.Endpoints) == 0 {
		return nil, nil
	}
	var out []host
	itself := registry
	if registry == "docker.io" {
		itself = dockerHub
	}
	last := true
	for _, e := range m.Endpoints {
		if !strings.Contains(e, "://") {
			scheme := "https://"
			if u, err := url.Parse("//" + e); err == nil && isLoopback(u.Host) {
				scheme = "http://"
			}
			e = scheme + e
		}
		// Here a path is all of the API's root.
		u, err := url.Parse(e)
		if err != nil {
			return nil, malformed("containerd's mirrors of %s: not a URL", registry)
		}
		h, err := hostTable{OverridePath: u.Path != "" && u.Path != "/"}.host("", e)
		if err != nil {
			return nil, malformed("containerd's mirrors of %s: %s", registry, err)
		}
		last = last && h.addr != itself
		out = append(out, h)
	}
	if last {
		out = append(out, host{})
	}
	return out, nil
}

// tls gives what the configuration says of a host's certificates.
func (c criRegistry) tls(addr string) (t tlsFiles) {
	conf := c.Configs[addr].TLS
	if conf == nil {
		return t
	}
	t.skipVerify = conf.SkipVerify
	if conf.CA != "" {
		t.ca = []string{conf.CA}
	}
	if conf.Cert != "" {
		t.client = [][2]string{{conf.Cert, conf.Key}}
	}
	return t
}

// cri gives what containerd's configuration says. One that cannot be read is no
// reason to read nothing from a registry.
func (n *Node) cri() criRegistry {
	c, err := readCRI(n.Containerd)
	if err != nil && n.Log != nil {
		n.Log.Warn("containerd's configuration is passed by", "err", err)
	}
	return c
}

// criAuth gives the credentials that the configuration has for a host.
func (n *Node) criAuth(registry string) ([]authn.AuthConfig, error) {
	c, err := readCRI(n.Containerd)
	if err != nil {
		return nil, err
	}
	for _, host := range hostNames(registry) {
		a := c.Configs[host].Auth
		if a == nil {
			continue
		}
		ac, _, ok := PullCredential{Username: a.Username, Password: a.Password, Auth: a.Auth, IdentityToken: a.IdentityToken}.config()
		if !ok {
			return nil, failf(ErrUnauthorized, nil, "credentials for %s: %s has none that can be read", registry, n.Containerd)
		}
		return []authn.AuthConfig{ac}, nil
	}
	return nil, nil
}
