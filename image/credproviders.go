package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"go.yaml.in/yaml/v3"
	"golang.org/x/sync/singleflight"
)

// Providers asks the credential providers of a kubelet: programs that give
// credentials for images, as its --image-credential-provider-config and
// --image-credential-provider-bin-dir name them. Answers are kept in memory for
// as long as they say. It is safe for use by several goroutines.
type Providers struct {
	config, binDir string
	log            *slog.Logger

	running singleflight.Group

	mu    sync.Mutex // guards what follows
	cache map[providerKey]providerEntry
}

// NewProviders gives the providers of a configuration file, or of a directory of
// them. It is read at every use: the file may change under a daemon. log may be
// nil.
func NewProviders(config, binDir string, log *slog.Logger) *Providers {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Providers{config: config, binDir: binDir, log: log, cache: map[providerKey]providerEntry{}}
}

// Check says what is wrong with the configuration, nil if nothing is.
func (p *Providers) Check() error {
	_, err := p.providers()
	return err
}

// provider is one entry of the configuration (kubelet.config.k8s.io/v1,
// CredentialProvider).
type provider struct {
	Name                 string        `yaml:"name"`
	MatchImages          []string      `yaml:"matchImages"`
	DefaultCacheDuration *duration     `yaml:"defaultCacheDuration"`
	APIVersion           string        `yaml:"apiVersion"`
	Args                 []string      `yaml:"args"`
	Env                  []providerEnv `yaml:"env"`
	TokenAttributes      *struct {
		RequireServiceAccount *bool `yaml:"requireServiceAccount"`
	} `yaml:"tokenAttributes"`
}

type providerEnv struct {
	Name  string `yaml:"name"`
	Value string `yaml:"value"`
}

type duration time.Duration

func (d *duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err == nil && v < 0 {
		err = errors.New("a negative duration")
	}
	*d = duration(v)
	return err
}

// The protocol's versions, which are alike.
var providerVersions = []string{
	"credentialprovider.kubelet.k8s.io/v1", "credentialprovider.kubelet.k8s.io/v1beta1", "credentialprovider.kubelet.k8s.io/v1alpha1",
}

// How much is read of a configuration.
const (
	maxProviderConfig = 1 << 20 // bytes of one file
	maxProviders      = 64
	maxProviderCache  = 1024 // answers
)

func (p *Providers) providers() ([]provider, error) {
	files := []string{p.config}
	st, err := os.Stat(p.config)
	if err != nil {
		return nil, fmt.Errorf("credential providers: %w", err)
	}
	if st.IsDir() {
		files = nil
		entries, err := os.ReadDir(p.config)
		if err != nil {
			return nil, fmt.Errorf("credential providers: %w", err)
		}
		for _, e := range entries {
			if slices.Contains([]string{".json", ".yaml", ".yml"}, filepath.Ext(e.Name())) {
				files = append(files, filepath.Join(p.config, e.Name()))
			}
		}
	}
	var all []provider
	for _, file := range files {
		b, err := readBounded(file, maxProviderConfig)
		if err != nil {
			return nil, fmt.Errorf("credential providers: %w", err)
		}
		some, err := parseProviders(b)
		if err != nil {
			return nil, failf(ErrMalformed, err, "credential providers: %s: %s", file, err)
		}
		all = append(all, some...)
	}
	if len(all) > maxProviders {
		return nil, malformed("credential providers: %s has %d of them, more than %d", p.config, len(all), maxProviders)
	}
	return all, nil
}

// readBounded reads a file of at most so many bytes.
func readBounded(file string, most int64) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(b)) > most {
		err = malformed("%s has more than %d bytes", file, most)
	}
	return b, err
}

// parseProviders reads a CredentialProviderConfig, in YAML or JSON.
func parseProviders(b []byte) ([]provider, error) {
	var c struct {
		APIVersion string     `yaml:"apiVersion"`
		Kind       string     `yaml:"kind"`
		Providers  []provider `yaml:"providers"`
	}
	if err := yaml.Unmarshal(b, &c); err != nil {
		// Its text quotes the file, whose arguments may be secret.
		return nil, errors.New("not YAML of the expected form")
	}
	if group, _, _ := strings.Cut(c.APIVersion, "/"); c.Kind != "CredentialProviderConfig" || group != "kubelet.config.k8s.io" {
		return nil, fmt.Errorf("%q of %q, want a CredentialProviderConfig of kubelet.config.k8s.io", clip(c.Kind), clip(c.APIVersion))
	}
	seen := map[string]bool{}
	for _, p := range c.Providers {
		switch {
		case p.Name == "" || p.Name == "." || p.Name == ".." || strings.ContainsAny(p.Name, "/ \x00"):
			return nil, fmt.Errorf("provider %q: not the name of a file", clip(p.Name))
		case seen[p.Name]:
			return nil, fmt.Errorf("provider %s is there twice", clip(p.Name))
		case !slices.Contains(providerVersions, p.APIVersion):
			return nil, fmt.Errorf("provider %s: apiVersion %q is not known", clip(p.Name), clip(p.APIVersion))
		case len(p.MatchImages) == 0:
			return nil, fmt.Errorf("provider %s has no matchImages", clip(p.Name))
		case p.DefaultCacheDuration == nil:
			return nil, fmt.Errorf("provider %s has no defaultCacheDuration", clip(p.Name))
		}
		seen[p.Name] = true
	}
	return c.Providers, nil
}

// forImage reports whether the provider is to be asked for a repository. One that
// needs a pod's service account cannot be: nobody says whose.
func (p *provider) forImage(registry, repository string) bool {
	if t := p.TokenAttributes; t != nil && (t.RequireServiceAccount == nil || *t.RequireServiceAccount) {
		return false
	}
	return slices.ContainsFunc(p.MatchImages, func(m string) bool { return matchesImage(m, registry, repository) })
}

type providerKey struct{ provider, key string }

type providerEntry struct {
	auth    map[string]authn.AuthConfig // by pattern
	expires time.Time
}

// find gives the credentials of all providers for a repository. Those that fail
// are passed by where another one answers.
func (p *Providers) find(ctx context.Context, registry, repository string, again bool) ([]authn.AuthConfig, error) {
	all, err := p.providers()
	if err != nil {
		return nil, err
	}
	var out []authn.AuthConfig
	for i := range all {
		if !all[i].forImage(registry, repository) {
			continue
		}
		auth, aerr := p.answer(ctx, &all[i], registry, repository, again)
		if aerr != nil {
			p.log.Warn("a credential provider fails", "registry", registry, "err", aerr)
			err = errors.Join(err, aerr)
			continue
		}
		for _, pattern := range slices.Backward(slices.Sorted(maps.Keys(auth))) {
			if ac := auth[pattern]; matchesImage(pattern, registry, repository) && !slices.Contains(out, ac) && ac != (authn.AuthConfig{}) {
				out = append(out, ac)
			}
		}
	}
	if len(out) > 0 {
		return out, nil
	}
	return nil, err
}

// answer gives what one provider answers or has answered.
func (p *Providers) answer(ctx context.Context, v *provider, registry, repository string, again bool) (map[string]authn.AuthConfig, error) {
	image := registry + "/" + repository
	if !again {
		if auth, ok := p.cached(v, registry, image); ok {
			return auth, nil
		}
	}
	// Who asks may go, the others still wait.
	ch := p.running.DoChan(v.Name+" "+image, func() (any, error) {
		a, err := runProvider(context.WithoutCancel(ctx), v, p.binDir, image)
		if err != nil {
			return nil, failf(ErrUnauthorized, err, "credentials for %s: credential provider %s: %s", registry, v.Name, err)
		}
		p.keep(v, a, registry, image)
		return a.credentials(), nil
	})
	select {
	case r := <-ch:
		if r.Err != nil {
			return nil, r.Err
		}
		return r.Val.(map[string]authn.AuthConfig), nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// everyImage is the key of an answer that is for all images. No registry is
// called so.
const everyImage = "*"

func (p *Providers) cached(v *provider, registry, image string) (map[string]authn.AuthConfig, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, key := range []string{image, registry, everyImage} {
		if e, ok := p.cache[providerKey{v.Name, key}]; ok && time.Now().Before(e.expires) {
			return e.auth, true
		}
	}
	return nil, false
}

func (p *Providers) keep(v *provider, a *providerAnswer, registry, image string) {
	keep := time.Duration(*v.DefaultCacheDuration)
	if a.CacheDuration != nil {
		keep = time.Duration(*a.CacheDuration)
	}
	key := map[string]string{"Image": image, "Registry": registry, "Global": everyImage}[a.CacheKeyType]
	p.mu.Lock()
	defer p.mu.Unlock()
	// What was kept before was refused, or has expired.
	for _, k := range []string{image, registry, everyImage} {
		delete(p.cache, providerKey{v.Name, k})
	}
	if keep <= 0 {
		return
	}
	now := time.Now()
	maps.DeleteFunc(p.cache, func(_ providerKey, e providerEntry) bool { return !now.Before(e.expires) })
	if len(p.cache) >= maxProviderCache {
		delete(p.cache, slices.MinFunc(slices.Collect(maps.Keys(p.cache)), func(a, b providerKey) int {
			return p.cache[a].expires.Compare(p.cache[b].expires)
		}))
	}
	p.cache[providerKey{v.Name, key}] = providerEntry{a.credentials(), now.Add(keep)}
}
