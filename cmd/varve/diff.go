package main

import (
	"encoding/json"
	"fmt"
	"os"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/varvefs/varve/daemon"
)

func (a *app) diffCmd() *cobra.Command {
	var format string
	var stat, namesOnly, exit bool
	cmd := &cobra.Command{
		Use:   "diff [flags] MOUNT",
		Short: "List what was added (A), changed (C) and deleted (D) in a mount",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			ds, err := c.Diff(cmd.Context(), mountArg(args[0]))
			if err != nil {
				return err
			}
			if err := printDiff(ds, format, stat, namesOnly); err != nil {
				return err
			}
			if exit && len(ds) > 0 {
				return &daemon.Error{Exit: 1}
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&format, "format", "", "a Go template for each change (.Type .Path .Size), or json for one document")
	f.BoolVar(&stat, "stat", false, "how much there is of each, and how large it is")
	f.BoolVar(&namesOnly, "name-only", false, "paths only")
	f.BoolVar(&exit, "exit-code", false, "exit with 1 if anything changed")
	return cmd
}

func printDiff(ds []daemon.Delta, format string, stat, namesOnly bool) error {
	switch {
	case stat:
		printDiffStat(ds)
	case format == "json":
		// podman's form: a list for each kind.
		kinds := map[string]string{"A": "added", "C": "changed", "D": "deleted"}
		out := map[string][]string{"added": {}, "changed": {}, "deleted": {}}
		for _, d := range ds {
			out[kinds[d.Kind]] = append(out[kinds[d.Kind]], d.Path)
		}
		enc := json.NewEncoder(os.Stdout)
		enc.SetEscapeHTML(false)
		enc.SetIndent("", "     ")
		return enc.Encode(out)
	case format != "":
		rows := make([]deltaRow, len(ds))
		for i, d := range ds {
			rows[i] = deltaRow{d.Kind, d.Path, d.Size}
		}
		return execute(os.Stdout, format, rows)
	case namesOnly:
		for _, d := range ds {
			fmt.Println(d.Path)
		}
	default:
		for _, d := range ds {
			fmt.Println(d.Kind, d.Path)
		}
	}
	return nil
}

// deltaRow is a change by the names that docker's templates have for it.
type deltaRow struct {
	Type, Path string
	Size       int64
}

func printDiffStat(ds []daemon.Delta) {
	count, bytes := map[string]int{}, map[string]int64{}
	for _, d := range ds {
		count[d.Kind]++
		bytes[d.Kind] += d.Size
	}
	size := func(kind string) string { return units.HumanSizeWithPrecision(float64(bytes[kind]), 3) }
	fmt.Printf("%d added (%s), %d changed (%s), %d deleted\n", count["A"], size("A"), count["C"], size("C"), count["D"])
}
