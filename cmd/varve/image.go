package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/pflag"

	"github.com/varvefs/varve/daemon"
)

// imageFlags are the flags of every verb that names an image.
func imageFlags(f *pflag.FlagSet, o *daemon.ImageOptions) {
	f.StringVar(&o.Platform, "platform", os.Getenv("DOCKER_DEFAULT_PLATFORM"), "os/arch[/variant] (env DOCKER_DEFAULT_PLATFORM; default this machine's)")
	f.StringVar(&o.Pull, "pull", "missing", "ask the registry for the manifest: missing, always, never")
	f.StringVar(&o.Index, "index", "auto", "what layers may be read by: auto, none (read them whole), require (never read one whole)")
	f.BoolVar(&o.Offline, "offline", false, "use what is here and never the network, for files neither")
	f.StringVar(&o.Auth.AuthFile, "authfile", "", "credentials, in docker's or podman's form (env REGISTRY_AUTH_FILE)")
	f.BoolVar(&o.Insecure, "insecure", false, "allow plain HTTP and unverified TLS for this registry")
}

// transferFlags are the flags of verbs that copy images which are here.
func transferFlags(f *pflag.FlagSet, o *daemon.ImageOptions) {
	o.Pull = "missing"
	f.StringVar(&o.Platform, "platform", os.Getenv("DOCKER_DEFAULT_PLATFORM"), "os/arch[/variant] (env DOCKER_DEFAULT_PLATFORM; default this machine's)")
	f.StringVar(&o.Auth.AuthFile, "authfile", "", "credentials, in docker's or podman's form (env REGISTRY_AUTH_FILE)")
	f.BoolVar(&o.Insecure, "insecure", false, "allow plain HTTP and unverified TLS for this registry")
}

// setImage fills in what the daemon cannot know: where this user's credentials
// are, and from where relative paths count.
func setImage(o *daemon.ImageOptions, name string) error {
	switch o.Pull {
	case "missing", "always", "never":
	default:
		return usageError{&daemon.Error{Message: "--pull: want missing, always or never", Exit: daemon.ExitUsage}}
	}
	o.Image = absoluteImage(name)
	var err error
	o.Auth, o.AuthConfig, err = credentials(o.Auth.AuthFile)
	return err
}

// credentials says where this user's are: in a file that was named, if it is not
// "", or where the environment says.
func credentials(file string) (auth daemon.Auth, config string, err error) {
	auth = daemon.AuthFromEnv()
	if file != "" {
		if _, err := os.Stat(file); err != nil {
			return auth, "", usageError{fmt.Errorf("--authfile: %w", err)}
		}
		auth.AuthFile, _ = filepath.Abs(file)
	}
	return auth, os.Getenv("DOCKER_AUTH_CONFIG"), nil
}

// mountOrImage makes a directory, an archive's path or a layout's absolute and
// leaves names as they are.
func mountOrImage(s string) string {
	if a := absoluteImage(s); a != s {
		return a
	}
	if st, err := os.Stat(s); err == nil && st.IsDir() && (s == "." || s == ".." || strings.HasPrefix(s, "./") || strings.HasPrefix(s, "../") || filepath.IsAbs(s)) {
		return mountArg(s)
	}
	return s
}

// absoluteImage makes the path of an archive or layout absolute.
func absoluteImage(name string) string {
	for _, scheme := range []string{"oci:", "docker-archive:"} {
		if path, ok := strings.CutPrefix(name, scheme); ok && path != "" {
			file, tag, tagged := strings.Cut(path, ":")
			if abs, err := filepath.Abs(file); err == nil {
				file = abs
			}
			if tagged {
				file += ":" + tag
			}
			return scheme + file
		}
	}
	return name
}
