package run

import (
	"bufio"
	"bytes"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// cgroups is what this machine has of control groups.
type cgroups struct {
	unified     bool            // version 2 alone
	controllers map[string]bool // memory, cpu, cpuset, pids, devices...
	swap        bool            // memory and swap can be limited
	cfs         bool            // a share of processors can be
}

const cgroupRoot = "/sys/fs/cgroup"

// readCgroups looks at what is mounted.
func readCgroups() (cgroups, error) {
	c := cgroups{controllers: map[string]bool{}}
	var st unix.Statfs_t
	if err := unix.Statfs(cgroupRoot, &st); err == nil && st.Type == unix.CGROUP2_SUPER_MAGIC {
		c.unified = true
		raw, err := os.ReadFile(filepath.Join(cgroupRoot, "cgroup.controllers"))
		if err != nil {
			return c, err
		}
		for name := range strings.FieldsSeq(string(raw)) {
			c.controllers[name] = true
		}
		// The devices of version 2 are a program's, not a controller's.
		c.controllers["devices"] = true
		// The root itself has no limits; whether its children's have swap is seen
		// in any of them.
		found, _ := filepath.Glob(filepath.Join(cgroupRoot, "*", "memory.swap.max"))
		c.swap, c.cfs = len(found) > 0, c.controllers["cpu"]
		return c, nil
	}
	raw, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return c, err
	}
	c.readV1(raw)
	return c, nil
}

// readV1 takes the controllers of version 1 from a mountinfo (proc_pid_mountinfo(5)).
func (c *cgroups) readV1(mountinfo []byte) {
	lines := bufio.NewScanner(bytes.NewReader(mountinfo))
	for lines.Scan() {
		left, right, _ := strings.Cut(lines.Text(), " - ")
		l, r := strings.Fields(left), strings.Fields(right)
		if len(l) < 5 || len(r) < 3 || r[0] != "cgroup" || !strings.HasPrefix(l[4], cgroupRoot+"/") {
			continue
		}
		for name := range strings.SplitSeq(r[2], ",") {
			c.controllers[name] = true
			switch name {
			case "memory":
				_, err := os.Stat(filepath.Join(l[4], "memory.memsw.limit_in_bytes"))
				c.swap = err == nil
			case "cpu":
				_, err := os.Stat(filepath.Join(l[4], "cpu.cfs_quota_us"))
				c.cfs = err == nil
			}
		}
	}
}

// none says that there is nothing to put a container into.
func (c *cgroups) none() bool { return len(c.controllers) == 0 }
