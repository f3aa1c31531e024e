package fetch

import (
	"context"
	"errors"
	"os"
	"sync"
	"testing"

	"github.com/varvefs/varve/bench/forms"
)

// TestReadOfAClosedLayer reads while the Fetcher is closed, and after: mounts that
// somebody is in do so until the daemon is gone.
func TestReadOfAClosedLayer(t *testing.T) {
	l := makeLayer(t, forms.EStargz, small(20, 20_000, 1))
	s := serve(t, l)
	m := on(t, t.TempDir(), quick)
	h := m.open(t, l, s.origin(l))
	if err := m.Bring(context.Background(), everything(h), Bringing{Class: Profile}); err != nil {
		t.Fatal(err)
	}
	w := want(t, h, "f003")
	var wg sync.WaitGroup
	read := make(chan struct{})
	began := sync.OnceFunc(func() { close(read) })
	for range 4 {
		wg.Go(func() {
			for {
				err := h.Hold(w.Off, w.N)
				if err == nil {
					b := make([]byte, w.N)
					_, err = h.data.File().ReadAt(b, w.Off)
					h.Release()
				}
				if errors.Is(err, os.ErrClosed) {
					return
				} else if err != nil {
					t.Error(err)
					return
				}
				began()
			}
		})
	}
	<-read
	m.close(t)
	wg.Wait()
	if err := h.Ensure(w.Off, w.N); !errors.Is(err, os.ErrClosed) || h.Has(w.Off, w.N) {
		t.Errorf("after it: %v", err)
	}
}
