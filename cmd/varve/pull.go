package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/varvefs/varve/daemon"
)

func (a *app) pullCmd() *cobra.Command {
	var o daemon.PullOptions
	var rate string
	var quiet bool
	cmd := &cobra.Command{
		Use:   "pull [flags] IMAGE",
		Short: "Bring an image here: what a mount needs, or with --full every byte",
		Long: "Bring an image's manifest, config and the index of each layer here, so that it can\n" +
			"be mounted without asking for them; files are still fetched when they are read. Layers\n" +
			"that have no index are read whole. With --full every byte is brought, so that\n" +
			"`varve mount --offline` reads everything. A pull that was interrupted goes on where it\n" +
			"was when it is called again.",
		Example: "  varve pull debian:12\n  varve pull --full --limit-rate 2MB registry.example/app:1",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if o.AllPlatforms && cmd.Flags().Changed("platform") {
				return usageError{errors.New("--platform and --all-platforms exclude each other")}
			}
			var err error
			if o.Rate, err = limitRate(rate); err != nil {
				return err
			}
			if o.AllPlatforms {
				o.Platform = ""
			}
			if err := setImage(&o.ImageOptions, args[0]); err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			p := newProgress(os.Stdout, isTerminal(os.Stdout), quiet)
			c.Status, c.Notice = p.status, p.notice
			got, err := c.Pull(cmd.Context(), o)
			p.done()
			if err != nil {
				return err
			}
			fmt.Println(got.Ref)
			return nil
		},
	}
	f := cmd.Flags()
	f.BoolVar(&o.Full, "full", false, "every byte of every layer, so that the network is not needed any more")
	f.BoolVar(&o.AllPlatforms, "all-platforms", false, "all that the manifest list names")
	f.StringVar(&o.Index, "index", "auto", "what layers may be read by: auto, none (read them whole), require (never read one whole)")
	limitRateFlag(f, &rate)
	transferFlags(f, &o.ImageOptions)
	f.BoolVarP(&quiet, "quiet", "q", false, "the name only")
	return cmd
}

func limitRateFlag(f *pflag.FlagSet, rate *string) {
	f.StringVar(rate, "limit-rate", "", "fetch at most so many bytes a second, such as 2MB or 500kB")
}

func limitRate(s string) (int64, error) {
	n, err := daemon.ParseRate(s)
	if err != nil {
		return 0, usageError{fmt.Errorf("--limit-rate: %w", err)}
	}
	return n, nil
}
