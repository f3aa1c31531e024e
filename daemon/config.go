package daemon

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/pelletier/go-toml/v2"

	"github.com/varvefs/varve/fetch"
	"github.com/varvefs/varve/image"
)

// Config is how a daemon runs. The zero value of all but Dirs and Log works.
type Config struct {
	Dirs     Dirs
	Log      *slog.Logger
	Level    slog.Level
	Metrics  string // loopback address for Prometheus, "" for none
	Patience fetch.Patience

	BackgroundRate  int64       // bytes a second of what nobody waits for, 0 for no limit
	BackgroundHours fetch.Hours // when that may be fetched at all; the zero value is always

	Registries RegistryConfig
	Services   []Service // what it serves besides its own socket
}

// file is what config.toml may say.
type file struct {
	Metrics  string `toml:"metrics"`
	LogLevel string `toml:"log_level"`

	LimitRate       string `toml:"limit_rate"`
	BackgroundHours string `toml:"background_hours"`

	CRIAddress       string `toml:"cri_address"`
	ContainerdConfig string `toml:"containerd_config"`
	HostsDir         string `toml:"hosts_dir"` // several with colons between, as containerd's config_path

	// By the names of the kubelet's flags.
	ProviderConfig string `toml:"image_credential_provider_config"`
	ProviderBin    string `toml:"image_credential_provider_bin_dir"`
}

// LoadConfig reads config.toml and conf.d/*.toml of the configuration directory,
// later files over earlier ones. A key that is not known is an error.
func LoadConfig(d Dirs) (Config, error) {
	c := Config{Dirs: d}
	more, _ := filepath.Glob(filepath.Join(d.Config, "conf.d", "*.toml"))
	for _, path := range append([]string{filepath.Join(d.Config, "config.toml")}, more...) {
		f, err := os.Open(path)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return c, err
		}
		var t file
		err = toml.NewDecoder(f).DisallowUnknownFields().Decode(&t)
		f.Close()
		var strict *toml.StrictMissingError
		if errors.As(err, &strict) && len(strict.Errors) > 0 {
			row, _ := strict.Errors[0].Position()
			err = fmt.Errorf("line %d: no such setting: %s", row, strict.Errors[0].Key())
		}
		if err != nil {
			return c, fmt.Errorf("%s: %w", path, err)
		}
		if t.Metrics != "" {
			c.Metrics = t.Metrics
		}
		if t.LogLevel != "" {
			if err := c.Level.UnmarshalText([]byte(t.LogLevel)); err != nil {
				return c, fmt.Errorf("%s: log_level: %w", path, err)
			}
		}
		if t.LimitRate != "" {
			if c.BackgroundRate, err = ParseRate(t.LimitRate); err != nil {
				return c, fmt.Errorf("%s: limit_rate: %w", path, err)
			}
		}
		if t.BackgroundHours != "" {
			if c.BackgroundHours, err = fetch.ParseHours(t.BackgroundHours); err != nil {
				return c, fmt.Errorf("%s: background_hours: %w", path, err)
			}
		}
		if err := c.Registries.take(t); err != nil {
			return c, fmt.Errorf("%s: %w", path, err)
		}
	}
	return c, c.Registries.check()
}

// ParseHours reads hours of the day, such as 22:00-06:00.
func ParseHours(s string) (fetch.Hours, error) { return fetch.ParseHours(s) }

// Auth says where registry credentials are, never what they are.
type Auth = image.Auth

// AuthFromEnv says where this process's user keeps registry credentials.
func AuthFromEnv() Auth { return image.AuthFromEnv() }
