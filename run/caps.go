package run

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/pkg/cap"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// defaultCaps are docker's.
var defaultCaps = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID",
	"CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
}

const allCaps = "ALL"

// capNames gives capabilities as the kernel writes them, or ALL.
func capNames(names []string) ([]string, error) {
	var out []string
	for _, n := range names {
		full := strings.ToUpper(n)
		if full != allCaps && !strings.HasPrefix(full, "CAP_") {
			full = "CAP_" + full
		}
		if full != allCaps && !slices.Contains(cap.Known(), full) {
			return nil, fmt.Errorf("unknown capability: %q", full)
		}
		out = append(out, full)
	}
	return out, nil
}

// capabilities are a container's, by docker's rules: what is added wins over what
// is dropped, but for --cap-add ALL. have is what this process could give.
func capabilities(s Security, have []string) ([]string, error) {
	add, err := capNames(s.CapAdd)
	if err != nil {
		return nil, err
	}
	drop, err := capNames(s.CapDrop)
	if err != nil {
		return nil, err
	}
	without := func(from []string) []string {
		return slices.DeleteFunc(slices.Clone(from), func(c string) bool { return slices.Contains(drop, c) })
	}
	var out []string
	switch {
	case s.Privileged:
		return have, nil
	case slices.Contains(add, allCaps):
		return without(have), nil
	case slices.Contains(drop, allCaps):
		out = add
	default:
		out = append(without(defaultCaps), add...)
	}
	for _, c := range add {
		if !slices.Contains(have, c) {
			return nil, fmt.Errorf("capability not supported by your kernel or not available in the current environment: %q", c)
		}
	}
	slices.Sort(out)
	out = slices.Compact(out)
	// What nobody asked for by name is left out where it cannot be had.
	return slices.DeleteFunc(out, func(c string) bool { return !slices.Contains(have, c) }), nil
}

// current are the capabilities that a container started here can have: those of
// root in a user namespace of its own are all.
func current(ownNamespace bool) ([]string, error) {
	if ownNamespace {
		return cap.Known(), nil
	}
	return cap.Current()
}

// sets are capabilities as a process of a container has them. None is ambient or
// inheritable: a user who is not root has none.
func sets(caps []string) *specs.LinuxCapabilities {
	return &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps}
}
