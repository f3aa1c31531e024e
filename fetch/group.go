package fetch

import (
	"slices"
)

// A frame that begins at a point is a part of a stream, cut where it was
// convenient and small so that little is fetched for a small file. A program that
// is read by page faults would pay a round trip for each. So a miss brings the
// frames of an aligned group with it, of about atOnce bytes of the blob: what the
// round trip costs on a slow link anyway.
const atOnce = 600 << 10

// grouping gives how many frames of a layer make a group.
func (l *Layer) grouping(atLeast int64) int {
	n, _, _ := l.frames.Len()
	if atLeast < 0 || n == 0 || l.frames.Frame(0).Point == 0 {
		return 1
	}
	if atLeast == 0 {
		atLeast = atOnce
	}
	first, last := l.frames.Frame(0), l.frames.Frame(n-1)
	each := max((last.Offset+last.Length-first.Offset)/int64(n), 1)
	return int(min(max(atLeast/each, 1), 64))
}

// neighbours gives the frames that are fetched along with missing ones, ascending
// as those are.
func (l *Layer) neighbours(missing []int) (along []int) {
	if l.group <= 1 {
		return nil
	}
	n, _, _ := l.frames.Len()
	next := 0
	for _, f := range missing {
		if l.frames.Frame(f).Point == 0 {
			continue
		}
		from := max(f/l.group*l.group, next)
		next = min(f/l.group*l.group+l.group, n)
		for g := from; g < next; g++ {
			if _, asked := slices.BinarySearch(missing, g); !asked && !l.data.Present(g) && l.frames.Frame(g).Point > 0 {
				along = append(along, g)
			}
		}
	}
	return along
}
