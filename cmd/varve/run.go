package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/varvefs/varve/daemon"
	"github.com/varvefs/varve/run"
	"github.com/varvefs/varve/run/monitor"
)

// exitFailed is what docker and podman give where they failed themselves, and not
// what they ran.
const exitFailed = 125

// exited is how a process in a container ended, which is how the verb ends.
type exited int

func (e exited) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// failed gives an error of run and exec docker's exit code.
func failed(err error) error {
	var ended exited
	var start *monitor.StartError
	switch code := exitCode(err); {
	case err == nil, errors.As(err, &ended), code == exitInterrupted, code == 126, code == 127:
		return err
	case errors.As(err, &start):
		return &daemon.Error{Message: message(err), Exit: start.Code}
	}
	return &daemon.Error{Message: message(err), Exit: exitFailed}
}

// runFlags are the flags of `varve run` that are not about the process.
type runFlags struct {
	daemon.RunOptions
	detach, stats, quiet, sigProxy bool
	cidFile, detachKeys            string
}

func (a *app) runCmd() *cobra.Command {
	var o runFlags
	cmd := &cobra.Command{
		Use:   "run [flags] IMAGE [COMMAND [ARG...]]",
		Short: "Run a command in a new container: a writable mount and a process in it",
		Example: "  varve run --rm -it debian:12 bash\n  varve run -d --name web -v /srv/www:/usr/share/nginx/html:ro nginx\n" +
			"  varve run --rm --stats python:3 python3 -c 'print(1)'",
	}
	f := cmd.Flags()
	f.SetInterspersed(false)
	f.Bool("help", false, "help for run")
	apply := processFlags(f, &o.Run)
	imageFlags(f, &o.ImageOptions)
	f.BoolVarP(&o.detach, "detach", "d", false, "leave it running and print its id")
	f.BoolVar(&o.Remove, "rm", false, "remove it, its changes and its volumes when it has ended")
	f.StringVar(&o.Name, "name", "", "a name for it (default: from the image's)")
	f.StringVar(&o.cidFile, "cidfile", "", "write the id to this file, which may not be there yet")
	f.BoolVar(&o.sigProxy, "sig-proxy", true, "pass signals on to the process")
	f.StringVar(&o.detachKeys, "detach-keys", "", "what is typed to leave it alone (default ctrl-p,ctrl-q)")
	f.BoolVarP(&o.quiet, "quiet", "q", false, "no progress")
	f.BoolVar(&o.stats, "stats", false, "say at the end how long the start took and how many bytes it needed")
	f.StringVar(&o.Face, "face", "", "who serves the image: auto (default), kernel (EROFS), fuse")
	f.StringVar(&o.Overlay, "overlay", "", "who writes changes: auto (default), kernel (overlayfs), fuse")
	f.StringVar(&o.Prefetch, "prefetch", "profile", "what is fetched ahead of need: none, profile (what the start will read), all")
	f.StringVar(&o.Profile, "profile", "", `the workload whose start-up profile is used and recorded (default "default", the image's own)`)
	record := f.Duration("record-for", 0, "how long the start is recorded, 0: not at all (default: until it goes quiet)")
	cmd.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return &daemon.Error{Message: fmt.Sprintf("%v (varve run --help)", err), Exit: exitFailed}
	})
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if f.Changed("record-for") {
			o.RecordFor = record
		}
		err := apply()
		if err == nil && len(args) == 0 {
			err = usageError{fmt.Errorf("the image is missing (usage: %s)", cmd.UseLine())}
		}
		if err == nil {
			o.Run.Cmd = args[1:]
			err = setImage(&o.ImageOptions, args[0])
		}
		if err == nil {
			err = a.run(cmd.Context(), o)
		}
		return failed(err)
	}
	return cmd
}

func (a *app) run(ctx context.Context, o runFlags) (err error) {
	began := time.Now()
	if err := o.Run.Resolve(run.Caller{Dir: workdir(), Getenv: os.LookupEnv}); err != nil {
		return err
	}
	if o.Run.TTY && !o.detach {
		if err := checkTTY(o.Run.Interactive); err != nil {
			return err
		}
	}
	o.StdinOnce = o.Run.Interactive && !o.detach
	c, err := a.client()
	if err != nil {
		return err
	}
	if o.quiet {
		c.Notice = nil
	}
	cid, err := newCIDFile(o.cidFile)
	if err != nil {
		return err
	}
	m, err := c.Run(ctx, o.RunOptions)
	if err != nil {
		cid.drop()
		return err
	}
	if err := cid.write(m.ID); err != nil {
		return errors.Join(err, discard(c, m.ID))
	}
	mon, err := monitor.Dial(ctx, m.Container.Socket)
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return errors.Join(err, discard(c, m.ID))
	}
	if o.detach {
		if err := startAlone(ctx, c, mon, m); err != nil {
			return err
		}
		fmt.Println(m.ID)
		return nil
	}
	st := newStats(c, m, began)
	s := streams(o.Run.Interactive, o.Run.TTY)
	at := monitor.AttachOptions{Start: true, TTY: o.Run.TTY, DetachKeys: o.detachKeys, SigProxy: o.sigProxy && !o.Run.TTY, Started: st.started}
	if at.SigProxy {
		ctx = context.WithoutCancel(ctx) // it is the process that signals end
	}
	end, err := mon.Attach(ctx, s, at)
	if errors.Is(err, monitor.ErrDetached) {
		return nil
	}
	var start *monitor.StartError
	gone := errors.Is(err, monitor.ErrGone)
	if err == nil || gone || errors.As(err, &start) {
		// With this verb all of the container's end is over.
		switch known := st.ended(); {
		case !gone || !known:
		case st.end.Finished.IsZero():
			err = errors.New("the container's monitor was killed before the command was started")
		default: // its monitor was killed
			end, err = monitor.Exit{Code: st.end.ExitCode}, nil
		}
	}
	if err != nil {
		return err
	}
	if o.stats {
		st.print(os.Stderr)
	}
	return exitOf(end)
}

// exitOf is how a verb ends whose process has ended.
func exitOf(e monitor.Exit) error {
	if e.Code == 0 {
		return nil
	}
	return exited(e.Code)
}

// discard removes a container in which nothing was started.
func discard(c *daemon.Client, id string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	_, err := c.Remove(ctx, daemon.UnmountOptions{Mount: id, Force: true})
	return err
}

// streams gives this process' stdio as a container's.
func streams(stdin, tty bool) monitor.Streams {
	s := monitor.Streams{Out: os.Stdout, Err: os.Stderr}
	if stdin {
		s.In = os.Stdin
	}
	if tty {
		s.Err = nil
	}
	return s
}

// checkTTY refuses a terminal for a process whose stdin is to be ours, which is none.
func checkTTY(stdin bool) error {
	if stdin && !isTerminal(os.Stdin) {
		return exitedWith{exited(1), "the input device is not a TTY"}
	}
	return nil
}

// exitedWith ends a verb with a code and says why.
type exitedWith struct {
	exited
	why string
}

func (e exitedWith) Error() string { return e.why }
func (e exitedWith) Unwrap() error { return e.exited }

func workdir() string {
	dir, err := os.Getwd()
	if err != nil {
		return "/"
	}
	return dir
}

// cidFile is a file for a container's id.
type cidFile struct {
	path string
	f    *os.File
}

func newCIDFile(path string) (c cidFile, err error) {
	if path == "" {
		return c, nil
	}
	c.path = path
	if c.f, err = os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666); errors.Is(err, os.ErrExist) {
		return c, fmt.Errorf("container ID file found, make sure the other container isn't running or delete %s", path)
	}
	return c, err
}

func (c cidFile) drop() {
	if c.f != nil {
		c.f.Close()
		os.Remove(c.path)
	}
}

func (c cidFile) write(id string) error {
	if c.f == nil {
		return nil
	}
	_, err := c.f.WriteString(id)
	if err = errors.Join(err, c.f.Close()); err != nil {
		return fmt.Errorf("--cidfile: %w", err)
	}
	return nil
}
