package monitor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	runc "github.com/containerd/go-runc"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/run"
)

// unwanted is how long a container waits, with nobody attached, to be started.
const unwanted = time.Minute

// container is the one that this monitor stands beside.
type container struct {
	cfg   Config
	log   *slog.Logger
	path  string // of the runtime
	stdio *stdio
	logs  *logWriter
	state *slot
	exits *slot
	kids  *children

	prepared chan struct{} // closed when the runtime has created it, or failed to
	bundle   *run.Bundle   // from here on: set before prepared is closed
	runtime  *runc.Runc
	pid      int
	oom      oomCount
	failed   *StartError

	over  chan struct{} // closed when it ended, after exit is set
	exit  Exit
	abort context.Context // done when it shall end without having been started
	stop  func()          // ends abort, and prepare with it

	// mu is held while the runtime is told something, one thing at a time. It guards
	// what follows.
	mu      sync.Mutex
	status  Status
	held    bool // by Pause
	freezes int  // by Freeze
	execs   map[string]*process
	nth     int // names execs
	closing bool
	ended   syscall.Signal // what ended it before it was started
	procs   sync.WaitGroup // the execs
}

func newContainer(cfg Config, path string, log *slog.Logger) *container {
	c := &container{
		cfg: cfg, log: log, path: path, logs: newLogWriter(cfg.Container.Dir, cfg.logMax()),
		state: newSlot(cfg.Container.Dir, stateFile), exits: newSlot(cfg.Container.Dir, exitFile), kids: newChildren(),
		prepared: make(chan struct{}), over: make(chan struct{}), execs: map[string]*process{},
	}
	c.abort, c.stop = context.WithCancel(context.Background())
	c.status = Status{State: Created, Monitor: os.Getpid()}
	return c
}

// save writes down what State is to tell.
func (c *container) save() {
	c.status.LogLost = c.logs.lostBytes()
	if err := c.state.write(c.status); err != nil {
		c.log.Error("the state is not written", "err", err)
	}
}

// prepare makes the bundle and has the runtime create the container.
func (c *container) prepare() {
	defer close(c.prepared)
	ctx := c.abort
	fail := func(err error) {
		var se *StartError
		if !errors.As(err, &se) {
			se = &StartError{Code: codeRuntime, Message: err.Error()}
		}
		c.failed = se
	}
	c.runtime = newRuntime(&c.cfg, c.path, false)
	b, err := run.Make(ctx, c.cfg.Container)
	if err != nil {
		fail(err)
		return
	}
	c.bundle = b
	c.runtime = newRuntime(&c.cfg, c.path, b.NoCgroups)
	id := c.cfg.Container.ID
	if _, err := os.Lstat(filepath.Join(c.cfg.RuntimeRoot, id)); err == nil {
		// Left by a monitor that was killed.
		if err := c.remove(ctx); err != nil {
			fail(err)
			return
		}
	}
	os.Remove(c.runtime.Log)
	err = c.kids.during(func() (err error) {
		err = c.runtime.Create(ctx, id, b.Dir, &runc.CreateOpts{IO: c.stdio, PidFile: c.cfg.path(pidFile), ConsoleSocket: c.stdio.console()})
		if err != nil {
			return notStarted(err, c.runtime.Log, b.Spec.Process.Args)
		}
		if c.pid, err = readPid(c.cfg.path(pidFile)); err == nil {
			c.kids.name(c.pid)
		}
		return err
	})
	if err == nil {
		err = c.stdio.created()
	}
	if err != nil {
		fail(err)
		return
	}
	c.oom = countOOM(c.pid)
}

// start starts what is prepared. Only the first call does anything; all give the
// same answer.
func (c *container) start(ctx context.Context) (time.Time, error) {
	select {
	case <-c.prepared:
	case <-ctx.Done():
		return time.Time{}, ctx.Err()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case !c.status.Started.IsZero():
		return c.status.Started, nil
	case c.closing:
		return time.Time{}, errNotRunning(c)
	}
	if c.failed == nil {
		c.stdio.pump()
		// Written first, so that who hears of the container finds it running.
		c.status.State, c.status.Pid, c.status.Started, c.status.Warnings = Running, c.pid, now(), c.bundle.Warnings
		c.save()
		if err := c.tell(ctx, c.runtime.Start); err != nil {
			c.failed = notStarted(failure("start", err, c.runtime.Log), c.runtime.Log, c.bundle.Spec.Process.Args)
			c.status.Started = time.Time{}
		}
	}
	if c.failed != nil {
		c.closing = true
		c.stop()
		return time.Time{}, c.failed
	}
	started := now()
	c.stdio.out.publish(encodeJSON(kindStarted, reply{Started: started}))
	return started, nil
}

// wait waits for the container's end and takes it away. It returns when all is
// written down.
func (c *container) wait(ctx context.Context) {
	<-c.prepared
	dead := make(chan unix.WaitStatus, 1)
	if c.pid > 0 {
		go func() { dead <- c.kids.wait(c.pid) }()
	}
	idle := time.NewTicker(unwanted)
	defer idle.Stop()
	var status unix.WaitStatus
	reaped := false
	for waiting := true; waiting; {
		select {
		case status = <-dead:
			reaped, waiting = true, false
		case <-c.abort.Done():
			waiting = false
		case <-idle.C:
			c.mu.Lock()
			if c.status.Started.IsZero() && !c.stdio.out.attached() {
				c.closing, waiting = true, false
			}
			c.mu.Unlock()
		}
	}
	c.mu.Lock()
	c.closing = true
	started := c.status.Started
	c.mu.Unlock()
	finished := now()
	if reaped && !started.IsZero() {
		c.stdio.drained()
	}
	c.procs.Wait() // the kernel kills them with their init

	exit := Exit{Code: exitCode(status), Finished: finished}
	switch {
	case c.ended != 0:
		exit = Exit{Code: 128 + int(c.ended), Error: "it was stopped before it was started", Finished: finished}
	case c.failed != nil:
		exit = Exit{Code: c.failed.Code, Error: c.failed.Message, Finished: finished}
	case started.IsZero():
		exit = Exit{Code: codeRuntime, Error: "it was never started", Finished: finished}
	default:
		exit.OOMKilled = c.oom.killed()
	}
	if err := c.remove(ctx); err != nil {
		c.log.Error("the runtime keeps it", "err", err)
	}
	if c.pid > 0 && !reaped {
		<-dead
	}
	short, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if err := clearGroups(short, c.cfg.Container); err != nil {
		c.log.Error("control groups are left", "err", err)
	}
	if err := run.Tidy(c.cfg.Container); err != nil {
		c.log.Error("mount points are left", "err", err)
	}
	c.stdio.Close()
	lost := c.logs.finish()

	c.mu.Lock()
	defer c.mu.Unlock()
	c.status.Pid, c.status.Monitor, c.status.LogLost = 0, 0, lost
	c.exit, c.status.State = exit, Exited
	c.status.Exit = &exit
	if started.IsZero() {
		c.status.State = Created
	}
	if started.IsZero() && (c.failed == nil || c.ended != 0) {
		os.Remove(c.cfg.path(stateFile)) // as if nothing had been
	} else if err := c.exits.write(c.status); err != nil {
		c.log.Error("the end is not written", "err", err)
	}
	close(c.over)
}

func exitCode(ws unix.WaitStatus) int {
	if ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return ws.ExitStatus()
}

func errNotRunning(c *container) error {
	return fmt.Errorf("container %s is not running", c.cfg.Container.ID)
}

// signal sends a signal to the init, or to an exec.
func (c *container) signal(ctx context.Context, target string, sig syscall.Signal) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if target != "" {
		p := c.execs[target]
		if p == nil {
			return errNotRunning(c)
		}
		return p.signal(sig)
	}
	switch {
	case c.closing:
		return errNotRunning(c)
	case c.status.Started.IsZero():
		switch sig {
		case unix.SIGKILL, unix.SIGTERM, unix.SIGINT, unix.SIGQUIT, unix.SIGHUP:
		default:
			return errNotRunning(c)
		}
		c.closing, c.ended = true, sig
		c.stop()
		return nil
	}
	err := c.tell(ctx, func(ctx context.Context, id string) error { return c.runtime.Kill(ctx, id, int(sig), nil) })
	if err != nil {
		if err = failure("signal", err, c.runtime.Log); strings.Contains(err.Error(), "not running") || strings.Contains(err.Error(), "o such process") {
			return errNotRunning(c)
		}
		return err
	}
	if sig == unix.SIGKILL && c.status.State == Paused {
		// Not every runtime leaves anything to thaw, or anybody.
		c.held, c.freezes = false, 0
		_ = c.thaw(ctx)
	}
	return nil
}

// pause freezes it for Pause, or once more for Freeze.
func (c *container) pause(ctx context.Context, freeze bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.closing || c.status.Started.IsZero():
		return errNotRunning(c)
	case c.held && !freeze:
		return fmt.Errorf("container %s is already paused", c.cfg.Container.ID)
	}
	if c.status.State != Paused {
		if err := c.tell(ctx, c.runtime.Pause); err != nil {
			err = failure("pause", err, c.runtime.Log)
			// Some of it may be frozen.
			_ = c.tell(ctx, c.runtime.Resume)
			return err
		}
		c.status.State = Paused
		c.save()
	}
	if freeze {
		c.freezes++
	} else {
		c.held = true
	}
	return nil
}

// resume undoes what pause did, and thaws it if that was the last one.
func (c *container) resume(ctx context.Context, freeze bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case freeze && c.freezes == 0: // killed meanwhile
		return nil
	case freeze:
		c.freezes--
	case c.closing || c.status.Started.IsZero():
		return errNotRunning(c)
	case !c.held:
		return fmt.Errorf("container %s is not paused", c.cfg.Container.ID)
	default:
		c.held = false
	}
	if c.held || c.freezes > 0 || c.closing {
		return nil
	}
	return c.thaw(ctx)
}

// tell calls the runtime, whose log has what it says to that alone.
func (c *container) tell(ctx context.Context, verb func(context.Context, string) error) error {
	os.Remove(c.runtime.Log)
	return c.kids.during(func() error { return verb(ctx, c.cfg.Container.ID) })
}

func (c *container) remove(ctx context.Context) error {
	return c.kids.during(func() error { return remove(ctx, c.runtime, c.cfg.Container.ID) })
}

func (c *container) thaw(ctx context.Context) error {
	if err := c.tell(ctx, c.runtime.Resume); err != nil {
		return failure("resume", err, c.runtime.Log)
	}
	c.status.State = Running
	c.save()
	return nil
}

// consoleName is the socket on which the runtime gives the nth terminal.
func (c *container) consoleName(nth int) string {
	dir, base := filepath.Split(c.cfg.Socket)
	return filepath.Join(dir, fmt.Sprintf(".%s.%d", base, nth))
}
