package test

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/varvefs/varve/bench/forms"
)

// TestWarm brings files, and nothing else.
func TestWarm(t *testing.T) {
	needRoot(t)
	l := newLayer(t)
	l.dir("opt", "opt/app", "opt/empty")
	for i := range 50 {
		l.file(fmt.Sprintf("opt/app/%02d", i), noise(byte(i), 40_000))
	}
	l.hardlink("opt/again", "opt/app/07")
	l.file("opt/nothing", nil)
	l.symlink("app", "/opt/app")
	l.symlink("opt/app/out", "/other/00")
	l.dir("other")
	for i := range 50 {
		l.file(fmt.Sprintf("other/%02d", i), noise(byte(100+i), 40_000))
	}
	r := newRegistry(t)
	img := build(t, forms.EStargz, l.bytes())
	ref := r.push("team/app:1", img)
	h := newHost(t)
	h.ok("pull", ref)
	r.requests(img)
	// fetched gives the bytes of layers that came since it was called last.
	fetched := func() int64 {
		_, ranges := r.requests(img)
		n, whole := blobBytes(ranges)
		if whole > 0 {
			t.Errorf("%d bytes were asked for whole", whole)
		}
		return n
	}
	count := regexp.MustCompile(`(?m)^(\d+) files, \S+: (\S+) fetched$`)
	warm := func(files int, args ...string) {
		t.Helper()
		res := h.run(append([]string{"warm", ref}, args...)...)
		m := count.FindStringSubmatch(res.err)
		if res.code != 0 || res.out != "" || m == nil || m[1] != strconv.Itoa(files) {
			t.Errorf("want %d files: %s", files, res)
		}
	}
	// near checks that so many files of noise came: each is in a member of its own, with
	// its header.
	near := func(what string, files int64) {
		t.Helper()
		if n := fetched(); n < files*40_000 || n > files*40_000+files*1_000 {
			t.Errorf("%s: %d bytes came, want %d files", what, n, files)
		}
	}

	if line := h.fails(3, "warm", ref, "/opt", "/opt/gone", "/other"); !strings.Contains(line, "/opt/gone: no such file") {
		t.Errorf("a path that is not there: %s", line)
	}
	near("a path that is not there", 0)
	warm(1, "/other/07")
	near("one file", 1)
	warm(1, "other/07")
	near("it is here", 0)
	warm(1, "app/out", "/opt/nothing")
	near("a link to a file", 1)
	warm(50, "/app")
	near("a link to a directory", 50)
	warm(50, "opt", "/opt/again", "app/../../opt/app/07", "/opt/empty")
	near("names of what is here", 0)
	must(t, os.WriteFile(filepath.Join(h.root, "list"), []byte("/other/20\n\nother/21\n"), 0o644))
	warm(3, "--from-file", "list", "/other/22")
	near("names in a file", 3)
	cmd := h.command("warm", "--from-file", "-", ref)
	cmd.Stdin = strings.NewReader("/other/23")
	if res := finish(t, cmd, []string{"warm", "--from-file", "-"}); res.code != 0 {
		t.Error(res)
	}
	near("names on standard input", 1)
	h.fails(2, "warm", "--from-file", "/dev/null", ref)
	h.fails(2, "warm", "--from-file", "gone", ref)

	// Offline it is read.
	h.stop()
	r.close()
	dir := h.ok("mount", "--offline", ref)
	for i := range 50 {
		holds(t, filepath.Join(dir, "opt/app", fmt.Sprintf("%02d", i)), string(noise(byte(i), 40_000)))
	}
	for _, i := range []int{0, 7, 20, 21, 22, 23} {
		holds(t, filepath.Join(dir, "other", fmt.Sprintf("%02d", i)), string(noise(byte(100+i), 40_000)))
	}
	if _, err := os.ReadFile(filepath.Join(dir, "other/30")); err == nil {
		t.Error("a file that was not asked for is here")
	}
	h.ok("umount", dir)
	warm(50, "/opt")
}

// TestWarmMany warms a directory of many files: they come in few requests.
func TestWarmMany(t *testing.T) {
	needRoot(t)
	const files = 20_000
	l := newLayer(t)
	l.dir("many")
	for i := range files {
		l.file(fmt.Sprintf("many/%05d", i), noise(byte(i), 100))
	}
	r, ref := serve(t, forms.Gzip, l.bytes()) // the others take long to make
	newHost(t).ok("index", "--push", ref)
	h := newHost(t)
	h.ok("pull", ref)
	before := len(r.rec.Requests())
	res := h.run("warm", ref, "/many")
	if res.code != 0 || !strings.Contains(res.err, strconv.Itoa(files)+" files") {
		t.Fatal(res)
	}
	if n := len(r.rec.Requests()) - before; n > 50 {
		t.Errorf("%d requests", n)
	}
	r.close()
	if got := h.ok("cat", "--offline", ref, "/many/12345"); got != string(noise(12345%256, 100)) {
		t.Errorf("offline: %q", got)
	}
}

// TestWarmDetached leaves it to the daemon, in the hours when that may fetch.
func TestWarmDetached(t *testing.T) {
	needRoot(t)
	l, names := small(t, 20, 50_000)
	r := newRegistry(t)
	img := build(t, forms.EStargz, l)
	ref := r.push("team/app:1", img)
	configure := func(h *host, text string) {
		must(t, os.MkdirAll(filepath.Join(h.root, "config"), 0o755))
		must(t, os.WriteFile(filepath.Join(h.root, "config", "config.toml"), []byte(text), 0o644))
	}
	here := func(h *host, name string) bool { return h.run("cat", "--offline", ref, name).code == 0 }

	h := newHost(t)
	configure(h, "limit_rate = \"5MB\"\n")
	if res := h.run("warm", "-d", ref, "/files"); res.code != 0 || !strings.Contains(res.err, "left to the daemon") {
		t.Fatal(res)
	}
	for end := time.Now().Add(30 * time.Second); !here(h, names[19]); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it does not come")
		}
	}
	if res := h.run("warm", "--wait=false", ref, "/gone"); res.code != 3 {
		t.Errorf("a path that is not there: %s", res)
	}

	h = newHost(t)
	hour := (time.Now().Hour() + 3) % 24
	configure(h, fmt.Sprintf("background_hours = \"%02d:00-%02d:30\"\n", hour, hour))
	h.ok("warm", "-d", ref, "/files")
	r.requests(img)
	time.Sleep(1500 * time.Millisecond) // longer than a fill waits for others
	got, _ := r.requests(img)
	asked(t, "outside the hours", got, nothing)
	if got := h.ok("cat", ref, names[3]); got != string(content(names[3], 50_000)) {
		t.Errorf("a read gave %d bytes", len(got))
	}
	h.stop() // which does not wait for the hours

	for text, want := range map[string]string{
		"limit_rate = \"fast\"\n":              "limit_rate",
		"background_hours = \"at night\"\n":    "background_hours",
		"background_hours = \"22:00-25:00\"\n": "background_hours",
	} {
		h := newHost(t)
		configure(h, text)
		if res := h.run("daemon"); res.code == 0 || !strings.Contains(res.err, want) {
			t.Errorf("%q: %s", text, res)
		}
	}
	for _, args := range [][]string{{"daemon", "--limit-rate", "fast"}, {"daemon", "--background-hours", "22:00"}} {
		h.fails(2, args...)
	}
}

// TestWarmProfile brings what a start reads, as one before it did.
func TestWarmProfile(t *testing.T) {
	needRoot(t)
	l := newLayer(t)
	for i := range 60 {
		l.file(fmt.Sprintf("%02d", i), noise(byte(i), 60_000))
	}
	r := newRegistry(t)
	img := build(t, forms.EStargz, l.bytes())
	ref := r.push("team/app:1", img)
	h := newHost(t)
	res := h.run("warm", ref)
	if res.code != 3 || !strings.Contains(res.err, "nothing is known of its start") || !strings.Contains(res.err, "varve pull --full "+ref) {
		t.Errorf("without a profile: %s", res)
	}
	h.fails(2, "warm", "--profile", "a/b", ref)
	h.fails(2, "warm", "--profile", "web", ref, "/00")

	dir := h.ok("mount", "--prefetch", "none", ref)
	read := []string{"41", "03", "22"}
	for _, name := range read {
		holds(t, filepath.Join(dir, name), string(noise(byte(mustGet[int](t)(strconv.Atoi(name))), 60_000)))
	}
	h.ok("umount", dir)
	h.ok("store", "drop", ref)
	r.requests(img)
	res = h.run("warm", ref)
	if res.code != 0 || !strings.Contains(res.err, "what a start reads (local), ") {
		t.Errorf("with a profile: %s", res)
	}
	got, ranges := r.requests(img)
	if n, _ := blobBytes(ranges); n < 180_000 || n > 190_000 {
		t.Errorf("%d bytes came for three files of 60 kB: %v", n, got)
	}
	for _, name := range read {
		h.ok("cat", "--offline", ref, name)
	}
	if res := h.run("cat", "--offline", ref, "23"); res.code != 5 {
		t.Errorf("a file that no start has read: %s", res)
	}
}
