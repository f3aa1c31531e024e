package index

import (
	"fmt"
	"slices"
	"strings"
)

// target finds what a hard link of layer l names, in l as it is by now over the
// layers below it. As merger.lookup, it follows the symlinks that l brought. What
// l itself does not have is only believed of layers that are settled: a link stays
// what it is made. Else it gives one of these that is not, or -1.
func (g *Growing) target(l *growLayer, name string) (f found, below int) {
	f, own := g.targetNow(l, name)
	if !own {
		for _, lower := range g.layers[:l.number] {
			if !lower.settled {
				return found{}, lower.number
			}
		}
	}
	return f, -1
}

// targetNow finds it by what has passed, and says whether l alone decides.
func (g *Growing) targetNow(l *growLayer, name string) (f found, own bool) {
	v := view{top: l.number, passed: true}
	follow := maxFollow
	at := []place{g.tree.rootOf(l.number)}
	dir, base := splitPath(name)
	own = true
	for rest := dir; rest != ""; {
		var part string
		part, rest, _ = strings.Cut(rest, "/")
		cur := &at[len(at)-1]
		switch part {
		case "", ".":
			continue
		case "..":
			at = at[:max(1, len(at)-1)]
			continue
		}
		f, _ := g.tree.find(cur, part, v)
		if f.name != nil && f.layer == l.number && f.name.isSymlink() && follow > 0 {
			follow--
			target := f.inode.entry.Link
			if strings.HasPrefix(target, "/") {
				at = at[:1]
			}
			rest = target + "/" + rest
			continue
		}
		if !f.dir {
			return found{}, false
		}
		in := g.tree.below(cur, part, l.number, nil)
		own = own && in.parts[0].layer == l.number
		at = append(at, in)
	}
	if base == "" {
		return found{inode: impliedInode, dir: true}, own
	}
	f, _ = g.tree.find(&at[len(at)-1], base, v)
	return f, own && f.name != nil && f.layer == l.number
}

// link makes e one more name of target.
func (g *Growing) link(l *growLayer, e *Entry, target found) error {
	if target.dir {
		return fmt.Errorf("%w: hard link to the directory %q", ErrMalformed, clip(e.Link))
	}
	dir, base := splitPath(e.Name)
	parent, err := g.mkdirs(l, dir)
	if err != nil {
		return err
	}
	in := target.inode
	n := g.putFile(l, parent, base, in)
	if g.links[in] == nil {
		g.links[in] = []*growName{target.name}
	}
	g.links[in] = append(g.links[in], n)
	return nil
}

// linkDeferred is merger.linkDeferred of a layer that is complete over layers that
// are settled.
func (g *Growing) linkDeferred(l *growLayer) error {
	rounds := 0
	for left := l.deferred; len(left) > 0; {
		waiting := map[string][]*Entry{} // by the name they link to
		var ready []*Entry
		for _, e := range left {
			if target, _ := g.target(l, e.Link); target.inode != nil {
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
			target, _ := g.target(l, e.Link)
			if target.inode == nil {
				return fmt.Errorf("%w: hard link %q to %q, in whose place is another by now", ErrMalformed, clip(e.Name), clip(e.Link))
			}
			if err := g.link(l, e, target); err != nil {
				return fmt.Errorf("%q: %w", clip(e.Name), err)
			}
		}
		left = left[:0]
		for _, es := range waiting {
			left = append(left, es...)
		}
		slices.SortFunc(left, func(a, b *Entry) int { return strings.Compare(a.Name, b.Name) })
		if rounds++; rounds > maxFollow {
			return fmt.Errorf("%w: hard link %q to %q: too many symlinks on the way", ErrMalformed, clip(left[0].Name), clip(left[0].Link))
		}
	}
	l.deferred = nil
	return nil
}

// countLinks gives an inode's link count. Once all is settled it is that of the
// names that are seen, counted once; until then, of those that have passed.
func (g *Growing) countLinks(in *growInode) uint32 {
	if g.left == 0 && !in.exact {
		in.exact = true
		if names := g.links[in]; names != nil {
			in.nlink = 0
			seen := map[*growName]bool{}
			for _, n := range names {
				if !seen[n] && n.inode == in && g.seen(n) {
					in.nlink++
				}
				seen[n] = true
			}
		}
		// The only name of an inode that somebody asks for is seen.
	}
	return uint32(max(1, in.nlink))
}

// seen reports whether a name of a layer's own tree is what the whole tree has at
// its path.
func (g *Growing) seen(n *growName) bool {
	var names []string
	for at := n.parent; at.parent != nil; at = at.parent {
		names = append(names, at.name)
	}
	top := len(g.layers) - 1
	p := g.tree.rootOf(top)
	for _, name := range slices.Backward(names) {
		p = g.tree.below(&p, name, top, nil)
	}
	f, _ := g.tree.find(&p, n.name, view{top: top, passed: true})
	return f.name == n
}
