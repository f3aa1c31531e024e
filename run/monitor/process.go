package monitor

import (
	"context"
	"fmt"
	"os"
	"syscall"

	runc "github.com/containerd/go-runc"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/run"
)

// process is an exec's.
type process struct {
	name  string
	pid   int
	fd    int // its pidfd
	stdio *stdio
}

// exec runs a further process. Until pump is called nothing it writes is read;
// then it is published, and its exit after it.
func (c *container) exec(ctx context.Context, o run.ExecOptions, height, width uint16) (_ *process, pump func(), err error) {
	var p *process
	c.mu.Lock()
	switch {
	case c.closing || c.status.Started.IsZero():
		err = errNotRunning(c)
	case c.status.State == Paused:
		err = fmt.Errorf("container %s is paused, unpause the container before exec", c.cfg.Container.ID)
	default:
		c.procs.Add(1)
		c.nth++
		p = &process{name: fmt.Sprintf("exec-%d", c.nth)}
	}
	nth := c.nth
	c.mu.Unlock()
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			if p.stdio != nil {
				p.stdio.Close()
			}
			c.procs.Done()
		}
	}()

	proc, err := run.Process(c.cfg.Container, c.bundle.Spec, o)
	if err != nil {
		return nil, nil, &StartError{Code: codeNotExec, Message: err.Error()}
	}
	if p.stdio, err = newStdio(o.TTY, o.Interactive, c.consoleName(nth), nil); err != nil {
		return nil, nil, err
	}
	p.stdio.resize(height, width)
	log, pid := c.cfg.path(p.name+".log"), c.cfg.path(p.name+".pid")
	defer os.Remove(log)
	err = c.kids.during(func() (err error) {
		err = c.runtime.Exec(ctx, c.cfg.Container.ID, *proc, &runc.ExecOpts{
			IO: p.stdio, LogFile: log, PidFile: pid, ConsoleSocket: p.stdio.console(), Detach: true,
		})
		if err != nil {
			os.Remove(pid)
			return notStarted(err, log, o.Cmd)
		}
		if p.pid, err = readPid(pid); err != nil {
			return err
		}
		// It is our child, dead or not, so the pid is its own.
		if p.fd, err = unix.PidfdOpen(p.pid, 0); err == nil {
			c.kids.name(p.pid)
		}
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	// From here on it is ours to wait for, whatever happens.
	if err := p.stdio.created(); err != nil {
		c.log.Error("an exec has no terminal", "err", err)
	}
	c.mu.Lock()
	c.execs[p.name] = p
	c.mu.Unlock()
	return p, func() {
		p.stdio.pump()
		go c.end(p)
	}, nil
}

// end waits for an exec's end and publishes it.
func (c *container) end(p *process) {
	defer c.procs.Done()
	status := c.kids.wait(p.pid)
	c.mu.Lock()
	delete(c.execs, p.name)
	unix.Close(p.fd)
	c.mu.Unlock()
	p.stdio.drained()
	p.stdio.out.finish(Exit{Code: exitCode(status), Finished: now()})
	p.stdio.Close()
}

// signal is called with the container's mu held.
func (p *process) signal(sig syscall.Signal) error {
	return unix.PidfdSendSignal(p.fd, sig, nil, 0)
}
