package tarscan

import (
	"context"
	"crypto/sha256"
	"hash"
	"io"
	"sync/atomic"

	"github.com/varvefs/varve/index"
)

const (
	// DefaultSpan is how many bytes of the decompressed blob lie between two
	// points: some 200 KB of the blob, about what is fetched at least.
	DefaultSpan = 512 << 10
	// DefaultDigestSpan is how many bytes a digest of the blob's own bytes
	// covers: what SOCI takes for a span.
	DefaultDigestSpan = 4 << 20

	// Points are made less often where they would take more than this share of
	// the decompressed blob, digests where a zTOC would, but not less often than
	// maxDigestSpan.
	pointsShare   = 150 // one part in
	ztocShare     = 105
	ztocPoint     = 32<<10 + 17 + 80 // bytes of a zTOC for a point: window, offsets, digest
	ztocEntry     = 62               // and for an entry, beside its name
	maxDigestSpan = 16 << 20
)

// spans chooses the points of a pass and keeps them.
type spans struct {
	span, digestSpan int64
	fixed            bool         // the digests' spans were asked for
	named            atomic.Int64 // bytes of a zTOC for the entries so far
	points           index.PointsWriter
	chosen           int   // points so far; their states come later
	digested         []int // those that begin a digest
	confirmed        int   // of these, how many were made
	last, lastDigest int64 // where in the decompressed blob
	marks            chan mark
	ctx              context.Context
	digests          [][sha256.Size]byte
}

// mark says how far the blob may be hashed, whether a digest ends there and
// another begins, and whether the last one that began stays: a point behind which
// nothing comes is none.
type mark struct {
	upto  int64
	cut   bool
	bits  uint8 // of the byte before that belong to the next digest's span
	stays bool
}

func newSpans(ctx context.Context, c Compression, o Options) *spans {
	s := &spans{ctx: ctx, span: o.Span, digestSpan: o.DigestSpan, fixed: o.DigestSpan != 0}
	if s.span == 0 {
		s.span = DefaultSpan
	}
	if s.digestSpan == 0 {
		s.digestSpan = DefaultDigestSpan
	}
	s.span = min(s.span, s.digestSpan)
	if c == Plain {
		s.span = max(s.digestSpan/plainSpans, index.BlockSize)
	}
	return s
}

// want decides about a point, at a block's beginning.
func (s *spans) want(in int64, bits uint8, out int64) bool {
	if s.chosen > 0 && (out-s.last < s.span || s.points.Bytes() > out/pointsShare || s.chosen >= index.MaxPoints) {
		return false
	}
	if s.marks != nil && (s.chosen == 0 || out-s.lastDigest > s.digestSpan && s.affords(out)) {
		if send(s.ctx, s.marks, mark{upto: in, cut: true, bits: bits}) != nil {
			return false
		}
		s.digested = append(s.digested, s.chosen)
		s.lastDigest = out
	}
	s.chosen++
	s.last = out
	return true
}

// affords reports whether one more digest keeps a zTOC small.
func (s *spans) affords(out int64) bool {
	size := s.named.Load() + int64(len(s.digested)+1)*ztocPoint
	return s.fixed || size <= out/ztocShare || out-s.lastDigest > maxDigestSpan
}

// made keeps a point that want chose.
func (s *spans) made(p index.Point) error {
	i := s.points.Len()
	if err := s.points.Add(p); err != nil {
		return err
	}
	if s.confirmed < len(s.digested) && s.digested[s.confirmed] == i {
		s.confirmed++
		return send(s.ctx, s.marks, mark{stays: true})
	}
	return nil
}

// blockSpans is how many times farther points inside a zstd frame lie apart than
// others: what they must know of the window is far more than what gzip's must.
const blockSpans = 16

// wantBlock is want for zstd, where only a frame's beginning costs nothing.
func (s *spans) wantBlock(in, out int64, inFrame bool) bool {
	if inFrame && s.chosen > 0 && out-s.last < blockSpans*s.span {
		return false
	}
	return s.want(in, 0, out)
}

// end gives the points, with their digests.
func (s *spans) end() *index.Points {
	for i, d := range s.digests {
		if k := s.digested[i]; k < s.points.Len() {
			s.points.Digest(k, d)
		}
	}
	return s.points.Points()
}

// hash makes the digests of spans out of the blob's own bytes. It takes whatever
// it is sent at once, so that nobody waits for it: marks come when the bytes
// before them were decompressed, and no more bytes are on their way than the
// other stages hold.
func (s *spans) hash(bufs <-chan *buffer) error {
	q := &queue{}
	defer q.release()
	marks := s.marks
	for bufs != nil || marks != nil {
		select {
		case b, ok := <-bufs:
			if !ok {
				bufs = nil
				continue
			}
			q.add(b)
		case m, ok := <-marks:
			if !ok {
				marks = nil
				continue
			}
			for q.end < m.upto { // the decompressor was given these before
				select {
				case b := <-bufs:
					q.add(b)
				case <-s.ctx.Done():
					return s.ctx.Err()
				}
			}
			q.hash(m.upto)
			switch {
			case m.cut:
				s.cut(q)
				q.begin(m.bits > 0)
			case m.stays:
				if q.unsure--; q.unsure == 0 {
					q.before = nil
				}
			}
		case <-s.ctx.Done():
			return s.ctx.Err()
		}
	}
	q.hash(1 << 62)
	if q.unsure > 0 && q.before != nil { // the last one does not stay
		q.sum = q.before
		s.digests = s.digests[:len(s.digests)-1]
	}
	s.cut(q)
	return nil
}

// plainSpans is how many spans of a blob that is the tar a digest covers: points
// cost nothing there.
const plainSpans = 16

// every reads a blob that is the tar and has a point every so many bytes.
type every struct {
	r    io.Reader
	span int64
	n    int64
}

func (e *every) Read(p []byte) (int, error) {
	n, err := e.r.Read(p[:min(int64(len(p)), e.span-e.n%e.span)])
	e.n += int64(n)
	return n, err
}

func (e *every) atPoint() bool { return e.n%e.span == 0 }

// hashPlain makes the points of a blob that is the tar, and their digests.
func (s *spans) hashPlain(bufs <-chan *buffer) error {
	q := &queue{}
	defer q.release()
	for {
		select {
		case b, ok := <-bufs:
			if !ok {
				s.cut(q)
				return nil
			}
			q.add(b)
			for ; s.last < q.end; s.last += s.span {
				if s.chosen%plainSpans == 0 {
					q.hash(s.last)
					s.cut(q)
					q.begin(false)
					q.before, q.unsure = nil, 0
					s.digested = append(s.digested, s.chosen)
				}
				s.chosen++
				if err := s.points.Add(index.Point{In: s.last, Out: s.last}); err != nil {
					return err
				}
			}
			q.hash(q.end)
		case <-s.ctx.Done():
			return s.ctx.Err()
		}
	}
}

// cut ends a digest, if one was begun.
func (s *spans) cut(q *queue) {
	if q.sum != nil {
		s.digests = append(s.digests, [sha256.Size]byte(q.sum.Sum(nil)))
	}
}

// queue is what of the blob waits to be hashed.
type queue struct {
	bufs []*buffer
	from int       // in the first of them
	at   int64     // in the blob
	end  int64     // of what came, in the blob
	last byte      // that was hashed
	sum  hash.Hash // nil before the first digest begins

	before hash.Hash // the sum before this one, until that is known to stay
	unsure int       // how many are not known to; of them only the last may not
}

func (q *queue) add(b *buffer) {
	q.bufs = append(q.bufs, b)
	q.end += int64(b.n)
}

func (q *queue) begin(withLast bool) {
	q.before, q.sum = q.sum, sha256.New()
	q.unsure++
	if withLast {
		q.sum.Write([]byte{q.last})
	}
}

// hash takes the bytes before upto out of the queue.
func (q *queue) hash(upto int64) {
	for q.at < upto && len(q.bufs) > 0 {
		b := q.bufs[0]
		p := b.b[q.from:b.n]
		p = p[:min(int64(len(p)), upto-q.at)]
		if len(p) > 0 {
			if q.sum != nil {
				q.sum.Write(p)
			}
			if q.before != nil {
				q.before.Write(p)
			}
			q.last = p[len(p)-1]
		}
		q.at += int64(len(p))
		if q.from += len(p); q.from == b.n {
			b.release()
			q.bufs, q.from = q.bufs[1:], 0
		}
	}
}

func (q *queue) release() {
	for _, b := range q.bufs {
		b.release()
	}
}
