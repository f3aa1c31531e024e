package fs

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/index"
	"github.com/varvefs/varve/metrics"
)

// growingData is a data file whose bytes come in order.
type growingData struct {
	f    *os.File
	mu   sync.Mutex
	cond *sync.Cond
	have int64
	err  error
}

func newGrowingData(t *testing.T) *growingData {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "data"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	d := &growingData{f: f}
	d.cond = sync.NewCond(&d.mu)
	return d
}

// pass has bytes come, whole blocks of them, or the end of them.
func (d *growingData) pass(t *testing.T, content string, err error) {
	t.Helper()
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, err := d.f.WriteAt([]byte(content), d.have); err != nil {
		t.Fatal(err)
	}
	d.have += (int64(len(content)) + index.BlockSize - 1) / index.BlockSize * index.BlockSize
	d.err = err
	d.f.Truncate(d.have)
	d.cond.Broadcast()
}

func (d *growingData) Hold(off, n int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for d.have < off+n && d.err == nil {
		d.cond.Wait()
	}
	return d.err
}

func (d *growingData) Release()    {}
func (d *growingData) Fd() int     { return int(d.f.Fd()) }
func (d *growingData) Size() int64 { d.mu.Lock(); defer d.mu.Unlock(); return d.have }

// growingTest is a mount that the test serves, and so must not touch: children do.
type growingTest struct {
	*testing.T
	dir    string
	g      *index.Growing
	layers []*growingData
}

func newGrowingTest(t *testing.T, layers int) *growingTest {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: it mounts")
	}
	if _, err := os.Stat(fuseDevice); err != nil {
		t.Skip("needs " + fuseDevice)
	}
	m := &growingTest{T: t, dir: t.TempDir(), g: index.NewGrowing(layers)}
	var data []Data
	for range layers {
		d := newGrowingData(t)
		m.layers, data = append(m.layers, d), append(data, d)
	}
	o := Options{
		Metrics: metrics.New(nil), Log: slog.New(slog.NewTextHandler(os.Stderr, nil)), Xattrs: true,
		Fault: func(device int, off int64, err error) { t.Logf("device %d at %d: %v", device, off, err) },
	}
	served, err := Serve(m.dir, NewGrowing(m.g, data, o), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		m.g.Fail(errors.New("the test is over"))
		for _, d := range m.layers {
			d.pass(t, "", errors.New("the test is over"))
		}
		if err := unbusy(ErrBusy, func() error { return served.Unmount(false) }); err != nil {
			t.Error(err, served.Unmount(true))
		}
	})
	return m
}

// unbusy unmounts, and tries for a minute while the mount is busy: RELEASE is
// asynchronous.
func unbusy(busy error, unmount func() error) error {
	for end := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		if err := unmount(); !errors.Is(err, busy) || time.Now().After(end) {
			return err
		}
	}
}

func (m *growingTest) add(layer int, es ...index.Entry) {
	m.Helper()
	for _, e := range es {
		if err := m.g.Add(layer, e); err != nil {
			m.Fatal(err)
		}
	}
}

// run runs a program in the mount and gives what it prints.
func (m *growingTest) run(args ...string) (string, error) {
	m.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	// Not by cmd.Dir: between fork and exec the test would touch its mount.
	cmd.Args = append([]string{"sh", "-c", `cd "$0" && exec "$@"`, m.dir}, args...)
	cmd.Path, cmd.Err = "/bin/sh", nil
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	return strings.TrimSpace(string(out)), err
}

// want is run with what is to come of it; what begins with ! is to be in an error.
func (m *growingTest) want(want string, args ...string) {
	m.Helper()
	out, err := m.run(args...)
	if fails, ok := strings.CutPrefix(want, "!"); ok {
		if err == nil || !strings.Contains(out, fails) {
			m.Errorf("%q: %q, %v, want the error %q", args, out, err, fails)
		}
	} else if err != nil || out != want {
		m.Errorf("%q: %q, %v, want %q", args, out, err, want)
	}
}

// later is want of a program that must not end before what is done next.
func (m *growingTest) later(want string, args ...string) (ends func()) {
	m.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		m.want(want, args...)
	}()
	select {
	case <-done:
		m.Errorf("%q did not wait", args)
	case <-time.After(200 * time.Millisecond):
	}
	return func() { <-done }
}

func regular(name string, size, data int64) index.Entry {
	return index.Entry{Name: name, Mode: unix.S_IFREG | 0o644, Size: size, Data: data, Mtime: 7}
}

func directory(name string) index.Entry {
	return index.Entry{Name: name, Mode: unix.S_IFDIR | 0o755, Mtime: 7}
}

func TestGrowingMount(t *testing.T) {
	m := newGrowingTest(t, 2)
	m.want("", "ls")
	m.layers[0].pass(t, "lower", nil)
	m.add(0, directory("d"), regular("d/low", 5, 0), regular("covered", 5, 0), regular("gone", 5, 0))
	m.g.Complete(0)
	m.want("covered\nd\ngone", "ls")
	m.add(1, directory("d"), regular("d/up", 2, 0))
	m.want("low\nup", "ls", "d")

	up := m.later("up", "cat", "d/up") // its bytes
	m.layers[1].pass(t, "up", nil)
	up()
	low := m.later("lower", "cat", "d/low")
	covered := m.later("", "cat", "covered")
	gone := m.later("!No such file", "cat", "gone")
	never := m.later("!No such file", "stat", "d/never")
	late := m.later("again", "cat", "late")
	m.add(1, regular("covered", 0, 0), regular(".wh.gone", 0, 0))
	covered()
	gone()
	m.want("covered\nd", "ls")
	e := regular("late", 5, 4096)
	e.UID, e.Xattrs = 12, []index.Xattr{{Name: "trusted.t", Value: []byte("t")}, {Name: "user.u", Value: []byte("value")}, {Name: "weird.w"}}
	m.add(1, e, index.Entry{Name: "d/hard", HardLink: true, Link: "late"}, index.Entry{Name: "sym", Mode: unix.S_IFLNK | 0o777, Link: "d/up"})
	m.layers[1].pass(t, "again", nil)
	late()
	m.want("covered\nd\nlate\nsym", "ls")
	m.want("5 2 12 644 7", "stat", "-c", "%s %h %u %a %Y", "late")
	m.want("same", "sh", "-c", "test late -ef d/hard && echo same")
	m.want("d/up", "readlink", "sym")
	m.want("up", "cat", "sym")
	if _, err := exec.LookPath("getfattr"); err == nil {
		m.want("# file: late\ntrusted.t=\"t\"\nuser.u=\"value\"", "getfattr", "-d", "-m", "-", "late")
		m.want("!No such attribute", "getfattr", "-n", "user.none", "late")
	} else {
		t.Log("getfattr is missing: extended attributes are not looked at")
	}
	m.g.Complete(1)
	low()
	never()
	m.want("!Read-only file system", "touch", "new")
	m.want("./covered\n./d\n./d/hard\n./d/low\n./d/up\n./late\n./sym", "sh", "-c", "find . -mindepth 1 | sort")
}

func TestGrowingMountFails(t *testing.T) {
	m := newGrowingTest(t, 1)
	m.add(0, directory("d"), regular("f", 5, 0))
	m.want("d\nf", "ls")
	waits := m.later("!Input/output error", "stat", "d/never")
	reads := m.later("!Input/output error", "cat", "f")
	m.layers[0].pass(t, "", errors.New("gone"))
	reads()
	m.g.Fail(errors.New("gone"))
	waits()
	for _, args := range [][]string{{"ls", m.dir}, {"stat", m.dir}, {"stat", filepath.Join(m.dir, "f")}, {"stat", filepath.Join(m.dir, "none")}} {
		out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "Input/output error") {
			t.Errorf("%q: %s, %v", args, out, err)
		}
	}
}

// TestGrowingBigListing lists more than one answer holds while names come.
func TestGrowingBigListing(t *testing.T) {
	m := newGrowingTest(t, 2)
	const n = 4000
	names := func(layer, from, to int) {
		for i := from; i < to; i++ {
			m.add(layer, regular(fmt.Sprintf("name-%06d", i), 0, 0))
		}
	}
	names(0, 0, n/2)
	var wg sync.WaitGroup
	wg.Go(func() {
		names(1, n/4, n)
		m.g.Complete(1)
		m.g.Complete(0)
	})
	for range 5 {
		out, err := m.run("ls", "-U")
		names := strings.Fields(out)
		slices.Sort(names)
		if all := len(names); err != nil || len(slices.Compact(names)) != all || all < n/2 {
			t.Errorf("%d names, some twice: %v", all, err)
		}
	}
	wg.Wait()
	m.want(fmt.Sprint(n), "sh", "-c", "ls | wc -l")
	m.want(fmt.Sprint(n), "sh", "-c", "ls -l | grep -c name")
}

// growingClientEnv has TestGrowingClient be a Go program that stats a file.
const growingClientEnv = "VARVE_TEST_GROWING_CLIENT"

// TestGrowingClient is no test but where TestGrowingSignals has it run.
func TestGrowingClient(t *testing.T) {
	path := os.Getenv(growingClientEnv)
	if path == "" {
		return
	}
	runtime.LockOSThread()
	fmt.Println("thread", unix.Gettid())
	var st unix.Stat_t
	fmt.Println("stat", unix.Lstat(path, &st)) // without os.Lstat's tries after EINTR
}

// client starts TestGrowingClient and waits until it has been in the mount for a
// while.
func (m *growingTest) client(path string) (cmd *exec.Cmd, tid int, out *bufio.Reader) {
	m.Helper()
	cmd = exec.Command("/proc/self/exe", "-test.run=^TestGrowingClient$")
	cmd.Env = append(os.Environ(), growingClientEnv+"="+filepath.Join(m.dir, path))
	pipe, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		m.Fatal(err)
	}
	out = bufio.NewReader(pipe)
	line, err := out.ReadString('\n')
	if _, serr := fmt.Sscanf(line, "thread %d", &tid); serr != nil {
		m.Fatalf("the child says %q, %v", line, err)
	}
	time.Sleep(200 * time.Millisecond)
	return cmd, tid, out
}

// TestGrowingSignals interrupts programs that wait for a name: one that lives on
// must not see it, one that is killed must not stay.
func TestGrowingSignals(t *testing.T) {
	m := newGrowingTest(t, 1)
	cmd, tid, out := m.client("late")
	for range 20 {
		// Go programs handle this one, and are sent it all the time.
		if err := unix.Tgkill(cmd.Process.Pid, tid, unix.SIGURG); err != nil {
			t.Error(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
	m.add(0, regular("late", 0, 0))
	if line, _ := out.ReadString('\n'); line != "stat <nil>\n" {
		t.Errorf("a program that was interrupted says %q", line)
	}
	cmd.Wait()

	// After a signal that does not end it the kernel tells of none that does.
	for _, sigs := range [][]syscall.Signal{{unix.SIGKILL}, {unix.SIGURG, unix.SIGKILL}} {
		cmd, tid, _ := m.client("never")
		for _, sig := range sigs {
			if err := unix.Tgkill(cmd.Process.Pid, tid, sig); err != nil {
				t.Error(err)
			}
			time.Sleep(50 * time.Millisecond)
		}
		waits(t, cmd, sigs)
	}
	for _, sig := range []syscall.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGQUIT} {
		cmd := exec.Command("stat", filepath.Join(m.dir, "never"))
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(200 * time.Millisecond)
		cmd.Process.Signal(sig)
		waits(t, cmd, sig)
	}
}

func waits(t *testing.T, cmd *exec.Cmd, what any) {
	t.Helper()
	start := time.Now()
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	select {
	case err := <-done:
		t.Logf("%v: %v after %v", what, err, time.Since(start).Round(time.Millisecond))
	case <-time.After(time.Minute):
		t.Errorf("%v does not end a program that waits", what)
	}
}
