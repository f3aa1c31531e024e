package fetch

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/varvefs/varve/bench/forms"
	"github.com/varvefs/varve/bench/link"
	"github.com/varvefs/varve/index"
)

// TestFaults spoils the answers to one read of a layer that is open.
func TestFaults(t *testing.T) {
	l := makeLayer(t, forms.EStargz, files())
	status := func(code int) *link.Fault { return &link.Fault{Status: code} }
	header := func(name string, values ...string) link.Fault {
		return link.Fault{Header: http.Header{name: values}}
	}
	busy := &link.Fault{Status: http.StatusTooManyRequests, Header: http.Header{"Retry-After": {"0"}}}
	for name, test := range map[string]struct {
		spoil    []*link.Fault
		always   *link.Fault
		patience Patience
		want     error
		asked    []int64 // where each request began, relative to the file's first frame; nil is unchecked
	}{
		"nothing":           {asked: []int64{0}},
		"bursts of 5xx":     {spoil: []*link.Fault{status(500), status(503), status(502), status(504)}, asked: []int64{0, 0, 0, 0, 0}},
		"429":               {spoil: []*link.Fault{status(429), busy}, asked: []int64{0, 0, 0}},
		"408":               {spoil: []*link.Fault{status(408), status(408)}, asked: []int64{0, 0, 0}},
		"one 401":           {spoil: []*link.Fault{status(401)}, asked: []int64{0, 0}},
		"401 that stays":    {always: status(401), want: ErrUnavailable, asked: []int64{0, 0}},
		"403 that stays":    {always: status(403), want: ErrUnavailable, asked: []int64{0, 0}},
		"404 that stays":    {always: status(404), want: ErrUnavailable, asked: []int64{0, 0}},
		"416 that stays":    {always: status(416), want: ErrUnavailable, asked: []int64{0, 0}},
		"reset, then 401":   {spoil: []*link.Fault{{Break: link.AbortBody, After: 1000}, status(401), status(503)}, asked: []int64{0, 1000, 1000, 1000}},
		"503 that stays":    {always: status(503), patience: hasty, want: ErrUnavailable},
		"503 for long":      {always: &link.Fault{Status: 503, Header: http.Header{"Retry-After": {"1000"}}}, patience: hasty, want: ErrUnavailable},
		"reset at once":     {spoil: []*link.Fault{{Break: link.AbortBody}}, asked: []int64{0, 0}},
		"reset in mid-body": {spoil: []*link.Fault{{Break: link.AbortBody, After: 1000}}, asked: []int64{0, 1000}},
		"reset often": {
			spoil: []*link.Fault{{Break: link.AbortBody, After: 1000}, {Break: link.AbortBody, After: 1}, {Break: link.AbortBody}, {Break: link.AbortBody, After: 70_000}},
			asked: []int64{0, 1000, 1001, 1001, 71_001},
		},
		"stalled":             {spoil: []*link.Fault{{Break: link.StallBody, After: 1000}}, patience: Patience{Stall: 300 * time.Millisecond, Total: time.Hour, Base: 1}},
		"stalled for good":    {always: &link.Fault{Break: link.StallBody}, patience: hasty, want: ErrUnavailable},
		"no answer":           {always: &link.Fault{Delay: time.Hour}, patience: hasty, want: ErrUnavailable},
		"wrong Content-Range": {spoil: nil, always: ptr(header("Content-Range", "bytes 0-9/10")), want: errAnswer, asked: []int64{0, 0}},
		"no Content-Range":    {always: ptr(header("Content-Range")), want: errAnswer, asked: []int64{0, 0}},
		"one wrong answer":    {spoil: []*link.Fault{ptr(header("Content-Range", "bytes 0-9/10"))}, asked: []int64{0, 0}},
		"content encoding":    {always: ptr(header("Content-Encoding", "gzip")), want: errAnswer, asked: []int64{0, 0}},
		"identity encoding":   {always: ptr(header("Content-Encoding", "identity")), asked: []int64{0}},
		"200 of something":    {always: &link.Fault{Status: 200, Body: []byte("<html>sign in</html>")}, want: errAnswer, asked: []int64{0, 0}},
		"wrong byte":          {spoil: []*link.Fault{{Corrupt: 2000}}},
		"wrong byte always":   {always: &link.Fault{Corrupt: 2000}, want: ErrVerify},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := serve(t, l)
			p := test.patience
			if p == (Patience{}) {
				p = quick
			}
			m := on(t, t.TempDir(), quick)
			s2 := serve(t, l) // opened without faults
			m.open(t, l, s2.origin(l)).Close()
			h := m.open(t, l, s.origin(l))
			from, end := bounds(t, span(t, h, "big"))
			if s.spoil(test.spoil...); test.always != nil {
				s.always(*test.always)
			}
			before := h.data.Missing()
			m.patience = p
			got, err := content(h, entry(t, h, "big"))
			if test.want == nil {
				if err != nil || !cmp.Equal(got, find(t, l, "big").data) {
					t.Fatalf("got %d bytes, %v", len(got), err)
				}
			} else {
				if !errors.Is(err, test.want) {
					t.Errorf("got %v, want %v", err, test.want)
				}
				if test.want != ErrVerify {
					if !errors.Is(err, ErrUnavailable) || h.data.Missing() != before {
						t.Errorf("got %v; %d frames missing, were %d", err, h.data.Missing(), before)
					}
				}
			}
			if test.asked != nil {
				var want []string
				for _, at := range test.asked {
					want = append(want, asked(from+at, end))
				}
				if diff := cmp.Diff(want, s.ranges()); diff != "" {
					t.Error(diff)
				}
			}
			// When the fault is gone, all can be read again, though not at once.
			s.SetFault(nil)
			forgive(h)
			m.patience = quick
			checkAll(t, h, l)
		})
	}
}

func ptr[T any](v T) *T { return &v }

// forgive ends the time in which a failed frame is not asked for, when all that is
// on its way has failed: a reader returns at the first.
func forgive(h *Handle) {
	h.mu.Lock()
	for len(h.flights) > 0 {
		h.mu.Unlock()
		time.Sleep(time.Millisecond)
		h.mu.Lock()
	}
	defer h.mu.Unlock()
	clear(h.failed)
}

// TestFailureIsRemembered shows that a reader that tries again and again makes
// no storm of requests.
func TestFailureIsRemembered(t *testing.T) {
	l := makeLayer(t, forms.EStargz, files())
	s := serve(t, l)
	m := on(t, t.TempDir(), quick)
	h := m.open(t, l, s.origin(l))
	s.always(link.Fault{Status: 404})
	s.Reset()
	e := entry(t, h, "small")
	k, _ := h.frames.PiecesIn(e.Data, e.Size)
	h.mu.Lock()
	h.failed[h.frames.FrameOf(k)] = failure{ErrUnavailable, time.Now().Add(time.Hour)}
	h.mu.Unlock()
	for range 10 {
		if _, err := content(h, e); !errors.Is(err, ErrUnavailable) {
			t.Errorf("got %v", err)
		}
	}
	if rs := s.ranges(); len(rs) != 0 {
		t.Errorf("asked for %q", rs)
	}
	_, err := content(h, entry(t, h, "last"))
	var se *StatusError
	if !errors.As(err, &se) || se.Code != 404 || se.Host != s.Addr() {
		t.Errorf("got %v", err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.failed) < 2 {
		t.Error("the failure is not remembered")
	}
}

// TestUnranged reads from a registry that gives the whole blob, whatever it is
// asked.
func TestUnranged(t *testing.T) {
	for _, form := range forms.Forms() {
		t.Run(string(form), func(t *testing.T) {
			l := makeLayer(t, form, files())
			s := serve(t, l)
			s.always(link.Fault{DropRange: true})
			m := on(t, t.TempDir(), quick)
			h := m.open(t, l, s.origin(l))
			checkAll(t, h, l)
			n, whole := 0, 0
			for _, q := range s.Requests() {
				if n++; q.Range == asked(0, l.Size) {
					whole++
				}
			}
			if whole != 1 || n > 2 { // the first request is the one that finds out
				t.Errorf("asked for %q", s.ranges())
			}
		})
		t.Run(string(form)+" when open", func(t *testing.T) {
			l := makeLayer(t, form, files())
			s := serve(t, l)
			m := on(t, t.TempDir(), quick)
			h := m.open(t, l, s.origin(l))
			frames, _, _ := h.frames.Len()
			for i := range frames {
				h.data.Drop(i)
			}
			s.Reset()
			// Only the first whole answer breaks: it is taken up where it ended.
			s.spoil(&link.Fault{DropRange: true}, &link.Fault{DropRange: true, Break: link.AbortBody, After: l.Size / 2},
				&link.Fault{DropRange: true})
			checkFile(t, h, find(t, l, "last"))
			checkAll(t, h, l)
			if rs := s.ranges(); len(rs) > 3 {
				t.Errorf("asked for %q", rs)
			}
			if !h.Whole() {
				t.Errorf("%d frames are missing", h.data.Missing())
			}
		})
	}
}

func TestMirrors(t *testing.T) {
	l := makeLayer(t, forms.EStargz, files())
	for name, test := range map[string]struct {
		fault    link.Fault
		patience Patience
	}{
		"has it not":   {fault: link.Fault{Status: 404}},
		"refuses":      {fault: link.Fault{Status: 403}},
		"is busy":      {fault: link.Fault{Status: 429, Header: http.Header{"Retry-After": {"3600"}}}},
		"fails":        {fault: link.Fault{Status: 500}},
		"lies":         {fault: link.Fault{Corrupt: 1}},
		"breaks off":   {fault: link.Fault{Break: link.AbortBody}},
		"is another":   {fault: link.Fault{Header: http.Header{"Content-Range": {"bytes 0-9/10"}}}},
		"is silent":    {fault: link.Fault{Delay: time.Hour}, patience: Patience{Stall: 300 * time.Millisecond, Total: time.Hour, Base: 1}},
		"gives none":   {fault: link.Fault{Break: link.StallBody}, patience: Patience{Stall: 300 * time.Millisecond, Total: time.Hour, Base: 1}},
		"compresses":   {fault: link.Fault{Header: http.Header{"Content-Encoding": {"zstd"}}}},
		"tells a page": {fault: link.Fault{Status: 200, Body: []byte("<html>")}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := test.patience
			if p == (Patience{}) {
				p = quick
			}
			bad, good := serve(t, l), serve(t, l)
			m := on(t, t.TempDir(), p)
			m.open(t, l, good.origin(l)).Close()
			good.Reset()
			bad.always(test.fault)
			h := m.open(t, l, bad.origin(l), good.origin(l))
			checkAll(t, h, l)
			// Who was found bad is not asked first for ever.
			if b, g := len(bad.ranges()), len(good.ranges()); g < 2 || b > 2 && test.patience == (Patience{}) {
				t.Errorf("%d requests to the bad, %d to the good", b, g)
			}
		})
	}
	t.Run("host is gone", func(t *testing.T) {
		gone := httptest.NewServer(http.NotFoundHandler())
		gone.Close()
		good := serve(t, l)
		m := on(t, t.TempDir(), quick)
		checkAll(t, m.open(t, l, Origin{URL: gone.URL, Transport: good.transport}, good.origin(l)), l)
	})
	t.Run("none", func(t *testing.T) {
		m := on(t, t.TempDir(), hasty)
		q := l.Request
		q.Blob = NewRemote(l.Size, m.m)
		if _, err := m.Open(context.Background(), q); !errors.Is(err, ErrUnavailable) {
			t.Errorf("got %v", err)
		}
	})
}

// TestManyBadFrames spoils a body in many frames: each is asked for once more,
// and none of them at the origin that spoilt it.
func TestManyBadFrames(t *testing.T) {
	l := makeLayer(t, forms.EStargz, files())
	spoilt := *l
	spoilt.blob = make([]byte, len(l.blob))
	for i, b := range l.blob {
		spoilt.blob[i] = ^b
	}
	for range 10 {
		bad, good := serve(t, &spoilt), serve(t, l)
		m := on(t, t.TempDir(), quick)
		m.open(t, l, good.origin(l)).Close()
		good.Reset()
		h := m.open(t, l, bad.origin(l), good.origin(l))
		checkFile(t, h, find(t, l, "big"))
		if n := len(bad.ranges()); n != 1 {
			t.Errorf("%d requests to the origin that spoils", n)
		}
	}
}

func TestStalledOpenEnds(t *testing.T) {
	for _, form := range []forms.Form{forms.EStargz, forms.Gzip} {
		t.Run(string(form), func(t *testing.T) {
			t.Parallel()
			l := makeLayer(t, form, files())
			s := serve(t, l)
			s.always(link.Fault{Break: link.StallBody})
			m := on(t, t.TempDir(), hasty)
			var wg sync.WaitGroup
			for range 8 {
				wg.Go(func() {
					if _, err := m.Open(context.Background(), m.request(l, s.origin(l))); !errors.Is(err, ErrUnavailable) {
						t.Errorf("got %v", err)
					}
				})
			}
			wg.Wait()
		})
	}
}

// TestCorruptChunk asks again for what does not verify, once, and serves none of
// it.
func TestCorruptChunk(t *testing.T) {
	for _, form := range lazyForms() {
		t.Run(string(form), func(t *testing.T) {
			l := makeLayer(t, form, files())
			s := serve(t, l)
			m := on(t, t.TempDir(), quick)
			h := m.open(t, l, s.origin(l))
			e := entry(t, h, "small")
			r := span(t, h, "small")
			s.Reset()
			s.always(link.Fault{Corrupt: 12})
			before := h.data.Missing()
			if _, err := content(h, e); !errors.Is(err, ErrVerify) {
				t.Fatalf("got %v", err)
			}
			if diff := cmp.Diff([]string{r, r}, s.ranges()); diff != "" {
				t.Error(diff)
			}
			if h.data.Missing() != before {
				t.Errorf("%d frames missing, were %d", h.data.Missing(), before)
			}
			disk := make([]byte, e.Size)
			if _, err := h.data.File().ReadAt(disk, e.Data); err != nil || strings.Trim(string(disk), "\x00") != "" {
				t.Errorf("on disk there is %q, %v", disk, err)
			}
			k, _ := h.frames.PiecesIn(e.Data, 1)
			if h.data.Present(h.frames.FrameOf(k)) {
				t.Error("the frame counts as present")
			}
		})
	}
}

// TestLargeFrame reads a frame that is too large to be held in memory.
func TestLargeFrame(t *testing.T) {
	l := makeChunked(t, forms.EStargz, []file{{"a", noise(10, 1)}, {"large", noise(wholePiece+9<<20, 2)}, {"z", noise(10, 3)}}, 1<<30)
	for name, test := range map[string]struct {
		spoil    []*link.Fault
		patience Patience
		want     error
	}{
		"nothing":           {patience: quick},
		"reset in mid-body": {spoil: []*link.Fault{{Break: link.AbortBody, After: wholePiece + 1}}, patience: quick},
		"wrong byte":        {spoil: []*link.Fault{{Corrupt: wholePiece + 1}}, patience: quick},
		"wrong byte twice":  {spoil: []*link.Fault{{Corrupt: wholePiece + 1}, {Corrupt: 1 << 20}}, patience: quick, want: ErrVerify},
		"gone in mid-body":  {spoil: []*link.Fault{{Break: link.AbortBody, After: wholePiece}, {Status: 404}, {Status: 404}}, patience: quick, want: ErrUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, l)
			m := on(t, t.TempDir(), test.patience)
			h := m.open(t, l, s.origin(l))
			s.spoil(test.spoil...)
			s.Reset()
			_, err := content(h, entry(t, h, "large"))
			if !errors.Is(err, test.want) || test.want == ErrUnavailable && errors.Is(err, ErrVerify) {
				t.Errorf("got %v, want %v", err, test.want)
			}
			if n := len(s.ranges()); n != max(1, len(test.spoil)) && n != len(test.spoil)+1 {
				t.Errorf("%d requests", n)
			}
			forgive(h)
			checkAll(t, h, l)
		})
	}
}

// TestBlobInAFile reads from this machine instead of a registry.
func TestBlobInAFile(t *testing.T) {
	for _, form := range forms.Forms() {
		t.Run(string(form), func(t *testing.T) {
			l := makeLayer(t, form, files())
			m := on(t, t.TempDir(), quick)
			q := l.Request
			q.Blob = File{strings.NewReader(string(l.blob)), l.Size}
			h, err := m.Open(context.Background(), q)
			if err != nil {
				t.Fatal(err)
			}
			defer h.Close()
			checkAll(t, h, l)
		})
	}
	f := File{strings.NewReader("0123456789"), 10}
	for _, r := range [][2]int64{{-1, 2}, {0, 11}, {10, 1}, {11, 1}, {1 << 62, 1 << 62}} {
		if _, _, err := f.Open(context.Background(), r[0], r[1]); !errors.Is(err, ErrUnavailable) {
			t.Errorf("%d bytes at %d: %v", r[1], r[0], err)
		}
	}
}

// TestSparseTar has frames of both kinds in one layer: those that can be had by
// themselves, and those that take a pass over the whole of it.
func TestSparseTar(t *testing.T) {
	l := sparseLayer(t)
	for _, unranged := range []bool{false, true} {
		t.Run(fmt.Sprintf("unranged=%v", unranged), func(t *testing.T) {
			s := serve(t, l)
			m := on(t, t.TempDir(), quick)
			h := m.open(t, l, s.origin(l))
			kinds := map[index.Kind]int{}
			frames, _, _ := h.frames.Len()
			for i := range frames {
				kinds[h.frames.Frame(i).Kind]++
				h.data.Drop(i)
			}
			if kinds[index.Stream] < 2 || kinds[index.Raw] < 2 {
				t.Fatalf("the layer has %v", kinds)
			}
			if unranged {
				s.always(link.Fault{DropRange: true})
			}
			s.Reset()
			checkFile(t, h, find(t, l, "plain2"))
			checkAll(t, h, l)
			for i := range frames {
				h.data.Drop(i)
			}
			forgive(h)
			s.Reset()
			passes := m.count(t, "lazy_fallbacks_total", "dropped")
			if err := h.Ensure(0, h.Size()); err != nil {
				t.Fatal(err)
			}
			checkAll(t, h, l)
			if n := m.count(t, "lazy_fallbacks_total", "dropped") - passes; n != 1 && !unranged {
				t.Errorf("%d passes, asked for %q", n, s.ranges())
			}
		})
	}
}
