package fetch

import (
	"slices"
	"sync"

	"github.com/varvefs/varve/index"
)

// HoldFirst is Hold for a read of which only the first block is known to be wanted,
// and the rest may be what a kernel reads ahead: nothing is fetched for that. all says
// whether [off, off+n) is held; if not, and there is no error, nothing is, and who
// really wants it is to ask once more, which is told by wanted. A read that goes on
// where another one ended may be read-ahead from its first block on.
//
// What is held counts as asked for up to where other frames begin. A recording that is
// to miss nothing has none of those held: what a kernel has got it does not ask for
// again.
func (l *Layer) HoldFirst(off, n int64, wanted bool) (all bool, err error) {
	if wanted {
		l.windows.forget(off + n)
		err := l.Hold(off, n)
		return err == nil, err
	}
	s := l.sight(off, n)
	goesOn, refused := l.windows.goesOn(off)
	exact := l.recordings.exact()
	switch {
	case s.own < n && (!s.rest || exact):
		l.windows.add(window{end: off + n, refused: s.beyond})
		return false, nil
	case goesOn && (s.begins || refused) && (!s.first || exact):
		// The one after a second refusal is asked for only if somebody came so far.
		l.windows.add(window{end: off + n, refused: s.begins})
		return false, nil
	}
	l.windows.add(window{end: off + n})
	if goesOn && s.begins && l.wrong.Load() == nil {
		// It is here, and nobody is known to want it.
		l.gate.RLock()
	} else if err := l.Hold(off, s.own); err != nil {
		return false, err
	}
	if !l.has(off, n) { // dropped meanwhile
		l.Release()
		return false, nil
	}
	return true, nil
}

// sight is what is known of a range of the data file.
type sight struct {
	own    int64 // how much of it is of one file, or of the frames of its first block
	first  bool  // that is here
	rest   bool  // and so are the others
	begins bool  // a file begins where it does
	beyond bool  // the rest is of other files
}

func (l *Layer) sight(off, n int64) sight {
	s := sight{own: n, rest: true}
	l.life.RLock()
	defer l.life.RUnlock()
	if l.closed.Load() {
		s.first = true
		return s // Hold says so
	}
	from, first := l.frames.PiecesIn(off, min(n, index.BlockSize))
	_, to := l.frames.PiecesIn(off, n)
	own := func(frame int) bool {
		for i := from; i < first; i++ {
			if l.frames.FrameOf(i) == frame {
				return true
			}
		}
		return false
	}
	for i := first; i < to; i++ {
		frame := l.frames.FrameOf(i)
		if s.beyond = l.beginsFile(i); own(frame) || !s.beyond && l.data.Present(frame) {
			continue
		}
		s.own = l.frames.Piece(i).Data/index.BlockSize*index.BlockSize - off
		s.rest = l.has(off+s.own, n-s.own)
		break
	}
	s.first = l.has(off, s.own)
	s.begins = from < first && l.beginsFile(from) && l.frames.Piece(from).Data >= off
	return s
}

// beginsFile reports whether a file begins with a piece: files are in blocks of their
// own, the pieces of one follow each other. One of whole blocks looks like a part of
// that before it.
func (l *Layer) beginsFile(piece int) bool {
	if piece == 0 {
		return true
	}
	before := l.frames.Piece(piece - 1)
	return before.Data+before.Size != l.frames.Piece(piece).Data
}

// window is a read of several blocks that was answered, or refused.
type window struct {
	end     int64
	refused bool
}

// windows are the last of a layer.
type windows struct {
	mu   sync.Mutex
	last [32]window
	at   int
}

func (w *windows) add(one window) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.last[w.at] = one
	w.at = (w.at + 1) % len(w.last)
}

// forget is told that somebody wants what ends there, and so perhaps what follows.
func (w *windows) forget(end int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i := range w.last {
		if w.last[i].end == end {
			w.last[i] = window{}
		}
	}
}

// goesOn reports whether a read that begins there follows a window, and whether that
// was refused.
func (w *windows) goesOn(off int64) (goesOn, refused bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	i := slices.IndexFunc(w.last[:], func(o window) bool { return o.end == off && off > 0 })
	return i >= 0, i >= 0 && w.last[i].refused
}
