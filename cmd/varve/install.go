package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/varvefs/varve/daemon"
	"github.com/varvefs/varve/install"
)

// installFlags are what all verbs of installing share.
type installFlags struct {
	a      *app
	prefix string
	dryRun bool
}

func (f *installFlags) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.prefix, "prefix", "", "work on the machine whose files lie below this directory, and run nothing")
	cmd.Flags().BoolVar(&f.dryRun, "dry-run", false, "show what would be changed, and change nothing")
}

// node gives the machine, and where the daemon has its files there.
func (f *installFlags) node() (n install.Node, d daemon.Dirs, err error) {
	if os.Geteuid() != 0 && f.prefix == "" && !f.dryRun {
		return n, d, errors.New("only root can do this; --dry-run shows what it would be")
	}
	if f.prefix != "" {
		n.Offline = true
		if n.Prefix, err = filepath.Abs(f.prefix); err != nil {
			return n, d, err
		}
	}
	if d, err = f.a.dirs(); err == nil && os.Geteuid() != 0 && f.a.root == "" && os.Getenv("VARVE_ROOT") == "" {
		d.State, d.Run, d.Socket = "/var/lib/varve", "/run/varve", "/run/varve/varve.sock" // root's, who will run it
	}
	return n, d, err
}

// settle shows the changes, or has them made and says what was done.
func (f *installFlags) settle(cs install.Changes, do func() ([]string, error)) error {
	if f.dryRun {
		cs.Show(os.Stdout)
		return nil
	}
	report, err := do()
	if err == nil && len(report) == 0 {
		report = []string{"nothing to do"}
	}
	for _, line := range report {
		fmt.Println(line)
	}
	return err
}

func (a *app) installCmd() *cobra.Command {
	cmd := &cobra.Command{Use: "install", Short: "Have containerd find the snapshotter, or systemd start the daemon"}
	verbless(cmd)
	cmd.AddCommand(a.nodeContainerdCmd(true), a.nodeSystemdCmd(true))
	return cmd
}

func (a *app) uninstallCmd() *cobra.Command {
	cmd := &cobra.Command{Use: "uninstall", Short: "Take back what varve install wrote"}
	verbless(cmd)
	cmd.AddCommand(a.nodeContainerdCmd(false), a.nodeSystemdCmd(false))
	return cmd
}

// nodeContainerdCmd is the verb that installs, or its opposite.
func (a *app) nodeContainerdCmd(in bool) *cobra.Command {
	f := &installFlags{a: a}
	var c install.Containerd
	var k3s, rke2, docker bool
	cmd := &cobra.Command{Use: "containerd [flags]", Args: cobra.NoArgs,
		Short: "Have containerd, also that of k3s, rke2 or Docker, find the snapshotter"}
	if !in {
		cmd.Short = "Take the snapshotter away from containerd"
	}
	fl := cmd.Flags()
	f.register(cmd)
	fl.StringVar(&c.Config, "config", "", "containerd's configuration (default: what its service reads)")
	c.Name = "varve"
	fl.StringVar(&c.Program, "containerd", "", "the program")
	fl.StringVar(&c.Socket, "containerd-address", os.Getenv("CONTAINERD_ADDRESS"), "containerd's socket (env CONTAINERD_ADDRESS)")
	fl.BoolVar(&k3s, "k3s", false, "the containerd of k3s")
	fl.BoolVar(&rke2, "rke2", false, "the containerd of rke2")
	fl.BoolVar(&docker, "docker", false, "have Docker keep its images on it, too")
	fl.BoolVar(&c.NoRestart, "no-restart", false, "leave the restart of containerd to somebody else")
	fl.BoolVar(&c.Force, "force", false, "also while containers lie on what is taken away")
	if in {
		fl.StringVar(&c.Name, "name", "varve", "what containerd calls the snapshotter; with stargz, nerdctl and BuildKit take it for a lazy one")
		fl.StringVar(&c.Version, "containerd-version", "", "of the containerd that will read the files, such as 2.2 (default: ask it)")
		fl.BoolVar(&c.Default, "default", false, "Kubernetes: all pods start on it")
		fl.BoolVar(&c.RuntimeClass, "runtime-class", false, "Kubernetes: pods of the RuntimeClass with its name as the handler start on it")
	}
	cmd.MarkFlagsMutuallyExclusive("k3s", "rke2", "docker")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		var d daemon.Dirs
		var err error
		if c.Node, d, err = f.node(); err != nil {
			return err
		}
		c.Address, c.Root = d.Snapshots(), d.State
		switch {
		case k3s:
			c.Flavor = install.K3s
		case rke2:
			c.Flavor = install.RKE2
		case docker:
			c.Flavor = install.Plain
		}
		if c.Config != "" {
			if c.Config, err = filepath.Abs(c.Config); err != nil {
				return err
			}
		}
		return f.containerd(cmd.Context(), &c, docker, in)
	}
	return cmd
}

// containerd installs the snapshotter in containerd and then, if asked, in Docker, or
// takes it away from both.
func (f *installFlags) containerd(ctx context.Context, c *install.Containerd, docker, in bool) error {
	d := install.Docker{Node: c.Node, Name: c.Name}
	plan := c.PlanInstall
	if !in {
		plan = c.PlanUninstall
	}
	p, err := plan(ctx)
	if err != nil {
		return err
	}
	var forDocker install.Changes
	if name := p.Leaves(); !in && name != "" {
		d.Name = name
	}
	if docker {
		plan := d.PlanInstall
		if !in {
			plan = d.PlanUninstall
		}
		if forDocker, err = plan(ctx); err != nil {
			return err
		}
	}
	all := append(append(install.Changes{}, p.Changes...), forDocker...)
	err = f.settle(all, func() ([]string, error) {
		report, err := c.Do(ctx, p)
		if err != nil {
			return report, err
		}
		more, err := d.Do(ctx, forDocker)
		return append(report, more...), err
	})
	if err != nil {
		return err
	}
	for _, n := range p.Notes {
		fmt.Fprintln(os.Stderr, "varve: "+n)
	}
	return nil
}

// variables are those by which a daemon finds its directories.
var variables = []string{"VARVE_ROOT", "VARVE_CACHE", "VARVE_CONFIG", "VARVE_HOST"}

// nodeSystemdCmd is the verb that installs, or its opposite.
func (a *app) nodeSystemdCmd(in bool) *cobra.Command {
	f := &installFlags{a: a}
	var program string
	cmd := &cobra.Command{Use: "systemd [flags]", Args: cobra.NoArgs,
		Short: "Have systemd listen on the daemon's sockets, and start it when somebody comes"}
	if !in {
		cmd.Short = "Stop the daemon and take its units away"
	}
	f.register(cmd)
	if in {
		cmd.Flags().StringVar(&program, "program", "", "the path of varve on the machine (default: this program's)")
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		n, d, err := f.node()
		if err != nil {
			return err
		}
		if program == "" {
			if program, err = os.Executable(); err != nil {
				return err
			}
		}
		s := install.Systemd{Node: n, Program: program, Args: []string{"daemon"}, Group: "varve", Sockets: []install.Socket{
			{Name: "varve", Path: d.Socket}, {Name: "varve-snapshotter", Path: d.Snapshots()}}}
		for _, v := range variables {
			if value := f.a.variable(v); value != "" {
				s.Env = append(s.Env, v+"="+value)
			}
		}
		if in {
			return f.installSystemd(cmd.Context(), &s, d)
		}
		return f.uninstallSystemd(cmd.Context(), &s)
	}
	return cmd
}

// variable gives what a daemon of a unit's needs in its environment to have the same
// directories as this command.
func (a *app) variable(name string) string {
	switch {
	case name == "VARVE_ROOT" && a.root != "":
		abs, err := filepath.Abs(a.root)
		if err == nil {
			return abs
		}
	case name == "VARVE_HOST" && a.host != "":
		return a.host
	}
	return os.Getenv(name)
}

func (f *installFlags) installSystemd(ctx context.Context, s *install.Systemd, d daemon.Dirs) error {
	s.Offline = s.Offline || f.dryRun
	cs, err := s.PlanInstall(ctx)
	if err != nil {
		return err
	}
	if !f.dryRun && !s.Offline {
		c := daemon.NewClient(d)
		c.Start = false
		if v, err := c.Version(ctx); err == nil && !inUnit(v.PID) {
			return fmt.Errorf("a daemon runs already that systemd did not start (pid %d): varve daemon stop, then again", v.PID)
		}
	}
	return f.settle(cs, func() ([]string, error) { return s.Do(ctx, cs) })
}

// inUnit reports whether a process belongs to the daemon's unit.
func inUnit(pid int) bool {
	f, err := os.Open(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return false
	}
	defer f.Close()
	b, _ := io.ReadAll(io.LimitReader(f, 64<<10))
	return strings.Contains(string(b), "/varve.service")
}

func (f *installFlags) uninstallSystemd(ctx context.Context, s *install.Systemd) error {
	left, err := s.DropIns()
	if err != nil {
		return err
	}
	if len(left) > 0 {
		return fmt.Errorf("containerd still expects the snapshotter (%s): varve uninstall containerd first", strings.Join(left, ", "))
	}
	cs, err := s.PlanUninstall(ctx)
	if err != nil {
		return err
	}
	return f.settle(cs, func() ([]string, error) { return s.Undo(ctx, cs) })
}
