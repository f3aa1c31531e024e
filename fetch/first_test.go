package fetch

import (
	"testing"

	"github.com/varvefs/varve/bench/forms"
	"github.com/varvefs/varve/index"
)

// TestHoldFirst reads blocks of small files, of which the first is wanted: the others
// are held where they are here, and nothing is fetched for them.
func TestHoldFirst(t *testing.T) {
	l := makeLayer(t, forms.EStargz, small(20, 6000, 1))
	s := serve(t, l)
	m := on(t, t.TempDir(), quick)
	h := m.open(t, l, s.origin(l))
	a, b := entry(t, h, "f004"), entry(t, h, "f005")
	if b.Data != a.Data+2*index.BlockSize {
		t.Fatalf("files at %d and %d", a.Data, b.Data)
	}
	s.Reset()
	const window = 4 * index.BlockSize // both
	hold := func(off, n int64, wanted, want bool) {
		t.Helper()
		all, err := h.HoldFirst(off, n, wanted)
		if err != nil || all != want {
			t.Fatalf("%d bytes at %d: all %v, %v", n, off, all, err)
		}
		if all {
			h.Release()
		}
	}
	requests := func(want int) {
		t.Helper()
		if got := s.rangesOf(l); len(got) != want {
			t.Fatalf("requests %v, want %d", got, want)
		}
	}

	first := func(off, n int64, want bool) { t.Helper(); hold(off, n, false, want) }
	first(a.Data, window, false)
	requests(0)
	first(a.Data, 2*index.BlockSize, true)
	requests(1)
	first(a.Data, window, false)
	requests(1)
	hold(b.Data, index.BlockSize, true, true)
	requests(2)
	first(a.Data, window, true)

	// What goes on where such a read ended may not be wanted at all.
	c := entry(t, h, "f006")
	first(c.Data, 2*index.BlockSize, false)
	requests(2)
	hold(c.Data, index.BlockSize, true, true)
	requests(3)
	first(c.Data, 2*index.BlockSize, true)
	d := entry(t, h, "f007")
	hold(c.Data+index.BlockSize, index.BlockSize, true, true) // somebody comes near
	first(d.Data, 2*index.BlockSize, true)
	requests(4)

	// A recording that is to miss nothing has nothing held besides; another one counts
	// the first file only.
	exact := m.Record([]*Handle{h}, true)
	first(a.Data, window, false)
	first(c.Data, 2*index.BlockSize, false)
	if n := len(exact.Stop()); n != 0 {
		t.Errorf("%d uses of what was refused", n)
	}
	loose := m.Record([]*Handle{h}, false)
	first(a.Data, window, true)
	first(c.Data, 2*index.BlockSize, true)
	if got := loose.Stop(); len(got) != 1 || got[0].Off != a.Data || got[0].N != 2*index.BlockSize {
		t.Errorf("uses %+v, the file is at %d", got, a.Data)
	}
	requests(4)

	h.Close()
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if all, err := h.HoldFirst(a.Data, window, false); all || err == nil {
		t.Errorf("of a closed layer: %v, %v", all, err)
	}
}
