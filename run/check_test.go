package run

import (
	"math"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"
)

func TestCheck(t *testing.T) {
	for _, good := range []Options{
		{},
		{Network: "host"}, {Network: "none"},
		{Env: []string{"A=b", "A"}, Workdir: "/x/../y", Hostname: "h", AddHosts: []string{"a:1.2.3.4", "b=::1", "c:[::1]"}},
		{Limits: Limits{Memory: 6 << 20, MemorySwap: 6 << 20, CPUs: 0.01, CPUSet: "0-1,3", Pids: -1, Ulimits: []string{"nofile=1:2", "core=-1"}}},
		{Limits: Limits{Memory: 6 << 20, MemorySwap: -1}},
		{Security: Security{CapAdd: []string{"all", "cap_net_admin"}, CapDrop: []string{"CHOWN"}, Devices: []string{"/dev/fuse", "/dev/a:/dev/b:r", "/dev/a:rm"}}},
		{Security: Security{Opt: []string{"seccomp=unconfined", "no-new-privileges", "no-new-privileges=false", "apparmor=x", "label=disable", "systempaths=unconfined", `seccomp={"defaultAction":"SCMP_ACT_ALLOW"}`}}},
	} {
		if err := good.Check(); err != nil {
			t.Errorf("%+v: %v", good, err)
		}
	}
	for want, bad := range map[string]Options{
		`network "bridge" is not supported`:                            {Network: "bridge"},
		`network "container:x" is not supported`:                       {Network: "container:x"},
		`invalid environment variable: "=x"`:                           {Env: []string{"=x"}},
		"environment file x was not read":                              {EnvFiles: []string{"x"}},
		"the working directory 'x' is invalid":                         {Workdir: "x"},
		"is too long (maximum 64 bytes)":                               {Hostname: strings.Repeat("h", 65)},
		"invalid hostname":                                             {Hostname: "a b"},
		"SHM size can not be less than 0":                              {ShmSize: -1},
		"invalid signal: FOO":                                          {StopSignal: "FOO"},
		`bad format for add-host: "x"`:                                 {AddHosts: []string{"x"}},
		`invalid IP address in add-host: "y"`:                          {AddHosts: []string{"x:y"}},
		"invalid mode: what":                                           {Volumes: []string{"/a:/b:what"}},
		"Minimum memory limit allowed is 6MB":                          {Limits: Limits{Memory: 1}},
		"You should always set the Memory limit when using Memoryswap": {Limits: Limits{MemorySwap: 1 << 30}},
		"Minimum memoryswap limit should be larger than memory limit":  {Limits: Limits{Memory: 2 << 30, MemorySwap: 1 << 30}},
		"Minimum memory reservation allowed is 6MB":                    {Limits: Limits{MemoryReservation: 1}},
		"can not be less than memory reservation limit":                {Limits: Limits{Memory: 1 << 30, MemoryReservation: 2 << 30}},
		"invalid number of CPUs 0.001":                                 {Limits: Limits{CPUs: 0.001}},
		"invalid number of CPUs NaN":                                   {Limits: Limits{CPUs: math.NaN()}},
		"range for oom score adj is [-1000, 1000]":                     {Limits: Limits{OOMScoreAdj: 1001}},
		"Invalid value x for cpuset cpus":                              {Limits: Limits{CPUSet: "x"}},
		"invalid ulimit type: files":                                   {Limits: Limits{Ulimits: []string{"files=1"}}},
		`unknown capability: "CAP_FLY"`:                                {Security: Security{CapAdd: []string{"fly"}}},
		`unknown capability: "CAP_"`:                                   {Security: Security{CapDrop: []string{""}}},
		"bad mode specified: rx":                                       {Security: Security{Devices: []string{"/dev/a:/dev/b:rx"}}},
		"is not an absolute path":                                      {Security: Security{Devices: []string{"dev"}}},
		`invalid --security-opt 2: "foo"`:                              {Security: Security{Opt: []string{"foo"}}},
		`invalid --security-opt 2: "no-new-privileges=x"`:              {Security: Security{Opt: []string{"no-new-privileges=x"}}},
		`seccomp profile "/p" was not read`:                            {Security: Security{Opt: []string{"seccomp=/p"}}},
		"decode seccomp profile":                                       {Security: Security{Opt: []string{"seccomp={"}}},
		"it has no defaultAction":                                      {Security: Security{Opt: []string{"seccomp={}"}}},
	} {
		if err := bad.Check(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want %q", err, want)
		}
	}
}

func TestRlimits(t *testing.T) {
	l := Limits{Ulimits: []string{"nofile=5:6", "core=-1", "nofile=7"}}
	got, err := l.rlimits()
	want := []specs.POSIXRlimit{{Type: "RLIMIT_CORE", Soft: math.MaxUint64, Hard: math.MaxUint64}, {Type: "RLIMIT_NOFILE", Soft: 7, Hard: 7}}
	if d := cmp.Diff(want, got); d != "" || err != nil {
		t.Errorf("%v %s", err, d)
	}
}

func TestResources(t *testing.T) {
	all := cgroups{controllers: map[string]bool{"memory": true, "cpu": true, "cpuset": true, "pids": true}, swap: true, cfs: true}
	asked := Limits{Memory: 64 << 20, MemoryReservation: 32 << 20, CPUs: 0.29, CPUShares: 7, CPUSet: "0", Pids: 9}
	got, warnings, err := asked.resources(all)
	must(t, err)
	if len(warnings) > 0 {
		t.Errorf("warnings: %v", warnings)
	}
	limit, swap, soft, period, quota, shares, pids := int64(64<<20), int64(128<<20), int64(32<<20), uint64(100_000), int64(29_000), uint64(7), int64(9)
	want := &specs.LinuxResources{
		Memory: &specs.LinuxMemory{Limit: &limit, Swap: &swap, Reservation: &soft},
		CPU:    &specs.LinuxCPU{Period: &period, Quota: &quota, Shares: &shares, Cpus: "0"},
		Pids:   &specs.LinuxPids{Limit: &pids},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	got, _, err = Limits{Memory: 64 << 20, MemorySwap: -1, Pids: -1}.resources(all)
	if err != nil || got.Memory.Swap != nil || got.Pids != nil {
		t.Errorf("without limits of swap and processes: %+v, %v", got, err)
	}

	bare := cgroups{controllers: map[string]bool{"devices": true}}
	asked.CPUs = 0
	got, warnings, err = asked.resources(bare)
	if err != nil || got.Memory != nil || got.CPU != nil || got.Pids != nil || len(warnings) != 4 || !strings.HasPrefix(warnings[0], "Your kernel does not support memory limit capabilities or the cgroup is not mounted.") {
		t.Errorf("where there is nothing: %+v, %q, %v", got, warnings, err)
	}
	_, warnings, err = Limits{Memory: 64 << 20}.resources(cgroups{controllers: map[string]bool{"memory": true}})
	if err != nil || len(warnings) != 1 || !strings.HasSuffix(warnings[0], "Memory limited without swap.") {
		t.Errorf("without swap: %q, %v", warnings, err)
	}
	if _, _, err := (Limits{CPUs: 1}).resources(bare); err == nil || !strings.HasPrefix(err.Error(), "NanoCPUs can not be set") {
		t.Errorf("processors without their controller: %v", err)
	}
	if _, _, err := (Limits{CPUs: 100_000}).resources(all); err == nil || !strings.HasPrefix(err.Error(), "range of CPUs is from 0.01 to") {
		t.Errorf("too many processors: %v", err)
	}
}

func TestCgroupsV1(t *testing.T) {
	c := cgroups{controllers: map[string]bool{}}
	c.readV1([]byte(`30 29 0:27 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct
31 29 0:28 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
32 29 0:29 / /mnt/memory rw - cgroup cgroup rw,memory
33 29 0:30 / / rw - ext4 /dev/vda rw
garbage
`))
	for name, want := range map[string]bool{"cpu": true, "cpuacct": true, "memory": false, "pids": false} {
		if c.controllers[name] != want {
			t.Errorf("%s: %v", name, !want)
		}
	}
	if c.none() {
		t.Error("none found")
	}
}

func TestParseDevice(t *testing.T) {
	for in, want := range map[string]device{
		"/dev/a":           {"/dev/a", "/dev/a", "rwm"},
		"/dev/a:rw":        {"/dev/a", "/dev/a", "rw"},
		"/dev/a:/dev/b":    {"/dev/a", "/dev/b", "rwm"},
		"/dev/a:/dev//b:m": {"/dev/a", "/dev/b", "m"},
		"/dev/a:/dev/b:rr": {},
		"/dev/a:/dev/b:":   {},
		"/a:/b:r:x":        {},
		"":                 {},
	} {
		got, err := parseDevice(in)
		if (err != nil) != (want == device{}) || err == nil && got != want {
			t.Errorf("%q: %+v, %v", in, got, err)
		}
	}
	devs, rules, err := devices(Security{Devices: []string{"/dev/full:/dev/mine:r"}})
	must(t, err)
	last := rules[len(rules)-1]
	if len(devs) != 1 || devs[0].Path != "/dev/mine" || devs[0].Major != 1 || devs[0].Minor != 7 || !last.Allow || last.Access != "r" || *last.Minor != 7 {
		t.Errorf("%+v, %+v", devs, last)
	}
	if _, _, err := devices(Security{Devices: []string{"/nowhere"}}); err == nil || !strings.Contains(err.Error(), `adding custom device "/nowhere"`) {
		t.Errorf("a device that is not there: %v", err)
	}
}
