package main

import (
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"github.com/varvefs/varve/daemon"
)

func (a *app) daemonCmd() *cobra.Command {
	var metrics string
	cmd := &cobra.Command{
		Use:   "daemon [flags]",
		Short: "Serve the mounts of a store; other verbs start it when they need it",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			d, ok := daemon.InheritedDirs()
			if !ok {
				var err error
				if d, err = a.dirs(); err != nil {
					return err
				}
			}
			c, err := daemon.LoadConfig(d)
			if err != nil {
				return err
			}
			if metrics != "" {
				c.Metrics = metrics
			}
			if a.debug {
				c.Level = slog.LevelDebug
			}
			c.Log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: c.Level}))
			return daemon.Run(cmd.Context(), c, nil)
		},
	}
	cmd.Flags().StringVar(&metrics, "metrics", "", "also serve Prometheus on this loopback address, host:port")
	cmd.AddCommand(&cobra.Command{
		Use:   "stop",
		Short: "Stop the daemon; it brings its mounts back when it is started again",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			c.Start = false
			return c.Stop(cmd.Context())
		},
	})
	return cmd
}
