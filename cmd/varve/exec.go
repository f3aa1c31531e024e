package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/varvefs/varve/daemon"
	"github.com/varvefs/varve/run"
	"github.com/varvefs/varve/run/monitor"
)

func (a *app) execCmd() *cobra.Command {
	var p run.ExecOptions
	var keys string
	cmd := &cobra.Command{
		Use:     "exec [flags] CONTAINER COMMAND [ARG...]",
		Short:   "Run a further command in a container that runs",
		Example: "  varve exec -it web sh\n  varve exec -u 0 -w /tmp web id",
	}
	f := cmd.Flags()
	f.SetInterspersed(false)
	f.BoolVarP(&p.Interactive, "interactive", "i", false, "keep stdin open")
	f.BoolVarP(&p.TTY, "tty", "t", false, "give it a terminal")
	f.BoolVarP(&p.Detach, "detach", "d", false, "leave it running, and what it writes unread")
	envFlags(f, &p.Env, &p.EnvFiles)
	f.StringVarP(&p.Workdir, "workdir", "w", "", "the working directory (default: the container's)")
	f.StringVarP(&p.User, "user", "u", "", "name or uid, and :group or :gid (default: the container's)")
	f.BoolVar(&p.Privileged, "privileged", false, "with all capabilities")
	f.StringVar(&keys, "detach-keys", "", "what is typed to leave it alone (default ctrl-p,ctrl-q)")
	cmd.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return &daemon.Error{Message: fmt.Sprintf("%v (varve exec --help)", err), Exit: exitFailed}
	})
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) < 2 {
			return failed(fmt.Errorf("the container or the command is missing (usage: %s)", cmd.UseLine()))
		}
		p.Cmd = args[1:]
		return failed(a.exec(cmd.Context(), args[0], p, keys))
	}
	return cmd
}

func (a *app) exec(ctx context.Context, name string, p run.ExecOptions, keys string) error {
	if err := p.Resolve(run.Caller{Dir: workdir(), Getenv: os.LookupEnv}); err != nil {
		return err
	}
	if p.TTY && !p.Detach {
		if err := checkTTY(p.Interactive); err != nil {
			return err
		}
	}
	mon, _, err := a.monitorOf(ctx, name)
	if err != nil {
		return err
	}
	end, err := mon.Exec(ctx, streams(p.Interactive, p.TTY), monitor.ExecOptions{Process: p, DetachKeys: keys})
	switch {
	case errors.Is(err, monitor.ErrDetached):
		return nil
	case errors.Is(err, monitor.ErrGone):
		return fmt.Errorf("container %s is not running", name)
	case err != nil:
		return err
	}
	return exitOf(end)
}

// monitorOf gives the monitor of a container that runs.
func (a *app) monitorOf(ctx context.Context, name string) (*monitor.Client, *daemon.Mount, error) {
	c, err := a.client()
	if err != nil {
		return nil, nil, err
	}
	m, err := c.Inspect(ctx, mountArg(name))
	if err != nil {
		return nil, nil, err
	}
	if m.Container == nil {
		return nil, nil, fmt.Errorf("%s is a mount without a process: `varve run` makes one with", m.Name)
	}
	if !m.Container.State.Running {
		return nil, nil, fmt.Errorf("container %s is not running", m.Name)
	}
	mon, err := monitor.Dial(ctx, m.Container.Socket)
	if errors.Is(err, monitor.ErrGone) {
		err = fmt.Errorf("container %s is not running", m.Name)
	}
	return mon, &m, err
}
