package monitor

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"

	runc "github.com/containerd/go-runc"
)

// Docker's exit codes of what was not started.
const (
	codeRuntime  = 125
	codeNotExec  = 126
	codeNotFound = 127
)

// newRuntime gives the runtime of a container. What it complains of is in a log of
// its own, in JSON: its stderr is the container's. It dies with this process, so
// that nothing goes on behind Reap.
func newRuntime(c *Config, path string, noCgroups bool) *runc.Runc {
	r := &runc.Runc{Command: path, Root: c.RuntimeRoot, Log: c.path(runtimeLog), LogFormat: runc.JSON, PdeathSignal: syscall.SIGKILL}
	if noCgroups && strings.Contains(filepath.Base(path), "crun") {
		r.ExtraArgs = []string{"--cgroup-manager=disabled"}
	}
	return r
}

// complaint gives what the runtime last wrote into its log, "" if nothing.
func complaint(log string) string {
	f, err := os.Open(log)
	if err != nil {
		return ""
	}
	defer f.Close()
	if st, err := f.Stat(); err == nil && st.Size() > 1<<20 {
		f.Seek(-1<<20, io.SeekEnd)
	}
	last := ""
	for s := bufio.NewScanner(f); s.Scan(); {
		var line struct{ Level, Msg string }
		if json.Unmarshal(s.Bytes(), &line) == nil && (line.Level == "error" || line.Level == "fatal") {
			last = line.Msg
		}
	}
	return last
}

// failure is what a call of the runtime came to, with what it wrote to its log.
func failure(verb string, err error, log string) error {
	if msg := complaint(log); msg != "" {
		return fmt.Errorf("%s the container: %s", verb, plain(msg))
	}
	return fmt.Errorf("%s the container: %w", verb, err)
}

// runcPrefixes say which of runc's parts failed, which is of no use to a user.
var runcPrefixes = regexp.MustCompile(`^((runc create failed|exec failed|unable to start container process|container_linux\.go:\d+|starting container process caused|OCI runtime [a-z]+ failed): )+`)

func plain(msg string) string {
	return runcPrefixes.ReplaceAllString(strings.TrimSpace(msg), "")
}

var (
	crunNotFound = regexp.MustCompile("^executable file `(.*)` not found")
	crunNotExec  = regexp.MustCompile("^(?:open executable|exec container process[^:]*): (.*)$")
	runcExec     = regexp.MustCompile(`exec: ".*": (.*)$`)
	noDirectory  = regexp.MustCompile(`^(?:chdir to cwd .*|chdir(?: to)? .*): (?i:no such file or directory)$`)
)

// notStarted tells a user why a process was not started, from what the runtime
// said, in the words that docker has for it, with docker's exit code.
func notStarted(err error, log string, args []string) *StartError {
	var se *StartError
	if errors.As(err, &se) {
		return se
	}
	msg := plain(complaint(log))
	if msg == "" {
		return &StartError{Code: codeRuntime, Message: err.Error()}
	}
	name := ""
	if len(args) > 0 {
		name = args[0]
	}
	if m := runcExec.FindStringSubmatch(msg); m != nil {
		code := codeNotExec
		if strings.Contains(m[1], "not found") || strings.Contains(m[1], "no such file or directory") {
			code = codeNotFound
		}
		return &StartError{Code: code, Message: m[0]}
	}
	if crunNotFound.MatchString(msg) {
		if strings.Contains(name, "/") {
			return &StartError{Code: codeNotFound, Message: fmt.Sprintf("exec: %q: stat %s: no such file or directory", name, name)}
		}
		return &StartError{Code: codeNotFound, Message: fmt.Sprintf("exec: %q: executable file not found in $PATH", name)}
	}
	if m := crunNotExec.FindStringSubmatch(msg); m != nil {
		why := strings.ToLower(m[1])
		if why == "operation not permitted" { // crun's, of a directory
			why = "permission denied"
		}
		return &StartError{Code: codeNotExec, Message: fmt.Sprintf("exec: %q: %s", name, why)}
	}
	if noDirectory.MatchString(msg) {
		return &StartError{Code: codeNotFound, Message: msg}
	}
	return &StartError{Code: codeRuntime, Message: msg}
}

// readPid reads what the runtime wrote with --pid-file, and removes it.
func readPid(path string) (int, error) {
	defer os.Remove(path)
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	var pid int
	if _, err := fmt.Sscanf(string(b), "%d", &pid); err != nil || pid <= 1 {
		return 0, fmt.Errorf("the runtime gave no pid: %q", b)
	}
	return pid, nil
}

// remove deletes the container in the runtime, killing what is left of it.
func remove(ctx context.Context, r *runc.Runc, id string) error {
	os.Remove(r.Log)
	err := r.Delete(ctx, id, &runc.DeleteOpts{Force: true})
	if _, serr := os.Lstat(filepath.Join(r.Root, id)); errors.Is(serr, fs.ErrNotExist) {
		return nil // by another one, at the same moment, if not by this
	}
	if err != nil {
		return failure("delete", err, r.Log)
	}
	return nil
}
