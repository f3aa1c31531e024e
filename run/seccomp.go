package run

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"

	"github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// profile is a seccomp profile as docker's users write them: the runtime's form,
// and beside it rules with conditions, which are decided when a container is made.
type profile struct {
	specs.LinuxSeccomp
	ArchMap []struct {
		Arch specs.Arch   `json:"architecture"`
		Sub  []specs.Arch `json:"subArchitectures"`
	} `json:"archMap"`
	Syscalls []profileRule `json:"syscalls"`
}

type profileRule struct {
	specs.LinuxSyscall
	Name     string     `json:"name"`
	Includes conditions `json:"includes"`
	Excludes conditions `json:"excludes"`
}

type conditions struct {
	Caps      []string `json:"caps"`
	Arches    []string `json:"arches"`
	MinKernel string   `json:"minKernel"`
}

// machine is what conditions are held against.
type machine struct {
	arch   specs.Arch
	word   string   // the architecture as conditions write it
	kernel string   // release
	caps   []string // of the container
}

var seccompArches = map[string]specs.Arch{
	"amd64": specs.ArchX86_64, "arm64": specs.ArchAARCH64, "arm": specs.ArchARM, "386": specs.ArchX86, "s390x": specs.ArchS390X,
	"ppc64le": specs.ArchPPC64LE, "riscv64": specs.ArchRISCV64, "loong64": specs.ArchLOONGARCH64, "mips64le": specs.ArchMIPSEL64,
}

func thisMachine(caps []string) machine {
	var name unix.Utsname
	unix.Uname(&name)
	return machine{arch: seccompArches[runtime.GOARCH], word: runtime.GOARCH, kernel: unix.ByteSliceToString(name.Release[:]), caps: caps}
}

// parseProfile reads a profile and decides its conditions for m.
func parseProfile(raw []byte, m machine) (*specs.LinuxSeccomp, error) {
	var p profile
	if err := json.Unmarshal(raw, &p); err != nil {
		return nil, fmt.Errorf("decode seccomp profile: %w", err)
	}
	if p.DefaultAction == "" {
		return nil, errors.New("decode seccomp profile: it has no defaultAction")
	}
	if len(p.Architectures) > 0 && len(p.ArchMap) > 0 {
		return nil, errors.New("both 'architectures' and 'archMap' are specified in the seccomp profile, use either 'architectures' or 'archMap'")
	}
	out := p.LinuxSeccomp
	for _, a := range p.ArchMap {
		if a.Arch == m.arch {
			out.Architectures = append([]specs.Arch{a.Arch}, a.Sub...)
		}
	}
	out.Syscalls = nil
	for _, r := range p.Syscalls {
		switch {
		case r.Name != "" && len(r.Names) > 0:
			return nil, errors.New("both 'name' and 'names' are specified in the seccomp profile, use either 'name' or 'names'")
		case r.Name != "":
			r.Names = []string{r.Name}
		}
		if len(r.Names) == 0 || !r.Includes.all(m) || r.Excludes.any(m) {
			continue
		}
		out.Syscalls = append(out.Syscalls, r.LinuxSyscall)
	}
	return &out, nil
}

// all says whether every condition that is set holds.
func (c conditions) all(m machine) bool {
	for _, want := range c.Caps {
		if !slices.Contains(m.caps, want) {
			return false
		}
	}
	return (len(c.Arches) == 0 || slices.Contains(c.Arches, m.word)) && (c.MinKernel == "" || atLeast(m.kernel, c.MinKernel))
}

// any says whether one that is set holds.
func (c conditions) any(m machine) bool {
	return slices.ContainsFunc(c.Caps, func(x string) bool { return slices.Contains(m.caps, x) }) ||
		slices.Contains(c.Arches, m.word) || c.MinKernel != "" && atLeast(m.kernel, c.MinKernel)
}

// atLeast compares kernel releases by their first two numbers.
func atLeast(release, min string) bool {
	var a, b, x, y int
	fmt.Sscanf(release, "%d.%d", &a, &b)
	fmt.Sscanf(min, "%d.%d", &x, &y)
	return a > x || a == x && b >= y
}

// confine sets the seccomp profile that s asks for. The capabilities of spec are
// set: the default profile lets each capability's own system calls pass.
func confine(spec *specs.Spec, s *Security) (warning string, err error) {
	asked := s.option("seccomp") // "", unconfined, builtin or a profile
	if asked == "unconfined" || asked == "" && s.Privileged {
		return "", nil
	}
	if _, err := os.Stat("/proc/sys/kernel/seccomp/actions_avail"); err != nil {
		if asked != "" {
			return "", errors.New("seccomp is not enabled in your kernel, cannot run a custom seccomp profile")
		}
		return "seccomp is not enabled in your kernel, running container without default profile", nil
	}
	if asked == "" || asked == "builtin" {
		spec.Linux.Seccomp = seccomp.DefaultProfile(spec)
		return "", nil
	}
	spec.Linux.Seccomp, err = parseProfile([]byte(asked), thisMachine(spec.Process.Capabilities.Bounding))
	return "", err
}
