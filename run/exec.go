package run

import (
	"errors"
	"fmt"
	"path"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// ExecOptions are what a user asks of a further process in a container.
type ExecOptions struct {
	Cmd         []string `json:"cmd"`
	Env         []string `json:"env,omitempty"`       // K=V, over the container's
	EnvFiles    []string `json:"env_files,omitempty"` // read by Resolve, which empties it
	Workdir     string   `json:"workdir,omitempty"`   // "" for the container's
	User        string   `json:"user,omitempty"`      // "" for the container's
	TTY         bool     `json:"tty,omitempty"`
	Interactive bool     `json:"interactive,omitempty"`
	Detach      bool     `json:"detach,omitempty"`
	Privileged  bool     `json:"privileged,omitempty"`
}

// Check finds whatever is wrong in o without looking at a container.
func (o *ExecOptions) Check() error {
	switch {
	case len(o.Cmd) == 0 || o.Cmd[0] == "":
		return errors.New("no exec command specified")
	case o.Workdir != "" && !path.IsAbs(o.Workdir):
		return fmt.Errorf("the working directory '%s' is invalid, it needs to be an absolute path", o.Workdir)
	case len(o.EnvFiles) > 0:
		return fmt.Errorf("environment file %s was not read by who gave it", o.EnvFiles[0])
	}
	for _, kv := range o.Env {
		if strings.HasPrefix(kv, "=") || kv == "" || strings.ContainsRune(kv, 0) {
			return fmt.Errorf("invalid environment variable: %q", kv)
		}
	}
	return nil
}

// Process makes the process of an exec in container c, whose own spec is given
// (what [Load] gives): environment, user, working directory, capabilities and
// limits are the container's unless o says otherwise. Users are looked up in the
// container's root.
func Process(c Container, spec *specs.Spec, o ExecOptions) (*specs.Process, error) {
	if err := o.Check(); err != nil {
		return nil, err
	}
	priv, err := readPrivilege()
	if err != nil {
		return nil, err
	}
	t, err := openTree(c.Root)
	if err != nil {
		return nil, fmt.Errorf("the root of container %s: %w", c.ID, err)
	}
	defer t.Close()
	who := o.User
	if who == "" {
		who = c.user()
	}
	u, home, err := lookup(t, who, c.Options.Groups)
	if o.User == "" {
		if err != nil { // the container has changed its users since
			home = "/"
		}
		u = spec.Process.User
	} else if err != nil {
		return nil, err
	} else if err := priv.check(c.Root, &u); err != nil {
		return nil, err
	}
	p := *spec.Process
	p.Terminal, p.ConsoleSize = o.TTY, nil
	p.User, p.Args = u, o.Cmd
	p.Env = c.environ(spec.Hostname, home, o.TTY, o.Env...)
	if o.Workdir != "" {
		p.Cwd = path.Clean(o.Workdir)
	}
	if o.Privileged {
		have, err := current(priv.plain)
		if err != nil {
			return nil, err
		}
		p.Capabilities = sets(have)
	}
	return &p, nil
}
