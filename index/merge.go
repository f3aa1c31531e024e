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
	root  *node
	nodes int
}

// node is a name in the tree. Several nodes share an inode where they are hard
// links of one another.
type node struct {
	name  string
	layer int // the layer that named it last, for opaque directories
	kids  map[string]*node
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
	t := &Tree{root: &node{layer: -1, kids: map[string]*node{}, inode: &inode{entry: &implicitDir}}}
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
		if target := m.lookup(e.Link); target != nil {
			return m.link(e, target)
		}
		m.deferred = append(m.deferred, e)
		return nil
	}
	parent := m.mkdirs(dir)
	n := &node{name: base, layer: m.layer, inode: &inode{entry: e, layer: m.layer}}
	if e.Type() == unix.S_IFDIR {
		n.kids = map[string]*node{}
		// Only a directory over a directory is merged: all else replaces.
		if old := parent.kids[base]; old != nil && old.isDir() {
			n.kids = old.kids
		}
	}
	parent.kids[base] = n
	return nil
}

// whiteout removes what is there now. As in containerd's unpacking into a plain
// directory this includes what the same layer brought earlier, but an opaque
// marker spares the layer's own names wherever it stands among them.
func (m *merger) whiteout(dir, base string) error {
	switch {
	case base == whiteoutOpaque:
		hideLower(m.mkdirs(dir), m.layer)
	case strings.HasPrefix(base, whiteoutMeta):
	default:
		name := base[len(whiteout):]
		if name == "" || name == "." || name == ".." {
			return fmt.Errorf("%w: whiteout of no name", ErrMalformed)
		}
		delete(m.mkdirs(dir).kids, name)
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
	parent := m.mkdirs(dir)
	parent.kids[base] = &node{name: base, layer: m.layer, inode: target.inode}
	return nil
}

// linkDeferred links what named a later entry. Each round must resolve some
// link; what is left then goes round in a circle or to nowhere.
func (m *merger) linkDeferred() error {
	for len(m.deferred) > 0 {
		var left []*Entry
		for _, e := range m.deferred {
			target := m.lookup(e.Link)
			if target == nil {
				left = append(left, e)
				continue
			}
			if err := m.link(e, target); err != nil {
				return fmt.Errorf("%q: %w", clip(e.Name), err)
			}
		}
		if len(left) == len(m.deferred) {
			return fmt.Errorf("%w: hard link %q to %q, which the image does not have", ErrMalformed, clip(left[0].Name), clip(left[0].Link))
		}
		m.deferred = left
	}
	return nil
}

// mkdirs walks to a directory and makes what is missing. A symlink on the way
// is followed where this layer brought it, and replaced by a directory where a
// lower one did: an upper directory over a lower symlink is what containerd
// leaves for overlayfs to show.
func (m *merger) mkdirs(dir string) *node {
	return m.walk(dir, true)
}

// lookup finds what a path names, nil if nothing. Its last component is not
// followed, and lower layers' symlinks are not either.
func (m *merger) lookup(name string) *node {
	dir, base := splitPath(name)
	parent := m.walk(dir, false)
	if parent == nil || base == "" {
		return parent
	}
	return parent.kids[base]
}

func (m *merger) walk(dir string, create bool) *node {
	const maxFollow = 40 // as the kernel's MAXSYMLINKS
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
				return nil
			}
			kid = &node{name: part, kids: map[string]*node{}, inode: &inode{entry: &implicitDir, layer: m.layer}}
			cur.kids[part] = kid
		}
		if create {
			kid.layer = m.layer
		}
		at = append(at, kid)
	}
	return at[len(at)-1]
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
