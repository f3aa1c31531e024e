package fetch

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/varvefs/varve/index"
)

func gz(t testing.TB, p []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	if _, err := w.Write(p); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func zst(t testing.TB, p []byte) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	return w.EncodeAll(p, nil)
}

// deflate gives what follows the header of a gzip member.
func deflate(t testing.TB, p []byte) []byte { return gz(t, p)[10:] }

func raw(_ testing.TB, p []byte) []byte { return p }

// packers make frames that begin by themselves, or at a point that nothing need be
// known of.
var packers = map[index.Kind]func(testing.TB, []byte) []byte{
	index.Raw: raw, index.Gzip: gz, index.Zstd: zst, index.Deflate: deflate, index.Blocks: zst,
}

// packed gives what is plain as a frame of every kind.
func packed(t testing.TB, plain []byte) map[index.Kind][]byte {
	t.Helper()
	blobs := map[index.Kind][]byte{}
	for kind, pack := range packers {
		blobs[kind] = pack(t, plain)
	}
	return blobs
}

func piece(data, inner int64, content []byte) index.Piece {
	return index.Piece{Data: data, Inner: inner, Size: int64(len(content)), Digest: sha256.Sum256(content)}
}

func target(t testing.TB) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "data"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func at(t testing.TB, f *os.File, p index.Piece) []byte {
	t.Helper()
	b := make([]byte, p.Size)
	if _, err := f.ReadAt(b, p.Data); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	return b
}

// trickle gives one byte less than it could, and its end late.
type trickle struct{ r io.Reader }

func (r trickle) Read(p []byte) (int, error) { return r.r.Read(p[:max(1, len(p)-1)]) }

func TestDecode(t *testing.T) {
	plain := noise(wholePiece+3*blockSize+11, 1)
	copy(plain[100:], make([]byte, 5000))
	large := plain[1000 : 1000+wholePiece+blockSize+1]
	blobs := packed(t, plain)
	for name, ps := range map[string][]index.Piece{
		"none":                  nil,
		"all":                   {piece(0, 0, plain)},
		"one in the middle":     {piece(4096, 500, plain[500:900])},
		"neighbours":            {piece(0, 0, plain[:10]), piece(4096, 10, plain[10:5000]), piece(9000, 5000, plain[5000:5001])},
		"gaps":                  {piece(0, 5, plain[5:10]), piece(4096, 4000, plain[4000:5000])},
		"out of order on disk":  {piece(40960, 0, plain[:10]), piece(4096, 10, plain[10:20])},
		"two files share":       {piece(0, 7, plain[7:3007]), piece(8192, 7, plain[7:3007]), piece(16384, 3007, plain[3007:4000])},
		"first ones share":      {piece(0, 0, plain[:3000]), piece(8192, 0, plain[:3000])},
		"many share":            {piece(0, 7, plain[7:9]), piece(4096, 7, plain[7:9]), piece(8192, 7, plain[7:9]), piece(12288, 9, plain[9:20])},
		"exactly held":          {piece(0, 3, plain[3:3+wholePiece])},
		"one byte over":         {piece(0, 3, plain[3:4+wholePiece]), piece(1<<30, 4+wholePiece, plain[4+wholePiece:])},
		"large ones share":      {piece(0, 1000, large), piece(1<<30, 1000, large)},
		"small, large and more": {piece(0, 0, plain[:1000]), piece(4096, 1000, large), piece(1<<30, 1000, large), piece(1<<31, int64(1000+len(large)), plain[1000+len(large):])},
		"small after large":     {piece(4096, 0, plain[:wholePiece+1]), piece(0, wholePiece+1, plain[wholePiece+1:wholePiece+100])},
	} {
		for kind, blob := range blobs {
			t.Run(name+"/"+kind.String(), func(t *testing.T) {
				for _, r := range []io.Reader{bytes.NewReader(blob), trickle{bytes.NewReader(blob)}} {
					f := target(t)
					if _, err := decode(r, kind, index.Point{}, slices.Clone(ps), f); err != nil {
						t.Fatal(err)
					}
					for _, p := range ps {
						if got := at(t, f, p); !bytes.Equal(got, plain[p.Inner:p.Inner+p.Size]) {
							t.Errorf("%d bytes at %d differ", p.Size, p.Data)
						}
					}
				}
			})
		}
	}
}

func TestDecodeRefuses(t *testing.T) {
	plain := noise(wholePiece+blockSize, 1)
	blobs := packed(t, plain)
	wrong := piece(0, 10, plain[10:20])
	wrong.Digest[0] ^= 1
	wrongLarge := piece(0, 10, plain[10:20+wholePiece])
	wrongLarge.Digest[0] ^= 1
	sharer := piece(4096, 10, plain[10:20])
	cut := func(p []byte) []byte { return p[:len(p)-len(p)/4] }
	last := func(p []byte) []byte { return p[:len(p)-1] }
	for name, test := range map[string]struct {
		spoil  func([]byte) []byte
		pieces []index.Piece
		want   error
	}{
		"wrong digest":              {nil, []index.Piece{wrong}, ErrVerify},
		"wrong digest of a sharer":  {nil, []index.Piece{sharer, wrong}, ErrVerify},
		"wrong digest, large":       {nil, []index.Piece{wrongLarge}, ErrVerify},
		"overlap":                   {nil, []index.Piece{piece(0, 0, plain[:10]), piece(4096, 9, plain[9:20])}, index.ErrMalformed},
		"same place, other sizes":   {nil, []index.Piece{piece(0, 5, plain[5:10]), piece(4096, 5, plain[5:20])}, index.ErrMalformed},
		"same place, large":         {nil, []index.Piece{piece(0, 5, plain[5:10]), piece(4096, 5, plain[5:6+wholePiece])}, index.ErrMalformed},
		"backwards":                 {nil, []index.Piece{piece(0, 100, plain[100:200]), piece(4096, 0, plain[:10])}, index.ErrMalformed},
		"past the end":              {nil, []index.Piece{piece(0, int64(len(plain)), []byte("x"))}, ErrVerify},
		"begins past the end":       {nil, []index.Piece{piece(0, int64(len(plain))+10, []byte("x"))}, ErrVerify},
		"ends past the end":         {nil, []index.Piece{piece(0, int64(len(plain))-1, []byte("xy"))}, ErrVerify},
		"cut":                       {cut, []index.Piece{piece(0, int64(len(plain)/2), plain[len(plain)/2:])}, ErrVerify},
		"cut before":                {cut, []index.Piece{piece(0, int64(len(plain))-10, plain[len(plain)-10:])}, ErrVerify},
		"cut, large":                {cut, []index.Piece{piece(0, 0, plain)}, ErrVerify},
		"nothing":                   {func([]byte) []byte { return nil }, []index.Piece{piece(0, 0, plain[:10])}, ErrVerify},
		"one byte missing of large": {last, []index.Piece{piece(0, 0, plain)}, nil}, // of the checksum, unless raw
	} {
		for kind, blob := range blobs {
			t.Run(name+"/"+kind.String(), func(t *testing.T) {
				if test.spoil != nil {
					blob = test.spoil(blob)
				}
				want := test.want
				if want == nil && kind == index.Raw {
					want = ErrVerify
				}
				_, err := decode(bytes.NewReader(blob), kind, index.Point{}, test.pieces, target(t))
				if want == nil {
					if err != nil && !errors.Is(err, ErrVerify) {
						t.Errorf("got %v", err)
					}
				} else if !errors.Is(err, want) {
					t.Errorf("got %v, want %v", err, want)
				}
			})
		}
	}
	for kind, blob := range map[index.Kind][]byte{
		index.Gzip: append(gz(t, plain[:100]), "trailing"...), index.Zstd: append(zst(t, plain[:100]), "trailing"...),
	} {
		f := target(t)
		p := piece(0, 0, plain[:100])
		if _, err := decode(bytes.NewReader(blob), kind, index.Point{}, []index.Piece{p}, f); err != nil || !bytes.Equal(at(t, f, p), plain[:100]) {
			t.Errorf("%v with trailing data: %v", kind, err)
		}
		p = piece(0, 100, []byte("trailing"))
		if _, err := decode(bytes.NewReader(blob), kind, index.Point{}, []index.Piece{p}, f); !errors.Is(err, ErrVerify) {
			t.Errorf("%v: the trailing data was read: %v", kind, err)
		}
	}
	for _, kind := range []index.Kind{0, index.Stream, 9} {
		if _, err := decode(bytes.NewReader(plain), kind, index.Point{}, []index.Piece{piece(0, 0, plain[:1])}, target(t)); err == nil {
			t.Errorf("a frame of %v was read", kind)
		}
	}
}

// TestDecodeCorrupt flips each bit of a small frame: what is written is right, or
// nothing of it is.
func TestDecodeCorrupt(t *testing.T) {
	plain := append(bytes.Repeat([]byte("a varve is a thin layer "), 20), noise(50, 3)...)
	ps := []index.Piece{piece(0, 0, plain[:300]), piece(4096, 300, plain[300:])}
	for kind, pack := range packers {
		blob := pack(t, plain)
		f := target(t)
		for i := range len(blob) * 8 {
			if err := f.Truncate(0); err != nil {
				t.Fatal(err)
			}
			bad := slices.Clone(blob)
			bad[i/8] ^= 1 << (i % 8)
			_, err := decode(bytes.NewReader(bad), kind, index.Point{}, ps, f)
			if err != nil && !errors.Is(err, ErrVerify) {
				t.Fatalf("%v, bit %d: %v", kind, i, err)
			}
			for _, p := range ps {
				got := at(t, f, p)
				if !bytes.Equal(got, plain[p.Inner:p.Inner+p.Size]) && (err == nil || len(bytes.Trim(got, "\x00")) > 0) {
					t.Fatalf("%v, bit %d: wrong bytes were written", kind, i)
				}
			}
		}
	}
}

// brokenDisk fails from a certain offset on.
type brokenDisk struct{ from int64 }

var errDisk = errors.New("no space")

func (d brokenDisk) WriteAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > d.from {
		return 0, errDisk
	}
	return len(p), nil
}

// TestDecodeDiskFails tells a disk that fails from bytes that are wrong: those
// would be asked for again.
func TestDecodeDiskFails(t *testing.T) {
	plain := noise(wholePiece+2*blockSize, 1)
	for _, p := range []index.Piece{piece(0, 0, plain[:100]), piece(0, 0, plain)} {
		for kind, pack := range packers {
			_, err := decode(bytes.NewReader(pack(t, plain)), kind, index.Point{}, []index.Piece{p}, brokenDisk{p.Size / 2})
			if !errors.Is(err, errDisk) || errors.Is(err, ErrVerify) {
				t.Errorf("%v, %d bytes: %v", kind, p.Size, err)
			}
		}
	}
}

func FuzzDecode(f *testing.F) {
	plain := noise(1000, 1)
	for kind, pack := range packers {
		f.Add(pack(f, plain), byte(kind), int64(0), int64(10), int64(10), int64(20))
		f.Add(pack(f, plain), byte(kind), int64(5), int64(10), int64(5), int64(10))
		f.Add(pack(f, plain), byte(kind), int64(990), int64(20), int64(5), int64(10))
	}
	out := target(f)
	f.Fuzz(func(t *testing.T, blob []byte, kind byte, i1, n1, i2, n2 int64) {
		if i1 < 0 || i2 < 0 || n1 <= 0 || n2 <= 0 || n1 > 1<<24 || n2 > 1<<24 || i1 > 1<<30 || i2 > 1<<30 {
			return
		}
		none := [sha256.Size]byte{1} // that of nothing
		ps := []index.Piece{{Inner: i1, Size: n1, Digest: none}, {Data: n1, Inner: i2, Size: n2, Digest: none}}
		if i1+n1 <= int64(len(plain)) {
			ps[0].Digest = sha256.Sum256(plain[i1 : i1+n1])
		}
		if i2+n2 <= int64(len(plain)) {
			ps[1].Digest = sha256.Sum256(plain[i2 : i2+n2])
		}
		if _, err := decode(bytes.NewReader(blob), index.Kind(kind), index.Point{}, ps, out); err != nil {
			return
		}
		for _, p := range ps {
			if sha256.Sum256(at(t, out, p)) != p.Digest {
				t.Errorf("%d bytes at %d of the frame were written and are wrong", p.Size, p.Inner)
			}
		}
	})
}
