package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/spf13/cobra"

	"github.com/varvefs/varve/daemon"
)

func (a *app) warmCmd() *cobra.Command {
	var o daemon.WarmOptions
	var rate, from string
	var wait, quiet bool
	cmd := &cobra.Command{
		Use:   "warm [flags] IMAGE [PATH...]",
		Short: "Bring files of an image here before they are read",
		Long: "Bring the contents of files here, and of all files below directories, so that they\n" +
			"are read at the speed of the disk, the network being there or not. Symlinks on the\n" +
			"way to a PATH are followed inside the image, those below it are not. Without a PATH\n" +
			"it is what a start of the image reads, if that is known. `varve pull --full` brings\n" +
			"everything. A warm that was interrupted goes on where it was when it is called again;\n" +
			"one that was left to the daemon (--detach) ends with the daemon.",
		Example: "  varve warm python:3.13 /usr/lib/python3\n  varve warm --from-file needed.txt me/app:1\n  varve warm -d --limit-rate 1MB me/app:1 /models",
		Args:    cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			paths := args[1:]
			if from != "" {
				more, err := readPaths(from)
				if err != nil {
					return usageError{fmt.Errorf("--from-file: %w", err)}
				}
				paths = append(paths, more...)
			}
			if slices.Contains(paths, "") { // a variable that is not set, and not all of the image
				return usageError{errors.New("a PATH is empty")}
			}
			var err error
			if len(paths) > 0 {
				o.Paths, err = daemon.PackPaths(paths)
				if err == nil && len(o.Paths) > maxPacked {
					err = fmt.Errorf("%d paths are too many at a time (%s compressed): name directories, or split them", len(paths), size(int64(len(o.Paths))))
				}
				if err != nil {
					return usageError{err}
				}
			}
			if o.Profile != "" && len(paths) > 0 {
				return usageError{errors.New("PATHs and --profile exclude each other")}
			}
			if o.Rate, err = limitRate(rate); err != nil {
				return err
			}
			o.Detach = o.Detach || !wait
			if err := setImage(&o.ImageOptions, args[0]); err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			p := newProgress(os.Stderr, isTerminal(os.Stderr), quiet)
			c.Status, c.Notice = p.status, p.notice
			got, err := c.Warm(cmd.Context(), o)
			p.done()
			if err == nil && !quiet {
				fmt.Fprintln(os.Stderr, warmed(got, o.Detach))
			}
			return err
		},
	}
	f := cmd.Flags()
	imageFlags(f, &o.ImageOptions)
	f.StringVar(&from, "from-file", "", "also the paths in this file, one a line; - for standard input")
	f.StringVar(&o.Profile, "profile", "", `without a PATH, the workload whose start-up profile is brought (default "default", the image's own)`)
	f.BoolVarP(&o.Detach, "detach", "d", false, "leave it to the daemon, which fetches when nothing else is")
	f.BoolVar(&wait, "wait", true, "until all of it is here")
	limitRateFlag(f, &rate)
	f.BoolVarP(&quiet, "quiet", "q", false, "no progress")
	return cmd
}

// warmed says what came of it, in one line.
func warmed(w *daemon.Warmed, detached bool) string {
	what := fmt.Sprintf("%d files, %s", w.Files, size(w.Bytes))
	switch w.Profile {
	case "":
	case "none": // so all of it is here
		what = "everything is here"
	default:
		what = fmt.Sprintf("what a start reads (%s), %s", w.Profile, size(w.Bytes))
	}
	if detached {
		return what + ": left to the daemon"
	}
	return what + ": " + size(w.Fetched) + " fetched"
}

// readPaths reads a path a line.
func readPaths(name string) (paths []string, err error) {
	in := io.Reader(os.Stdin)
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		in = f
	}
	s := bufio.NewScanner(in)
	for s.Scan() {
		if s.Text() != "" {
			paths = append(paths, s.Text())
		}
	}
	if err := s.Err(); err != nil {
		return nil, err
	}
	if len(paths) == 0 {
		return nil, errors.New("it names no path")
	}
	return paths, nil
}
