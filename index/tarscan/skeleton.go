package tarscan

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"

	"github.com/varvefs/varve/index"
)

// A skeleton is a tar without its files' contents: compressed with zstd, in turn
// the length of what is no contents, that itself, and where in the data file
// contents lie that come next (offset and length, both 0 at the end). With the
// data file it gives the tar again, byte by byte.
type skeletonWriter struct {
	enc *zstd.Encoder
	gap []byte
}

// maxGap bounds what lies between the contents of two files.
const maxGap = 1 << 30

func newSkeletonWriter(w io.Writer) (*skeletonWriter, error) {
	enc, err := zstd.NewWriter(w, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithWindowSize(1<<20))
	return &skeletonWriter{enc: enc}, err
}

// add takes bytes that are no contents. Long runs are passed on in parts.
func (s *skeletonWriter) add(p []byte) error {
	s.gap = append(s.gap, p...)
	if len(s.gap) < 1<<20 {
		return nil
	}
	return s.contents(0, 0)
}

// contents says that n bytes come that lie at off of the data file.
func (s *skeletonWriter) contents(off, n int64) error {
	b := binary.AppendUvarint(nil, uint64(len(s.gap)))
	if _, err := s.enc.Write(b); err != nil {
		return err
	}
	if _, err := s.enc.Write(s.gap); err != nil {
		return err
	}
	s.gap = s.gap[:0]
	_, err := s.enc.Write(binary.AppendUvarint(binary.AppendUvarint(b[:0], uint64(off)), uint64(n)))
	return err
}

func (s *skeletonWriter) close() error {
	if err := s.contents(0, 0); err != nil {
		return err
	}
	return s.enc.Close()
}

// Tar is a layer's tar made of its skeleton and its data file. It can be read
// and passed over, not gone back in. Close it.
type Tar struct {
	dec  *zstd.Decoder
	in   *bufio.Reader
	data io.ReaderAt
	gap  int64 // bytes left before contents
	off  int64 // of the contents in the data file
	n    int64 // bytes left of them
	next bool  // contents follow the gap
	at   int64
	err  error
}

// OpenSkeleton gives the tar of a skeleton. Contents are read from data.
func OpenSkeleton(r io.Reader, data io.ReaderAt) (*Tar, error) {
	dec, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(1<<20))
	if err != nil {
		return nil, err
	}
	return &Tar{dec: dec, in: bufio.NewReader(dec), data: data}, nil
}

// Close gives up what the reader holds; the skeleton's own reader stays open.
func (t *Tar) Close() { t.dec.Close() }

// step finds what comes next when all before it is read.
func (t *Tar) step() error {
	for t.err == nil && t.gap == 0 && t.n == 0 {
		var v [2]uint64
		if t.next {
			t.next = false
			for i := range v {
				if v[i], t.err = binary.ReadUvarint(t.in); t.err != nil {
					break
				}
			}
			if v[0] > index.MaxDataSize || v[1] > index.MaxDataSize-v[0] {
				t.err = fmt.Errorf("%w: a skeleton that names %d bytes at %d", index.ErrMalformed, v[1], v[0])
			}
			t.off, t.n = int64(v[0]), int64(v[1])
		} else {
			if v[0], t.err = binary.ReadUvarint(t.in); t.err == nil && v[0] > maxGap {
				t.err = fmt.Errorf("%w: %d bytes between two files", index.ErrMalformed, v[0])
			}
			t.gap, t.next = int64(v[0]), true
			if errors.Is(t.err, io.EOF) {
				return io.EOF
			}
		}
		if t.err == io.EOF {
			t.err = io.ErrUnexpectedEOF
		}
		if t.err != nil {
			t.gap, t.n = 0, 0
		}
	}
	return t.err
}

func (t *Tar) Read(p []byte) (n int, err error) {
	if err := t.step(); err != nil || len(p) == 0 {
		return 0, err
	}
	if t.gap > 0 {
		n, err = t.in.Read(p[:min(int64(len(p)), t.gap)])
		t.gap -= int64(n)
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
	} else {
		p = p[:min(int64(len(p)), t.n)]
		if n, err = t.data.ReadAt(p, t.off); n == len(p) {
			err = nil
		} else if err == nil || err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		t.n -= int64(n)
		t.off += int64(n)
	}
	t.at += int64(n)
	return n, err
}

// Seek passes over bytes; contents that are passed over are not read.
func (t *Tar) Seek(off int64, whence int) (int64, error) {
	if whence == io.SeekStart {
		off -= t.at
	} else if whence != io.SeekCurrent {
		off = -1
	}
	if off < 0 {
		return 0, fmt.Errorf("seek in a tar: %w", errors.ErrUnsupported)
	}
	for off > 0 {
		if err := t.step(); err != nil {
			return t.at, err
		}
		var n int64
		if t.gap > 0 {
			d, err := t.in.Discard(int(min(off, t.gap)))
			n = int64(d)
			t.gap -= n
			if err != nil {
				return t.at, io.ErrUnexpectedEOF
			}
		} else {
			n = min(off, t.n)
			t.n -= n
			t.off += n
		}
		off -= n
		t.at += n
	}
	return t.at, nil
}
