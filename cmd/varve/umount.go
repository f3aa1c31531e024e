package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/varvefs/varve/daemon"
)

func (a *app) umountCmd() *cobra.Command {
	var o daemon.UnmountOptions
	var all bool
	cmd := &cobra.Command{
		Use:     "umount [flags] MOUNT...",
		Aliases: []string{"unmount"},
		Short:   "Unmount by name, id or directory; changes are kept for the next mount",
		RunE: func(cmd *cobra.Command, args []string) error {
			if all == (len(args) > 0) {
				return usageError{errors.New("name the mounts, or give --all")}
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			if all {
				ms, err := c.Mounts(cmd.Context())
				if err != nil {
					return err
				}
				// One that lies in another goes first.
				slices.SortFunc(ms, func(a, b daemon.Mount) int { return strings.Compare(b.Dir, a.Dir) })
				for _, m := range ms {
					if m.Unmounted == nil && !m.Base {
						args = append(args, m.ID)
					}
				}
			}
			return each(args, func(arg string) error {
				o.Mount = mountArg(arg)
				name, err := c.Unmount(cmd.Context(), o)
				if st, serr := os.Stat(arg); exitCode(err) == daemon.ExitNotFound && serr == nil && st.IsDir() {
					o.Mount = mountArg("./" + arg) // no name, but a directory here
					name, err = c.Unmount(cmd.Context(), o)
				}
				if all && exitCode(err) == daemon.ExitNotFound {
					return nil // somebody was faster
				}
				if err == nil {
					fmt.Println(name)
				}
				return err
			})
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&all, "all", "a", false, "all mounts")
	f.BoolVarP(&o.Force, "force", "f", false, "also when somebody is in it: they keep what they have open")
	f.BoolVar(&o.Remove, "rm", false, "delete its changes as well")
	f.BoolVarP(&o.Lazy, "lazy", "l", false, "take it out of sight now, clean up when nobody is in it any more")
	return cmd
}

// each does something to each of the arguments, says what went wrong with some,
// and gives the exit code of the first.
func each(args []string, do func(arg string) error) error {
	var first error
	for _, arg := range args {
		err := do(arg)
		if exitCode(err) == exitInterrupted {
			return err
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "varve: "+message(err))
			if first == nil {
				first = err
			}
		}
	}
	if first != nil {
		return &daemon.Error{Exit: exitCode(first)}
	}
	return nil
}

// mountArg makes a directory absolute and leaves names and ids as they are.
func mountArg(s string) string {
	if strings.ContainsRune(s, '/') || s == "." || s == ".." {
		if abs, err := filepath.Abs(s); err == nil {
			return abs
		}
	}
	return s
}
