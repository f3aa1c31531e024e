package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"github.com/varvefs/varve/fs"
	"github.com/varvefs/varve/fs/upper"
	"github.com/varvefs/varve/run"
	"github.com/varvefs/varve/run/monitor"
)

// watchContainer waits for a container's end and does what follows from it: its
// mount goes, with its changes if that was asked for. A daemon that ends leaves
// the container as it is.
func (d *Daemon) watchContainer(m *mount, p *process) {
	defer close(p.done)
	d.mu.Lock()
	if err := m.save(); err != nil {
		d.log.Warn("the record of a container is not up to date", "mount", m.Name, "err", err)
	}
	d.mu.Unlock()
	st, err := monitor.Wait(d.life, d.containerDir(m.ID))
	if d.life.Err() != nil {
		return
	}
	if err == nil && st.State == monitor.Dead {
		d.log.Error("the monitor of a container was killed: the container is ended", "mount", m.Name)
		st, err = d.reap(m.ID)
	}
	if err != nil {
		d.log.Error("the end of a container", "mount", m.Name, "err", err)
	}
	d.mu.Lock()
	before := m.before
	if m.tree != nil {
		p.end.Fetched = max(m.view(false).Fetched-before, 0)
	}
	d.mu.Unlock()
	p.end.take(st)
	d.takeDown(m)
	d.endContainer(m, st)
	d.log.Info("container ended", "mount", m.Name, "code", p.end.ExitCode, "oom", p.end.OOMKilled)
}

func (e *Ended) take(st monitor.Status) {
	if x := st.Exit; x != nil {
		e.ExitCode, e.Error, e.OOMKilled, e.Finished = x.Code, x.Error, x.OOMKilled, x.Finished
	}
}

// reap takes away what a killed monitor left.
func (d *Daemon) reap(id string) (monitor.Status, error) {
	dir := d.containerDir(id)
	self, err := os.Executable()
	if err != nil {
		return monitor.Status{}, err
	}
	ctx, cancel := context.WithTimeout(d.life, time.Minute)
	defer cancel()
	if err := monitor.Reap(ctx, dir, self, MonitorVerb); err != nil {
		return monitor.Status{}, err
	}
	return monitor.State(dir)
}

// takeDown unmounts a container that has ended. Who reads it is waited for; who is
// in its directory stays there, out of sight.
func (d *Daemon) takeDown(m *mount) {
	const patience = 2 * time.Second // the kernel takes a moment to end the namespaces
	for began, wait := time.Now(), time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		d.mu.Lock()
		up := m.Upper
		kernel := m.overlay == overlayKernel
		err := m.down(m.jobs == 0 && time.Since(began) > patience)
		reading := m.jobs > 0
		d.mu.Unlock()
		if err == nil {
			if kernel {
				awaitFree(up, patience)
			}
			return
		}
		if !reading && !errors.Is(err, fs.ErrBusy) || d.life.Err() != nil {
			d.log.Error("unmount", "mount", m.Name, "err", err)
			return
		}
		time.Sleep(wait)
	}
}

// awaitFree waits until the kernel does not write an upper any more: the last
// process of a container is gone a moment before its mounts are.
func awaitFree(dir string, patience time.Duration) {
	up, err := upper.Open(dir)
	if err != nil {
		return
	}
	defer up.Close()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if used, err := fs.UpperInUse(up); err != nil || !used {
			return
		}
	}
}

// endContainer is told that the process of a mount has ended and its mount is down.
func (d *Daemon) endContainer(m *mount, st monitor.Status) {
	d.mu.Lock()
	m.proc, m.err = nil, nil
	m.Container.Active = false
	var err error
	if m.tree == nil && m.Unmounted == nil {
		err = fs.Detach(m.Dir) // of an earlier daemon, which this one could not take up
		m.Unmounted = now()
		m.removeDir()
	}
	err = errors.Join(err, m.save())
	remove := m.Container.Remove
	d.mu.Unlock()
	if err != nil {
		d.log.Error("the record of a container", "mount", m.Name, "err", err)
	}
	if !remove {
		return
	}
	if _, err := d.Remove(UnmountOptions{Mount: m.ID, Force: true}); err != nil && !errors.Is(err, errNoMount) {
		d.log.Error("a container that was to be removed with its end is not", "mount", m.Name, "err", err)
	}
}

// StopContainer asks a container to end, kills it if it does not, and gives its
// name when it is unmounted. One that does not run is none the worse.
func (d *Daemon) StopContainer(ctx context.Context, o StopOptions) (string, error) {
	m, p, c, err := d.running(ctx, o.Mount)
	if errors.Is(err, errNotRunning) {
		return m.Name, nil
	}
	if err != nil {
		return "", err
	}
	sig, grace := m.Container.StopSignal, 10
	if t := m.Container.Options.StopTimeout; t != nil {
		grace = *t
	}
	if o.Timeout != nil {
		grace = *o.Timeout
	}
	if o.Signal != "" {
		if sig, err = run.ParseSignal(o.Signal); err != nil {
			return "", fmt.Errorf("%w%w", err, silent{errUsage})
		}
	}
	if _, err := c.Stop(ctx, sig, time.Duration(grace)*time.Second); err != nil && !errors.Is(err, monitor.ErrGone) {
		return "", fmt.Errorf("stop %s: %w", m.Name, err)
	}
	return m.Name, p.wait(ctx)
}

// KillContainer sends a signal to a container, SIGKILL unless another is named, and
// gives its name. What SIGKILL ends it waits for.
func (d *Daemon) KillContainer(ctx context.Context, o StopOptions) (string, error) {
	sig := syscall.SIGKILL
	var err error
	if o.Signal != "" {
		if sig, err = run.ParseSignal(o.Signal); err != nil {
			return "", fmt.Errorf("%w%w", err, silent{errUsage})
		}
	}
	m, p, c, err := d.running(ctx, o.Mount)
	if err == nil {
		if err = c.Signal(ctx, sig); errors.Is(err, monitor.ErrGone) {
			err = errNotRunning
		}
	}
	if errors.Is(err, errNotRunning) {
		return "", &Error{Message: fmt.Sprintf("cannot kill container: %s: container %s is not running", o.Mount, m.ID[:12]), Exit: ExitError}
	}
	if err != nil {
		return "", err
	}
	if sig == syscall.SIGKILL {
		err = p.wait(ctx)
	}
	return m.Name, err
}

// running gives the client of a container's monitor. m is not nil where the error is
// errNotRunning.
func (d *Daemon) running(ctx context.Context, name string) (m *mount, p *process, c *monitor.Client, err error) {
	d.mu.Lock()
	if m, err = d.findContainer(name); err == nil {
		p = m.proc
	}
	d.mu.Unlock()
	if err != nil {
		return nil, nil, nil, err
	}
	if p == nil {
		return m, nil, nil, errNotRunning
	}
	c, err = monitor.Dial(ctx, d.monitorSocket(m.ID))
	if errors.Is(err, monitor.ErrGone) {
		if err = p.wait(ctx); err == nil {
			err = errNotRunning
		}
	}
	return m, p, c, err
}

// WaitContainer waits until a container has ended and what follows from that is
// done.
func (d *Daemon) WaitContainer(ctx context.Context, name string) (e Ended, err error) {
	d.mu.Lock()
	m, err := d.findContainer(name)
	var p *process
	if err == nil {
		p = m.proc
	}
	d.mu.Unlock()
	if err != nil {
		return e, err
	}
	if p != nil {
		if err := p.wait(ctx); err != nil {
			return e, err
		}
		if d.life.Err() != nil {
			return e, errors.New("the daemon is stopped; the container goes on")
		}
		return p.end, nil
	}
	st, err := monitor.State(d.containerDir(m.ID))
	if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	e.take(st)
	return e, err
}

// settle prepares a mount for its removal: a container that runs is refused, or
// killed if it is forced. It gives the container that has ended, which may have
// been removed with that, nil if there was none.
func (d *Daemon) settle(o UnmountOptions) (*mount, error) {
	d.mu.Lock()
	m, err := d.find(o.Mount)
	var p *process
	if err == nil {
		p = m.proc
	}
	d.mu.Unlock()
	if err != nil || p == nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(d.life, time.Minute)
	defer cancel()
	if st, err := monitor.State(d.containerDir(m.ID)); err == nil && (st.State == monitor.Running || st.State == monitor.Paused) && !o.Force {
		return nil, &Error{Message: fmt.Sprintf("cannot remove container %q: container is running: stop the container before removing or force remove", m.Name), Exit: ExitBusy}
	}
	_, _, c, err := d.running(ctx, m.ID)
	if err == nil {
		err = c.Signal(ctx, syscall.SIGKILL)
	}
	if err != nil { // as a rule because it is just ending
		short, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		ctx = short
	}
	if werr := p.wait(ctx); werr != nil {
		return nil, fmt.Errorf("kill %s: %w", m.Name, errors.Join(err, werr))
	}
	return m, nil
}

// dropContainer removes what a container has beside its mount.
func (d *Daemon) dropContainer(m *mount) error {
	if m.Container == nil {
		return nil
	}
	return d.removeContainerDir(m.ID)
}

func (d *Daemon) removeContainerDir(id string) error {
	dir := d.containerDir(id)
	if st, err := monitor.State(dir); err == nil && (st.State == monitor.Dead || st.Monitor != 0) {
		if _, err := d.reap(id); err != nil {
			return err
		}
	}
	return upper.RemoveAll(dir)
}
