package main

import (
	"encoding/json"
	"fmt"
	"os"
	"runtime"

	"github.com/spf13/cobra"

	"github.com/varvefs/varve/daemon"
)

func (a *app) versionCmd() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "version [flags]",
		Short: "Say which versions of command and daemon run",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			c.Start = false
			v := struct {
				Client daemon.Version
				Daemon *daemon.Version `json:",omitempty"`
			}{Client: daemon.ThisVersion()}
			if d, err := c.Version(cmd.Context()); err == nil {
				v.Daemon = &d
			}
			switch format {
			case "json":
				return json.NewEncoder(os.Stdout).Encode(v)
			case "":
				print := func(who string, v daemon.Version) {
					fmt.Printf("%s:\n Version:    %s\n Go version: %s\n Revision:   %s\n OS/Arch:    %s/%s\n", who, v.Version, v.GoVersion, v.Revision, runtime.GOOS, runtime.GOARCH)
				}
				print("Client", v.Client)
				if v.Daemon != nil {
					print("Daemon", *v.Daemon)
				} else {
					fmt.Println("Daemon: none runs")
				}
				return nil
			}
			return execute(os.Stdout, format, []any{v})
		},
	}
	cmd.Flags().StringVarP(&format, "format", "f", "", "a Go template, or json")
	return cmd
}
