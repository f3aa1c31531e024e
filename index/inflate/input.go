package inflate

import (
	"encoding/binary"
	"io"
)

const (
	inputSize = 64 << 10
	ahead     = 16 // bytes that one turn of the fast loop may look at
	noBytes   = 100
)

// input is the blob as bytes and as bits. The whole bytes in bits always lie just
// before pos in buf.
type input struct {
	r        io.Reader
	buf      []byte
	pos, end int
	base     int64 // offset in the blob of buf[0]
	bits     uint64
	n        uint  // how many bits are in bits, at the low end; the others are 0
	err      error // what r ended with
}

func (in *input) reset(r io.Reader, at int64) {
	if in.buf == nil {
		in.buf = make([]byte, inputSize)
	}
	*in = input{r: r, buf: in.buf, base: at}
}

// low says that more would have to be read for the fast loop, and that there may
// be more.
func (in *input) low() bool { return in.end-in.pos < ahead && in.err == nil }

// offset is that of the first byte in the blob of which nothing is taken.
func (in *input) offset() int64 { return in.base + int64(in.pos) - int64(in.n>>3) }

// whole puts whole bytes back from bits.
func (in *input) whole() {
	in.pos -= int(in.n >> 3)
	in.n &= 7
	in.bits &= 1<<in.n - 1
}

// align drops the bits up to the next byte and puts the others back.
func (in *input) align() {
	in.whole()
	in.bits, in.n = 0, 0
}

// more reads until there are enough bytes for the fast loop, or no more.
func (in *input) more() {
	in.whole()
	in.base += int64(in.pos)
	in.end = copy(in.buf, in.buf[in.pos:in.end])
	in.pos = 0
	for idle := 0; in.low(); {
		n, err := in.r.Read(in.buf[in.end:])
		in.end += n
		in.err = err
		if n > 0 {
			idle = 0
		} else if idle++; idle == noBytes && err == nil {
			in.err = io.ErrNoProgress
		}
	}
}

// short is the error for what is needed and missing.
func (in *input) short() error {
	if in.err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return in.err
}

// refill makes n at least 48, unless the input ends before.
func (in *input) refill() {
	if in.n >= 48 {
		return
	}
	if in.low() {
		in.more()
	}
	if in.end-in.pos >= 8 {
		v := binary.LittleEndian.Uint64(in.buf[in.pos:])
		k := (63 - in.n) >> 3
		in.bits |= v << in.n
		in.n += k * 8
		in.bits &= 1<<in.n - 1
		in.pos += int(k)
		return
	}
	for ; in.n <= 56 && in.pos < in.end; in.pos++ {
		in.bits |= uint64(in.buf[in.pos]) << in.n
		in.n += 8
	}
}

// take gives the next n bits, at most 32.
func (in *input) take(n uint) (uint32, error) {
	if in.n < n {
		if in.refill(); in.n < n {
			return 0, in.short()
		}
	}
	v := uint32(in.bits & (1<<n - 1))
	in.drop(n)
	return v, nil
}

func (in *input) drop(n uint) {
	in.bits >>= n
	in.n -= n
}

// byte gives the next byte where bits is empty; io.EOF at the end.
func (in *input) byte() (byte, error) {
	if in.pos == in.end {
		if in.err == nil {
			in.more()
		}
		if in.pos == in.end {
			return 0, in.err
		}
	}
	in.pos++
	return in.buf[in.pos-1], nil
}
