package commit

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/moby/patternmatcher"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/fs/upper"
	"github.com/varvefs/varve/index"
)

// Names that a layer gives a meaning of their own (image-spec, layer.md).
const (
	whiteoutPrefix = ".wh."
	whiteoutOpaque = ".wh..wh..opq"
)

// paxXattr begins the PAX records of extended attributes.
const paxXattr = "SCHILY.xattr."

// Entry is one entry of the tar of a layer.
type Entry struct {
	Header *tar.Header
	Path   string // of what it was made of in the upper; "" where that is nothing, or elsewhere

	open func() (io.ReadCloser, error)
}

// Open opens the contents, which are Header.Size bytes unless the file was
// changed since. It is nil for an entry that has none. Entries may be opened in
// any order and side by side; the caller closes what it opened.
func (e *Entry) Open() (io.ReadCloser, error) {
	if e.open == nil {
		return nil, nil
	}
	return e.open()
}

// EntryOptions say what of an upper goes into the layer. The zero value takes
// everything as it is.
type EntryOptions struct {
	// Patterns as in a .dockerignore file, from the root. What is named by
	// Exclude, or not by Include where that names anything, is left out,
	// deletions as well; what is not brings the directories it lies in.
	Include, Exclude []string

	// Clamp, where it is set, is put in the place of later times.
	Clamp *time.Time
}

// Contents is what a layer is to hold.
type Contents struct {
	// Entries in the order of the tar: a directory before what lies in it; in a
	// directory first the mark that it is opaque, then the deletions, then the
	// rest, each in the order of their bytes.
	Entries []Entry

	Warnings []string // what could not be kept, in sentences for the user
	Secrets  []string // paths of files whose names say that they hold secrets
}

// Entries gives the layer that makes of the image what its mount with the upper
// shows. It is empty if nothing was changed. The same upper over the same image
// gives the same entries wherever it lies and whoever wrote it.
//
// It holds what containerd's diff would write, with these differences: all
// extended attributes are kept, not the capabilities alone; a replaced
// directory is marked opaque rather than having its old names deleted one by one;
// and a directory of which nothing but the time was changed is kept when there
// is a layer anyway, but for the root, so that a mount of the new image looks as
// this one does.
//
// Times are kept in seconds, as containerd and BuildKit write them: the tables of
// contents of lazy layers hold no more, and a file's time must not depend on
// whether it was read by its table or by its tar.
//
// An entry holds some hundred bytes of memory; no contents are read.
func Entries(ctx context.Context, up *upper.Dir, lower *index.Image, o EntryOptions) (*Contents, error) {
	g := gatherer{up: up, below: newBelow(lower), clamp: o.Clamp, links: map[uint64]string{}}
	var err error
	if g.match, err = newFilter(o); err != nil {
		return nil, err
	}
	err = up.Walk(ctx, func(c *upper.Change) error {
		if err := g.add(c); err != nil {
			return fmt.Errorf("%q: %w", c.Path, err)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read the upper: %w", err)
	}
	if !g.changed {
		g.out.Entries, g.out.Secrets = nil, nil
	}
	// The walk met deletions among the other names.
	slices.SortStableFunc(g.out.Entries, func(a, b Entry) int { return compareNames(a.Header.Name, b.Header.Name) })
	return &g.out, nil
}

// gatherer makes entries of the changes of a walk.
type gatherer struct {
	up      *upper.Dir
	below   *below
	match   *filter
	clamp   *time.Time
	out     Contents
	changed bool              // something is worth a layer
	links   map[uint64]string // the name of the first of several hard links, by inode
	dirs    []directory       // the way down to where the walk is
}

// directory is one that the walk is in.
type directory struct {
	change  *upper.Change
	written bool
}

func (g *gatherer) add(c *upper.Change) error {
	low, err := g.below.find(c)
	if err != nil {
		return err
	}
	if c.Path == "" {
		g.dirs = append(g.dirs[:0], directory{change: c, written: true})
		return g.root(c, &low.in)
	}
	parent, _ := splitName(c.Path)
	for g.dirs[len(g.dirs)-1].change.Path != parent {
		g.dirs = g.dirs[:len(g.dirs)-1]
	}
	if !c.Whiteout && c.IsDir() {
		g.dirs = append(g.dirs, directory{change: c})
	}
	if ok, err := g.match.matches(c.Path); err != nil || !ok {
		return err
	}
	switch {
	case c.Whiteout:
		return g.deletion(c.Path, low)
	case c.IsDir():
		return g.directory(c, low)
	case c.Type() == unix.S_IFSOCK:
		g.warn("%q is a socket, which no layer can hold: it is left out", "/"+c.Path)
		// What it stands in the place of must not come back for that.
		return g.deletion(c.Path, low)
	}
	if low.shows {
		if same, err := g.below.unchanged(c, &low.in); err != nil || same {
			return err
		}
	}
	g.changed = true
	return g.file(c)
}

// root adds the root, which is in every upper, if somebody changed it.
func (g *gatherer) root(c *upper.Change, in *index.Inode) error {
	same, err := g.below.sameAttrs(c, in)
	if err != nil || same {
		return err
	}
	if ok, err := g.match.matches("."); err != nil || !ok {
		return err
	}
	g.changed = true
	return g.write(c)
}

// deletion adds a whiteout where the image has something to delete.
func (g *gatherer) deletion(path string, low at) error {
	if !low.shows {
		return nil
	}
	g.changed = true
	if err := g.parents(); err != nil {
		return err
	}
	dir, name := splitName(path)
	g.out.Entries = append(g.out.Entries, Entry{Header: mark(join(dir, whiteoutPrefix+name))})
	return nil
}

// mark gives the header of a whiteout or opaque marker, of the form in which
// containerd writes it: empty, no mode, of 1970.
func mark(name string) *tar.Header {
	return &tar.Header{Typeflag: tar.TypeReg, Name: name, ModTime: time.Unix(0, 0).UTC()}
}

func (g *gatherer) directory(c *upper.Change, low at) error {
	over := low.shows && low.in.IsDir()
	if !over {
		g.changed = true
		return g.parents() // itself among them
	}
	hides := false
	if c.Opaque {
		hidden, err := childNames(g.below.im, &low.in)
		if err != nil {
			return err
		}
		hides = len(hidden) > 0
	}
	same, err := g.below.sameAttrs(c, &low.in)
	if err != nil {
		return err
	}
	if same && !hides && sameTime(c, &low.in) {
		return nil // a parent of a change, if there is one below
	}
	g.changed = g.changed || !same || hides
	if err := g.parents(); err != nil || !hides {
		return err
	}
	g.out.Entries = append(g.out.Entries, Entry{Header: mark(join(c.Path, whiteoutOpaque))})
	return nil
}

// parents adds the directories on the way down that are not there yet.
func (g *gatherer) parents() error {
	for i := range g.dirs {
		d := &g.dirs[i]
		if d.written {
			continue
		}
		d.written = true
		if err := g.write(d.change); err != nil {
			return err
		}
	}
	return nil
}

func (g *gatherer) file(c *upper.Change) error {
	if err := g.parents(); err != nil {
		return err
	}
	return g.write(c)
}

// write adds the entry of anything but a deletion.
func (g *gatherer) write(c *upper.Change) error {
	if _, name := splitName(c.Path); strings.HasPrefix(name, whiteoutPrefix) {
		return fmt.Errorf("names that begin with %q mean deletions in a layer: rename it, or exclude it", whiteoutPrefix)
	}
	h, lost, err := header(c, g.clamp)
	if err != nil {
		return err
	}
	for _, name := range lost {
		g.warn("%q: the extended attribute %q cannot be kept in a layer: it is left out", "/"+c.Path, name)
	}
	e := Entry{Header: h, Path: c.Path}
	if !c.IsDir() && c.Nlink > 1 {
		if first, ok := g.links[c.Ino]; ok {
			link(h, first)
		} else {
			g.links[c.Ino] = h.Name
		}
	}
	if h.Typeflag == tar.TypeReg {
		if h.Size > 0 {
			e.open = func() (io.ReadCloser, error) { return g.up.Open(c.Path) }
		}
		if isSecret(c.Path) {
			g.out.Secrets = append(g.out.Secrets, "/"+c.Path)
		}
	}
	g.out.Entries = append(g.out.Entries, e)
	return nil
}

func (g *gatherer) warn(format string, args ...any) {
	g.out.Warnings = append(g.out.Warnings, fmt.Sprintf(format, args...))
}

// filter is what Include and Exclude ask for. The nil filter lets everything
// pass.
type filter struct {
	include, exclude *patternmatcher.PatternMatcher
}

func newFilter(o EntryOptions) (*filter, error) {
	if len(o.Include) == 0 && len(o.Exclude) == 0 {
		return nil, nil
	}
	var f filter
	for _, p := range []struct {
		name     string
		patterns []string
		to       **patternmatcher.PatternMatcher
	}{{"include", o.Include, &f.include}, {"exclude", o.Exclude, &f.exclude}} {
		if len(p.patterns) == 0 {
			continue
		}
		fromRoot := make([]string, len(p.patterns))
		for i, s := range p.patterns {
			s, not := strings.CutPrefix(strings.TrimSpace(s), "!")
			fromRoot[i] = strings.TrimLeft(s, "/")
			if fromRoot[i] == "" && s != "" {
				fromRoot[i] = "**" // all of the root
			}
			if not {
				fromRoot[i] = "!" + fromRoot[i]
			}
		}
		m, err := patternmatcher.New(fromRoot)
		if err != nil {
			return nil, fmt.Errorf("patterns to %s %q: %w", p.name, p.patterns, err)
		}
		*p.to = m
	}
	return &f, nil
}

func (f *filter) matches(path string) (bool, error) {
	if f == nil {
		return true, nil
	}
	ok := true
	var err error
	if f.include != nil {
		ok, err = f.include.MatchesOrParentMatches(path)
	}
	if err == nil && ok && f.exclude != nil {
		ok, err = f.exclude.MatchesOrParentMatches(path)
		ok = !ok
	}
	return ok, err
}
