package monitor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// logDir is a container's directory of which only the log is asked.
func logDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, configFile), []byte("{}"), 0o600))
	return dir
}

func readLog(t *testing.T, dir string, o LogOptions) (out, errs string) {
	t.Helper()
	var a, b bytes.Buffer
	o.Stdout, o.Stderr = &a, &b
	must(t, Logs(testContext(t), dir, o))
	return a.String(), b.String()
}

func TestLogLines(t *testing.T) {
	dir := logDir(t)
	w := newLogWriter(dir, 1<<20)
	long := strings.Repeat("x", 3*maxLine+5)
	w.write("stdout", []byte("a\nb"))
	w.write("stderr", []byte("e <&>\n"))
	w.write("stdout", []byte("c\n\n"))
	w.write("stdout", []byte(long+"\nno end \xff"))
	if lost := w.finish(); lost != 0 {
		t.Errorf("%d bytes lost", lost)
	}
	text, err := os.ReadFile(filepath.Join(dir, logFile))
	must(t, err)
	// A line is 16 KiB at most, cut ones have no newline: docker's form.
	var sizes []int
	for line := range strings.Lines(string(text)) {
		if !strings.HasPrefix(line, `{"log":"`) || !strings.Contains(line, `,"stream":"std`) || !strings.Contains(line, `,"time":"20`) {
			t.Fatalf("a line is %.200q", line)
		}
		sizes = append(sizes, strings.Index(line, `","stream"`)-len(`{"log":"`))
	}
	if want := "[3 7 4 2 16384 16384 16384 7 10]"; fmt.Sprint(sizes) != want {
		t.Errorf("lines of %v bytes, want %s", sizes, want)
	}
	out, errs := readLog(t, dir, LogOptions{Tail: -1})
	if want := "a\nbc\n\n" + long + "\nno end \ufffd"; out != want || errs != "e <&>\n" {
		t.Errorf("read %.50q... of %d bytes and %q", out, len(out), errs)
	}
}

func TestLogParts(t *testing.T) {
	dir := logDir(t)
	at := func(s int) time.Time { return time.Date(2026, 3, 4, 5, 6, s, 7000, time.UTC) }
	var text bytes.Buffer
	for i := range 10 {
		fmt.Fprintf(&text, `{"log":"line %d\n","stream":"stdout","time":"%s"}`+"\n", i, at(i).Format(time.RFC3339Nano))
	}
	half := bytes.IndexByte(text.Bytes(), '4') // somewhere in a line
	half += bytes.IndexByte(text.Bytes()[half:], '\n') + 1
	must(t, os.WriteFile(filepath.Join(dir, oldLogFile), text.Bytes()[:half], 0o600))
	must(t, os.WriteFile(filepath.Join(dir, logFile), append(bytes.Clone(text.Bytes()[half:]), `{"log":"cut of`...), 0o600))
	lines := func(from, to int) string {
		var s strings.Builder
		for i := from; i < to; i++ {
			fmt.Fprintf(&s, "line %d\n", i)
		}
		return s.String()
	}
	for _, c := range []struct {
		name string
		o    LogOptions
		want string
	}{
		{"all", LogOptions{Tail: -1}, lines(0, 10)},
		{"none", LogOptions{Tail: 0}, ""},
		{"one", LogOptions{Tail: 2}, lines(9, 10)}, // the cut one counts
		{"some of the old file", LogOptions{Tail: 9}, lines(2, 10)},
		{"more than there are", LogOptions{Tail: 100}, lines(0, 10)},
		{"since", LogOptions{Tail: -1, Since: at(7)}, lines(7, 10)},
		{"until", LogOptions{Tail: -1, Until: at(3)}, lines(0, 4)},
		{"between", LogOptions{Tail: -1, Since: at(2), Until: at(3)}, lines(2, 4)},
		{"times", LogOptions{Tail: -1, Until: at(0), Timestamps: true}, "2026-03-04T05:06:00.000007000Z line 0\n"},
	} {
		if out, _ := readLog(t, dir, c.o); out != c.want {
			t.Errorf("%s: %q, want %q", c.name, out, c.want)
		}
	}
	if out, _ := readLog(t, logDir(t), LogOptions{Tail: -1}); out != "" {
		t.Errorf("no log yet: %q", out)
	}
	if err := Logs(testContext(t), t.TempDir(), LogOptions{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no container: %v", err)
	}
}

func TestLogTurns(t *testing.T) {
	dir := logDir(t)
	w := newLogWriter(dir, 10_000)
	var want strings.Builder
	for i := range 2000 {
		line := fmt.Sprintf("line %d\n", i)
		want.WriteString(line)
		w.write("stdout", []byte(line))
	}
	for _, name := range []string{logFile, oldLogFile} {
		st, err := os.Stat(filepath.Join(dir, name))
		must(t, err)
		if st.Size() > 10_000 {
			t.Errorf("%s has %d bytes", name, st.Size())
		}
	}
	out, _ := readLog(t, dir, LogOptions{Tail: -1})
	if !strings.HasSuffix(want.String(), out) || len(out) < 1000 {
		t.Errorf("read %d bytes that are not the end of what was written", len(out))
	}
	ctx, cancel := context.WithCancel(testContext(t))
	cancel()
	if err := Logs(ctx, dir, LogOptions{Tail: -1}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestFollow(t *testing.T) {
	eachRuntime(t, func(t *testing.T, runtime string) {
		b := newBox(t, runtime, func(c *Config) {
			interactive(c)
			c.LogMax = 300 // so that it turns after some lines
		}, "ticks")
		c := b.launch()
		r, w, err := os.Pipe()
		must(t, err)
		ended := make(chan error, 2)
		go func() {
			_, err := c.Attach(testContext(t), Streams{In: r}, AttachOptions{Start: true})
			ended <- err
		}()
		var seen buffer
		go func() {
			ended <- Logs(testContext(t), b.dir, LogOptions{Tail: -1, Follow: true, Stdout: &seen})
		}()
		var want strings.Builder
		for i := range 20 {
			w.WriteString("\n")
			fmt.Fprintf(&want, "tick %d\n", i)
			until(t, "the tick is seen", func() bool { return seen.String() == want.String() })
		}
		w.Close()
		must(t, <-ended)
		must(t, <-ended)
		if seen.String() != want.String() {
			t.Errorf("saw %q", seen.String())
		}
	})
}
