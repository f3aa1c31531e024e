package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/varvefs/varve/daemon"
)

func (a *app) logsCmd() *cobra.Command {
	var o daemon.ContainerLogOptions
	var tail, since, until string
	cmd := &cobra.Command{
		Use:   "logs [flags] CONTAINER",
		Short: "Print what a container has written",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			o.Mount = mountArg(args[0])
			if o.Tail, err = strconv.Atoi(tail); tail == "all" {
				o.Tail = -1
			} else if err != nil {
				return usageError{fmt.Errorf("--tail %q: want a number of lines, or all", tail)}
			}
			now := time.Now()
			if o.Since, err = parseTime(since, now); err != nil {
				return usageError{fmt.Errorf("--since: %w", err)}
			}
			if o.Until, err = parseTime(until, now); err != nil {
				return usageError{fmt.Errorf("--until: %w", err)}
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			return c.ContainerLogs(cmd.Context(), o, os.Stdout, os.Stderr)
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&o.Follow, "follow", "f", false, "go on until the container's end")
	f.StringVarP(&tail, "tail", "n", "all", "only so many of the last lines")
	f.StringVar(&since, "since", "", "only what was written since: 2026-01-02T15:04:05, seconds since 1970, or 10m for the last ten minutes")
	f.StringVar(&until, "until", "", "only what was written until then")
	f.BoolVarP(&o.Timestamps, "timestamps", "t", false, "say when each line was written")
	return cmd
}

// parseTime reads a time as docker takes it: of the calendar, in seconds since 1970, or
// so long ago. "" is none.
func parseTime(s string, now time.Time) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	if d, err := time.ParseDuration(s); err == nil {
		return now.Add(-d), nil
	}
	if sec, frac, _ := strings.Cut(s, "."); len(frac) <= 9 {
		n, err := strconv.ParseInt(sec, 10, 64)
		ns, ferr := strconv.ParseInt((frac + "000000000")[:9], 10, 64)
		if err == nil && ferr == nil {
			return time.Unix(n, ns), nil
		}
	}
	for _, layout := range []string{time.RFC3339Nano, "2006-01-02T15:04:05.999999999", "2006-01-02T15:04", "2006-01-02Z07:00", "2006-01-02"} {
		if t, err := time.ParseInLocation(layout, s, time.Local); err == nil {
			return t, nil
		}
	}
	return time.Time{}, fmt.Errorf("%q: want a time such as 2026-01-02T15:04:05, seconds since 1970, or a duration such as 10m", s)
}
