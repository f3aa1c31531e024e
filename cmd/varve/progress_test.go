package main

import (
	"bytes"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/varvefs/varve/daemon"
)

func TestProgress(t *testing.T) {
	at := func(id, status string, n, total int64) daemon.Status {
		return daemon.Status{ID: id, Status: status, Current: n, Total: total}
	}
	bar := func(full int) string {
		return "[" + strings.Repeat("=", full) + ">" + strings.Repeat(" ", 50-full) + "] "
	}
	push := []daemon.Status{
		{Status: "The push refers to repository [example.com/a]"},
		at("aaaa", "Preparing", 0, 0),
		at("bbbb", "Preparing", 0, 0),
		at("aaaa", "Pushing", 12300000, 45000000),
		at("aaaa", "Pushing", 12300000, 45000000),
		at("aaaa", "Pushing", 45000000, 45000000),
		at("bbbb", "Layer already exists", 0, 0),
		at("aaaa", "Pushed", 0, 0),
		at("aaaa", "Pushed", 0, 0),
		{Status: "1: digest: sha256:00 size: 5"},
		{Status: "1: digest: sha256:00 size: 5"},
	}
	up := func(n, line string) string { return "\x1b[" + n + "A\x1b[2K\r" + line + "\r\x1b[" + n + "B" }
	for _, tt := range []struct {
		name       string
		tty, quiet bool
		in         []daemon.Status
		want       string
	}{
		{"terminal", true, false, push, "The push refers to repository [example.com/a]\n" +
			"aaaa: Preparing\nbbbb: Preparing\n" +
			up("2", "aaaa: Pushing "+bar(13)+"  12.3MB/45MB") +
			up("2", "aaaa: Pushing "+bar(50)+"    45MB/45MB") +
			up("1", "bbbb: Layer already exists") +
			up("2", "aaaa: Pushed") +
			"1: digest: sha256:00 size: 5\n"},
		{"plain", false, false, push, "The push refers to repository [example.com/a]\n" +
			"aaaa: Preparing\nbbbb: Preparing\naaaa: Pushing\nbbbb: Layer already exists\naaaa: Pushed\n" +
			"1: digest: sha256:00 size: 5\n"},
		{"quiet", true, true, push, ""},
		{"no total", true, false, []daemon.Status{at("a", "Reading", 5000, 0), at("a", "Reading", 0, -1)},
			"a: Reading      5kB\n" + up("1", "a: Reading")},
		{"more than all", true, false, []daemon.Status{at("a", "Pushing", 9, 5)}, "a: Pushing " + bar(50) + "      9B\n"},
		{"less than nothing", true, false, []daemon.Status{at("a", "Pushing", -9, 5)}, "a: Pushing " + bar(0) + "     -9B/5B\n"},
		{"too wide", true, false, []daemon.Status{at("a", strings.Repeat("ä", 500), 0, 0)}, "a: " + strings.Repeat("ä", 196) + "\n"},
		{"hostile", true, false, []daemon.Status{
			at("a\x1b[2J", "Push\x1b]0;x\aed\nb: Pushed\r\u009b1A\x00", 0, 0), {Status: "\x1b[31mred\x7f"},
		}, "a[2J: Push]0;xed; b: Pushed 1A\n[31mred\n"},
		{"hostile, plain", false, false, []daemon.Status{at("a\x1b[2J", "\x9b2Jx", 0, 0)}, "a[2J: \ufffd2Jx\n"},
	} {
		var b bytes.Buffer
		p := newProgress(&b, tt.tty, tt.quiet)
		for _, s := range tt.in {
			p.status(s)
		}
		p.done()
		if d := cmp.Diff(tt.want, b.String()); d != "" {
			t.Errorf("%s: (-want +got)\n%s", tt.name, d)
		}
	}
}

func TestProgressAfterDone(t *testing.T) {
	var b bytes.Buffer
	p := newProgress(&b, true, false)
	p.status(daemon.Status{ID: "a", Status: "Pushing"})
	p.done()
	p.status(daemon.Status{ID: "a", Status: "Pushed"}) // not in the old line, which is not where it was
	if want := "a: Pushing\na: Pushed\n"; b.String() != want {
		t.Errorf("%q, want %q", b.String(), want)
	}
}

// TestProgressScrolled has more lines than the terminal.
func TestProgressScrolled(t *testing.T) {
	var b bytes.Buffer
	p := newProgress(&b, true, false)
	for _, id := range []string{"a", "b", "c"} {
		p.status(daemon.Status{ID: id, Status: "Waiting"})
	}
	b.Reset()
	const height = 3 // the cursor's own line is one of them
	p.draw("a", "a: Waiting 1B", height, false)
	p.draw("c", "c: Waiting 1B", height, false)
	p.draw("a", "a: Pushed", height, true)
	p.draw("a", "a: Pushed again", height, true)
	want := "\x1b[1A\x1b[2K\rc: Waiting 1B\r\x1b[1Ba: Pushed\n\x1b[1A\x1b[2K\ra: Pushed again\r\x1b[1B"
	if d := cmp.Diff(want, b.String()); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
}
