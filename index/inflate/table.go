package inflate

import (
	"math/bits"
	"sync"
)

// A table is looked up by the next bits of the input, as many as its first part
// has. An entry is, from the low end: bits to take, 8; the code's length, 4; flags,
// 4; a value, 16. The bits to take are those of the code and the extra bits behind
// it, so a length or a distance is its value and the bits between. For a longer
// code the entry has where its own part of the table begins, that part's bits in
// place of the code's length, and the first part's bits to take.
const (
	takeBits   = 1<<6 - 1 // never more than 28, and a shift by it needs no check
	codeShift  = 8
	codeBits   = 15
	valueShift = 16

	endBlock = 1 << 12
	further  = 1 << 13 // goes on in another part
	special  = 1 << 15 // endBlock, further, or a code that has no meaning
	literal  = 1 << 31
)

const (
	maxCode = 15 // bits

	litBits  = 11
	litSyms  = 288
	litSize  = 4096 // the parts of a complete code take 2342 at most
	distBits = 9
	distSyms = 32
	distSize = 1024 // of 30 symbols, fewer than 592
	lenBits  = 7
	lenSyms  = 19
)

type (
	litTable  [litSize]uint32
	distTable [distSize]uint32
)

// fixed are the tables of blocks with the codes of RFC 1951, 3.2.6.
var fixed = sync.OnceValue(func() *tables {
	var lens [litSyms]uint8
	for i := range lens {
		switch {
		case i < 144:
			lens[i] = 8
		case i < 256:
			lens[i] = 9
		case i < 280:
			lens[i] = 7
		default:
			lens[i] = 8
		}
	}
	t := new(tables)
	build(t.lit[:], litBits, lens[:], litEntry)
	for i := range distSyms {
		lens[i] = 5
	}
	build(t.dist[:], distBits, lens[:distSyms], distEntry)
	return t
})

type tables struct {
	lit  litTable
	dist distTable
}

// litEntry is the entry of a literal or length without its code's length.
func litEntry(sym int) uint32 {
	switch {
	case sym < 256:
		return literal | uint32(sym)<<valueShift
	case sym == 256:
		return special | endBlock
	case sym < 265:
		return uint32(sym-257+3) << valueShift
	case sym < 285:
		extra := uint32(sym-261) / 4
		return (3+(4+uint32(sym-261)%4)<<extra)<<valueShift | extra
	case sym == 285:
		return 258 << valueShift
	}
	return special
}

func distEntry(sym int) uint32 {
	switch {
	case sym < 4:
		return uint32(sym+1) << valueShift
	case sym < 30:
		extra := uint32(sym-2) / 2
		return (1+(2+uint32(sym)%2)<<extra)<<valueShift | extra
	}
	return special
}

func lenEntry(sym int) uint32 { return uint32(sym) << valueShift }

// build makes the table of a canonical code from the lengths of its symbols' codes
// and reports whether it is one. As zlib has it, a code may be incomplete only if
// it is a single one of one bit, or empty.
func build(table []uint32, first uint, lens []uint8, entry func(int) uint32) bool {
	var count [maxCode + 1]int
	for _, n := range lens {
		count[n]++
	}
	used := len(lens) - count[0]
	var from [maxCode + 2]int // where the symbols of each length begin in sorted
	left := 1
	longest := 0
	for n := 1; n <= maxCode; n++ {
		left = left<<1 - count[n]
		if left < 0 {
			return false
		}
		if count[n] > 0 {
			longest = n
		}
		from[n+1] = from[n] + count[n]
	}
	if left > 0 {
		if longest > 1 {
			return false
		}
		// What no code stands for takes a bit, so that it is not mistaken for what is
		// missing where the input ends.
		for i := range table[:1<<first] {
			table[i] = special | 1
		}
		if used == 0 {
			return true
		}
	}
	var sorted [litSyms]uint16
	for sym, n := range lens {
		if n > 0 {
			sorted[from[n]] = uint16(sym)
			from[n]++
		}
	}
	if left > 0 {
		e := entry(int(sorted[0])) + 1 + 1<<codeShift
		for i := 0; i < 1<<first; i += 2 {
			table[i] = e
		}
		return true
	}

	// Codes come in order, their bits reversed, as the input has them. The part of
	// the table that the lengths so far fill is doubled with each longer one.
	rev, i := uint(0), 0
	size := 1
	for n := 1; n <= int(first) && n <= longest; n++ {
		if size < 1<<n && n > 1 {
			copy(table[size:2*size], table[:size])
		}
		size = 1 << n
		for range count[n] {
			table[rev] = entry(int(sorted[i])) + uint32(n)*(1+1<<codeShift)
			rev = next(rev, n)
			i++
		}
	}
	for ; size < 1<<first; size *= 2 {
		copy(table[size:2*size], table[:size])
	}

	end, part, shift := 1<<first, -1, 0 // the part being filled: its first bits, its size
	start := 0
	mask := uint(1)<<first - 1
	for n := int(first) + 1; n <= longest; n++ {
		for ; count[n] > 0; count[n]-- {
			if int(rev&mask) != part {
				part, start, shift = int(rev&mask), end, n-int(first)
				for room := 1<<shift - count[n]; room > 0; {
					shift++
					room = room<<1 - count[int(first)+shift]
				}
				end += 1 << shift
				if end > len(table) {
					return false // cannot be: see litSize
				}
				table[part] = uint32(start)<<valueShift | special | further | uint32(shift)<<codeShift | uint32(first)
			}
			e := entry(int(sorted[i])) + uint32(n-int(first))*(1+1<<codeShift)
			for k := int(rev >> first); k < 1<<shift; k += 1 << (n - int(first)) {
				table[start+k] = e
			}
			rev = next(rev, n)
			i++
		}
	}
	return true
}

// next is the code of n bits that comes after one, both reversed.
func next(rev uint, n int) uint {
	free := ^rev & (1<<n - 1)
	if free == 0 {
		return 0
	}
	top := uint(1) << (bits.Len(free) - 1)
	return rev&(top-1) | top
}
