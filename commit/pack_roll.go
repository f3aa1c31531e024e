package commit

import "bytes"

const (
	rollBits    = 16 // chunks of 64 KiB on average
	rollAverage = 1 << rollBits
	rollWindow  = 64
	rollOffset  = 31
	// A sum may stop at every byte of repetitive data; no chunk but a file's
	// last is shorter than this.
	minRolled = 1 << 10
	// minHole is the shortest run of zeroes that becomes a chunk of its own.
	minHole = 1 << 10
)

// What follows the bytes that a roller was shown.
type rollStep int

const (
	rollOn   rollStep = iota // more of the chunk
	rollCut                  // the chunk ends here
	rollHole                 // the last minHole bytes began a hole
)

// roller finds where the chunks of a file end: by bup's rolling sum, with the
// window and bits of containers/storage (pkg/chunked/compressor/rollsum.go), so
// that Podman finds the chunks which it has from other layers.
type roller struct {
	s1, s2 uint64
	window [rollWindow]byte
	at     int
	zeros  int  // that end what was seen, up to minHole
	hole   bool // the present chunk is zeroes alone
}

func newRoller() roller {
	return roller{s1: rollWindow * rollOffset, s2: rollWindow * (rollWindow - 1) * rollOffset}
}

// next gives how many bytes of p to take before something happens. The present
// chunk has got have bytes so far.
func (r *roller) next(p []byte, have int) (int, rollStep) {
	if r.hole {
		n := len(p) - len(bytes.TrimLeft(p, "\x00"))
		if n == len(p) {
			return n, rollOn
		}
		*r = newRoller() // which is what so many zeroes make of it
		return n, rollCut
	}
	s1, s2, at, zeros := r.s1, r.s2, r.at, r.zeros
	n, step := len(p), rollOn
	for i, b := range p {
		s1 += uint64(b) - uint64(r.window[at])
		s2 += s1 - rollWindow*(uint64(r.window[at])+rollOffset)
		r.window[at] = b
		at = (at + 1) % rollWindow
		if b != 0 {
			zeros = 0
		} else if zeros++; zeros == minHole {
			n, step = i+1, rollHole
			break
		}
		if s2&(rollAverage-1) == rollAverage-1 && have+i+1 >= minRolled {
			n, step = i+1, rollCut
			break
		}
	}
	r.s1, r.s2, r.at, r.zeros = s1, s2, at, zeros
	return n, step
}
