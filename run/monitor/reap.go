package monitor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/run"
)

// Reap takes away what a monitor left behind: it kills the container, and the
// monitor if there still is one and it does not end by itself, and deletes the
// container in the runtime, its cgroups and sockets, and the mount points that
// run.Make made. A dead container is exited with code 137 from then on, with an
// Error. It does nothing where nothing is left. The directory itself stays, with
// its log. argv is as Launch's: what touches the root is done by a process of its
// own, which ctx ends.
func Reap(ctx context.Context, dir string, argv ...string) error {
	left, err := leftovers(dir)
	if err != nil || !left {
		return err
	}
	said, err := spawn(ctx, dir, reapVariable+"=1", argv)
	if err == nil && said != readyWord {
		if said == "" {
			said = "see " + filepath.Join(dir, monitorLog)
		}
		err = fmt.Errorf("clean up after the container: %s", said)
	}
	return err
}

// leftovers reports whether there is anything for Reap to do.
func leftovers(dir string) (bool, error) {
	pid, err := holder(dir)
	if pid != 0 || err != nil {
		return pid != 0, err
	}
	return unfinished(dir)
}

// reapHere is Reap in this process.
func reapHere(dir string) error {
	cfg, err := Read(dir)
	if err != nil {
		return err
	}
	held, err := evict(cfg)
	if err != nil {
		return err
	}
	defer held.Close()
	if left, err := unfinished(dir); err != nil || !left {
		return err
	}
	s := Status{State: Dead}
	// What cannot be read is as dead.
	_ = readFile(filepath.Join(dir, stateFile), &s)

	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var errs []error
	if path, err := FindRuntime(cfg.Container.Options.Runtime); err != nil {
		errs = append(errs, err)
	} else if _, err := os.Lstat(filepath.Join(cfg.RuntimeRoot, cfg.Container.ID)); err == nil {
		r := newRuntime(&cfg, path, false)
		if err := remove(ctx, r, cfg.Container.ID); err != nil {
			errs = append(errs, err)
		}
	}
	if err := clearGroups(ctx, cfg.Container); err != nil {
		errs = append(errs, err)
	}
	if err := run.Tidy(cfg.Container); err != nil {
		errs = append(errs, err)
	}
	sockets, _ := filepath.Glob(filepath.Join(filepath.Dir(cfg.Socket), "."+filepath.Base(cfg.Socket)+".*"))
	temporary, _ := filepath.Glob(cfg.path("exec-*"))
	for _, path := range append(append(sockets, temporary...), cfg.Socket, cfg.path(pidFile), cfg.path(stateFile+".new"), cfg.path(exitFile+".new")) {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if s.Started.IsZero() {
		return os.Remove(cfg.path(stateFile)) // as if nothing had been
	}
	s.State, s.Pid, s.Monitor = Exited, 0, 0
	s.Exit = &Exit{Code: 128 + int(unix.SIGKILL), Finished: now(), Error: "its monitor was killed"}
	return writeFile(dir, exitFile, s)
}

// unfinished reports whether a monitor that is gone wrote no end.
func unfinished(dir string) (bool, error) {
	if _, err := os.Stat(filepath.Join(dir, exitFile)); err == nil {
		return false, nil
	}
	_, err := os.Stat(filepath.Join(dir, stateFile))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// evict takes the lock, ending the monitor that has it: by killing its container,
// and if it does not end then, itself.
func evict(cfg Config) (*os.File, error) {
	dir := cfg.Container.Dir
	hope := patience
	if pid, err := holder(dir); err != nil {
		return nil, err
	} else if pid != 0 {
		ctx, cancel := context.WithTimeout(context.Background(), patience/2)
		defer cancel()
		c, err := Dial(ctx, cfg.Socket)
		if err == nil {
			err = c.Signal(ctx, unix.SIGKILL)
		}
		if err != nil && !errors.Is(err, ErrGone) {
			hope = 0
		}
	}
	f, err := lock(dir, hope)
	if !heldByOther(err) {
		return f, err
	}
	pid, err := holder(dir)
	if err != nil {
		return nil, err
	}
	if pid != 0 {
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			return nil, fmt.Errorf("end the monitor, process %d: %w", pid, err)
		}
		defer unix.Close(fd)
		// Who has the lock still, after its descriptor was opened, is that process.
		if again, err := holder(dir); err == nil && again == pid {
			_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
		}
	}
	return lock(dir, patience)
}

// clearGroups kills what is left in the container's control groups and takes them
// away, where the runtime knows the container no more.
func clearGroups(ctx context.Context, c run.Container) error {
	spec, err := run.Load(c.Dir)
	if err != nil || spec.Linux == nil {
		return nil // no bundle, so nothing ran
	}
	path := filepath.Clean("/" + spec.Linux.CgroupsPath)
	if !strings.Contains(filepath.Base(path), c.ID) {
		return nil // it has none of its own
	}
	dirs, err := filepath.Glob("/sys/fs/cgroup/*" + path)
	if err != nil {
		return err
	}
	dirs = append(dirs, "/sys/fs/cgroup"+path)
	for _, dir := range dirs {
		if err := clearGroup(ctx, dir); err != nil {
			return err
		}
	}
	return nil
}

func clearGroup(ctx context.Context, dir string) error {
	for {
		err := os.Remove(dir)
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) || ctx.Err() != nil {
			return fmt.Errorf("remove the control group: %w", err)
		}
		below, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		for _, e := range below {
			if e.IsDir() {
				if err := clearGroup(ctx, filepath.Join(dir, e.Name())); err != nil {
					return err
				}
			}
		}
		// What is frozen does not die.
		_ = os.WriteFile(filepath.Join(dir, "freezer.state"), []byte("THAWED"), 0)
		_ = os.WriteFile(filepath.Join(dir, "cgroup.freeze"), []byte("0"), 0)
		procs, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		for line := range strings.Lines(string(procs)) {
			if pid, err := strconv.Atoi(strings.TrimSpace(line)); err == nil && pid > 1 {
				_ = unix.Kill(pid, unix.SIGKILL)
			}
		}
		time.Sleep(5 * time.Millisecond)
	}
}
