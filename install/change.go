package install

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// Change is a file that is to be written or removed.
type Change struct {
	Path string // on the machine
	Old  []byte // what is there now; nil if nothing is
	New  []byte // nil removes it
}

// Changes are what an installation changes. They are made together or not at all.
type Changes []Change

// add appends a change unless it changes nothing.
func (cs *Changes) add(path string, old, new []byte) {
	if (old == nil) != (new == nil) || !bytes.Equal(old, new) {
		*cs = append(*cs, Change{path, old, new})
	}
}

// touches reports whether a file is among them.
func (cs Changes) touches(path string) bool {
	for _, c := range cs {
		if c.Path == path {
			return true
		}
	}
	return false
}

// Show writes what would change, as diff -u does.
func (cs Changes) Show(w io.Writer) {
	for _, c := range cs {
		from, to := c.Path, c.Path
		if c.Old == nil {
			from = "/dev/null"
		}
		if c.New == nil {
			to = "/dev/null"
		}
		fmt.Fprintf(w, "--- %s\n+++ %s\n%s", from, to, hunk(c.Old, c.New))
	}
}

// hunk shows the one place where two texts differ, with two lines around it: a
// change here is an insertion, a removal or a whole file.
func hunk(old, new []byte) string {
	a, b := bytes.SplitAfter(old, []byte("\n")), bytes.SplitAfter(new, []byte("\n"))
	if len(old) == 0 {
		a = nil
	}
	if len(new) == 0 {
		b = nil
	}
	head := 0
	for head < len(a) && head < len(b) && bytes.Equal(a[head], b[head]) {
		head++
	}
	tail := 0
	for tail < len(a)-head && tail < len(b)-head && bytes.Equal(a[len(a)-1-tail], b[len(b)-1-tail]) {
		tail++
	}
	const around = 2
	from, to := max(0, head-around), min(tail, around)
	var s strings.Builder
	line := func(mark byte, l []byte) {
		if len(l) > 0 {
			fmt.Fprintf(&s, "%c%s\n", mark, bytes.TrimRight(l, "\r\n"))
		}
	}
	span := func(from, to int) string { // as diff counts: an empty span stands after a line
		if to == from {
			return fmt.Sprintf("%d,0", from)
		}
		return fmt.Sprintf("%d,%d", from+1, to-from)
	}
	fmt.Fprintf(&s, "@@ -%s +%s @@\n", span(from, len(a)-tail+to), span(from, len(b)-tail+to))
	for _, l := range a[from:head] {
		line(' ', l)
	}
	for _, l := range a[head : len(a)-tail] {
		line('-', l)
	}
	for _, l := range b[head : len(b)-tail] {
		line('+', l)
	}
	for _, l := range a[len(a)-tail : len(a)-tail+to] {
		line(' ', l)
	}
	return s.String()
}

// apply makes the changes, or none of them. undo makes them undone.
func (n *Node) apply(cs Changes) (undo func() error, err error) {
	var made []string // directories
	done := 0
	undo = func() error {
		var errs []error
		for ; done > 0; done-- {
			c := cs[done-1]
			errs = append(errs, n.write(Change{c.Path, c.New, c.Old}))
		}
		for _, dir := range slices.Backward(made) {
			os.Remove(dir) // stays if something else is in it by now
		}
		return errors.Join(errs...)
	}
	for _, c := range cs {
		for dir := filepath.Dir(n.real(c.Path)); c.New != nil; dir = filepath.Dir(dir) {
			if _, err := os.Lstat(dir); err == nil || dir == "/" {
				break
			}
			made = slices.Insert(made, 0, dir)
		}
		if err := n.write(c); err != nil {
			return nil, errors.Join(err, undo())
		}
		done++
	}
	return undo, nil
}

// write makes one change, if the file is still what it was.
func (n *Node) write(c Change) error {
	path := n.real(c.Path)
	now, err := n.read(c.Path)
	if err != nil {
		return err
	}
	if (now == nil) != (c.Old == nil) || !bytes.Equal(now, c.Old) {
		return fmt.Errorf("%s was changed by somebody else just now: look at it, then try again", c.Path)
	}
	if c.New == nil {
		return os.Remove(path)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return replace(path, c.New)
}

// replace gives a file new contents by a rename; it keeps its mode and owner.
func replace(path string, b []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".varve-*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer os.Remove(f.Name()) // not there any more after the rename
	mode := os.FileMode(0o644)
	if st, err := os.Stat(path); err == nil {
		mode = st.Mode().Perm()
		if sys, ok := st.Sys().(*syscall.Stat_t); ok {
			err = f.Chown(int(sys.Uid), int(sys.Gid))
			if err != nil {
				f.Close()
				return err
			}
		}
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// editable says why a file that others wrote must not be changed, nil if it may be.
func (n *Node) editable(path string) error {
	st, err := os.Lstat(n.real(path))
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err != nil:
		return err
	case st.Mode()&os.ModeSymlink != 0:
		to, _ := os.Readlink(n.real(path))
		return fmt.Errorf("%s is a link to %s, so something else looks after it", path, to)
	case st.Mode().Perm()&0o222 == 0:
		return fmt.Errorf("%s is read-only (mode %04o)", path, st.Mode().Perm())
	}
	return nil
}
