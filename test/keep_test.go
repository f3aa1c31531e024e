package test

import (
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/bench/forms"
	"github.com/varvefs/varve/bench/link"
)

func itoa(n int) string { return strconv.Itoa(n) }

// uppers counts the uppers that are kept in the state directory.
func (h *host) uppers() int {
	names, err := os.ReadDir(filepath.Join(h.root, "state/uppers"))
	if err != nil && !os.IsNotExist(err) {
		h.t.Fatal(err)
	}
	return len(names)
}

// status gives what `ps` says of a mount, "" if it does not list it.
func (h *host) status(name string, flags ...string) string {
	h.t.Helper()
	for line := range strings.SplitSeq(h.ok(append([]string{"ps", "--format", "{{.Names}}|{{.Status}}"}, flags...)...), "\n") {
		if n, status, _ := strings.Cut(line, "|"); n == name {
			return status
		}
	}
	return ""
}

// TestKept unmounts what was changed and mounts it again in every way.
func TestKept(t *testing.T) { withBoth(t, kept) }

func kept(t *testing.T, overlay string) {
	l, names := small(t, 3, 10_000)
	r, ref := serve(t, forms.EStargz, l)
	other := r.push("test/other:1", build(t, forms.EStargz, func() []byte { l, _ := small(t, 2, 5); return l }()))
	h := newHost(t)
	dir := h.writable(overlay, "work", ref)
	id := h.inspect("work").ID
	put(t, filepath.Join(dir, "mine"), "mine")
	must(t, os.Remove(filepath.Join(dir, names[1])))
	edited := func(dir string) {
		t.Helper()
		holds(t, filepath.Join(dir, "mine"), "mine")
		missing(t, filepath.Join(dir, names[1]))
		holds(t, filepath.Join(dir, names[0]), string(content(names[0], 10_000)))
		if m := h.inspect("work"); m.ID != id || !m.RW || m.Overlay != overlay || m.State != "mounted" || m.Dir != dir {
			t.Errorf("inspect: %+v", m)
		}
	}
	h.fails(7, "mount", "--name", "work", ref)
	if out := h.ok("umount", "work"); out != "work" {
		t.Errorf("umount prints %q", out)
	}
	missing(t, dir)
	if s := h.status("work"); s != "" {
		t.Errorf("ps lists it: %s", s)
	}
	if s := h.status("work", "-a"); !regexp.MustCompile(`^Unmounted .* ago \(rw\)$`).MatchString(s) {
		t.Errorf("ps -a: %q", s)
	}
	if m := h.inspect("work"); m.State != "unmounted" || m.Unmounted == nil {
		t.Errorf("inspect: %+v", m)
	}
	if out := h.ok("diff", "work"); !strings.Contains(out, "A /mine") || !strings.Contains(out, "D /"+names[1]) {
		t.Errorf("diff of what is unmounted: %q", out)
	}
	h.fails(1, "umount", "work")
	if line := h.fails(7, "mount", "--rw", "--name", "work", other); !strings.Contains(line, "varve rm work") || !strings.Contains(line, "--name") {
		t.Errorf("another image under the name: %s", line)
	}
	h.fails(3, "mount", "--name", "nothing-of-that-name")

	edited(h.ok("mount", "--name", "work"))
	h.ok("umount", dir)
	edited(h.ok("mount", "--rw", "--name", "work", ref))
	h.ok("umount", dir)
	own := filepath.Join(h.root, "elsewhere")
	must(t, os.Mkdir(own, 0o755))
	if got := h.ok("mount", "--name", "work", ref, own); got != own {
		t.Errorf("mounted at %s, want %s", got, own)
	}
	edited(own)
	h.ok("umount", own)

	// The registry away, and another daemon.
	h.stop()
	r.close()
	if s := h.status("work", "-a"); !strings.HasPrefix(s, "Unmounted ") {
		t.Errorf("ps -a of a new daemon: %q", s)
	}
	h.ok("mount", "--name", "work")
	holds(t, filepath.Join(h.inspect("work").Dir, "mine"), "mine")
	h.ok("umount", "work")
	if n := h.uppers(); n != 1 {
		t.Errorf("%d uppers are kept, want 1", n)
	}
	h.ok("rm", "work")
	if n := h.uppers(); n != 0 {
		t.Errorf("%d uppers are left", n)
	}
	if out := h.ok("ps", "-aq"); out != "" {
		t.Errorf("still listed: %q", out)
	}
}

// TestRemoved deletes changes, which nothing but these verbs does.
func TestRemoved(t *testing.T) { withBoth(t, removed) }

func removed(t *testing.T, overlay string) {
	l, names := small(t, 3, 10_000)
	_, ref := serve(t, forms.EStargz, l)
	h := newHost(t)
	edit := func(name string) (dir, upper string) {
		t.Helper()
		dir = h.writable(overlay, name, ref)
		appendTo(t, filepath.Join(dir, names[0]), name)
		must(t, os.Mkdir(filepath.Join(dir, "locked"), 0))
		put(t, filepath.Join(dir, "locked/file"), strings.Repeat("x", 100_000))
		return dir, h.inspect(name).Upper
	}
	dir, upper := edit("one")
	if line := h.fails(7, "rm", "one"); !strings.Contains(line, dir) || !strings.Contains(line, "-f") {
		t.Errorf("rm of what is mounted: %s", line)
	}
	holds(t, filepath.Join(dir, names[0]), string(content(names[0], 10_000))+"one")
	if out := h.ok("rm", "-f", "one"); out != "one" {
		t.Errorf("rm -f prints %q", out)
	}
	missing(t, upper)
	gone(t, h, dir)
	h.fails(3, "rm", "one")

	dir, upper = edit("two")
	h.ok("umount", dir)
	h.ok("rm", "two")
	missing(t, upper)

	dir, upper = edit("three")
	h.ok("umount", "--rm", dir)
	missing(t, upper)
	gone(t, h, dir)

	// A mount that cannot be written is forgotten when it is unmounted.
	h.ok("mount", "--wait", "--name", "ro", ref)
	_, up1 := edit("four")
	_, up2 := edit("five")
	six, up6 := edit("six")
	h.ok("umount", "-a")
	if out := h.ok("ps", "-a", "--format", "{{.Names}}"); out != "four\nfive\nsix" {
		t.Errorf("kept: %q", out)
	}
	h.ok("mount", "--name", "six")
	if line := h.fails(2, "prune"); !strings.Contains(line, "--force") {
		t.Errorf("prune without a terminal: %s", line)
	}
	ids := strings.Split(h.ok("ps", "-aq", "--no-trunc"), "\n")
	lines := strings.Split(h.ok("prune", "-f"), "\n")
	if len(lines) != 5 || lines[0] != "Deleted Mounts:" || lines[3] != "" || !regexp.MustCompile(`^Total reclaimed space: [0-9.]+ ?kB$`).MatchString(lines[4]) {
		t.Errorf("prune prints %q", lines)
	}
	for _, id := range lines[1:min(3, len(lines))] {
		if id != ids[0] && id != ids[1] {
			t.Errorf("prune deleted %q, of %q", id, ids)
		}
	}
	missing(t, up1)
	missing(t, up2)
	holds(t, filepath.Join(six, names[0]), string(content(names[0], 10_000))+"six")
	if out := h.ok("prune", "-f"); out != "Total reclaimed space: 0B" {
		t.Errorf("prune of nothing prints %q", out)
	}
	h.ok("rm", "-f", "six")
	missing(t, up6)
	if n := h.uppers(); n != 0 {
		t.Errorf("%d uppers are left", n)
	}
}

// TestForegroundKeeps ends a mount in the foreground, as Ctrl-C would.
func TestForegroundKeeps(t *testing.T) {
	withBoth(t, func(t *testing.T, overlay string) {
		l, _ := small(t, 1, 10)
		_, ref := serve(t, forms.EStargz, l)
		h := newHost(t)
		cmd := h.command("mount", "-f", "--rw", "--overlay", overlay, "--name", "fg", ref)
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		buf := make([]byte, 4096)
		n, err := out.Read(buf)
		must(t, err)
		dir := strings.TrimSpace(string(buf[:n]))
		put(t, filepath.Join(dir, "file"), "kept")
		must(t, cmd.Process.Signal(unix.SIGTERM))
		must(t, cmd.Wait())
		gone(t, h, dir)
		h.ok("mount", "--name", "fg")
		holds(t, filepath.Join(dir, "file"), "kept")
		h.ok("umount", "--rm", "fg")
	})
}

// TestWritableRestart ends the daemon in order and by force: its writable mounts
// come back with what was changed.
func TestWritableRestart(t *testing.T) { withBoth(t, writableRestart) }

func writableRestart(t *testing.T, overlay string) {
	l, names := small(t, 12, 50_000)
	_, ref := serve(t, forms.EStargz, l)
	h := newHost(t)
	dir := h.writable(overlay, "work", ref)
	down := h.writable(overlay, "down", ref)
	put(t, filepath.Join(down, "file"), "down")
	h.ok("umount", "down")
	upper := filepath.Join(t.TempDir(), "upper")
	other := h.writable(overlay, "other", ref, "--upper", upper)
	before := h.ok("ps", "-a", "--no-trunc", "--format", "{{.ID}} {{.Names}} {{.Mountpoint}} {{.CreatedAt}}")
	for i, end := range []func(){h.stop, h.kill, h.stop} {
		name := filepath.Join(dir, names[i])
		appendTo(t, name, "more")
		put(t, filepath.Join(other, "new"), itoa(i))
		must(t, os.Remove(filepath.Join(dir, names[6+i])))
		end()
		if after := h.ok("ps", "-a", "--no-trunc", "--format", "{{.ID}} {{.Names}} {{.Mountpoint}} {{.CreatedAt}}"); after != before {
			t.Errorf("mounts\n%s, before\n%s", after, before)
		}
		for n := range 6 {
			want := string(content(names[n], 50_000))
			if n <= i {
				want += "more"
			}
			holds(t, filepath.Join(dir, names[n]), want)
		}
		missing(t, filepath.Join(dir, names[6+i]))
		holds(t, filepath.Join(other, "new"), itoa(i))
		missing(t, filepath.Join(down, "file"))
		if m := h.inspect("work"); m.Overlay != overlay || m.State != "mounted" {
			t.Errorf("inspect: %+v", m)
		}
		lines := strings.Join(h.mounts(), "")
		for _, d := range []string{dir, other} {
			if n := strings.Count(lines, " "+d+" "); n != 1 {
				t.Errorf("%d mounts at %s", n, d)
			}
		}
		if want := map[string]int{"kernel": 1}[overlay]; h.lowers() != want {
			t.Errorf("%d mounts below run/lower, want %d", h.lowers(), want)
		}
	}

	// One whose upper was taken away says so, and leaves the others alone.
	h.stop()
	must(t, os.Rename(upper, upper+"-away"))
	if s := h.status("other"); !strings.HasPrefix(s, "Failed (") || !strings.Contains(s, upper) {
		t.Errorf("a mount without its upper: %q", s)
	}
	holds(t, filepath.Join(dir, names[0]), string(content(names[0], 50_000))+"more")
	h.stop()
	must(t, os.RemoveAll(upper))
	must(t, os.Rename(upper+"-away", upper))
	if s := h.status("other"); !strings.HasPrefix(s, "Up ") {
		t.Errorf("with its upper back: %q", s)
	}
	holds(t, filepath.Join(other, "new"), "2")
	h.ok("umount", "-a")
	h.ok("mount", "--name", "down")
	holds(t, filepath.Join(down, "file"), "down")
	h.ok("umount", "-a")
}

// TestKilledInCopyUp kills the daemon while it waits for the bytes of a file that
// is being copied up. Afterwards the file is the old one, whole, and nothing half
// made is left.
func TestKilledInCopyUp(t *testing.T) { withBoth(t, killedInCopyUp) }

func killedInCopyUp(t *testing.T, overlay string) {
	const size = 28 << 20
	l := newLayer(t)
	l.dir("d")
	l.file("d/large", content("large", size))
	r, ref := serve(t, forms.EStargz, l.bytes())
	h := newHost(t)
	dir := h.writable(overlay, "work", ref)
	path, upper := filepath.Join(dir, "d/large"), h.inspect("work").Upper
	put(t, filepath.Join(dir, "before"), "before")

	var mu sync.Mutex
	var passed int
	waiting := make(chan struct{})
	once := sync.OnceFunc(func() { close(waiting) })
	r.rec.SetFault(func(q *http.Request) *link.Fault {
		if link.ClassOf(q) != link.Blob {
			return nil
		}
		mu.Lock()
		defer mu.Unlock()
		if passed++; passed < 3 {
			return nil
		}
		once()
		return &link.Fault{Break: link.StallBody, After: 1000}
	})
	writer := exec.Command("sh", "-c", "echo more >> "+path)
	must(t, writer.Start())
	select {
	case <-waiting:
	case <-time.After(time.Minute):
		t.Fatal("the copy-up asks for nothing")
	}
	missing(t, filepath.Join(upper, "fs/d/large"))
	h.kill()
	if err := writer.Wait(); err == nil {
		t.Error("the writer was told that it wrote")
	}
	r.rec.SetFault(nil)

	if s := h.status("work"); !strings.HasPrefix(s, "Up ") {
		t.Fatalf("the mount is not back: %q", s)
	}
	missing(t, filepath.Join(upper, "fs/d/large"))
	for _, work := range []string{"work/staging", "work/work"} {
		if left, err := os.ReadDir(filepath.Join(upper, work)); len(left) > 0 {
			t.Errorf("%s holds %v %v", work, left, err)
		}
	}
	holds(t, filepath.Join(dir, "before"), "before")
	if got := helper(t, "sum", path); got != sumOf(content("large", size)) {
		t.Errorf("the file has digest %s", got)
	}
	appendTo(t, path, "more")
	h.kill()
	h.ok("ps")
	if got := helper(t, "sum", path); got != sumOf(append(content("large", size), "more"...)) {
		t.Errorf("the changed file has digest %s", got)
	}
	h.ok("umount", "--rm", "work")
}

// TestKilledWhileWriting kills the daemon under writers of many files: what was
// given to the disk is there, and every file is one that somebody wrote.
func TestKilledWhileWriting(t *testing.T) { withBoth(t, killedWhileWriting) }

func killedWhileWriting(t *testing.T, overlay string) {
	l, names := small(t, 60, 30_000)
	_, ref := serve(t, forms.EStargz, l)
	h := newHost(t)
	dir := h.writable(overlay, "work", ref)
	var synced sync.Map
	var writers sync.WaitGroup
	begun := make(chan struct{}, len(names))
	for w := range 4 {
		writers.Go(func() {
			for i := w; i < len(names); i += 4 {
				f, err := os.OpenFile(filepath.Join(dir, names[i]), os.O_WRONLY|os.O_APPEND, 0)
				if err != nil {
					return
				}
				_, err = fmt.Fprintf(f, "line %d", i)
				if err == nil {
					err = f.Sync()
				}
				if f.Close(); err != nil {
					return
				}
				synced.Store(i, true)
				begun <- struct{}{}
			}
		})
	}
	for range 10 {
		<-begun
	}
	h.kill()
	writers.Wait()
	h.ok("ps")
	for i, name := range names {
		b, err := os.ReadFile(filepath.Join(dir, name))
		must(t, err)
		old := string(content(name, 30_000))
		_, done := synced.Load(i)
		if s := string(b); s != old+fmt.Sprintf("line %d", i) && (done || s != old) {
			t.Errorf("%s has %d bytes after the kill (synced: %v)", name, len(b), done)
		}
	}
	h.ok("umount", "--rm", "work")
}
