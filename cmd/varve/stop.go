package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/varvefs/varve/daemon"
	"github.com/varvefs/varve/run/monitor"
)

func (a *app) stopCmd() *cobra.Command {
	var o daemon.StopOptions
	var timeout int
	cmd := &cobra.Command{
		Use:   "stop [flags] CONTAINER...",
		Short: "Ask containers to end, and kill those that do not",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			for _, name := range []string{"timeout", "time"} {
				if cmd.Flags().Changed(name) {
					o.Timeout = &timeout
				}
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			return each(args, func(arg string) error {
				o.Mount = mountArg(arg)
				_, err := c.StopContainer(cmd.Context(), o)
				if err == nil {
					fmt.Println(arg)
				}
				return err
			})
		},
	}
	f := cmd.Flags()
	f.IntVarP(&timeout, "timeout", "t", 10, "seconds until it is killed, -1: never (default: the container's, or 10)")
	f.IntVar(&timeout, "time", 10, "")
	f.MarkHidden("time")
	f.StringVarP(&o.Signal, "signal", "s", "", "what asks it to end (default: the container's)")
	return cmd
}

func (a *app) killCmd() *cobra.Command {
	var o daemon.StopOptions
	cmd := &cobra.Command{
		Use:   "kill [flags] CONTAINER...",
		Short: "Send containers a signal",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			return each(args, func(arg string) error {
				o.Mount = mountArg(arg)
				_, err := c.KillContainer(cmd.Context(), o)
				if err == nil {
					fmt.Println(arg)
				}
				return err
			})
		},
	}
	cmd.Flags().StringVarP(&o.Signal, "signal", "s", "KILL", "by name or number")
	return cmd
}

func (a *app) waitCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "wait CONTAINER...",
		Short: "Wait until containers have ended, and print their exit codes",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			return each(args, func(arg string) error {
				code, err := waitFor(cmd, c, mountArg(arg))
				if err == nil {
					fmt.Println(code)
				}
				return err
			})
		},
	}
}

// waitFor waits for a container's end. Its monitor tells, so that the daemon may be
// stopped meanwhile.
func waitFor(cmd *cobra.Command, c *daemon.Client, name string) (int, error) {
	ctx := cmd.Context()
	m, err := c.Inspect(ctx, name)
	if err != nil {
		return 0, err
	}
	if m.Container != nil && m.Container.State.Running {
		if mon, err := monitor.Dial(ctx, m.Container.Socket); err == nil {
			end, err := mon.Wait(ctx)
			if err == nil || !errors.Is(err, monitor.ErrGone) {
				return end.Code, err
			}
		}
	}
	end, err := c.WaitContainer(ctx, m.ID)
	return end.ExitCode, err
}
