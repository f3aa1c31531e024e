package monitor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// What Launch and Reap tell the process that they start.
const (
	readyVariable = "VARVE_MONITOR_READY" // the descriptor on which it says that it answers, or why not
	reapVariable  = "VARVE_MONITOR_REAP"  // it is to clean up
	readyWord     = "\x00ready"
)

// Launch starts `argv... dir`, which is to call Main, as a process of its own
// session, and waits until it answers on its socket: from then on clients may
// Dial. argv is the program's path and its hidden verb. A StartError says why
// there is no monitor. ctx ends the waiting, and the monitor if it does not answer
// by then. The container is not started: see Client.Start and
// AttachOptions.Start. A monitor that nobody tells to start for a minute, with no
// client attached, ends; the container stays created.
func Launch(ctx context.Context, dir string, argv ...string) error {
	said, err := spawn(ctx, dir, "", argv)
	if err == nil && said != readyWord {
		if said == "" {
			said = "the monitor of the container does not start: see " + filepath.Join(dir, monitorLog)
		}
		err = &StartError{Code: codeRuntime, Message: said}
	}
	return err
}

// spawn starts a monitor and gives what it says on its pipe: until it is ready, or
// ends.
func spawn(ctx context.Context, dir, variable string, argv []string) (said string, err error) {
	if len(argv) == 0 {
		return "", errors.New("start a monitor: no program is named")
	}
	log, err := os.OpenFile(filepath.Join(dir, monitorLog), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return "", fmt.Errorf("start a monitor: %w", err)
	}
	defer log.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return "", fmt.Errorf("start a monitor: %w", err)
	}
	defer r.Close()
	cmd := exec.Command(argv[0], append(slices.Clone(argv[1:]), dir)...)
	cmd.Dir = "/"
	cmd.Env = append(slices.DeleteFunc(os.Environ(), systemd), readyVariable+"=3")
	if variable != "" {
		cmd.Env = append(cmd.Env, variable)
	}
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = []*os.File{w}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	w.Close()
	if err != nil {
		return "", fmt.Errorf("start a monitor: %w", err)
	}
	// It outlives this process as a rule; if not, it leaves no zombie.
	go func() { _ = cmd.Wait() }()
	stop := context.AfterFunc(ctx, func() { cmd.Process.Kill(); r.Close() })
	b, err := io.ReadAll(io.LimitReader(r, 64<<10))
	if !stop() && ctx.Err() != nil {
		return "", ctx.Err()
	}
	if err != nil {
		return "", fmt.Errorf("start a monitor: %w", err)
	}
	return string(b), nil
}

// systemd says which variables mean the daemon, and none of its children.
func systemd(kv string) bool {
	for _, key := range []string{"NOTIFY_SOCKET=", "LISTEN_FDS=", "LISTEN_PID=", "LISTEN_FDNAMES=", "WATCHDOG_PID=", "WATCHDOG_USEC="} {
		if strings.HasPrefix(kv, key) {
			return true
		}
	}
	return false
}
