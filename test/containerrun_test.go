package test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/console"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// TestRunEnds looks at what a container writes and how it ends, and at what
// keeps one from being started.
func TestRunEnds(t *testing.T) {
	h, r := newContainers(t)
	ref := shellImage(t, r, "run/shell:1", shellLayer(t), nil)
	sh := func(script string, flags ...string) []string {
		return append(append([]string{"run", "--rm"}, flags...), ref, "sh", "-c", script)
	}
	for _, tt := range []struct {
		args []string
		in   string
		want result
	}{
		{sh("echo out; echo err >&2"), "", result{out: "out\n", err: "err\n"}},
		{sh("exit 7"), "", result{code: 7}},
		{sh("exit 130"), "", result{code: 130}},
		{sh(`sh -c 'kill -SEGV $$'`), "", result{code: 139, err: "Segmentation fault\n"}},
		{sh("cat; echo end", "-i"), "a\nb", result{out: "a\nbend\n"}},
		{sh("cat; echo end"), "unread", result{out: "end\n"}},
		{sh("read x; echo got $x", "-i"), strings.Repeat("line\n", 100_000), result{out: "got line\n"}},
		{[]string{"run", "--rm", "-i", ref, "child", "sum", "/dev/stdin"}, strings.Repeat("0123456789abcdef", 1<<16), result{out: sumOf([]byte(strings.Repeat("0123456789abcdef", 1<<16))) + "\n"}},
		{[]string{"run", "--rm", "-i", ref}, "echo from the shell", result{out: "from the shell\n"}},
		{[]string{"run", "--rm", "--entrypoint", "cat", ref, "/etc/plain"}, "", result{out: "not a program\n"}},
		// --rm is the container's, no flag of ours follows the image's name.
		{[]string{"run", "--rm", ref, "sh", "-c", "echo $0 $@", "--rm", "-d"}, "", result{out: "--rm -d\n"}},
	} {
		got := h.with(tt.in, tt.args...)
		tt.want.args = tt.args
		if got.err = regexp.MustCompile(`(?m)^.*Segmentation`).ReplaceAllString(got.err, "Segmentation"); got.String() != tt.want.String() {
			t.Errorf("want %s\ngot %s", tt.want, got)
		}
	}
	for _, tt := range []struct {
		code int
		says string
		args []string
	}{
		{127, `"no-such": executable file not found in $PATH`, []string{ref, "no-such"}},
		{127, "no such file or directory", []string{ref, "/no/such"}},
		{126, "permission denied", []string{ref, "/etc/plain"}},
		{126, "", []string{ref, "/etc"}},
		{125, "no-such-flag", []string{"--no-such-flag", ref}},
		{125, "image is missing", nil},
		{125, "no-such-runtime", []string{"--runtime", "no-such-runtime", ref, "sh"}},
		{125, "No such image", []string{strings.Replace(ref, "shell:1", "none:1", 1)}},
		{125, "unable to find user nobody-here", []string{"-u", "nobody-here", ref, "sh"}},
		{125, "bad name", []string{"--name", "bad name", ref, "sh"}},
		{125, "bridge", []string{"--network", "bridge", ref, "sh"}},
		{125, "CAP", []string{"--cap-add", "NO_SUCH", ref, "sh"}},
		{125, "", []string{"-m", "lots", ref, "sh"}},
		{125, "", []string{"-m", "1k", ref, "sh"}},
		{125, "", []string{"-v", "relative/../path:", ref, "sh"}},
		{125, "", []string{"-e", "", ref, "sh"}},
		{125, "", []string{"--env-file", "/no/such/file", ref, "sh"}},
		{125, "", []string{"--pull", "sometimes", ref, "sh"}},
		{125, "", []string{"--stop-signal", "SIGNOTHING", ref, "sh"}},
	} {
		if line := h.fails(tt.code, append([]string{"run", "--rm"}, tt.args...)...); !strings.Contains(line, tt.says) {
			t.Errorf("run %v says %q, want %q in it", tt.args, line, tt.says)
		}
	}
	// None of them has left anything.
	if out := h.ok("ps", "-aq"); out != "" {
		t.Errorf("left: %q", out)
	}
	// Where neither runtime can be found both are named.
	h2 := *h
	h2.env = append(h.env[1:len(h.env):len(h.env)], "PATH=/nonexistent")
	h.stop()
	if line := h2.fails(125, "run", "--rm", ref, "sh"); !strings.Contains(line, "crun") || !strings.Contains(line, "runc") {
		t.Errorf("no runtime: %q", line)
	}
	h.stop()
}

// TestRunInside looks from inside at what a container was given.
func TestRunInside(t *testing.T) {
	h, r := newContainers(t)
	layer := shellLayer(t)
	ref := shellImage(t, r, "run/shell:1", layer, nil)
	other := shellImage(t, r, "run/other:1", layer, func(c *v1.Config) {
		c.Entrypoint, c.Cmd = []string{"sh", "-c", "echo $0 $@", "entry"}, []string{"of", "image"}
		c.User, c.WorkingDir, c.Volumes, c.StopSignal = "jo", "/home/jo", map[string]struct{}{"/data": {}}, "SIGUSR1"
		c.Env = append(c.Env, "HOME=/elsewhere")
	})
	dir := filepath.Join(h.root, "shared")
	must(t, os.Mkdir(dir, 0o755))
	put(t, filepath.Join(dir, "file"), "of the host\n")
	envFile := filepath.Join(h.root, "env")
	put(t, envFile, "# a comment\nFILE=1\nPASSED\n")
	h.env = append(h.env, "PASSED=on")
	h2 := func(want string, args ...string) {
		t.Helper()
		h.gives(want, append([]string{"run", "--rm"}, args...)...)
	}
	status := func(field string) string {
		return `while read k v; do case $k in ` + field + `:) echo $v;; esac; done < /proc/self/status`
	}

	h2("image - 1 on set\n", "-e", "SET=set", "-e", "NOT_HERE", "--env-file", envFile, ref, "sh", "-c", "echo $FROM ${NOT_HERE--} $FILE $PASSED $SET")
	h2("/bin /root\n", ref, "sh", "-c", "echo $PATH $HOME")
	h2("/made/here\n", "-w", "/made/here", ref, "sh", "-c", "pwd")
	h2("entry of image\n", other)
	h2("entry other words\n", other, "other", "words")
	h2("1000 /home/jo /elsewhere 1000 2000\n", "--entrypoint", "sh", other, "-c", "echo $(id -u) $(pwd) $HOME $(id -G)")
	h2("1000 1000 1000 2000 /home/jo\n", "-u", "jo", ref, "sh", "-c", "echo $(id -u) $(id -g) $(id -G) $HOME")
	h2("1000 0 0\n", "-u", "jo:root", ref, "sh", "-c", "echo $(id -u) $(id -g) $(id -G)")
	h2("4242 0\n", "-u", "4242", ref, "sh", "-c", "echo $(id -u) $(id -g)")
	h2("box\n", "-h", "box", ref, "cat", "/proc/sys/kernel/hostname")
	h2("1\n", ref, "sh", "-c", "echo $$")

	// Capabilities and seccomp: docker's.
	h2("00000000a80425fb\n", ref, "sh", "-c", status("CapBnd"))
	h2("00000000a80425fb\n", ref, "sh", "-c", status("CapEff"))
	h2("0000000000000000\n", "-u", "jo", ref, "sh", "-c", status("CapEff"))
	h2("0000000000000000\n", "--cap-drop", "all", ref, "sh", "-c", status("CapBnd"))
	h2("0000000000001000\n", "--cap-drop", "all", "--cap-add", "net_admin", ref, "sh", "-c", status("CapEff"))
	h2("2\n", ref, "sh", "-c", status("Seccomp"))
	h2("0\n", "--security-opt", "seccomp=unconfined", ref, "sh", "-c", status("Seccomp"))
	h2("0\n", "--privileged", ref, "sh", "-c", status("Seccomp"))
	h2("1\n", "--security-opt", "no-new-privileges", ref, "sh", "-c", status("NoNewPrivs"))

	// What can be written, and where it goes.
	h2("", ref, "sh", "-c", "echo x > /etc/new && touch /new")
	if r := h.run("run", "--rm", "--read-only", "--tmpfs", "/tmp", ref, "sh", "-c", "touch /tmp/x && touch /new"); r.code == 0 || !strings.Contains(r.err, "Read-only file system") || strings.Contains(r.err, "/tmp") {
		t.Errorf("--read-only: %s", r)
	}
	h2("of the host\n", "-v", dir+":/mnt", ref, "sh", "-c", "cat /mnt/file; echo mine > /mnt/new")
	holds(t, filepath.Join(dir, "new"), "mine\n")
	if r := h.run("run", "--rm", "-v", dir+":/mnt:ro", ref, "touch", "/mnt/no"); r.code == 0 || !strings.Contains(r.err, "Read-only") {
		t.Errorf("-v :ro: %s", r)
	}
	missing(t, filepath.Join(dir, "no"))
	h2("from the image\n", "-v", "kept:/data", ref, "sh", "-c", "cat /data/seed; echo kept > /data/seed")
	h2("kept\n", "-v", "kept:/data", ref, "cat", "/data/seed")
	h2("from the image\n", "--entrypoint", "cat", other, "/data/seed")

	// Limits, as the kernel has them.
	memory, pids := "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/pids.max"
	if _, err := os.Stat("/sys/fs/cgroup/memory"); err == nil {
		memory, pids = "/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/pids/pids.max"
	}
	h2("67108864\n", "-m", "64m", ref, "cat", memory)
	h2("77\n", "--pids-limit", "77", ref, "cat", pids)

	// Networks.
	h2("lo\n", "--network", "none", ref, "ls", "/sys/class/net")
	link, err := os.Readlink("/proc/self/ns/net")
	must(t, err)
	h2("/proc/1/ns/net -> "+link+"\n", ref, "sh", "-c", `set -- $(ls -l /proc/1/ns/net); shift 8; echo $@`)
}

// terminal is a user's, with a verb at it.
type terminal struct {
	t      *testing.T
	master console.Console
	cmd    *exec.Cmd

	mu   sync.Mutex // guards seen
	seen strings.Builder
}

// sits runs a verb at a terminal of its own, of 33 lines.
func (h *host) sits(args ...string) *terminal {
	t := h.t
	t.Helper()
	master, path, err := console.NewPty()
	must(t, err)
	t.Cleanup(func() { master.Close() })
	must(t, master.Resize(console.WinSize{Height: 33, Width: 99}))
	slave, err := os.OpenFile(path, os.O_RDWR|syscall.O_NOCTTY, 0)
	must(t, err)
	defer slave.Close()
	u := &terminal{t: t, master: master, cmd: h.command(args...)}
	u.cmd.Stdin, u.cmd.Stdout, u.cmd.Stderr = slave, slave, slave
	u.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	must(t, u.cmd.Start())
	go func() {
		buf := make([]byte, 4096)
		for {
			n, err := master.Read(buf)
			if err != nil {
				return
			}
			u.mu.Lock()
			u.seen.Write(buf[:n])
			u.mu.Unlock()
		}
	}()
	return u
}

func (u *terminal) types(s string) { mustGet[int](u.t)(u.master.Write([]byte(s))) }

// shows waits until the terminal shows a text, typing something while it does not.
func (u *terminal) shows(want, types string) {
	u.t.Helper()
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		u.mu.Lock()
		got := strings.ReplaceAll(u.seen.String(), "\r", "")
		u.mu.Unlock()
		if strings.Contains(got, want) {
			return
		}
		if time.Now().After(end) {
			u.t.Fatalf("the terminal shows %q, want %q in it", got, want)
		}
		u.types(types)
	}
}

// ends waits for the verb's end and gives its exit code.
func (u *terminal) ends() int {
	u.cmd.Wait()
	return u.cmd.ProcessState.ExitCode()
}

// TestRunTerminal is a user at a terminal, who also leaves and comes back.
func TestRunTerminal(t *testing.T) {
	h, r := newContainers(t)
	ref := shellImage(t, r, "run/shell:1", shellLayer(t), nil)
	h.fails(1, "run", "--rm", "-it", ref, "sh") // stdin is no terminal
	u := h.sits("run", "-it", "--name", "tty", ref, "sh")
	u.shows("# ", "")
	u.types("stty size; echo term=$TERM\n")
	u.shows("33 99\nterm=xterm\n", "")
	must(t, u.master.Resize(console.WinSize{Height: 44, Width: 111}))
	u.types("until [ \"$(stty size)\" = '44 111' ]; do sleep 0.01; done; echo re''sized\n")
	u.shows("resized\n", "")
	u.types("\x10\x11") // ctrl-p ctrl-q
	if code := u.ends(); code != 0 {
		t.Errorf("detached: exit %d", code)
	}
	if s := h.state("tty"); !s.Running {
		t.Errorf("the container ended with its terminal: %+v", s)
	}
	u = h.sits("attach", "tty")
	u.shows("attached\n", "echo at''tached\n")
	u.types("sleep 100\n")
	u.shows("sleep 100\n", "")
	u.types("\x03") // ctrl-c is the container's
	u.types("echo back; exit 9\n")
	if code := u.ends(); code != 9 {
		t.Errorf("attach ended with %d", code)
	}
	h.ok("rm", "tty")
	if code := h.sits("run", "--rm", "-it", ref, "sh", "-c", "exit 130").ends(); code != 130 {
		t.Errorf("ended with %d", code)
	}
	u = h.sits("run", "--rm", "-it", ref, "sh", "-c", "echo ready; cat")
	u.shows("ready\n", "")
	u.types("line\n")
	u.shows("line\nline\n", "")
	u.types("\x04") // ctrl-d
	if code := u.ends(); code != 0 {
		t.Errorf("cat ended with %d", code)
	}
}

// TestRunSignals passes on what the verb is sent.
func TestRunSignals(t *testing.T) {
	h, r := newContainers(t)
	ref := shellImage(t, r, "run/shell:1", shellLayer(t), nil)
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGUSR1} {
		cmd := h.command("run", "--rm", "--name", "s", ref, "sh", "-c", `trap "exit 40" INT; trap "exit 41" TERM; trap "exit 42" USR1; echo ready; while :; do sleep 0.02; done`)
		must(t, cmd.Start())
		h.says("s", "ready")
		must(t, cmd.Process.Signal(sig))
		cmd.Wait()
		want := map[syscall.Signal]int{syscall.SIGINT: 40, syscall.SIGTERM: 41, syscall.SIGUSR1: 42}[sig]
		if code := cmd.ProcessState.ExitCode(); code != want {
			t.Errorf("%v: ended with %d, want %d", sig, code, want)
		}
	}
	// A client that dies takes nothing with it; --rm holds all the same.
	told := t.TempDir()
	cmd := h.command("run", "--rm", "--name", "s", "-v", told+":/told", ref, "sh", "-c", `echo ready; until [ -e /told/go ]; do sleep 0.02; done`)
	must(t, cmd.Start())
	h.says("s", "ready")
	must(t, cmd.Process.Kill())
	cmd.Wait()
	must(t, os.WriteFile(filepath.Join(told, "go"), nil, 0o600))
	h.eventually("s", func() string { return h.process("s") }, "none")
}

// TestRunStats compares what --stats says with what the registry was asked.
func TestRunStats(t *testing.T) {
	h, r := newContainers(t)
	ref := shellImage(t, r, "run/shell:1", shellLayer(t), nil)
	form := regexp.MustCompile(`^started after [\d.]+m?s with (\S+) fetched; (\S+) fetched in all, of the (\S+) in the image\n$`)
	for i, want := range []bool{true, false} {
		res := h.run("run", "--rm", "--stats", "--record-for", "0", "--prefetch", "all", ref, "sh", "-c", "exit 3")
		m := form.FindStringSubmatch(res.err)
		if res.code != 3 || m == nil || (m[2] != "0B") != want {
			t.Errorf("run %d: %s", i, res)
		}
		if i == 0 {
			h.ok("warm", ref, "/")
			h.ok("pull", "--full", ref)
		}
	}
}

// TestRunMany starts containers of one image all at once.
func TestRunMany(t *testing.T) {
	h, r := newContainers(t)
	ref := shellImage(t, r, "run/shell:1", shellLayer(t), nil)
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			want := fmt.Sprintf("%d of 8\n", i)
			if res := h.run("run", "--rm", ref, "sh", "-c", "echo "+want[:6]+" > /mine; cat /mine"); res.code != 0 || res.out != want || res.err != "" {
				t.Errorf("want %q: %s", want, res)
			}
		})
	}
	all.Wait()
	// One name is one container's.
	codes := make([]int, 6)
	for i := range codes {
		all.Go(func() { codes[i] = h.run("run", "-d", "--name", "one", ref, "sleep", "1000").code })
	}
	all.Wait()
	var ok int
	for _, c := range codes {
		if c == 0 {
			ok++
		} else if c != 125 {
			t.Errorf("codes %v", codes)
		}
	}
	if ok != 1 {
		t.Errorf("codes %v", codes)
	}
	h.ok("rm", "-f", "one")
}
