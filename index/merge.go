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

// Tree is an image's layers merged: what a container of it would see. It holds
// what the index needs of each name and nothing of the entries it was made from,
// so that a layer's can go when the next layer's come.
type Tree struct {
	root    *node
	layers  int
	nodes   int   // names, once counted
	written int32 // how often it was
	implied int   // directories made that no layer lists

	mem    memory
	dirs   []string          // of the names in the layers, see inode.dir
	linked map[*inode]string // the first name of what has hard links
}

// node is a name in the tree. Several nodes share an inode where they are hard
// links of one another.
type node struct {
	name  string
	kids  *names // nil where there are none
	inode *inode
	layer int32 // the layer that named it last, for opaque directories
	bare  int32 // one more than the layer that made it opaque
}

// inode is what hard links share: what the entry that made it says, and the layer
// in whose data file its bytes lie.
type inode struct {
	size     int64 // bytes of a regular file or a symlink; the writer sets a directory's
	at       int64 // where they begin in the data file; the writer's, the number of a block, of all else
	mtime    int64
	nid      uint64 // given by the writer
	more     *more  // nil for most
	mode     uint32
	uid, gid uint32
	mtimeNs  uint32
	layer    int32
	nlink    uint32
	dir      int32 // of the entry's name, an index of Tree.dirs
	round    int32 // of the writer's that has placed it
}

// more is what few inodes have.
type more struct {
	link   string // a symlink's target
	xattrs []byte // as the index has them, see encodeXattrs
	rdev   uint32
}

func (in *inode) isType(t uint32) bool { return in.mode&unix.S_IFMT == t }
func (n *node) isDir() bool            { return n.inode.isType(unix.S_IFDIR) }

// link gives a symlink's target.
func (in *inode) link() string {
	if in.more == nil {
		return ""
	}
	return in.more.link
}

func (in *inode) xattrs() []byte {
	if in.more == nil {
		return nil
	}
	return in.more.xattrs
}

var implicitDir = Entry{Mode: unix.S_IFDIR | 0o755}

// Merge applies layers, lowest first, each a list of entries in the order of its
// tar, as containerd's unpacking does, with three differences that it names:
// a directory that no layer lists has the mtime 0 rather than that of the
// unpacking; a hard link may name an entry that its layer lists later, or one of
// a lower layer; and a name that climbs out of the root is refused (by [Clean])
// rather than bent back into it. It is a pure function of the entries.
func Merge(layers [][]Entry) (*Tree, error) {
	t := NewTree()
	for _, entries := range layers {
		if err := t.Add(entries); err != nil {
			return nil, err
		}
	}
	t.count()
	return t, nil
}

// NewTree gives the tree of an image without layers.
func NewTree() *Tree {
	t := &Tree{linked: map[*inode]string{}}
	t.root = t.mem.node()
	*t.root = node{layer: -1, inode: t.implicitInode(0)}
	return t
}

// Add applies one more layer, as [Merge] does, and keeps nothing of its entries.
// After an error the tree is of no use.
func (t *Tree) Add(entries []Entry) error {
	m := merger{Tree: t, layer: int32(t.layers)}
	t.layers++
	if err := m.apply(entries); err != nil {
		return fmt.Errorf("layer %d: %w", t.layers, err)
	}
	return nil
}

func (t *Tree) implicitInode(layer int32) *inode {
	in := t.mem.inode()
	*in = inode{mode: implicitDir.Mode, layer: layer, dir: -1}
	return in
}

type merger struct {
	*Tree
	layer    int32
	deferred []*Entry // hard links whose target has not been seen yet
	rounds   int      // of linking them
	at       []*node  // room for a path
}

// inode keeps what an entry says.
func (m *merger) inode(e *Entry, dir string) (*inode, error) {
	in := m.mem.inode()
	*in = inode{mtime: e.Mtime, mode: e.Mode, uid: e.UID, gid: e.GID, mtimeNs: e.MtimeNs, layer: m.layer}
	if e.IsRegular() {
		in.size, in.at = e.Size, e.Data
	}
	xattrs, err := encodeXattrs(e)
	if err != nil {
		return nil, err
	}
	symlink := in.isType(unix.S_IFLNK)
	if symlink {
		in.size = int64(len(e.Link))
	}
	if symlink || xattrs != nil || e.Rdev != 0 {
		in.more = &more{xattrs: xattrs, rdev: e.Rdev}
		if symlink {
			in.more.link = m.mem.string(e.Link)
		}
	}
	// Neighbours in a tar mostly lie in the same directory.
	if n := len(m.dirs); n == 0 || m.dirs[n-1] != dir {
		m.dirs = append(m.dirs, m.mem.string(dir))
	}
	in.dir = int32(len(m.dirs) - 1)
	return in, nil
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
		in, err := m.inode(e, "")
		if err == nil {
			m.root.inode, m.root.layer = in, m.layer
		}
		return err
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
	in, err := m.inode(e, dir)
	if err != nil {
		return err
	}
	// Only a directory over a directory is merged: all else replaces.
	if old := parent.kids.get(base); old != nil {
		if !old.isDir() || !in.isType(unix.S_IFDIR) {
			old.kids, old.bare = nil, 0
		}
		old.inode, old.layer = in, m.layer
		return nil
	}
	m.put(parent, base, in)
	return nil
}

// put gives a directory a name, in the place of what had it.
func (m *merger) put(dir *node, name string, in *inode) *node {
	n := m.mem.node()
	*n = node{name: m.mem.string(name), layer: m.layer, inode: in}
	if dir.kids == nil {
		dir.kids = &names{}
	}
	dir.kids.put(n)
	return n
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
			n.kids.remove(name)
		}
		return err
	}
	return nil
}

func hideLower(dir *node, layer int32) {
	dir.kids.keep(func(kid *node) bool {
		if kid.layer == layer && kid.isDir() {
			hideLower(kid, layer)
		}
		return kid.layer == layer
	})
}

// link makes e one more name of target.
func (m *merger) link(e *Entry, target *node) error {
	if target.isDir() {
		return fmt.Errorf("%w: hard link to the directory %q", ErrMalformed, clip(e.Link))
	}
	dir, base := splitPath(e.Name)
	parent, err := m.mkdirs(dir)
	if err == nil {
		if _, ok := m.linked[target.inode]; !ok {
			m.linked[target.inode] = target.name
		}
		m.put(parent, base, target.inode)
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
	return parent.kids.get(base), nil
}

// maxFollow is how many symlinks a path may lead through: the kernel's
// MAXSYMLINKS.
const maxFollow = 40

func (m *merger) walk(dir string, create bool) (*node, error) {
	follow := maxFollow
	at := append(m.at[:0], m.root) // the path walked so far, for ".." in symlinks
	defer func() { m.at = at }()
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
		kid := cur.kids.get(part)
		if kid != nil && kid.layer == m.layer && kid.inode.isType(unix.S_IFLNK) && follow > 0 {
			follow--
			target := kid.inode.link()
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
			if err := m.implicit(part, len(at)); err != nil {
				return nil, err
			}
			kid = m.put(cur, part, m.implicitInode(m.layer))
		}
		if create {
			kid.layer = m.layer
		}
		at = append(at, kid)
	}
	return at[len(at)-1], nil
}

// implicit counts a directory that no layer lists. Its name may come from a
// symlink's target, which nobody has held against the limits of names yet, and
// a short entry may ask for thousands of them.
func (m *merger) implicit(name string, depth int) error {
	m.implied++
	switch {
	case len(name) > MaxName:
		return fmt.Errorf("%w: name of %d bytes (%q), the limit is %d", ErrMalformed, len(name), clip(name), MaxName)
	case depth > MaxDepth:
		return fmt.Errorf("%w: more than %d directories in one another", ErrMalformed, MaxDepth)
	case m.implied > MaxImplicit:
		return fmt.Errorf("%w: more than %d directories that no layer lists", ErrMalformed, MaxImplicit)
	}
	return nil
}

// count sets the link counts: of a directory as every Unix filesystem does, two
// and one for each directory in it.
func (t *Tree) count() {
	t.nodes = 0
	t.walk(t.root, func(n *node) { n.inode.nlink = 0 })
	t.walk(t.root, func(n *node) {
		t.nodes++
		if !n.isDir() {
			n.inode.nlink++
			return
		}
		n.inode.nlink = 2
		for kid := range n.kids.all() {
			if kid.isDir() {
				n.inode.nlink++
			}
		}
	})
}

// walk visits a directory before what lies in it, in no order of names.
func (t *Tree) walk(n *node, visit func(*node)) {
	visit(n)
	for kid := range n.kids.all() {
		t.walk(kid, visit)
	}
}

// appendPath appends the name that an inode's entry had in its layer. n is its
// first name in the tree.
func (t *Tree) appendPath(b []byte, n *node) []byte {
	if n.inode.dir < 0 {
		return b
	}
	base, ok := t.linked[n.inode]
	if !ok {
		base = n.name
	}
	if dir := t.dirs[n.inode.dir]; dir != "" {
		b = append(append(b, dir...), '/')
	}
	return append(b, base...)
}

func splitPath(p string) (dir, base string) {
	if i := strings.LastIndexByte(p, '/'); i >= 0 {
		return p[:i], p[i+1:]
	}
	return "", p
}
