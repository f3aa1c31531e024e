package monitor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/run"
)

// guest is the program that the tests' containers run, built once.
var guest string

func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "monitor" {
		os.Exit(Main(os.Args[2]))
	}
	if len(os.Args) == 3 && os.Args[1] == "monitor-hidden" {
		hide(os.Args[2])
	}
	dir, err := os.MkdirTemp("", "varve-guest-")
	if err != nil {
		panic(err)
	}
	guest = filepath.Join(dir, "guest")
	cmd := exec.Command("go", "build", "-o", guest, "./testdata/guest")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.CombinedOutput()
	if err != nil {
		fmt.Fprintf(os.Stderr, "build the guest: %v\n%s", err, out)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// hide becomes a monitor that does not see cgroup2 beside version 1: crun refuses
// to run where it does and any controller is there.
func hide(dir string) {
	runtime.LockOSThread()
	err := unix.Unshare(unix.CLONE_NEWNS)
	if err == nil {
		err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	}
	if err == nil {
		err = unix.Mount("hidden", "/sys/fs/cgroup/unified", "tmpfs", 0, "")
	}
	if err == nil {
		err = syscall.Exec("/proc/self/exe", []string{os.Args[0], "monitor", dir}, os.Environ())
	}
	panic(err)
}

// need skips a test where the machine lacks something, which is a failure where
// nothing may be skipped.
func need(t *testing.T, have bool, what string) {
	t.Helper()
	switch {
	case have:
	case os.Getenv("VARVE_NO_SKIP") != "" || os.Getenv("CI") != "":
		t.Fatalf("this machine lacks %s, and nothing may be skipped here", what)
	default:
		t.Skipf("this machine lacks %s", what)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eachRuntime runs a test with every OCI runtime that must work.
func eachRuntime(t *testing.T, test func(t *testing.T, runtime string)) {
	for _, name := range []string{"crun", "runc"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := exec.LookPath(name)
			need(t, err == nil, name)
			test(t, name)
		})
	}
}

// box is a container of a test.
type box struct {
	t    *testing.T
	cfg  Config
	dir  string
	argv []string
}

// newBox makes what a daemon makes of a container before it launches the monitor.
// with may change it.
func newBox(t *testing.T, runtime string, with func(c *Config), cmd ...string) *box {
	t.Helper()
	need(t, os.Geteuid() == 0, "a root user for this test")
	top, err := os.MkdirTemp("", "vm-")
	must(t, err)
	b := &box{t: t, dir: filepath.Join(top, "state")}
	root := filepath.Join(top, "root")
	for _, dir := range []string{b.dir, filepath.Join(root, "bin"), filepath.Join(root, "etc"), filepath.Join(top, "run")} {
		must(t, os.MkdirAll(dir, 0o755))
	}
	must(t, copyFile(guest, filepath.Join(root, "bin/guest"), 0o755))
	must(t, os.WriteFile(filepath.Join(root, "bin/plain"), []byte("no program"), 0o644))
	for _, name := range []string{"echo", "warn", "exit", "cat", "sleep", "lines", "ticks", "trap", "deaf", "tty", "eat", "leave"} {
		must(t, os.Symlink("guest", filepath.Join(root, "bin", name)))
	}
	b.cfg = Config{
		Container: run.Container{
			ID: "vt" + filepath.Base(top)[len("vm-"):], Root: root, Dir: b.dir, Volumes: filepath.Join(top, "volumes"),
			Options: run.Options{Cmd: cmd, Runtime: runtime},
		},
		RuntimeRoot: filepath.Join(top, "run/oci"), Socket: filepath.Join(top, "run/s"),
	}
	if with != nil {
		with(&b.cfg)
	}
	must(t, Write(b.cfg))
	self, err := os.Executable()
	must(t, err)
	b.argv = []string{self, "monitor"}
	if runtime == "crun" && hybridCgroups() {
		b.argv[1] = "monitor-hidden"
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
		defer cancel()
		if err := Reap(ctx, b.dir, b.argv...); err != nil {
			t.Errorf("reap: %v", err)
		}
		if text, err := os.ReadFile(filepath.Join(b.dir, monitorLog)); err == nil && (bytes.Contains(text, []byte("DATA RACE")) || bytes.Contains(text, []byte("goroutine "))) {
			t.Error("the monitor is broken")
		}
		if t.Failed() {
			for _, name := range []string{monitorLog, runtimeLog} {
				if text, err := os.ReadFile(filepath.Join(b.dir, name)); err == nil && len(text) > 0 {
					t.Logf("%s:\n%s", name, text)
				}
			}
		}
		b.nothingLeft()
		must(t, os.RemoveAll(top))
	})
	return b
}

func copyFile(from, to string, mode os.FileMode) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	// What a process that is just being forked has open for writing is not run.
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	return os.WriteFile(to, b, mode)
}

// nothingLeft checks that the container left nothing but its own directory.
func (b *box) nothingLeft() {
	b.t.Helper()
	groups, err := filepath.Glob("/sys/fs/cgroup/*/*/*" + b.cfg.Container.ID + "*")
	must(b.t, err)
	below, err := filepath.Glob(filepath.Join(filepath.Dir(b.cfg.Socket), "*"))
	must(b.t, err)
	hidden, err := filepath.Glob(filepath.Join(filepath.Dir(b.cfg.Socket), ".*"))
	must(b.t, err)
	oci, err := filepath.Glob(filepath.Join(b.cfg.RuntimeRoot, "*"))
	must(b.t, err)
	for _, path := range append(append(append(groups, below...), hidden...), oci...) {
		if path != b.cfg.RuntimeRoot {
			b.t.Errorf("left behind: %s", path)
		}
	}
	for _, pid := range b.processes() {
		b.t.Errorf("left behind: process %d", pid)
	}
}

// processes are those whose root or executable is the container's.
func (b *box) processes() (pids []int) {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		exe, err := os.Readlink(filepath.Join(dir, "exe"))
		cgroup, _ := os.ReadFile(filepath.Join(dir, "cgroup"))
		if err == nil && (strings.HasPrefix(exe, filepath.Dir(b.dir)) || bytes.Contains(cgroup, []byte(b.cfg.Container.ID))) {
			var pid int
			fmt.Sscanf(filepath.Base(dir), "%d", &pid)
			pids = append(pids, pid)
		}
	}
	return pids
}

// testContext ends what would never end. A whole test may have one, on a busy machine.
func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// launch starts the monitor and gives its client.
func (b *box) launch() *Client {
	b.t.Helper()
	ctx := testContext(b.t)
	must(b.t, Launch(ctx, b.dir, b.argv...))
	c, err := Dial(ctx, b.cfg.Socket)
	must(b.t, err)
	return c
}

// result is what a client saw of a process.
type result struct {
	Exit
	out, err string
	failure  error
}

// finish launches and starts the container, and waits for its end.
func (b *box) finish(stdin io.Reader) result {
	b.t.Helper()
	return b.attach(b.launch(), stdin)
}

func (b *box) attach(c *Client, stdin io.Reader) (r result) {
	b.t.Helper()
	var out, errs bytes.Buffer
	r.Exit, r.failure = c.Attach(testContext(b.t), Streams{stdin, &out, &errs}, AttachOptions{Start: true})
	r.out, r.err = out.String(), errs.String()
	return r
}

// begin launches and starts the container, in the background.
func (b *box) begin() *Client {
	b.t.Helper()
	c := b.launch()
	_, err := c.Start(testContext(b.t))
	must(b.t, err)
	return c
}

func (b *box) state() Status {
	b.t.Helper()
	s, err := State(b.dir)
	must(b.t, err)
	return s
}

// until waits for what must come to be.
func until(t *testing.T, what string, true func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !true(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("in vain waited until %s", what)
		}
	}
}

// buffer is a bytes.Buffer for several goroutines.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// logged gives the container's log.
func (b *box) logged() (out, errs string) {
	b.t.Helper()
	var o, e bytes.Buffer
	must(b.t, Logs(testContext(b.t), b.dir, LogOptions{Tail: -1, Stdout: &o, Stderr: &e}))
	return o.String(), e.String()
}

func startErrorOf(t *testing.T, err error) *StartError {
	t.Helper()
	var se *StartError
	if !errors.As(err, &se) {
		t.Fatalf("error %v, want a StartError", err)
	}
	return se
}
