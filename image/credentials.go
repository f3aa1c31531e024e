package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/docker/cli/cli/config/configfile"
	"github.com/docker/cli/cli/config/types"
	"github.com/docker/docker-credential-helpers/client"
	"github.com/docker/docker-credential-helpers/credentials"
	"github.com/google/go-containerregistry/pkg/authn"
)

// Auth says where credentials are looked for. What JSON has of it is paths and
// no secret, so it may be stored with a mount and read again days later, when a
// token runs out.
type Auth struct {
	Inline       string `json:"-"`                      // a config.json itself, as in DOCKER_AUTH_CONFIG; asked first of all
	DockerConfig string `json:"dockerConfig,omitempty"` // directory of config.json; default Home/.docker
	AuthFile     string `json:"authFile,omitempty"`     // asked first
	Home         string `json:"home,omitempty"`
	RuntimeDir   string `json:"runtimeDir,omitempty"` // has containers/auth.json of podman login
	ConfigHome   string `json:"configHome,omitempty"` // has containers/auth.json; default Home/.config
}

// AuthFromEnv is where docker and podman of the calling user would look.
func AuthFromEnv() Auth {
	return Auth{
		DockerConfig: os.Getenv("DOCKER_CONFIG"),
		AuthFile:     os.Getenv("REGISTRY_AUTH_FILE"),
		Home:         os.Getenv("HOME"),
		RuntimeDir:   os.Getenv("XDG_RUNTIME_DIR"),
		ConfigHome:   os.Getenv("XDG_CONFIG_HOME"),
	}
}

// files gives the configuration files in the order in which they are asked.
func (a Auth) files() []string {
	docker, config := a.DockerConfig, a.ConfigHome
	if docker == "" && a.Home != "" {
		docker = filepath.Join(a.Home, ".docker")
	}
	if config == "" && a.Home != "" {
		config = filepath.Join(a.Home, ".config")
	}
	var files []string
	add := func(dir string, rest ...string) {
		if dir != "" {
			files = append(files, filepath.Join(append([]string{dir}, rest...)...))
		}
	}
	add(a.AuthFile)
	add(a.RuntimeDir, "containers", "auth.json")
	add(docker, "config.json")
	add(config, "containers", "auth.json")
	return files
}

// Authenticator gives the credentials for one repository, looked up anew at
// every call: files are read, helpers run. registry is a host as in a
// reference ("docker.io") or the host of a mirror.
func (a Auth) Authenticator(registry, repository string) authn.Authenticator {
	return lookup{auth: a, registry: registry, repository: repository}
}

type lookup struct {
	auth                 Auth
	registry, repository string
}

var _ authn.ContextAuthenticator = lookup{}

func (l lookup) Authorization() (*authn.AuthConfig, error) {
	return l.AuthorizationContext(context.Background())
}

// AuthorizationContext takes the first file that has an entry. None is not an
// error: most images are public.
func (l lookup) AuthorizationContext(ctx context.Context) (*authn.AuthConfig, error) {
	if l.auth.Inline != "" {
		cf := configfile.New("")
		if err := cf.LoadFromReader(strings.NewReader(l.auth.Inline)); err != nil {
			return nil, failf(ErrUnauthorized, nil, "credentials for %s: DOCKER_AUTH_CONFIG is not a docker config.json", l.registry)
		}
		if ac, found, err := l.ask(ctx, cf); found && err == nil {
			return &ac, nil
		}
	}
	for _, file := range l.auth.files() {
		cf, err := readConfig(file)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrPermission) {
			continue // another user's file is as good as none
		}
		if err != nil {
			return nil, failf(ErrUnauthorized, err, "credentials for %s: read %s: %s", l.registry, file, err)
		}
		ac, found, err := l.ask(ctx, cf)
		if err != nil {
			return nil, failf(ErrUnauthorized, err, "credentials for %s: %s names a helper that fails: %s", l.registry, file, err)
		}
		if found {
			return &ac, nil
		}
	}
	return &authn.AuthConfig{}, nil
}

func readConfig(file string) (*configfile.ConfigFile, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	const most = 4 << 20
	cf := configfile.New(file)
	if err := cf.LoadFromReader(io.LimitReader(f, most)); err != nil {
		return nil, err
	}
	return cf, nil
}

// ask looks into one file: entries for the repository or a namespace above it
// first (podman's form), then the registry's helper, the store, the registry's
// own entry.
func (l lookup) ask(ctx context.Context, cf *configfile.ConfigFile) (authn.AuthConfig, bool, error) {
	aliases := hostAliases(l.registry)
	for path := l.repository; path != "" && path != "."; {
		for _, host := range aliases {
			if ac, ok := fromFile(cf.AuthConfigs[host+"/"+path]); ok {
				return ac, true, nil
			}
		}
		cut := strings.LastIndexByte(path, '/')
		path = path[:max(cut, 0)]
	}
	for _, key := range aliases {
		if h := cf.CredentialHelpers[key]; h != "" {
			return runHelper(ctx, h, key, l.auth.Home)
		}
	}
	if h := cf.CredentialsStore; h != "" {
		ac, found, err := runHelper(ctx, h, aliases[0], l.auth.Home)
		if found || err != nil {
			return ac, found, err
		}
	}
	for _, key := range aliases {
		if ac, ok := fromFile(cf.AuthConfigs[key]); ok {
			return ac, true, nil
		}
	}
	return authn.AuthConfig{}, false, nil
}

// hostAliases gives the keys under which docker and podman keep a registry,
// docker's own first: a helper is asked by that.
func hostAliases(host string) []string {
	switch host {
	case "docker.io", "index.docker.io", dockerHub:
		return []string{"https://index.docker.io/v1/", "docker.io", "index.docker.io", dockerHub, "https://index.docker.io/v1"}
	}
	return []string{host, "https://" + host, "https://" + host + "/", "http://" + host, "https://" + host + "/v1/", "https://" + host + "/v2/"}
}

func fromFile(t types.AuthConfig) (authn.AuthConfig, bool) {
	ac := authn.AuthConfig{
		Username:      t.Username,
		Password:      t.Password,
		IdentityToken: t.IdentityToken,
		RegistryToken: t.RegistryToken,
	}
	return ac, ac != authn.AuthConfig{}
}

// helperTime bounds one run of a helper: some open a browser and wait.
const helperTime = time.Minute

// runHelper runs docker-credential-NAME get. What it prints besides its answer
// is not shown if it could hold the secret.
func runHelper(ctx context.Context, name, server, home string) (authn.AuthConfig, bool, error) {
	ctx, cancel := context.WithTimeout(ctx, helperTime)
	defer cancel()
	command := "docker-credential-" + name
	if strings.ContainsRune(name, '/') {
		return authn.AuthConfig{}, false, fmt.Errorf("%q is no name of a helper", clip(command))
	}
	creds, err := client.Get(func(args ...string) client.Program {
		cmd := exec.CommandContext(ctx, command, args...)
		cmd.WaitDelay = time.Second
		if home != "" {
			cmd.Env = append(cmd.Environ(), "HOME="+home)
		}
		return program{cmd}
	}, server)
	if credentials.IsErrCredentialsNotFound(err) {
		return authn.AuthConfig{}, false, nil
	}
	if err != nil {
		text := oneLine(err.Error())
		if strings.Contains(strings.ToLower(text), "secret") {
			text = "(its output is not shown, it may hold a secret)"
		}
		return authn.AuthConfig{}, false, fmt.Errorf("%s: %s", command, text)
	}
	if creds.Username == "<token>" {
		return authn.AuthConfig{IdentityToken: creds.Secret}, true, nil
	}
	return authn.AuthConfig{Username: creds.Username, Password: creds.Secret}, creds.Username != "" || creds.Secret != "", nil
}

// program fits an exec.Cmd to what the helpers' client runs.
type program struct{ cmd *exec.Cmd }

func (p program) Output() ([]byte, error) { return p.cmd.Output() }
func (p program) Input(in io.Reader)      { p.cmd.Stdin = in }
