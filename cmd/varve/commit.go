package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/daemon"
)

func (a *app) commitCmd() *cobra.Command {
	var o daemon.CommitOptions
	var pause, quiet bool
	var epoch, idFile, authFile string
	cmd := &cobra.Command{
		Use:   "commit [flags] MOUNT [REF]",
		Short: "Make an image of a mount's changes, without the bytes of its base",
		Example: "  varve commit -m 'fix the config' work me/app:fixed\n" +
			"  varve commit -c 'CMD [\"/app\"]' --push . registry.example.com/me/app:1",
		Args: cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			if cmd.Flags().Changed("pause") && cmd.Flags().Changed("no-pause") {
				return usageError{errors.New("--pause and --no-pause exclude each other")}
			}
			o.NoPause = o.NoPause || !pause
			o.Mount = mountArg(args[0])
			if len(args) == 2 {
				o.Ref = args[1]
			}
			if o.Push && o.Ref == "" {
				return usageError{errors.New("--push needs a name to push to")}
			}
			var err error
			if o.Created, err = parseEpoch(epoch); err != nil {
				return err
			}
			if o.RewriteTimestamp && o.Created == nil {
				return usageError{errors.New("--rewrite-timestamp needs --source-date-epoch (env SOURCE_DATE_EPOCH)")}
			}
			if o.Auth, o.AuthConfig, err = credentials(authFile); err != nil {
				return err
			}
			return a.commit(cmd.Context(), o, idFile, quiet)
		},
	}
	f := cmd.Flags()
	f.SetInterspersed(false)
	f.StringVarP(&o.Author, "author", "a", "", `who made it ("Jo Doe <jo@example.com>")`)
	f.StringVarP(&o.Message, "message", "m", "", "what was changed")
	f.StringArrayVarP(&o.Changes, "change", "c", nil, "a Dockerfile instruction for the config: CMD, ENTRYPOINT, ENV, EXPOSE, HEALTHCHECK, LABEL, ONBUILD, STOPSIGNAL, USER, VOLUME, WORKDIR")
	f.BoolVarP(&pause, "pause", "p", true, "hold who writes in the mount meanwhile")
	f.MarkDeprecated("pause", "it is the default; --no-pause turns it off")
	f.BoolVar(&o.NoPause, "no-pause", false, "take what is there while it is being written")
	f.StringVar(&o.Format, "format", "", "oci or docker (default: the base's)")
	f.StringVar(&o.Compression, "compression", "", "of the new layer: estargz (default), gzip, zstd, zstd:chunked")
	f.BoolVar(&o.Squash, "squash", false, "make one layer of these changes and the layers committed here before them")
	f.BoolVar(&o.DryRun, "dry-run", false, "say what would be committed, and commit nothing")
	f.StringArrayVar(&o.Include, "include", nil, "commit only paths that fit the pattern")
	f.StringArrayVar(&o.Exclude, "exclude", nil, "leave out paths that fit the pattern")
	f.StringVar(&epoch, "source-date-epoch", os.Getenv("SOURCE_DATE_EPOCH"), "the image's time, in seconds since 1970 (env SOURCE_DATE_EPOCH)")
	f.BoolVar(&o.RewriteTimestamp, "rewrite-timestamp", false, "give younger files that time too")
	f.BoolVar(&o.Push, "push", false, "push it to REF's registry")
	f.StringVar(&authFile, "authfile", "", "credentials, in docker's or podman's form (env REGISTRY_AUTH_FILE)")
	f.BoolVar(&o.Insecure, "insecure", false, "allow plain HTTP and unverified TLS for that registry")
	f.StringVar(&idFile, "iidfile", "", "write the digest to a file as well")
	f.BoolVarP(&quiet, "quiet", "q", false, "no progress")
	return cmd
}

func (a *app) commit(ctx context.Context, o daemon.CommitOptions, idFile string, quiet bool) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	if idFile != "" && !o.DryRun {
		// Found out now rather than when the image is there.
		f, err := os.OpenFile(idFile, os.O_WRONLY|os.O_CREATE, 0o644)
		if err != nil {
			return fmt.Errorf("--iidfile: %w", err)
		}
		f.Close()
	}
	if err := flush(ctx, c, o.Mount); err != nil {
		return err
	}
	p := newProgress(os.Stderr, isTerminal(os.Stderr), quiet)
	c.Status, c.Notice = p.status, p.notice
	got, err := c.Commit(ctx, o)
	p.done()
	if err != nil {
		return err
	}
	if o.DryRun {
		if err := printDiff(got.Deltas, "", false, false); err != nil {
			return err
		}
		fmt.Fprintf(os.Stderr, "%d names, %s, as a layer of %s\n", got.Entries, human(got.Raw), human(got.Size))
		return nil
	}
	if idFile != "" {
		if err := os.WriteFile(idFile, []byte(got.Digest), 0o644); err != nil {
			return err
		}
	}
	fmt.Println(got.Digest)
	if got.Pushed != nil && !quiet {
		fmt.Fprintln(os.Stderr, summary(got.Pushed))
	}
	return nil
}

// flush has the kernel hand over what was written to a mount that the daemon
// serves: it keeps some of it to itself for a while. The daemon must not touch
// its own mounts.
func flush(ctx context.Context, c *daemon.Client, mount string) error {
	m, err := c.Inspect(ctx, mount)
	if err != nil || m.Overlay != "fuse" || m.State != "mounted" {
		return err
	}
	dir, err := os.Open(m.Dir)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := unix.Syncfs(int(dir.Fd())); err != nil {
		return fmt.Errorf("write back the mount at %s: %w", m.Dir, err)
	}
	return nil
}

// summary is the last line of a push: where the blobs came from.
func summary(p *daemon.Pushed) string {
	part := func(c daemon.Count, what string) string {
		return fmt.Sprintf("%s %s (%d)", human(c.Bytes), what, c.Blobs)
	}
	return fmt.Sprintf("%s: %s, %s, %s, %s", p.Ref, part(p.Uploaded, "uploaded"), part(p.Mounted, "mounted from other repositories"),
		part(p.Existed, "already there"), part(p.Streamed, "streamed from other registries"))
}

func human(n int64) string { return units.HumanSizeWithPrecision(float64(n), 3) }

// parseEpoch reads SOURCE_DATE_EPOCH, nil if there is none.
func parseEpoch(s string) (*time.Time, error) {
	if s == "" {
		return nil, nil
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 || n > 253402300799 { // the year 9999
		return nil, usageError{fmt.Errorf("SOURCE_DATE_EPOCH %q: want seconds since 1970", s)}
	}
	t := time.Unix(n, 0).UTC()
	return &t, nil
}
