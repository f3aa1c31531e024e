package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/varvefs/varve/daemon"
)

func (a *app) mountCmd() *cobra.Command {
	var o daemon.MountOptions
	var foreground bool
	var record time.Duration
	cmd := &cobra.Command{
		Use:   "mount [flags] [IMAGE [DIR]]",
		Short: "Mount an image and print the directory; without arguments, list the mounts",
		Example: "  varve mount debian:12\n  varve mount oci:./layout:latest /mnt/image\n" +
			"  varve mount docker-archive:saved.tar\n  varve mount --rw --name work debian:12\n" +
			"  varve mount --name work          # again, with what was changed",
		Args: cobra.MaximumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				if o.Name == "" {
					return a.listMounts(cmd.Context())
				}
				args = []string{""} // that mount again
			}
			if len(args) == 2 {
				if args[1] == "" {
					return usageError{errors.New("DIR is empty")}
				}
				dir, err := filepath.Abs(args[1])
				if err != nil {
					return err
				}
				o.Dir = dir
			}
			if err := setImage(&o.ImageOptions, args[0]); err != nil {
				return err
			}
			if o.Upper != "" {
				dir, err := filepath.Abs(o.Upper)
				if err != nil {
					return err
				}
				o.Upper = dir
			}
			if cmd.Flags().Changed("record-for") {
				o.RecordFor = &record
			}
			return a.mount(cmd.Context(), o, foreground)
		},
	}
	f := cmd.Flags()
	imageFlags(f, &o.ImageOptions)
	f.StringVar(&o.Name, "name", "", "a name for the mount (default: from the image's)")
	f.StringVar(&o.Face, "face", "", "who serves the tree: auto (default), kernel (EROFS), fuse")
	f.BoolVar(&o.Setuid, "setuid", false, "honour setuid bits and device nodes (root only; otherwise nosuid,nodev)")
	f.BoolVarP(&o.RW, "rw", "w", false, "allow changes: they stay on this machine until they are committed or removed")
	f.StringVar(&o.Upper, "upper", "", "with --rw, the directory that changes go to (default: one below the state directory)")
	f.StringVar(&o.Overlay, "overlay", "", "with --rw, who writes changes: auto (default), kernel (overlayfs), fuse")
	f.BoolVar(&o.Wait, "wait", false, "wait until layers that must be read whole have been")
	f.StringVar(&o.Prefetch, "prefetch", "profile", "what is fetched ahead of need: none, profile (what the start will read), all")
	f.StringVar(&o.Profile, "profile", "", `the workload whose start-up profile is used and recorded (default "default", the image's own)`)
	f.DurationVar(&record, "record-for", 0, "how long the start is recorded, 0: not at all (default: until it goes quiet)")
	f.BoolVarP(&foreground, "foreground", "f", false, "stay, and unmount at the end (Ctrl-C, SIGTERM)")
	return cmd
}

func (a *app) mount(ctx context.Context, o daemon.MountOptions, foreground bool) error {
	if o.Setuid && os.Geteuid() != 0 {
		return usageError{errors.New("--setuid needs root")}
	}
	c, err := a.client()
	if err != nil {
		return err
	}
	m, err := c.Mount(ctx, o)
	if err != nil {
		return err
	}
	fmt.Println(m.Dir)
	if !foreground {
		return nil
	}
	<-ctx.Done()
	_, err = c.Unmount(context.WithoutCancel(ctx), daemon.UnmountOptions{Mount: m.ID, Force: true})
	return err
}

func (a *app) listMounts(ctx context.Context) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	ms, err := c.Mounts(ctx)
	if err != nil {
		return err
	}
	for _, m := range ms {
		fmt.Println(m.Image, m.Dir)
	}
	return nil
}
