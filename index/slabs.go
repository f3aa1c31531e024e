package index

// slabs is a list that grows without being copied: of a slice that grows, both
// sizes are in memory at once, and all that it had before are garbage.
type slabs[T any] struct {
	first []T   // what grow made room for
	rest  [][]T // of slabSize each
	n     int
}

const slabSize = 512

// grow makes room for n more. It helps an empty list only.
func (s *slabs[T]) grow(n int) {
	if s.n == 0 {
		s.first = make([]T, 0, n)
	}
}

func (s *slabs[T]) add(v T) {
	s.n++
	if len(s.first) < cap(s.first) {
		s.first = append(s.first, v)
		return
	}
	last := len(s.rest) - 1
	if last < 0 || len(s.rest[last]) == slabSize {
		s.rest = append(s.rest, make([]T, 0, slabSize))
		last++
	}
	s.rest[last] = append(s.rest[last], v)
}

func (s *slabs[T]) at(i int) *T {
	if i < len(s.first) {
		return &s.first[i]
	}
	i -= len(s.first)
	return &s.rest[i/slabSize][i%slabSize]
}

// take gives the list as one slice and leaves none. An empty one is nil.
func (s *slabs[T]) take() []T {
	defer func() { *s = slabs[T]{} }()
	if s.n == 0 {
		return nil
	}
	if len(s.rest) == 0 {
		return s.first
	}
	all := make([]T, 0, s.n)
	all = append(all, s.first...)
	for i, l := range s.rest {
		all = append(all, l...)
		s.rest[i] = nil
	}
	return all
}
