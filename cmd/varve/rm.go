package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/daemon"
)

func (a *app) rmCmd() *cobra.Command {
	var o daemon.UnmountOptions
	cmd := &cobra.Command{
		Use:   "rm [flags] MOUNT...",
		Short: "Delete unmounted mounts and ended containers, and with them their changes",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			return each(args, func(arg string) error {
				o.Mount = mountArg(arg)
				r, err := c.Remove(cmd.Context(), o)
				if err == nil {
					fmt.Println(r.Name)
				}
				return err
			})
		},
	}
	cmd.Flags().BoolVarP(&o.Force, "force", "f", false, "also one that is mounted; a container that runs is killed")
	cmd.Flags().BoolP("volumes", "v", false, "with a container's volumes that have no name, which go in any case")
	return cmd
}

func (a *app) pruneCmd() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "prune [flags]",
		Short: "Delete all mounts that are not mounted, and with them their changes",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			if !force {
				if sure, err := confirm("WARNING! This will delete all unmounted mounts and what was changed in them."); err != nil || !sure {
					return err
				}
			}
			rs, err := c.Prune(cmd.Context())
			if err != nil {
				return err
			}
			var total int64
			if len(rs) > 0 {
				fmt.Println("Deleted Mounts:")
			}
			for _, r := range rs {
				fmt.Println(r.ID)
				total += r.Bytes
			}
			if len(rs) > 0 {
				fmt.Println()
			}
			fmt.Println("Total reclaimed space:", units.HumanSizeWithPrecision(float64(total), 3))
			return nil
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "do not ask")
	return cmd
}

// confirm asks whether to go on. Who cannot be asked must give --force.
func confirm(warning string) (bool, error) {
	if !isTerminal(os.Stdin) {
		return false, usageError{errors.New("there is no terminal to ask at: give --force")}
	}
	fmt.Fprintf(os.Stderr, "%s\nAre you sure you want to continue? [y/N] ", warning)
	line, _ := bufio.NewReader(os.Stdin).ReadString('\n')
	answer := strings.ToLower(strings.TrimSpace(line))
	return answer == "y" || answer == "yes", nil
}

func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
