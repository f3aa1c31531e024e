package image

import (
	"encoding/base64"
	"maps"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
)

// PullCredential is what the container runtime interface says with a pull
// (runtime.v1 AuthConfig).
type PullCredential struct {
	Username, Password string
	Auth               string // both, in base64, with a colon between
	ServerAddress      string // whom it is for; "" for whoever has the image
	IdentityToken      string
	RegistryToken      string
}

// How much is kept of what came with pulls.
const (
	maxPulled     = 1024     // repositories
	maxPulledEach = 4        // credentials of one
	maxPullSize   = 64 << 10 // bytes of one credential
)

// Pulls keeps the credentials that came with pulls, in memory alone. The zero
// value works; it is safe for use by several goroutines.
type Pulls struct {
	mu    sync.Mutex // guards what follows
	repos map[string]*pulledRepo
}

// pulledRepo is what is known of one repository, the newest first.
type pulledRepo struct {
	used  time.Time
	creds []*pulledCred
}

type pulledCred struct {
	authn.AuthConfig
	server string // a host, or ""
	good   bool   // a pull succeeded with it
	pulls  int    // that go on
}

// Came takes what came with a pull of an image and gives what is to be called
// when that has ended. From now on it is known; a pull that fails takes it back,
// one that succeeds puts it in the place of those before.
func (p *Pulls) Came(image string, c PullCredential) (ended func(ok bool)) {
	nothing := func(bool) {}
	ac, server, ok := c.config()
	n, err := ParseName(image)
	if !ok || err != nil || n.kind != remoteKind {
		return nothing
	}
	key := n.domain + "/" + n.repo
	p.mu.Lock()
	defer p.mu.Unlock()
	r := p.repo(key)
	i := slices.IndexFunc(r.creds, func(c *pulledCred) bool { return c.AuthConfig == ac && c.server == server })
	var one *pulledCred
	if i < 0 {
		one = &pulledCred{AuthConfig: ac, server: server}
		r.shrink(maxPulledEach - 1)
	} else {
		one = r.creds[i]
		r.creds = slices.Delete(r.creds, i, i+1)
	}
	r.creds = slices.Insert(r.creds, 0, one)
	one.pulls++
	var once sync.Once
	return func(ok bool) { once.Do(func() { p.ended(key, one, ok) }) }
}

// repo gives what is known of a repository. Where too many are, the one that was
// asked for longest ago is forgotten.
func (p *Pulls) repo(key string) *pulledRepo {
	r := p.repos[key]
	if r == nil {
		if p.repos == nil {
			p.repos = map[string]*pulledRepo{}
		}
		if len(p.repos) >= maxPulled {
			delete(p.repos, slices.MinFunc(slices.Collect(maps.Keys(p.repos)), func(a, b string) int {
				return p.repos[a].used.Compare(p.repos[b].used)
			}))
		}
		r = &pulledRepo{}
		p.repos[key] = r
	}
	r.used = time.Now()
	return r
}

// shrink makes room: what no pull succeeded with goes first, the oldest of it.
func (r *pulledRepo) shrink(most int) {
	for len(r.creds) > most {
		i := len(r.creds) - 1
		for j, c := range slices.Backward(r.creds) {
			if !c.good {
				i = j
				break
			}
		}
		r.creds = slices.Delete(r.creds, i, i+1)
	}
}

func (p *Pulls) ended(key string, one *pulledCred, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	one.pulls--
	one.good = one.good || ok
	r := p.repos[key]
	if r == nil {
		return
	}
	r.creds = slices.DeleteFunc(r.creds, func(c *pulledCred) bool {
		switch {
		case c.pulls > 0:
			return false
		case ok:
			return c != one
		}
		return c == one && !c.good
	})
	if len(r.creds) == 0 {
		delete(p.repos, key)
	}
}

// find gives what is known for a repository of a registry. A mirror is told what
// came for the registry behind it, unless that was for one host: containerd tells
// it the same.
func (p *Pulls) find(registry, behind, repository string) []authn.AuthConfig {
	p.mu.Lock()
	defer p.mu.Unlock()
	if behind == "" {
		behind = registry
	}
	r := p.repos[behind+"/"+repository]
	if r == nil {
		return nil
	}
	r.used = time.Now()
	var out []authn.AuthConfig
	for _, c := range r.creds {
		if c.server == "" || slices.Contains(hostAliases(registry), c.server) {
			out = append(out, c.AuthConfig)
		}
	}
	return out
}

// config reads a credential as containerd does, and the host that it is for.
func (c PullCredential) config() (ac authn.AuthConfig, server string, ok bool) {
	size := len(c.Username) + len(c.Password) + len(c.Auth) + len(c.ServerAddress) + len(c.IdentityToken) + len(c.RegistryToken)
	if size > maxPullSize {
		return ac, "", false
	}
	if server = c.ServerAddress; server != "" {
		if !strings.Contains(server, "://") {
			server = "https://" + server
		}
		u, err := url.Parse(server)
		if err != nil || u.Host == "" {
			return ac, "", false
		}
		server = u.Host
	}
	switch {
	case c.Username != "":
		ac = authn.AuthConfig{Username: c.Username, Password: c.Password}
	case c.IdentityToken != "":
		ac = authn.AuthConfig{IdentityToken: c.IdentityToken}
	case c.Auth != "":
		ac, ok = splitAuth(c.Auth)
		return ac, server, ok
	case c.RegistryToken != "":
		ac = authn.AuthConfig{RegistryToken: c.RegistryToken}
	default:
		return ac, "", false
	}
	return ac, server, true
}

// splitAuth reads docker's base64 of user and password.
func splitAuth(auth string) (authn.AuthConfig, bool) {
	text, err := base64.StdEncoding.DecodeString(auth)
	if err != nil {
		return authn.AuthConfig{}, false
	}
	user, password, ok := strings.Cut(string(text), ":")
	return authn.AuthConfig{Username: user, Password: strings.Trim(password, "\x00")}, ok && user != ""
}
