package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/varvefs/varve/daemon"
	"github.com/varvefs/varve/run/monitor"
)

func (a *app) startCmd() *cobra.Command {
	var attach, stdin bool
	var keys, authFile string
	cmd := &cobra.Command{
		Use:   "start [flags] CONTAINER...",
		Short: "Run the commands of ended containers again, with what was changed in them",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			auth, config, err := credentials(authFile)
			if err != nil {
				return err
			}
			o := daemon.StartOptions{Auth: auth, AuthConfig: config}
			if attach || stdin {
				if len(args) > 1 {
					return usageError{errors.New("you cannot start and attach multiple containers at once")}
				}
				o.Mount = mountArg(args[0])
				return a.start(cmd.Context(), o, stdin, keys)
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			return each(args, func(arg string) error {
				o.Mount = mountArg(arg)
				mon, m, err := begin(cmd.Context(), c, o)
				if err == nil && !m.Container.State.Running {
					err = startAlone(cmd.Context(), c, mon, m)
				}
				if err == nil {
					fmt.Println(arg)
				}
				return err
			})
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&attach, "attach", "a", false, "show what it writes, pass signals on, end as it ends")
	f.BoolVarP(&stdin, "interactive", "i", false, "that, and give it our stdin")
	f.StringVar(&keys, "detach-keys", "", "what is typed to leave it alone (default ctrl-p,ctrl-q)")
	f.StringVar(&authFile, "authfile", "", "credentials, in docker's or podman's form (env REGISTRY_AUTH_FILE)")
	return cmd
}

// begin has a container's monitor stand by, and gives it.
func begin(ctx context.Context, c *daemon.Client, o daemon.StartOptions) (*monitor.Client, *daemon.Mount, error) {
	m, err := c.StartContainer(ctx, o)
	if err != nil {
		return nil, nil, err
	}
	mon, err := monitor.Dial(ctx, m.Container.Socket)
	return mon, m, err
}

// startAlone starts a container whose monitor stands by. One that cannot be started
// has been unmounted when it returns.
func startAlone(ctx context.Context, c *daemon.Client, mon *monitor.Client, m *daemon.Mount) error {
	_, err := mon.Start(ctx)
	var start *monitor.StartError
	if errors.As(err, &start) {
		newStats(c, m, m.Created).ended()
	}
	return err
}

func (a *app) start(ctx context.Context, o daemon.StartOptions, stdin bool, keys string) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	mon, m, err := begin(ctx, c, o)
	if err != nil {
		return err
	}
	at := monitor.AttachOptions{Start: !m.Container.State.Running, DetachKeys: keys, SigProxy: true}
	return join(ctx, c, mon, m, stdin && m.Container.Options.Interactive, at)
}

func (a *app) attachCmd() *cobra.Command {
	var noStdin bool
	at := monitor.AttachOptions{}
	cmd := &cobra.Command{
		Use:   "attach [flags] CONTAINER",
		Short: "Join this terminal to a container that runs",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			mon, m, err := a.monitorOf(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			return join(cmd.Context(), c, mon, m, !noStdin && m.Container.Options.Interactive, at)
		},
	}
	f := cmd.Flags()
	f.BoolVar(&noStdin, "no-stdin", false, "do not give it our stdin")
	f.BoolVar(&at.SigProxy, "sig-proxy", true, "pass signals on to the process")
	f.StringVar(&at.DetachKeys, "detach-keys", "", "what is typed to leave it alone (default ctrl-p,ctrl-q)")
	return cmd
}

// join attaches to a container until it ends, and ends as it does.
func join(ctx context.Context, c *daemon.Client, mon *monitor.Client, m *daemon.Mount, stdin bool, at monitor.AttachOptions) error {
	at.TTY = m.Container.Options.TTY
	if at.TTY {
		if err := checkTTY(stdin); err != nil {
			return err
		}
		at.SigProxy = false
	}
	if at.SigProxy {
		ctx = context.WithoutCancel(ctx)
	}
	st := newStats(c, m, m.Created)
	end, err := mon.Attach(ctx, streams(stdin, at.TTY), at)
	if errors.Is(err, monitor.ErrDetached) {
		return nil
	}
	if err != nil {
		return err
	}
	st.ended()
	return exitOf(end)
}
