package commit

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	digest "github.com/opencontainers/go-digest"

	"github.com/varvefs/varve/index"
)

// Blob is a layer that is wholly here.
type Blob struct {
	io.ReaderAt
	Size   int64         // bytes
	DiffID digest.Digest // what it must hold once decompressed
}

// Squashed is a chain of layers in one. Close it when its entries are written.
type Squashed struct {
	Entries []Entry // in the order that [Contents] has
	files   []io.Closer
}

// Close removes what was decompressed.
func (s *Squashed) Close() error {
	var errs []error
	for _, f := range s.files {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

// Squash merges a chain of layers, the lowest first, and the entries of an upper
// over them (as [Entries] gives them, over the image that ends with the chain)
// into the entries of one layer that does what they do together. The base below
// them is not known here: so every deletion stays, unless something new has the
// name, and a directory that stands where something else was in between is
// opaque.
//
// Each layer is decompressed once, into a file without a name in dir, and held
// against its DiffID.
func Squash(ctx context.Context, chain []Blob, top []Entry, dir string) (_ *Squashed, err error) {
	s := &Squashed{}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	m := squasher{root: &squashNode{}}
	for i, b := range chain {
		f, err := unpackTar(ctx, b, dir)
		if err != nil {
			return nil, fmt.Errorf("squash layer %d: %w", i+1, err)
		}
		s.files = append(s.files, f)
		entries, err := tarEntries(ctx, f)
		if err == nil {
			err = m.apply(entries)
		}
		if err != nil {
			return nil, fmt.Errorf("squash layer %d: %w", i+1, err)
		}
	}
	if err := m.apply(top); err != nil {
		return nil, fmt.Errorf("squash the changes: %w", err)
	}
	m.emit("", m.root)
	s.Entries = m.out
	return s, nil
}

// squasher is the tree of what the layers so far did.
type squasher struct {
	root *squashNode
	out  []Entry
}

// squashNode is a name. It has a file, or it is deleted, or it is a directory
// that no layer lists and that only leads to others.
type squashNode struct {
	file    *squashFile
	deleted bool
	opaque  bool // nothing of the base shows in it
	kids    map[string]*squashNode
}

// squashFile is what hard links share.
type squashFile struct {
	entry Entry
	first string // the name it was written by
}

func (n *squashNode) isDir() bool {
	return !n.deleted && (n.file == nil || n.file.entry.Header.Typeflag == tar.TypeDir)
}

// apply puts a layer over those before it. Its deletions come first, wherever
// they stand: they are of what lies below it.
func (m *squasher) apply(entries []Entry) error {
	for i := range entries {
		name, err := index.Clean(entries[i].Header.Name)
		if err != nil {
			return err
		}
		dir, base := splitName(name)
		switch {
		case base == whiteoutOpaque:
			n := m.walk(dir)
			n.opaque, n.kids = true, nil
		case strings.HasPrefix(base, whiteoutPrefix+whiteoutPrefix): // AUFS' own
		case strings.HasPrefix(base, whiteoutPrefix):
			if base = base[len(whiteoutPrefix):]; base == "" || base == "." || base == ".." {
				return fmt.Errorf("%w: whiteout of no name", index.ErrMalformed)
			}
			m.walk(dir).put(base, &squashNode{deleted: true})
		}
	}
	for i := range entries {
		e := &entries[i]
		name, err := index.Clean(e.Header.Name)
		if err != nil {
			return err
		}
		if _, base := splitName(name); strings.HasPrefix(base, whiteoutPrefix) {
			continue
		}
		if err := m.add(name, e); err != nil {
			return fmt.Errorf("%.200q: %w", name, err)
		}
	}
	return nil
}

func (m *squasher) add(name string, e *Entry) error {
	isDir := e.Header.Typeflag == tar.TypeDir
	if name == "" {
		if !isDir {
			return fmt.Errorf("%w: the root is not a directory", index.ErrMalformed)
		}
		m.root.file = &squashFile{entry: *e}
		return nil
	}
	file := &squashFile{entry: *e}
	if e.Header.Typeflag == tar.TypeLink {
		target, err := index.Clean(e.Header.Linkname)
		if err != nil {
			return err
		}
		n := m.find(target)
		if n == nil || n.file == nil || n.isDir() {
			return fmt.Errorf("hard link to %.200q, which lies below the layers to squash: squash without this layer", target)
		}
		file = n.file
	}
	dir, base := splitName(name)
	parent := m.walk(dir)
	if old := parent.kids[base]; old != nil && isDir {
		if old.isDir() {
			old.file = file
			return nil
		}
		// The base's directory must not show where a file, or nothing, was in
		// between.
		parent.put(base, &squashNode{file: file, opaque: true})
		return nil
	}
	parent.put(base, &squashNode{file: file})
	return nil
}

func (n *squashNode) put(name string, kid *squashNode) {
	if n.kids == nil {
		n.kids = map[string]*squashNode{}
	}
	n.kids[name] = kid
}

// walk gives the directory of a path, and makes it where it is not.
func (m *squasher) walk(dir string) *squashNode {
	n := m.root
	for rest := dir; rest != ""; {
		var part string
		part, rest, _ = strings.Cut(rest, "/")
		kid := n.kids[part]
		if kid == nil || !kid.isDir() {
			kid = &squashNode{opaque: kid != nil}
			n.put(part, kid)
		}
		n = kid
	}
	return n
}

func (m *squasher) find(name string) *squashNode {
	n := m.root
	for rest := name; rest != "" && n != nil; {
		var part string
		part, rest, _ = strings.Cut(rest, "/")
		n = n.kids[part]
	}
	return n
}

// emit writes what is below a directory, in a layer's order.
func (m *squasher) emit(at string, n *squashNode) {
	if n.file != nil {
		m.file(at, n)
	}
	if n.opaque {
		m.out = append(m.out, Entry{Header: mark(join(at, whiteoutOpaque))})
	}
	var gone, names []string
	for name, kid := range n.kids {
		switch {
		case !kid.deleted:
			names = append(names, name)
		case !n.opaque: // else it is already
			gone = append(gone, name)
		}
	}
	slices.Sort(gone)
	slices.Sort(names)
	for _, name := range gone {
		m.out = append(m.out, Entry{Header: mark(join(at, whiteoutPrefix+name))})
	}
	for _, name := range names {
		kid, path := n.kids[name], join(at, name)
		if kid.isDir() {
			m.emit(path, kid)
		} else {
			m.file(path, kid)
		}
	}
}

// file writes a file by one of its names.
func (m *squasher) file(name string, n *squashNode) {
	e := n.file.entry
	h := *e.Header
	e.Header = &h
	h.Name = name
	switch {
	case h.Typeflag == tar.TypeDir && name == "":
		h.Name = "./"
	case h.Typeflag == tar.TypeDir:
		h.Name += "/"
	case n.file.first != "":
		link(&h, n.file.first)
		e.open = nil
	default:
		n.file.first = name
	}
	m.out = append(m.out, e)
}
