package inflate

import (
	"bytes"
	"compress/flate"
	"compress/gzip"
	"errors"
	"io"
	"testing"

	"github.com/varvefs/varve/index"
)

// oracle reads a blob with Go's own reader and the rules for what may follow a
// member.
func oracle(blob []byte) ([]byte, error) {
	r := bytes.NewReader(blob)
	z, err := gzip.NewReader(r)
	if err != nil {
		return nil, err
	}
	var all []byte
	for {
		z.Multistream(false)
		p, err := io.ReadAll(io.LimitReader(z, 8<<20))
		if all = append(all, p...); err != nil {
			return all, err
		}
		rest := blob[len(blob)-r.Len():]
		if len(bytes.Trim(rest, "\x00")) == 0 {
			return all, nil
		}
		if err := z.Reset(r); err != nil {
			return all, err
		}
	}
}

// seeds are small blobs of many shapes.
func seeds(f *testing.F) [][]byte {
	var all [][]byte
	data := mixed(3000)
	for _, level := range []int{gzip.HuffmanOnly, 0, 1, 6, 9} {
		all = append(all, compress(f, data[:300], level), flushed(f, data, level, 500))
	}
	return append(all, blocked(f, data), append(compress(f, data, 6), 0, 0, 0), append(compress(f, nil, 6), compress(f, data[:9], 6)...),
		seal([]byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0}, dynamic(map[int]uint{'a': 2, 'b': 2, 256: 2, 257: 2}, 1).code(0, 2).code(3, 2).put(0, 1).code(1, 2).code(2, 2).b, []byte("aaaab")))
}

// FuzzInflate compares with Go's own reader: of a blob, and of raw deflate in a
// member, whose sum no change of a byte would match.
func FuzzInflate(f *testing.F) {
	for _, blob := range seeds(f) {
		f.Add(blob)
	}
	z := new(Reader)
	f.Fuzz(func(t *testing.T, blob []byte) {
		want, oracleErr := oracle(blob)
		z.Reset(bytes.NewReader(blob), Options{})
		got, err := io.ReadAll(z)
		compare(t, got, err, want, oracleErr, blob)

		if len(blob) < 18 {
			return
		}
		raw := blob[10 : len(blob)-8]
		r := bytes.NewReader(raw)
		want, oracleErr = io.ReadAll(flate.NewReader(r))
		got, err = resumed(z, raw)
		if oracleErr == nil {
			// What follows is taken for the member's trailer and the next member.
			z.Reset(bytes.NewReader(seal(blob[:0:0], append([]byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0}, raw[:len(raw)-r.Len()]...), want)), Options{})
			got, err = io.ReadAll(z)
		}
		compare(t, got, err, want, oracleErr, raw)
	})
}

// resumed reads deflate without a header.
func resumed(z *Reader, raw []byte) ([]byte, error) {
	if err := z.Resume(bytes.NewReader(raw), index.Point{}); err != nil {
		return nil, err
	}
	return io.ReadAll(z)
}

func compare(t *testing.T, got []byte, err error, want []byte, oracleErr error, blob []byte) {
	t.Helper()
	if err != nil && !errors.Is(err, index.ErrMalformed) && !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Fatalf("%v for %x", err, blob)
	}
	if (err == nil) != (oracleErr == nil) {
		t.Fatalf("%v, the oracle has %v, for %x", err, oracleErr, blob)
	}
	if err == nil && !bytes.Equal(got, want) || err != nil && !bytes.HasPrefix(got, want) && !bytes.HasPrefix(want, got) {
		t.Fatalf("%d bytes, the oracle has %d, for %x", len(got), len(want), blob)
	}
}

// FuzzResume reads on from all points of a blob, and from where there is none.
func FuzzResume(f *testing.F) {
	for i, blob := range seeds(f) {
		f.Add(blob, uint16(i*100), uint8(i))
	}
	z := new(Reader)
	f.Fuzz(func(t *testing.T, blob []byte, span uint16, bits uint8) {
		var points []index.Point
		z.Reset(bytes.NewReader(blob), every(int64(span), &points))
		want, at, err := parts(z, 1+int(span))
		if len(at) > len(points) && err == nil || len(at) < len(points) {
			t.Fatalf("%d points, %d read at", len(points), len(at))
		}
		step := 1 + len(points)/20
		for i := 0; i < len(points); i += step {
			p := points[i]
			if err := z.Resume(bytes.NewReader(blob[p.Start():]), p); err != nil {
				t.Fatal(err)
			}
			got, again := io.ReadAll(z)
			// The sum of the member cannot be verified.
			if err == nil && again != nil || !bytes.HasPrefix(got, want[p.Out:]) || err == nil && len(got) != len(want[p.Out:]) {
				t.Fatalf("from %d/%d/%d: %d bytes, %v; want %d, %v", p.In, p.Bits, p.Out, len(got), again, len(want[p.Out:]), err)
			}
		}
		p := index.Point{In: 1 + int64(span)%int64(len(blob)+1), Bits: bits, Out: 1 << 30, State: blob}
		if z.Resume(bytes.NewReader(blob[min(int64(len(blob)), max(0, p.Start())):]), p) == nil {
			io.Copy(io.Discard, io.LimitReader(z, 8<<20))
		}
	})
}
