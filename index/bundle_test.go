package index

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"
)

// someBundle is a bundle of a layer at random.
func someBundle(t testing.TB, r *rand.Rand) *Bundle {
	t.Helper()
	c := cut(t, r)
	nf, _, _ := c.layer.Frames.Len()
	b := &Bundle{
		Layer: *c.layer, Digest: "sha256:" + strings.Repeat("a", 64), DiffID: "sha256:" + strings.Repeat("b", 64),
		Size: int64(10 * nf), Uncompressed: int64(len(c.tar)), Format: []string{"tar", "tar+gzip", "tar+zstd"}[r.IntN(3)],
	}
	b.Entries = []Entry{
		{Name: "", Mode: unix.S_IFDIR | 0o755, Mtime: -1, MtimeNs: 5},
		{Name: "link", Mode: unix.S_IFLNK | 0o777, Link: "../x", Xattrs: []Xattr{{"user.a", []byte("1")}, {"user.b", []byte{}}}},
		{Name: "dev", Mode: unix.S_IFCHR | 0o600, Rdev: 0x103, UID: 1 << 31, GID: 7},
	}
	for i, p := range c.pieces {
		b.Entries = append(b.Entries, Entry{Name: strings.Repeat("d/", i%3) + string(rune('a'+i%26)), Mode: unix.S_IFREG | 0o644, Size: p.Size, Data: p.Data})
	}
	b.Entries = append(b.Entries, Entry{Name: "hard", HardLink: true, Link: "dev"})
	return b
}

func written(t testing.TB, b *Bundle) []byte {
	t.Helper()
	var buf bytes.Buffer
	if err := WriteBundle(&buf, b); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func table(f *Frames) (fs []Frame, ps []Piece, size int64) {
	nf, np, size := f.Len()
	for i := range nf {
		fs = append(fs, f.Frame(i))
	}
	for i := range np {
		ps = append(ps, f.Piece(i))
	}
	return fs, ps, size
}

func TestBundle(t *testing.T) {
	for seed := range uint64(50) {
		want := someBundle(t, rand.New(rand.NewPCG(seed, 6)))
		raw := written(t, want)
		got, err := ReadBundle(raw)
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		if !reflect.DeepEqual(got.Entries, want.Entries) {
			t.Errorf("seed %d: the entries differ", seed)
		}
		fs, ps, size := table(want.Frames)
		gotFs, gotPs, gotSize := table(got.Frames)
		if !slices.Equal(fs, gotFs) || !slices.Equal(ps, gotPs) || size != gotSize {
			t.Errorf("seed %d: the frames differ", seed)
		}
		if !bytes.Equal(got.Points.raw, want.Points.raw) {
			t.Errorf("seed %d: the points differ", seed)
		}
		got.Layer, want.Layer = Layer{}, Layer{}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("seed %d: %+v, want %+v", seed, got, want)
		}
	}
	none := &Bundle{Layer: Layer{Frames: newFrames(nil, nil, 0)}, Format: "tar"}
	if b, err := ReadBundle(written(t, none)); err != nil || len(b.Entries) != 0 {
		t.Errorf("of a layer of nothing: %+v, %v", b, err)
	}
	streamed := &Bundle{Layer: Layer{Frames: newFrames([]Frame{{Kind: Stream}}, []Piece{{Size: 1}}, 4096)}}
	if err := WriteBundle(&bytes.Buffer{}, streamed); err == nil {
		t.Error("a frame that takes a pass is shared")
	}
}

func TestHostileBundle(t *testing.T) {
	for name, change := range map[string]func(b *Bundle){
		"size":              func(b *Bundle) { b.Size = -1 },
		"large":             func(b *Bundle) { b.Size = MaxBlobFrame + 1 },
		"uncompressed":      func(b *Bundle) { b.Uncompressed = -1 },
		"much uncompressed": func(b *Bundle) { b.Uncompressed = 1 << 62 },
		"format":            func(b *Bundle) { b.Format = "\x1b[2J" },
		"blob too short":    func(b *Bundle) { b.Size = 5 },
		"name climbs":       func(b *Bundle) { b.Entries[2].Name = "../etc/passwd" },
		"name not clean":    func(b *Bundle) { b.Entries[2].Name = "a//b" },
		"name absolute":     func(b *Bundle) { b.Entries[2].Name = "/a" },
		"name long":         func(b *Bundle) { b.Entries[2].Name = strings.Repeat("a", MaxName+1) },
		"name with NUL":     func(b *Bundle) { b.Entries[2].Name = "a\x00b" },
		"hard link climbs":  func(b *Bundle) { b.Entries[len(b.Entries)-1].Link = "../a" },
		"no type":           func(b *Bundle) { b.Entries[2].Mode = 0o644 },
		"mode of 17 bits":   func(b *Bundle) { b.Entries[2].Mode |= 1 << 16 },
		"nanoseconds":       func(b *Bundle) { b.Entries[2].MtimeNs = 1e9 },
		"empty symlink":     func(b *Bundle) { b.Entries[1].Link = "" },
		"attribute's name":  func(b *Bundle) { b.Entries[2].Xattrs = []Xattr{{"user." + strings.Repeat("a", 300), nil}} },
		"attribute of none": func(b *Bundle) { b.Entries[2].Xattrs = []Xattr{{"", nil}} },
		"attribute's value": func(b *Bundle) { b.Entries[2].Xattrs = []Xattr{{"user.a", make([]byte, MaxXattr+1)}} },
		"attribute twice":   func(b *Bundle) { b.Entries[2].Xattrs = []Xattr{{"user.a", nil}, {"user.a", nil}} },
		"attributes' order": func(b *Bundle) { b.Entries[2].Xattrs = []Xattr{{"user.b", nil}, {"user.a", nil}} },
		"data unaligned":    func(b *Bundle) { b.Entries[3].Data++ },
		"data elsewhere":    func(b *Bundle) { b.Entries[3].Data = 1 << 40 },
		"file too long":     func(b *Bundle) { b.Entries[3].Size = 1 << 40 },
		"file negative":     func(b *Bundle) { b.Entries[3].Size = -1 },
		"no digest":         func(b *Bundle) { edit(b, func(p *Piece) { p.Digest = [sha256.Size]byte{} }) },
		"points missing":    func(b *Bundle) { b.Points = nil },
		"kind":              func(b *Bundle) { rekind(b, Gzip) },
		"kind of streams":   func(b *Bundle) { rekind(b, Stream) },
	} {
		t.Run(name, func(t *testing.T) {
			b := someBundle(t, rand.New(rand.NewPCG(8, 6)))
			if len(b.Entries) < 6 {
				t.Fatal("the layer is too small")
			}
			change(b)
			if _, err := ReadBundle(written(t, b)); !errors.Is(err, ErrMalformed) {
				t.Errorf("got %v", err)
			}
		})
	}
	raw := written(t, someBundle(t, rand.New(rand.NewPCG(8, 6))))
	for n := range raw {
		if _, err := ReadBundle(raw[:n]); !errors.Is(err, ErrMalformed) {
			t.Fatalf("%d of %d bytes: %v", n, len(raw), err)
		}
	}
	r := rand.New(rand.NewPCG(1, 1))
	for range 2000 {
		bad := slices.Clone(raw)
		bad[r.IntN(len(bad))] ^= byte(1 + r.UintN(255))
		if b, err := ReadBundle(bad); err == nil {
			taken(t, b)
		} else if !errors.Is(err, ErrMalformed) {
			t.Fatal(err)
		}
	}
}

// TestBundleIsBounded gives a bundle whose first part says that it is more than it
// may be, and one that is.
func TestBundleIsBounded(t *testing.T) {
	enc, err := zstd.NewWriter(nil, zstd.WithSingleSegment(true))
	if err != nil {
		t.Fatal(err)
	}
	defer enc.Close()
	first := enc.EncodeAll(make([]byte, 1<<20), nil)
	raw := binary.LittleEndian.AppendUint64([]byte(bundleMagic), uint64(len(first)))
	raw = append(raw, first...)
	if _, err := ReadBundle(raw); !errors.Is(err, ErrMalformed) {
		t.Errorf("of zeroes: %v", err)
	}
	// The frame's header: a single segment with eight bytes of size.
	large := append([]byte{0x28, 0xb5, 0x2f, 0xfd, 0xe0}, binary.LittleEndian.AppendUint64(nil, 1<<40)...)
	large = append(large, 3, 0, 0)
	raw = binary.LittleEndian.AppendUint64([]byte(bundleMagic), uint64(len(large)))
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_, err = ReadBundle(append(raw, large...))
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; !errors.Is(err, ErrMalformed) || n > 1<<20 {
		t.Errorf("%d bytes, %v", n, err)
	}
}

// edit changes every piece of a bundle.
func edit(b *Bundle, change func(*Piece)) {
	fs, ps, size := table(b.Frames)
	for i := range ps {
		change(&ps[i])
	}
	b.Frames = newFrames(fs, ps, size)
}

func rekind(b *Bundle, k Kind) {
	fs, ps, size := table(b.Frames)
	for i := range fs {
		fs[i].Kind = k
	}
	b.Frames = newFrames(fs, ps, size)
}

// taken checks what was read of a bundle: it can be merged, and its frames, if the
// rest can be added to them, cover everything once.
func taken(t testing.TB, b *Bundle) {
	t.Helper()
	if err := b.Frames.Verify(); err != nil {
		t.Fatal(err)
	}
	_, _, size := b.Frames.Len()
	for _, e := range b.Entries {
		if e.IsRegular() && (e.Data < 0 || e.Size < 0 || e.Data > size || e.Size > size-e.Data && e.Size > 0) {
			t.Fatalf("%+v in a data file of %d bytes", e, size)
		}
	}
	f, err := WithRest(b.Frames, b.Points, b.Uncompressed)
	if err != nil {
		if !errors.Is(err, ErrMalformed) {
			t.Fatal(err)
		}
		return
	}
	coveredOnce(t, f, b.Points, b.Uncompressed)
}

// FuzzBundle reads what somebody may have pushed beside an image. The first part
// comes decompressed, since a fuzzer finds no zstd frames.
func FuzzBundle(f *testing.F) {
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithSingleSegment(true))
	if err != nil {
		f.Fatal(err)
	}
	dec, err := zstd.NewReader(nil)
	if err != nil {
		f.Fatal(err)
	}
	for seed := range uint64(5) {
		raw := written(f, someBundle(f, rand.New(rand.NewPCG(seed, 7))))
		n := binary.LittleEndian.Uint64(raw[8:])
		head, err := dec.DecodeAll(raw[16:16+n], nil)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(head, raw[16+n:])
	}
	f.Fuzz(func(t *testing.T, head, rest []byte) {
		raw := append([]byte(bundleMagic), make([]byte, 8)...)
		raw = enc.EncodeAll(resummed(head), raw)
		binary.LittleEndian.PutUint64(raw[8:], uint64(len(raw)-16))
		b, err := ReadBundle(append(raw, rest...))
		if err == nil {
			taken(t, b)
		} else if !errors.Is(err, ErrMalformed) {
			t.Error(err)
		}
	})
}

// resummed makes the names of a bundle's first part match their sum.
func resummed(head []byte) []byte {
	about, n := binary.Uvarint(head)
	if n <= 0 || about > uint64(len(head)-n) {
		return head
	}
	from := n + int(about)
	toc, n := binary.Uvarint(head[from:])
	if from += n; n <= 0 || toc > uint64(len(head)-from) || toc < sha256.Size {
		return head
	}
	head = slices.Clone(head)
	body := head[from : from+int(toc)]
	sum := sha256.Sum256(body[:len(body)-sha256.Size])
	copy(body[len(body)-sha256.Size:], sum[:])
	return head
}
