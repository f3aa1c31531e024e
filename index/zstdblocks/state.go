package zstdblocks

import (
	"bytes"
	"encoding/binary"
	"math/bits"
)

// prelude is what blocks say of the tables and repeat offsets in force: blocks
// that, put before others, make a decoder take these up. It owns its bytes.
type prelude struct {
	tree   []byte         // Huffman's; empty if there is none
	modes  [fields]uint8  // of the tables
	descs  [fields][]byte // of the tables
	logs   [fields]uint   // of the tables
	first  [fields]uint   // a state of each that gives the code
	codes  [fields]uint8  // of the last sequence
	tables bool           // there are tables
	reps   [3]uint32
}

// prelude gives what is in force now.
func (t *tracer) prelude() prelude {
	p := prelude{tree: bytes.Clone(t.tree), codes: t.last, reps: t.reps, tables: t.tables[0].set}
	for i := range t.tables {
		k := &t.tables[i]
		p.modes[i], p.logs[i], p.descs[i] = k.mode, k.log, bytes.Clone(k.desc)
		if p.tables {
			p.first[i] = uint(max(0, bytes.IndexByte(k.codes[:1<<k.log], t.last[i])))
		}
	}
	return p
}

// makeState makes the State of the point t, which it uses up, in the frame f that
// begins at begin: the beginning of a frame which leaves a decoder as the point
// does. What of the window is referred to is at its end; what must come before it
// is of no interest to anybody.
//
//	frame header  as large a window, or a little larger; the same flag for a checksum
//	zeroes        as many as the repeat offsets need to be valid
//	a literal     with the Huffman tree
//	a sequence    for each repeat offset that the next one does not make, in RLE mode
//	a sequence    with the tables, such that all repeat offsets are right behind it
//	the window    with zeroes for what is not referred to
//
// Blocks that are neither literals nor sequences leave tables and repeat offsets
// alone, so the window can come last.
func makeState(h *history, f frame, begin int64, t *trace) ([]byte, error) {
	p := &t.prelude
	most := int(min(f.window, maxBlock)) &^ 63
	for len(t.marks) > 0 && t.marks[0] == 0 {
		t.marks = t.marks[1:]
		t.base += 64
	}
	dst := make([]byte, 0, stateRoom(t, p, most))
	dst = append(dst, frameMagic...)
	flags := byte(0)
	if f.checksum {
		flags = flagChecksum
	}
	dst = append(dst, flags, windowByte(f.window))
	if p.tables {
		for n := int(max(p.reps[0], p.reps[1], p.reps[2])); n > 0; n -= most {
			dst = appendBlock(dst, blockRLE, min(n, most), []byte{0})
		}
	}
	if len(p.tree) > 0 {
		n, err := longestCode(p.tree)
		if err != nil {
			return nil, err
		}
		// The code of the longest is all zeroes; above it stands the bit that
		// ends the stream.
		stream := binary.LittleEndian.AppendUint16(nil, 1<<n)
		if n < 8 {
			stream = stream[:1]
		}
		size := uint32(len(p.tree) + len(stream))
		b := []byte{literalsHuffman | 1<<4, byte(size << 6), byte(size >> 2)}
		b = append(append(append(b, p.tree...), stream...), 0)
		dst = appendBlock(dst, blockCompressed, len(b), b)
	}
	if p.tables {
		for _, r := range p.before() {
			dst = appendRepeat(dst, r)
		}
		dst = p.appendTables(dst)
	}
	return h.appendSparse(dst, begin, t, most), nil
}

// stateRoom is the most bytes that a State can have.
func stateRoom(t *trace, p *prelude, most int) int {
	n := 256 + len(p.tree) + (blockHeader+1)*(len(t.marks)*64/most)
	for _, d := range p.descs {
		n += len(d)
	}
	if p.tables {
		n += (blockHeader + 1) * (int(max(p.reps[0], p.reps[1], p.reps[2]))/most + 1)
	}
	for m := t.marks; len(m) > 0; m = m[min(len(m), most/64):] {
		if marked(m[:min(len(m), most/64)]) {
			n += most
		}
	}
	return n
}

// before gives the offsets to make in turn before the sequence with the tables.
// That has the codes of the frame's last sequence, hence with one literal length
// and one offset code the offset of that which is first now.
func (p *prelude) before() [3]uint32 {
	r0, r1, r2 := p.reps[0], p.reps[1], p.reps[2]
	switch none := p.codes[literalLengths] == 0; {
	case p.codes[offsets] > 1: // a new offset, which is r0
		return [3]uint32{r2, r2, r1}
	case p.codes[offsets] == 0 && !none: // the first again
		return [3]uint32{r2, r1, r0}
	case p.codes[offsets] == 1 && none: // the third, which becomes the first
		return [3]uint32{r0, r2, r1}
	default: // the second, which becomes the first
		return [3]uint32{r2, r0, r1}
	}
}

// appendTables appends the block of the sequence with the tables.
func (p *prelude) appendTables(dst []byte) []byte {
	literal := int(formats[literalLengths].codes[p.codes[literalLengths]].base)
	b := []byte{literalsRLE | 3<<2 | byte(literal<<4), byte(literal >> 4), byte(literal >> 12), 0, 1}
	b = append(b, p.modes[0]<<6|p.modes[1]<<4|p.modes[2]<<2)
	for _, d := range p.descs {
		b = append(b, d...)
	}
	// The bits are read from the end to the beginning: the states, then what is
	// added to the offset and to the lengths.
	var w bitWriter
	w.add(0, formats[literalLengths].codes[p.codes[literalLengths]].bits)
	w.add(0, formats[matchLengths].codes[p.codes[matchLengths]].bits)
	w.add(p.added(), formats[offsets].codes[p.codes[offsets]].bits)
	for _, f := range [fields]int{matchLengths, offsets, literalLengths} {
		w.add(p.first[f], uint8(p.logs[f]))
	}
	b = w.end(b)
	return appendBlock(dst, blockCompressed, len(b), b)
}

// added is what the sequence with the tables adds to the base of its offset.
func (p *prelude) added() uint {
	c := p.codes[offsets]
	if c <= 1 {
		return 0
	}
	return uint(p.reps[0]+3) - uint(formats[offsets].codes[c].base)
}

// appendRepeat appends the block of one sequence, three bytes from the given
// offset, with tables of one code each.
func appendRepeat(dst []byte, offset uint32) []byte {
	v := uint(offset) + 3
	c := uint8(bits.Len(v) - 1)
	b := []byte{literalsRaw, 1, modeRLE<<6 | modeRLE<<4 | modeRLE<<2, 0, c, 0}
	var w bitWriter
	w.add(v-1<<c, c)
	b = w.end(b)
	return appendBlock(dst, blockCompressed, len(b), b)
}

// appendBlock appends a block of what follows its header; size is of that, and of
// what it regenerates in an RLE block.
func appendBlock(dst []byte, kind uint8, size int, b []byte) []byte {
	h := uint32(size)<<3 | uint32(kind)<<1
	return append(append(dst, byte(h), byte(h>>8), byte(h>>16)), b...)
}

// bitWriter writes a bit stream that is read backwards.
type bitWriter struct {
	b []byte
	n uint // bits
}

func (w *bitWriter) add(v uint, n uint8) {
	for i := range n {
		if w.n&7 == 0 {
			w.b = append(w.b, 0)
		}
		w.b[w.n>>3] |= byte(v>>i&1) << (w.n & 7)
		w.n++
	}
}

// end appends the stream with the bit that says where it begins.
func (w *bitWriter) end(dst []byte) []byte {
	w.add(1, 1)
	return append(dst, w.b...)
}
