package index

import (
	"iter"
	"slices"
	"strings"
)

// names are what lies in a directory, in the order of their bytes, which is that
// of an EROFS directory. Nil has none. Most directories are small, and a tar lists
// most of them in order: then a slice takes an eighth of what a map does. A large
// one is a map while it changes, or a hostile order would make it slow.
type names struct {
	list   []*node
	parent *inode           // of the directory, set by the writer
	byName map[string]*node // if not nil, it has them and list is empty
}

// manyNames is where a slice becomes a map.
const manyNames = 1024

func compareName(n *node, name string) int { return strings.Compare(n.name, name) }

func (k *names) get(name string) *node {
	if k == nil {
		return nil
	}
	if k.byName != nil {
		return k.byName[name]
	}
	if i, ok := slices.BinarySearchFunc(k.list, name, compareName); ok {
		return k.list[i]
	}
	return nil
}

// put adds a name, in the place of what had it.
func (k *names) put(n *node) {
	if k.byName == nil && len(k.list) >= manyNames {
		k.byName = make(map[string]*node, 2*len(k.list))
		for _, o := range k.list {
			k.byName[o.name] = o
		}
		k.list = nil
	}
	if k.byName != nil {
		delete(k.byName, n.name) // or it keeps the other's name as its key
		k.byName[n.name] = n
		return
	}
	i, found := len(k.list), false
	if i > 0 && k.list[i-1].name >= n.name {
		i, found = slices.BinarySearchFunc(k.list, n.name, compareName)
	}
	if found {
		k.list[i] = n
	} else {
		k.list = slices.Insert(k.list, i, n)
	}
}

func (k *names) remove(name string) {
	switch {
	case k == nil:
	case k.byName != nil:
		delete(k.byName, name)
	default:
		if i, ok := slices.BinarySearchFunc(k.list, name, compareName); ok {
			k.list = slices.Delete(k.list, i, i+1)
		}
	}
}

// keep removes the names of which fn does not hold.
func (k *names) keep(fn func(*node) bool) {
	switch {
	case k == nil:
	case k.byName != nil:
		for name, n := range k.byName {
			if !fn(n) {
				delete(k.byName, name)
			}
		}
	default:
		k.list = slices.DeleteFunc(k.list, func(n *node) bool { return !fn(n) })
	}
}

// all gives the names in no order.
func (k *names) all() iter.Seq[*node] {
	return func(yield func(*node) bool) {
		if k == nil {
			return
		}
		for _, n := range k.byName {
			if !yield(n) {
				return
			}
		}
		for _, n := range k.list {
			if !yield(n) {
				return
			}
		}
	}
}

// sorted gives the names in the order of their bytes. They are names' own.
func (k *names) sorted() []*node {
	if k == nil {
		return nil
	}
	if k.byName != nil {
		k.list = make([]*node, 0, len(k.byName))
		for _, n := range k.byName {
			k.list = append(k.list, n)
		}
		slices.SortFunc(k.list, func(a, b *node) int { return strings.Compare(a.name, b.name) })
		k.byName = nil
	}
	return k.list
}

// memory gives a tree what it is made of, many at a time: an allocation for each
// name would cost more time than merging it.
type memory struct {
	nodes  []node
	inodes []inode
	bytes  strings.Builder
}

const (
	nodesAtOnce = 256
	bytesAtOnce = 32 << 10
)

func (m *memory) node() *node {
	if len(m.nodes) == 0 {
		m.nodes = make([]node, nodesAtOnce)
	}
	n := &m.nodes[0]
	m.nodes = m.nodes[1:]
	return n
}

func (m *memory) inode() *inode {
	if len(m.inodes) == 0 {
		m.inodes = make([]inode, nodesAtOnce)
	}
	in := &m.inodes[0]
	m.inodes = m.inodes[1:]
	return in
}

// string copies s, so that the tree does not keep what s is a part of.
func (m *memory) string(s string) string {
	if len(s) > bytesAtOnce/8 {
		return strings.Clone(s)
	}
	if m.bytes.Cap()-m.bytes.Len() < len(s) {
		m.bytes = strings.Builder{}
		m.bytes.Grow(bytesAtOnce)
	}
	from := m.bytes.Len()
	m.bytes.WriteString(s)
	return m.bytes.String()[from:]
}
