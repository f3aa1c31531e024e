package zstdblocks

import (
	"encoding/binary"
	"fmt"

	"github.com/varvefs/varve/index"
)

const (
	frameMagic = "\x28\xb5\x2f\xfd"
	skipMagic  = "\x2a\x4d\x18" // of a skippable frame, behind a byte 0x50 to 0x5f
	magicSize  = 4

	flagDictionary = 3
	flagChecksum   = 1 << 2
	flagReserved   = 1 << 3
	flagSingle     = 1 << 5 // the whole content is one segment
	maxHeader      = magicSize + 1 + 1 + 4 + 8
	checksumSize   = 4

	minWindow = 1 << 10
	maxWindow = 128 << 20
)

// frame is what the header of a frame says.
type frame struct {
	window   int64 // bytes
	checksum bool
}

// headerSize is how many bytes the header with these flags has, magic and flags
// included.
func headerSize(flags byte) int {
	n := magicSize + 1
	if flags&flagSingle == 0 {
		n++
	}
	return n + dictionarySize(flags) + contentSize(flags)
}

// dictionarySize is how many bytes name a dictionary.
func dictionarySize(flags byte) int { return [4]int{0, 1, 2, 4}[flags&flagDictionary] }

// contentSize is how many bytes say how large the content is.
func contentSize(flags byte) int {
	if flags>>6 == 0 && flags&flagSingle == 0 {
		return 0
	}
	return 1 << (flags >> 6)
}

// parseHeader reads a whole header.
func parseHeader(b []byte) (frame, error) {
	flags := b[magicSize]
	f := frame{checksum: flags&flagChecksum != 0}
	switch {
	case flags&flagReserved != 0:
		return f, fmt.Errorf("%w: zstd frame with a reserved flag", index.ErrMalformed)
	case hasDictionary(b):
		return f, fmt.Errorf("%w: zstd frame with a dictionary", index.ErrMalformed)
	case flags&flagSingle != 0:
		var v [8]byte
		n := copy(v[:], b[len(b)-contentSize(flags):])
		size := binary.LittleEndian.Uint64(v[:])
		if n == 2 {
			size += 256
		}
		if size > maxWindow {
			return f, fmt.Errorf("%w: zstd frame of one segment of %d bytes, the limit is %d", index.ErrMalformed, size, maxWindow)
		}
		f.window = max(int64(size), minWindow)
	default:
		w := b[magicSize+1]
		size := int64(1) << (10 + w>>3)
		size += size / 8 * int64(w&7)
		if size > maxWindow {
			return f, fmt.Errorf("%w: zstd window of %d bytes, the limit is %d", index.ErrMalformed, size, maxWindow)
		}
		f.window = size
	}
	return f, nil
}

// hasDictionary says whether the header names a dictionary; 0 is none.
func hasDictionary(b []byte) bool {
	end := len(b) - contentSize(b[magicSize])
	for _, v := range b[end-dictionarySize(b[magicSize]) : end] {
		if v != 0 {
			return true
		}
	}
	return false
}

// windowByte says how a header describes a window of n bytes, or the next larger
// one that it can describe.
func windowByte(n int64) byte {
	for e := int64(0); ; e++ {
		base := int64(minWindow) << e
		for m := int64(0); m < 8; m++ {
			if base+base/8*m >= n {
				return byte(e<<3 | m)
			}
		}
	}
}
