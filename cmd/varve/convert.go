package main

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/varvefs/varve/daemon"
)

func (a *app) convertCmd() *cobra.Command {
	var o daemon.ConvertOptions
	var stargz, chunked, quiet bool
	var profile string
	cmd := &cobra.Command{
		Use:   "convert [flags] SRC DST",
		Short: "Make an image whose layers have another form, so that it can be mounted lazily anywhere",
		Example: "  varve convert nginx:1.27 registry.example.com/nginx:1.27-esgz --push\n" +
			"  varve convert --to zstd:chunked --all-platforms --from-profile start.txt nginx:1.27 me/nginx:lazy",
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case stargz && chunked, (stargz || chunked) && cmd.Flags().Changed("to"):
				return usageError{errors.New("--to, --estargz and --zstdchunked exclude each other")}
			case stargz:
				o.To = "estargz"
			case chunked:
				o.To = "zstd:chunked"
			}
			if o.AllPlatforms && cmd.Flags().Changed("platform") {
				return usageError{errors.New("--platform and --all-platforms exclude each other")}
			}
			if err := setImage(&o.ImageOptions, args[0]); err != nil {
				return err
			}
			o.Ref = args[1]
			if profile != "" {
				var err error
				if name, stored := strings.CutPrefix(profile, "@"); stored {
					o.Stored = cmp.Or(name, "default")
				} else if o.Profile, err = readProfile(profile); err != nil {
					return usageError{fmt.Errorf("--from-profile: %w", err)}
				}
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			p := newProgress(os.Stderr, isTerminal(os.Stderr), quiet)
			c.Status, c.Notice = p.status, p.notice
			got, err := c.Convert(cmd.Context(), o)
			p.done()
			if err != nil {
				return err
			}
			fmt.Println(got.Digest)
			if quiet {
				return nil
			}
			fmt.Fprintf(os.Stderr, "%d layers converted, from %s to %s, %d kept\n", got.Converted, human(got.From), human(got.To), got.Kept)
			if got.Pushed != nil {
				fmt.Fprintln(os.Stderr, summary(got.Pushed))
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.To, "to", "estargz", "the form: estargz, zstd:chunked, gzip, zstd")
	f.BoolVar(&stargz, "estargz", false, "the same as --to estargz")
	f.BoolVar(&chunked, "zstdchunked", false, "the same as --to zstd:chunked")
	f.StringVar(&profile, "from-profile", "", "put first the files that a `FILE` names (paths, stargz-snapshotter's records, a start-up profile), or @NAME: the profile kept here, @default for SRC's own")
	f.BoolVar(&o.AllPlatforms, "all-platforms", false, "convert all that the manifest list names")
	f.BoolVar(&o.OCI, "oci", false, "use OCI's media types (zstd does in any case)")
	f.BoolVar(&o.Force, "force", false, "write layers anew that have the form already")
	f.BoolVar(&o.Push, "push", false, "push it to DST's registry, with --all-platforms as a list")
	imageFlags(f, &o.ImageOptions)
	f.BoolVarP(&quiet, "quiet", "q", false, "no progress")
	return cmd
}
