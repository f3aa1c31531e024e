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
	buf   *buffer  // holds contents, given up to the receiver
	bytes []byte   // of it
	zeros int64    // bytes of zeroes
	done  *pending // the piece that ends here and wants its digest
	drop  bool     // the piece that ends here is all zeroes
}

// contents streams one file to the data file.
func (s *scanner) contents(tr *tar.Reader, h *tar.Header, e *index.Entry) error {
	f := file{scanner: s, tr: tr, name: h.Name, e: e, linear: !isSparse(h)}
	if !f.linear {
		if s.sparse += e.Size; s.sparse > maxSparse {
			return fmt.Errorf("%w: %.80q: more than %d bytes in sparse files", index.ErrMalformed, h.Name, int64(maxSparse))
		}
	} else if s.gaps != nil {
		if err := s.gaps.contents(e.Data, e.Size); err != nil {
			return err
		}
		s.in.mute = true
	}
	begin := s.in.n // archive/tar does not read ahead of a file's first byte
	err := f.stream()
	s.in.mute = false
	if err == nil && f.linear && s.in.n != begin+e.Size {
		err = fmt.Errorf("%w: %.80q: %d bytes of tar hold %d of the file", index.ErrMalformed, h.Name, s.in.n-begin, e.Size)
	}
	return err
}

// file is a regular file whose contents pass.
type file struct {
	*scanner
	tr     *tar.Reader
	name   string
	e      *index.Entry
	linear bool // its bytes lie in the tar as they are
	at     int64
	piece  *pending // that bytes are added to; nil where the next one begins one
	zero   bool     // it has been all zeroes so far
}

func (f *file) stream() error {
	for f.at < f.e.Size {
		buf := newBuffer(1)
		spans, err := f.fill(buf)
		if err == nil {
			err = f.write(buf.b[:buf.n], f.e.Data+f.at)
		}
		if err == nil {
			err = f.prove(buf, spans)
		}
		buf.release()
		if err != nil {
			return err
		}
		if f.passing != nil {
			f.passing.Passed(f.e.Data + f.at)
		}
	}
	return f.end()
}

// within says that the bytes of a buffer from an offset on come from a span.
type within struct {
	from  int
	span  int
	inner int64 // where in it, decompressed
}

// fill reads the file's next bytes, as many as fit, and says from which spans.
func (f *file) fill(buf *buffer) (spans []within, err error) {
	want := int(min(int64(len(buf.b)), f.e.Size-f.at))
	for buf.n < want {
		n := want - buf.n
		if f.linear {
			ahead, first, err := f.in.ahead()
			if err == nil {
				n = min(n, ahead)
				if first || buf.n == 0 {
					w := within{from: buf.n, span: f.in.span, inner: f.in.n - f.in.begin}
					if first {
						w.span, w.inner = w.span+1, 0
					}
					spans = append(spans, w)
				}
			}
		} else if buf.n == 0 {
			spans = append(spans, within{span: -1})
		}
		m, err := io.ReadFull(f.tr, buf.b[buf.n:buf.n+n])
		if buf.n += m; err != nil {
			if f.in.err != nil {
				return nil, f.in.err
			}
			return nil, fmt.Errorf("%w: %.80q: contents are truncated: %w", index.ErrMalformed, f.name, err)
		}
	}
	return spans, nil
}

// prove cuts the bytes of a buffer into pieces and has them hashed.
func (f *file) prove(buf *buffer, spans []within) error {
	for i, w := range spans {
		to := buf.n
		if i+1 < len(spans) {
			to = spans[i+1].from
		}
		if f.piece != nil && f.piece.span != w.span {
			if err := f.end(); err != nil {
				return err
			}
		}
		for from := w.from; from < to; {
			if f.piece == nil {
				f.piece = &pending{span: w.span, piece: index.Piece{Data: f.e.Data + f.at, Inner: w.inner + int64(from-w.from)}}
				f.zero = true
			}
			n := int(min(int64(to-from), PieceSize-f.piece.piece.Size))
			if err := f.add(buf, buf.b[from:from+n]); err != nil {
				return err
			}
			from += n
			f.at += int64(n)
			if f.piece.piece.Size == PieceSize {
				if err := f.end(); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// add gives bytes to the piece.
func (f *file) add(buf *buffer, p []byte) error {
	f.piece.piece.Size += int64(len(p))
	if isZero(p) {
		return send(f.ctx, f.proofs, proof{zeros: int64(len(p))})
	}
	f.zero = false
	buf.refs.Add(1)
	err := send(f.ctx, f.proofs, proof{buf: buf, bytes: p})
	if err != nil {
		buf.release()
	}
	return err
}

// end ends the piece, if there is one.
func (f *file) end() error {
	p := f.piece
	if f.piece = nil; p == nil {
		return nil
	}
	if f.zero {
		return send(f.ctx, f.proofs, proof{drop: true})
	}
	f.pieces = append(f.pieces, p)
	return send(f.ctx, f.proofs, proof{done: p})
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
			sum.Write(p.bytes)
			p.buf.release()
			continue
		case p.done != nil:
			sum.Sum(p.done.piece.Digest[:0])
		}
		zeros = 0
		sum.Reset()
	}
}
