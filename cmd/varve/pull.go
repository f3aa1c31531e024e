package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/varvefs/varve/containerd"
	"github.com/varvefs/varve/daemon"
)

func (a *app) pullCmd() *cobra.Command {
	var o daemon.PullOptions
	var to containerd.Config
	var rate string
	var quiet bool
	cmd := &cobra.Command{
		Use:   "pull [flags] IMAGE",
		Short: "Bring an image here: what a mount needs, or with --full every byte",
		Long: "Bring an image's manifest, config and the index of each layer here, so that it can\n" +
			"be mounted without asking for them; files are still fetched when they are read. Layers\n" +
			"that have no index are read whole. With --full every byte is brought, so that\n" +
			"`varve mount --offline` reads everything. A pull that was interrupted goes on where it\n" +
			"was when it is called again.\n\n" +
			"With --containerd the image is put into containerd too, for clients that do not tell a\n" +
			"snapshotter which image they pull (ctr, nerdctl): its containers lie on what varve\n" +
			"mounts, and no layer is unpacked. It is fetched with the daemon's own credentials.",
		Example: "  varve pull debian:12\n  varve pull --full --limit-rate 2MB registry.example/app:1\n" +
			"  varve pull --containerd debian:12\n  varve pull --containerd=k8s.io registry.example/app:1",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if o.AllPlatforms && cmd.Flags().Changed("platform") {
				return usageError{errors.New("--platform and --all-platforms exclude each other")}
			}
			o.Containerd = cmd.Flags().Changed("containerd")
			if err := checkContainerd(cmd.Flags(), o.Containerd); err != nil {
				return err
			}
			var err error
			if o.Rate, err = limitRate(rate); err != nil {
				return err
			}
			if o.AllPlatforms {
				o.Platform = ""
			}
			if err := setImage(&o.ImageOptions, args[0]); err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			p := newProgress(os.Stdout, isTerminal(os.Stdout), quiet)
			c.Status, c.Notice = p.status, p.notice
			var got *daemon.Pulled
			if o.Containerd {
				got, err = a.pullInto(cmd.Context(), c, o, to)
			} else {
				got, err = c.Pull(cmd.Context(), o)
			}
			p.done()
			if err != nil {
				return err
			}
			fmt.Println(got.Ref)
			return nil
		},
	}
	f := cmd.Flags()
	f.BoolVar(&o.Full, "full", false, "every byte of every layer, so that the network is not needed any more")
	f.BoolVar(&o.AllPlatforms, "all-platforms", false, "all that the manifest list names")
	f.StringVar(&o.Index, "index", "auto", "what layers may be read by: auto, none (read them whole), require (never read one whole)")
	limitRateFlag(f, &rate)
	transferFlags(f, &o.ImageOptions)
	f.BoolVarP(&quiet, "quiet", "q", false, "the name only")
	f.StringVar(&to.Namespace, "containerd", "", "put it into containerd too, into this `namespace` of it (env CONTAINERD_NAMESPACE)")
	f.Lookup("containerd").NoOptDefVal = containerd.Namespace()
	f.StringVar(&to.Address, "containerd-address", "", "with --containerd, its socket (env CONTAINERD_ADDRESS; default: the first that is there, k3s' and k0s' too)")
	f.StringVar(&to.Snapshotter, "snapshotter", "varve", "with --containerd, the name that it knows varve's snapshotter by")
	return cmd
}

// checkContainerd says which flags do not go with --containerd, or only with it.
func checkContainerd(f *pflag.FlagSet, is bool) error {
	for _, name := range []string{"containerd-address", "snapshotter"} {
		if !is && f.Changed(name) {
			return usageError{fmt.Errorf("--%s is for --containerd", name)}
		}
	}
	for _, name := range []string{"all-platforms", "insecure", "authfile"} {
		if is && f.Changed(name) {
			return usageError{fmt.Errorf("--%s and --containerd exclude each other", name)}
		}
	}
	return nil
}

// pullInto pulls an image and puts it into containerd.
func (a *app) pullInto(ctx context.Context, c *daemon.Client, o daemon.PullOptions, to containerd.Config) (*daemon.Pulled, error) {
	to.Address = containerd.Address(to.Address)
	cd, err := containerd.Connect(ctx, to)
	if err != nil {
		return nil, err
	}
	defer cd.Close()
	got, err := c.Pull(ctx, o)
	if err != nil {
		return nil, err
	}
	into, err := cd.Pull(ctx, containerd.Image{Name: got.Ref, Target: got.Digest, Manifest: got.Manifest, Documents: got.Documents}, containerd.Options{
		NotLazy: got.NotLazy != "",
		Fetch: func(ctx context.Context, id string, off int64, w io.Writer) error {
			return c.Layer(ctx, daemon.LayerOptions{Image: got.Ref, Manifest: got.Manifest, Layer: id, Offset: off}, w)
		},
		Status: func(id, status string, done, total int64) {
			c.Status(daemon.Status{ID: shortDigest(id), Status: status, Current: done, Total: total})
		},
	})
	if err != nil {
		return nil, fmt.Errorf("pull %s into containerd: %w", o.Image, err)
	}
	if n := len(into.Unpacked); n > 0 {
		var ids []string
		for _, l := range into.Unpacked {
			ids = append(ids, shortDigest(l))
		}
		c.Notice(fmt.Sprintf("warning: %d of %d layers are not lazy, containerd has unpacked them: %s: %s", n, into.Layers, strings.Join(ids, ", "), a.notLazy(got, into, cd)))
	}
	status := "Image is up to date for "
	if into.Changed {
		status = "Downloaded newer image for "
	}
	c.Status(daemon.Status{Status: "Status: " + status + into.Familiar})
	return got, nil
}

func shortDigest(id string) string {
	_, hex, _ := strings.Cut(id, ":")
	return hex[:min(12, len(hex))]
}

// notLazy says why layers were unpacked.
func (a *app) notLazy(got *daemon.Pulled, into containerd.Pulled, cd *containerd.Client) string {
	if got.NotLazy != "" {
		return got.NotLazy
	}
	name, at := cd.Config.Snapshotter, cd.SnapshotterSocket()
	d, err := a.dirs()
	switch {
	case at == "":
		return fmt.Sprintf("the snapshotter %s is containerd's own", name)
	case err == nil && !same(at, d.Snapshots()):
		return fmt.Sprintf("the snapshotter %s is not this daemon's, which listens at %s, but at %s", name, d.Snapshots(), at)
	case into.On != "":
		return fmt.Sprintf("they lie on %s, which was unpacked before (remove the images that have it, and pull again)", shortDigest(into.On))
	}
	return fmt.Sprintf("the snapshotter %s has not taken them, the daemon's log says why", name)
}

// same reports whether two paths lead to one file.
func same(a, b string) bool {
	x, err := os.Stat(a)
	if err != nil {
		return false
	}
	y, err := os.Stat(b)
	return err == nil && os.SameFile(x, y)
}

func limitRateFlag(f *pflag.FlagSet, rate *string) {
	f.StringVar(rate, "limit-rate", "", "fetch at most so many bytes a second, such as 2MB or 500kB")
}

func limitRate(s string) (int64, error) {
	n, err := daemon.ParseRate(s)
	if err != nil {
		return 0, usageError{fmt.Errorf("--limit-rate: %w", err)}
	}
	return n, nil
}
