package main

import (
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"

	"github.com/spf13/cobra"

	"github.com/varvefs/varve/daemon"
)

func (a *app) daemonCmd() *cobra.Command {
	var metrics, rate, hours string
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
			if rate != "" {
				if c.BackgroundRate, err = limitRate(rate); err != nil {
					return err
				}
			}
			if hours != "" {
				if c.BackgroundHours, err = daemon.ParseHours(hours); err != nil {
					return usageError{fmt.Errorf("--background-hours: %w", err)}
				}
			}
			if a.debug {
				c.Level = slog.LevelDebug
			}
			c.Log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: c.Level}))
			limitMemory()
			return daemon.Run(cmd.Context(), c, nil)
		},
	}
	cmd.Flags().StringVar(&metrics, "metrics", "", "also serve Prometheus on this loopback address, host:port")
	cmd.Flags().StringVar(&rate, "limit-rate", "", "fetch what nobody waits for at no more than so many bytes a second, such as 2MB")
	cmd.Flags().StringVar(&hours, "background-hours", "", "fetch what nobody waits for in these hours of the day only, such as 22:00-06:00")
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

// softMemory is what the daemon's heap may grow to before garbage is collected
// more often than the heap's doubling asks for, in bytes. What is alive at the
// merge of 100,000 names fits in it, so that it costs a few collections; where more
// is alive, the runtime spends at most half of the CPU on the attempt.
const softMemory = 28 << 20

// limitMemory sets the soft limit, unless GOMEMLIMIT has.
func limitMemory() {
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(softMemory)
	}
}
