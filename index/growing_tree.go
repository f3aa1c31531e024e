package index

// rootID is the root's node id.
const rootID = 1

// grownTree is the layers' own trees seen as one.
type grownTree struct {
	layers []*growLayer
	root   *mergedDir
	nodes  []growNode // by id; there is none with 0
	shape  uint64     // changes whenever a directory's parts may
	named  map[string]struct{}
}

// growNode is what has an id.
type growNode struct {
	file *growInode
	dir  *mergedDir
}

// mergedDir is a directory that somebody has asked for. It stands for its path,
// whatever the layers have there.
type mergedDir struct {
	id     uint64
	parent *mergedDir
	name   string
	kids   map[string]*mergedDir
	place  place
	shape  uint64 // of the tree, when place was made
}

// place is a directory as the layers have it.
type place struct {
	parts []part // the topmost layer first
	floor int    // layers below this one do not matter
}

// part is what one layer has of a directory.
type part struct {
	layer int
	name  *growName
}

// view says which layers a lookup sees, and whether it believes that nothing more
// is to come of them.
type view struct {
	top    int  // the highest layer that is seen
	passed bool // they are taken as they are
}

// found is what a lookup finds: nothing where it has no inode.
type found struct {
	inode *growInode
	name  *growName // of a file
	layer int       // that has the name
	dir   bool
}

// impliedInode is that of directories that no layer lists. Nobody changes it.
var impliedInode = &growInode{entry: &implicitDir}

func (t *grownTree) init(layers []*growLayer) {
	t.layers, t.shape, t.named = layers, 1, map[string]struct{}{}
	t.root = &mergedDir{id: rootID}
	t.nodes = []growNode{{}, {dir: t.root}}
	for i := len(layers) - 1; i >= 0; i-- {
		t.root.place.parts = append(t.root.place.parts, part{i, layers[i].root})
	}
}

// rootOf is the root as the layers up to top have it.
func (t *grownTree) rootOf(top int) place {
	return place{parts: t.root.place.parts[len(t.layers)-1-top:]}
}

// number gives an inode its id.
func (t *grownTree) number(n growNode) uint64 {
	t.nodes = append(t.nodes, n)
	return uint64(len(t.nodes)) - 1
}

// sub gives the directory that a name of d is.
func (t *grownTree) sub(d *mergedDir, name string) *mergedDir {
	kid := d.kids[name]
	if kid == nil {
		kid = &mergedDir{parent: d, name: name}
		kid.id = t.number(growNode{dir: kid})
		if d.kids == nil {
			d.kids = map[string]*mergedDir{}
		}
		d.kids[name] = kid
		t.named[name] = struct{}{}
	}
	return kid
}

// touch is told that a name is not what it was, in some directory of some layer.
// Only where a directory of that name is known does this matter to places.
func (t *grownTree) touch(name string) {
	if _, ok := t.named[name]; ok {
		t.shape++
	}
}

// refresh brings a directory's place up to date.
func (t *grownTree) refresh(d *mergedDir) {
	var stale []*mergedDir
	for at := d; at != t.root && at.shape != t.shape; at = at.parent {
		stale = append(stale, at)
	}
	for i := len(stale) - 1; i >= 0; i-- {
		at := stale[i]
		at.place = t.below(&at.parent.place, at.name, len(t.layers)-1, at.place.parts[:0])
		at.shape = t.shape
	}
}

// attributes gives the inode that says what a directory is like by now, nil where
// there is none any more.
func (t *grownTree) attributes(d *mergedDir) *growInode {
	t.refresh(d)
	for _, p := range d.place.parts {
		if p.name.inode != nil {
			return p.name.inode
		}
	}
	if len(d.place.parts) == 0 && d != t.root {
		return nil
	}
	return impliedInode
}

// below gives the place that a name of p is, without a part where it is no
// directory. It appends to parts.
func (t *grownTree) below(p *place, name string, top int, parts []part) place {
	c := place{parts: parts, floor: p.floor}
	for _, in := range p.parts {
		kid := in.name.dir.kids[name]
		switch {
		case in.layer > top:
		case kid == nil:
			if in.name.dir.bare {
				c.floor = in.layer
				return c
			}
		case kid.dir == nil:
			c.floor = in.layer + 1
			return c
		default:
			c.parts = append(c.parts, part{in.layer, kid})
			if kid.dir.cut {
				c.floor = in.layer
				return c
			}
		}
	}
	return c
}

// find looks a name up from the topmost layer down, until one decides. It gives a
// layer that must be waited for, or -1 where what it found is settled.
func (t *grownTree) find(p *place, name string, v view) (f found, wait int) {
	parts := p.parts
	for len(parts) > 0 && parts[0].layer > v.top {
		parts = parts[1:]
	}
	for l := v.top; l >= p.floor; l-- {
		known := v.passed || t.layers[l].settled
		if len(parts) == 0 || parts[0].layer != l {
			if !known {
				return found{}, l
			}
			continue
		}
		in := parts[0].name.dir
		parts = parts[1:]
		kid := in.kids[name]
		switch {
		case !known && kid == nil:
			return found{}, l
		case kid == nil:
			if in.bare {
				return f, -1
			}
		case kid.dir == nil:
			// What is no directory is not seen through one, nor is what it hides.
			if !f.dir && kid.inode != nil {
				f = found{inode: kid.inode, name: kid, layer: l}
			}
			return f, -1
		case kid.inode != nil:
			return found{inode: kid.inode, layer: l, dir: true}, -1
		case !known:
			return found{}, l
		default:
			f = found{inode: impliedInode, layer: l, dir: true}
			if kid.dir.cut {
				return f, -1
			}
		}
	}
	return f, -1
}
