// Command varve mounts the images of container registries as directories, at
// once, and fetches only the bytes that are read.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"unicode"

	"github.com/spf13/cobra"

	"github.com/varvefs/varve/daemon"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	err := newRoot().ExecuteContext(ctx)
	if s := message(err); s != "" { // else it was said already
		fmt.Fprintln(os.Stderr, "varve: "+s)
	}
	os.Exit(exitCode(err))
}

// usageError marks what the command line has wrong.
type usageError struct{ error }

// exitInterrupted is what shells give a command that SIGINT ended.
const exitInterrupted = 130

func exitCode(err error) int {
	var e *daemon.Error
	var u usageError
	var ended exited
	switch {
	case err == nil:
		return 0
	case errors.As(err, &ended):
		return int(ended)
	case errors.Is(err, context.Canceled):
		return exitInterrupted
	case errors.As(err, &e) && e.Exit != 0:
		return e.Exit
	case errors.As(err, &u):
		return daemon.ExitUsage
	}
	return daemon.ExitError
}

// message is what the user is told of an error, "" if nothing.
func message(err error) string {
	if _, ok := err.(exited); ok {
		return "" // what ran has said what it had to say
	}
	switch {
	case err == nil:
		return ""
	case exitCode(err) == exitInterrupted:
		return "interrupted"
	}
	return oneLine(err.Error())
}

// oneLine keeps an error, which may be several joined, to one line that does
// nothing to a terminal, whatever a registry put into it.
func oneLine(s string) string {
	var lines []string
	for line := range strings.Lines(s) {
		line = strings.Map(func(r rune) rune {
			switch {
			case unicode.IsSpace(r):
				return ' '
			case unicode.IsControl(r):
				return -1
			}
			return r
		}, line)
		if line = strings.TrimSpace(line); line != "" {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "; ")
}

// app is what every verb needs: the global flags.
type app struct {
	host  string
	root  string
	debug bool
}

// verbless has a command that is nothing without a verb of its own say so.
func verbless(cmd *cobra.Command) {
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			path := strings.Fields(cmd.CommandPath())[1:]
			return fmt.Errorf("no such verb: %s", strings.Join(append(path, args[0]), " "))
		}
		return nil
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		cmd.Help()
		return usageError{errors.New("a verb is missing")}
	}
}

func newRoot() *cobra.Command {
	a := &app{}
	root := &cobra.Command{
		Use:           "varve",
		Short:         "Mount container images as directories, fetching only what is read",
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	verbless(root)
	f := root.PersistentFlags()
	f.StringVarP(&a.host, "host", "H", "", "the daemon's socket, as unix:///path (env VARVE_HOST)")
	f.StringVar(&a.root, "root", "", "keep state, cache and runtime files below this directory (env VARVE_ROOT)")
	f.BoolVarP(&a.debug, "debug", "D", false, "log more")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w (varve %s --help)", err, cmd.Name())}
	})
	root.AddCommand(a.runCmd(), a.execCmd(), a.startCmd(), a.stopCmd(), a.killCmd(), a.waitCmd(), a.logsCmd(), a.attachCmd(), a.monitorCmd(),
		a.mountCmd(), a.umountCmd(), a.rmCmd(), a.pruneCmd(), a.psCmd(), a.inspectCmd(), a.indexCmd(), a.profileCmd(), a.storeCmd(), a.lsCmd(), a.catCmd(),
		a.diffCmd(), a.commitCmd(), a.exportCmd(), a.saveCmd(), a.pullCmd(), a.warmCmd(), a.pushCmd(), a.convertCmd(), a.cpCmd(),
		a.daemonCmd(), a.installCmd(), a.uninstallCmd(), a.versionCmd(), a.demoCmd())
	wrapArgs(root)
	return root
}

// wrapArgs makes a wrong number of arguments a usage error, of all verbs below c too.
func wrapArgs(c *cobra.Command) {
	for _, sub := range c.Commands() {
		wrapArgs(sub)
	}
	check := c.Args
	if check == nil {
		return
	}
	c.Args = func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return usageError{fmt.Errorf("%w (usage: %s)", err, cmd.UseLine())}
		}
		return nil
	}
}

func (a *app) dirs() (daemon.Dirs, error) {
	d, err := daemon.DirsFromEnv(a.root)
	if err == nil && a.host != "" {
		err = d.SetHost(a.host)
	}
	if err != nil {
		return d, usageError{err}
	}
	return d, nil
}

// client gives a client that tells the user what goes on.
func (a *app) client() (*daemon.Client, error) {
	d, err := a.dirs()
	if err != nil {
		return nil, err
	}
	c := daemon.NewClient(d)
	c.Notice = func(line string) { fmt.Fprintln(os.Stderr, "varve: "+oneLine(line)) }
	return c, nil
}
