package fetch

import "github.com/varvefs/varve/index"

// HoldFirst is Hold for a read of which only the first block is known to be wanted,
// and the rest may be what a kernel reads ahead: nothing is fetched for that. all says
// whether [off, off+n) is held; if not, and there is no error, nothing is, and who
// really wants the rest is to ask for it by itself.
//
// What is held counts as asked for up to where other frames begin. A recording that
// is to miss nothing has none of those held: what a kernel has got it does not ask for
// again.
func (l *Layer) HoldFirst(off, n int64) (all bool, err error) {
	own, rest := l.own(off, n)
	if own < n && (!rest || l.recordings.exact()) {
		return false, nil
	}
	if err := l.Hold(off, own); err != nil {
		return false, err
	}
	if own < n && !l.has(off+own, n-own) { // dropped meanwhile
		l.Release()
		return false, nil
	}
	return true, nil
}

// own gives how much of [off, off+n) the frames of its first block hold, and whether
// the rest is here.
func (l *Layer) own(off, n int64) (own int64, rest bool) {
	l.life.RLock()
	defer l.life.RUnlock()
	if l.closed.Load() {
		return n, true // Hold says so
	}
	from, first := l.frames.PiecesIn(off, min(n, index.BlockSize))
	_, to := l.frames.PiecesIn(off, n)
	for i := first; i < to; i++ {
		f, same := l.frames.FrameOf(i), false
		for k := from; k < first && !same; k++ {
			same = l.frames.FrameOf(k) == f
		}
		if !same {
			own = l.frames.Piece(i).Data/index.BlockSize*index.BlockSize - off
			return own, l.has(off+own, n-own)
		}
	}
	return n, true
}
