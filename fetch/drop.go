package fetch

import (
	"fmt"

	"github.com/varvefs/varve/index"
)

// Drop punches every frame out of the data file that can be had again, and gives
// the bytes of contents that went. Reads bring them back. What is on its way
// stays, and what only another pass over the layer would bring.
func (l *Layer) Drop() (bytes int64, err error) {
	l.steady.Lock()
	defer l.steady.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.gate.Lock()
	defer l.gate.Unlock()
	for _, g := range l.gates {
		g.Lock()
		defer g.Unlock()
	}
	n, pieces, size := l.frames.Len()
	keep, went := make([]bool, n), make([]bool, n)
	for f := range n {
		here := l.data.Present(f) || l.data.Doubted(f)
		if l.flights[f] != nil || here && l.frames.Frame(f).Kind == index.Stream {
			keep[f] = true
		} else if here {
			l.data.Drop(f)
			went[f] = true
			l.ahead.forget(f, l.frames.Frame(f).Length)
		}
	}
	// Runs of pieces that do not stay are punched with what lies between them, which
	// is zeroes anyway: a piece by itself seldom ends where a block does.
	about := l.About()
	from, gone := int64(0), false
	punch := func(to int64) error {
		if !gone {
			return nil
		}
		gone = false
		if err := l.data.Punch(from, to-from); err != nil {
			return fmt.Errorf("drop frames of %v: %w", l, err)
		}
		return nil
	}
	for i := range pieces {
		p := l.frames.Piece(i)
		if keep[p.Frame] {
			if err := punch(p.Data); err != nil {
				return bytes, err
			}
			from = p.Data + p.Size
			continue
		}
		gone = true
		if went[p.Frame] && (about.Unproven || about.Contents == 0 || p.Data < about.Contents) {
			bytes += p.Size
		}
	}
	return bytes, punch(size + index.BlockSize) // else the last block, of which it has a part, would stay
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
