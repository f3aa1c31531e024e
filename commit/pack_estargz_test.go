package commit

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"io"
	"math/rand/v2"
	"strconv"
	"testing"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// stargzEntries reads the table of contents with eStargz's library.
func stargzEntries(t *testing.T, blob []byte) ([]*estargz.TOCEntry, string) {
	t.Helper()
	var d estargz.GzipDecompressor
	footer := blob[len(blob)-int(d.FooterSize()):]
	_, off, _, err := d.ParseFooter(footer)
	if err != nil {
		t.Fatal(err)
	}
	toc, sum, err := d.ParseTOC(bytes.NewReader(blob[off : len(blob)-len(footer)]))
	if err != nil {
		t.Fatal(err)
	}
	return toc.Entries, sum.String()
}

// TestStargzEntries compares the table of contents with the one that eStargz's
// own writer makes of the same tar.
func TestStargzEntries(t *testing.T) {
	list := sample()
	var ours, theirs bytes.Buffer
	packed := packAll(t, &ours, list, PackOptions{})
	w := estargz.NewWriterLevel(&theirs, gzip.BestSpeed)
	w.ChunkSize = maxChunk
	if err := w.AppendTar(bytes.NewReader(plainTar(t, list))); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Close(); err != nil {
		t.Fatal(err)
	}
	want, _ := stargzEntries(t, theirs.Bytes())
	got, sum := stargzEntries(t, ours.Bytes())
	if d := cmp.Diff(map[string]string{
		"containerd.io/snapshot/stargz/toc.digest": sum,
		"io.containers.estargz.uncompressed-size":  strconv.FormatInt(packed.Uncompressed, 10),
	}, packed.Annotations); d != "" {
		t.Error(d)
	}
	if len(got) == 0 || got[0].Name != ".no.prefetch.landmark" || got[0].Size != 1 {
		t.Fatal("no landmark is the first entry")
	}
	got = got[1:]
	fractions := 0
	for _, e := range got { // the library has whole seconds
		m, err := time.Parse(time.RFC3339, e.ModTime3339)
		if err == nil && m.Nanosecond() != 0 {
			fractions++
			e.ModTime3339 = m.Round(time.Second).Format(time.RFC3339)
		}
	}
	if fractions != 2 {
		t.Errorf("%d entries have fractions of a second, want 2", fractions)
	}
	if d := cmp.Diff(want, got, cmpopts.IgnoreUnexported(estargz.TOCEntry{}),
		cmpopts.IgnoreFields(estargz.TOCEntry{}, "Offset", "InnerOffset")); d != "" {
		t.Error(d)
	}
}

// TestStargzMembers finds every chunk where the table says, alone, and no further
// into its member than that has small files.
func TestStargzMembers(t *testing.T) {
	var b bytes.Buffer
	packAll(t, &b, sample(), PackOptions{})
	blob := b.Bytes()
	entries, _ := stargzEntries(t, blob)
	var size int64
	inner := 0
	begun := map[int64]bool{}
	for _, e := range entries {
		if e.Type == "reg" {
			size = e.Size
		}
		if e.Type != "reg" && e.Type != "chunk" || size == 0 {
			continue
		}
		if begun[e.Offset] == (e.InnerOffset == 0) {
			t.Fatalf("%s: offset %d, inner offset %d: the member's first chunk does not begin it", e.Name, e.Offset, e.InnerOffset)
		}
		begun[e.Offset] = true
		n := e.ChunkSize
		if n == 0 {
			n = size - e.ChunkOffset
		}
		if e.InnerOffset > 0 {
			if inner++; e.InnerOffset+n > int64(stargzForm.group) {
				t.Errorf("%s: %d bytes at %d of a member", e.Name, n, e.InnerOffset)
			}
		}
		z, err := gzip.NewReader(bytes.NewReader(blob[e.Offset:]))
		if err != nil {
			t.Fatal(err)
		}
		z.Multistream(false)
		if _, err := io.CopyN(io.Discard, z, e.InnerOffset); err != nil {
			t.Fatal(err)
		}
		h := sha256.New()
		if _, err := io.CopyN(h, z, n); err != nil {
			t.Fatalf("%s: %v", e.Name, err)
		}
		if got := hexDigest([sha256.Size]byte(h.Sum(nil))); got != e.ChunkDigest {
			t.Errorf("%s at %d: %s, want %s", e.Name, e.ChunkOffset, got, e.ChunkDigest)
		}
	}
	if inner < 400 {
		t.Errorf("%d small files share members", inner)
	}
}

// TestStargzRead reads files, whole and in parts, with eStargz's library.
func TestStargzRead(t *testing.T) {
	list := sample()
	var b bytes.Buffer
	packAll(t, &b, list, PackOptions{})
	r, err := estargz.Open(io.NewSectionReader(bytes.NewReader(b.Bytes()), 0, int64(b.Len())))
	if err != nil {
		t.Fatal(err)
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	for i := range list {
		e := &list[i]
		if len(e.body) == 0 || i > 100 && i%10 != 0 {
			continue
		}
		f, err := r.OpenFile(e.h.Name)
		if err != nil {
			t.Fatal(err)
		}
		for range 3 {
			off := rnd.IntN(len(e.body))
			p := make([]byte, 1+rnd.IntN(min(64<<10, len(e.body)-off)))
			if _, err := f.ReadAt(p, int64(off)); err != nil || !bytes.Equal(p, e.body[off:off+len(p)]) {
				t.Errorf("%s: %d bytes at %d: %v", e.h.Name, len(p), off, err)
			}
		}
	}
	if d, ok := r.Lookup("etc/hard"); !ok || d.Name != "etc/one" {
		t.Errorf("the hard link is %v", d)
	}
}
