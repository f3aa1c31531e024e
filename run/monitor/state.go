package monitor

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// State tells what is known of the container in dir, from its directory alone: it
// asks nobody, and takes a fraction of a millisecond. The error is fs.ErrNotExist
// where there is no container.
func State(dir string) (Status, error) {
	for {
		s, err := look(dir)
		if err != nil || s.State != Dead {
			return s, err
		}
		// The monitor may have written the end between the two looks.
		again, err := look(dir)
		if err != nil || again.State == Dead {
			return again, err
		}
	}
}

func look(dir string) (Status, error) {
	if _, err := os.Stat(filepath.Join(dir, configFile)); err != nil {
		return Status{}, err
	}
	pid, err := holder(dir)
	if err != nil {
		return Status{}, err
	}
	var s Status
	err = readFile(filepath.Join(dir, exitFile), &s)
	if err == nil {
		return s, nil
	}
	err = readFile(filepath.Join(dir, stateFile), &s)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return Status{State: Created, Monitor: pid}, nil
	case err != nil && pid != 0:
		return s, err
	case pid == 0:
		// Nobody wrote its end; what is written of its state may be cut off.
		s.Pid, s.Monitor, s.State = 0, 0, Dead
	}
	return s, nil
}

// Wait waits until the container in dir does not run and tells its status, which
// is Created, Exited or Dead. It needs neither the daemon nor the monitor.
func Wait(ctx context.Context, dir string) (Status, error) {
	for {
		s, err := State(dir)
		if err != nil {
			return s, err
		}
		if s.State == Exited || s.State == Dead || s.State == Created && s.Monitor == 0 {
			return s, nil
		}
		cfg, err := Read(dir)
		if err != nil {
			return s, err
		}
		if c, err := Dial(ctx, cfg.Socket); err == nil {
			_, _ = c.Wait(ctx) // however it ended, the directory tells
		}
		select {
		case <-ctx.Done():
			return s, ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
}
