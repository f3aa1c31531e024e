package fetch

import (
	"math/bits"
	"sync"
)

// buffers are what frames and pieces pass through. Clearing new memory for each
// would cost a tenth of the CPU of a start.
var buffers [32]sync.Pool // by the logarithm of their size

const leastBuffer = 16 // the logarithm of the smallest

func bufferClass(n int64) int { return max(bits.Len64(uint64(max(n, 1)-1)), leastBuffer) }

// bufferSize is how much memory a buffer of n bytes takes.
func bufferSize(n int64) int64 {
	if class := bufferClass(n); class < len(buffers) {
		return 1 << class
	}
	return n
}

// buffer gives n bytes of memory that hold anything. The caller gives it back.
func buffer(n int64) *[]byte {
	class := bufferClass(n)
	if class >= len(buffers) {
		b := make([]byte, n)
		return &b
	}
	b, ok := buffers[class].Get().(*[]byte)
	if !ok {
		fresh := make([]byte, 1<<class)
		b = &fresh
	}
	*b = (*b)[:n]
	return b
}

// giveBack lets others use a buffer.
func giveBack(b *[]byte) {
	if class := bits.Len(uint(cap(*b))) - 1; class < len(buffers) && cap(*b) == 1<<class {
		buffers[class].Put(b)
	}
}
