package inflate

import "hash/crc32"

const (
	history    = 32 << 10 // how far back a match may lie, in bytes
	windowSize = 288 << 10
	slack      = 320 // what one turn of the fast loop may write, and a little
)

// window is the end of what is decompressed, in one piece.
type window struct {
	buf    []byte
	rd, wr int   // given up to, decompressed up to
	low    int   // where the member begins, or what is left of it
	base   int64 // offset in the decompressed blob of buf[0]
	summed int   // how far sum has come
	sum    uint32
}

// reset begins at an offset in the decompressed blob, with what lies before it.
func (w *window) reset(at int64, before []byte) {
	if w.buf == nil {
		w.buf = make([]byte, windowSize)
	}
	n := copy(w.buf, before)
	*w = window{buf: w.buf, rd: n, wr: n, summed: n, base: at - int64(n)}
}

// at is the offset in the decompressed blob of buf[i].
func (w *window) at(i int) int64 { return w.base + int64(i) }

// limit is where decompressing stops for want of room.
func (w *window) limit() int { return len(w.buf) - slack }

// slide makes room. It keeps what matches may reach, from the point at the offset
// oldest on if there is one.
func (w *window) slide(oldest int64) {
	w.add()
	from := w.wr
	if oldest >= 0 {
		from = min(from, int(oldest-w.base))
	}
	if from -= history; from <= 0 {
		return
	}
	copy(w.buf, w.buf[from:w.wr])
	w.base += int64(from)
	w.wr -= from
	w.rd, w.summed, w.low = w.wr, w.wr, max(w.low-from, 0)
}

// begin says that a member begins here.
func (w *window) begin() { w.low, w.summed, w.sum = w.wr, w.wr, 0 }

// add brings the sum up to date.
func (w *window) add() {
	w.sum = crc32.Update(w.sum, crc32.IEEETable, w.buf[w.summed:w.wr])
	w.summed = w.wr
}
