package run

import (
	"errors"
	"fmt"
	"math"
	"net"
	"path"
	"slices"
	"strings"

	"github.com/docker/go-units"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// What docker refuses less than, in bytes.
const minMemory = 6 << 20

// maxHostname is what the kernel takes for a host's name, less its NUL.
const maxHostname = 64

// Check finds whatever is wrong in o without looking at an image or a host. The
// daemon calls it before it mounts anything.
func (o *Options) Check() error {
	switch o.Network {
	case "", NetworkHost, NetworkNone:
	default:
		return fmt.Errorf("network %q is not supported: a container has the host's network or none (--network host or --network none)", o.Network)
	}
	for _, kv := range o.Env {
		if strings.HasPrefix(kv, "=") || kv == "" || strings.ContainsRune(kv, 0) {
			return fmt.Errorf("invalid environment variable: %q", kv)
		}
	}
	if len(o.EnvFiles) > 0 {
		return fmt.Errorf("environment file %s was not read by who gave it", o.EnvFiles[0])
	}
	if o.Workdir != "" && !path.IsAbs(o.Workdir) {
		return fmt.Errorf("the working directory '%s' is invalid, it needs to be an absolute path", o.Workdir)
	}
	if len(o.Hostname) > maxHostname {
		return fmt.Errorf("hostname %q is too long (maximum %d bytes)", o.Hostname, maxHostname)
	}
	if strings.ContainsAny(o.Hostname, "/ \t\n\x00") {
		return fmt.Errorf("invalid hostname %q", o.Hostname)
	}
	if o.ShmSize < 0 {
		return errors.New("SHM size can not be less than 0")
	}
	if o.StopSignal != "" {
		if _, err := ParseSignal(o.StopSignal); err != nil {
			return err
		}
	}
	for _, h := range o.AddHosts {
		if _, _, err := parseHost(h); err != nil {
			return err
		}
	}
	if _, err := places(*o, ocispec.ImageConfig{}); err != nil {
		return err
	}
	if err := o.Limits.check(); err != nil {
		return err
	}
	return o.Security.check()
}

// parseHost reads NAME:IP or NAME=IP, where the address may have brackets.
func parseHost(s string) (name, ip string, err error) {
	at := strings.IndexAny(s, "=:")
	if at < 1 {
		return "", "", fmt.Errorf("bad format for add-host: %q", s)
	}
	name, ip = s[:at], strings.TrimSuffix(strings.TrimPrefix(s[at+1:], "["), "]")
	if net.ParseIP(ip) == nil {
		return "", "", fmt.Errorf("invalid IP address in add-host: %q", ip)
	}
	if strings.ContainsAny(name, " \t\n#\x00") {
		return "", "", fmt.Errorf("bad format for add-host: %q", s)
	}
	return name, ip, nil
}

func (l *Limits) check() error {
	switch {
	case l.Memory < 0 || l.Memory > 0 && l.Memory < minMemory:
		return errors.New("Minimum memory limit allowed is 6MB")
	case l.MemorySwap < -1:
		return fmt.Errorf("invalid memory-swap limit %d: want bytes, or -1 for as much as there is", l.MemorySwap)
	case l.MemorySwap > 0 && l.Memory == 0:
		return errors.New("You should always set the Memory limit when using Memoryswap limit, see usage")
	case l.MemorySwap > 0 && l.MemorySwap < l.Memory:
		return errors.New("Minimum memoryswap limit should be larger than memory limit, see usage")
	case l.MemoryReservation < 0 || l.MemoryReservation > 0 && l.MemoryReservation < minMemory:
		return errors.New("Minimum memory reservation allowed is 6MB")
	case l.Memory > 0 && l.MemoryReservation > l.Memory:
		return errors.New("Minimum memory limit can not be less than memory reservation limit, see usage")
	case math.IsNaN(l.CPUs) || l.CPUs < 0 || l.CPUs > 0 && l.CPUs < 0.01 || l.CPUs > 1<<20:
		return fmt.Errorf("invalid number of CPUs %v: 0.01 is the least", l.CPUs)
	case l.OOMScoreAdj < -1000 || l.OOMScoreAdj > 1000:
		return fmt.Errorf("Invalid value %d, range for oom score adj is [-1000, 1000]", l.OOMScoreAdj)
	case strings.ContainsFunc(l.CPUSet, func(r rune) bool { return !strings.ContainsRune("0123456789,-", r) }):
		return fmt.Errorf("Invalid value %s for cpuset cpus", l.CPUSet)
	}
	_, err := l.rlimits()
	return err
}

// rlimits are the processes' own limits, sorted by name; -1 is none.
func (l *Limits) rlimits() ([]specs.POSIXRlimit, error) {
	var out []specs.POSIXRlimit
	for _, s := range l.Ulimits {
		u, err := units.ParseUlimit(s)
		if err != nil {
			return nil, err
		}
		r := specs.POSIXRlimit{Type: "RLIMIT_" + strings.ToUpper(u.Name), Soft: uint64(u.Soft), Hard: uint64(u.Hard)}
		out = slices.DeleteFunc(out, func(have specs.POSIXRlimit) bool { return have.Type == r.Type })
		out = append(out, r)
	}
	slices.SortFunc(out, func(a, b specs.POSIXRlimit) int { return strings.Compare(a.Type, b.Type) })
	return out, nil
}

func (s *Security) check() error {
	if _, err := capNames(s.CapAdd); err != nil {
		return err
	}
	if _, err := capNames(s.CapDrop); err != nil {
		return err
	}
	for _, d := range s.Devices {
		if _, err := parseDevice(d); err != nil {
			return err
		}
	}
	for _, opt := range s.Opt {
		key, value, set := strings.Cut(opt, "=")
		switch key {
		case "no-new-privileges":
			if set && value != "true" && value != "false" {
				return fmt.Errorf("invalid --security-opt 2: %q", opt)
			}
		case "systempaths":
			if value != "unconfined" {
				return fmt.Errorf("invalid --security-opt 2: %q", opt)
			}
		case "seccomp":
			if value == "unconfined" || value == "builtin" {
				continue
			}
			if !strings.HasPrefix(value, "{") {
				return fmt.Errorf("seccomp profile %q was not read by who gave it", value)
			}
			if _, err := parseProfile([]byte(value), thisMachine(nil)); err != nil {
				return err
			}
		case "apparmor", "label", "disable":
		default:
			return fmt.Errorf("invalid --security-opt 2: %q", opt)
		}
	}
	return nil
}

func (s *Security) has(name string) bool {
	return slices.Contains(s.Opt, name) || slices.Contains(s.Opt, name+"=true")
}

// option gives the value of the last key=value.
func (s *Security) option(key string) (value string) {
	for _, opt := range s.Opt {
		if v, ok := strings.CutPrefix(opt, key+"="); ok {
			value = v
		}
	}
	return value
}
