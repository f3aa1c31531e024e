package fetch

import (
	"sort"

	"github.com/varvefs/varve/index"
)

// Landmark gives the bytes of the data file, from its start, that the image's
// builder wants to be fetched ahead: what an eStargz layer has before its landmark.
// 0 where it names none.
func (l *Layer) Landmark() int64 {
	end := l.About().Landmark
	n, _, size := l.frames.Len()
	// The data file has the order of the blob.
	i := sort.Search(n, func(i int) bool { return l.frames.Frame(i).Offset >= end })
	if end <= 0 || i == 0 {
		return 0
	}
	for ; i < n; i++ {
		if ps := l.frames.FramePieces(i); len(ps) > 0 {
			return ps[0].Data / index.BlockSize * index.BlockSize
		}
	}
	return size
}

// Spans gives the ranges of the data file that frames first to last give to: of a
// layer that a zTOC describes, frames are its spans. Numbers that it does not have
// give nothing.
func (h *Handle) Spans(first, last int) (wants []Want) {
	n, _, _ := h.frames.Len()
	for i := max(first, 0); i <= min(last, n-1); i++ {
		for _, p := range h.frames.FramePieces(i) {
			if k := len(wants) - 1; k >= 0 && wants[k].Off+wants[k].N == p.Data {
				wants[k].N += p.Size
			} else {
				wants = append(wants, Want{Layer: h, Off: p.Data, N: p.Size})
			}
		}
	}
	return wants
}

// Has reports whether [off, off+n) of the data file is here.
func (l *Layer) Has(off, n int64) bool {
	l.life.RLock()
	defer l.life.RUnlock()
	return l.has(off, n)
}
