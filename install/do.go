package install

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Do carries a plan out: the files are written, containerd is asked whether it takes
// them, and restarted by systemd if it runs with others. If it does not take them, or
// something of it does not start with them, everything is put back and the error says
// what it said. The report says what was done, a line each.
func (c *Containerd) Do(ctx context.Context, p *Plan) (report []string, err error) {
	if err := c.unused(ctx, p); err != nil {
		return nil, err
	}
	undo, err := c.change(ctx, p)
	if err != nil {
		return nil, err
	}
	if dir := p.emptied(); dir != "" {
		os.Remove(c.real(dir)) // stays if it is not empty
	}
	report = wrote(p.Changes)
	if c.Offline {
		return report, nil
	}
	restarted, err := c.restart(ctx, p, undo)
	if err != nil {
		return nil, err
	}
	return append(report, restarted...), nil
}

func wrote(cs Changes) (lines []string) {
	for _, c := range cs {
		if c.New == nil {
			lines = append(lines, "removed "+c.Path)
		} else {
			lines = append(lines, "wrote "+c.Path)
		}
	}
	return lines
}

// change writes the files and has containerd read them.
func (c *Containerd) change(ctx context.Context, p *Plan) (undo func() error, err error) {
	if p.drop == nil || c.Offline { // what is left is the user's own; there is nobody to ask
		return c.apply(p.Changes)
	}
	before, err := c.dump(ctx, p.site, p.site.main.path)
	if err != nil {
		return nil, fmt.Errorf("before anything was changed: %w", err)
	}
	if p.again {
		before = nil // has other settings of ours in it
	}
	if undo, err = c.apply(p.Changes); err != nil {
		return nil, err
	}
	path, done, err := c.candidate(p.site, p.Changes)
	if err == nil {
		defer done()
		var after table
		if after, err = c.dump(ctx, p.site, path); err == nil {
			err = verify(p.drop, before, after)
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%w (everything is as it was)", err), undo())
	}
	return undo, nil
}

// unused refuses to take a snapshotter away from under containers.
func (c *Containerd) unused(ctx context.Context, p *Plan) error {
	if p.leave == "" || c.Force || c.Offline {
		return nil
	}
	conn, err := c.dial(c.socket(p.site, p.user))
	if err != nil {
		return err
	}
	defer conn.Close()
	ids, err := users(ctx, conn, p.leave)
	if err != nil { // no containerd, no containers
		p.Notes = append(p.Notes, "containerd does not answer, so nobody knows whether containers use "+p.leave)
		return nil
	}
	if n := len(ids); n > 0 {
		more := ""
		if n > 5 {
			ids, more = ids[:5], fmt.Sprintf(" and %d more", n-5)
		}
		return fmt.Errorf("containers lie on the snapshotter %s: %s%s; remove them first, or take --force: they cannot be started again then", p.leave, strings.Join(ids, ", "), more)
	}
	return nil
}

// restart has systemd restart containerd if it started before its files changed.
func (c *Containerd) restart(ctx context.Context, p *Plan, undo func() error) ([]string, error) {
	units := p.site.flavor.units()
	switch {
	case p.site.service && c.booted():
	case len(p.Changes) == 0:
		return nil, nil
	case !p.site.service:
		return []string{units[0] + " does not read " + p.site.main.path + ": restart the containerd that does yourself"}, nil
	default:
		return []string{"systemd does not run this machine: restart " + string(p.site.flavor) + " yourself"}, nil
	}
	unit := c.active(ctx, units...)
	if unit == "" {
		return []string{units[0] + " does not run: it will find the snapshotter when it starts"}, nil
	}
	if len(p.Changes) == 0 && !c.older(ctx, unit, p) {
		return nil, nil
	}
	if c.NoRestart {
		return []string{"systemctl restart " + unit + " is left to you"}, nil
	}
	conn, err := c.dial(c.socket(p.site, p.user))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	asking, cancel := context.WithTimeout(ctx, 10*time.Second)
	before, _ := failed(asking, conn) // one that does not answer had none that worked
	cancel()
	_, err = c.run(ctx, "systemctl", "restart", unit)
	if err == nil {
		err = c.settled(ctx, conn, before)
	}
	if err == nil {
		return []string{"restarted " + unit}, nil
	}
	err = fmt.Errorf("%s with the new configuration: %w (everything is as it was)", unit, err)
	if uerr := undo(); uerr != nil {
		return nil, errors.Join(err, uerr)
	}
	_, rerr := c.run(context.WithoutCancel(ctx), "systemctl", "restart", unit)
	return nil, errors.Join(err, rerr)
}

// older reports whether a unit was started before the drop-in was written: somebody
// left the restart out then.
func (c *Containerd) older(ctx context.Context, unit string, p *Plan) bool {
	st, err := os.Stat(c.real(p.site.dropIn))
	if err != nil {
		return false
	}
	out, err := c.run(ctx, "systemctl", "show", "--property=ExecMainStartTimestampMonotonic", "--value", unit)
	started, perr := strconv.ParseInt(strings.TrimSpace(string(out)), 10, 64)
	var now unix.Timespec
	if err := errors.Join(err, perr, unix.ClockGettime(unix.CLOCK_MONOTONIC, &now)); err != nil || started == 0 {
		return false
	}
	age := time.Duration(now.Nano()) - time.Duration(started)*time.Microsecond
	return time.Since(st.ModTime()) < age
}
