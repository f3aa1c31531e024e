package main

import (
	"github.com/spf13/cobra"

	"github.com/varvefs/varve/daemon"
	"github.com/varvefs/varve/run/monitor"
)

// monitorCmd is how the daemon starts the process beside a container.
func (a *app) monitorCmd() *cobra.Command {
	return &cobra.Command{
		Use:    daemon.MonitorVerb + " DIR",
		Short:  "Stand beside a container, for the daemon",
		Hidden: true,
		Args:   cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if code := monitor.Main(args[0]); code != 0 {
				return exited(code)
			}
			return nil
		},
	}
}
