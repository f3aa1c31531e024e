package run

import (
	"errors"
	"fmt"
	"math"
	"runtime"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// resources are the limits as a runtime takes them. What the machine cannot limit
// is left out with docker's warning, or is docker's error.
func (l Limits) resources(c cgroups) (*specs.LinuxResources, []string, error) {
	var r specs.LinuxResources
	var warnings []string
	const notHere = "Your kernel does not support %s or the cgroup is not mounted. %s"
	lacks := func(what, then string) { warnings = append(warnings, fmt.Sprintf(notHere, what, then)) }
	if l.Memory > 0 || l.MemoryReservation > 0 {
		switch {
		case !c.controllers["memory"]:
			lacks("memory limit capabilities", "Limitation discarded.")
		default:
			r.Memory = l.memory(c.swap)
			if l.Memory > 0 && l.MemorySwap != -1 && !c.swap {
				lacks("swap limit capabilities", "Memory limited without swap.")
			}
		}
	}
	if l.CPUs > 0 {
		if !c.cfs {
			return nil, nil, errors.New("NanoCPUs can not be set, as your kernel does not support CPU CFS scheduler or the cgroup is not mounted")
		}
		if n := runtime.NumCPU(); l.CPUs > float64(n) {
			return nil, nil, fmt.Errorf("range of CPUs is from 0.01 to %d.00, as there are only %[1]d CPUs available", n)
		}
		period := uint64(100_000) // microseconds
		quota := int64(math.Round(l.CPUs * float64(period)))
		r.CPU = &specs.LinuxCPU{Period: &period, Quota: &quota}
	}
	if l.CPUShares > 0 {
		if c.controllers["cpu"] {
			r.CPU = orNew(r.CPU)
			r.CPU.Shares = &l.CPUShares
		} else {
			lacks("CPU shares", "Shares discarded.")
		}
	}
	if l.CPUSet != "" {
		if c.controllers["cpuset"] {
			r.CPU = orNew(r.CPU)
			r.CPU.Cpus = l.CPUSet
		} else {
			lacks("cpuset", "Cpuset discarded.")
		}
	}
	if l.Pids > 0 {
		if c.controllers["pids"] {
			r.Pids = &specs.LinuxPids{Limit: &l.Pids}
		} else {
			lacks("PIDs limit capabilities", "PIDs limit discarded.")
		}
	}
	return &r, warnings, nil
}

func (l Limits) memory(swap bool) *specs.LinuxMemory {
	var m specs.LinuxMemory
	if l.Memory > 0 {
		m.Limit = &l.Memory
		both := l.MemorySwap
		if both == 0 {
			both = 2 * l.Memory
		}
		if swap && both > 0 {
			m.Swap = &both
		}
	}
	if l.MemoryReservation > 0 {
		m.Reservation = &l.MemoryReservation
	}
	return &m
}

func orNew(c *specs.LinuxCPU) *specs.LinuxCPU {
	if c == nil {
		return new(specs.LinuxCPU)
	}
	return c
}

// any says whether something is asked that only a control group can give.
func (l Limits) any() bool {
	return l.Memory > 0 || l.MemoryReservation > 0 || l.CPUs > 0 || l.CPUShares > 0 || l.CPUSet != "" || l.Pids > 0
}
