package inflate

import "encoding/binary"

// What is wrong with what the loops read.
const (
	badSymbol   = "an unknown code for a symbol"
	badDistance = "a distance too far back"
)

// symbols decompresses a block's symbols until it ends, or the window is full, or
// more input must be read, or a point can be settled.
func (z *Reader) symbols() (end bool, err error) {
	limit := z.out.limit()
	low := z.out.low // matches from before this are looked at more closely
	if at := z.points.oldest(); at >= 0 {
		limit = min(limit, int(at+history-z.out.base))
		low = max(low, int(z.points.last-z.out.base))
	}
	if z.in.end-z.in.pos >= ahead {
		return z.fast(limit, low)
	}
	return z.careful(limit, low)
}

// fast goes on while ahead bytes of the input are there.
func (z *Reader) fast(limit, low int) (end bool, err error) {
	var (
		lit  = z.codes.lit
		dist = z.codes.dist
		buf  = z.in.buf[:z.in.end]
		out  = z.out.buf
		pos  = z.in.pos
		bb   = z.in.bits
		n    = z.in.n
		wr   = z.out.wr

		wrong string
	)
	for pos <= len(buf)-ahead && wr < limit {
		// More than the buffer has room for is left in the high bits and comes again.
		bb |= binary.LittleEndian.Uint64(buf[pos:]) << (n & 63)
		pos += int((63 - n) >> 3)
		n |= 56

		e := lit[bb&(1<<litBits-1)]
		if e&literal != 0 {
			bb >>= e & takeBits
			n -= uint(e & takeBits)
			out[wr] = byte(e >> valueShift)
			wr++
			e = lit[bb&(1<<litBits-1)]
			if e&literal != 0 {
				bb >>= e & takeBits
				n -= uint(e & takeBits)
				out[wr] = byte(e >> valueShift)
				wr++
				e = lit[bb&(1<<litBits-1)]
				if e&literal != 0 {
					bb >>= e & takeBits
					n -= uint(e & takeBits)
					out[wr] = byte(e >> valueShift)
					wr++
					continue
				}
			}
		}
		if e&special != 0 {
			if e&further != 0 {
				bb >>= litBits
				n -= litBits
				e = lit[(e>>valueShift+uint32(bb)&(1<<(e>>codeShift&codeBits)-1))&(litSize-1)]
				if e&literal != 0 {
					bb >>= e & takeBits
					n -= uint(e & takeBits)
					out[wr] = byte(e >> valueShift)
					wr++
					continue
				}
			}
			if e&special != 0 {
				bb >>= e & takeBits
				n -= uint(e & takeBits)
				end = e&endBlock != 0
				if !end {
					wrong = badSymbol
				}
				break
			}
		}
		length := int(e>>valueShift + uint32(bb&(1<<(e&takeBits)-1)>>(e>>codeShift&codeBits)))
		bb >>= e & takeBits
		n -= uint(e & takeBits)

		bb |= binary.LittleEndian.Uint64(buf[pos:]) << (n & 63)
		pos += int((63 - n) >> 3)
		n |= 56
		e = dist[bb&(1<<distBits-1)]
		if e&special != 0 {
			if e&further != 0 {
				bb >>= distBits
				n -= distBits
				e = dist[(e>>valueShift+uint32(bb)&(1<<(e>>codeShift&codeBits)-1))&(distSize-1)]
			}
			if e&special != 0 {
				wrong = badSymbol
				break
			}
		}
		d := int(e>>valueShift + uint32(bb&(1<<(e&takeBits)-1)>>(e>>codeShift&codeBits)))
		bb >>= e & takeBits
		n -= uint(e & takeBits)

		from := wr - d
		if from < low {
			if from < z.out.low {
				wrong = badDistance
				break
			}
			z.points.mark(&z.out, from, length, wr)
		}
		if d >= 16 {
			*(*[16]byte)(out[wr:]) = *(*[16]byte)(out[from:])
			for i := 16; i < length; i += 16 {
				*(*[16]byte)(out[wr+i:]) = *(*[16]byte)(out[from+i:])
			}
		} else {
			match(out, wr, d, length)
		}
		wr += length
	}
	z.in.pos, z.in.n, z.in.bits = pos, n, bb&(1<<(n&63)-1)
	z.out.wr = wr
	if wrong != "" {
		err = z.malformed(wrong)
	}
	return end, err
}

// match copies n bytes to out[wr] from d before it. It may write a few more.
func match(out []byte, wr, d, n int) {
	le := binary.LittleEndian
	if d >= 8 {
		for i := 0; i < n; i += 8 {
			le.PutUint64(out[wr+i:], le.Uint64(out[wr-d+i:]))
		}
		return
	}
	for i := range n {
		out[wr+i] = out[wr-d+i]
	}
}

// careful goes on one symbol at a time, up to the input's last bit.
func (z *Reader) careful(limit, low int) (end bool, err error) {
	in, w := &z.in, &z.out
	for w.wr < limit {
		in.refill()
		e, err := lookup(in, z.codes.lit[:], litBits)
		if err != nil {
			return false, err
		}
		if e&literal != 0 {
			in.drop(uint(e & takeBits))
			w.buf[w.wr] = byte(e >> valueShift)
			w.wr++
			continue
		}
		if e&special != 0 {
			in.drop(uint(e & takeBits))
			if e&endBlock == 0 {
				return false, z.malformed(badSymbol)
			}
			return true, nil
		}
		length := value(in, e)
		if e, err = lookup(in, z.codes.dist[:], distBits); err != nil {
			return false, err
		}
		if e&special != 0 {
			return false, z.malformed(badSymbol)
		}
		d := value(in, e)
		from := w.wr - d
		if from < low {
			if from < w.low {
				return false, z.malformed(badDistance)
			}
			z.points.mark(w, from, length, w.wr)
		}
		match(w.buf, w.wr, d, length)
		w.wr += length
	}
	return false, nil
}

// lookup gives the entry of the next code, whose bits are all there.
func lookup(in *input, table []uint32, first uint) (uint32, error) {
	e := table[in.bits&(1<<first-1)]
	if e&further != 0 && e&literal == 0 {
		if in.n < first {
			return 0, in.short()
		}
		in.drop(first)
		e = table[e>>valueShift+uint32(in.bits)&(1<<(e>>codeShift&codeBits)-1)]
	}
	if in.n < uint(e&takeBits) {
		return 0, in.short()
	}
	return e, nil
}

// value takes an entry's length or distance.
func value(in *input, e uint32) int {
	take := uint(e & takeBits)
	v := int(e>>valueShift) + int(in.bits&(1<<take-1)>>(e>>codeShift&codeBits))
	in.drop(take)
	return v
}
