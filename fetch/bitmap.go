package fetch

import "sync/atomic"

// bitmap is a set of small numbers that many may change at once.
type bitmap []atomic.Uint64

func newBitmap(n int) bitmap { return make(bitmap, (n+63)/64) }

func (b bitmap) has(i int) bool { return b[i/64].Load()>>(i%64)&1 == 1 }

// add reports whether i was not in the set before.
func (b bitmap) add(i int) bool {
	bit := uint64(1) << (i % 64)
	return b[i/64].Load()&bit == 0 && b[i/64].Or(bit)&bit == 0
}

// remove reports whether i was in the set before.
func (b bitmap) remove(i int) bool {
	bit := uint64(1) << (i % 64)
	return b[i/64].Load()&bit != 0 && b[i/64].And(^bit)&bit != 0
}
