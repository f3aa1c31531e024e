package test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// edition is a containerd that is installed.
type edition struct {
	name string
	bin  string // the directory of its programs
}

// editions gives the distribution's containerd and the newest.
func editions(t *testing.T) []edition {
	t.Helper()
	needRoot(t)
	for _, p := range []string{"containerd", "ctr", "runc", "crun"} {
		_, err := exec.LookPath(p)
		need(t, err == nil, p+" (scripts/deps installs it)")
	}
	packaged := mustGet[string](t)(exec.LookPath("containerd"))
	version, err := exec.Command("go", "list", "-m", "-f", "{{.Version}}", "github.com/containerd/containerd/v2").Output()
	must(t, err)
	cache := mustGet[string](t)(os.UserCacheDir())
	built := filepath.Join(cache, "varve-test", "containerd-"+strings.TrimSpace(string(version)))
	_, err = os.Stat(filepath.Join(built, "containerd"))
	need(t, err == nil, "the newest containerd (scripts/containerd builds it)")
	return []edition{{"packaged", filepath.Dir(packaged)}, {"newest", built}}
}

// ctrd is a containerd with directories and a socket of its own, a daemon of varve's
// as its snapshotter, and a user who drives it.
type ctrd struct {
	*host
	*client.Client
	ctx       context.Context // has the namespace, and a deadline for all
	namespace string
	dir       string
	bin       string
	major     int    // version
	pause     string // image of CRI's sandboxes, "" for no CRI
	runc      string // the runtime of containers
	cmd       *exec.Cmd
}

// crunAnywhere is crun for machines that have control groups of both versions, which
// it refuses: it does not see the second.
const crunAnywhere = `#!/bin/sh
exec unshare --mount --propagation slave sh -c '
	! mountpoint -q /sys/fs/cgroup/unified || umount /sys/fs/cgroup/unified
	exec crun --cgroup-manager=disabled "$@"' crun "$@"
`

// withContainerd runs a test with each containerd, both at once.
func withContainerd(t *testing.T, f func(t *testing.T, c *ctrd)) {
	t.Helper()
	for _, e := range editions(t) {
		t.Run(e.name, func(t *testing.T) {
			t.Parallel()
			f(t, newCtrd(t, e, ""))
		})
	}
}

func newCtrd(t *testing.T, e edition, pause string) *ctrd {
	t.Helper()
	h := newHost(t)
	h.ok("ps") // the daemon is there
	c := &ctrd{host: h, bin: e.bin, pause: pause, runc: "runc", major: 2}
	if out, err := exec.Command(filepath.Join(c.bin, "containerd"), "--version").Output(); err != nil {
		t.Fatal(err)
	} else if v := strings.Fields(string(out)); len(v) > 2 && strings.HasPrefix(strings.TrimPrefix(v[2], "v"), "1.") {
		c.major = 1
	}
	c.dir = mustGet[string](t)(os.MkdirTemp("", "vt-c-"))
	c.namespace = filepath.Base(c.dir) // runc keeps its state by namespace, whichever containerd asks
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(context.Background(), c.namespace), 8*time.Minute)
	c.ctx = ctx
	must(t, os.WriteFile(c.path("config.toml"), []byte(c.config()), 0o644))
	must(t, os.WriteFile(c.path("crun"), []byte(crunAnywhere), 0o755))
	t.Cleanup(func() { c.end(); cancel() })
	c.up()
	return c
}

func (c *ctrd) path(name string) string { return filepath.Join(c.dir, name) }
func (c *ctrd) socket() string          { return c.path("sock") }

// config is what an administrator would write, but for directories and addresses,
// and without what a test does not use.
func (c *ctrd) config() string {
	disabled := []string{"io.containerd.nri.v1.nri", "io.containerd.tracing.processor.v1.otlp"}
	for _, s := range []string{"aufs", "blockfile", "btrfs", "devmapper", "erofs", "zfs"} {
		disabled = append(disabled, "io.containerd.snapshotter.v1."+s)
	}
	if c.pause == "" {
		disabled = append(disabled, "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime")
	}
	text := fmt.Sprintf(`root = %q
state = %q
disabled_plugins = ["%s"]
[debug]
  level = "warn"
[grpc]
  address = %q
[plugins.'io.containerd.internal.v1.opt']
  path = %q
[proxy_plugins.varve]
  type = "snapshot"
  address = %q
  [proxy_plugins.varve.exports]
    root = %q
    enable_remote_snapshot_annotations = "true"
`, c.path("root"), c.path("state"), strings.Join(disabled, `", "`), c.socket(), c.path("opt"),
		filepath.Join(c.root, "run", "snapshotter.sock"), filepath.Join(c.root, "state", "containerd"))
	cri := c.pause != ""
	if c.major == 1 {
		text = "version = 2\n" + text
		if cri {
			text += fmt.Sprintf(`
[plugins.'io.containerd.grpc.v1.cri']
  sandbox_image = %q
  stats_collect_period = 1
  restrict_oom_score_adj = true
  [plugins.'io.containerd.grpc.v1.cri'.containerd]
    snapshotter = "varve"
    disable_snapshot_annotations = false
  [plugins.'io.containerd.grpc.v1.cri'.cni]
    conf_dir = %q
`, c.pause, c.path("cni"))
		}
		return text
	}
	// Rows replace the default, which is the first.
	text = "version = 3\n" + text
	for _, s := range []string{"overlayfs", "varve"} {
		text += fmt.Sprintf("[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\n  platform = %q\n  snapshotter = %q\n", "linux/"+runtime.GOARCH, s)
	}
	if cri {
		text += fmt.Sprintf(`
[plugins.'io.containerd.cri.v1.images']
  snapshotter = "varve"
  stats_collect_period = 1
  [plugins.'io.containerd.cri.v1.images'.pinned_images]
    sandbox = %q
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    conf_dir = %q
`, c.pause, c.path("cni"))
	}
	return text
}

// up starts it and waits until it answers.
func (c *ctrd) up() {
	c.t.Helper()
	log := mustGet[*os.File](c.t)(os.OpenFile(c.path("log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644))
	defer log.Close()
	c.cmd = exec.Command(filepath.Join(c.bin, "containerd"), "--config", c.path("config.toml"))
	c.cmd.Dir = "/"
	c.cmd.Env = append(os.Environ(), "PATH="+c.bin+":"+os.Getenv("PATH")) // its shim
	c.cmd.Stdout, c.cmd.Stderr = log, log
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	must(c.t, c.cmd.Start())
	ended := make(chan error, 1)
	go func(cmd *exec.Cmd) { ended <- cmd.Wait() }(c.cmd)
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		select {
		case err := <-ended:
			c.cmd = nil
			c.t.Fatalf("containerd has ended: %v\n%s", err, c.said())
		default:
		}
		if c.answers() {
			return
		}
		if time.Now().After(end) {
			c.t.Fatalf("containerd does not answer\n%s", c.said())
		}
	}
}

// answers reports whether it serves, and CRI where it has that, which begins a moment
// after the rest.
func (c *ctrd) answers() bool {
	if c.Client == nil {
		var err error
		if c.Client, err = client.New(c.socket(), client.WithTimeout(time.Second)); err != nil {
			return false
		}
	}
	ctx, cancel := context.WithTimeout(c.ctx, time.Second)
	defer cancel()
	if ok, err := c.IsServing(ctx); !ok || err != nil {
		return false
	}
	_, err := cri.NewRuntimeServiceClient(c.Conn().(*grpc.ClientConn)).Status(ctx, &cri.StatusRequest{})
	return err == nil || status.Code(err) == codes.Unimplemented
}

// said gives the end of its log.
func (c *ctrd) said() string {
	b, _ := os.ReadFile(c.path("log"))
	return string(b[max(0, len(b)-8000):])
}

// down ends it, in order or as a crash does. Containers go on.
func (c *ctrd) down(sig syscall.Signal) {
	c.t.Helper()
	if c.Client != nil {
		c.Client.Close()
		c.Client = nil
	}
	fd, err := pidfdOpen(c.cmd.Process.Pid)
	if errors.Is(err, syscall.ESRCH) {
		c.cmd = nil
		return
	}
	must(c.t, err)
	defer syscall.Close(fd)
	must(c.t, c.cmd.Process.Signal(sig))
	must(c.t, waitGone(fd))
	c.cmd = nil
}

// end ends it and everything that it has started. Nothing of it may be left.
func (c *ctrd) end() {
	t := c.t
	if t.Failed() {
		t.Logf("containerd's log:\n%s", c.said())
	}
	if c.cmd != nil {
		if !t.Failed() && c.answers() {
			for _, k := range mustGet[[]client.Container](t)(c.Containers(c.ctx)) {
				t.Errorf("the test has left container %s", k.ID())
			}
		}
		c.down(syscall.SIGTERM)
	}
	// One that was told to end may take a moment.
	for end := time.Now().Add(time.Minute); len(c.shims()) > 0 && !t.Failed() && time.Now().Before(end); {
		time.Sleep(20 * time.Millisecond)
	}
	for pid, line := range c.shims() {
		t.Errorf("a shim is left: %s", line)
		for _, child := range childrenOf(pid) {
			syscall.Kill(child, syscall.SIGKILL)
		}
		syscall.Kill(pid, syscall.SIGKILL)
	}
	for _, line := range mountsBelow(t, c.dir) {
		t.Errorf("a mount is left: %s", line)
		syscall.Unmount(strings.Fields(line)[4], syscall.MNT_DETACH)
	}
	// What runtimes leave of a namespace in any case.
	for _, pattern := range []string{"/sys/fs/cgroup/*/%s*/*", "/sys/fs/cgroup/*/%s*", "/sys/fs/cgroup/%s*/*", "/sys/fs/cgroup/%s*"} {
		groups, _ := filepath.Glob(fmt.Sprintf(pattern, c.namespace))
		for _, dir := range groups {
			syscall.Rmdir(dir) // but for the files in it, which are not
		}
	}
	states, _ := filepath.Glob("/run/containerd/runc/" + c.namespace + "*")
	for _, dir := range states {
		must(t, os.RemoveAll(dir))
	}
	must(t, os.RemoveAll(c.dir))
}

// childrenOf gives the children of a process.
func childrenOf(pid int) (all []int) {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", pid))
	for f := range strings.FieldsSeq(string(b)) {
		if n, err := strconv.Atoi(f); err == nil {
			all = append(all, n)
		}
	}
	return all
}

// shims gives the processes that stand beside containers.
func (c *ctrd) shims() map[int]string {
	all := map[int]string{}
	lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range lines {
		b, err := os.ReadFile(path)
		if err == nil && bytes.Contains(b, []byte("-address\x00"+c.socket()+"\x00")) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			all[pid] = strings.ReplaceAll(string(b), "\x00", " ")
		}
	}
	return all
}

// mountsBelow gives the lines of mountinfo for what lies below a directory.
func mountsBelow(t *testing.T, dir string) (lines []string) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	for line := range strings.Lines(string(b)) {
		if strings.HasPrefix(strings.Fields(line)[4], dir+"/") {
			lines = append(lines, line)
		}
	}
	return lines
}

// ctr runs containerd's own client to its end.
func (c *ctrd) ctr(args ...string) result {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.ctx, time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(c.bin, "ctr"), append([]string{"--address", c.socket(), "--namespace", c.namespace}, args...)...)
	cmd.Dir = "/"
	return finish(c.t, cmd, append([]string{"(ctr)"}, args...))
}

func (c *ctrd) ctrOK(args ...string) string {
	c.t.Helper()
	r := c.ctr(args...)
	if r.code != 0 {
		c.t.Fatal(r)
	}
	return strings.TrimSuffix(r.out, "\n")
}

// ctrRun has ctr run a container to its end, and gives what that wrote to its stdout.
// It writes to a file: ctr closes its own end of the pipes without having opened it
// where the container is faster.
func (c *ctrd) ctrRun(snapshotter, ref string, args ...string) result {
	c.t.Helper()
	said := c.path("said")
	r := c.ctr(append([]string{"run", "--rm", "--net-host", "--log-uri", "file://" + said, "--snapshotter", snapshotter, ref, "ctr"}, args...)...)
	b, err := os.ReadFile(said)
	if err == nil {
		err = os.Remove(said)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) { // it may not have come to it
		c.t.Fatal(err)
	}
	r.out += string(b)
	return r
}
