package zstdblocks

import (
	"encoding/binary"
	"math/bits"
)

// tracer follows the blocks of a frame without regenerating it: which tables and
// repeat offsets are in force, and which bytes before the last point the
// sequences behind it refer to. Offsets are counted from the frame's beginning.
//
// Where nothing is to be marked, a window behind the last point and more, it skims:
// tables are read, not built, and sequences are left alone. Blocks are held so
// that the repeat offsets can be found out when they are needed, for which the
// last block alone is nearly always enough.
type tracer struct {
	window int64
	pos    int64 // where the blocks so far end; not known while it skims
	tree   []byte
	tables [fields]table
	reps   [3]uint32     // 0: not known
	last   [fields]uint8 // codes of the last sequence

	held  []*block // skimmed
	known known    // before them
	free  chan<- *block

	point  int64    // the last point, or beforeAll
	marks  []uint64 // a bit for each byte from base on
	base   int64
	points []*trace // whose marks are not complete
}

// known is all that is in force at a block but the window.
type known struct {
	tree   []byte
	tables [fields]described
	reps   [3]uint32
	last   [fields]uint8
}

// skimmed is how many blocks are held at most: of so many one is traced.
const skimmed = 16

const beforeAll = -1 << 62

// trace is what the tracer knows of a point.
type trace struct {
	at      int64 // offset in the frame
	prelude prelude
	base    int64    // a multiple of 64
	marks   []uint64 // bit i: the byte at base+i is referred to behind the point
	err     error    // why tracing ended
}

// reset begins a frame.
func (t *tracer) reset(window int64) {
	t.drop()
	t.window, t.pos, t.tree = window, 0, t.tree[:0]
	t.reps = [3]uint32{1, 4, 8}
	for i := range t.tables {
		t.tables[i].set = false
	}
	t.point, t.marks, t.points = beforeAll, nil, nil
	t.know()
}

// drop gives back the blocks that are held.
func (t *tracer) drop() {
	for _, b := range t.held {
		t.free <- b
	}
	t.held = t.held[:0]
}

// know keeps what is in force.
func (t *tracer) know() {
	k := &t.known
	k.tree = append(k.tree[:0], t.tree...)
	for i := range t.tables {
		k.tables[i].copy(&t.tables[i].described)
	}
	k.reps, k.last = t.reps, t.last
}

// block follows the next block, which belongs to the tracer.
func (t *tracer) block(b *block) error {
	if len(t.points) > 0 {
		err := t.trace(b)
		t.free <- b
		return err
	}
	t.held = append(t.held, b)
	if len(t.held) == skimmed {
		return t.settle()
	}
	_, err := t.skim(b)
	return err
}

// settle finds out what is in force behind the blocks that are held.
func (t *tracer) settle() error {
	if len(t.held) == 0 {
		return nil
	}
	const far = 1 << 60 // no offset reaches before the frame
	t.pos, t.reps = far, [3]uint32{}
	newest := t.held[len(t.held)-1]
	if err := t.trace(newest); err != nil {
		return err
	}
	if t.unknown() {
		k := &t.known
		t.tree = append(t.tree[:0], k.tree...)
		for i := range t.tables {
			t.tables[i].copy(&k.tables[i])
			t.tables[i].built = false
		}
		t.reps, t.last = k.reps, k.last
		for _, b := range t.held {
			if err := t.trace(b); err != nil {
				return err
			}
		}
	}
	t.drop()
	t.know()
	return nil
}

// unknown says whether a repeat offset is not known.
func (t *tracer) unknown() bool { return t.reps[0] == 0 || t.reps[1] == 0 || t.reps[2] == 0 }

// mark makes a point where the blocks so far end, which is at the given offset.
func (t *tracer) mark(at int64) error {
	if len(t.points) == 0 {
		if err := t.settle(); err != nil {
			return err
		}
		t.pos = at
	}
	if t.pos != at {
		return errBlock // the decompressor would have to be wrong
	}
	for i := range t.tables {
		if k := &t.tables[i]; k.set {
			if err := k.build(&formats[i]); err != nil {
				return err
			}
		}
	}
	base := max(0, t.pos-t.window) &^ 63
	p := &trace{at: t.pos, prelude: t.prelude(), base: base, marks: make([]uint64, (t.pos-base+63)/64)}
	t.point, t.marks, t.base = p.at, p.marks, base
	t.points = append(t.points, p)
	return nil
}

// done takes the first point if its marks are complete: behind a window from it,
// or at the frame's end, nothing refers to what is before it. nil if there is
// none.
func (t *tracer) done(end bool) *trace {
	if len(t.points) == 0 || !end && t.pos < t.points[0].at+t.window {
		return nil
	}
	p := t.points[0]
	t.points = t.points[1:]
	if p.at == t.point {
		t.point, t.marks = beforeAll, nil
	}
	// What was referred to behind a later point is marked there.
	for _, q := range t.points {
		if q.base >= p.at {
			break
		}
		skip := (q.base - p.base) / 64
		for i := range p.marks[skip:] {
			p.marks[skip+int64(i)] |= q.marks[i]
		}
	}
	if len(t.points) == 0 {
		t.know()
	}
	return p
}

// trace follows a block.
func (t *tracer) trace(b *block) error {
	s, err := t.skim(b)
	if err != nil {
		return err
	}
	if s.count == 0 {
		t.pos += int64(s.literals)
		return nil
	}
	for i := range t.tables {
		if err := t.tables[i].build(&formats[i]); err != nil {
			return err
		}
	}
	return t.sequences(b, s)
}

// section is what is known of a block's sequences before they are decoded.
type section struct {
	count      int // of sequences
	literals   int // bytes of literals; of the whole block if it is not compressed
	start, end int // in the block's buffer, of the bits
}

// skim reads of a block which tables it sets.
func (t *tracer) skim(b *block) (section, error) {
	if b.kind != blockCompressed {
		return section{literals: b.size}, nil
	}
	start, end := lead+blockHeader, lead+blockHeader+b.n
	l, err := parseLiterals(b.buf[start:end])
	if err != nil {
		return section{}, err
	}
	if l.kind == literalsHuffman {
		n, err := treeSize(b.buf[start+l.from : start+l.to])
		if err != nil {
			return section{}, err
		}
		t.tree = append(t.tree[:0], b.buf[start+l.from:start+l.from+n]...)
	}
	start += l.to
	count, n, err := sequenceCount(b.buf[start:end])
	if err != nil {
		return section{}, err
	}
	start += n
	if count > 0 {
		start, err = t.readTables(b, start, end)
	}
	return section{count: count, literals: l.size, start: start, end: end}, err
}

// readTables reads the modes of the sequences' tables and the tables themselves.
func (t *tracer) readTables(b *block, start, end int) (int, error) {
	if start >= end || b.buf[start]&3 != 0 {
		return 0, errBlock
	}
	modes := b.buf[start]
	start++
	for i := range t.tables {
		k, f := &t.tables[i], &formats[i]
		switch modes >> (6 - 2*i) & 3 {
		case modePredefined:
			k.predefine(f)
		case modeRLE:
			if start >= end {
				return 0, errTable
			}
			if err := k.single(b.buf[start], f); err != nil {
				return 0, err
			}
			start++
		case modeFSE:
			n, err := k.read(b.buf[start:end], f)
			if err != nil {
				return 0, err
			}
			start += n
		case modeRepeat:
			if !k.set {
				return 0, errTable
			}
		}
	}
	return start, nil
}

// sequences follows the sequences of a block, whose bits are read from their end
// to their beginning (RFC 8878, 3.1.1.3.2.1.2).
func (t *tracer) sequences(b *block, s section) error {
	start, end, size := s.start, s.end, s.literals
	if start >= end || b.buf[end-1] == 0 {
		return errBlock
	}
	buf := b.buf[:]
	ll, of, ml := &t.tables[literalLengths], &t.tables[offsets], &t.tables[matchLengths]
	at := end - 8 // of the 8 bytes in v
	v := binary.LittleEndian.Uint64(buf[at:])
	used := uint(bits.LeadingZeros8(buf[end-1])) + 1
	l := ll.states[high(v<<used, ll.log)&(maxStates-1)]
	used += ll.log
	o := of.states[high(v<<used, of.log)&(maxStates-1)]
	used += of.log
	m := ml.states[high(v<<used, ml.log)&(maxStates-1)]
	used += ml.log
	r0, r1, r2 := t.reps[0], t.reps[1], t.reps[2]
	pos, point, window, lits := t.pos, t.point, t.window, 0
	unknown := t.unknown()
	for i := s.count; ; {
		at -= int(used >> 3)
		if at < start-8 {
			return errBlock
		}
		used &= 7
		v = binary.LittleEndian.Uint64(buf[at:])
		on, mn, ln := o.addBits(), m.addBits(), l.addBits()
		offset := uint32(o.base() + high(v<<used, on))
		used += on
		if on+mn+ln > 56 {
			at -= int(used >> 3)
			used &= 7
			if at < start-8 {
				return errBlock
			}
			v = binary.LittleEndian.Uint64(buf[at:])
		}
		match := int(m.base() + high(v<<(used&63), mn))
		used += mn
		lit := int(l.base() + high(v<<(used&63), ln))
		used += ln
		if on > 1 {
			offset -= 3
			r0, r1, r2 = offset, r0, r1
		} else {
			if lit == 0 {
				offset++
			}
			switch offset {
			case 1:
				offset = r0
			case 2:
				offset = r1
				r0, r1 = offset, r0
			case 3:
				offset = r2
				r0, r1, r2 = offset, r0, r1
			default:
				if offset = 0; r0 > 0 {
					offset = max(r0-1, 1) // 0 is refused by some and read as 1 by others
				}
				r0, r1, r2 = offset, r0, r1
			}
		}
		lits += lit
		pos += int64(lit)
		from := pos - int64(offset)
		if from < 0 || int64(offset) > window || offset == 0 && !unknown {
			return errBlock
		}
		if from < point {
			t.refer(from, min(int64(match), point-from))
		}
		pos += int64(match)
		i--
		if i == 0 {
			break
		}
		if used > 64-3*maxLog {
			at -= int(used >> 3)
			used &= 7
			if at < start-8 {
				return errBlock
			}
			v = binary.LittleEndian.Uint64(buf[at:])
		}
		x := v << (used & 63)
		ln, mn, on = l.nextBits(), m.nextBits(), o.nextBits()
		l = ll.states[(l.next()+high(x, ln))&(maxStates-1)]
		x <<= ln & 63
		m = ml.states[(m.next()+high(x, mn))&(maxStates-1)]
		x <<= mn & 63
		o = of.states[(o.next()+high(x, on))&(maxStates-1)]
		used += ln + mn + on
	}
	// All bits must have been used, and no more.
	if (end-at-8)*8+int(used) != (end-start)*8 {
		return errBlock
	}
	if lits > size || pos-t.pos+int64(size-lits) > maxBlock {
		return errBlock
	}
	t.reps = [3]uint32{r0, r1, r2}
	t.last = [fields]uint8{codeOf(l, literalLengths), codeOf(o, offsets), codeOf(m, matchLengths)}
	t.pos = pos + int64(size-lits)
	return nil
}

// high gives the n highest bits of v, of which there may be none.
func high(v uint64, n uint) uint { return uint(v >> 1 >> (63 - n&63)) }

// refer marks n bytes from the given offset on, which lie before the last point.
func (t *tracer) refer(from, n int64) {
	i := uint64(from - t.base)
	w := t.marks[i>>6:]
	i &= 63
	if i+uint64(n) <= 64 {
		w[0] |= (1<<uint64(n) - 1) << i
		return
	}
	w[0] |= ^uint64(0) << i
	n -= int64(64 - i)
	for w = w[1:]; n >= 64; n -= 64 {
		w[0] = ^uint64(0)
		w = w[1:]
	}
	if n > 0 {
		w[0] |= 1<<uint64(n) - 1
	}
}

// codeOf finds the code of a state of a field's table.
func codeOf(s state, f int) uint8 {
	for c, k := range formats[f].codes {
		if uint(k.base) == s.base() {
			return uint8(c)
		}
	}
	return 0
}
