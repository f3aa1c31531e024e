package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/varvefs/varve/daemon"
)

func (a *app) profileCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "profile",
		Short: "Start-up profiles: what a start reads, so that the next has it ahead of need",
		Long: "Each mount records what is read from it until it goes quiet, and keeps that for the\n" +
			"next mount of the image (mount --profile names one of several workloads). Pushed, a\n" +
			"profile lies beside the image in its registry, and first mounts elsewhere use it.",
		Example: "  varve profile show python:3.12\n  varve profile push registry.example/app:1\n" +
			"  varve profile import registry.example/app:1 start.txt",
	}
	verbless(cmd)
	cmd.AddCommand(a.profileLsCmd(), a.profileShowCmd(), a.profilePushCmd(), a.profilePullCmd(), a.profileRmCmd(), a.profileImportCmd())
	return cmd
}

// profileVerb makes a verb about the profile of a workload.
func (a *app) profileVerb(use, short string, args cobra.PositionalArgs, run func(ctx context.Context, c *daemon.Client, o daemon.ProfileOptions, args []string) error) (*cobra.Command, *daemon.ProfileOptions) {
	o := &daemon.ProfileOptions{}
	cmd := &cobra.Command{Use: use, Short: short, Args: args, RunE: func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			if err := setImage(&o.ImageOptions, args[0]); err != nil {
				return err
			}
		}
		c, err := a.client()
		if err != nil {
			return err
		}
		return run(cmd.Context(), c, *o, args)
	}}
	imageFlags(cmd.Flags(), &o.ImageOptions)
	return cmd, o
}

// profileName is the flag of verbs about one profile.
func profileName(cmd *cobra.Command, o *daemon.ProfileOptions) {
	cmd.Flags().StringVar(&o.Name, "name", "", `the workload (default "default", the image's own)`)
}

func (a *app) profileLsCmd() *cobra.Command {
	var asJSON bool
	cmd, o := a.profileVerb("ls [flags] [IMAGE]", "List the profiles that are kept here", cobra.MaximumNArgs(1), func(ctx context.Context, c *daemon.Client, o daemon.ProfileOptions, args []string) error {
		if len(args) == 0 && o.Remote {
			return usageError{errors.New("--remote needs an IMAGE: registries do not list what they have")}
		}
		ps, err := c.Profiles(ctx, o)
		if err != nil {
			return err
		}
		if asJSON {
			return printJSON(ps)
		}
		t := tabwriter.NewWriter(os.Stdout, 0, 1, 3, ' ', 0)
		if o.Remote {
			fmt.Fprintln(t, "NAME\tCREATED\tDIGEST")
		} else {
			fmt.Fprintln(t, "IMAGE\tNAME\tCREATED\tRANGES\tSIZE")
		}
		for _, p := range ps {
			if o.Remote {
				fmt.Fprintf(t, "%s\t%s\t%s\n", oneLine(p.Name), ago(p.Created), p.Digest)
				continue
			}
			image := p.Image
			if image == "" {
				image = p.Manifest[:min(len(p.Manifest), 19)]
			}
			fmt.Fprintf(t, "%s\t%s\t%s\t%d\t%s\n", image, p.Name, ago(p.Created), p.Ranges, size(p.Bytes))
		}
		return t.Flush()
	})
	cmd.Flags().BoolVar(&o.Remote, "remote", false, "those that lie beside the image in its registry")
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	return cmd
}

func ago(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return units.HumanDuration(time.Since(t)) + " ago"
}

func printJSON(v any) error {
	enc := json.NewEncoder(os.Stdout)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "    ")
	return enc.Encode(v)
}

func (a *app) profileShowCmd() *cobra.Command {
	var asJSON bool
	cmd, o := a.profileVerb("show [flags] IMAGE", "Show the files that a start reads, in the order of their first reads", cobra.ExactArgs(1), func(ctx context.Context, c *daemon.Client, o daemon.ProfileOptions, _ []string) error {
		p, err := c.ShowProfile(ctx, o)
		if err != nil {
			return err
		}
		if asJSON {
			return printJSON(p)
		}
		t := tabwriter.NewWriter(os.Stdout, 0, 1, 3, ' ', 0)
		fmt.Fprintln(t, "TIME\tREAD\tSIZE\tPATH")
		for _, f := range p.Files {
			fmt.Fprintf(t, "%.3fs\t%s\t%s\t%s\n", f.Seconds, size(f.Bytes), size(f.Size), oneLine(f.Path))
		}
		return t.Flush()
	})
	profileName(cmd, o)
	cmd.Flags().BoolVar(&o.Remote, "remote", false, "that which lies beside the image in its registry")
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	return cmd
}

func (a *app) profilePushCmd() *cobra.Command {
	cmd, o := a.profileVerb("push [flags] IMAGE", "Put the profile that is kept here beside the image in its registry", cobra.ExactArgs(1), func(ctx context.Context, c *daemon.Client, o daemon.ProfileOptions, _ []string) error {
		p, err := c.PushProfile(ctx, o)
		if err != nil {
			return err
		}
		fmt.Printf("%s: profile %s %s (%s)\n", p.Image, p.Name, p.Digest, profileSummary(p))
		return nil
	})
	profileName(cmd, o)
	return cmd
}

func profileSummary(p daemon.ProfileInfo) string {
	return fmt.Sprintf("%d ranges, %s", p.Ranges, size(p.Bytes))
}

func (a *app) profilePullCmd() *cobra.Command {
	cmd, o := a.profileVerb("pull [flags] IMAGE", "Keep the profile that lies beside the image, in the place of what was recorded here", cobra.ExactArgs(1), func(ctx context.Context, c *daemon.Client, o daemon.ProfileOptions, _ []string) error {
		p, err := c.PullProfile(ctx, o)
		if err != nil {
			return err
		}
		fmt.Printf("%s: profile %s (%s)\n", p.Image, p.Name, profileSummary(p))
		return nil
	})
	profileName(cmd, o)
	return cmd
}

func (a *app) profileRmCmd() *cobra.Command {
	cmd, o := a.profileVerb("rm [flags] IMAGE", "Delete profiles of an image: that of one workload, or all", cobra.ExactArgs(1), func(ctx context.Context, c *daemon.Client, o daemon.ProfileOptions, _ []string) error {
		o.All = o.Name == ""
		ps, err := c.RemoveProfiles(ctx, o)
		for _, p := range ps {
			if p.Digest != "" {
				fmt.Println("Deleted:", p.Digest)
			} else {
				fmt.Println("Deleted:", p.Image, p.Name)
			}
		}
		return err
	})
	cmd.Flags().StringVar(&o.Name, "name", "", `the workload, "default" for the image's own (default: all)`)
	cmd.Flags().BoolVar(&o.Remote, "remote", false, "those that lie beside the image in its registry")
	return cmd
}

func (a *app) profileImportCmd() *cobra.Command {
	cmd, o := a.profileVerb("import [flags] IMAGE FILE", "Keep a profile that comes from a file", cobra.ExactArgs(2), func(ctx context.Context, c *daemon.Client, o daemon.ProfileOptions, args []string) error {
		var err error
		if o.File, err = readProfile(args[1]); err != nil {
			return usageError{err}
		}
		p, err := c.ImportProfile(ctx, o)
		if err != nil {
			return err
		}
		fmt.Printf("%s: profile %s (%s)\n", p.Image, p.Name, profileSummary(*p))
		return nil
	})
	cmd.Long = "Keep a profile that comes from a file: a list of paths, one a line, what stargz-snapshotter\n" +
		"records (ctr-remote), or a profile of varve's; - is standard input."
	profileName(cmd, o)
	return cmd
}

// maxPacked is how many packed bytes a request can carry.
const maxPacked = 700 << 10

// readProfile reads a file of profiles, packed for the daemon.
func readProfile(path string) ([]byte, error) {
	const most = 64 << 20
	var in io.Reader = os.Stdin
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		in = f
	}
	text, err := io.ReadAll(io.LimitReader(in, most+1))
	if err != nil {
		return nil, err
	}
	if len(text) > most {
		return nil, fmt.Errorf("%s has more than %s", path, size(most))
	}
	packed, err := daemon.PackProfile(text)
	if err == nil && len(packed) > maxPacked {
		err = fmt.Errorf("%s: too large a profile (%s compressed)", path, size(int64(len(packed))))
	}
	return packed, err
}
