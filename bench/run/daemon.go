package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/daemon"
)

// server is a daemon with a store of its own.
type server struct {
	bench  *bench
	root   string
	cmd    *exec.Cmd
	client *daemon.Client
	http   *http.Client
}

// serve starts a daemon on a store that must not be in use; a store of that name
// is made if there is none. The daemon's start is no part of any figure.
func (b *bench) serve(ctx context.Context, name string) (*server, error) {
	s := &server{bench: b, root: filepath.Join(b.dir, name)}
	if err := os.MkdirAll(s.root, 0o755); err != nil {
		return nil, err
	}
	dirs, err := daemon.DirsFromEnv(s.root)
	if err != nil {
		return nil, err
	}
	log, err := os.OpenFile(filepath.Join(s.root, "daemon.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	s.cmd = exec.Command(b.varve, "--root", s.root, "daemon")
	s.cmd.Env = append(os.Environ(), "VARVE_CONFIG="+filepath.Join(s.root, "config"))
	s.cmd.Dir = "/"
	s.cmd.Stdout, s.cmd.Stderr = log, log
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	s.client = daemon.NewClient(dirs)
	s.client.Start = false
	s.client.Notice = func(line string) { b.say("%s: %s", name, line) }
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", dirs.Socket)
	}
	s.http = &http.Client{Transport: &http.Transport{DialContext: dial}}
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		if _, err := s.client.Version(ctx); err == nil {
			return s, nil
		}
		if ctx.Err() != nil || time.Now().After(deadline) {
			return nil, errors.Join(fmt.Errorf("the daemon of %s does not answer", s.root), ctx.Err(), s.stop())
		}
	}
}

// stop ends the daemon and waits for it. The store stays.
func (s *server) stop() error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	err := s.client.Stop(ctx)
	s.http.CloseIdleConnections()
	return errors.Join(err, s.cmd.Wait())
}

// again starts the daemon of a store once more. It gives s itself with an error.
func (s *server) again(ctx context.Context) (*server, error) {
	n, err := s.bench.serve(ctx, filepath.Base(s.root))
	if err != nil {
		return s, err
	}
	return n, nil
}

// discard ends the daemon and removes its store.
func (s *server) discard() error {
	if err := s.stop(); err != nil {
		return err
	}
	return s.bench.remove(s.root)
}

// remove removes a directory of ours in which nothing is mounted any more.
func (b *bench) remove(dir string) error {
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	if bytes.Contains(info, []byte(" "+dir+"/")) {
		return fmt.Errorf("something is still mounted below %s", dir)
	}
	return os.RemoveAll(dir)
}

// fresh is a daemon with an empty store.
func (b *bench) fresh(ctx context.Context, name string) (*server, error) {
	if err := b.remove(filepath.Join(b.dir, name)); err != nil {
		return nil, err
	}
	return b.serve(ctx, name)
}

func (s *server) mount(ctx context.Context, image, face string) (*daemon.Mount, error) {
	return s.client.Mount(ctx, daemon.MountOptions{ImageOptions: daemon.ImageOptions{Image: image, Insecure: true}, Face: face, Name: "m"})
}

func (s *server) unmount(ctx context.Context) error {
	_, err := s.client.Unmount(ctx, daemon.UnmountOptions{Mount: "m", Force: true})
	return err
}

// cpu is what the daemon has computed so far, all threads, ended ones too.
// The clock of another process: clock_getcpuclockid(3).
func (s *server) cpu() (time.Duration, error) { return cpuOf(s.cmd.Process.Pid) }

func cpuOf(pid int) (time.Duration, error) {
	var t unix.Timespec
	const sched = 2 // CPUCLOCK_SCHED, linux/posix-timers.h
	err := unix.ClockGettime(int32(^pid<<3|sched), &t)
	return time.Duration(t.Nano()), err
}

// fuseRequests counts what the kernel has asked the daemon, by operation.
func (s *server) fuseRequests(ctx context.Context) (map[string]int64, int64, error) {
	ops, sum := map[string]int64{}, int64(0)
	err := s.metrics(ctx, func(name, labels string, v float64) {
		if name == "varve_fuse_request_duration_seconds_count" {
			_, op, _ := strings.Cut(labels, `op="`)
			op, _, _ = strings.Cut(op, `"`)
			ops[op] += int64(v)
			sum += int64(v)
		}
	})
	return ops, sum, err
}

// metrics reads all samples of the daemon.
func (s *server) metrics(ctx context.Context, fn func(name, labels string, v float64)) error {
	body, err := s.get(ctx, "/metrics")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(body)) {
		i := strings.LastIndexByte(line, ' ')
		if i < 0 || line[0] == '#' {
			continue
		}
		name, labels, _ := strings.Cut(line[:i], "{")
		v, err := strconv.ParseFloat(strings.TrimSpace(line[i+1:]), 64)
		if err != nil {
			return fmt.Errorf("metric %s: %w", name, err)
		}
		fn(name, labels, v)
	}
	return nil
}

func (s *server) get(ctx context.Context, path string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://varve"+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := s.http.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("get %s: %s", path, resp.Status)
	}
	return body, err
}

// lastDur is the time that the daemon itself says its latest mount took.
func (s *server) lastDur() (d time.Duration, err error) {
	f, err := os.Open(filepath.Join(s.root, "daemon.log"))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		if _, dur, ok := strings.Cut(sc.Text(), " dur="); ok && strings.Contains(sc.Text(), "msg=mounted") {
			dur, _, _ = strings.Cut(dur, " ")
			if d, err = time.ParseDuration(dur); err != nil {
				return 0, err
			}
		}
	}
	if d == 0 {
		return 0, errors.New("the daemon's log has no mount")
	}
	return d, nil
}
