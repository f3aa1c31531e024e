package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/varvefs/varve/daemon"
	"github.com/varvefs/varve/snapshotter"
)

func (a *app) daemonCmd() *cobra.Command {
	var listen, rate, hours string
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
			if listen != "" {
				c.Metrics = listen
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
			if os.Geteuid() == 0 { // as containerd is
				c.Services = []daemon.Service{snapshotter.Service(d)}
			}
			limitMemory()
			return daemon.Run(cmd.Context(), c, nil)
		},
	}
	cmd.Flags().StringVar(&listen, "metrics", "", "also serve Prometheus on this loopback address, host:port")
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
			if ms, err := c.Mounts(cmd.Context()); err == nil {
				if err := leaveContainers(cmd.Context(), c, ms); err != nil {
					return err
				}
			}
			return c.Stop(cmd.Context())
		},
	})
	return cmd
}

// leaveContainers names the containers that go on without the daemon, but not well,
// and has the kernel hand over what they have written.
func leaveContainers(ctx context.Context, c *daemon.Client, ms []daemon.Mount) error {
	for _, m := range ms {
		if m.Container != nil && m.Container.State.Running && m.Container.Served {
			if err := flush(ctx, c, m.ID); err != nil {
				return err
			}
			c.Notice(fmt.Sprintf("warning: the container %s reads its image through the daemon: what it has not read yet it cannot read until it is started anew", m.Name))
		}
	}
	return nil
}

// softMemory is what the daemon's heap may grow to before garbage is collected
// more often than the heap's doubling asks for, in bytes. What is alive at the
// merge of 100,000 names fits in it, so that it costs a few collections; where more
// is alive, the runtime spends at most half of the CPU on the attempt.
const softMemory = 26 << 20

// limitMemory keeps the soft limit, unless GOMEMLIMIT has one. It is never so near to
// what is alive that the runtime does little but collect.
func limitMemory() {
	if os.Getenv("GOMEMLIMIT") != "" {
		return
	}
	debug.SetMemoryLimit(softMemory)
	go func() {
		var seen [8]int64 // of late; what is needed for a moment only does not count
		for i := 0; ; i++ {
			time.Sleep(time.Second)
			seen[i%len(seen)] = neededMemory()
			debug.SetMemoryLimit(max(softMemory, slices.Min(seen[:])))
		}
	}()
}

// neededMemory gives the bytes with which the heap has half as much again as is alive
// before it is collected: the limit counts what the runtime has beside the heap, too.
func neededMemory() (n int64) {
	of := map[string]float64{
		"/gc/heap/live:bytes": 1.5, "/memory/classes/total:bytes": 1, "/memory/classes/heap/objects:bytes": -1,
		"/memory/classes/heap/free:bytes": -1, "/memory/classes/heap/released:bytes": -1,
	}
	var samples []metrics.Sample
	for name := range of {
		samples = append(samples, metrics.Sample{Name: name})
	}
	metrics.Read(samples)
	for _, s := range samples {
		if s.Value.Kind() == metrics.KindUint64 {
			n += int64(of[s.Name] * float64(s.Value.Uint64()))
		}
	}
	return n
}
