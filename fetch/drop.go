package fetch

import (
	"fmt"

	"github.com/varvefs/varve/index"
)

// Drop punches every frame out of the data file that can be had again, and gives
// the bytes of contents that went. Reads bring them back. What is on its way
// stays, and what only another pass over the layer would bring.
func (l *Layer) Drop() (bytes int64, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, g := range append(l.gates, &l.gate) {
		g.Lock()
		defer g.Unlock()
	}
	n, _, _ := l.frames.Len()
	for f := range n {
		if l.flights[f] != nil || !l.data.Present(f) || l.frames.Frame(f).Kind == index.Stream {
			continue
		}
		l.data.Drop(f)
		for _, p := range l.frames.FramePieces(f) {
			if err := l.data.Punch(p.Data, p.Size); err != nil {
				return bytes, fmt.Errorf("drop frames of %v: %w", l, err)
			}
			bytes += p.Size
		}
	}
	return bytes, nil
}

// Layers gives the layers of a digest that the store has.
func (f *Fetcher) Layers(digest string) (layers []*Layer) {
	f.opened.Wait() // else one of them may not be open yet
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, l := range f.layers {
		if l.Digest == digest {
			layers = append(layers, l)
		}
	}
	return layers
}
