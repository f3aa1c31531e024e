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
		Short:   "Unmount by name, id or directory",
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
					args = append(args, m.ID)
				}
			}
			var first error
			for _, arg := range args {
				o.Mount = mountArg(arg)
				name, err := c.Unmount(cmd.Context(), o)
				if all && exitCode(err) == daemon.ExitNotFound {
					continue // somebody was faster
				}
				if exitCode(err) == exitInterrupted {
					return err
				}
				if err != nil {
					fmt.Fprintln(os.Stderr, "varve: "+message(err))
					if first == nil {
						first = err
					}
					continue
				}
				fmt.Println(name)
			}
			if first != nil {
				return &daemon.Error{Exit: exitCode(first)}
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&all, "all", "a", false, "all mounts")
	f.BoolVarP(&o.Force, "force", "f", false, "also when somebody is in it: they keep what they have open")
	f.BoolVarP(&o.Lazy, "lazy", "l", false, "take it out of sight now, clean up when nobody is in it any more")
	return cmd
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
