package soci

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strings"

	flatbuffers "github.com/google/flatbuffers/go"

	"github.com/varvefs/varve/index"
)

// The points of a gzip blob (ztoc/compression/gzip_zinfo.h), in little endian:
// their number, the span size, and for each its offsets, bits and window. The
// first layout leaves the first point out and takes it to lie behind a gzip
// header without a name.
const (
	checkpointHeader = 4 + 8
	windowSize       = 32 << 10
	checkpointSize   = 8 + 8 + 1 + windowSize
	plainGzipHeader  = 10 // bytes

	digestPrefix = "sha256:"
	digestSize   = len(digestPrefix) + 2*sha256.Size
)

// spans are the parts of a blob that can be decompressed each on its own.
type spans struct {
	kind   index.Kind
	blob   int64         // bytes of the blob
	size   int64         // bytes of the tar
	at     []index.Point // without states and digests
	points *pending
}

func readSpans(info table, blob, size int64) (*spans, error) {
	digests := info.vector(infoDigests)
	if digests.n > index.MaxPoints || digests.n*digestSize > len(info.Bytes) {
		return nil, fmt.Errorf("%w: %d digests of spans in %d bytes", index.ErrMalformed, digests.n, len(info.Bytes))
	}
	if last := int32(info.uint32(infoMaxSpan)); digests.n == 0 || int64(last) != int64(digests.n)-1 {
		return nil, fmt.Errorf("%w: %d digests of spans, the last of which is %d", index.ErrMalformed, digests.n, last)
	}
	sums := make([][sha256.Size]byte, digests.n)
	for i := range sums {
		var err error
		if sums[i], err = digest(digests.text(i)); err != nil {
			return nil, fmt.Errorf("span %d: %w", i, err)
		}
	}
	s := &spans{blob: blob, size: size}
	var windows []byte // of the points that bring one: the last ones
	var err error
	switch a := info.byte(infoAlgorithm, algorithmGzip); a {
	case algorithmGzip:
		s.kind = index.Deflate
		windows, err = s.gzip(info.bytes(infoCheckpoints), len(sums))
	case algorithmUncompressed:
		s.kind, s.size = index.Raw, blob
		err = s.plain(info.bytes(infoCheckpoints), len(sums))
		if err == nil && size > blob {
			err = fmt.Errorf("%w: %d bytes of tar in a blob of %d", index.ErrMalformed, size, blob)
		}
	default:
		err = fmt.Errorf("%w: compression algorithm %d", index.ErrMalformed, a)
	}
	if err == nil {
		err = s.check()
	}
	if err != nil {
		return nil, err
	}
	s.points = gather(s.at, sums, windows)
	return s, nil
}

func digest(s string) (d [sha256.Size]byte, err error) {
	h, ok := strings.CutPrefix(s, digestPrefix)
	if !ok || len(s) != digestSize || strings.ToLower(h) != h {
		return d, fmt.Errorf("%w: digest %.80q", index.ErrMalformed, s)
	}
	if _, err := hex.Decode(d[:], []byte(h)); err != nil {
		return d, fmt.Errorf("%w: digest %.80q", index.ErrMalformed, s)
	}
	return d, nil
}

// gzip reads n points of a gzip blob and gives the records of those that are in
// raw.
func (s *spans) gzip(raw []byte, n int) (records []byte, err error) {
	if len(raw) < checkpointHeader {
		return nil, fmt.Errorf("%w: points in %d bytes", index.ErrMalformed, len(raw))
	}
	have := int64(int32(binary.LittleEndian.Uint32(raw)))
	records = raw[checkpointHeader:]
	s.at = make([]index.Point, 0, n)
	switch int64(len(records)) {
	case have * checkpointSize:
	case (have - 1) * checkpointSize:
		s.at = append(s.at, index.Point{In: plainGzipHeader})
	default:
		return nil, fmt.Errorf("%w: %d points in %d bytes", index.ErrMalformed, have, len(raw))
	}
	if have != int64(n) {
		return nil, fmt.Errorf("%w: %d points of %d spans", index.ErrMalformed, have, n)
	}
	for r := records; len(r) > 0; r = r[checkpointSize:] {
		s.at = append(s.at, index.Point{
			In: int64(binary.LittleEndian.Uint64(r)), Out: int64(binary.LittleEndian.Uint64(r[8:])), Bits: r[16],
		})
	}
	return records, nil
}

// plain makes the points of a blob that is the tar.
func (s *spans) plain(raw []byte, n int) error {
	t := table{flatbuffers.Table{Bytes: raw, Pos: flatbuffers.GetUOffsetT(raw)}}
	size, step := t.int64(tarinfoSize), t.int64(tarinfoSpanSize)
	if size != s.blob || step <= 0 || (size-1)/step != int64(n)-1 {
		return fmt.Errorf("%w: %d spans of %d bytes of a blob of %d", index.ErrMalformed, n, step, size)
	}
	s.at = make([]index.Point, n)
	for i := range s.at {
		s.at[i].In, s.at[i].Out = int64(i)*step, int64(i)*step
	}
	return nil
}

// check refuses points that are out of order or of bounds. Two may lie at one
// place of the tar: a block may hold nothing.
func (s *spans) check() error {
	var in, out int64
	for i, p := range s.at {
		if p.Bits > 7 || p.Start() < 0 || i > 0 && p.In <= in || p.Out < out || p.In >= s.blob || p.Out > s.size || i == 0 && p.Out != 0 {
			return fmt.Errorf("%w: point %d at %d+%d bits of a blob of %d bytes, %d of a tar of %d", index.ErrMalformed, i, p.In, p.Bits, s.blob, p.Out, s.size)
		}
		if n := s.end(i) - p.Start(); n > index.MaxBlobFrame {
			return fmt.Errorf("%w: span of %d bytes, the limit is %d", index.ErrMalformed, n, int64(index.MaxBlobFrame))
		}
		in, out = p.In, p.Out
	}
	return nil
}

// end gives where span i ends in the blob. The byte before may be the next one's
// as well.
func (s *spans) end(i int) int64 {
	if i+1 < len(s.at) {
		return s.at[i+1].In
	}
	return s.blob
}

// lay adds a frame for each span, and the pieces of the tar in the order of the
// data file: the contents of files where they are, then all else without a gap.
func (s *spans) lay(b *index.Builder, files []extent) error {
	for i, p := range s.at {
		b.AddFrame(index.Frame{Offset: p.Start(), Length: s.end(i) - p.Start(), Kind: s.kind, Point: i + 1})
	}
	rest := s.size
	c := cutter{spans: s, b: b}
	for _, f := range files {
		c.cut(f.tar, f.size, f.data)
		rest -= f.size
	}
	data, err := b.Reserve(rest)
	if err != nil {
		return err
	}
	c = cutter{spans: s, b: b}
	var at int64
	gap := func(to int64) {
		c.cut(at, to-at, data)
		data += to - at
	}
	for _, f := range files {
		gap(f.tar)
		at = f.tar + f.size
	}
	gap(s.size)
	return nil
}

// cutter cuts ranges of the tar, in its order, where spans end.
type cutter struct {
	*spans
	b    *index.Builder
	span int
}

func (c *cutter) cut(tar, size, data int64) {
	for size > 0 {
		for c.span+1 < len(c.at) && c.at[c.span+1].Out <= tar {
			c.span++
		}
		n := size
		if c.span+1 < len(c.at) {
			n = min(n, c.at[c.span+1].Out-tar)
		}
		c.b.AddPiece(index.Piece{Data: data, Size: n, Frame: c.span, Inner: tar - c.at[c.span].Out})
		tar, size, data = tar+n, size-n, data+n
	}
}

// pending are points that are being gathered.
type pending struct {
	done   chan struct{}
	points *index.Points
	err    error
}

// gather packs the points while their layer's entries are read: compressing the
// windows takes as long. It keeps the slices until it is waited for.
func gather(at []index.Point, sums [][sha256.Size]byte, records []byte) *pending {
	p := &pending{done: make(chan struct{})}
	go func() {
		defer close(p.done)
		var w index.PointsWriter
		without := len(at) - len(records)/checkpointSize // points that bring no window
		for i, q := range at {
			q.Digest = sums[i]
			if i >= without {
				r := records[(i-without)*checkpointSize:][:checkpointSize]
				q.State = state(r[checkpointSize-windowSize:], q.Out)
			}
			if p.err = w.Add(q); p.err != nil {
				return
			}
		}
		p.points = w.Points()
	}()
	return p
}

func (p *pending) wait() (*index.Points, error) {
	<-p.done
	return p.points, p.err
}

// state gives what of a window can have been written before out. Its zeroes may be
// what the layer has there.
func state(window []byte, out int64) []byte {
	if out < windowSize {
		window = window[windowSize-out:]
	}
	return window
}
