package main

import (
	"fmt"
	"strings"

	"github.com/docker/go-units"
	"github.com/spf13/pflag"

	"github.com/varvefs/varve/run"
)

// processFlags are docker's flags of what runs in a container. What it gives is to be
// called when they were read.
func processFlags(f *pflag.FlagSet, o *run.Options) (apply func() error) {
	var entrypoint string
	var labels []string
	var timeout int
	l, s := &o.Limits, &o.Security
	f.BoolVarP(&o.Interactive, "interactive", "i", false, "keep stdin open")
	f.BoolVarP(&o.TTY, "tty", "t", false, "give it a terminal")
	envFlags(f, &o.Env, &o.EnvFiles)
	f.StringArrayVarP(&o.Volumes, "volume", "v", nil, "[HOSTDIR|NAME:]DIR[:ro], mounted in it")
	f.StringArrayVar(&o.Tmpfs, "tmpfs", nil, "DIR[:options], an empty directory in memory")
	f.StringVarP(&o.Workdir, "workdir", "w", "", "the working directory (default: the image's)")
	f.StringVarP(&o.User, "user", "u", "", "name or uid, and :group or :gid (default: the image's)")
	f.StringArrayVar(&o.Groups, "group-add", nil, "a further group, by name or gid")
	f.StringVar(&entrypoint, "entrypoint", "", "run this instead of the image's entrypoint")
	f.StringVarP(&o.Hostname, "hostname", "h", "", "the host's name in it")
	f.StringVar(&o.Network, "network", run.NetworkHost, "host or none")
	f.StringVar(&o.Network, "net", run.NetworkHost, "")
	f.MarkHidden("net")
	f.StringArrayVar(&o.AddHosts, "add-host", nil, "NAME:IP for its /etc/hosts")
	f.BoolVar(&o.ReadOnly, "read-only", false, "its root cannot be written")
	f.BoolVar(&o.Init, "init", false, "an init that forwards signals and reaps processes")
	f.StringVar(&o.Runtime, "runtime", "", "crun, runc or a path (default: crun, else runc)")
	f.StringVar(&o.StopSignal, "stop-signal", "", "what `stop` sends (default: the image's, or SIGTERM)")
	f.IntVar(&timeout, "stop-timeout", 10, "seconds until `stop` kills it, -1: never")
	f.StringArrayVarP(&labels, "label", "l", nil, "KEY=VALUE, kept with it")
	f.Var(bytesFlag{&o.ShmSize}, "shm-size", "bytes of /dev/shm (default 64m)")

	f.VarP(bytesFlag{&l.Memory}, "memory", "m", "bytes of memory, such as 512m")
	f.Var(swapFlag{bytesFlag{&l.MemorySwap}}, "memory-swap", "bytes of memory and swap together, -1: no limit (default: twice --memory)")
	f.Var(bytesFlag{&l.MemoryReservation}, "memory-reservation", "bytes of memory that it has when memory is short")
	f.Float64Var(&l.CPUs, "cpus", 0, "processors, such as 1.5")
	f.Uint64VarP(&l.CPUShares, "cpu-shares", "c", 0, "its weight beside other containers (1024 is usual)")
	f.StringVar(&l.CPUSet, "cpuset-cpus", "", "the processors that it may run on, such as 0-2,7")
	f.Int64Var(&l.Pids, "pids-limit", 0, "processes and threads, -1: no limit")
	f.IntVar(&l.OOMScoreAdj, "oom-score-adj", 0, "how soon it is killed when memory is short, -1000 to 1000")
	f.StringArrayVar(&l.Ulimits, "ulimit", nil, "NAME=SOFT[:HARD]")

	f.BoolVar(&s.Privileged, "privileged", false, "all capabilities and devices, no seccomp")
	f.StringSliceVar(&s.CapAdd, "cap-add", nil, "a capability to add, or ALL")
	f.StringSliceVar(&s.CapDrop, "cap-drop", nil, "a capability to drop, or ALL")
	f.StringArrayVar(&s.Opt, "security-opt", nil, "seccomp=unconfined|FILE, no-new-privileges, systempaths=unconfined")
	f.StringArrayVar(&s.Devices, "device", nil, "HOSTDEV[:DEV][:rwm]")
	return func() error {
		if f.Changed("entrypoint") {
			o.Entrypoint = &[]string{}
			if entrypoint != "" {
				*o.Entrypoint = []string{entrypoint}
			}
		}
		if f.Changed("stop-timeout") {
			o.StopTimeout = &timeout
		}
		for _, kv := range labels {
			k, v, _ := strings.Cut(kv, "=")
			if k == "" {
				return usageError{fmt.Errorf("--label %q: want KEY=VALUE", kv)}
			}
			if o.Labels == nil {
				o.Labels = map[string]string{}
			}
			o.Labels[k] = v
		}
		return nil
	}
}

func envFlags(f *pflag.FlagSet, env, files *[]string) {
	f.StringArrayVarP(env, "env", "e", nil, "NAME=VALUE, or NAME for what it is here")
	f.StringArrayVar(files, "env-file", nil, "a file of such lines")
}

// bytesFlag is a number of bytes as docker takes it: 512m, 1g.
type bytesFlag struct{ n *int64 }

func (b bytesFlag) Type() string { return "bytes" }
func (b bytesFlag) String() string {
	if b.n == nil || *b.n == 0 {
		return ""
	}
	return units.BytesSize(float64(*b.n))
}

func (b bytesFlag) Set(s string) (err error) {
	*b.n, err = units.RAMInBytes(s)
	return err
}

// swapFlag may also be -1.
type swapFlag struct{ bytesFlag }

func (b swapFlag) Set(s string) error {
	if s == "-1" {
		*b.n = -1
		return nil
	}
	return b.bytesFlag.Set(s)
}
