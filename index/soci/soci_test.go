package soci

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/varvefs/varve/index"
	"github.com/varvefs/varve/index/indextest"
)

func TestRoundTrip(t *testing.T) {
	tars := map[string][]byte{
		"pax":   indextest.Tar(t, tar.FormatPAX, members()),
		"gnu":   indextest.Tar(t, tar.FormatGNU, plainMembers()),
		"ustar": indextest.Tar(t, tar.FormatUSTAR, plainMembers()),
		"empty": indextest.Tar(t, tar.FormatPAX, nil),
		"padded": append(indextest.Tar(t, tar.FormatPAX, members()), // as tar(1) does
			make([]byte, 7<<10)...),
	}
	for name, tarball := range tars {
		for _, span := range []int{len(tarball), 100_000, 4096, 700} {
			t.Run(name, func(t *testing.T) {
				blob, s := source(t, tarball, span)
				l := check(t, write(t, s), blob, tarball)
				if l.Uncompressed != int64(len(tarball)) {
					t.Errorf("tar of %d bytes, want %d", l.Uncompressed, len(tarball))
				}
				blob, s = plain(tarball, span)
				check(t, write(t, s), blob, tarball)
				blob, s = resumed(t, tarball, int64(span))
				check(t, write(t, s), blob, tarball)
			})
		}
	}
}

// TestPoints proves that what is read is what was written.
func TestPoints(t *testing.T) {
	ms := members()
	for i := range 200_000 {
		ms[3].Data[i] &= 0x3f // so that it compresses: stored blocks begin at bytes
	}
	_, s := resumed(t, indextest.Tar(t, tar.FormatPAX, ms), 60_000)
	if len(s.Points) < 4 {
		t.Fatalf("%d points", len(s.Points))
	}
	l, err := Read(write(t, s), s.Compressed)
	if err != nil {
		t.Fatal(err)
	}
	bits := 0
	for i, want := range s.Points {
		got, err := l.Points.Point(i)
		if err != nil {
			t.Fatal(err)
		}
		state := make([]byte, min(windowSize, want.Out)) // whole: its zeroes may be the layer's
		copy(state[len(state)-len(want.State):], want.State)
		if got.In != want.In || got.Out != want.Out || got.Bits != want.Bits || got.Digest != want.Digest || !bytes.Equal(got.State, state) {
			t.Errorf("point %d differs", i)
		}
		if got.Bits > 0 {
			bits++
		}
	}
	if bits == 0 {
		t.Error("no point lies within a byte")
	}
}

// TestContentsAreSkipped writes from a source whose contents read as zeroes.
func TestContentsAreSkipped(t *testing.T) {
	tarball := indextest.Tar(t, tar.FormatPAX, members())
	_, s := source(t, tarball, 100_000)
	want := write(t, s)
	hollow := bytes.Clone(tarball)
	l, err := Read(want, s.Compressed)
	if err != nil {
		t.Fatal(err)
	}
	frames, _, _ := l.Frames.Len()
	for i := range frames {
		for _, p := range l.Frames.FramePieces(i) {
			if p.Data < l.Contents {
				at := l.Points.At(i).Out + p.Inner
				clear(hollow[at : at+p.Size])
			}
		}
	}
	if bytes.Equal(hollow, tarball) {
		t.Fatal("nothing is hollow")
	}
	s.Tar = bytes.NewReader(hollow)
	if !bytes.Equal(write(t, s), want) {
		t.Error("the contents make a difference")
	}
}

// TestGolden reads what SOCI's own library made: see testdata/README.
func TestGolden(t *testing.T) {
	one := golden(t, "one.tar.gz")
	for _, c := range []struct {
		ztoc   string
		blob   []byte
		spans  int
		layout string
	}{
		{"one.tar.gz.ztoc.gz", one, 3, "second"},
		{"v1.tar.gz.ztoc.gz", one, 3, "first"},
		{"members.tar.gz.ztoc.gz", golden(t, "members.tar.gz"), 5, "second"},
		{"plain.tar.ztoc.gz", expand(t, one), 9, ""},
	} {
		t.Run(c.ztoc, func(t *testing.T) {
			tarball := c.blob
			if c.layout != "" {
				tarball = expand(t, c.blob)
			}
			l := check(t, expand(t, golden(t, c.ztoc)), c.blob, tarball)
			if frames, _, _ := l.Frames.Len(); frames != c.spans || len(l.Entries) != 54 {
				t.Errorf("%d spans, %d entries", frames, len(l.Entries))
			}
		})
	}
}

// TestRewrite writes what SOCI wrote.
func TestRewrite(t *testing.T) {
	blob := golden(t, "one.tar.gz")
	theirs := expand(t, golden(t, "one.tar.gz.ztoc.gz"))
	want, err := Read(theirs, int64(len(blob)))
	if err != nil {
		t.Fatal(err)
	}
	s := Source{Tar: bytes.NewReader(expand(t, blob)), Compressed: int64(len(blob)), Uncompressed: want.Uncompressed, Gzip: true, SpanSize: 64 << 10, Tool: "varve golden"}
	for i := range want.Points.Len() {
		p, err := want.Points.Point(i)
		if err != nil {
			t.Fatal(err)
		}
		s.Points = append(s.Points, p)
	}
	ours := write(t, s)
	got := check(t, ours, blob, expand(t, blob))
	if d := cmp.Diff(want.Entries, got.Entries); d != "" {
		t.Error(d)
	}
	if !bytes.Equal(encode(t, got.Points), encode(t, want.Points)) || !bytes.Equal(encode(t, got.Frames), encode(t, want.Frames)) {
		t.Error("points or frames differ")
	}
	if len(ours) >= len(theirs) {
		t.Errorf("%d bytes, SOCI's has %d", len(ours), len(theirs))
	}
}

func encode(t *testing.T, from io.WriterTo) []byte {
	t.Helper()
	var buf bytes.Buffer
	if _, err := from.WriteTo(&buf); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func golden(t *testing.T, name string) []byte {
	t.Helper()
	b, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func expand(t *testing.T, b []byte) []byte {
	t.Helper()
	zr, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	out, err := io.ReadAll(zr)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestWriteRefuses(t *testing.T) {
	tarball := indextest.Tar(t, tar.FormatPAX, members())
	for name, change := range map[string]func(s *Source){
		"no points":       func(s *Source) { s.Points = nil },
		"no digest":       func(s *Source) { s.Points[1].Digest = [32]byte{} },
		"long state":      func(s *Source) { s.Points[1].State = make([]byte, windowSize+1) },
		"descending":      func(s *Source) { s.Points[2].Out = 0 },
		"late beginning":  func(s *Source) { s.Points[0].Out = 1 },
		"past the blob":   func(s *Source) { s.Compressed = s.Points[2].In },
		"nine bits":       func(s *Source) { s.Points[1].Bits = 9 },
		"no span size":    func(s *Source) { s.SpanSize = 0 },
		"not a plain tar": func(s *Source) { s.Gzip = false },
		"too short":       func(s *Source) { s.Uncompressed, s.Points = 1024, s.Points[:1] },
		"truncated":       func(s *Source) { s.Tar = bytes.NewReader(tarball[:len(tarball)/2]) },
	} {
		_, s := source(t, tarball, 100_000)
		change(&s)
		if err := Write(io.Discard, s); err == nil {
			t.Errorf("%s: written", name)
		}
	}
}

func TestUnfit(t *testing.T) {
	global := indextest.Tar(t, tar.FormatPAX, []indextest.Member{
		{H: tar.Header{Name: "pax_global_header", Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "x"}}},
	})
	var when tar.Header
	when.Name, when.ModTime = "late", when.ModTime.AddDate(12000, 0, 0)
	late := indextest.Tar(t, tar.FormatPAX, []indextest.Member{{H: when}})
	for name, tarball := range map[string][]byte{"global header": global, "late": late} {
		_, s := source(t, tarball, 1<<20)
		if err := Write(io.Discard, s); !errors.Is(err, ErrUnfit) {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, s := source(t, indextest.Tar(t, tar.FormatPAX, members()), 1<<20)
	if _, err := Read(write(t, s), s.Compressed+1); !errors.Is(err, index.ErrMalformed) {
		t.Errorf("of another blob: %v", err)
	}
}
