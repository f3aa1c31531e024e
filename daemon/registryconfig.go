package daemon

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/varvefs/varve/image"
)

// Where things are on a node, unless the configuration says otherwise.
const (
	containerdSocket = "/run/containerd/containerd.sock"
	containerdConfig = "/etc/containerd/config.toml"
)

// RegistryConfig says what a daemon knows of registries besides what callers send.
// The zero value is that of a node with containerd where its packages put it.
type RegistryConfig struct {
	CRIAddress     string   // containerd's socket, "" for its usual place
	Containerd     string   // containerd's config.toml, "" for its usual place
	HostsDir       []string // directories of hosts.toml, nil for those that Containerd names
	ProviderConfig string   // of the kubelet's credential providers, "" for none
	ProviderBin    string   // the directory of their programs
}

// take sets what a file says.
func (c *RegistryConfig) take(t file) error {
	for _, k := range []struct {
		key, value string
		to         *string
	}{
		{"cri_address", t.CRIAddress, &c.CRIAddress},
		{"containerd_config", t.ContainerdConfig, &c.Containerd},
		{"image_credential_provider_config", t.ProviderConfig, &c.ProviderConfig},
		{"image_credential_provider_bin_dir", t.ProviderBin, &c.ProviderBin},
	} {
		if k.value == "" {
			continue
		}
		if !filepath.IsAbs(strings.TrimPrefix(k.value, "unix://")) {
			return fmt.Errorf("%s: %q is not an absolute path", k.key, k.value)
		}
		*k.to = k.value
	}
	if t.HostsDir != "" {
		c.HostsDir = nil
		for _, dir := range filepath.SplitList(t.HostsDir) {
			if !filepath.IsAbs(dir) {
				return fmt.Errorf("hosts_dir: %q is not an absolute path", dir)
			}
			c.HostsDir = append(c.HostsDir, dir)
		}
	}
	return nil
}

func (c *RegistryConfig) check() error {
	if (c.ProviderConfig == "") != (c.ProviderBin == "") {
		return errors.New("image_credential_provider_config and image_credential_provider_bin_dir go together")
	}
	return nil
}

// node gives what the daemon knows. That of a plain user knows only the user's own
// files.
func (c Config) node() *image.Node {
	n := &image.Node{Auth: image.AuthFromEnv(), HostsDir: c.Registries.HostsDir, Pulls: &image.Pulls{}, Log: c.Log}
	if c.Registries.ProviderConfig != "" {
		n.Providers = image.NewProviders(c.Registries.ProviderConfig, c.Registries.ProviderBin, c.Log)
		if err := n.Providers.Check(); err != nil {
			c.Log.Error("no credential provider is asked before this is mended", "err", err)
		}
	}
	if os.Geteuid() != 0 {
		return n
	}
	n.Files = image.KubeletConfigs
	n.Containerd = otherwise(c.Registries.Containerd, containerdConfig)
	return n
}

func otherwise(s, usual string) string {
	if s == "" {
		return usual
	}
	return s
}
