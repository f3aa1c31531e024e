package profile

import (
	"cmp"
	"slices"
	"sort"
)

// Tidy makes what was recorded of layers the ranges of a profile: whole blocks
// inside of their layers, of which a later one loses what an earlier one has.
func Tidy(layers []Layer, uses []Use) []Use {
	var out []Use
	for _, u := range uses {
		if u.Layer < 0 || u.Layer >= len(layers) || u.N <= 0 || u.Off < 0 {
			continue
		}
		size := (layers[u.Layer].Size + block - 1) / block * block
		from, to := u.Off/block*block, min((u.Off+u.N+block-1)/block*block, size)
		if from >= to {
			continue
		}
		u.Off, u.N, u.After = from, to-from, min(max(u.After, 0), maxAfter)
		out = append(out, u)
	}
	if overlap(out) >= 0 {
		out = apart(out)
	}
	return out[:min(len(out), MaxUses)]
}

// apart takes from uses what earlier ones have.
func apart(uses []Use) (out []Use) {
	had := newSpans(nil)
	for _, u := range uses {
		for _, s := range had.missing(u.Layer, u.Off, u.Off+u.N) {
			u.Off, u.N = s.from, s.to-s.from
			had.add(u.Layer, s)
			if out = append(out, u); len(out) == MaxUses {
				return out
			}
		}
	}
	return out
}

// Merge gives the profile that a start leaves behind: what it read, and what
// earlier ones did. old is the profile that there was, nil if there was none;
// fetched says of each of its ranges whether this start had it fetched, so that it
// would show if nobody read it. nil: of none.
//
// Ranges of the old profile keep their place. They were put in order by a start
// that had to wait for each, while one that had them ahead, or in the page cache,
// shows only what was left for it to wait for. What is new comes behind the range
// that it was read after.
//
// A range that was fetched and not read by MaxMissed starts in a row is dropped:
// one start may have ended early or taken another way. What was here before the
// start says nothing, since the kernel may have had it, too: it stays as it is.
func Merge(old *Profile, layers []Layer, recorded []Use, fetched []bool) []Use {
	recorded = Tidy(layers, recorded)
	if old == nil || len(old.Uses) == 0 {
		return recorded
	}
	had, read := newSpans(old.Uses), newSpans(recorded)
	follow := map[int][]Use{} // what is new, by the old range that it comes behind
	at := -1
	for _, u := range recorded {
		if i := had.last(u); i >= 0 {
			at = i
		}
		for _, s := range had.missing(u.Layer, u.Off, u.Off+u.N) {
			n := u
			n.Off, n.N, n.Missed = s.from, s.to-s.from, 0
			if at >= 0 {
				n.After = old.Uses[at].After
			} else {
				n.After = min(n.After, old.Uses[0].After)
			}
			follow[at] = append(follow[at], n)
		}
	}
	out := follow[-1]
	for i, u := range old.Uses {
		missed := u.Missed
		if i < len(fetched) && fetched[i] {
			missed++
		}
		out = append(out, cut(u, read.missing(u.Layer, u.Off, u.Off+u.N), missed)...)
		out = append(out, follow[i]...)
	}
	return out[:min(len(out), MaxUses)]
}

// cut gives the parts of a use that were read, and those that were not, which have
// now been missed so many times.
func cut(u Use, unread []span, missed int) (out []Use) {
	add := func(from, to int64, missed int) {
		if from >= to || missed >= MaxMissed {
			return
		}
		if n := len(out); n > 0 && out[n-1].Missed == missed && out[n-1].Off+out[n-1].N == from {
			out[n-1].N += to - from
			return
		}
		out = append(out, Use{Layer: u.Layer, Off: from, N: to - from, After: u.After, Missed: missed})
	}
	at := u.Off
	for _, s := range unread {
		add(at, s.from, 0)
		add(s.from, s.to, missed)
		at = s.to
	}
	add(at, u.Off+u.N, 0)
	return out
}

// span is a range of a layer, and the place of the use that it is.
type span struct {
	from, to int64
	use      int
}

// spans are ranges by layer, in order, of which no two overlap.
type spans map[int][]span

func newSpans(uses []Use) spans {
	s := spans{}
	for i, u := range uses {
		s[u.Layer] = append(s[u.Layer], span{u.Off, u.Off + u.N, i})
	}
	for _, l := range s {
		slices.SortFunc(l, func(a, b span) int { return cmp.Compare(a.from, b.from) })
	}
	return s
}

// first gives the place of the first span of a layer that ends behind an offset.
func (s spans) first(layer int, off int64) int {
	l := s[layer]
	return sort.Search(len(l), func(i int) bool { return l[i].to > off })
}

// missing gives what of a range is in no span.
func (s spans) missing(layer int, from, to int64) (out []span) {
	for _, h := range s[layer][s.first(layer, from):] {
		if h.from >= to {
			break
		}
		if from < h.from {
			out = append(out, span{from: from, to: h.from})
		}
		from = h.to
	}
	if from < to {
		out = append(out, span{from: from, to: to})
	}
	return out
}

// last gives the place of the last of the uses that a use has bytes in common
// with, -1 if there is none.
func (s spans) last(u Use) int {
	last := -1
	for _, h := range s[u.Layer][s.first(u.Layer, u.Off):] {
		if h.from >= u.Off+u.N {
			break
		}
		last = max(last, h.use)
	}
	return last
}

// add puts in a span that overlaps none. Those that touch become one, so that a
// file that is read from its start stays one.
func (s spans) add(layer int, n span) {
	l := s[layer]
	i := s.first(layer, n.from)
	if i > 0 && l[i-1].to == n.from {
		l[i-1].to = n.to
		if i < len(l) && l[i].from == n.to {
			l[i-1].to = l[i].to
			s[layer] = slices.Delete(l, i, i+1)
		}
		return
	}
	if i < len(l) && l[i].from == n.to {
		l[i].from = n.from
		return
	}
	s[layer] = slices.Insert(l, i, n)
}

// overlap gives the place of a use that has bytes in common with another, -1 if
// there is none.
func overlap(uses []Use) int {
	for _, l := range newSpans(uses) {
		for i := 1; i < len(l); i++ {
			if l[i].from < l[i-1].to {
				return l[i].use
			}
		}
	}
	return -1
}
