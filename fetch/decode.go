package fetch

import (
	"bufio"
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"sync"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/varvefs/varve/index"
)

const (
	blockSize = 256 << 10
	// wholePiece is up to what size a piece is held in memory and written only
	// once it is verified. A larger one, which none of the known writers makes,
	// is written as it comes into a frame that nobody can read yet.
	wholePiece = 8 << 20
)

// decode reads a frame's compressed bytes from r and writes its pieces, each
// verified, to w. Where it fails nothing of the frame counts as written.
func decode(r io.Reader, kind index.Kind, pieces []index.Piece, w io.WriterAt) error {
	plain, done, err := decompressor(r, kind)
	if err != nil {
		return err
	}
	defer done()
	var at int64
	var last *index.Piece
	var buf []byte
	for i := range pieces {
		p := &pieces[i]
		if last != nil && p.Inner == last.Inner && p.Size == last.Size && buf != nil {
			// One chunk that several files have: written once more, not read.
			if err := write(buf, p, w); err != nil {
				return err
			}
			continue
		}
		if p.Inner < at {
			return fmt.Errorf("%w: chunks of a frame overlap at %d", index.ErrMalformed, p.Inner)
		}
		if n, err := io.CopyN(io.Discard, plain, p.Inner-at); err != nil {
			return fmt.Errorf("%w: the frame ends after %d bytes: %w", ErrVerify, at+n, err)
		}
		if buf, err = decodePiece(plain, p, w, buf); err != nil {
			return err
		}
		at, last = p.Inner+p.Size, p
	}
	return nil
}

// decodePiece gives the piece's bytes, in buf where that is large enough, or nil
// for one too large to hold.
func decodePiece(plain io.Reader, p *index.Piece, w io.WriterAt, buf []byte) ([]byte, error) {
	if p.Size > wholePiece {
		return nil, streamPiece(plain, p, w)
	}
	if int64(cap(buf)) < p.Size {
		buf = make([]byte, p.Size)
	}
	buf = buf[:p.Size]
	if n, err := io.ReadFull(plain, buf); err != nil {
		return nil, fmt.Errorf("%w: the frame ends %d bytes into a chunk of %d: %w", ErrVerify, n, p.Size, err)
	}
	return buf, write(buf, p, w)
}

func write(b []byte, p *index.Piece, w io.WriterAt) error {
	if sum := sha256.Sum256(b); sum != p.Digest {
		return mismatch(p, sum)
	}
	_, err := w.WriteAt(b, p.Data)
	return err
}

func streamPiece(plain io.Reader, p *index.Piece, w io.WriterAt) error {
	h := sha256.New()
	n, err := io.CopyBuffer(struct{ io.Writer }{io.MultiWriter(h, io.NewOffsetWriter(w, p.Data))}, io.LimitReader(plain, p.Size), make([]byte, blockSize))
	if err != nil {
		return err
	}
	if sum := sumOf(h); n != p.Size || sum != p.Digest {
		return mismatch(p, sum)
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
	gzipReaders = sync.Pool{New: func() any { return new(gzip.Reader) }}
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
func decompressor(r io.Reader, kind index.Kind) (plain io.Reader, done func(), err error) {
	switch kind {
	case index.Raw:
		return r, func() {}, nil
	case index.Gzip:
		z := gzipReaders.Get().(*gzip.Reader)
		done = func() { gzipReaders.Put(z) }
		if err = z.Reset(bufio.NewReader(r)); err != nil {
			done()
			return nil, nil, fmt.Errorf("%w: not a gzip frame: %w", ErrVerify, err)
		}
		return z, done, nil
	case index.Zstd:
		z := zstdReaders.Get().(*zstd.Decoder)
		done = func() { z.Reset(nil); zstdReaders.Put(z) }
		if err = z.Reset(r); err != nil {
			done()
			return nil, nil, fmt.Errorf("%w: not a zstd frame: %w", ErrVerify, err)
		}
		return z, done, nil
	}
	return nil, nil, fmt.Errorf("a frame of %v cannot be read by itself", kind)
}
