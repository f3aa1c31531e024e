package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"text/tabwriter"
	"text/template"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/varvefs/varve/daemon"
)

func (a *app) psCmd() *cobra.Command {
	var quiet, noTrunc, all, sizes, latest bool
	var last int
	var format string
	cmd := &cobra.Command{
		Use:   "ps [flags]",
		Short: "List the mounts, containers among them",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			ms, err := c.Mounts(cmd.Context())
			if err != nil {
				return err
			}
			if latest {
				last = 1
			}
			if last > 0 {
				ms, all = ms[max(len(ms)-last, 0):], true
			}
			var rows []row
			for _, m := range ms {
				if !all && (m.Unmounted != nil || m.Container != nil && m.Container.State.Status == "created") {
					continue
				}
				if sizes {
					if m, err = c.Inspect(cmd.Context(), m.ID); exitCode(err) == daemon.ExitNotFound {
						continue // it went away
					} else if err != nil {
						return err
					}
				}
				rows = append(rows, row{m, noTrunc})
			}
			switch {
			case quiet:
				for _, r := range rows {
					fmt.Println(r.ID())
				}
				return nil
			case format == "json":
				format = "{{json .}}"
			case format == "" || format == "table":
				return table(os.Stdout, rows, sizes)
			}
			return execute(os.Stdout, format, rows)
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&all, "all", "a", false, "also those that are unmounted and have changes, and containers that do not run")
	f.BoolVarP(&latest, "latest", "l", false, "the newest, whatever its state")
	f.IntVarP(&last, "last", "n", 0, "so many of the newest, whatever their state")
	f.BoolVarP(&sizes, "size", "s", false, "how large the changes are")
	f.BoolVarP(&quiet, "quiet", "q", false, "ids only")
	f.BoolVar(&noTrunc, "no-trunc", false, "whole ids and names")
	f.StringVar(&format, "format", "", "a Go template for each mount, or json")
	return cmd
}

// row is a mount as `ps` shows it; its methods are the template's fields.
type row struct {
	m       daemon.Mount
	noTrunc bool
}

func (r row) ID() string {
	if r.noTrunc {
		return r.m.ID
	}
	return r.m.ID[:12]
}

func (r row) Image() string      { return r.m.Image }
func (r row) CreatedAt() string  { return r.m.Created.Format("2006-01-02 15:04:05 -0700 MST") }
func (r row) Mountpoint() string { return r.m.Dir }
func (r row) Names() string      { return r.m.Name }
func (r row) Face() string       { return r.m.Face }
func (r row) Digest() string     { return r.m.Target }
func (r row) Size() string       { return units.HumanSizeWithPrecision(float64(r.m.Size), 3) }

// Created is how long ago, in docker's words.
func (r row) Created() string { return units.HumanDuration(time.Since(r.m.Created)) + " ago" }

// State is that of a container as docker has it, or the mount's.
func (r row) State() string {
	if c := r.m.Container; c != nil {
		return c.State.Status
	}
	return r.m.State
}

// Command is what runs, as docker shows it.
func (r row) Command() string {
	if r.m.Container == nil {
		return "-"
	}
	const most = 20
	words := []rune(r.m.Container.Command())
	if len(words) > most && !r.noTrunc {
		words = append(words[:most-1], '…')
	}
	return strconv.Quote(string(words))
}

func (r row) Status() string {
	if r.m.Container != nil {
		return r.containerStatus()
	}
	switch r.m.State {
	case "failed":
		return "Failed (" + r.m.Error + ")"
	case "restoring":
		return "Restoring"
	case "unmounted":
		return "Unmounted " + units.HumanDuration(time.Since(*r.m.Unmounted)) + " ago (rw)"
	}
	if r.m.State == "reading" {
		return fmt.Sprintf("Reading %d%%", 100*r.m.Local/max(r.m.Size, 1))
	}
	s := "Up " + units.HumanDuration(time.Since(r.m.Created)) + " (" + r.m.Face
	if r.m.RW {
		s += ", rw"
	}
	if r.m.Offline {
		s += ", offline"
	}
	return s + ")"
}

// containerStatus is docker's.
func (r row) containerStatus() string {
	c := &r.m.Container.State
	ago := func(t time.Time) string { return units.HumanDuration(time.Since(t)) }
	var s string
	switch {
	case c.Paused:
		s = "Up " + ago(c.StartedAt) + " (Paused)"
	case c.Running:
		s = "Up " + ago(c.StartedAt)
	case c.Status == "exited":
		s = fmt.Sprintf("Exited (%d) %s ago", c.ExitCode, ago(c.FinishedAt))
	case c.Status == "dead":
		s = "Dead"
	default:
		s = "Created"
	}
	switch {
	case r.m.State == "failed":
		s += " (mount failed: " + r.m.Error + ")"
	case r.m.Unmounted == nil && (c.Status == "exited" || c.Status == "dead"):
		s += " (mounted)"
	}
	return s
}

// Changed is how large the changes are on disk, where that was asked for.
func (r row) Changed() string {
	return units.HumanSizeWithPrecision(float64(r.m.UpperBytes), 3) + " (virtual " + r.Size() + ")"
}

// Fetched is what the network brought of what the image has.
func (r row) Fetched() string {
	if r.m.Unmounted != nil {
		return "-"
	}
	return units.HumanSizeWithPrecision(float64(r.m.Fetched), 3) + " of " + r.Size()
}

func (r row) MarshalJSON() ([]byte, error) {
	return json.Marshal(map[string]string{
		"ID": r.ID(), "Image": r.Image(), "Command": r.Command(), "State": r.State(), "CreatedAt": r.CreatedAt(), "Created": r.Created(), "Status": r.Status(),
		"Mountpoint": r.Mountpoint(), "Names": r.Names(), "Face": r.Face(), "Digest": r.Digest(), "Size": r.Size(), "Fetched": r.Fetched(),
	})
}

func table(w io.Writer, rows []row, sizes bool) error {
	t := tabwriter.NewWriter(w, 0, 1, 3, ' ', 0)
	head := "MOUNT ID\tIMAGE\tCOMMAND\tCREATED\tSTATUS\tMOUNTPOINT\tFETCHED\tNAMES"
	if sizes {
		head += "\tSIZE"
	}
	fmt.Fprintln(t, head)
	for _, r := range rows {
		line := []string{r.ID(), r.Image(), r.Command(), r.Created(), r.Status(), r.Mountpoint(), r.Fetched(), r.Names()}
		if sizes {
			line = append(line, r.Changed())
		}
		fmt.Fprintln(t, strings.Join(line, "\t"))
	}
	return t.Flush()
}

// execute runs a template of docker's kind on each of the things, a line each.
func execute[T any](w io.Writer, format string, things []T) error {
	t, err := template.New("").Funcs(template.FuncMap{
		"json": func(v any) (string, error) { b, err := json.Marshal(v); return string(b), err },
		"join": strings.Join, "lower": strings.ToLower, "upper": strings.ToUpper, "split": strings.Split,
		"println": fmt.Sprintln,
	}).Parse(strings.NewReplacer(`\t`, "\t", `\n`, "\n").Replace(format))
	if err != nil {
		return usageError{fmt.Errorf("--format: %w", err)}
	}
	for _, thing := range things {
		if err := t.Execute(w, thing); err != nil {
			return usageError{fmt.Errorf("--format: %w", err)}
		}
		fmt.Fprintln(w)
	}
	return nil
}
