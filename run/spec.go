package run

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// specVersion is what every runtime takes: crun before 1.9 refuses all that is
// not 1.0. Nothing of a later one is used.
const specVersion = "1.0.2"

// What docker hides of the kernel, and what it makes read-only.
var (
	maskedPaths = []string{
		"/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/sched_debug",
		"/proc/scsi", "/proc/timer_list", "/proc/timer_stats", "/sys/devices/virtual/powercap", "/sys/firmware",
	}
	readonlyPaths = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
)

// maker holds what a spec is made of.
type maker struct {
	c        *Container
	args     []string
	user     specs.User
	home     string
	hostname string
	priv     *privilege
	cgroups  cgroups
	warnings []string
}

func (m *maker) warn(w ...string) {
	for _, s := range w {
		if s != "" {
			m.warnings = append(m.warnings, s)
		}
	}
}

// spec makes all but the mounts.
func (m *maker) spec() (*specs.Spec, error) {
	c, o := m.c, &m.c.Options
	have, err := current(m.priv.plain)
	if err != nil {
		return nil, fmt.Errorf("read capabilities: %w", err)
	}
	caps, err := capabilities(o.Security, have)
	if err != nil {
		return nil, err
	}
	rlimits, err := o.Limits.rlimits()
	if err != nil {
		return nil, err
	}
	oom, err := m.oomScore()
	if err != nil {
		return nil, err
	}
	s := &specs.Spec{
		Version:  specVersion,
		Hostname: m.hostname,
		Root:     &specs.Root{Path: c.Root, Readonly: o.ReadOnly},
		Process: &specs.Process{
			Terminal:        o.TTY,
			User:            m.user,
			Args:            m.args,
			Env:             c.environ(m.hostname, m.home, o.TTY),
			Cwd:             c.workdir(),
			Capabilities:    sets(caps),
			Rlimits:         rlimits,
			NoNewPrivileges: o.Security.has("no-new-privileges"),
			OOMScoreAdj:     oom,
		},
		Linux: &specs.Linux{Namespaces: m.namespaces()},
	}
	if m.priv.plain {
		s.Linux.UIDMappings, s.Linux.GIDMappings = m.priv.uids, m.priv.gids
	}
	if !o.Security.Privileged && o.Security.option("systempaths") == "" {
		s.Linux.MaskedPaths = slices.Concat(maskedPaths, throttles())
		s.Linux.ReadonlyPaths = readonlyPaths
	}
	if o.Network == NetworkNone && !m.priv.confined() {
		// As docker: ports below 1024 and pings need no capability in a network of
		// one's own.
		s.Linux.Sysctl = sysctls(map[string]string{"net.ipv4.ip_unprivileged_port_start": "0", "net.ipv4.ping_group_range": "0 2147483647"})
	}
	if err := m.limit(s); err != nil {
		return nil, err
	}
	w, err := confine(s, &o.Security)
	if err != nil {
		return nil, err
	}
	m.warn(w)
	m.labels(s)
	return s, nil
}

func (m *maker) namespaces() []specs.LinuxNamespace {
	kinds := []specs.LinuxNamespaceType{specs.MountNamespace, specs.PIDNamespace, specs.IPCNamespace, specs.UTSNamespace}
	if m.c.Options.Network == NetworkNone {
		kinds = append(kinds, specs.NetworkNamespace)
	}
	// With version 1 of control groups docker's containers have the host's.
	if m.cgroups.unified {
		kinds = append(kinds, specs.CgroupNamespace)
	}
	if m.priv.plain {
		kinds = append(kinds, specs.UserNamespace)
	}
	var out []specs.LinuxNamespace
	for _, k := range kinds {
		out = append(out, specs.LinuxNamespace{Type: k})
	}
	return out
}

// limit sets control group, limits and devices.
func (m *maker) limit(s *specs.Spec) error {
	o := &m.c.Options
	devs, rules, err := devices(o.Security)
	if err != nil {
		return err
	}
	s.Linux.Devices = devs
	if m.priv.confined() || m.cgroups.none() {
		if o.Limits.any() {
			if m.priv.confined() {
				return errors.New("limits of memory, processors and processes need control groups, which a container of a plain user or in a user namespace does not have: run it as root, or without them")
			}
			return errors.New("limits of memory, processors and processes need control groups, and none are mounted at " + cgroupRoot)
		}
		return nil
	}
	r, warnings, err := o.Limits.resources(m.cgroups)
	if err != nil {
		return err
	}
	m.warn(warnings...)
	if m.cgroups.controllers["devices"] {
		r.Devices = rules
	}
	s.Linux.Resources = r
	s.Linux.CgroupsPath = "/varve/" + m.c.ID
	return nil
}

// oomScore is docker's 0 unless asked, also where this process has another. Who
// is confined may only raise it.
func (m *maker) oomScore() (*int, error) {
	n := m.c.Options.Limits.OOMScoreAdj
	if m.priv.confined() {
		raw, err := os.ReadFile("/proc/self/oom_score_adj")
		if err != nil {
			return nil, err
		}
		own, err := strconv.Atoi(strings.TrimSpace(string(raw)))
		if err != nil {
			return nil, err
		}
		n = max(n, own)
	}
	return &n, nil
}

// labels are those of the security modules. varve loads no profile of AppArmor's,
// and sets no label of SELinux'.
func (m *maker) labels(s *specs.Spec) {
	sec := &m.c.Options.Security
	if profile := sec.option("apparmor"); profile != "" {
		if on, _ := os.ReadFile("/sys/module/apparmor/parameters/enabled"); strings.HasPrefix(string(on), "Y") {
			s.Process.ApparmorProfile = profile
		} else if profile != "unconfined" {
			m.warn("AppArmor is not enabled in your kernel: apparmor=" + profile + " is ignored.")
		}
	}
	if label := sec.option("label"); label != "" && label != "disable" {
		m.warn("varve sets no SELinux labels: label=" + label + " is ignored.")
	}
}

// workdir is the first process's working directory.
func (c *Container) workdir() string {
	dir := c.Options.Workdir
	if dir == "" {
		dir = c.Image.WorkingDir
	}
	return path.Clean("/" + dir)
}

// throttles are per processor.
func throttles() []string {
	found, _ := filepath.Glob("/sys/devices/system/cpu/cpu[0-9]*/thermal_throttle")
	return found
}

// sysctls leaves out what this kernel does not have: a runtime would fail.
func sysctls(all map[string]string) map[string]string {
	for key := range all {
		if _, err := os.Stat("/proc/sys/" + strings.ReplaceAll(key, ".", "/")); err != nil {
			delete(all, key)
		}
	}
	return all
}
