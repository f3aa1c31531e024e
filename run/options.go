// Package run makes the OCI runtime bundle of a container: what a runtime such
// as crun or runc is told, from options as docker has them, an image's config
// and the directory where the container's root is mounted.
//
// Whatever touches the root ([Make], [Process], [Tidy]) must not be called by
// the process that serves the root's mount, which would wait for itself: the
// monitor beside the container calls it. It takes the root for hostile: no link
// in it leads out of it.
package run

import (
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// The networks that a container can have. There is no bridge, which is docker's
// default: "" is the host's.
const (
	NetworkHost = "host"
	NetworkNone = "none"
)

// Options are what a user asks of a container, in docker's words. They are kept
// beside it and start it again, so they hold nothing of the caller's that may
// change: see [Options.Resolve]. The zero value runs the image as its config says.
type Options struct {
	Cmd        []string  `json:"cmd,omitempty"`        // after the image's name
	Entrypoint *[]string `json:"entrypoint,omitempty"` // nil: the image's; empty: none
	Env        []string  `json:"env,omitempty"`        // K=V; K alone takes K away
	EnvFiles   []string  `json:"env_files,omitempty"`  // read by Resolve, which empties it
	Workdir    string    `json:"workdir,omitempty"`    // "" for the image's
	User       string    `json:"user,omitempty"`       // name|uid[:group|gid], "" for the image's
	Groups     []string  `json:"groups,omitempty"`     // further ones, by name or gid
	Hostname   string    `json:"hostname,omitempty"`   // "" for the host's, or with a network of its own the ID's first 12

	TTY         bool `json:"tty,omitempty"`
	Interactive bool `json:"interactive,omitempty"` // stdin stays open

	Network  string   `json:"network,omitempty"`   // [NetworkHost] (default), [NetworkNone]
	AddHosts []string `json:"add_hosts,omitempty"` // NAME:IP, lines of /etc/hosts

	ReadOnly bool     `json:"read_only,omitempty"` // the root; not volumes and tmpfs
	Volumes  []string `json:"volumes,omitempty"`   // [HOSTDIR|NAME:]DIR[:ro|rw|z|Z|nocopy|propagation]
	Tmpfs    []string `json:"tmpfs,omitempty"`     // DIR[:option,...]
	ShmSize  int64    `json:"shm_size,omitempty"`  // bytes of /dev/shm, 0: 64 MiB

	Init        bool              `json:"init,omitempty"` // a small init of the host's reaps and forwards signals
	StopSignal  string            `json:"stop_signal,omitempty"`
	StopTimeout *int              `json:"stop_timeout,omitempty"` // seconds until SIGKILL, nil: 10; -1: never
	Labels      map[string]string `json:"labels,omitempty"`
	Runtime     string            `json:"runtime,omitempty"` // crun, runc or a path; "" for what is found

	Limits   Limits   `json:"limits,omitzero"`
	Security Security `json:"security,omitzero"`
}

// Limits are a container's control group's and its processes'. 0 is none.
type Limits struct {
	Memory            int64    `json:"memory,omitempty"`             // bytes, 6 MiB at least
	MemorySwap        int64    `json:"memory_swap,omitempty"`        // memory and swap, -1: as much as there is, 0: twice Memory
	MemoryReservation int64    `json:"memory_reservation,omitempty"` // bytes
	CPUs              float64  `json:"cpus,omitempty"`               // processors, 0.01 at least
	CPUShares         uint64   `json:"cpu_shares,omitempty"`         // 1024 is usual
	CPUSet            string   `json:"cpu_set,omitempty"`            // 0-2,7
	Pids              int64    `json:"pids,omitempty"`               // -1: none
	OOMScoreAdj       int      `json:"oom_score_adj,omitempty"`      // -1000 to 1000
	Ulimits           []string `json:"ulimits,omitempty"`            // NAME=SOFT[:HARD]
}

// Security is what a container may beside what its user may. The zero value is
// docker's default: 14 capabilities, a seccomp profile, masked paths.
type Security struct {
	Privileged bool     `json:"privileged,omitempty"`
	CapAdd     []string `json:"cap_add,omitempty"`  // with or without CAP_, or ALL
	CapDrop    []string `json:"cap_drop,omitempty"` // ditto
	// Opt are seccomp=unconfined, seccomp=FILE, no-new-privileges[=true|false],
	// systempaths=unconfined, apparmor=... and label=... Resolve puts the file's
	// contents in the place of FILE.
	Opt     []string `json:"opt,omitempty"`
	Devices []string `json:"devices,omitempty"` // HOSTDEV[:DEV][:rwm]
}

// A Container is what a bundle is made from.
type Container struct {
	ID      string // names the control group, and the host to programs
	Root    string // where its writable root is mounted, absolute
	Dir     string // its state, absolute: bundle/ and volumes/ are made there
	Volumes string // where volumes with a name are, absolute: NAME/_data
	Options Options
	Image   ocispec.ImageConfig
}
