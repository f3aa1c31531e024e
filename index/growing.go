package index

import (
	"errors"
	"fmt"
	"sync"
)

// ErrCanceled is what [Growing.Lookup] gives to a caller who gave up waiting.
var ErrCanceled = errors.New("given up waiting")

// Growing is the merged tree of layers of which some are still being read, entry
// by entry in the order of their tars. What it answers is what [Merge] of all the
// layers will say, and what nobody can know yet is waited for: a name is settled
// by the topmost layer that has it, once every layer above that one is wholly
// there or has a directory that hides what lies below.
//
// What cannot be known is left out, and this is all of it:
//   - a layer's tar may list a name once more, or remove what it brought itself;
//     from then on the later entry holds;
//   - the root's own attributes are those that have passed, not those to come;
//   - a listing shows what has passed, and has as a type what has passed;
//   - link counts are of the names that have passed, and those of directories
//     are always 1, which says that nobody counts.
//
// A directory that a layer has but has not listed is waited for, unless a higher
// layer lists it: its attributes may come after what is in it.
//
// An inode keeps its id as long as the Growing lives, no other gets it, and the
// contents of an id that is no directory's never change. Every method is safe for
// concurrent use.
type Growing struct {
	// Want is told that somebody waits for a layer, counted from 0; done that the
	// wait is over. Both must not block. Set before the first use, or nil.
	Want func(layer int) (done func())

	failed chan struct{} // closed by Fail

	mu     sync.Mutex // guards what follows, and all that hangs from it
	err    error      // why it failed
	layers []*growLayer
	left   int    // layers that are not settled
	last   uint64 // the number that a name got last
	tree   grownTree
	links  map[*growInode][]*growName // the names of an inode that has several
}

// GrowingNode is an inode of a [Growing].
type GrowingNode struct {
	ID    uint64
	Entry *Entry // to be read only; its name is one of the inode's, or none
	Layer int    // in whose data file the bytes lie, counted from 0
	Nlink uint32
}

// NewGrowing begins a tree of so many layers, of which nothing is there.
func NewGrowing(layers int) *Growing {
	g := &Growing{
		failed: make(chan struct{}), left: layers,
		last:  2, // what lists a directory has numbers of its own for "." and ".."
		links: map[*growInode][]*growName{},
	}
	for i := range layers {
		g.layers = append(g.layers, &growLayer{number: i, blocked: -1, root: &growName{dir: &growDir{}}})
	}
	g.tree.init(g.layers)
	return g
}

// Add appends an entry to a layer that is not complete, its place in the data
// file set already. An error says that [Merge] would refuse the image; the whole
// tree has failed of it.
func (g *Growing) Add(layer int, e Entry) error {
	return g.add(layer, []Entry{e})
}

// AddAll appends the rest of a layer, of which it keeps references, and completes
// it.
func (g *Growing) AddAll(layer int, es []Entry) error {
	const some = 1024 // so that those who ask meanwhile wait for a few milliseconds
	for len(es) > 0 {
		n := min(some, len(es))
		if err := g.add(layer, es[:n]); err != nil {
			return err
		}
		es = es[n:]
	}
	return g.complete(layer)
}

func (g *Growing) add(layer int, es []Entry) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	l := g.layers[layer]
	for i := range es {
		if g.err != nil {
			return g.err
		}
		if l.complete {
			return fmt.Errorf("add %q to layer %d, which is complete", clip(es[i].Name), layer+1)
		}
		if err := g.pass(l, &es[i]); err != nil {
			return g.fail(err)
		}
	}
	return nil
}

// Complete says that a layer has no more entries. Completing it again does
// nothing.
func (g *Growing) Complete(layer int) { g.complete(layer) }

func (g *Growing) complete(layer int) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.err != nil || g.layers[layer].complete {
		return g.err
	}
	g.layers[layer].complete = true
	// What waited for this layer lies above it.
	for _, l := range g.layers[layer:] {
		if err := g.advance(l); err != nil {
			return g.fail(err)
		}
	}
	return nil
}

// Fail ends the tree: whoever waits gets err, and so does whoever asks from now
// on, because nothing of what was read is proven. The first error stays.
func (g *Growing) Fail(err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.fail(err)
}

// fail is Fail with the lock held.
func (g *Growing) fail(err error) error {
	if g.err == nil {
		g.err = err
		close(g.failed)
	}
	return g.err
}

// Root gives the root directory, whose id is 1.
func (g *Growing) Root() (GrowingNode, error) { return g.Node(rootID) }

// Lookup finds a name in a directory, and waits until it is settled: for the
// layers that could still say otherwise, for cancel to be closed ([ErrCanceled]),
// or for the tree to fail. [ErrNotExist] says that it is settled that there is no
// such name.
func (g *Growing) Lookup(cancel <-chan struct{}, dir uint64, name string) (GrowingNode, error) {
	var w wait
	defer w.end(g)
	for {
		n, settled, err := w.lookup(g, dir, name)
		if settled || err != nil {
			return n, err
		}
		select {
		case <-w.wake:
		case <-g.failed:
		case <-cancel:
			return GrowingNode{}, ErrCanceled
		}
	}
}

// Node gives what is known by now of an inode that was looked up or listed.
func (g *Growing) Node(id uint64) (GrowingNode, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	n, err := g.node(id)
	if err != nil {
		return GrowingNode{}, err
	}
	if n.file != nil {
		return g.fileNode(n.file), nil
	}
	in := g.tree.attributes(n.dir)
	if in == nil {
		return GrowingNode{}, ErrNotExist // what has passed since has put something else there
	}
	return dirNode(n.dir, in), nil
}

// node finds an inode by its id.
func (g *Growing) node(id uint64) (growNode, error) {
	if g.err != nil {
		return growNode{}, g.err
	}
	if id == 0 || id >= uint64(len(g.tree.nodes)) {
		return growNode{}, fmt.Errorf("node %d: %w", id, ErrNotExist)
	}
	return g.tree.nodes[id], nil
}

// directory finds a directory by its id.
func (g *Growing) directory(id uint64) (*mergedDir, error) {
	n, err := g.node(id)
	if err == nil && n.dir == nil {
		err = fmt.Errorf("node %d is not a directory", id)
	}
	return n.dir, err
}

// ReadDir gives the names in a directory that have passed and that nothing which
// has passed hides, without "." and "..", until fn returns false; it waits for
// nothing. They come in the order in which they passed, so that a name which
// passes while somebody lists comes last and none comes twice. from is 0, or any
// number below 3, for the first; next is where to go on after the name. fn must
// not call the Growing.
func (g *Growing) ReadDir(id, from uint64, fn func(name string, n GrowingNode, next uint64) bool) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	d, err := g.directory(id)
	if err != nil {
		return err
	}
	g.tree.refresh(d)
	for l := listing(&d.place, from); ; {
		n := l.next()
		if n == nil {
			return nil
		}
		f, _ := g.tree.find(&d.place, n.name, view{top: len(g.layers) - 1, passed: true})
		if f.inode != nil && !fn(n.name, g.nodeOf(d, n.name, f), n.number) {
			return nil
		}
	}
}

// nodeOf makes a node of what was found as a name of d.
func (g *Growing) nodeOf(d *mergedDir, name string, f found) GrowingNode {
	if f.dir {
		return dirNode(g.tree.sub(d, name), f.inode)
	}
	return g.fileNode(f.inode)
}

func dirNode(d *mergedDir, in *growInode) GrowingNode {
	return GrowingNode{ID: d.id, Entry: in.entry, Layer: in.layer, Nlink: 1}
}

func (g *Growing) fileNode(in *growInode) GrowingNode {
	if in.id == 0 {
		in.id = g.tree.number(growNode{file: in})
	}
	return GrowingNode{ID: in.id, Entry: in.entry, Layer: in.layer, Nlink: g.countLinks(in)}
}

// Xattrs calls fn for each extended attribute that an index of the image would
// have, until fn returns false.
func (n GrowingNode) Xattrs(fn func(name string, value []byte) bool) {
	for _, x := range n.Entry.Xattrs {
		if _, _, ok := splitXattr(x.Name); ok && !fn(x.Name, x.Value) {
			return
		}
	}
}
