package zstdblocks

import "math/bits"

const (
	minRoom  = 128 << 10 // bytes that there is to be room for
	firstLen = 512 << 10
)

// history is a ring of the last bytes of the content.
type history struct {
	ring []byte
	at   int   // in ring, of the next byte
	out  int64 // offset in the content of the next byte
}

// room gives where the next bytes go, so that those from keep on stay. The ring
// grows up to limit for it, or a little more; beyond that nil is given.
func (h *history) room(keep, limit int64) []byte {
	if n := h.out - keep + minRoom; n > int64(len(h.ring)) {
		if n > limit {
			return nil
		}
		h.grow(h.out-keep, max(firstLen, min(limit, 2*n)))
	}
	if h.at == len(h.ring) {
		h.at = 0
	}
	return h.ring[h.at:min(len(h.ring), h.at+minRoom)]
}

// grow makes a ring of size bytes that has the last n.
func (h *history) grow(n, size int64) {
	ring := make([]byte, size)
	a, b := h.last(h.out-n, h.out)
	k := copy(ring, a)
	k += copy(ring[k:], b)
	h.ring, h.at = ring, k
}

// wrote is told how many bytes there are now in what room gave.
func (h *history) wrote(n int) {
	h.at += n
	h.out += int64(n)
}

// last gives the bytes between two offsets, in two parts.
func (h *history) last(from, to int64) (a, b []byte) {
	i, j := h.at-int(h.out-from), h.at-int(h.out-to)
	switch {
	case i >= 0:
		return h.ring[i:j], nil
	case j <= 0:
		return h.ring[i+len(h.ring) : j+len(h.ring)], nil
	}
	return h.ring[i+len(h.ring):], h.ring[:j]
}

// appendSparse appends as blocks what is before the point t in the frame that
// begins at begin, from the first byte on that is referred to, with zeroes for
// what is not. Behind the length of dst there are zeroes.
func (h *history) appendSparse(dst []byte, begin int64, t *trace, most int) []byte {
	marks := t.marks
	for at := t.base; len(marks) > 0; at += int64(most) {
		words := marks[:min(len(marks), most/64)]
		marks = marks[len(words):]
		n := int(min(int64(most), t.at-at))
		if !marked(words) {
			dst = appendBlock(dst, blockRLE, n, []byte{0})
			continue
		}
		dst = appendBlock(dst, blockRaw, n, nil)
		out := dst[len(dst) : len(dst)+n]
		dst = dst[:len(dst)+n]
		for i, m := range words {
			if m == 0 {
				continue
			}
			w := out[i*64 : min(n, i*64+64)]
			from := begin + at + int64(i)*64
			a, b := h.last(from, from+int64(len(w)))
			copy(w[copy(w, a):], b)
			for m = ^m; m != 0; m &= m - 1 {
				if k := bits.TrailingZeros64(m); k < len(w) {
					w[k] = 0
				}
			}
		}
	}
	return dst
}

// marked says whether there is a bit in marks.
func marked(marks []uint64) bool {
	for _, m := range marks {
		if m != 0 {
			return true
		}
	}
	return false
}
