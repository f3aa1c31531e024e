package zstdblocks

import (
	"bufio"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"

	"github.com/varvefs/varve/index"
)

// bufferSize is for headers: a block that is larger is read past the buffer.
const bufferSize = 4 << 10

// Options say which points are wanted. The zero value makes none.
type Options struct {
	// Want is asked at the beginning of every frame, and of every block within it
	// but the first, whether to make a point there: in is where it begins in the
	// blob, out in the content. A point at a frame's beginning costs nothing and
	// has no State. It is not asked where a point for the same byte is made already,
	// inside frames whose window is larger than 32 MiB, and where so many wait for
	// their State that more would cost too much memory.
	Want func(in, out int64, inFrame bool) bool
	// Point is given each point, in order, once its State is known: a window
	// behind it or at its frame's end. Its State is the caller's. An error ends
	// the reading with that error.
	Point func(index.Point) error
}

// Reader decompresses a blob. It is not safe for concurrent use.
type Reader struct {
	feed    feed
	dec     *zstd.Decoder
	watch   *watcher // nil if no points are wanted
	cur     []byte   // decompressed, of the history
	scratch []byte   // what a State decompresses to
	whole   bool     // nothing of the block has been given
	at      bool     // cur begins at a point
	err     error
}

// NewReader reads the blob r from its beginning. The caller must close what it
// gets, which does not close r.
func NewReader(r io.Reader, o Options) *Reader {
	z := &Reader{feed: feed{r: bufio.NewReaderSize(r, bufferSize)}}
	if o.Want != nil && o.Point != nil {
		z.watch = newWatcher(o)
		z.feed.watch = z.watch
	}
	// One block is decompressed when it is read and not before (concurrency 1),
	// so that it is known where each begins.
	z.dec, z.err = zstd.NewReader(&z.feed, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderMaxMemory(1<<62))
	return z
}

// Resume reads the blob from p on, to its end; r begins at p.Start. The checksum
// of the frame that p is in cannot be verified: who needs the bytes proven must
// have the blob's. A State that is not well formed gives an error here or when it
// is read.
func Resume(r io.Reader, p index.Point) (*Reader, error) {
	if p.Bits != 0 {
		return nil, fmt.Errorf("%w: a point in a zstd blob at bit %d", index.ErrMalformed, p.Bits)
	}
	z := NewReader(r, Options{})
	z.feed.in = p.In
	z.feed.begin = p.In
	if len(p.State) > 0 {
		z.feed.state, z.feed.inState = p.State, true
		z.scratch = make([]byte, maxBlock)
	}
	return z, z.err
}

// Read gives bytes of the content, but never bytes from both sides of a point in
// one call. Its errors wrap [io.ErrUnexpectedEOF] where the blob ends too early,
// and [index.ErrMalformed] where it or a State is not what it should be; what the
// blob's reader or Point failed with is given as it is.
func (z *Reader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if z.watch == nil && z.scratch == nil && len(z.cur) == 0 && z.err == nil {
		n, err := z.dec.Read(p)
		z.err = z.failed(err)
		return n, z.err
	}
	z.fill()
	if len(z.cur) == 0 {
		return 0, z.err
	}
	n := copy(p, z.cur)
	z.cur = z.cur[n:]
	z.whole, z.at = false, false
	return n, nil
}

// AtPoint says whether the byte that the next Read gives first lies at a point. It
// reads what it must to know that.
func (z *Reader) AtPoint() bool {
	if z.watch == nil {
		return false
	}
	z.fill()
	return len(z.cur) > 0 && z.at
}

// InputOffset is how much of the blob has been read for what was given so far; at
// a point, its In.
func (z *Reader) InputOffset() int64 {
	if z.whole && len(z.cur) > 0 {
		return z.feed.begin
	}
	return z.feed.in
}

// Close ends the reading.
func (z *Reader) Close() error {
	if z.watch != nil {
		z.watch.close()
	}
	if z.dec != nil {
		z.dec.Close()
	}
	if z.err == nil {
		z.err = errClosed
	}
	z.cur = nil
	return nil
}

var errClosed = errors.New("read of a closed zstd blob")

// fill sees to it that there are bytes in cur, unless there are no more.
func (z *Reader) fill() {
	for len(z.cur) == 0 && z.err == nil {
		if z.scratch != nil {
			z.resume()
			return
		}
		b, err := z.watch.room()
		if err != nil {
			z.err = err
			return
		}
		begin := z.feed.begin
		n, err := z.dec.Read(b)
		z.watch.hist.wrote(n)
		z.whole, z.at = z.feed.begin != begin || z.watch.made, z.watch.made
		if n > 0 {
			z.cur, z.watch.made = b[:n], false
		}
		z.err = z.failed(err)
		if z.err == nil || z.err == io.EOF {
			if err := z.watch.give(z.err == io.EOF); err != nil {
				z.err = err
			}
		}
	}
}

// resume decompresses the State, whose content nobody wants, and the first bytes
// behind it.
func (z *Reader) resume() {
	var total int64
	for z.err == nil {
		n, err := z.dec.Read(z.scratch)
		z.err = z.failed(err)
		if !z.feed.inState {
			z.cur, z.scratch = z.scratch[:n], nil
			return
		}
		if total += int64(n); total > 2*z.feed.frame.window+2*maxBlock {
			z.err = fmt.Errorf("%w: the state of a point has more than two windows of %d bytes", index.ErrMalformed, z.feed.frame.window)
		}
	}
}

// failed says what an error of the decompressor means.
func (z *Reader) failed(err error) error {
	switch {
	case err == nil:
		return nil
	case z.feed.from != nil:
		return z.feed.from
	case z.feed.err != nil && (z.feed.err != io.EOF || err == io.EOF):
		return z.feed.err
	}
	return fmt.Errorf("%w: zstd frame before %d: %w", index.ErrMalformed, z.feed.in, err)
}
