package inflate

import (
	"fmt"

	"github.com/varvefs/varve/index"
)

// codes are those of the block that is being read.
type codes struct {
	lit  *litTable
	dist *distTable
	own  *tables // of blocks that bring their codes
}

// order is that in which the lengths of the code for lengths come.
var order = [lenSyms]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}

// malformed is an error at what is being read.
func (z *Reader) malformed(what string) error {
	return fmt.Errorf("%w: deflate at %d: %s", index.ErrMalformed, z.in.offset(), what)
}

// block reads a block's header.
func (z *Reader) block() error {
	if z.prime > 0 {
		c, err := z.in.byte()
		if err != nil {
			return z.in.short()
		}
		z.in.bits, z.in.n, z.prime = uint64(c>>(8-z.prime)), uint(z.prime), 0
	}
	z.points.ask(&z.in, z.out.at(z.out.wr))
	h, err := z.in.take(3)
	if err != nil {
		return err
	}
	z.last = h&1 != 0
	switch h >> 1 {
	case 0:
		return z.storedHeader()
	case 1:
		t := fixed()
		z.codes.lit, z.codes.dist = &t.lit, &t.dist
	case 2:
		if err := z.dynamic(); err != nil {
			return err
		}
	default:
		return z.malformed("a block of type 3")
	}
	z.next = symbols
	return nil
}

func (z *Reader) storedHeader() error {
	z.in.drop(z.in.n & 7)
	v, err := z.in.take(32)
	if err != nil {
		return err
	}
	if v&0xffff != ^v>>16 {
		return z.malformed("a stored block's length does not match its complement")
	}
	z.in.align()
	z.stored, z.next = int(v&0xffff), stored
	return nil
}

// raw gives of a stored block what is there and has room.
func (z *Reader) raw() {
	w, in := &z.out, &z.in
	n := copy(w.buf[w.wr:w.limit()], in.buf[in.pos:min(in.end, in.pos+z.stored)])
	w.wr += n
	in.pos += n
	z.stored -= n
}

// dynamic reads the codes that a block brings.
func (z *Reader) dynamic() error {
	if z.codes.own == nil {
		z.codes.own = new(tables)
	}
	t := z.codes.own
	h, err := z.in.take(14)
	if err != nil {
		return err
	}
	nlit, ndist, nlen := int(h&31)+257, int(h>>5&31)+1, int(h>>10)+4
	if nlit > 286 || ndist > 30 {
		return z.malformed("too many codes")
	}
	var lens [litSyms + distSyms]uint8
	for _, at := range order[:nlen] {
		n, err := z.in.take(3)
		if err != nil {
			return err
		}
		lens[at] = uint8(n)
	}
	// The table is only needed until that of the distances is built.
	if !build(t.dist[:], lenBits, lens[:lenSyms], lenEntry) {
		return z.malformed("the code for lengths is not one")
	}
	clear(lens[:lenSyms])
	if err := z.lengths(lens[:nlit+ndist], t.dist[:1<<lenBits]); err != nil {
		return err
	}
	if lens[256] == 0 {
		return z.malformed("no code ends the block")
	}
	if !build(t.lit[:], litBits, lens[:nlit], litEntry) {
		return z.malformed("the code for literals and lengths is not one")
	}
	if !build(t.dist[:], distBits, lens[nlit:nlit+ndist], distEntry) {
		return z.malformed("the code for distances is not one")
	}
	z.codes.lit, z.codes.dist = &t.lit, &t.dist
	return nil
}

// lengths reads the lengths of both codes, the one behind the other.
func (z *Reader) lengths(lens []uint8, table []uint32) error {
	in := &z.in
	for i := 0; i < len(lens); {
		if in.n < lenBits+7 {
			in.refill()
		}
		e := table[in.bits&(1<<lenBits-1)]
		if n := uint(e & takeBits); n > in.n {
			return in.short()
		} else {
			in.drop(n)
		}
		if e&special != 0 {
			return z.malformed("an unknown code for a length")
		}
		sym := e >> valueShift
		if sym < 16 {
			lens[i] = uint8(sym)
			i++
			continue
		}
		var n uint32
		var err error
		var again uint8
		switch sym {
		case 16:
			if i == 0 {
				return z.malformed("no length to repeat")
			}
			again = lens[i-1]
			n, err = in.take(2)
			n += 3
		case 17:
			n, err = in.take(3)
			n += 3
		default:
			n, err = in.take(7)
			n += 11
		}
		if err != nil {
			return err
		}
		if int(n) > len(lens)-i {
			return z.malformed("too many lengths")
		}
		for range n {
			lens[i] = again
			i++
		}
	}
	return nil
}
