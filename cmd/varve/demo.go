package main

import (
	"os"

	"github.com/spf13/cobra"

	"github.com/varvefs/varve/bench/demo"
	"github.com/varvefs/varve/bench/link"
)

func (a *app) demoCmd() *cobra.Command {
	o := demo.Options{Out: os.Stdout}
	var profile string
	cmd := &cobra.Command{
		Use:   "demo [flags] [IMAGE [COMMAND...]]",
		Short: "Show it: mount an image through a slow link and run a program from it",
		Long: "Without an image, the Go toolchain of this machine is packed as one and served\n" +
			"by a registry of the demo's own. COMMAND is a path in the image, by default /bin/true.",
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if o.Link, err = link.ParseProfile(profile); err != nil {
				return usageError{err}
			}
			if len(args) > 0 {
				o.Image, o.Command = absoluteImage(args[0]), args[1:]
			}
			return demo.Run(cmd.Context(), o)
		},
	}
	cmd.Flags().SetInterspersed(false)
	cmd.Flags().StringVar(&profile, "link", "edge", `the link: edge (50 ms, 50 Mbit/s), datacenter, or as "rtt=20ms,rate=100mbit"`)
	cmd.Flags().StringVar(&o.Face, "face", "auto", "who serves the tree: auto, kernel, fuse")
	return cmd
}
