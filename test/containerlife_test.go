package test

import (
	"bufio"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// stays is a shell script that says when it runs, counts its runs, and ends with 3
// when it is asked to.
const stays = `echo run >> /runs; trap "echo bye; exit 3" TERM; echo ready; while :; do sleep 0.02; done`

// TestContainerLife takes a container through all that can be done to one.
func TestContainerLife(t *testing.T) {
	h, r := newContainers(t)
	ref := shellImage(t, r, "run/shell:1", shellLayer(t), nil)
	cid := filepath.Join(h.root, "cid")
	id := h.ok("run", "-d", "--name", "c", "--cidfile", cid, "-l", "a=b", ref, "sh", "-c", stays)
	holds(t, cid, id)
	if len(id) != 64 {
		t.Fatalf("run -d printed %q", id)
	}
	if line := h.fails(125, "run", "--cidfile", cid, ref, "true"); !strings.Contains(line, cid) {
		t.Errorf("a cidfile that is there: %q", line)
	}
	h.says("c", "ready")
	if got := h.process("c"); got != "Up T" {
		t.Errorf("status %q", got)
	}
	if out := h.ok("ps", "--format", "{{.ID}} {{.State}} {{.Command}} {{.Mountpoint}}"); out != id[:12]+` running "sh -c echo run >> /…" `+filepath.Join(h.root, "run/mnt/c") {
		t.Errorf("ps: %q", out)
	}
	s := h.state("c")
	if s.Status != "running" || !s.Running || !alive(s.Pid) || s.StartedAt.IsZero() || !s.FinishedAt.IsZero() {
		t.Errorf("state %+v", s)
	}
	if out := h.ok("inspect", "-f", `{{.Path}} {{.Image}} {{.Name}} {{index .Container.Options.Labels "a"}} {{.MountState}}`, id[:6]); out != "sh "+ref+" c b mounted" {
		t.Errorf("inspect: %q", out)
	}

	// What runs in a mount is not unmounted, and not removed unless that is forced.
	for _, args := range [][]string{{"umount", "c"}, {"umount", "-f", "c"}, {"rm", "c"}, {"umount", h.ok("ps", "--format", "{{.Mountpoint}}")}} {
		if line := h.fails(7, args...); !strings.Contains(line, "c") || !strings.Contains(line, "stop") {
			t.Errorf("%v: %q", args, line)
		}
	}
	if line := h.fails(125, "run", "--name", "c", ref, "true"); !strings.Contains(line, "already in use") {
		t.Errorf("a second one of its name: %q", line)
	}
	h.fails(7, "mount", "--rw", "--name", "c", ref)

	// Further processes.
	h.gives("run\n", "exec", "c", "cat", "/runs")
	h.gives("E /data 1000\n", "exec", "-e", "X=E", "-w", "/data", "-u", "jo", "c", "sh", "-c", "echo $X $(pwd) $(id -u)")
	if res := h.with("in", "exec", "-i", "c", "sh", "-c", "cat; echo err >&2; exit 5"); res.code != 5 || res.out != "in" || res.err != "err\n" {
		t.Error(res)
	}
	h.fails(127, "exec", "c", "no-such")
	h.fails(126, "exec", "c", "/etc/plain")
	h.fails(125, "exec", "--no-such-flag", "c", "true")
	h.fails(125, "exec", "no-such-container", "true")
	h.fails(1, "exec", "-it", "c", "sh")
	h.gives("", "exec", "-d", "c", "sh", "-c", "echo later > /later")
	h.eventually("exec -d", func() string { return h.run("exec", "c", "cat", "/later").out }, "later\n")
	if out := h.ok("diff", "c"); !strings.Contains(out, "A /later") || !strings.Contains(out, "A /runs") || strings.Contains(out, "/proc") || strings.Contains(out, "resolv.conf") {
		t.Errorf("diff: %q", out)
	}
	holds(t, filepath.Join(h.root, "run/mnt/c/later"), "later\n")

	// Its end by the signal that it knows, and what is known of it then.
	waiting := h.command("wait", "c")
	var code strings.Builder
	waiting.Stdout = &code
	must(t, waiting.Start())
	h.gives("c\n", "stop", "c")
	must(t, waiting.Wait())
	if code.String() != "3\n" {
		t.Errorf("wait printed %q", code.String())
	}
	if got := h.process("c"); got != "Exited (3) T" {
		t.Errorf("status %q", got)
	}
	if out := h.ok("ps", "-q"); out != "" {
		t.Errorf("ps lists %q", out)
	}
	if out := h.ok("ps", "-lq"); out != id[:12] {
		t.Errorf("ps -l lists %q", out)
	}
	if s := h.state("c"); s.Status != "exited" || s.Running || s.ExitCode != 3 || s.Pid != 0 || s.FinishedAt.Before(s.StartedAt) {
		t.Errorf("state %+v", s)
	}
	h.gives("3\n", "wait", "c")
	h.gives("c\n", "stop", "c")
	h.gives("ready\nbye\n", "logs", "c")
	h.gives("bye\n", "logs", "-n", "1", "c")
	h.gives("", "logs", "--since", "0s", "c")
	h.gives("ready\nbye\n", "logs", "--since", "10m", "--until", "2100-01-01", "c")
	stamp, _, _ := strings.Cut(h.ok("logs", "-t", "-n", "1", "c"), " ")
	if _, err := time.Parse(time.RFC3339Nano, stamp); err != nil {
		t.Error(err)
	}
	h.fails(2, "logs", "--tail", "some", "c")
	h.fails(2, "logs", "--since", "yesterday", "c")
	h.fails(3, "logs", "no-such")
	h.fails(125, "exec", "c", "true")
	h.fails(1, "kill", "c")
	if len(h.mounted()) != 0 {
		t.Errorf("of one that ended: mounts %q", h.mounted())
	}
	h.eventually("monitors of one that ended", func() string { return strings.Join(h.monitors(), " ") }, "")

	// Again, with what was changed.
	h.gives("c\n", "start", "c")
	h.gives("c\n", "start", "c")
	h.eventually("the second run", func() string { return h.run("exec", "c", "cat", "/runs").out }, "run\nrun\n")
	h.fails(2, "kill", "-s", "NOTHING", "c")
	h.gives("c\n", "kill", "c")
	if s := h.state("c"); s.ExitCode != 137 || s.OOMKilled {
		t.Errorf("state %+v", s)
	}
	// A signal that it does not heed is followed by one that nobody needs to.
	h.ok("start", "c")
	h.eventually("the third run", func() string { return h.run("exec", "c", "cat", "/runs").out }, "run\nrun\nrun\n")
	began := time.Now()
	h.ok("stop", "-t", "1", "-s", "USR2", "c")
	if took := time.Since(began); took < time.Second {
		// USR2 ends a process that does not handle it, but not a namespace's first.
		t.Errorf("it was killed after %v", took)
	}
	if got := h.process("c"); got != "Exited (137) T" {
		t.Errorf("status %q", got)
	}
	// Attached: its output and its end are the verb's.
	start := h.command("start", "-a", "c")
	pipe := mustGet[io.ReadCloser](t)(start.StdoutPipe())
	must(t, start.Start())
	out := bufio.NewReader(pipe)
	first, err := out.ReadString('\n') // from then on it heeds the signal
	must(t, err)
	h.ok("stop", "c")
	rest := mustGet[[]byte](t)(io.ReadAll(out))
	start.Wait()
	if got := first + string(rest); start.ProcessState.ExitCode() != 3 || got != "ready\nbye\n" {
		t.Errorf("start -a: exit %d, %q", start.ProcessState.ExitCode(), got)
	}
	// One that ended is a mount like any other that is unmounted.
	dir := h.ok("mount", "--name", "c")
	holds(t, filepath.Join(dir, "runs"), "run\nrun\nrun\nrun\n")
	if got := h.process("c"); got != "Exited (3) T (mounted)" {
		t.Errorf("status %q", got)
	}
	h.ok("umount", "c")
	h.gives("c\n", "rm", "-v", "c")
	h.fails(3, "rm", "c")
	h.fails(3, "start", "c")
	h.fails(3, "stop", "c")

	// What is no container.
	h.ok("mount", "--name", "plain", ref)
	for _, args := range [][]string{{"start", "plain"}, {"stop", "plain"}, {"logs", "plain"}, {"wait", "plain"}} {
		h.fails(1, args...)
	}
	h.fails(125, "exec", "plain", "true")
	h.ok("umount", "plain")
}

// TestContainerFollow reads a log while it is written.
func TestContainerFollow(t *testing.T) {
	h, r := newContainers(t)
	ref := shellImage(t, r, "run/shell:1", shellLayer(t), nil)
	told := t.TempDir()
	h.ok("run", "-d", "--name", "c", "-v", told+":/told", ref, "sh", "-c", `for i in 1 2 3; do echo out $i; echo err $i >&2; until [ -e /told/$i ]; do sleep 0.02; done; done`)
	follow := h.command("logs", "-f", "c")
	var out, errs strings.Builder
	follow.Stdout, follow.Stderr = &out, &errs
	must(t, follow.Start())
	for i := range 3 {
		h.says("c", "out "+strconv.Itoa(i+1))
		must(t, os.WriteFile(filepath.Join(told, strconv.Itoa(i+1)), nil, 0o600))
	}
	must(t, follow.Wait())
	if out.String() != "out 1\nout 2\nout 3\n" || errs.String() != "err 1\nerr 2\nerr 3\n" {
		t.Errorf("logs -f: %q %q", out.String(), errs.String())
	}
	h.ok("rm", "c")
}

// TestContainerNotStarted leaves what docker leaves of one that cannot be.
func TestContainerNotStarted(t *testing.T) {
	h, r := newContainers(t)
	ref := shellImage(t, r, "run/shell:1", shellLayer(t), nil)
	for _, more := range [][]string{nil, {"-d"}} {
		h.fails(127, slices.Concat([]string{"run", "--name", "c"}, more, []string{ref, "no-such"})...)
		if got := h.process("c"); got != "Created" {
			t.Errorf("status %q", got)
		}
		if s := h.state("c"); s.Status != "created" || s.ExitCode != 127 || !strings.Contains(s.Error, "no-such") {
			t.Errorf("state %+v", s)
		}
		if line := h.fails(1, "start", "c"); !strings.Contains(line, "no-such") {
			t.Errorf("start: %q", line)
		}
		if len(h.mounted()) != 0 {
			t.Errorf("mounts of one that was not started: %q", h.mounted())
		}
		h.ok("rm", "c")
	}
}

// TestContainerCommit commits what a container wrote while it writes: it does not run
// for the moment, and runs on.
func TestContainerCommit(t *testing.T) {
	h, r := newContainers(t)
	ref := shellImage(t, r, "run/shell:1", shellLayer(t), func(c *v1.Config) { c.Entrypoint, c.Cmd = []string{"sh", "-c"}, []string{"echo of the image"} })
	h.ok("run", "-d", "--name", "c", "-e", `SAID=it's "$5" \ worth`, "-w", "/work", "-l", "of=test", ref,
		`i=0; while :; do i=$((i+1)); echo >> /first; echo >> /second; [ $i = 3 ] && echo ready; sleep 0.001; done`)
	h.says("c", "ready")
	for i := range 3 {
		digest := h.commit("c", "made:"+strconv.Itoa(i))
		// Of what it writes in turn the image has as much, or one more.
		h.gives("fits\n", "run", "--rm", "made:"+strconv.Itoa(i), `count() { n=0; while read x; do n=$((n+1)); done < $1; }; count /first; a=$n; count /second; case $((a-n)) in 0|1) echo fits;; *) echo $a $n;; esac`)
		c := mustGet[*v1.ConfigFile](t)(h.made(digest).ConfigFile())
		if !slices.Contains(c.Config.Env, `SAID=it's "$5" \ worth`) || c.Config.WorkingDir != "/work" || c.Config.Labels["of"] != "test" || len(c.Config.Cmd) != 1 || !strings.HasPrefix(c.Config.Cmd[0], "i=0") || c.Config.Entrypoint[0] != "sh" {
			t.Errorf("config %+v", c.Config)
		}
		if last := c.History[len(c.History)-1]; !strings.HasPrefix(last.CreatedBy, "i=0;") {
			t.Errorf("created by %q", last.CreatedBy)
		}
		var names []string
		for name := range applied(t, topLayers(t, h.made(digest), 1)...) {
			names = append(names, name)
		}
		for _, name := range names {
			if strings.HasPrefix(name, "proc") || strings.HasPrefix(name, "sys") || strings.HasPrefix(name, "dev") || strings.HasSuffix(name, "resolv.conf") {
				t.Errorf("committed: %s of %q", name, names)
			}
		}
	}
	read := func() string { b, _ := os.ReadFile(filepath.Join(h.root, "run/mnt/c/first")); return string(b) }
	was := read()
	h.eventually("it goes on", func() string {
		if read() != was {
			return "on"
		}
		return "stands"
	}, "on")
	if s := h.state("c"); s.Status != "running" {
		t.Errorf("state %+v", s)
	}
	h.ok("commit", "--no-pause", "c", "made:loose")
	h.ok("rm", "-f", "c")
}
