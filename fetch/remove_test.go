package fetch

import (
	"os"
	"sync"
	"testing"
	"time"

	"github.com/varvefs/varve/bench/forms"
)

// TestRemove removes a layer when the last has closed it, its file too, and has it
// made anew for who comes then.
func TestRemove(t *testing.T) {
	l := makeLayer(t, forms.EStargz, files())
	s := serve(t, l)
	m := on(t, t.TempDir(), quick)
	a, b := m.open(t, l, s.origin(l)), m.open(t, l, s.origin(l))
	checkAll(t, a, l)
	path := a.Path()
	if n := a.Usage(); n < l.Size {
		t.Errorf("%d bytes on the disk of a layer of %d", n, l.Size)
	}
	removed := make(chan error, 4)
	then := func(err error) { removed <- err }
	m.Remove(a.Layer, then)
	a.Close()
	a.Close() // once more is no other handle's
	checkAll(t, b, l)
	b.Close()
	select {
	case err := <-removed:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("it was not removed")
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("its file: %v", err)
	}
	if got := m.Layers(l.Digest); len(got) != 0 {
		t.Errorf("found: %v", got)
	}
	if err := a.Ensure(0, 1); err == nil {
		t.Error("it can be read")
	}
	s.Reset()
	c := m.open(t, l, s.origin(l))
	checkAll(t, c, l)
	if len(s.ranges()) == 0 {
		t.Error("it was not fetched anew")
	}
	// Who opens it in between keeps it.
	m.Remove(c.Layer, then)
	d := m.open(t, l, s.origin(l))
	c.Close()
	d.Close()
	if got := m.Layers(l.Digest); len(got) != 1 {
		t.Errorf("found: %v", got)
	}
	m.Remove(c.Layer, then)
	if err := <-removed; err != nil {
		t.Error(err)
	}
	if len(removed) != 0 {
		t.Error("it was removed twice")
	}
}

// TestRemoveWhileOpened has a layer opened, read and closed by some while others
// remove it.
func TestRemoveWhileOpened(t *testing.T) {
	l, other := makeLayer(t, forms.EStargz, files()), makeLayer(t, forms.ZstdChunked, files())
	s := serve(t, l, other)
	m := on(t, t.TempDir(), quick)
	var wg sync.WaitGroup
	for _, x := range []*layer{l, other, l} { // whose contents are copied from one another
		wg.Go(func() {
			for range 15 {
				h := m.open(t, x, s.origin(x))
				checkAll(t, h, x)
				m.Remove(h.Layer, func(err error) {
					if err != nil {
						t.Error(err)
					}
				})
				h.Close()
			}
		})
	}
	wg.Wait()
}
