package fetch

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/varvefs/varve/bench/forms"
	"github.com/varvefs/varve/bench/link"
	"github.com/varvefs/varve/index"
)

func lazyForms() []forms.Form {
	return []forms.Form{forms.EStargz, forms.ZstdChunked, forms.ZstdChunkedContainers}
}

func streamedForms() []forms.Form { return []forms.Form{forms.Gzip, forms.Zstd, forms.Tar} }

func TestForms(t *testing.T) {
	for _, form := range forms.Forms() {
		t.Run(string(form), func(t *testing.T) {
			l := makeLayer(t, form, files())
			s := serve(t, l)
			m := on(t, t.TempDir(), quick)
			h := m.open(t, l, s.origin(l))
			lazy := slices.Contains(lazyForms(), form)
			if h.Whole() == lazy {
				t.Errorf("whole after it was opened: %v", h.Whole())
			}
			checkAll(t, h, l)
			if !h.Whole() || h.Local() != l.Size {
				t.Errorf("whole: %v, %d bytes local of %d", h.Whole(), h.Local(), l.Size)
			}
			total := s.Totals()[link.Blob]
			if h.Fetched() != total.Bytes {
				t.Errorf("%d bytes fetched, the registry gave %d", h.Fetched(), total.Bytes)
			}
			if !lazy && (total.Requests != 1 || total.Bytes != l.Size) {
				t.Errorf("%d requests for %d bytes of a blob of %d", total.Requests, total.Bytes, l.Size)
			}

			// Neither the running machine nor the next one asks again.
			s.Reset()
			checkAll(t, m.open(t, l, s.origin(l)), l)
			m.close(t)
			m = on(t, m.dir, quick)
			h = m.open(t, l, s.origin(l))
			checkAll(t, h, l)
			checkAll(t, m.open(t, l), l)
			if rs := s.ranges(); len(rs) != 0 {
				t.Errorf("a layer of the store was asked for: %q", rs)
			}
			if h.Fetched() != total.Bytes {
				t.Errorf("%d bytes fetched, were %d", h.Fetched(), total.Bytes)
			}
		})
	}
}

func TestEnsureAsksForWhatIsRead(t *testing.T) {
	for _, form := range lazyForms() {
		t.Run(string(form), func(t *testing.T) {
			l := makeLayer(t, form, files())
			s := serve(t, l)
			m := on(t, t.TempDir(), quick)
			h := m.open(t, l, s.origin(l))
			opening := h.Fetched()
			s.Reset()
			big := span(t, h, "big")
			for range 2 {
				checkFile(t, h, find(t, l, "big"))
			}
			from, end := bounds(t, big)
			if diff := cmp.Diff([]string{big}, s.ranges()); diff != "" {
				t.Error(diff)
			}
			if got := h.Fetched() - opening; got != end-from {
				t.Errorf("%d bytes for frames of %d", got, end-from)
			}
			for i := range h.data.Missing() {
				f := h.frames.Frame(i)
				if in := f.Offset >= from && f.Offset < end; h.data.Present(i) != in {
					t.Errorf("frame %d is present: %v", i, h.data.Present(i))
				}
			}

			// One byte takes one frame.
			s.Reset()
			e := entry(t, h, "last")
			if err := h.Ensure(e.Data+e.Size/2, 1); err != nil {
				t.Fatal(err)
			}
			k, _ := h.frames.PiecesIn(e.Data+e.Size/2, 1)
			f := h.frames.Frame(h.frames.FrameOf(k))
			if diff := cmp.Diff([]string{asked(f.Offset, f.Offset+f.Length)}, s.ranges()); diff != "" {
				t.Error(diff)
			}

			// The rest lies to its left and right.
			s.Reset()
			whole := span(t, h, "last")
			checkFile(t, h, find(t, l, "last"))
			from, end = bounds(t, whole)
			rs := s.ranges()
			slices.SortFunc(rs, func(a, b string) int { x, _ := bounds(t, a); y, _ := bounds(t, b); return int(x - y) })
			want := slices.DeleteFunc([]string{asked(from, f.Offset), asked(f.Offset+f.Length, end)}, func(r string) bool {
				from, end := bounds(t, r)
				return from == end
			})
			if diff := cmp.Diff(want, rs, cmpopts.EquateEmpty()); diff != "" {
				t.Error(diff)
			}

			// What lies in no file needs nothing.
			s.Reset()
			if err := h.Ensure(h.Size(), 1<<20); err != nil {
				t.Error(err)
			}
			if rs := s.ranges(); len(rs) != 0 {
				t.Errorf("asked for %q", rs)
			}
		})
	}
}

func TestEachByteIsFetchedOnce(t *testing.T) {
	for _, form := range lazyForms() {
		t.Run(string(form), func(t *testing.T) {
			l := makeLayer(t, form, files())
			s := serve(t, l)
			m := on(t, t.TempDir(), quick)
			h := m.open(t, l, s.origin(l))
			s.Reset()
			var wg sync.WaitGroup
			for i := range 64 {
				wg.Go(func() {
					for k := range l.files {
						checkFile(t, h, l.files[(i+k)%len(l.files)])
					}
				})
			}
			wg.Wait()
			rs := s.ranges()
			slices.SortFunc(rs, func(a, b string) int { x, _ := bounds(t, a); y, _ := bounds(t, b); return int(x - y) })
			var at int64
			for _, r := range rs {
				from, end := bounds(t, r)
				if from < at {
					t.Errorf("%d to %d were asked for twice", from, at)
				}
				at = end
			}
			if !h.Whole() {
				t.Errorf("%d frames are missing", h.data.Missing())
			}
		})
	}
}

func TestLayerIsOpenedOnce(t *testing.T) {
	for _, form := range forms.Forms() {
		t.Run(string(form), func(t *testing.T) {
			l := makeLayer(t, form, files())
			s := serve(t, l)
			alone := on(t, t.TempDir(), quick)
			alone.open(t, l, s.origin(l))
			want := s.ranges()
			s.Reset()
			m := on(t, t.TempDir(), quick)
			var wg sync.WaitGroup
			for range 64 {
				wg.Go(func() {
					h, err := m.Open(context.Background(), m.request(l, s.origin(l)))
					if err != nil {
						t.Error(err)
						return
					}
					h.Close()
				})
			}
			wg.Wait()
			if diff := cmp.Diff(want, s.ranges()); diff != "" {
				t.Errorf("64 opened it at once: %s", diff)
			}
		})
	}
}

func TestOpenGoesOnWithoutTheFirst(t *testing.T) {
	l := makeLayer(t, forms.Gzip, files())
	s := serve(t, l)
	m := on(t, t.TempDir(), Patience{Stall: 300 * time.Millisecond, Total: time.Hour, Base: 1})
	entered := make(chan struct{})
	var once sync.Once
	s.SetFault(func(*http.Request) *link.Fault {
		var f *link.Fault
		once.Do(func() { f = &link.Fault{Break: link.StallBody, After: 100}; close(entered) })
		return f
	})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := m.Open(ctx, m.request(l, s.origin(l))); !errors.Is(err, context.Canceled) {
			t.Errorf("the first got %v", err)
		}
	})
	<-entered
	for range 8 {
		wg.Go(func() {
			h, err := m.Open(context.Background(), m.request(l, s.origin(l)))
			if err != nil {
				t.Error(err)
				return
			}
			h.Close()
		})
	}
	cancel()
	wg.Wait()
}

func TestContentOfAnotherLayer(t *testing.T) {
	for _, form := range append(lazyForms(), forms.Tar) {
		t.Run(string(form), func(t *testing.T) {
			shared := file{"shared", noise(3*chunkSize, 9)}
			a := makeLayer(t, form, []file{{"a", noise(100, 1)}, shared})
			b := makeLayer(t, forms.EStargz, []file{{"b", noise(200, 2)}, shared})
			if form == forms.ZstdChunkedContainers || form == forms.Tar { // cut elsewhere: a piece is the whole of it
				shared.data = noise(chunkSize/8, 9)
				a = makeLayer(t, form, []file{{"a", noise(100, 1)}, shared})
				b = makeLayer(t, forms.EStargz, []file{{"b", noise(200, 2)}, shared})
			}
			s := serve(t, a, b)
			m := on(t, t.TempDir(), quick)
			ha := m.open(t, a, s.origin(a))
			checkFile(t, ha, shared)
			hb := m.open(t, b, s.origin(b))
			s.Reset()
			checkFile(t, hb, shared)
			if rs := s.ranges(); len(rs) != 0 {
				t.Errorf("asked for %q, which another layer holds", rs)
			}

			// So it is when the other layer is only in the store.
			m.close(t)
			m = on(t, m.dir, quick)
			m.opened.Wait()
			hb = m.open(t, b, s.origin(b))
			drop(hb, "shared", t)
			checkFile(t, hb, shared)
			if rs := s.ranges(); len(rs) != 0 {
				t.Errorf("asked for %q, which another layer holds", rs)
			}

			// And what the other layer holds is damaged.
			ha = m.open(t, a, s.origin(a))
			e := entry(t, ha, "shared")
			if _, err := ha.data.File().WriteAt([]byte{^shared.data[0]}, e.Data); err != nil {
				t.Fatal(err)
			}
			drop(hb, "shared", t)
			want := span(t, hb, "shared")
			checkFile(t, hb, shared)
			if form != forms.Tar && form != forms.ZstdChunkedContainers {
				from, _ := bounds(t, want)
				if rs := s.ranges(); len(rs) != 1 {
					t.Errorf("asked for %q", rs)
				} else if at, _ := bounds(t, rs[0]); at != from {
					t.Errorf("asked for %q", rs)
				}
			}
			checkFile(t, ha, shared)
			if k, _ := ha.frames.PiecesIn(e.Data, 1); !ha.data.Present(ha.frames.FrameOf(k)) {
				t.Error("the damaged frame did not come back")
			}
		})
	}
}

// drop makes a file's frames missing.
func drop(h *Handle, name string, t testing.TB) {
	t.Helper()
	e := entry(t, h, name)
	from, to := h.frames.PiecesIn(e.Data, e.Size)
	for i := from; i < to; i++ {
		h.data.Drop(h.frames.FrameOf(i))
	}
}

func TestDoubtedFrames(t *testing.T) {
	for _, form := range forms.Forms() {
		t.Run(string(form), func(t *testing.T) {
			l := makeLayer(t, form, files())
			s := serve(t, l)
			m := on(t, t.TempDir(), quick)
			checkAll(t, m.open(t, l, s.origin(l)), l)
			m.close(t)
			m.restart(t, l)
			s.Reset()

			m = on(t, m.dir, quick)
			h := m.open(t, l) // without a network
			if h.Whole() {
				t.Error("whole, with nothing verified since the machine started")
			}
			checkAll(t, h, l)
			if !h.Whole() {
				t.Errorf("%d frames are missing", h.data.Missing())
			}
			e := entry(t, h, "last")
			m.close(t)

			m.restart(t, l)
			m.edit(t, l, "data", func(b []byte) []byte { b[e.Data] ^= 1; return b })
			m = on(t, m.dir, quick)
			h = m.open(t, l, s.origin(l))
			checkAll(t, h, l)
			rs := s.ranges()
			if len(rs) != 1 {
				t.Fatalf("asked for %q, want the one damaged frame", rs)
			}
			k, _ := h.frames.PiecesIn(e.Data, 1)
			f := h.frames.Frame(h.frames.FrameOf(k))
			want := asked(f.Offset, f.Offset+f.Length)
			if f.Kind == index.Stream {
				want = asked(0, l.Size)
			}
			if rs[0] != want {
				t.Errorf("asked for %q, want %q", rs, want)
			}
		})
	}
}

func TestOffline(t *testing.T) {
	l := makeLayer(t, forms.EStargz, files())
	s := serve(t, l)
	m := on(t, t.TempDir(), quick)
	if _, err := m.Open(context.Background(), m.request(l)); !errors.Is(err, ErrOffline) {
		t.Errorf("a layer that is not there: %v", err)
	}
	online := m.open(t, l, s.origin(l))
	checkFile(t, online, find(t, l, "big"))
	online.Close()
	s.Reset()
	h := m.open(t, l)
	checkFile(t, h, find(t, l, "big"))
	for range 2 {
		if _, err := content(h, entry(t, h, "last")); !errors.Is(err, ErrOffline) {
			t.Errorf("missing bytes: %v", err)
		}
	}
	if rs := s.ranges(); len(rs) != 0 {
		t.Errorf("asked for %q", rs)
	}
	// Once the network may be asked, the failure of a moment ago does not last.
	m.open(t, l, s.origin(l))
	checkAll(t, h, l)
}

// TestStreamedFramesComeBack drops frames that only a pass over the whole blob
// can bring. What the file system had in their place must not shine through
// where the pass skips zeroes.
func TestStreamedFramesComeBack(t *testing.T) {
	for name, pack := range map[string]func(testing.TB, []byte) []byte{"tar": raw, "gzip": gz, "zstd": zst} {
		t.Run(name, func(t *testing.T) {
			l := packLayer(t, sparseTar(sparseFiles()), sparseFiles(), pack)
			s := serve(t, l)
			m := on(t, t.TempDir(), quick)
			h := m.open(t, l, s.origin(l))
			s.Reset()
			frames, _, _ := h.frames.Len()
			streamed := 0
			for i := range frames {
				if h.frames.Frame(i).Kind == index.Stream {
					streamed++
				}
				for _, p := range h.frames.FramePieces(i) {
					if _, err := h.data.File().WriteAt(noise(int(p.Size), 77), p.Data); err != nil {
						t.Fatal(err)
					}
				}
				h.data.Drop(i)
			}
			if streamed < 2 || streamed == frames {
				t.Fatalf("%d of %d frames are streamed", streamed, frames)
			}
			checkFile(t, h, find(t, l, "sparse2"))
			checkAll(t, h, l)
			if diff := cmp.Diff([]string{asked(0, l.Size)}, s.ranges()); diff != "" {
				t.Error(diff)
			}

			// A pass that turns out to be of another blob leaves all as it was.
			s.Reset()
			for i := range frames {
				h.data.Drop(i)
			}
			keep := entry(t, h, "plain3")
			k, _ := h.frames.PiecesIn(keep.Data, 1)
			h.data.SetPresent(h.frames.FrameOf(k))
			s.always(link.Fault{Corrupt: 10})
			_, err := content(h, entry(t, h, "sparse1"))
			if !errors.Is(err, ErrVerify) && !errors.Is(err, index.ErrMalformed) {
				t.Errorf("got %v", err)
			}
			if h.data.Missing() != frames-1 {
				t.Errorf("%d of %d frames are missing", h.data.Missing(), frames)
			}
			checkFile(t, h, find(t, l, "plain3"))
		})
	}
}

// TestHolesComeBack drops frames of a layer that was read whole. A read of one
// file asks for its frame, and what the file system had in its place does not
// shine through the file's zeroes.
func TestHolesComeBack(t *testing.T) {
	for _, form := range streamedForms() {
		t.Run(string(form), func(t *testing.T) {
			l := makeLayer(t, form, files())
			s := serve(t, l)
			m := on(t, t.TempDir(), quick)
			h := m.open(t, l, s.origin(l))
			s.Reset()
			frames, _, _ := h.frames.Len()
			for i := range frames {
				for _, p := range h.frames.FramePieces(i) {
					if _, err := h.data.File().WriteAt(noise(int(p.Size), 77), p.Data); err != nil {
						t.Fatal(err)
					}
				}
				h.data.Drop(i)
			}
			want := span(t, h, "holed")
			checkFile(t, h, find(t, l, "holed"))
			if diff := cmp.Diff([]string{want}, s.ranges()); diff != "" {
				t.Error(diff)
			}
			checkAll(t, h, l)
		})
	}
}
