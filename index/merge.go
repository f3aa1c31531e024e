package index

import (
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Names that a layer's tar gives a meaning of their own (image-spec, layer.md).
const (
	whiteout       = ".wh."
	whiteoutMeta   = ".wh..wh."     // AUFS' own bookkeeping: never shown
	whiteoutOpaque = ".wh..wh..opq" // hides what lower layers have in its directory
)

// Tree is an image's layers merged: what a container of it would see.
type Tree struct {
	root    *node
	nodes   int
	implied int // directories made that no layer lists
}

// node is a name in the tree. Several nodes share an inode where they are hard
// links of one another.
type node struct {
	name  string
	layer int              // the layer that named it last, for opaque directories
	bare  int              // one more than the layer that made it opaque
	kids  map[string]*node // nil where there are none
	inode *inode
}

// inode is what hard links share: the entry that made it and the layer in whose
// data file its bytes lie.
type inode struct {
	entry *Entry
	layer int
	nlink int
	nid   uint64 // given by the writer
}

func (n *node) isDir() bool { return n.inode.entry.Type() == unix.S_IFDIR }

var implicitDir = Entry{Mode: unix.S_IFDIR | 0o755}

// Merge applies layers, lowest first, each a list of entries in the order of its
// tar, as containerd's unpacking does, with three differences that it names:
// a directory that no layer lists has the mtime 0 rather than that of the
// unpacking; a hard link may name an entry that its layer lists later, or one of
// a lower layer; and a name that climbs out of the root is refused (by [Clean])
// rather than bent back into it.
//
// Merge keeps references to the entries. It is a pure function of them.
func Merge(layers [][]Entry) (*Tree, error) {
	t := &Tree{root: &node{layer: -1, inode: &inode{entry: &implicitDir}}}
	for i, entries := range layers {
		m := merger{Tree: t, layer: i}
		if err := m.apply(entries); err != nil {
			return nil, fmt.Errorf("layer %d: %w", i+1, err)
		}
	}
	t.count(t.root)
	return t, nil
}

type merger struct {
	*Tree
	layer    int
	deferred []*Entry // hard links whose target has not been seen yet
	rounds   int      // of linking them
}

func (m *merger) apply(entries []Entry) error {
	for i := range entries {
		e := &entries[i]
		if err := m.add(e); err != nil {
			return fmt.Errorf("%q: %w", clip(e.Name), err)
		}
	}
	return m.linkDeferred()
}

func (m *merger) add(e *Entry) error {
	dir, base := splitPath(e.Name)
	if strings.HasPrefix(base, whiteout) {
		return m.whiteout(dir, base)
	}
	if strings.Contains(dir, "/"+whiteoutMeta) || strings.HasPrefix(dir, whiteoutMeta) {
		return nil
	}
	if e.Name == "" {
		if e.Type() != unix.S_IFDIR {
			return fmt.Errorf("%w: the root is not a directory", ErrMalformed)
		}
		m.root.inode, m.root.layer = &inode{entry: e, layer: m.layer}, m.layer
		return nil
	}
	if e.HardLink {
		target, err := m.lookup(e.Link)
		if err == nil && target != nil {
			return m.link(e, target)
		}
		m.deferred = append(m.deferred, e)
		return err
	}
	parent, err := m.mkdirs(dir)
	if err != nil {
		return err
	}
	n := &node{name: base, layer: m.layer, inode: &inode{entry: e, layer: m.layer}}
	// Only a directory over a directory is merged: all else replaces.
	if old := parent.kids[base]; old != nil && old.isDir() && n.isDir() {
		n.kids, n.bare = old.kids, old.bare
	}
	parent.put(n)
	return nil
}

// put gives a directory a name, in the place of what had it.
func (n *node) put(kid *node) {
	if n.kids == nil {
		n.kids = map[string]*node{}
	}
	n.kids[kid.name] = kid
}

// whiteout removes what is there now. As in containerd's unpacking into a plain
// directory this includes what the same layer brought earlier, but an opaque
// marker spares the layer's own names wherever it stands among them.
func (m *merger) whiteout(dir, base string) error {
	switch {
	case base == whiteoutOpaque:
		n, err := m.mkdirs(dir)
		if err == nil && n.bare != m.layer+1 {
			n.bare = m.layer + 1
			hideLower(n, m.layer)
		}
		return err
	case strings.HasPrefix(base, whiteoutMeta):
	default:
		name := base[len(whiteout):]
		if name == "" || name == "." || name == ".." {
			return fmt.Errorf("%w: whiteout of no name", ErrMalformed)
		}
		n, err := m.mkdirs(dir)
		if err == nil {
			delete(n.kids, name)
		}
		return err
	}
	return nil
}

func hideLower(dir *node, layer int) {
	for name, kid := range dir.kids {
		if kid.layer != layer {
			delete(dir.kids, name)
		} else if kid.isDir() {
			hideLower(kid, layer)
		}
	}
}

// link makes e one more name of target.
func (m *merger) link(e *Entry, target *node) error {
	if target.isDir() {
		return fmt.Errorf("%w: hard link to the directory %q", ErrMalformed, clip(e.Link))
	}
	dir, base := splitPath(e.Name)
	parent, err := m.mkdirs(dir)
	if err == nil {
		parent.put(&node{name: base, layer: m.layer, inode: target.inode})
	}
	return err
}

// linkDeferred links what named a later entry: first what waits for a name that
// is there, then what waited for that link's own name, and so on. What is left
// when a whole round has linked nothing goes round in a circle or to nowhere.
func (m *merger) linkDeferred() error {
	for left := m.deferred; len(left) > 0; {
		waiting := map[string][]*Entry{} // by the name they link to
		var ready []*Entry
		for _, e := range left {
			target, err := m.lookup(e.Link)
			if err != nil {
				return fmt.Errorf("%q: %w", clip(e.Name), err)
			}
			if target != nil {
				ready = append(ready, e)
			} else {
				waiting[e.Link] = append(waiting[e.Link], e)
			}
		}
		if len(ready) == 0 {
			return fmt.Errorf("%w: hard link %q to %q, which the image does not have", ErrMalformed, clip(left[0].Name), clip(left[0].Link))
		}
		for len(ready) > 0 {
			e := ready[0]
			ready = append(ready[1:], waiting[e.Name]...)
			delete(waiting, e.Name)
			target, err := m.lookup(e.Link)
			if err == nil && target == nil { // a link before this one took its place
				err = fmt.Errorf("%w: hard link to %q, which another link replaced", ErrMalformed, clip(e.Link))
			}
			if err == nil {
				err = m.link(e, target)
			}
			if err != nil {
				return fmt.Errorf("%q: %w", clip(e.Name), err)
			}
		}
		// Names that lead through symlinks are not met by their letters: they take
		// another round.
		left = left[:0]
		for _, es := range waiting {
			left = append(left, es...)
		}
		slices.SortFunc(left, func(a, b *Entry) int { return strings.Compare(a.Name, b.Name) })
		if m.rounds++; m.rounds > maxFollow {
			return fmt.Errorf("%w: hard link %q to %q: too many symlinks on the way", ErrMalformed, clip(left[0].Name), clip(left[0].Link))
		}
	}
	return nil
}

// mkdirs walks to a directory and makes what is missing. A symlink on the way
// is followed where this layer brought it, and replaced by a directory where a
// lower one did: an upper directory over a lower symlink is what containerd
// leaves for overlayfs to show.
func (m *merger) mkdirs(dir string) (*node, error) {
	return m.walk(dir, true)
}

// lookup finds what a path names, nil if nothing. Its last component is not
// followed, and lower layers' symlinks are not either.
func (m *merger) lookup(name string) (*node, error) {
	dir, base := splitPath(name)
	parent, err := m.walk(dir, false)
	if err != nil || parent == nil || base == "" {
		return parent, err
	}
	return parent.kids[base], nil
}

// maxFollow is how many symlinks a path may lead through: the kernel's
// MAXSYMLINKS.
const maxFollow = 40

func (m *merger) walk(dir string, create bool) (*node, error) {
	follow := maxFollow
	at := []*node{m.root} // the path walked so far, for ".." in symlinks
	for rest := dir; rest != ""; {
		var part string
		part, rest, _ = strings.Cut(rest, "/")
		cur := at[len(at)-1]
		switch part {
		case "", ".":
			continue
		case "..":
			at = at[:max(1, len(at)-1)]
			continue
		}
		kid := cur.kids[part]
		if kid != nil && kid.layer == m.layer && kid.inode.entry.Type() == unix.S_IFLNK && follow > 0 {
			follow--
			target := kid.inode.entry.Link
			if strings.HasPrefix(target, "/") {
				at = at[:1]
			}
			rest = target + "/" + rest
			continue
		}
		if kid == nil || !kid.isDir() {
			if !create {
				return nil, nil
			}
			var err error
			if kid, err = m.implicit(part, len(at)); err != nil {
				return nil, err
			}
			cur.put(kid)
		}
		if create {
			kid.layer = m.layer
		}
		at = append(at, kid)
	}
	return at[len(at)-1], nil
}

// implicit makes a directory that no layer lists. Its name may come from a
// symlink's target, which nobody has held against the limits of names yet, and
// a short entry may ask for thousands of them.
func (m *merger) implicit(name string, depth int) (*node, error) {
	m.implied++
	switch {
	case len(name) > MaxName:
		return nil, fmt.Errorf("%w: name of %d bytes (%q), the limit is %d", ErrMalformed, len(name), clip(name), MaxName)
	case depth > MaxDepth:
		return nil, fmt.Errorf("%w: more than %d directories in one another", ErrMalformed, MaxDepth)
	case m.implied > MaxImplicit:
		return nil, fmt.Errorf("%w: more than %d directories that no layer lists", ErrMalformed, MaxImplicit)
	}
	return &node{name: name, inode: &inode{entry: &implicitDir, layer: m.layer}}, nil
}

// count sets the link counts: of a directory as every Unix filesystem does, two
// and one for each directory in it.
func (t *Tree) count(n *node) {
	t.nodes++
	if !n.isDir() {
		n.inode.nlink++
		return
	}
	n.inode.nlink = 2
	for _, kid := range n.kids {
		t.count(kid)
		if kid.isDir() {
			n.inode.nlink++
		}
	}
}

// sorted gives a directory's children in the order of their bytes, the order of
// an EROFS directory.
func (n *node) sorted() []*node {
	kids := make([]*node, 0, len(n.kids))
	for _, k := range n.kids {
		kids = append(kids, k)
	}
	slices.SortFunc(kids, func(a, b *node) int { return strings.Compare(a.name, b.name) })
	return kids
}

func splitPath(p string) (dir, base string) {
	if i := strings.LastIndexByte(p, '/'); i >= 0 {
		return p[:i], p[i+1:]
	}
	return "", p
}
