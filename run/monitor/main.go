package monitor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/run"
)

// now is the time as it is written down.
func now() time.Time { return time.Now().UTC() }

// Main is the monitor of the container in dir. It returns the process' exit code
// when the container has ended and all clients know.
func Main(dir string) (exit int) {
	ready := inheritedPipe()
	fail := func(err error) int {
		fmt.Fprintln(os.Stderr, "varve monitor:", err)
		if ready != nil {
			fmt.Fprint(ready, err)
		}
		return codeRuntime
	}
	if os.Getenv(reapVariable) != "" {
		if err := reapHere(dir); err != nil {
			return fail(err)
		}
		if ready != nil {
			fmt.Fprint(ready, readyWord)
		}
		return 0
	}
	cfg, err := Read(dir)
	if err != nil {
		return fail(err)
	}
	if err := monitor(cfg, ready); err != nil {
		return fail(err)
	}
	return 0
}

// inheritedPipe is where Launch listens; nil if nobody does.
func inheritedPipe() *os.File {
	fd, err := strconv.Atoi(os.Getenv(readyVariable))
	os.Unsetenv(readyVariable)
	if err != nil || fd < 3 {
		return nil
	}
	unix.CloseOnExec(fd)
	return os.NewFile(uintptr(fd), "ready")
}

// monitor does the monitor's whole work.
func monitor(cfg Config, ready *os.File) error {
	dir, id := cfg.Container.Dir, cfg.Container.ID
	log := slog.New(slog.NewTextHandler(os.Stderr, nil)).With("container", id)
	path, err := FindRuntime(cfg.Container.Options.Runtime)
	if err != nil {
		return err
	}
	held, err := lock(dir, 0)
	if heldByOther(err) {
		// Whose it is may be about to end.
		if s, err := State(dir); err == nil && (s.State == Running || s.State == Paused) {
			return fmt.Errorf("container %s is already running", id)
		}
		held, err = lock(dir, patience)
	}
	if err != nil {
		return err
	}
	defer held.Close()
	for _, name := range []string{exitFile, stateFile} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if err := settle(); err != nil {
		return err
	}
	l, err := listen(cfg)
	if err != nil {
		return err
	}
	defer l.Close()

	c := newContainer(cfg, path, log)
	defer c.state.close()
	defer c.exits.close()
	o := cfg.Container.Options
	if c.stdio, err = newStdio(o.TTY, o.Interactive, c.consoleName(0), c.logs); err != nil {
		return err
	}
	c.mu.Lock()
	c.save()
	c.mu.Unlock()
	if ready != nil {
		fmt.Fprint(ready, readyWord)
		ready.Close()
	}
	// Nothing but the container's end ends the monitor.
	ctx := context.Background()
	s := &server{c: c, ctx: ctx}
	go c.kids.collect()
	s.sessions.Add(1)
	go func() {
		defer s.sessions.Done()
		s.serve(l)
	}()
	go c.forward(ctx)
	go c.prepare()
	c.wait(ctx)

	// A new monitor may come from here on. The clients are told last.
	l.Close()
	held.Close()
	c.stdio.out.finish(c.exit)
	s.sessions.Wait()
	return nil
}

// settle makes this process what a container's parent is: whose orphans come to
// it, who holds no directory, and whom a terminal does not signal.
func settle() error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become the container's reaper: %w", err)
	}
	unix.Umask(0o022)
	signal.Ignore(unix.SIGHUP, unix.SIGINT, unix.SIGPIPE)
	return os.Chdir("/")
}

// listen makes the socket. Nobody else can have it: the lock is held.
func listen(cfg Config) (net.Listener, error) {
	if err := os.Remove(cfg.Socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	old := unix.Umask(0o177)
	l, err := net.Listen("unix", cfg.Socket)
	unix.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("listen for clients: %w", err)
	}
	mode := cfg.SocketMode
	if mode == 0 {
		mode = 0o600
	}
	if err := os.Chmod(cfg.Socket, mode.Perm()); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// forward gives the container its stop signal when the machine, which signals
// every process, goes down.
func (c *container) forward(ctx context.Context) {
	terms := make(chan os.Signal, 1)
	signal.Notify(terms, unix.SIGTERM)
	for range terms {
		sig, err := run.StopSignal(c.cfg.Container.Options, c.cfg.Container.Image)
		if err != nil {
			sig = unix.SIGTERM
		}
		if err := c.signal(ctx, "", sig); err != nil {
			c.log.Error("the stop signal is not passed on", "err", err)
		}
	}
}
