package run

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// device is an argument of --device.
type device struct{ host, dest, access string }

func parseDevice(s string) (device, error) {
	parts := strings.Split(s, ":")
	d := device{host: parts[0], dest: parts[0], access: "rwm"}
	switch len(parts) {
	case 1:
	case 2:
		if isAccess(parts[1]) {
			d.access = parts[1]
		} else {
			d.dest = parts[1]
		}
	case 3:
		d.dest, d.access = parts[1], parts[2]
	default:
		return d, fmt.Errorf("invalid device specification: %s", s)
	}
	if !isAccess(d.access) {
		return d, fmt.Errorf("bad mode specified: %s", d.access)
	}
	if !path.IsAbs(d.host) || !path.IsAbs(d.dest) {
		return d, fmt.Errorf("%s is not an absolute path", s)
	}
	d.dest = path.Clean(d.dest)
	return d, nil
}

func isAccess(s string) bool {
	if s == "" {
		return false
	}
	for i, r := range s {
		if !strings.ContainsRune("rwm", r) || strings.ContainsRune(s[:i], r) {
			return false
		}
	}
	return true
}

// find gives the device, or all of a directory.
func (d device) find() ([]specs.LinuxDevice, error) {
	host := d.host
	if real, err := filepath.EvalSymlinks(host); err == nil {
		host = real
	}
	one, err := oci.DeviceFromPath(host)
	if err == nil {
		one.Path = d.dest
		return []specs.LinuxDevice{*one}, nil
	}
	var all []specs.LinuxDevice
	if errors.Is(err, oci.ErrNotADevice) {
		filepath.WalkDir(host, func(name string, _ os.DirEntry, _ error) error {
			if one, err := oci.DeviceFromPath(name); err == nil {
				one.Path = path.Join(d.dest, strings.TrimPrefix(name, host))
				all = append(all, *one)
			}
			return nil
		})
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("error gathering device information while adding custom device %q: %w", d.host, err)
	}
	return all, nil
}

// rule allows or denies devices to a control group; -1 is any number.
func rule(allow bool, kind string, major, minor int64, access string) specs.LinuxDeviceCgroup {
	r := specs.LinuxDeviceCgroup{Allow: allow, Type: kind, Access: access}
	if major >= 0 {
		r.Major = &major
	}
	if minor >= 0 {
		r.Minor = &minor
	}
	return r
}

// deviceRules are docker's and what runtimes add to them: nothing but null, full,
// zero, random, urandom, tty, console, ptmx, terminals; making nodes of any.
func deviceRules() []specs.LinuxDeviceCgroup {
	return []specs.LinuxDeviceCgroup{
		rule(false, "", -1, -1, "rwm"),
		rule(true, "c", -1, -1, "m"),
		rule(true, "b", -1, -1, "m"),
		rule(true, "c", 1, 3, "rwm"),
		rule(true, "c", 1, 5, "rwm"),
		rule(true, "c", 1, 7, "rwm"),
		rule(true, "c", 1, 8, "rwm"),
		rule(true, "c", 1, 9, "rwm"),
		rule(true, "c", 5, 0, "rwm"),
		rule(true, "c", 5, 1, "rwm"),
		rule(true, "c", 5, 2, "rwm"),
		rule(true, "c", 136, -1, "rwm"),
	}
}

// devices are those that a container has beside the ones which every runtime
// makes, and its control group's rules.
func devices(s Security) ([]specs.LinuxDevice, []specs.LinuxDeviceCgroup, error) {
	var devs []specs.LinuxDevice
	rules := deviceRules()
	if s.Privileged {
		var err error
		if devs, err = oci.HostDevices(); err != nil {
			return nil, nil, fmt.Errorf("list the host's devices: %w", err)
		}
		rules = []specs.LinuxDeviceCgroup{rule(true, "", -1, -1, "rwm")}
	}
	for _, arg := range s.Devices {
		d, err := parseDevice(arg)
		if err != nil {
			return nil, nil, err
		}
		if s.Privileged && d.host == d.dest {
			continue // it has it
		}
		found, err := d.find()
		if err != nil {
			return nil, nil, err
		}
		devs = append(devs, found...)
		for _, f := range found {
			if !s.Privileged && f.Type != "p" {
				rules = append(rules, rule(true, f.Type, f.Major, f.Minor, d.access))
			}
		}
	}
	return devs, rules, nil
}
