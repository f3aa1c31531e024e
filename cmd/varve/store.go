package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/varvefs/varve/daemon"
)

func (a *app) storeCmd() *cobra.Command {
	cmd := &cobra.Command{Use: "store", Short: "Look after what is kept of images"}
	verbless(cmd)
	cmd.AddCommand(&cobra.Command{
		Use:   "drop IMAGE|LAYER",
		Short: "Give up the contents of an image or of a layer; reads fetch them again, by range",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			dropped, err := c.Drop(cmd.Context(), daemon.DropOptions{What: absoluteImage(args[0])})
			for _, d := range dropped {
				if d.Kept != "" {
					fmt.Printf("%s: kept: %s\n", d.Layer, d.Kept)
				} else {
					fmt.Printf("%s: %s\n", d.Layer, size(d.Bytes))
				}
			}
			return err
		},
	})
	return cmd
}
