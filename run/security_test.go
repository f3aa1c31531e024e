package run

import (
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/pkg/cap"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"
)

func TestCapabilities(t *testing.T) {
	known := cap.Known()
	plus := func(more ...string) []string {
		all := append(slices.Clone(defaultCaps), more...)
		slices.Sort(all)
		return slices.Compact(all)
	}
	minus := func(from []string, less ...string) []string {
		return slices.DeleteFunc(slices.Clone(from), func(c string) bool { return slices.Contains(less, c) })
	}
	for _, c := range []struct {
		name string
		in   Security
		have []string
		want []string
		err  string
	}{
		{name: "docker's", want: plus()},
		{name: "added", in: Security{CapAdd: []string{"net_admin", "CAP_CHOWN"}}, want: plus("CAP_NET_ADMIN")},
		{name: "dropped", in: Security{CapDrop: []string{"net_raw"}}, want: minus(plus(), "CAP_NET_RAW")},
		{name: "added and dropped", in: Security{CapAdd: []string{"chown"}, CapDrop: []string{"chown"}}, want: plus()},
		{name: "none but", in: Security{CapAdd: []string{"CHOWN"}, CapDrop: []string{"ALL"}}, want: []string{"CAP_CHOWN"}},
		{name: "none", in: Security{CapDrop: []string{"all"}}, want: nil},
		{name: "all but", in: Security{CapAdd: []string{"ALL"}, CapDrop: []string{"SYS_ADMIN"}}, want: minus(known, "CAP_SYS_ADMIN")},
		{name: "privileged", in: Security{Privileged: true, CapDrop: []string{"ALL"}}, want: known},
		{name: "not to be had", have: []string{"CAP_CHOWN"}, want: []string{"CAP_CHOWN"}},
		{name: "asked and not to be had", in: Security{CapAdd: []string{"sys_time"}}, have: []string{"CAP_CHOWN"}, err: `not available in the current environment: "CAP_SYS_TIME"`},
		{name: "unknown", in: Security{CapAdd: []string{"CAP_ALL"}}, err: `unknown capability: "CAP_ALL"`},
	} {
		have := c.have
		if have == nil {
			have = known
		}
		got, err := capabilities(c.in, have)
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%s: error %v", c.name, err)
			}
			continue
		}
		if !slices.Equal(got, c.want) || err != nil {
			t.Errorf("%s: %v, %v; want %v", c.name, got, err, c.want)
		}
	}
}

func TestSeccompProfile(t *testing.T) {
	m := machine{arch: specs.ArchX86_64, word: "amd64", kernel: "5.10.3-x", caps: []string{"CAP_SYS_PTRACE"}}
	got, err := parseProfile([]byte(`{
		"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38,
		"archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]}, {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": ["SCMP_ARCH_ARM"]}],
		"syscalls": [
			{"names": ["a", "b"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 1, "value": 2, "op": "SCMP_CMP_EQ"}]},
			{"name": "old", "action": "SCMP_ACT_ALLOW"},
			{"names": ["caps"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_PTRACE"]}},
			{"names": ["nocaps"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
			{"names": ["excluded"], "action": "SCMP_ACT_ERRNO", "excludes": {"caps": ["CAP_SYS_PTRACE"]}},
			{"names": ["arch"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["arm64", "amd64"]}},
			{"names": ["noarch"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["s390x"]}},
			{"names": ["kernel"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "5.10"}},
			{"names": ["nokernel"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "5.11"}},
			{"names": [], "action": "SCMP_ACT_ALLOW"}
		]}`), m)
	must(t, err)
	errno := uint(38)
	allow := func(name string) specs.LinuxSyscall {
		return specs.LinuxSyscall{Names: []string{name}, Action: specs.ActAllow}
	}
	want := &specs.LinuxSeccomp{
		DefaultAction: specs.ActErrno, DefaultErrnoRet: &errno,
		Architectures: []specs.Arch{specs.ArchX86_64, specs.ArchX86},
		Syscalls: []specs.LinuxSyscall{
			{Names: []string{"a", "b"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{{Index: 1, Value: 2, Op: specs.OpEqualTo}}},
			allow("old"), allow("caps"), allow("arch"), allow("kernel"),
		},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	for want, bad := range map[string]string{
		"both 'architectures' and 'archMap'": `{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86"],"archMap":[{}]}`,
		"both 'name' and 'names'":            `{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"name":"a","names":["b"]}]}`,
		"decode seccomp profile":             `[]`,
	} {
		if _, err := parseProfile([]byte(bad), m); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want %q", err, want)
		}
	}
}

func TestUserNamespace(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{"subuid": "other:5:5\nme:100000:1000\n1000:200000:10\nme:-5:3\nme:7:0\n"})
	got := mapping(1000, dir+"/subuid", "sh", []string{"1000", "me"})
	want := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 1000, Size: 1}, {ContainerID: 1, HostID: 100000, Size: 1000}, {ContainerID: 1001, HostID: 200000, Size: 10}}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	for file, helper := range map[string]string{dir + "/none": "sh", dir + "/subuid": "no-such-helper"} {
		if d := cmp.Diff(want[:1], mapping(1000, file, helper, []string{"me"})); d != "" {
			t.Errorf("%s, %s: %s", file, helper, d)
		}
	}
	p := &privilege{plain: true, uids: got, gids: want[:1]}
	for id, want := range map[uint32]bool{0: true, 1: true, 1010: true, 1011: false, 1 << 31: false} {
		if p.has(got, id) != want {
			t.Errorf("user %d: %v", id, !want)
		}
	}
	u := specs.User{AdditionalGids: []uint32{0, 5}}
	if err := p.check(dir, &u); err != nil || u.AdditionalGids != nil {
		t.Errorf("root: %+v, %v", u, err)
	}
	if err := p.check(dir, &specs.User{UID: 3, GID: 3}); err == nil || !strings.Contains(err.Error(), "user 3:3 does not exist in the container of a plain user, which has 1011 users and 1 groups here") {
		t.Errorf("a group that nobody lent: %v", err)
	}
}
