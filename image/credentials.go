package image

import (
	"context"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
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
		Home:         home(),
		RuntimeDir:   os.Getenv("XDG_RUNTIME_DIR"),
		ConfigHome:   os.Getenv("XDG_CONFIG_HOME"),
	}
}

// home is the user's. A service of systemd's has no HOME.
func home() string {
	if h := os.Getenv("HOME"); h != "" {
		return h
	}
	if u, err := user.LookupId(strconv.Itoa(os.Geteuid())); err == nil {
		return u.HomeDir
	}
	return ""
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

// maxConfig bounds a file that was not written for us, in bytes.
const maxConfig = 4 << 20

// readConfig reads a config.json, or the older form that is only its auths.
func readConfig(file string) (*configfile.ConfigFile, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return parseConfig(file, io.LimitReader(f, maxConfig))
}

func parseConfig(file string, r io.Reader) (*configfile.ConfigFile, error) {
	if filepath.Base(file) == oldConfig {
		r = io.MultiReader(strings.NewReader(`{"auths":`), r, strings.NewReader("}"))
	}
	cf := configfile.New(file)
	if err := cf.LoadFromReader(r); err != nil {
		return nil, err
	}
	return cf, nil
}

// ask looks into one file: entries for the repository or a namespace above it
// first (podman's form), then the registry's helper, the store, the registry's
// own entry, one with a star (the kubelet's form). Helpers run with a home.
func (l lookup) ask(ctx context.Context, cf *configfile.ConfigFile, home string) (authn.AuthConfig, bool, error) {
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
			return runHelper(ctx, h, key, home)
		}
	}
	if h := cf.CredentialsStore; h != "" {
		ac, found, err := runHelper(ctx, h, aliases[0], home)
		if found || err != nil {
			return ac, found, err
		}
	}
	for _, key := range aliases {
		if ac, ok := fromFile(cf.AuthConfigs[key]); ok {
			return ac, true, nil
		}
	}
	for _, key := range slices.Backward(slices.Sorted(maps.Keys(cf.AuthConfigs))) {
		if !strings.Contains(key, "*") || !matchesImage(key, l.registry, l.repository) {
			continue
		}
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
		withAll(cmd)
		if home != "" {
			cmd.Env = append(cmd.Environ(), "HOME="+home)
		}
		return program{cmd, cancel}
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
type program struct {
	cmd  *exec.Cmd
	stop func()
}

func (p program) Output() ([]byte, error) {
	out := &bounded{most: maxPrinted, stop: p.stop}
	p.cmd.Stdout = out
	err := p.cmd.Run()
	if out.over {
		return nil, fmt.Errorf("it prints more than %d bytes", maxPrinted)
	}
	return out.kept.Bytes(), err
}

func (p program) Input(in io.Reader) { p.cmd.Stdin = in }
