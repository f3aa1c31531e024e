package main

import (
	"encoding/json"
	"os"

	"github.com/spf13/cobra"

	"github.com/varvefs/varve/daemon"
	"github.com/varvefs/varve/run"
)

func (a *app) inspectCmd() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "inspect [flags] MOUNT...",
		Short: "Say all that is known of mounts, as JSON",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			ms := make([]any, 0, len(args))
			for _, arg := range args {
				m, err := c.Inspect(cmd.Context(), mountArg(arg))
				if err != nil {
					return err
				}
				if m.Container != nil {
					ms = append(ms, containerOf(m))
				} else {
					ms = append(ms, m)
				}
			}
			switch format {
			case "":
				enc := json.NewEncoder(os.Stdout)
				enc.SetEscapeHTML(false)
				enc.SetIndent("", "    ")
				return enc.Encode(ms)
			case "json":
				format = "{{json .}}"
			}
			return execute(os.Stdout, format, ms)
		},
	}
	cmd.Flags().StringVarP(&format, "format", "f", "", "a Go template for each mount, or json")
	return cmd
}

// inspected is a mount with a process: what docker says of it under docker's keys.
type inspected struct {
	daemon.Mount
	Path       string
	Args       []string
	State      daemon.ContainerState
	MountState string
	LogPath    string
	Container  struct {
		Options    run.Options
		StopSignal int
		AutoRemove bool
		Socket     string
		Served     bool
	}
}

func containerOf(m daemon.Mount) inspected {
	c := m.Container
	v := inspected{Mount: m, State: c.State, MountState: m.State, LogPath: c.LogPath, Args: []string{}}
	if len(c.Args) > 0 {
		v.Path, v.Args = c.Args[0], c.Args[1:]
	}
	v.Container.Options, v.Container.StopSignal, v.Container.AutoRemove, v.Container.Socket = c.Options, int(c.StopSignal), c.Remove, c.Socket
	v.Container.Served = c.Served
	return v
}
