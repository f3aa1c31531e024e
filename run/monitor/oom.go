package monitor

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// oomCount is where the kernel counts the processes of a control group that it
// killed for want of memory. The zero value counts nothing.
type oomCount struct {
	file   string
	before int
}

// countOOM finds the counter of a process that has control groups of its own.
func countOOM(pid int) oomCount {
	own, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return oomCount{}
	}
	ours, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return oomCount{}
	}
	for _, v := range []struct{ controller, dir, file string }{
		{"memory", "/sys/fs/cgroup/memory", "memory.oom_control"},
		{"", "/sys/fs/cgroup", "memory.events"},
	} {
		group, ok := groupOf(own, v.controller)
		if our, _ := groupOf(ours, v.controller); !ok || group == our {
			continue
		}
		o := oomCount{file: filepath.Join(v.dir, group, v.file)}
		if n, err := o.read(); err == nil {
			o.before = n
			return o
		}
	}
	return oomCount{}
}

// groupOf gives the path of a controller's group; that of version 2 is "".
func groupOf(cgroup []byte, controller string) (string, bool) {
	for line := range strings.Lines(string(cgroup)) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(f) == 3 && contains(f[1], controller) {
			return f[2], true
		}
	}
	return "", false
}

func contains(list, name string) bool {
	for s := range strings.SplitSeq(list, ",") {
		if s == name {
			return true
		}
	}
	return false
}

func (o oomCount) read() (n int, err error) {
	b, err := os.ReadFile(o.file)
	if err != nil {
		return 0, err
	}
	_, rest, ok := bytes.Cut(b, []byte("oom_kill "))
	if !ok {
		return 0, fmt.Errorf("read %s: no count", o.file)
	}
	_, err = fmt.Sscan(string(rest), &n)
	return n, err
}

// killed reports whether the kernel killed any. It is asked before the group is
// taken away.
func (o oomCount) killed() bool {
	if o.file == "" {
		return false
	}
	n, err := o.read()
	return err == nil && n > o.before
}
