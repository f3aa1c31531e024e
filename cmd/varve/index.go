package main

import (
	"fmt"
	"os"
	"strings"
	"text/tabwriter"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/varvefs/varve/daemon"
)

func (a *app) indexCmd() *cobra.Command {
	var o daemon.IndexOptions
	var span, least string
	cmd := &cobra.Command{
		Use:   "index [flags] IMAGE",
		Short: "Make an image's layers lazy without changing it, for this machine or for all",
		Long: "Make indexes of the layers that bring none, by reading each once, and with --push\n" +
			"put them beside the image in its registry: as varve's own index, and for gzip and\n" +
			"uncompressed layers as a SOCI index that others read too. The image stays as it is.",
		Example: "  varve index --push registry.example/app:1\n  varve index ls registry.example/app:1",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			for _, f := range []struct {
				flag, value string
				to          *int64
			}{{"span-size", span, &o.SpanSize}, {"min-layer-size", least, &o.MinLayerSize}} {
				n, err := units.RAMInBytes(f.value)
				if err == nil && n < 0 {
					err = fmt.Errorf("%q is too much", f.value)
				}
				if err != nil {
					return usageError{fmt.Errorf("--%s: %w", f.flag, err)}
				}
				*f.to = n
			}
			if err := setImage(&o.ImageOptions, args[0]); err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			x, err := c.Index(cmd.Context(), o)
			if err != nil {
				return err
			}
			return printIndexed(x)
		},
	}
	f := cmd.Flags()
	imageFlags(f, &o.ImageOptions)
	f.BoolVar(&o.Push, "push", false, "put the indexes beside the image in its registry")
	f.StringVar(&span, "span-size", "0", "how much of a layer, decompressed, is read at least (0: what is best; SOCI's default is 4MiB)")
	f.StringVar(&least, "min-layer-size", "0", "leave out smaller layers")
	cmd.AddCommand(a.indexLsCmd(), a.indexRmCmd())
	return cmd
}

func printIndexed(x *daemon.Indexed) error {
	t := tabwriter.NewWriter(os.Stdout, 0, 1, 3, ' ', 0)
	fmt.Fprintln(t, "LAYER\tFORMAT\tSIZE\tFILES\tINDEX\tSOCI")
	for _, l := range x.Layers {
		line := []string{l.Digest[:min(len(l.Digest), 19)], l.Format, size(l.Size)}
		if l.Left != "" {
			line = append(line, l.Left)
		} else {
			line = append(line, fmt.Sprint(l.Entries), share(l.Bundle, l.Uncompressed), share(l.ZTOC, l.Uncompressed))
		}
		fmt.Fprintln(t, strings.Join(line, "\t"))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for _, p := range x.Pushed {
		fmt.Printf("%s: %s index %s (%d layers, %s)\n", x.Image, p.Kind, p.Digest, p.Layers, size(p.Size))
	}
	return nil
}

func size(n int64) string { return units.HumanSizeWithPrecision(float64(n), 3) }

// share says how large an index is, also in parts of what it is of.
func share(n, of int64) string {
	if n == 0 {
		return "-"
	}
	return fmt.Sprintf("%s (%.2f%%)", size(n), 100*float64(n)/float64(max(of, 1)))
}

func (a *app) indexLsCmd() *cobra.Command {
	var o daemon.ImageOptions
	cmd := &cobra.Command{
		Use:   "ls [flags] IMAGE",
		Short: "List the indexes that an image has in its registry",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := setImage(&o, args[0]); err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			xs, err := c.Indexes(cmd.Context(), o)
			if err != nil {
				return err
			}
			t := tabwriter.NewWriter(os.Stdout, 0, 1, 3, ' ', 0)
			fmt.Fprintln(t, "DIGEST\tKIND\tLAYERS\tSIZE")
			for _, x := range xs {
				fmt.Fprintf(t, "%s\t%s\t%d\t%s\n", x.Digest, x.Kind, x.Layers, size(x.Size))
			}
			return t.Flush()
		},
	}
	imageFlags(cmd.Flags(), &o)
	return cmd
}

func (a *app) indexRmCmd() *cobra.Command {
	var o daemon.IndexRemoval
	cmd := &cobra.Command{
		Use:   "rm [flags] IMAGE [DIGEST...]",
		Short: "Delete indexes of an image from its registry: those named, or all",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := setImage(&o.ImageOptions, args[0]); err != nil {
				return err
			}
			o.Digests = args[1:]
			c, err := a.client()
			if err != nil {
				return err
			}
			removed, err := c.RemoveIndexes(cmd.Context(), o)
			for _, d := range removed {
				fmt.Println("Deleted:", d)
			}
			return err
		},
	}
	imageFlags(cmd.Flags(), &o.ImageOptions)
	return cmd
}
