package index

import "sort"

// dirList gives the names of a directory's parts in the order of their numbers,
// a name that several layers have by the lowest of its numbers: that one no layer
// to come can change.
type dirList struct {
	parts []part
	at    []int // in the order of each part
}

// listing begins after a number.
func listing(p *place, after uint64) *dirList {
	l := &dirList{parts: p.parts, at: make([]int, len(p.parts))}
	for i, p := range p.parts {
		order := p.name.dir.order
		l.at[i] = sort.Search(len(order), func(k int) bool { return order[k].number > after })
	}
	return l
}

// next gives the next name, nil after the last.
func (l *dirList) next() *growName {
	for {
		var least *growName
		from := 0
		for i, p := range l.parts {
			if order := p.name.dir.order; l.at[i] < len(order) && (least == nil || order[l.at[i]].number < least.number) {
				least, from = order[l.at[i]], i
			}
		}
		if least == nil {
			return nil
		}
		l.at[from]++
		if l.first(least) {
			return least
		}
	}
}

// first reports whether no other part has the name under a lower number.
func (l *dirList) first(n *growName) bool {
	for _, p := range l.parts {
		if other := p.name.dir.kids[n.name]; other != nil && other.number < n.number {
			return false
		}
	}
	return true
}
