package main

import (
	"encoding/json"
	"os"

	"github.com/spf13/cobra"

	"github.com/varvefs/varve/daemon"
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
			ms := make([]daemon.Mount, 0, len(args))
			for _, arg := range args {
				m, err := c.Inspect(cmd.Context(), mountArg(arg))
				if err != nil {
					return err
				}
				ms = append(ms, m)
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
