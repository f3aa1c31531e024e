// Package inflate reads gzip blobs faster than the general libraries do, and can
// stop at and start from any deflate block of them.
//
// It follows RFC 1951 and RFC 1952; which codes it refuses is as zlib decides.
package inflate

import (
	"fmt"
	"io"

	"github.com/varvefs/varve/index"
)

// Options say what a [Reader] does besides reading. The zero value makes no
// points.
type Options struct {
	// Want is asked at the beginning of every deflate block whether to make a
	// point there, unless one is made at this out already: with what In, Bits and
	// Out of the point would be. nil: never.
	Want func(in int64, bits uint8, out int64) bool
	// Point is given each point, in order, once its State is known: when at most
	// 32 KiB and one match behind it are decoded, or its member ends. The State is
	// the caller's. A point behind which nothing comes is not given. An error ends
	// the reading and is returned as it is.
	Point func(index.Point) error
}

// Reader decompresses a gzip blob: all its members, one after the other. Zeroes
// may follow the last, as gzip(1) allows; anything else is refused, since what
// readers that stop there see would not be what others see. Reserved flags of a
// header are ignored, as Go's own reader does.
//
// What is malformed gives [index.ErrMalformed], what is truncated
// [io.ErrUnexpectedEOF], an error of the reader below is given as it is; each
// after all that could be decompressed. It may read ahead.
type Reader struct {
	in     input
	out    window
	points points
	codes  codes

	next   state
	last   bool  // the block is its member's last
	stored int   // bytes of the stored block still to come
	begun  bool  // a member has ended
	whole  bool  // the member is read from its beginning
	first  int64 // offset in the decompressed blob of the member's first byte
	prime  uint8 // bits to take from the first byte
	err    error // why there is no more; io.EOF at the end
}

// state is what comes next in the blob.
type state uint8

const (
	header  state = iota // a member's
	block                // a block's header
	stored               // the rest of a stored block
	symbols              // the rest of a compressed block
	trailer              // a member's
)

// NewReader reads a whole gzip blob.
func NewReader(r io.Reader, o Options) *Reader {
	z := new(Reader)
	z.Reset(r, o)
	return z
}

// Resume reads a gzip blob from a point on, through all further members to the
// blob's end. r begins at p.Start. The sum of the member in which the point lies
// cannot be verified. p.State is not kept.
func Resume(r io.Reader, p index.Point) (*Reader, error) {
	z := new(Reader)
	if err := z.Resume(r, p); err != nil {
		return nil, err
	}
	return z, nil
}

// Reset makes z what [NewReader] gives, in the memory it has.
func (z *Reader) Reset(r io.Reader, o Options) {
	z.in.reset(r, 0)
	z.out.reset(0, nil)
	z.points.reset(o)
	*z = Reader{in: z.in, out: z.out, points: z.points, codes: z.codes, next: header}
}

// Resume makes z what the function of that name gives, in the memory it has.
func (z *Reader) Resume(r io.Reader, p index.Point) error {
	z.Reset(r, Options{})
	if p.Bits > 7 || p.Start() < 0 || p.Out < int64(len(p.State)) || len(p.State) > history {
		z.err = fmt.Errorf("%w: no point of a gzip blob: %d bits before %d, %d bytes of state before %d", index.ErrMalformed, p.Bits, p.In, len(p.State), p.Out)
		return z.err
	}
	z.in.reset(r, p.Start())
	z.out.reset(p.Out, p.State)
	z.next, z.prime, z.first = block, p.Bits, z.out.base
	return nil
}

// Read never gives bytes from both sides of a point in one call.
func (z *Reader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if !z.fill() {
		return 0, z.err
	}
	w := &z.out
	n := copy(p, w.buf[w.rd:z.points.cut(w.at(w.rd), w.at(w.wr))-w.base])
	w.rd += n
	return n, nil
}

// AtPoint says that the byte which the next Read gives first lies at a point: one
// that Want asked for. It is false where no byte follows, and may decompress to
// find out.
func (z *Reader) AtPoint() bool { return z.fill() && z.points.has(z.out.at(z.out.rd)) }

// InputOffset is the offset in the blob behind the last byte of which anything is
// decompressed; what Read has given may lie before it. At the end it is the size
// of the blob.
func (z *Reader) InputOffset() int64 { return z.in.offset() }

// fill sees to it that there is something to read, if there is.
func (z *Reader) fill() bool {
	for z.out.rd == z.out.wr {
		if z.err != nil {
			return false
		}
		z.decode()
	}
	return true
}

// decode goes on until the window is full, or until the reader below would have
// to be waited for while there is something to give. All that the window has was
// given.
func (z *Reader) decode() {
	if z.out.wr >= z.out.limit() {
		z.out.slide(z.points.oldest())
	}
	for z.err == nil && z.out.wr < z.out.limit() {
		if z.in.low() {
			if z.out.wr > z.out.rd {
				return
			}
			z.in.more()
		}
		z.err = z.step()
	}
}

func (z *Reader) step() error {
	switch z.next {
	case header:
		return z.header()
	case block:
		return z.block()
	case stored:
		z.raw()
		if z.stored > 0 && z.in.pos == z.in.end && z.in.err != nil {
			return z.in.short()
		}
		if z.stored == 0 {
			z.endBlock()
		}
	case symbols:
		end, err := z.symbols()
		if err != nil {
			return err
		}
		if end {
			z.endBlock()
		}
	case trailer:
		return z.trailer()
	}
	return z.points.settle(&z.out, z.out.at(z.out.wr)-history)
}

func (z *Reader) endBlock() {
	z.next = block
	if z.last {
		z.next = trailer
	}
}
