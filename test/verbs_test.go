package test

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/bench/forms"
)

func TestUsage(t *testing.T) {
	h := newHost(t)
	for _, args := range [][]string{
		{"no-such-verb"}, {"--no-such-flag"}, {"mount", "--no-such-flag"}, {"mount", "a", "b", "c"},
		{"mount", "--pull", "sometimes", "x"}, {"mount", "lower/UPPER"}, {"ls", "lower/UPPER"}, {"cat", "x:y:z", "/f"}, {"mount", ""}, {"mount", "a b"}, {"mount", "x:y:z"},
		{"umount"}, {"umount", "--all", "x"}, {"inspect"}, {"ls"}, {"cat", "x"}, {"ps", "x"},
		{"--host", "tcp://127.0.0.1:1", "ps"}, {"ps", "--format", "{{"}, {"version", "--format", "{{.Nothing}}"},
		{"mount", "--platform", "no/such/platform/at/all", "x"},
	} {
		h.fails(2, args...)
	}
	if r := h.run(); r.code != 2 || !strings.Contains(r.out, "Usage:") {
		t.Errorf("no verb: %s", r)
	}
	if r := h.run("mount", "--help"); r.code != 0 || r.err != "" || !strings.Contains(r.out, "--offline") {
		t.Errorf("help: %s", r)
	}
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		if out := h.ok("completion", shell); !strings.Contains(out, "varve") {
			t.Errorf("completion %s: %q", shell, out)
		}
	}
	script := exec.Command("bash", "-n")
	script.Stdin = strings.NewReader(h.ok("completion", "bash"))
	if out, err := script.CombinedOutput(); err != nil {
		t.Errorf("completion for bash: %v: %s", err, out)
	}
}

func TestVersion(t *testing.T) {
	h := newHost(t)
	if out := h.ok("version"); !strings.Contains(out, "Client:") || !strings.Contains(out, "none runs") {
		t.Errorf("version: %q", out)
	}
	if len(h.processes()) > 0 {
		t.Error("version started a daemon")
	}
	if out := h.ok("ps"); !strings.HasPrefix(out, "MOUNT ID") {
		t.Errorf("ps: %q", out)
	}
	if out := h.ok("version"); !strings.Contains(out, "Daemon:\n") || h.pid() == 0 {
		t.Errorf("version: %q", out)
	}
	if out := h.ok("version", "--format", "{{.Client.Version}}"); out != h.ok("version", "--format", "{{.Daemon.Version}}") {
		t.Errorf("version: %q", out)
	}
	h.stop()
	h.fails(1, "daemon", "stop")
}

func TestVerbs(t *testing.T) {
	needRoot(t)
	for _, face := range faces {
		t.Run(face, func(t *testing.T) { verbs(t, face) })
	}
}

func verbs(t *testing.T, face string) {
	l, names := small(t, 3, 1000)
	_, ref := serve(t, forms.EStargz, l)
	h := newHost(t)
	if out := h.ok("mount"); out != "" {
		t.Errorf("no mounts are listed as %q", out)
	}
	dir := h.ok("mount", "--face", face, ref)
	if want := filepath.Join(h.root, "run/mnt/image"); dir != want {
		t.Errorf("mounted at %q, want %q", dir, want)
	}
	if out := h.ok("mount"); out != ref+" "+dir {
		t.Errorf("mount lists %q", out)
	}
	own := filepath.Join(h.root, "own")
	must(t, os.Mkdir(own, 0o755))
	if out := h.ok("mount", "--face", face, "--name", "second", ref, "own"); out != own {
		t.Errorf("mounted at %q, want %q", out, own)
	}
	ids := strings.Split(h.ok("ps", "-q"), "\n")
	if len(ids) != 2 || len(ids[0]) != 12 {
		t.Fatalf("ps -q: %q", ids)
	}
	if out := h.ok("ps", "-q", "--no-trunc"); !strings.HasPrefix(out, ids[0]) || len(out) != 2*64+1 {
		t.Errorf("ps -q --no-trunc: %q", out)
	}
	var rows []map[string]string
	for dec := json.NewDecoder(strings.NewReader(h.ok("ps", "--format", "json"))); dec.More(); {
		var row map[string]string
		must(t, dec.Decode(&row))
		rows = append(rows, row)
	}
	if len(rows) != 2 || rows[0]["Names"] != "image" || rows[1]["Mountpoint"] != own || rows[0]["ID"] != ids[0] || rows[0]["Image"] != ref || rows[0]["Face"] != face || !strings.HasPrefix(rows[0]["Status"], "Up ") {
		t.Errorf("ps --format json: %v", rows)
	}
	if out := h.ok("ps", "--format", "{{.Names}} {{.ID}}"); out != "image "+ids[0]+"\nsecond "+ids[1] {
		t.Errorf("ps --format: %q", out)
	}
	table := strings.Split(h.ok("ps"), "\n")
	if len(table) != 3 || strings.Join(regexp.MustCompile(` {3,}`).Split(table[0], -1), "|") != "MOUNT ID|IMAGE|COMMAND|CREATED|STATUS|MOUNTPOINT|FETCHED|NAMES" {
		t.Errorf("ps: %q", table)
	}
	inspected(t, h, ids[0], ref, dir, face)

	// By id, by the beginning of one, by directory, by name.
	for _, name := range []string{ids[1], ids[1][:4], own, "own", "./own", own + "/", "second"} {
		if name == "own" {
			continue // a word without a slash is a name
		}
		if m := h.inspect(name); m.Name != "second" {
			t.Errorf("inspect %s gives %s", name, m.Name)
		}
	}
	h.fails(3, "inspect", "third")
	h.fails(3, "umount", "third")
	h.fails(3, "umount", h.root)
	if out := h.ok("umount", own); out != "second" {
		t.Errorf("umount prints %q", out)
	}
	if _, err := os.Stat(own); err != nil {
		t.Errorf("a directory of the user's is gone: %v", err)
	}
	if out := h.ok("unmount", ids[0][:6]); out != "image" {
		t.Errorf("unmount prints %q", out)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("the directory of a mount is left: %v", err)
	}
	if out := h.ok("cat", ref, "/"+names[0]); out != string(content(names[0], 1000)) {
		t.Errorf("cat gave %d bytes", len(out))
	}
	h.fails(3, "cat", ref, "/no/such/file")
	h.fails(1, "cat", ref, "/etc")
	h.fails(3, "ls", ref, "/no/such/dir")
	if out := h.ok("ls", "-R", ref); !strings.Contains(out, "/files:\n0000\n0001\n0002") {
		t.Errorf("ls -R: %q", out)
	}
	if out := h.ok("ls", "-l", ref, "/etc"); !strings.HasPrefix(out, "-rw-r--r--   1     0     0          6 2020-09-13 12:26 hostname") {
		t.Errorf("ls -l: %q", out)
	}
}

func inspected(t *testing.T, h *host, id, ref, dir, face string) {
	t.Helper()
	m := h.inspect(id)
	digest := regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)
	if !strings.HasPrefix(m.ID, id) || m.Name != "image" || m.Image != ref || m.Dir != dir || m.State != "mounted" || m.Error != "" || m.Face != face || m.FaceReason == "" || m.Created.IsZero() || m.Files != 7 || m.Offline || !strings.HasPrefix(m.Platform, "linux/") {
		t.Errorf("inspect: %+v", m)
	}
	for _, d := range []string{m.Target, m.Manifest, m.Config, m.Layers[0].Digest} {
		if !digest.MatchString(d) {
			t.Errorf("inspect: %q is no digest", d)
		}
	}
	if l := m.Layers[0]; len(m.Layers) != 1 || l.Format != "estargz" || l.Reason == "" || l.Size != m.Size || l.Fetched == 0 || l.Fetched != m.Fetched || l.Local != m.Local || l.MediaType == "" {
		t.Errorf("inspect: %+v", m.Layers)
	}
	if out := h.ok("inspect", "-f", "{{.Name}} {{len .Layers}}", id); out != "image 1" {
		t.Errorf("inspect -f: %q", out)
	}
}

// TestWhereNotToMount asks for directories that cannot be taken. Nothing may be
// mounted, and no word of it left.
func TestWhereNotToMount(t *testing.T) {
	needRoot(t)
	l, _ := small(t, 3, 1000)
	_, ref := serve(t, forms.Gzip, l)
	h := newHost(t)
	taken := filepath.Join(h.root, "taken")
	full := filepath.Join(h.root, "full")
	file := filepath.Join(full, "file")
	must(t, os.Mkdir(taken, 0o755))
	must(t, os.Mkdir(full, 0o755))
	must(t, os.WriteFile(file, nil, 0o644))
	h.ok("mount", "--name", "one", ref, taken)
	before := h.mounts()
	for dir, code := range map[string]int{
		full: 1, file: 1, filepath.Join(h.root, "missing"): 1, taken: 7, taken + "/files": 1,
		filepath.Join(h.root, "state"): 1, filepath.Join(h.root, "cache"): 1, filepath.Join(h.root, "cache/index"): 1, h.root: 1,
	} {
		line := h.fails(code, "mount", ref, dir)
		if !strings.Contains(line, dir) {
			t.Errorf("%s is not named: %s", dir, line)
		}
	}
	h.fails(7, "mount", "--name", "one", ref)
	h.fails(2, "mount", "--name", "a/b", ref)
	h.fails(2, "mount", "--face", "sideways", ref)
	if after := h.mounts(); len(after) != len(before) {
		t.Errorf("mounts before: %q, after: %q", before, after)
	}
	if ids := h.ok("ps", "-q"); strings.Contains(ids, "\n") {
		t.Errorf("something is listed: %q", ids)
	}
	left, err := os.ReadDir(filepath.Join(h.root, "run/mnt"))
	if err != nil || len(left) > 0 {
		t.Errorf("left: %v %v", left, err)
	}
	h.ok("umount", "--all")
}

func TestBusy(t *testing.T) {
	needRoot(t)
	for _, face := range faces {
		t.Run(face, func(t *testing.T) {
			l, names := small(t, 20, 300_000)
			_, ref := serve(t, forms.EStargz, l)
			h := newHost(t)
			want := func(n int) string { return sumOf(content(names[n], 300_000)) }
			dir := h.ok("mount", "--face", face, ref)
			p := hold(t, filepath.Join(dir, names[3]))
			line := h.fails(7, "umount", dir)
			if !strings.Contains(line, "pid "+strconv.Itoa(p.pid())) || !strings.Contains(line, dir) {
				t.Errorf("the busy mount's user is not named: %s", line)
			}
			if m := h.inspect(dir); m.State != "mounted" {
				t.Errorf("after the refusal: %s %s", m.State, m.Error)
			}
			// Forced: out of sight, but whoever is in it reads on.
			h.ok("umount", "-f", dir)
			gone(t, h, dir)
			if got := p.read(t); got != want(3) {
				t.Errorf("digest %s, want %s", got, want(3))
			}
			dir = h.ok("mount", "--face", face, ref)
			p = hold(t, filepath.Join(dir, names[5]))
			h.ok("umount", "-l", dir)
			gone(t, h, dir)
			if got := p.read(t); got != want(5) {
				t.Errorf("digest %s, want %s", got, want(5))
			}
		})
	}
}

func gone(t *testing.T, h *host, dir string) {
	t.Helper()
	for _, line := range h.mounts() {
		if strings.Fields(line)[4] == dir {
			t.Errorf("still mounted: %s", line)
		}
	}
	if out := h.ok("ps", "-q"); out != "" {
		t.Errorf("still listed: %q", out)
	}
}

// TestForeground mounts until it is told to end.
func TestForeground(t *testing.T) {
	needRoot(t)
	l, _ := small(t, 3, 1000)
	_, ref := serve(t, forms.EStargz, l)
	h := newHost(t)
	cmd := h.command("mount", "-f", ref)
	out, err := cmd.StdoutPipe()
	must(t, err)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	must(t, cmd.Start())
	buf := make([]byte, 4096)
	n, err := out.Read(buf)
	must(t, err)
	dir := strings.TrimSpace(string(buf[:n]))
	list(t, dir)
	must(t, cmd.Process.Signal(unix.SIGTERM))
	if err := cmd.Wait(); err != nil {
		t.Errorf("ended with %v: %s", err, &errs)
	}
	gone(t, h, dir)
}

// TestDescriptors mounts and unmounts many times: the daemon must not come to
// hold more.
func TestDescriptors(t *testing.T) {
	needRoot(t)
	for _, face := range faces {
		t.Run(face, func(t *testing.T) {
			l, names := small(t, 20, 10_000)
			_, ref := serve(t, forms.EStargz, l)
			h := newHost(t)
			cycle := func() {
				dir := h.ok("mount", "--face", face, ref)
				helper(t, "sum", filepath.Join(dir, names[1]))
				h.ok("umount", dir)
			}
			cycle()
			before := h.descriptors()
			for range 5 {
				cycle()
			}
			// What the HTTP client and server keep open comes and goes.
			if after := h.descriptors(); after > before+1 {
				t.Errorf("%d descriptors, %d before", after, before)
			}
		})
	}
}
