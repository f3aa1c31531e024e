package fetch

import (
	"bytes"
	"context"
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/varvefs/varve/bench/forms"
	"github.com/varvefs/varve/index"
	"github.com/varvefs/varve/index/soci"
)

// framesOf gives a table's frames and pieces.
func framesOf(f *index.Frames) (fs []index.Frame, ps []index.Piece, size int64) {
	nf, np, size := f.Len()
	for i := range nf {
		fs = append(fs, f.Frame(i))
	}
	for i := range np {
		ps = append(ps, f.Piece(i))
	}
	return fs, ps, size
}

func pointsOf(t testing.TB, p *index.Points) (ps []index.Point) {
	t.Helper()
	if p == nil {
		return nil
	}
	for i := range p.Len() {
		q, err := p.Point(i)
		if err != nil {
			t.Fatal(err)
		}
		ps = append(ps, q)
	}
	return ps
}

// shareBundle gives others what a layer that was read whole is read by.
func shareBundle(t *testing.T, l *layer) {
	m := on(t, t.TempDir(), quick)
	h := m.openFile(t, l)
	s, err := h.Share()
	if err != nil {
		t.Fatal(err)
	}
	b, err := index.ReadBundle(s.Bundle)
	if err != nil {
		t.Fatal(err)
	}
	entries, err := h.Entries()
	if err != nil {
		t.Fatal(err)
	}
	about := h.About()
	if b.Digest != l.Digest || b.DiffID != l.diffID || b.Size != l.Size || b.Uncompressed != about.Uncompressed || b.Format != about.Format {
		t.Errorf("%+v", b)
	}
	if s.Entries != len(entries) || s.Uncompressed != about.Uncompressed || s.Format != about.Format || s.SpanSize != 4<<20 {
		t.Errorf("%d entries, %d bytes, %s, spans of %d", s.Entries, s.Uncompressed, s.Format, s.SpanSize)
	}
	if diff := cmp.Diff(entries, b.Entries); diff != "" {
		t.Error(diff)
	}
	fs, ps, size := framesOf(h.frames)
	gotFs, gotPs, gotSize := framesOf(b.Frames)
	if !cmp.Equal(fs, gotFs) || !cmp.Equal(ps, gotPs) || size != gotSize {
		t.Errorf("the frames differ: %s%s", cmp.Diff(fs, gotFs), cmp.Diff(ps, gotPs))
	}
	if !reflect.DeepEqual(pointsOf(t, h.points), pointsOf(t, b.Points)) {
		t.Error("the points differ")
	}
	again, err := h.Share()
	if err != nil || !bytes.Equal(again.Bundle, s.Bundle) || !bytes.Equal(again.ZTOC, s.ZTOC) {
		t.Errorf("twice it is not the same: %v", err)
	}
	if about.Format == "tar+zstd" {
		if s.ZTOC != nil {
			t.Error("a zTOC of zstd")
		}
		return
	}
	z, err := soci.Read(s.ZTOC, l.Size)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(entries, z.Entries); diff != "" {
		t.Error(diff)
	}
}

// TestIndexWithSpans makes indexes and keeps nothing.
func TestIndexWithSpans(t *testing.T) {
	fs := volumes(3, 1<<20)
	l := packLayer(t, makeTar(t, fs), fs, gz)
	s := serve(t, l)
	m := on(t, t.TempDir(), quick)
	last := 0
	for _, span := range []int64{2 << 20, 1 << 20, 512 << 10} {
		s.Reset()
		x, err := m.Index(context.Background(), m.request(l, s.origin(l)), span)
		if err != nil {
			t.Fatal(err)
		}
		m.empty(t)
		if diff := cmp.Diff([]string{asked(0, l.Size)}, s.ranges()); diff != "" {
			t.Error(diff)
		}
		z, err := soci.Read(x.ZTOC, l.Size)
		if err != nil {
			t.Fatal(err)
		}
		n, _, _ := z.Frames.Len()
		if x.SpanSize != span || n <= last {
			t.Errorf("spans of %d: %d, with larger ones %d", x.SpanSize, n, last)
		}
		last = n
		b, err := index.ReadBundle(x.Bundle)
		if err != nil || b.DiffID != l.diffID {
			t.Fatal(err)
		}
	}
	if _, err := m.Index(context.Background(), m.request(l), 1<<20); !errors.Is(err, ErrOffline) {
		t.Errorf("got %v", err)
	}
	q := m.request(l, s.origin(l))
	q.DiffID = func() (string, error) { return "sha256:" + strings.Repeat("0", 64), nil }
	if _, err := m.Index(context.Background(), q, 1<<20); !errors.Is(err, ErrVerify) {
		t.Errorf("got %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := m.Index(ctx, m.request(l, s.origin(l)), 1<<20); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	m.empty(t)
}

// TestNotToBeShared says so of layers whose indexes are not known here, or would
// not do.
func TestNotToBeShared(t *testing.T) {
	star := makeLayer(t, forms.EStargz, files())
	m := on(t, t.TempDir(), quick)
	for name, l := range map[string]*layer{"by its table of contents": star, "with holes": sparseLayer(t)} {
		h := m.openFile(t, l)
		if s, err := h.Share(); err == nil {
			t.Errorf("%s: %+v", name, s)
		}
		h.Close()
	}
	fs := volumes(1, 1<<20)
	l := packLayer(t, makeTar(t, fs), fs, gz)
	s := serve(t, l)
	h := m.must(t, m.with(l, s, published(KindSOCI, sharedOf(t, l).ZTOC)))
	if _, err := h.Share(); err == nil {
		t.Error("an index of another is shared")
	}
}
