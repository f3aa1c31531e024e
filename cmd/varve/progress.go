package main

import (
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/docker/go-units"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/daemon"
)

// progress shows how far the daemon is with each of the things it works on. On a
// terminal it looks as docker's: a line for each, written anew in its place.
// Elsewhere it is a line for each change of state. It is not for several
// goroutines at once.
type progress struct {
	w     io.Writer
	tty   bool
	quiet bool

	lines []string       // that the terminal shows; below the last stands the cursor
	at    map[string]int // which of them is an id's
	last  map[string]string
}

// newProgress gives one that writes to w, which is a terminal if tty says so.
// Nothing is written if it is to be quiet.
func newProgress(w io.Writer, tty, quiet bool) *progress {
	return &progress{w: w, tty: tty, quiet: quiet, at: map[string]int{}, last: map[string]string{}}
}

// status shows a change of state. What the daemon says may come from a registry:
// what controls terminals is left out of it.
func (p *progress) status(s daemon.Status) {
	if p.quiet {
		return
	}
	id, text := oneLine(s.ID), oneLine(s.Status)
	if id == "" {
		if text != "" && p.last[""] != text {
			p.last[""] = text
			p.print(text)
		}
		return
	}
	line, news := id+": "+text, p.last[id] != text
	p.last[id] = text
	if !p.tty {
		if news {
			p.print(line)
		}
		return
	}
	width, height := p.size()
	if b := bar(s.Current, s.Total, width); b != "" {
		line += " " + b
	}
	// A line that is wrapped would take two, and the cursor would go astray.
	if r := []rune(line); len(r) >= width {
		line = string(r[:max(width-1, 0)])
	}
	p.draw(id, line, height, news)
}

// done ends what was shown: what comes next stands below it.
func (p *progress) done() {
	p.forget()
	clear(p.last)
}

// notice says something that is nobody's state, on standard error as all
// notices. What is shown goes on below it.
func (p *progress) notice(line string) {
	fmt.Fprintln(os.Stderr, "varve: "+oneLine(line))
	p.forget()
}

// forget leaves what the terminal shows as it is.
func (p *progress) forget() {
	p.lines = nil
	clear(p.at)
}

func (p *progress) print(line string) {
	if p.tty {
		p.lines = append(p.lines, line)
	}
	fmt.Fprintln(p.w, line)
}

// draw writes the line of an id in its place. Where that has scrolled out of
// sight, only news are worth a line of their own below.
func (p *progress) draw(id, line string, height int, news bool) {
	i, ok := p.at[id]
	up := len(p.lines) - i
	switch {
	case !ok || up >= height && news:
		p.at[id] = len(p.lines)
		p.print(line)
	case up < height && p.lines[i] != line:
		p.lines[i] = line
		// Up, clear the line, write it, and back down; in one write, so that nothing
		// flickers.
		fmt.Fprintf(p.w, "\x1b[%dA\x1b[2K\r%s\r\x1b[%dB", up, line, up)
	}
}

// size gives the columns and lines of the terminal, docker's guess if it cannot be
// asked.
func (p *progress) size() (width, height int) {
	width, height = 200, 1<<20
	if f, ok := p.w.(*os.File); ok {
		if ws, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err == nil && ws.Col > 0 && ws.Row > 0 {
			width, height = int(ws.Col), int(ws.Row)
		}
	}
	return width, height
}

// bar draws how much is done, without the bar itself where there is no room.
func bar(current, total int64, width int) string {
	const cells = 50
	done := units.HumanSize(float64(current))
	switch {
	case current <= 0 && total <= 0:
		return ""
	case total <= 0:
		return fmt.Sprintf("%8v", done)
	}
	numbers := fmt.Sprintf("%8v/%v", done, units.HumanSize(float64(total)))
	if current > total {
		numbers = fmt.Sprintf("%8v", done)
	}
	if width <= 110 {
		return numbers
	}
	full := int(min(max(float64(current)/float64(total), 0), 1) * cells)
	return "[" + strings.Repeat("=", full) + ">" + strings.Repeat(" ", cells-full) + "] " + numbers
}
