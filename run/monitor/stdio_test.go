package monitor

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/containerd/console"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/run"
)

func execOptions(cmd ...string) run.ExecOptions { return run.ExecOptions{Cmd: cmd} }

func interactive(c *Config) {
	c.Container.Options.Interactive, c.StdinOnce = true, true
}

func TestInput(t *testing.T) {
	eachRuntime(t, func(t *testing.T, runtime string) {
		for name, in := range map[string]string{"nothing": "", "a line": "hello\n", "much": strings.Repeat("0123456789abcde\n", 1<<17)} {
			b := newBox(t, runtime, interactive, "cat")
			if r := b.finish(strings.NewReader(in)); r.failure != nil || r.Code != 0 || r.out != in {
				t.Errorf("%s: %d bytes came back of %d: %+v, %v", name, len(r.out), len(in), r.Exit, r.failure)
			}
		}
		// Who does not want its input is not held up by it, nor is its client.
		b := newBox(t, runtime, interactive, "echo", "enough")
		if r := b.finish(strings.NewReader(strings.Repeat("y\n", 1<<20))); r.failure != nil || r.out != "enough\n" {
			t.Errorf("input that is not read: %+v", r)
		}
		// Without -i there is none.
		b = newBox(t, runtime, nil, "cat")
		if r := b.finish(strings.NewReader("x")); r.failure != nil || r.out != "" {
			t.Errorf("input that is not wanted: %+v", r)
		}
	})
}

func TestClientGone(t *testing.T) {
	eachRuntime(t, func(t *testing.T, runtime string) {
		b := newBox(t, runtime, func(c *Config) { c.Container.Options.Interactive = true }, "ticks")
		c := b.launch()
		for i, want := range []string{"tick 0\n", "tick 1\n"} {
			ctx, cancel := context.WithCancel(testContext(t))
			r, w, err := os.Pipe()
			must(t, err)
			var out buffer
			ended := make(chan error, 1)
			go func() {
				_, err := c.Attach(ctx, Streams{In: r, Out: &out}, AttachOptions{Start: i == 0})
				ended <- err
			}()
			w.WriteString("\n")
			until(t, "it ticks", func() bool { return out.String() == want })
			cancel()
			if err := <-ended; !errors.Is(err, context.Canceled) {
				t.Errorf("attached: %v", err)
			}
			w.Close()
			if s := b.state(); s.State != Running {
				t.Fatalf("status %+v", s)
			}
		}
		// With StdinOnce its input ends with the client that gave it.
		b = newBox(t, runtime, interactive, "ticks")
		c = b.launch()
		ctx, cancel := context.WithCancel(testContext(t))
		r, w, err := os.Pipe()
		must(t, err)
		defer w.Close()
		w.WriteString("\n")
		var out buffer
		ended := make(chan error, 1)
		go func() {
			_, err := c.Attach(ctx, Streams{In: r, Out: &out}, AttachOptions{Start: true})
			ended <- err
		}()
		until(t, "it ticks", func() bool { return out.String() == "tick 0\n" })
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("attached: %v", err)
		}
		if s, err := Wait(testContext(t), b.dir); err != nil || s.Exit.Code != 0 {
			t.Errorf("status %+v, %v", s, err)
		}
	})
}

func TestMuchOutput(t *testing.T) {
	eachRuntime(t, func(t *testing.T, runtime string) {
		const lines = 200_000
		b := newBox(t, runtime, func(c *Config) { c.LogMax = 1 << 30 }, "lines", "200000")
		c := b.launch()
		var second buffer
		ended := make(chan error, 1)
		there := make(chan struct{})
		go func() {
			_, err := c.Attach(testContext(t), Streams{In: attached(there), Out: &second}, AttachOptions{})
			ended <- err
		}()
		<-there
		r := b.attach(c, nil)
		must(t, <-ended)
		if r.failure != nil || len(r.out) != lines*100 || second.String() != r.out {
			t.Errorf("%d bytes and %d bytes, want %d: %v", len(r.out), len(second.String()), lines*100, r.failure)
		}
		if out, _ := b.logged(); out != r.out {
			t.Errorf("the log has %d bytes, want %d", len(out), lines*100)
		}
	})
}

// attached is input that has nothing to give. It is read when its client was
// answered, so when that is attached.
type attached chan struct{}

func (a attached) Read([]byte) (int, error) {
	close(a)
	return 0, io.EOF
}

func TestStuckClient(t *testing.T) {
	eachRuntime(t, func(t *testing.T, runtime string) {
		const lines = 100_000
		b := newBox(t, runtime, func(c *Config) { c.Stall = 3 * time.Second }, "lines", "100000")
		c := b.launch()
		stuck, release := make(chan struct{}), make(chan struct{})
		ended := make(chan error, 1)
		there := make(chan struct{})
		go func() {
			_, err := c.Attach(testContext(t), Streams{In: attached(there), Out: stuckWriter{stuck, release}}, AttachOptions{})
			ended <- err
		}()
		<-there
		r := b.attach(c, nil)
		if r.failure != nil || len(r.out) != lines*100 {
			t.Errorf("%d bytes, want %d: %v", len(r.out), lines*100, r.failure)
		}
		<-stuck
		close(release)
		if err := <-ended; !errors.Is(err, ErrSlow) && !errors.Is(err, ErrGone) {
			t.Errorf("the stuck client: %v", err)
		}
	})
}

// stuckWriter takes nothing until it is released.
type stuckWriter struct{ stuck, release chan struct{} }

func (w stuckWriter) Write(p []byte) (int, error) {
	select {
	case <-w.stuck:
	default:
		close(w.stuck)
	}
	<-w.release
	return len(p), nil
}

func TestTerminal(t *testing.T) {
	eachRuntime(t, func(t *testing.T, runtime string) {
		b := newBox(t, runtime, func(c *Config) {
			c.Container.Options.TTY, c.Container.Options.Interactive, c.StdinOnce = true, true, true
		}, "tty")
		c := b.launch()
		ctx := testContext(t)

		// A user's terminal, of which this process is the client.
		master, path, err := console.NewPty()
		must(t, err)
		defer master.Close()
		slave, err := os.OpenFile(path, os.O_RDWR|unix.O_NOCTTY, 0)
		must(t, err)
		defer slave.Close()
		must(t, master.Resize(console.WinSize{Height: 33, Width: 77}))
		canonical := func() bool {
			now, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
			must(t, err)
			return now.Lflag&unix.ICANON != 0
		}
		before, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
		must(t, err)
		var seen buffer
		go io.Copy(&seen, master)
		ended := make(chan error, 1)
		attach := func(start bool) {
			_, err := c.Attach(ctx, Streams{In: slave, Out: slave}, AttachOptions{Start: start, TTY: true})
			ended <- err
		}
		// What is typed early is not lost.
		io.WriteString(master, "\n")
		go attach(true)
		until(t, "it has the terminal's size", func() bool { return strings.Count(seen.String(), "size 33 77 true") == 2 })
		if canonical() {
			t.Error("the user's terminal is not raw")
		}
		must(t, c.Resize(ctx, 44, 88))
		io.WriteString(master, "\n")
		until(t, "it has the new size", func() bool { return strings.Contains(seen.String(), "size 44 88 true") })

		// Detached by its keys it goes on, and the terminal is as it was.
		io.WriteString(master, "\x10\x11")
		if err := <-ended; !errors.Is(err, ErrDetached) {
			t.Errorf("detached: %v", err)
		}
		now, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
		must(t, err)
		if *now != *before {
			t.Error("the user's terminal is not as it was")
		}
		if s := b.state(); s.State != Running {
			t.Errorf("status %+v", s)
		}
		// ctrl-d is the container's terminal's to understand.
		go attach(false)
		until(t, "the terminal is raw again", func() bool { return !canonical() })
		io.WriteString(master, "\x04")
		if err := <-ended; err != nil {
			t.Errorf("attached again: %v", err)
		}
		if out, _ := b.logged(); !strings.Contains(out, "size 33 77 true\r\n") {
			t.Errorf("the log has %q", out)
		}
	})
}

func TestExec(t *testing.T) {
	eachRuntime(t, func(t *testing.T, runtime string) {
		b := newBox(t, runtime, nil, "sleep", "1000")
		c := b.begin()
		ctx := testContext(t)
		for _, x := range []struct {
			cmd     []string
			in      string
			code    int
			out     string
			failure string
		}{
			{cmd: []string{"echo", "hi"}, out: "hi\n"},
			{cmd: []string{"exit", "7"}, code: 7},
			{cmd: []string{"cat"}, in: "from outside", out: "from outside"},
			{cmd: []string{"lines", "20000"}, out: "much"},
			{cmd: []string{"leave"}, code: 3, out: "some"},
			{cmd: []string{"nothere"}, code: 127, failure: `exec: "nothere": executable file not found in $PATH`},
			{cmd: []string{"/bin/plain"}, code: 126, failure: `exec: "/bin/plain": permission denied`},
		} {
			var out bytes.Buffer
			o := ExecOptions{Process: execOptions(x.cmd...)}
			o.Process.Interactive = true
			e, err := c.Exec(ctx, Streams{In: strings.NewReader(x.in), Out: &out}, o)
			got := out.String()
			if x.out == "much" && len(got) == 20000*100 {
				got = x.out
			} else if x.out == "some" && strings.HasPrefix(got, "still here\n") {
				got = x.out
			}
			if x.failure != "" {
				if se := startErrorOf(t, err); se.Code != x.code || se.Message != x.failure {
					t.Errorf("%q: %d %q", x.cmd, se.Code, se.Message)
				}
			} else if err != nil || e.Code != x.code || got != x.out {
				t.Errorf("%q: %+v, %v, wrote %d bytes %.100q", x.cmd, e, err, out.Len(), got)
			}
		}

		// With a terminal.
		var seen buffer
		in, w, err := os.Pipe()
		must(t, err)
		o := ExecOptions{Process: execOptions("tty")}
		o.Process.TTY, o.Process.Interactive = true, true
		ended := make(chan error, 1)
		go func() {
			_, err := c.Exec(ctx, Streams{In: in, Out: &seen}, o)
			ended <- err
		}()
		w.WriteString("\n")
		until(t, "it has a terminal", func() bool { return strings.Count(seen.String(), "true\r\n") == 2 })
		w.WriteString("\x04")
		must(t, <-ended)
		w.Close()

		// Left alone.
		o = ExecOptions{Process: execOptions("deaf")}
		o.Process.Detach = true
		e, err := c.Exec(ctx, Streams{}, o)
		if err != nil || e.Code != 0 {
			t.Errorf("detached: %+v, %v", e, err)
		}
		until(t, "it runs", func() bool { return len(b.processes()) == 2 })

		// They end with the container.
		go func() {
			e, err := c.Exec(ctx, Streams{Out: &seen}, ExecOptions{Process: execOptions("deaf")})
			if err == nil && e.Code != 137 {
				err = errors.New("it was not killed")
			}
			ended <- err
		}()
		until(t, "it runs", func() bool { return strings.HasSuffix(seen.String(), "ready\n") })
		must(t, c.Signal(ctx, unix.SIGKILL))
		must(t, <-ended)
		if s, err := Wait(ctx, b.dir); err != nil || s.Exit.Code != 137 {
			t.Errorf("status %+v, %v", s, err)
		}
		if out, _ := b.logged(); out != "asleep\n" {
			t.Errorf("the log has %q", out)
		}
	})
}
