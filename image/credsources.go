package image

import (
	"context"
	"crypto/sha256"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
)

// oldConfig is the name of docker's first configuration file, which the kubelet
// still reads.
const oldConfig = ".dockercfg"

// KubeletConfigs is where the kubelet looks for registry credentials besides its
// home (kubernetes.io/docs/concepts/containers/images).
var KubeletConfigs = []string{
	"/var/lib/kubelet/config.json", "/.docker/config.json",
	"/var/lib/kubelet/" + oldConfig, "/" + oldConfig,
}

// Node is what a daemon knows of registries by itself, besides what a caller
// names: it needs credentials hours after the caller left. The zero Node knows
// nothing. It is safe for use by several goroutines; its fields are not changed
// after the first use.
type Node struct {
	Auth       Auth         // where the daemon's own user keeps credentials
	Files      []string     // more configuration files of docker's form, asked after those
	Pulls      *Pulls       // what came with pulls; may be nil
	Providers  *Providers   // the kubelet's plugins; may be nil
	Containerd string       // containerd's config.toml, for what CRI's registry table says; "" for none
	HostsDir   []string     // directories of hosts.toml; nil: those that Containerd names, or the usual ones
	Log        *slog.Logger // may be nil
}

// lookup finds the credentials for one repository. registry is a host as in a
// reference ("docker.io") or the host of a mirror.
type lookup struct {
	auth                 Auth
	node                 *Node // may be nil
	log                  *slog.Logger
	registry, repository string
	behind               string // the registry that the mirror stands for, "" for a registry
}

// source is one place where credentials may be.
type source struct {
	name string // for messages; no secret
	// find gives what is there now, the best first; nothing is not an error: most
	// images are public.
	find func(ctx context.Context) ([]authn.AuthConfig, error)
	// again is find that takes nothing from a cache; nil where find never does.
	again func(ctx context.Context) ([]authn.AuthConfig, error)
}

// sources gives the places in the order in which they are asked.
func (l lookup) sources() []source {
	var out []source
	if l.auth.Inline != "" {
		out = append(out, source{name: "DOCKER_AUTH_CONFIG", find: l.inline})
	}
	var seen []string
	add := func(home string, files ...string) {
		for _, file := range files {
			if file = filepath.Clean(file); slices.Contains(seen, file) {
				continue
			}
			seen = append(seen, file)
			out = append(out, source{name: file, find: func(ctx context.Context) ([]authn.AuthConfig, error) {
				return l.file(ctx, file, home)
			}})
		}
	}
	add(l.auth.Home, l.auth.files()...)
	n := l.node
	if n == nil {
		return out
	}
	add(n.Auth.Home, n.Auth.files()...)
	if n.Auth.Home != "" {
		add(n.Auth.Home, filepath.Join(n.Auth.Home, oldConfig))
	}
	add(n.Auth.Home, n.Files...)
	if n.Pulls != nil {
		out = append(out, source{name: "what came with a pull", find: func(context.Context) ([]authn.AuthConfig, error) {
			return n.Pulls.find(l.registry, l.behind, l.repository), nil
		}})
	}
	if n.Containerd != "" {
		out = append(out, source{name: n.Containerd, find: func(context.Context) ([]authn.AuthConfig, error) {
			return n.criAuth(l.registry)
		}})
	}
	if n.Providers != nil {
		find := func(again bool) func(context.Context) ([]authn.AuthConfig, error) {
			return func(ctx context.Context) ([]authn.AuthConfig, error) {
				return n.Providers.find(ctx, l.registry, l.repository, again)
			}
		}
		out = append(out, source{name: "credential providers", find: find(false), again: find(true)})
	}
	return out
}

func (l lookup) inline(ctx context.Context) ([]authn.AuthConfig, error) {
	cf, err := parseConfig("", strings.NewReader(l.auth.Inline))
	if err != nil {
		return nil, failf(ErrUnauthorized, nil, "credentials for %s: DOCKER_AUTH_CONFIG is not a docker config.json", l.registry)
	}
	ac, found, err := l.ask(ctx, cf, l.auth.Home)
	if err != nil || !found {
		return nil, nil // as docker: what else there is
	}
	return []authn.AuthConfig{ac}, nil
}

func (l lookup) file(ctx context.Context, file, home string) ([]authn.AuthConfig, error) {
	cf, err := readConfig(file)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrPermission) {
		return nil, nil // another user's file is as good as none
	}
	if err != nil {
		return nil, failf(ErrUnauthorized, err, "credentials for %s: read %s: %s", l.registry, file, err)
	}
	ac, found, err := l.ask(ctx, cf, home)
	if err != nil {
		return nil, failf(ErrUnauthorized, err, "credentials for %s: %s names a helper that fails: %s", l.registry, file, err)
	}
	if !found {
		return nil, nil
	}
	return []authn.AuthConfig{ac}, nil
}

// credentialSum is what a credential is remembered by.
type credentialSum [sha256.Size]byte

func sumOf(ac authn.AuthConfig) credentialSum {
	h := sha256.New()
	for _, s := range []string{ac.Username, ac.Password, ac.Auth, ac.IdentityToken, ac.RegistryToken} {
		one := sha256.Sum256([]byte(s))
		h.Write(one[:])
	}
	return credentialSum(h.Sum(nil))
}
