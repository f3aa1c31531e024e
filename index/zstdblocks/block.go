package zstdblocks

import (
	"encoding/binary"
	"errors"
)

// Types of blocks and of literals sections.
const (
	blockRaw = iota
	blockRLE
	blockCompressed
	blockReserved
)

const (
	literalsRaw = iota
	literalsRLE
	literalsHuffman
	literalsTreeless
)

const (
	maxBlock = 128 << 10 // bytes of a block, compressed or not
	// lead is how many bytes stand before a block in its buffer, so that the bits
	// of its sequences, read from their end, can be read past their beginning.
	lead = 32
)

var errBlock = errors.New("a compressed block is corrupt")

// block is a block's header and what follows it, behind lead bytes.
type block struct {
	buf  [lead + blockHeader + maxBlock]byte
	n    int // bytes that follow the header
	kind uint8
	size int // bytes it regenerates, unless it is compressed
}

const blockHeader = 3

// bytes is the block as it stands in the blob.
func (b *block) bytes() []byte { return b.buf[lead : lead+blockHeader+b.n] }

// literals is what the header of a literals section says.
type literals struct {
	kind uint8
	size int // bytes that it regenerates
	from int // where its content begins, behind the header: a tree if there is one
	to   int // where it ends
}

// parseLiterals reads the header of the literals section at the beginning of b.
func parseLiterals(b []byte) (l literals, err error) {
	if len(b) < 2 {
		return l, errBlock
	}
	var head [8]byte
	copy(head[:], b)
	v := binary.LittleEndian.Uint64(head[:])
	l.kind = b[0] & 3
	format := b[0] >> 2 & 3
	if l.kind == literalsRaw || l.kind == literalsRLE {
		switch format {
		case 1:
			l.size, l.from = int(v>>4&0xfff), 2
		case 3:
			l.size, l.from = int(v>>4&0xfffff), 3
		default:
			l.size, l.from = int(v>>3&0x1f), 1
		}
		l.to = l.from + l.size
		if l.kind == literalsRLE {
			l.to = l.from + 1
		}
	} else {
		n := [4]uint{10, 10, 14, 18}[format]
		mask := uint64(1)<<n - 1
		l.size, l.from = int(v>>4&mask), [4]int{3, 3, 4, 5}[format]
		l.to = l.from + int(v>>(4+n)&mask)
	}
	if l.size > maxBlock || l.to > len(b) || l.from > l.to {
		return l, errBlock
	}
	return l, nil
}

// treeSize is how many bytes the description of the Huffman tree has with which b
// begins (RFC 8878, 4.2.1).
func treeSize(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, errBlock
	}
	n := 1 + int(b[0])
	if b[0] >= 128 {
		n = 1 + (int(b[0])-127+1)/2
	}
	if n > len(b) {
		return 0, errBlock
	}
	return n, nil
}

// sequenceCount reads how many sequences follow, and in how many bytes that is
// said.
func sequenceCount(b []byte) (count, n int, err error) {
	switch {
	case len(b) >= 1 && b[0] < 128:
		return int(b[0]), 1, nil
	case len(b) >= 2 && b[0] < 255:
		return int(b[0]-128)<<8 | int(b[1]), 2, nil
	case len(b) >= 3 && b[0] == 255:
		return 0x7f00 + int(b[1]) + int(b[2])<<8, 3, nil
	}
	return 0, 0, errBlock
}
