package index

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// growLayer is one layer's own tree: what its tar does to the layers below it,
// whatever they are. Applying its entries to them one by one, as [Merge] does, and
// laying this tree over them comes to the same.
type growLayer struct {
	number   int
	root     *growName
	entries  int
	meta     int64 // bytes of names, link targets and extended attributes
	implied  int   // directories made that the layer had not listed
	complete bool  // no entry is to come
	settled  bool  // complete, and every entry is in the tree
	waiters  []*wait

	// A hard link may name a file of a lower layer. Where that one is not there
	// yet, what follows in the tar waits with it, so that all is applied in the
	// tar's order.
	queue    []*Entry
	deferred []*Entry // hard links to what was not there when they passed
	blocked  int      // the layer that queue or deferred waits for, else -1
}

// growName is a name that a layer has said something of. It is a directory (dir),
// another file (only inode), or removed (neither).
type growName struct {
	name   string
	number uint64 // in the order in which names passed, in all layers
	parent *growName
	inode  *growInode // of a directory: nil until the layer lists it
	dir    *growDir
}

// growDir is what a layer has in a directory.
type growDir struct {
	kids  map[string]*growName
	order []*growName // by number
	cut   bool        // nothing of what lower layers have there is seen
	bare  bool        // nothing of what lower layers have in it is seen
}

// growInode is what hard links share.
type growInode struct {
	entry *Entry
	id    uint64 // 0 until somebody has asked for it
	layer int
	nlink int // names in the layers' own trees, or what countLinks counted
	exact bool
}

func (n *growName) isSymlink() bool {
	return n.dir == nil && n.inode != nil && n.inode.entry.Type() == unix.S_IFLNK
}

// pass takes the next entry of a layer's tar.
func (g *Growing) pass(l *growLayer, e *Entry) error {
	l.entries++
	l.meta += int64(len(e.Name) + len(e.Link))
	for _, x := range e.Xattrs {
		l.meta += int64(len(x.Name) + len(x.Value))
	}
	switch {
	case l.entries > MaxEntries:
		return fmt.Errorf("layer %d: %w: more than %d entries in one layer", l.number+1, ErrMalformed, MaxEntries)
	case l.meta > MaxMeta:
		return fmt.Errorf("layer %d: %w: more than %d bytes of names and extended attributes in one layer", l.number+1, ErrMalformed, MaxMeta)
	}
	if l.blocked >= 0 {
		l.queue = append(l.queue, e)
		return nil
	}
	below, err := g.apply(l, e)
	if err != nil {
		return fmt.Errorf("layer %d: %q: %w", l.number+1, clip(e.Name), err)
	}
	if below >= 0 {
		l.queue, l.blocked = []*Entry{e}, below
	}
	return nil
}

// advance applies the entries of a layer that waited for lower ones, as far as it
// can, and settles it after the last.
func (g *Growing) advance(l *growLayer) error {
	if l.blocked >= 0 {
		defer l.signal() // of what it waits for by then
	}
	l.blocked = -1
	for len(l.queue) > 0 {
		e := l.queue[0]
		below, err := g.apply(l, e)
		if err != nil {
			return fmt.Errorf("layer %d: %q: %w", l.number+1, clip(e.Name), err)
		}
		if below >= 0 {
			l.blocked = below
			return nil
		}
		l.queue = l.queue[1:]
	}
	l.queue = nil
	if !l.complete || l.settled {
		return nil
	}
	if len(l.deferred) > 0 {
		for _, lower := range g.layers[:l.number] {
			if !lower.settled {
				l.blocked = lower.number
				return nil
			}
		}
		if err := g.linkDeferred(l); err != nil {
			return fmt.Errorf("layer %d: %w", l.number+1, err)
		}
	}
	l.settled = true
	g.left--
	l.signal()
	return nil
}

// apply is merger.add of a layer's own tree. It gives a layer below l that must be
// settled first, or -1.
func (g *Growing) apply(l *growLayer, e *Entry) (below int, err error) {
	dir, base := splitPath(e.Name)
	if strings.HasPrefix(base, whiteout) {
		return -1, g.whiteout(l, dir, base)
	}
	if strings.Contains(dir, "/"+whiteoutMeta) || strings.HasPrefix(dir, whiteoutMeta) {
		return -1, nil
	}
	if e.Name == "" {
		if e.Type() != unix.S_IFDIR {
			return -1, fmt.Errorf("%w: the root is not a directory", ErrMalformed)
		}
		l.root.inode = &growInode{entry: e, layer: l.number}
		return -1, nil
	}
	if e.HardLink {
		target, below := g.target(l, e.Link)
		switch {
		case below >= 0:
			return below, nil
		case target.inode == nil:
			l.deferred = append(l.deferred, e)
			return -1, nil
		}
		return -1, g.link(l, e, target)
	}
	parent, err := g.mkdirs(l, dir)
	if err != nil {
		return -1, err
	}
	in := &growInode{entry: e, layer: l.number}
	if e.Type() == unix.S_IFDIR {
		n := g.makeDir(parent, base)
		n.inode = in
		g.touch(l, n)
	} else {
		g.putFile(l, parent, base, in)
	}
	return -1, nil
}

// whiteout is merger.whiteout of a layer's own tree.
func (g *Growing) whiteout(l *growLayer, dir, base string) error {
	name := base[len(whiteout):]
	switch {
	case base == whiteoutOpaque:
		n, err := g.mkdirs(l, dir)
		if err == nil && !n.dir.bare {
			n.dir.hideLower()
			g.tree.shape++
			g.touch(l, n)
		}
		return err
	case strings.HasPrefix(base, whiteoutMeta):
		return nil
	case name == "" || name == "." || name == "..":
		return fmt.Errorf("%w: whiteout of no name", ErrMalformed)
	}
	parent, err := g.mkdirs(l, dir)
	if err != nil {
		return err
	}
	n, _ := g.name(parent, name)
	n.clear()
	g.touch(l, n)
	return nil
}

// hideLower makes a directory and all in it bare. What is in a bare directory is
// bare already: no directory is visited twice.
func (d *growDir) hideLower() {
	for todo := []*growDir{d}; len(todo) > 0; {
		d := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		d.bare = true
		for _, kid := range d.order {
			if kid.dir != nil && !kid.dir.bare {
				todo = append(todo, kid.dir)
			}
		}
	}
}

// mkdirs walks to a directory of a layer's own tree and makes what is missing. A
// symlink that the layer brought is followed, one of a lower layer is not and so
// need not be known.
func (g *Growing) mkdirs(l *growLayer, dir string) (*growName, error) {
	follow := maxFollow
	at := []*growName{l.root}
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
		kid := cur.dir.kids[part]
		if kid != nil && kid.isSymlink() && follow > 0 {
			follow--
			target := kid.inode.entry.Link
			if strings.HasPrefix(target, "/") {
				at = at[:1]
			}
			rest = target + "/" + rest
			continue
		}
		if kid == nil || kid.dir == nil {
			if err := l.imply(part, len(at)); err != nil {
				return nil, err
			}
			kid = g.makeDir(cur, part)
			g.touch(l, kid)
		}
		at = append(at, kid)
	}
	return at[len(at)-1], nil
}

// imply counts a directory that the layer has not listed. A lower layer may have
// it, so the limit is one of a layer and not of the image.
func (l *growLayer) imply(name string, depth int) error {
	l.implied++
	switch {
	case len(name) > MaxName:
		return fmt.Errorf("%w: name of %d bytes (%q), the limit is %d", ErrMalformed, len(name), clip(name), MaxName)
	case depth > MaxDepth:
		return fmt.Errorf("%w: more than %d directories in one another", ErrMalformed, MaxDepth)
	case l.implied > MaxImplicit:
		return fmt.Errorf("%w: more than %d directories that the layer does not list", ErrMalformed, MaxImplicit)
	}
	return nil
}

// name gives a name of a directory in a layer's own tree. A fresh one is removed
// until the caller says what it is.
func (g *Growing) name(parent *growName, base string) (n *growName, fresh bool) {
	d := parent.dir
	if n := d.kids[base]; n != nil {
		return n, false
	}
	if d.kids == nil {
		d.kids = map[string]*growName{}
	}
	g.last++
	n = &growName{name: base, number: g.last, parent: parent}
	d.kids[base] = n
	d.order = append(d.order, n)
	return n, true
}

// clear makes a name one that was removed.
func (n *growName) clear() {
	if n.inode != nil {
		n.inode.nlink--
	}
	n.inode, n.dir = nil, nil
}

// makeDir makes a name a directory. In the place of something else that the layer
// said of the name, it hides what lower layers have there.
func (g *Growing) makeDir(parent *growName, base string) *growName {
	n, fresh := g.name(parent, base)
	if n.dir == nil {
		n.clear()
		hidden := !fresh || parent.dir.bare
		n.dir = &growDir{cut: hidden, bare: hidden}
	}
	return n
}

// putFile makes a name one of an inode that is no directory's.
func (g *Growing) putFile(l *growLayer, parent *growName, base string, in *growInode) *growName {
	n, _ := g.name(parent, base)
	n.clear()
	n.inode = in
	in.nlink++
	g.touch(l, n)
	return n
}

// touch tells of a name that it is not what it was.
func (g *Growing) touch(l *growLayer, n *growName) {
	g.tree.touch(n.name)
	for _, w := range l.waiters {
		if w.cares(n.name) {
			w.signal()
		}
	}
}
