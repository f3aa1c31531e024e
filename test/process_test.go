package test

import (
	"bufio"
	"io"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func pidfdOpen(pid int) (int, error) { return unix.PidfdOpen(pid, 0) }

// waitGone waits until the process of a pidfd has ended.
func waitGone(fd int) error {
	for {
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1)
		if err != unix.EINTR {
			return err
		}
	}
}

// helper runs test/child to its end and gives what it printed.
func helper(t *testing.T, verb, path string) string {
	t.Helper()
	out, err := exec.Command(child, verb, path).Output()
	if err != nil {
		t.Fatalf("child %s %s: %v: %s", verb, path, err, stderrOf(err))
	}
	return strings.TrimSpace(string(out))
}

func stderrOf(err error) string {
	if e, ok := err.(*exec.ExitError); ok {
		return strings.TrimSpace(string(e.Stderr))
	}
	return ""
}

// holder is a process that has a file open.
type holder struct {
	cmd *exec.Cmd
	in  io.Closer
	out *bufio.Reader
}

func hold(t *testing.T, path string) *holder {
	t.Helper()
	cmd := exec.Command(child, "hold", path)
	in, err := cmd.StdinPipe()
	must(t, err)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	h := &holder{cmd, in, bufio.NewReader(out)}
	if line, err := h.out.ReadString('\n'); line != "open\n" {
		t.Fatalf("child hold %s: %q %v", path, line, err)
	}
	t.Cleanup(func() { in.Close(); cmd.Wait() })
	return h
}

func (h *holder) pid() int { return h.cmd.Process.Pid }

// read lets it read the file and gives its digest.
func (h *holder) read(t *testing.T) string {
	t.Helper()
	h.in.Close()
	line, _ := h.out.ReadString('\n')
	if err := h.cmd.Wait(); err != nil {
		t.Fatalf("the holder could not read: %v", err)
	}
	return strings.TrimSpace(line)
}

// fromMount gives a program that lies in a mount, begun by one that does not: the
// runtime lets a thread wait for a program's first bytes as if it were computing, and
// the registry that has them is in this process.
func fromMount(path string, args ...string) *exec.Cmd {
	return exec.Command("env", append([]string{path}, args...)...)
}
