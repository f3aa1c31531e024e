package zstdblocks

import (
	"math/bits"
)

const maxWeights = 255

// longestCode gives the bits of the longest code of the Huffman tree that is
// described in desc (RFC 8878, 4.2.1). That code is all zeroes.
func longestCode(desc []byte) (uint, error) {
	var weights [maxWeights]uint8
	n, err := readWeights(desc, &weights)
	if err != nil {
		return 0, err
	}
	sum := uint(0)
	for _, w := range weights[:n] {
		if w > 0 {
			sum += 1 << (w - 1)
		}
	}
	if sum == 0 {
		return 0, errTable
	}
	return uint(bits.Len(sum)), nil // the last weight makes the sum a power of two
}

// readWeights reads all weights but the last, which is not described.
func readWeights(desc []byte, w *[maxWeights]uint8) (int, error) {
	if n, err := treeSize(desc); err != nil || n != len(desc) {
		return 0, errTable
	}
	if desc[0] >= 128 {
		n := int(desc[0]) - 127
		for i := range n {
			w[i] = desc[1+i/2] >> (4 * (1 - i&1)) & 0xf
		}
		return n, nil
	}
	const most = 6
	var norm [256]int16
	n, symbols, log, err := readDistribution(desc[1:], norm[:16], most)
	if err != nil {
		return 0, err
	}
	var next [256]uint16
	var codes [1 << most]uint8
	if err := spread(codes[:1<<log], norm[:symbols], &next); err != nil {
		return 0, err
	}
	var width [1 << most]uint
	var first [1 << most]uint
	for i, c := range codes[:1<<log] {
		x := uint(next[c])
		next[c]++
		width[i] = log - uint(bits.Len(x)-1)
		first[i] = x<<width[i] - 1<<log
	}
	return weightBits(desc[1+n:], w, log, &codes, &width, &first)
}

// weightBits decodes the weights' bits, which two states take in turn until there
// are none left.
func weightBits(b []byte, w *[maxWeights]uint8, log uint, codes *[64]uint8, width, first *[64]uint) (int, error) {
	if len(b) == 0 || b[len(b)-1] == 0 {
		return 0, errTable
	}
	left := len(b)*8 - bits.LeadingZeros8(b[len(b)-1]) - 1
	take := func(n uint) (v uint) {
		for range n {
			v <<= 1
			left--
			if left >= 0 {
				v |= uint(b[left>>3]>>(left&7)) & 1
			}
		}
		return v
	}
	var s [2]uint
	s[0] = take(log)
	s[1] = take(log)
	for n := 0; n+1 < maxWeights; n++ {
		k := &s[n&1]
		w[n] = codes[*k]
		*k = first[*k] + take(width[*k])
		if left < 0 {
			w[n+1] = codes[s[1-n&1]]
			return n + 2, nil
		}
	}
	return 0, errTable
}
