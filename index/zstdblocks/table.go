package zstdblocks

import (
	"errors"
	"math/bits"
)

// The three fields of a sequence, in the order in which the header of the
// sequences names their tables (RFC 8878, 3.1.1.3.2.1).
const (
	literalLengths = iota
	offsets
	matchLengths
	fields
)

// Modes of a table in that header.
const (
	modePredefined = iota
	modeRLE
	modeFSE
	modeRepeat
)

const (
	minLog    = 5
	maxLog    = 9 // the RFC has 8 for offsets; decoders take 9
	maxStates = 1 << maxLog
)

var errTable = errors.New("a table's description is corrupt")

// state is what a table holds for a state: bits 0 to 7 how many bits lead to the
// next state, 8 to 15 how many are added to the base, 16 to 31 the first of the
// next states, 32 to 63 the base.
type state uint64

func (s state) nextBits() uint { return uint(s & 0xff) }
func (s state) addBits() uint  { return uint(s >> 8 & 0xff) }
func (s state) next() uint     { return uint(s >> 16 & 0xffff) }
func (s state) base() uint     { return uint(s >> 32) }

// described is a table as a block describes it.
type described struct {
	set     bool  // there is one in this frame
	mode    uint8 // predefined, RLE or FSE
	log     uint
	desc    []byte // as it stood in the block
	norm    [maxCodes]int16
	symbols int // of norm
}

// maxCodes is how many codes the field has that has most.
const maxCodes = 53

// copy makes d the same as e, but with bytes of its own.
func (d *described) copy(e *described) {
	desc := append(d.desc[:0], e.desc...)
	*d = *e
	d.desc = desc
}

// table decodes one field.
type table struct {
	described
	built  bool // states and codes are those of what is described
	states [maxStates]state
	codes  [maxStates]uint8 // of the states
}

// code is what a field's code stands for.
type code struct {
	base uint32
	bits uint8
}

// field is what the format fixes for a field.
type field struct {
	codes []code
	norm  []int16 // the predefined distribution
	log   uint    // and its logarithm
}

// formats holds the fields' constants (RFC 8878, 3.1.1.3.2.1.1 and 3.1.1.3.2.2).
var formats = [fields]field{
	literalLengths: {
		codes: lengths(0, 16, []uint8{1, 1, 1, 1, 2, 2, 3, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}),
		norm: []int16{4, 3, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3, 2, 1, 1, 1, 1, 1,
			-1, -1, -1, -1},
		log: 6,
	},
	offsets: {
		codes: powers(32),
		norm:  []int16{1, 1, 1, 1, 1, 1, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1},
		log:   5,
	},
	matchLengths: {
		codes: lengths(3, 32, []uint8{1, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}),
		norm: []int16{1, 4, 3, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
			1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1},
		log: 6,
	},
}

// lengths gives the codes of a length: plain ones of one value each, then those
// that add bits, each beginning where the one before it ends.
func lengths(first uint32, plain int, added []uint8) []code {
	var cs []code
	for range plain {
		cs = append(cs, code{base: first})
		first++
	}
	for _, b := range added {
		cs = append(cs, code{base: first, bits: b})
		first += 1 << b
	}
	return cs
}

// powers gives the codes of an offset: code n is 1<<n and n bits.
func powers(n int) []code {
	cs := make([]code, n)
	for i := range cs {
		cs[i] = code{base: 1 << i, bits: uint8(i)}
	}
	return cs
}

// predefine makes t the predefined table of field f.
func (t *table) predefine(f *field) {
	if t.set && t.mode == modePredefined {
		return
	}
	t.set, t.built, t.mode, t.log = true, false, modePredefined, f.log
	t.desc = t.desc[:0]
	t.symbols = copy(t.norm[:], f.norm)
}

// single makes t the table of one code.
func (t *table) single(c uint8, f *field) error {
	if int(c) >= len(f.codes) {
		return errTable
	}
	t.set, t.built, t.mode, t.log = true, false, modeRLE, 0
	t.desc = append(t.desc[:0], c)
	return nil
}

// read makes t the table described at the beginning of b and says how many bytes
// that took.
func (t *table) read(b []byte, f *field) (int, error) {
	clear(t.norm[:])
	n, symbols, log, err := readDistribution(b, t.norm[:len(f.codes)], maxLog)
	if err != nil {
		return 0, err
	}
	t.set, t.built, t.mode, t.log, t.symbols = true, false, modeFSE, log, symbols
	t.desc = append(t.desc[:0], b[:n]...)
	return n, nil
}

// build fills the states, unless that has been done.
func (t *table) build(f *field) error {
	if t.built {
		return nil
	}
	t.built = true
	if t.mode == modeRLE {
		c := t.desc[0]
		k := f.codes[c]
		t.codes[0], t.states[0] = c, state(k.bits)<<8|state(k.base)<<32
		return nil
	}
	norm := t.norm[:t.symbols]
	var next [256]uint16
	if err := spread(t.codes[:1<<t.log], norm, &next); err != nil {
		return err
	}
	size := uint(1) << t.log
	for i, c := range t.codes[:size] {
		x := uint(next[c])
		next[c]++
		n := t.log - uint(bits.Len(x)-1)
		k := f.codes[c]
		t.states[i] = state(n) | state(k.bits)<<8 | state(x<<n-size)<<16 | state(k.base)<<32
	}
	return nil
}

// spread deals the states out to the symbols (RFC 8878, 4.1.1). next[s] becomes
// the number of states that symbol s has.
func spread(symbols []uint8, norm []int16, next *[256]uint16) error {
	size := len(symbols)
	high := size - 1
	for s, n := range norm {
		if n == -1 {
			symbols[high] = uint8(s)
			high--
			next[s] = 1
		} else {
			next[s] = uint16(n)
		}
	}
	step, mask, at := size>>1+size>>3+3, size-1, 0
	for s, n := range norm {
		for range max(n, 0) {
			symbols[at] = uint8(s)
			at = (at + step) & mask
			for at > high {
				at = (at + step) & mask
			}
		}
	}
	if at != 0 {
		return errTable
	}
	return nil
}

// readDistribution reads the distribution at the beginning of b (RFC 8878, 4.1.1)
// and says how many bytes and symbols it has. Its sum is 1<<log.
func readDistribution(b []byte, norm []int16, most uint) (n, symbols int, log uint, err error) {
	at := uint(0) // in bits
	peek := func(n uint) uint {
		var v uint
		for i := range uint(4) {
			if k := at>>3 + i; k < uint(len(b)) {
				v |= uint(b[k]) << (8 * i)
			}
		}
		return v >> (at & 7) & (1<<n - 1)
	}
	log = peek(4) + minLog
	at += 4
	if log > most {
		return 0, 0, 0, errTable
	}
	remaining := 1 << log
	for remaining > 0 && symbols < len(norm) {
		n := uint(bits.Len(uint(remaining + 1)))
		v := int(peek(n))
		low := 1<<(n-1) - 1
		short := 1<<n - 1 - (remaining + 1) // values below it take a bit less
		if v&low < short {
			v &= low
			at += n - 1
		} else {
			at += n
			if v > low {
				v -= short
			}
		}
		v--
		norm[symbols] = int16(v)
		symbols++
		remaining -= max(v, -v)
		if v != 0 {
			continue
		}
		for {
			zeroes := int(peek(2))
			at += 2
			symbols += zeroes // norm is zero there
			if symbols > len(norm) {
				return 0, 0, 0, errTable
			}
			if zeroes < 3 {
				break
			}
		}
	}
	n = int(at+7) >> 3
	if remaining != 0 || n > len(b) || symbols < 2 {
		return 0, 0, 0, errTable
	}
	return n, symbols, log, nil
}
