package fetch

import (
	"crypto/sha256"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"sync"

	"github.com/klauspost/compress/zstd"

	"github.com/varvefs/varve/index"
	"github.com/varvefs/varve/index/inflate"
	"github.com/varvefs/varve/index/zstdblocks"
)

const (
	blockSize = 256 << 10
	// wholePiece is up to what size a piece is held in memory and written only
	// once it is verified. A larger one, which none of the known writers makes,
	// is written as it comes into a frame that nobody can read yet.
	wholePiece = 8 << 20
)

// decode reads a frame's compressed bytes from r and writes its pieces, each
// verified, to w. point is where a frame begins that does not begin by itself. sum
// is over what has no digest. Where it fails nothing of the frame counts as
// written.
func decode(r io.Reader, kind index.Kind, point index.Point, pieces []index.Piece, w io.WriterAt) (sum uint32, err error) {
	plain, done, err := decompressor(r, kind, point)
	if err != nil {
		return 0, err
	}
	defer done()
	var at, most int64
	for i := range pieces {
		most = max(most, inMemory(&pieces[i]))
	}
	buf := buffer(most)
	defer giveBack(buf)
	for len(pieces) > 0 {
		p := &pieces[0]
		if p.Inner < at {
			return 0, fmt.Errorf("%w: chunks of a frame overlap at %d", index.ErrMalformed, p.Inner)
		}
		if n, err := io.CopyN(io.Discard, plain, p.Inner-at); err != nil {
			return 0, fmt.Errorf("%w: the frame ends after %d bytes: %w", ErrVerify, at+n, err)
		}
		same := 1 // files that have this chunk: it is read once and written to all
		for same < len(pieces) && pieces[same].Inner == p.Inner && pieces[same].Size == p.Size {
			same++
		}
		if err := decodePiece(plain, pieces[:same], w, (*buf)[:inMemory(p)], &sum); err != nil {
			return 0, err
		}
		at, pieces = p.Inner+p.Size, pieces[same:]
	}
	return sum, nil
}

// inMemory is how much of a piece is in memory at a time.
func inMemory(p *index.Piece) int64 {
	if p.Size <= wholePiece {
		return p.Size
	}
	return blockSize
}

// decodePiece reads a piece, by way of buf, to every place that has it. One that
// fits into buf is written only once it is verified. One without a digest is added
// to sum.
func decodePiece(plain io.Reader, places []index.Piece, w io.WriterAt, buf []byte, sum *uint32) error {
	h := sha256.New()
	proven := places[0].Digest != unknown
	size := places[0].Size
	for at := int64(0); at < size; at += int64(len(buf)) {
		buf = buf[:min(int64(len(buf)), size-at)]
		if n, err := io.ReadFull(plain, buf); err != nil {
			return fmt.Errorf("%w: the frame ends %d bytes into a chunk of %d: %w", ErrVerify, at+int64(n), size, err)
		}
		if proven {
			h.Write(buf)
		} else {
			*sum = crc32.Update(*sum, castagnoli, buf)
		}
		if proven && at+int64(len(buf)) == size {
			if err := check(h, places); err != nil {
				return err
			}
		}
		for i := range places {
			if _, err := w.WriteAt(buf, places[i].Data+at); err != nil {
				return err
			}
		}
	}
	return nil
}

// unknown is the digest of a piece that only its frame's digest proves, or that
// proves a layer whose index others made.
var unknown [sha256.Size]byte

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func check(h hash.Hash, places []index.Piece) error {
	sum := sumOf(h)
	for i := range places {
		if sum != places[i].Digest {
			return mismatch(&places[i], sum)
		}
	}
	return nil
}

func mismatch(p *index.Piece, got [sha256.Size]byte) error {
	return fmt.Errorf("%w: a chunk of %d bytes has sha256:%x, its table of contents says sha256:%x", ErrVerify, p.Size, got, p.Digest)
}

func sumOf(h hash.Hash) (sum [sha256.Size]byte) {
	h.Sum(sum[:0])
	return sum
}

var (
	inflaters   = sync.Pool{New: func() any { return new(inflate.Reader) }}
	zstdReaders = sync.Pool{New: func() any {
		// The window limit is the one that containers/storage and BuildKit keep.
		d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(128<<20))
		if err != nil {
			panic(err) // the options are constant
		}
		return d
	}}
)

// decompressor gives the plain bytes of a frame. done gives its state back.
func decompressor(r io.Reader, kind index.Kind, point index.Point) (plain io.Reader, done func(), err error) {
	switch kind {
	case index.Raw:
		return r, func() {}, nil
	case index.Gzip:
		z := inflaters.Get().(*inflate.Reader)
		z.Reset(r, inflate.Options{})
		return z, func() { z.Reset(nil, inflate.Options{}); inflaters.Put(z) }, nil
	case index.Zstd:
		z := zstdReaders.Get().(*zstd.Decoder)
		done = func() { z.Reset(nil); zstdReaders.Put(z) }
		if err = z.Reset(r); err != nil {
			done()
			return nil, nil, fmt.Errorf("%w: not a zstd frame: %w", ErrVerify, err)
		}
		return z, done, nil
	case index.Deflate:
		z := inflaters.Get().(*inflate.Reader)
		done = func() { z.Reset(nil, inflate.Options{}); inflaters.Put(z) }
		if err = z.Resume(r, point); err != nil {
			done()
			return nil, nil, fmt.Errorf("%w: %w", ErrVerify, err)
		}
		return z, done, nil
	case index.Blocks:
		z, err := zstdblocks.Resume(r, point)
		if err != nil {
			return nil, nil, fmt.Errorf("%w: %w", ErrVerify, err)
		}
		return z, func() { z.Close() }, nil
	}
	return nil, nil, fmt.Errorf("a frame of %v cannot be read by itself", kind)
}
