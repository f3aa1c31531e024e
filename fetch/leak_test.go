package fetch

import (
	"context"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/varvefs/varve/bench/forms"
	"github.com/varvefs/varve/bench/link"
)

// held is what the process has of the machine.
type held struct {
	files []string // what its descriptors lead to
	maps  string
}

func resources(t testing.TB) (r held) {
	t.Helper()
	es, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range es {
		if to, err := os.Readlink(filepath.Join("/proc/self/fd", e.Name())); err == nil {
			r.files = append(r.files, to)
		}
	}
	b, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	r.maps = string(b)
	return r
}

func (r held) opened(dir string) (n int) {
	for _, f := range r.files {
		if strings.HasPrefix(f, dir) {
			n++
		}
	}
	return n
}

func (r held) mapped(dir string) int { return strings.Count(r.maps, dir) }

// running gives the goroutines that are in this package's own code and in no
// test.
func running() (gs []string) {
	buf := make([]byte, 4<<20)
	for _, g := range strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
		if strings.Contains(g, "varve/fetch.(*") && !strings.Contains(g, "_test.go") {
			gs = append(gs, g)
		}
	}
	return gs
}

// calm waits until none of them is left. Who waits for what one does goes on a little
// before it ends; one may also have been told to begin and not have had a processor.
func calm(t testing.TB) {
	t.Helper()
	if !soon(func() bool { return len(running()) == 0 }) {
		t.Fatalf("left: %s", strings.Join(running(), "\n\n"))
	}
}

func TestCloseInTheMiddle(t *testing.T) {
	for _, form := range append(lazyForms(), forms.Gzip) {
		t.Run(string(form), func(t *testing.T) {
			l := makeLayer(t, form, files())
			s := serve(t, l)
			m := on(t, t.TempDir(), quick)
			h := m.open(t, l, s.origin(l))
			frames, _, _ := h.frames.Len()
			for i := range frames {
				h.data.Drop(i)
			}
			begun := make(chan struct{}, 1000)
			s.SetFault(func(*http.Request) *link.Fault {
				begun <- struct{}{}
				return &link.Fault{Break: link.StallBody, After: 3}
			})
			names := []string{"big", "last", "copy"}
			if form == forms.Gzip {
				names = names[:1] // one pass is for all
			}
			var wg sync.WaitGroup
			for _, f := range names {
				e := entry(t, h, f)
				wg.Go(func() {
					if err := h.Ensure(e.Data, e.Size); err == nil {
						t.Errorf("%q was read", f)
					}
				})
			}
			for range names {
				<-begun
			}
			m.close(t)
			wg.Wait()
			r := resources(t)
			if r.opened(m.dir) != 0 || r.mapped(m.dir) != 0 {
				t.Errorf("left: %d descriptors, %d mappings", r.opened(m.dir), r.mapped(m.dir))
			}
			calm(t)
			if _, err := m.Open(context.Background(), m.request(l, s.origin(l))); err == nil {
				t.Error("opened after it was closed")
			}
		})
	}
}

// TestCloseWhileLayersShare closes a machine whose layers copy from each other:
// none of them may lose its files while another reads them.
func TestCloseWhileLayersShare(t *testing.T) {
	shared := file{"shared", noise(32*chunkSize, 9)}
	dir := t.TempDir()
	var ls []*layer
	for i := range 6 {
		ls = append(ls, makeLayer(t, forms.EStargz, []file{shared, {"own", noise(100, uint64(i))}}))
	}
	s := serve(t, ls...)
	for range 8 {
		m := on(t, dir, quick)
		hs := make([]*Handle, len(ls))
		for i, l := range ls {
			hs[i] = m.open(t, l, s.origin(l))
		}
		checkFile(t, hs[0], shared)
		var wg sync.WaitGroup
		for _, h := range hs[1:] {
			drop(h, "shared", t)
			e := entry(t, h, "shared")
			for k := range 8 {
				from, to := h.frames.PiecesIn(e.Data+e.Size/8*int64(k), e.Size/8)
				waits, claimed, err := h.claim([]int{h.frames.FrameOf(from), h.frames.FrameOf(to - 1)}, nil)
				if err != nil {
					t.Fatal(err)
				}
				if len(claimed) > 0 {
					h.start(claimed)
				}
				for _, w := range waits {
					wg.Go(func() { <-w.done })
				}
			}
		}
		m.close(t)
		wg.Wait()
	}
}

func TestDamagedLayersLeakNothing(t *testing.T) {
	l := makeLayer(t, forms.EStargz, files())
	s := serve(t, l)
	m := on(t, t.TempDir(), quick)
	m.open(t, l, s.origin(l))
	m.close(t)
	for _, name := range []string{"present", "about.json", "data"} {
		t.Run(name, func(t *testing.T) {
			if err := os.Rename(m.path(l, name), m.path(l, name+".away")); err != nil {
				t.Fatal(err)
			}
			defer os.Rename(m.path(l, name+".away"), m.path(l, name))
			n := on(t, m.dir, quick)
			n.opened.Wait()
			for i := range 3 {
				if _, err := n.Open(context.Background(), n.request(l)); err == nil {
					t.Fatalf("opened without %s", name)
				}
				if r := resources(t); r.opened(m.dir) != 0 || r.mapped(m.dir) != 0 {
					t.Fatalf("after %d: %d descriptors, %d mappings", i+1, r.opened(m.dir), r.mapped(m.dir))
				}
			}
		})
	}
}
