package fetch

import (
	"errors"
	"io"
	"maps"
	"slices"

	"github.com/varvefs/varve/index"
)

// copyLocal fills a piece from another layer of the store that has the same
// content.
func (f *Fetcher) copyLocal(to *Layer, p *index.Piece) bool {
	f.mu.Lock()
	others := slices.Collect(maps.Values(f.layers))
	f.mu.Unlock()
	return slices.ContainsFunc(others, func(o *Layer) bool { return o != to && o.give(p, to) })
}

// give copies a piece that l holds into another layer's data file, verified on
// the way as if it came from the network.
func (l *Layer) give(p *index.Piece, to *Layer) bool {
	if !l.life.TryRLock() { // else two that are closed could wait for one another
		return false
	}
	defer l.life.RUnlock()
	if l.closed.Load() {
		return false
	}
	l.gate.RLock()
	defer l.gate.RUnlock()
	own, ok := l.frames.Find(p.Digest)
	if !ok || own.Size != p.Size || !l.data.Present(own.Frame) {
		return false
	}
	_, err := decode(io.NewSectionReader(l.data.File(), own.Data, own.Size), index.Raw, index.Point{},
		[]index.Piece{{Data: p.Data, Size: p.Size, Digest: p.Digest}}, to.data.File())
	if errors.Is(err, ErrVerify) {
		l.f.log.Warn("frame in the store is damaged and fetched again", "layer", l.Digest, "frame", own.Frame)
		l.data.Drop(own.Frame)
	}
	return err == nil
}
