package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/varvefs/varve/daemon"
)

func (a *app) pushCmd() *cobra.Command {
	var o daemon.PushOptions
	var quiet bool
	cmd := &cobra.Command{
		Use:   "push [flags] REF",
		Short: "Send an image to its registry: what that has is not sent",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := setImage(&o.ImageOptions, args[0]); err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			p := newProgress(os.Stdout, isTerminal(os.Stdout), quiet)
			c.Status, c.Notice = p.status, p.notice
			got, err := c.Push(cmd.Context(), o)
			p.done()
			if err != nil {
				return err
			}
			if quiet {
				fmt.Println(got.Ref)
			} else {
				fmt.Fprintln(os.Stderr, summary(got))
			}
			return nil
		},
	}
	f := cmd.Flags()
	transferFlags(f, &o.ImageOptions)
	f.BoolVarP(&quiet, "quiet", "q", false, "the name only")
	return cmd
}

func (a *app) saveCmd() *cobra.Command {
	var o daemon.SaveOptions
	var output string
	cmd := &cobra.Command{
		Use:   "save [flags] REF...",
		Short: "Write images to one tar that docker, podman, skopeo and ctr load",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := setImage(&o.ImageOptions, args[0]); err != nil {
				return err
			}
			for _, arg := range args {
				o.Refs = append(o.Refs, absoluteImage(arg))
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			return toFile(output, func(f *os.File) error { return c.Save(cmd.Context(), o, f) })
		},
	}
	f := cmd.Flags()
	transferFlags(f, &o.ImageOptions)
	f.StringVarP(&output, "output", "o", "", "write to a file, not to standard output")
	return cmd
}

func (a *app) exportCmd() *cobra.Command {
	var o daemon.ExportOptions
	var output string
	cmd := &cobra.Command{
		Use:   "export [flags] MOUNT|IMAGE",
		Short: "Write all files of a mount or an image as a flat tar",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := setImage(&o.ImageOptions, mountOrImage(args[0])); err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			if err := flush(cmd.Context(), c, o.Image); err != nil && exitCode(err) != daemon.ExitNotFound {
				return err
			}
			return toFile(output, func(f *os.File) error { return c.Export(cmd.Context(), o, f) })
		},
	}
	f := cmd.Flags()
	imageFlags(f, &o.ImageOptions)
	f.StringVarP(&output, "output", "o", "", "write to a file, not to standard output")
	f.StringVar(&o.Path, "path", "", "only this file or directory")
	return cmd
}

// toFile runs write with the file that was named, or standard output. A file that
// was not written whole is removed, and a tar is not poured over a terminal.
func toFile(name string, write func(*os.File) error) error {
	if name == "" || name == "-" {
		if isTerminal(os.Stdout) {
			return usageError{errors.New("cowardly refusing to write a tar to a terminal: use -o, or redirect it")}
		}
		return write(os.Stdout)
	}
	if st, err := os.Stat(name); err == nil && !st.Mode().IsRegular() {
		f, err := os.OpenFile(name, os.O_WRONLY, 0) // a device or a pipe
		if err != nil {
			return err
		}
		return errors.Join(write(f), f.Close())
	}
	f, err := os.CreateTemp(filepath.Dir(name), ".varve-*")
	if err != nil {
		var perr *os.PathError
		if errors.As(err, &perr) {
			err = perr.Err
		}
		return fmt.Errorf("-o %s: %w", name, err)
	}
	defer os.Remove(f.Name())
	err = write(f)
	if err == nil {
		err = f.Chmod(0o644)
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), name)
}
