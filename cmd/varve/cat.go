package main

import (
	"os"

	"github.com/spf13/cobra"

	"github.com/varvefs/varve/daemon"
)

func (a *app) catCmd() *cobra.Command {
	var o daemon.PathOptions
	cmd := &cobra.Command{
		Use:   "cat [flags] IMAGE PATH...",
		Short: "Write files of an image to stdout without mounting it",
		Args:  cobra.MinimumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			if err := setImage(&o.ImageOptions, args[0]); err != nil {
				return err
			}
			for _, p := range args[1:] {
				o.Path = p
				if err := c.Cat(cmd.Context(), o, os.Stdout); err != nil {
					return err
				}
			}
			return nil
		},
	}
	imageFlags(cmd.Flags(), &o.ImageOptions)
	return cmd
}
