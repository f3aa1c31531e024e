package tarscan

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"

	"github.com/varvefs/varve/index"
)

// maxSparse bounds the bytes of a layer's sparse files, holes included: archive/tar
// gives out holes as zeroes, so that a header of a kilobyte can cost minutes.
const maxSparse = 1 << 40

// proof is a step in the hashing of pieces, in their order: contents, zeroes, or
// the end of a piece.
type proof struct {
	buf   *buffer  // contents, given up to the receiver
	zeros int64    // bytes of zeroes
	done  *pending // the piece that ends here and wants its digest
	drop  bool     // the piece that ends here is all zeroes
}

// contents streams one file to the data file.
func (s *scanner) contents(tr *tar.Reader, h *tar.Header, e *index.Entry) error {
	off, err := s.b.Reserve(e.Size)
	if err != nil {
		return fmt.Errorf("%.80q: %w", h.Name, err)
	}
	e.Data = off
	sparse := isSparse(h)
	if sparse {
		if s.sparse += e.Size; s.sparse > maxSparse {
			return fmt.Errorf("%w: %.80q: more than %d bytes in sparse files", index.ErrMalformed, h.Name, int64(maxSparse))
		}
	}
	raw := s.plain && !sparse
	begin := s.in.n // archive/tar does not read ahead of a file's first byte
	for at := int64(0); at < e.Size; {
		size := min(PieceSize, e.Size-at)
		p := &pending{
			frame: index.Frame{Kind: index.Stream},
			piece: index.Piece{Data: off + at, Size: size},
		}
		if raw {
			p.frame = index.Frame{Kind: index.Raw, Offset: begin + at, Length: size}
		}
		zeros, err := s.piece(tr, h.Name, p)
		if err != nil {
			return err
		}
		end := proof{done: p}
		if zeros {
			end = proof{drop: true}
		} else {
			s.pieces = append(s.pieces, p)
		}
		if err := send(s.ctx, s.proofs, end); err != nil {
			return err
		}
		at += size
	}
	if raw && s.in.n != begin+e.Size {
		return fmt.Errorf("%w: %.80q: %d bytes of tar hold %d of the file", index.ErrMalformed, h.Name, s.in.n-begin, e.Size)
	}
	return nil
}

// piece streams one piece and reports whether it is all zeroes.
func (s *scanner) piece(tr *tar.Reader, name string, p *pending) (allZero bool, err error) {
	allZero = true
	for at := int64(0); at < p.piece.Size; {
		buf := newBuffer(1)
		buf.n = int(min(int64(len(buf.b)), p.piece.Size-at))
		if _, err := io.ReadFull(tr, buf.b[:buf.n]); err != nil {
			buf.release()
			if s.in.err != nil {
				return false, s.in.err
			}
			return false, fmt.Errorf("%w: %.80q: contents are truncated: %w", index.ErrMalformed, name, err)
		}
		n := int64(buf.n)
		step := proof{zeros: n}
		if isZero(buf.b[:buf.n]) {
			buf.release()
		} else {
			allZero = false
			if err := s.write(buf.b[:buf.n], p.piece.Data+at); err != nil {
				buf.release()
				return false, err
			}
			step = proof{buf: buf}
		}
		if err := send(s.ctx, s.proofs, step); err != nil {
			buf.releaseIf(step.buf != nil)
			return false, err
		}
		at += n
	}
	return allZero, nil
}

var zeroes [bufferSize]byte

func isZero(p []byte) bool { return bytes.Equal(p, zeroes[:len(p)]) }

// write writes the runs of blocks of p that are not all zeroes. off is a
// multiple of the block's size.
func (s *scanner) write(p []byte, off int64) error {
	flush := func(from, to int) error {
		if from == to {
			return nil
		}
		if _, err := s.sink.WriteAt(p[from:to], off+int64(from)); err != nil {
			return fmt.Errorf("write data file at %d: %w", off+int64(from), err)
		}
		return nil
	}
	from := 0
	for at := 0; at < len(p); at += index.BlockSize {
		end := min(at+index.BlockSize, len(p))
		if !isZero(p[at:end]) {
			continue
		}
		if err := flush(from, at); err != nil {
			return err
		}
		from = end
	}
	return flush(from, len(p))
}

// prove hashes the pieces. Zeroes are hashed only once their piece is known to
// hold something else, so that the holes of a sparse file cost nothing here.
func prove(ctx context.Context, in <-chan proof) error {
	sum := sha256.New()
	var zeros int64
	for {
		var p proof
		var ok bool
		select {
		case p, ok = <-in:
		case <-ctx.Done():
			return ctx.Err()
		}
		if !ok {
			return nil
		}
		zeros += p.zeros
		if p.buf == nil && p.done == nil && !p.drop {
			continue
		}
		for !p.drop && zeros > 0 {
			n := min(zeros, bufferSize)
			sum.Write(zeroes[:n])
			zeros -= n
		}
		switch {
		case p.buf != nil:
			sum.Write(p.buf.b[:p.buf.n])
			p.buf.release()
			continue
		case p.done != nil:
			sum.Sum(p.done.piece.Digest[:0])
		}
		zeros = 0
		sum.Reset()
	}
}
