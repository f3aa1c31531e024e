package inflate

import "github.com/varvefs/varve/index"

// reach is how much of the output can be of interest: the history of the oldest
// point that is not settled, and what is between it and the newest. A byte is
// marked by its offset modulo this.
const reach = 2 * history

// points are those being made.
type points struct {
	Options
	pending []index.Point // whose State is not known yet
	cuts    []int64       // offsets of points in what is not given yet
	last    int64         // the offset of the last point; -1 before there is one

	// used has for each byte of the last of the output the offset of the last match
	// that was copied from it, if it was copied behind a point.
	used *[reach]int64
}

func (s *points) reset(o Options) {
	if o.Want != nil && s.used == nil {
		s.used = new([reach]int64)
	} else if s.used != nil && s.last >= 0 {
		clear(s.used[:])
	}
	*s = points{Options: o, pending: s.pending[:0], cuts: s.cuts[:0], last: -1, used: s.used}
}

// ask makes a point here if one is wanted.
func (s *points) ask(in *input, out int64) {
	if s.Want == nil || out == s.last || !s.Want(in.offset(), uint8(in.n&7), out) {
		return
	}
	s.last = out
	s.pending = append(s.pending, index.Point{In: in.offset(), Bits: uint8(in.n & 7), Out: out})
	s.cuts = append(s.cuts, out)
}

// oldest is the offset of the first point that is not settled, or -1.
func (s *points) oldest() int64 {
	if len(s.pending) == 0 {
		return -1
	}
	return s.pending[0].Out
}

// mark notes that a match at buf[to] copied n bytes from buf[from].
func (s *points) mark(w *window, from, n, to int) {
	at := w.at(to)
	for i := w.at(from); n > 0 && i < s.last; i++ {
		s.used[i&(reach-1)] = at
		n--
	}
}

// settle gives the points up to an offset to the caller. What lies behind them
// refers to nothing before them any more.
func (s *points) settle(w *window, upTo int64) error {
	n := 0
	for ; n < len(s.pending) && s.pending[n].Out <= upTo; n++ {
		p := s.pending[n]
		p.State = s.state(w, p.Out)
		if s.Point != nil {
			if err := s.Point(p); err != nil {
				return err
			}
		}
	}
	if n > 0 {
		s.pending = append(s.pending[:0], s.pending[n:]...)
	}
	return nil
}

// state is the history of a point from the first byte that is used behind it.
func (s *points) state(w *window, out int64) []byte {
	i := max(out-history, w.base)
	for ; i < out && s.used[i&(reach-1)] < out; i++ {
	}
	if i == out {
		return nil
	}
	state := make([]byte, out-i)
	from := w.buf[i-w.base : out-w.base]
	for k, c := range from {
		if s.used[(i+int64(k))&(reach-1)] >= out {
			state[k] = c
		}
	}
	return state
}

// cut shortens a range of what is not given yet, so that no point lies within it.
func (s *points) cut(from, to int64) int64 {
	n := 0
	for n < len(s.cuts) && s.cuts[n] <= from {
		n++
	}
	if n > 0 {
		s.cuts = append(s.cuts[:0], s.cuts[n:]...)
	}
	if len(s.cuts) > 0 {
		return min(to, s.cuts[0])
	}
	return to
}

// has says whether a point lies at an offset that is not given yet.
func (s *points) has(at int64) bool {
	s.cut(at-1, at)
	return len(s.cuts) > 0 && s.cuts[0] == at
}
