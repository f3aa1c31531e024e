package monitor

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestEnds(t *testing.T) {
	for _, c := range []struct {
		name    string
		cmd     []string
		code    int
		out     string
		errs    string
		failure string
	}{
		{name: "success", cmd: []string{"echo", "hello"}, out: "hello\n"},
		{name: "stderr", cmd: []string{"warn", "oh"}, errs: "oh\n"},
		{name: "failure", cmd: []string{"exit", "1"}, code: 1},
		{name: "code", cmd: []string{"exit", "42"}, code: 42},
		{name: "no such name", cmd: []string{"nothere"}, code: 127, failure: `exec: "nothere": executable file not found in $PATH`},
		{name: "no such path", cmd: []string{"/bin/nothere", "x"}, code: 127, failure: `exec: "/bin/nothere": stat /bin/nothere: no such file or directory`},
		{name: "no program", cmd: []string{"/bin/plain"}, code: 126, failure: `exec: "/bin/plain": permission denied`},
		{name: "no command", code: 125, failure: "no command specified"},
	} {
		t.Run(c.name, func(t *testing.T) {
			eachRuntime(t, func(t *testing.T, runtime string) {
				b := newBox(t, runtime, nil, c.cmd...)
				r := b.finish(nil)
				s := b.state()
				if c.failure == "" {
					if r.failure != nil || r.Code != c.code || r.out != c.out || r.err != c.errs {
						t.Errorf("came to %+v, want %+v", r, c)
					}
					if s.State != Exited || s.Exit == nil || s.Exit.Code != c.code || s.Started.IsZero() || s.Exit.Finished.Before(s.Started) || s.Pid != 0 || s.Monitor != 0 {
						t.Errorf("status %+v, exit %+v", s, s.Exit)
					}
					if out, errs := b.logged(); out != c.out || errs != c.errs {
						t.Errorf("the log has %q and %q", out, errs)
					}
					return
				}
				se := startErrorOf(t, r.failure)
				if se.Code != c.code || se.Message != c.failure || r.out != "" || r.err != "" {
					t.Errorf("came to %d %q (%q, %q), want %d %q", se.Code, se.Message, r.out, r.err, c.code, c.failure)
				}
				if s.State != Created || s.Exit == nil || s.Exit.Code != c.code || s.Exit.Error != c.failure || !s.Started.IsZero() {
					t.Errorf("status %+v, exit %+v", s, s.Exit)
				}
				if out, errs := b.logged(); out != "" || errs != "" {
					t.Errorf("the log has %q and %q", out, errs)
				}
			})
		})
	}
}

func TestKilled(t *testing.T) {
	eachRuntime(t, func(t *testing.T, runtime string) {
		b := newBox(t, runtime, nil, "sleep", "1000")
		c := b.begin()
		s := b.state()
		if s.State != Running || s.Pid <= 1 || s.Monitor <= 1 {
			t.Fatalf("status %+v", s)
		}
		// By nobody's request, as the kernel would.
		must(t, unix.Kill(s.Pid, unix.SIGKILL))
		e, err := c.Wait(testContext(t))
		if err != nil && !errors.Is(err, ErrGone) || err == nil && e.Code != 137 {
			t.Errorf("wait: %+v, %v", e, err)
		}
		s, err = Wait(testContext(t), b.dir)
		if err != nil || s.State != Exited || s.Exit.Code != 137 || s.Exit.OOMKilled {
			t.Errorf("status %+v, exit %+v, %v", s, s.Exit, err)
		}
		until(t, "nobody answers", func() bool {
			_, err := Dial(testContext(t), b.cfg.Socket)
			return errors.Is(err, ErrGone)
		})
	})
}

func TestStop(t *testing.T) {
	eachRuntime(t, func(t *testing.T, runtime string) {
		const long = time.Hour // for who ends by itself, however busy the machine is
		for _, c := range []struct {
			cmd   string
			sig   syscall.Signal
			grace time.Duration
			code  int
		}{{"trap", unix.SIGTERM, long, 3}, {"trap", unix.SIGUSR1, long, 3}, {"deaf", unix.SIGTERM, 500 * time.Millisecond, 137}} {
			b := newBox(t, runtime, nil, c.cmd)
			client := b.begin()
			until(t, "it is ready", func() bool { out, _ := b.logged(); return out == "ready\n" })
			e, err := client.Stop(testContext(t), c.sig, c.grace)
			if err != nil || e.Code != c.code {
				t.Errorf("stop %s with %v: %+v, %v", c.cmd, c.sig, e, err)
			}
		}
	})
}

func TestMonitorSignalled(t *testing.T) {
	b := newBox(t, "runc", nil, "trap")
	b.begin()
	until(t, "it is ready", func() bool { out, _ := b.logged(); return out == "ready\n" })
	must(t, unix.Kill(b.state().Monitor, unix.SIGTERM))
	if s, err := Wait(testContext(t), b.dir); err != nil || s.State != Exited || s.Exit.Code != 3 {
		t.Errorf("status %+v, %v", s, err)
	}
}

func TestAgain(t *testing.T) {
	eachRuntime(t, func(t *testing.T, runtime string) {
		b := newBox(t, runtime, nil, "echo", "once")
		first := b.finish(nil)
		started := b.state().Started
		second := b.finish(nil)
		if first.failure != nil || second.failure != nil || second.out != "once\n" || !b.state().Started.After(started) {
			t.Errorf("%+v, then %+v", first, second)
		}
		if out, _ := b.logged(); out != "once\nonce\n" {
			t.Errorf("the log has %q", out)
		}
	})
}

func TestTwoMonitors(t *testing.T) {
	b := newBox(t, "runc", nil, "sleep", "1000")
	b.begin()
	err := Launch(testContext(t), b.dir, b.argv...)
	if err == nil || !strings.Contains(err.Error(), "already running") {
		t.Errorf("a second monitor: %v", err)
	}
	if s := b.state(); s.State != Running {
		t.Errorf("status %+v", s)
	}
}

func TestBeforeTheStart(t *testing.T) {
	eachRuntime(t, func(t *testing.T, runtime string) {
		b := newBox(t, runtime, nil, "echo", "never")
		c := b.launch()
		ctx := testContext(t)
		if s := b.state(); s.State != Created || s.Monitor == 0 || s.Exit != nil {
			t.Errorf("status %+v", s)
		}
		if err := c.Pause(ctx); err == nil {
			t.Error("it was paused before it was started")
		}
		if _, err := c.Exec(ctx, Streams{}, ExecOptions{Process: execOptions("echo", "x")}); err == nil {
			t.Error("a process ran in it before it was started")
		}
		if err := c.Signal(ctx, unix.SIGUSR1); err == nil {
			t.Error("it took a signal before it was started")
		}
		attached := make(chan error, 1)
		go func() {
			_, err := c.Attach(ctx, Streams{}, AttachOptions{})
			attached <- err
		}()
		must(t, c.Signal(ctx, unix.SIGINT))
		if err := <-attached; !errors.Is(err, ErrGone) {
			if se := startErrorOf(t, err); se.Code != 130 {
				t.Errorf("attached: %+v", se)
			}
		}
		s, err := Wait(ctx, b.dir)
		if err != nil || s.State != Created || s.Exit != nil || !s.Started.IsZero() {
			t.Errorf("status %+v, %v", s, err)
		}
		if out, _ := b.logged(); out != "" {
			t.Errorf("the log has %q", out)
		}
		if r := b.finish(nil); r.failure != nil || r.out != "never\n" {
			t.Errorf("then started: %+v", r)
		}
	})
}

func TestPause(t *testing.T) {
	eachRuntime(t, func(t *testing.T, runtime string) {
		b := newBox(t, runtime, func(c *Config) { c.Container.Options.Interactive = true }, "ticks")
		c := b.launch()
		ctx := testContext(t)
		r, w, err := os.Pipe()
		must(t, err)
		defer w.Close()
		var out buffer
		ended := make(chan error, 1)
		go func() {
			_, err := c.Attach(ctx, Streams{In: r, Out: &out}, AttachOptions{Start: true})
			ended <- err
		}()
		w.WriteString("\n")
		until(t, "it ticks", func() bool { return out.String() == "tick 0\n" })

		must(t, c.Pause(ctx))
		if err := c.Pause(ctx); err == nil {
			t.Error("it was paused twice")
		}
		w.WriteString("\n")
		if s := b.state(); s.State != Paused {
			t.Errorf("status %+v", s)
		}
		if _, err := c.Exec(ctx, Streams{}, ExecOptions{Process: execOptions("echo", "x")}); err == nil {
			t.Error("a process ran in what is paused")
		}
		// A freeze that ends leaves it as it was.
		thaw, err := c.Freeze(ctx)
		must(t, err)
		must(t, thaw())
		if s := b.state(); s.State != Paused || out.String() != "tick 0\n" {
			t.Errorf("status %+v, wrote %q", s, out.String())
		}
		must(t, c.Resume(ctx))
		if err := c.Resume(ctx); err == nil {
			t.Error("it was resumed twice")
		}
		until(t, "it ticks on", func() bool { return out.String() == "tick 0\ntick 1\n" })

		// Who froze it and dies has thawed it.
		conn, _, end, err := c.ask(ctx, request{Op: opFreeze})
		must(t, err)
		_ = conn
		if s := b.state(); s.State != Paused {
			t.Errorf("status %+v", s)
		}
		end()
		until(t, "it is thawed", func() bool { return b.state().State == Running })

		must(t, c.Pause(ctx))
		must(t, c.Signal(ctx, unix.SIGKILL))
		must(t, <-ended)
		if s := b.state(); s.State != Exited || s.Exit.Code != 137 {
			t.Errorf("status %+v", s)
		}
	})
}

func TestOutOfMemory(t *testing.T) {
	_, v1 := os.Stat("/sys/fs/cgroup/memory/memory.limit_in_bytes")
	_, v2 := os.Stat("/sys/fs/cgroup/cgroup.controllers")
	need(t, v1 == nil || v2 == nil, "the memory controller")
	b := newBox(t, "runc", func(c *Config) {
		c.Container.Options.Limits.Memory = 32 << 20
		c.Container.Options.Limits.MemorySwap = 32 << 20
	}, "eat", "256")
	r := b.finish(nil)
	if s := b.state(); r.failure != nil || r.Code != 137 || !r.OOMKilled || !s.Exit.OOMKilled {
		t.Errorf("came to %+v", r)
	}
}

func TestMonitorKilled(t *testing.T) {
	eachRuntime(t, func(t *testing.T, runtime string) {
		b := newBox(t, runtime, nil, "sleep", "1000")
		c := b.launch()
		ctx := testContext(t)
		ended := make(chan error, 1)
		go func() {
			_, err := c.Attach(ctx, Streams{}, AttachOptions{Start: true})
			ended <- err
		}()
		until(t, "it runs", func() bool { out, _ := b.logged(); return out == "asleep\n" })
		s := b.state()
		must(t, unix.Kill(s.Monitor, unix.SIGKILL))
		if err := <-ended; !errors.Is(err, ErrGone) {
			t.Errorf("attached: %v", err)
		}
		until(t, "it is dead", func() bool { return b.state().State == Dead })
		if w, err := Wait(ctx, b.dir); err != nil || w.State != Dead {
			t.Errorf("wait: %+v, %v", w, err)
		}
		must(t, Reap(ctx, b.dir, b.argv...))
		s = b.state()
		if s.State != Exited || s.Exit.Code != 137 || s.Exit.Error == "" || s.Started.IsZero() {
			t.Errorf("status %+v, exit %+v", s, s.Exit)
		}
		until(t, "its processes are gone", func() bool { return len(b.processes()) == 0 })
		b.nothingLeft()
		if out, _ := b.logged(); out != "asleep\n" {
			t.Errorf("the log has %q", out)
		}
		b.cfg.Container.Options.Cmd = []string{"echo", "again"}
		must(t, Write(b.cfg))
		if r := b.finish(nil); r.failure != nil || r.out != "again\n" {
			t.Errorf("started again: %+v", r)
		}
	})
}

func TestReap(t *testing.T) {
	eachRuntime(t, func(t *testing.T, runtime string) {
		ctx := testContext(t)
		for name, do := range map[string]func(b *box){
			"one that was never launched": func(b *box) {},
			"one that was not started":    func(b *box) { b.launch() },
			"one that was not started, its monitor killed": func(b *box) {
				b.launch()
				must(t, unix.Kill(b.state().Monitor, unix.SIGKILL))
			},
		} {
			b := newBox(t, runtime, nil, "sleep", "1000")
			do(b)
			must(t, Reap(ctx, b.dir, b.argv...))
			if s := b.state(); s.State != Created || s.Exit != nil || s.Monitor != 0 {
				t.Errorf("%s: status %+v", name, s)
			}
		}
		b := newBox(t, runtime, nil, "deaf")
		b.begin()
		must(t, Reap(ctx, b.dir, b.argv...))
		if s := b.state(); s.State != Exited || s.Exit.Code != 137 || s.Exit.Error != "" {
			t.Errorf("one that runs: status %+v", s)
		}
		// A monitor that does not answer is killed.
		b = newBox(t, runtime, nil, "sleep", "1000")
		b.begin()
		must(t, unix.Kill(b.state().Monitor, unix.SIGSTOP))
		must(t, Reap(ctx, b.dir, b.argv...))
		if s := b.state(); s.State != Exited || s.Exit.Code != 137 || s.Exit.Error == "" {
			t.Errorf("one whose monitor is stopped: status %+v", s)
		}
	})
	if _, err := State(t.TempDir()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no container: %v", err)
	}
}

func TestFullDisk(t *testing.T) {
	b := newBox(t, "runc", func(c *Config) { c.LogMax = 1 << 30 }, "lines", "20000")
	must(t, os.RemoveAll(b.dir))
	must(t, os.Mkdir(b.dir, 0o700))
	must(t, unix.Mount("full", b.dir, "tmpfs", 0, "size=512k"))
	t.Cleanup(func() {
		until(t, "the monitor has left it", func() bool { return unix.Unmount(b.dir, 0) == nil })
	})
	// It is left before the directory is: cleanups run last first.
	t.Cleanup(func() { must(t, Reap(context.Background(), b.dir, b.argv...)) })
	must(t, Write(b.cfg))
	r := b.finish(nil)
	if r.failure != nil || r.Code != 0 || len(r.out) != 20000*100 {
		t.Errorf("came to %+v with %d bytes", r.Exit, len(r.out))
	}
	s := b.state()
	if s.State != Exited || s.Exit.Code != 0 || s.LogLost == 0 {
		t.Errorf("status %+v", s)
	}
	out, _ := b.logged()
	if len(out) == 0 || int64(len(out))+s.LogLost != 20000*100 {
		t.Errorf("the log has %d bytes, %d are lost", len(out), s.LogLost)
	}
	if bytes.Contains([]byte(out), []byte("{")) {
		t.Error("the log has half a record")
	}
}

func TestNoRuntime(t *testing.T) {
	b := newBox(t, "/nowhere/crun", nil, "echo")
	err := Launch(testContext(t), b.dir, b.argv...)
	if se := startErrorOf(t, err); se.Code != 125 || !strings.Contains(se.Message, "install the package crun or runc") {
		t.Errorf("%+v", se)
	}
	t.Setenv("PATH", "/nowhere")
	if _, err := FindRuntime(""); err == nil || !strings.Contains(err.Error(), "crun or runc") {
		t.Errorf("find: %v", err)
	}
}
