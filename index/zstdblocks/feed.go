package zstdblocks

import (
	"bufio"
	"errors"
	"fmt"
	"io"

	"github.com/varvefs/varve/index"
)

// feed gives the decompressor a blob, one frame header, block or checksum after
// the other, each only when it asks for it: which it does when all that was before
// has been decompressed and handed out. Skippable frames it keeps to itself.
type feed struct {
	r     *bufio.Reader
	in    int64 // offset in the blob of what r gives next
	state []byte
	// resumed: the first frame began in a State, and its checksum is not to be
	// asked for. inState: r has not been read yet.
	resumed, inState bool

	watch *watcher // nil if no points are wanted
	phase phase
	frame frame
	begin int64 // offset in the blob of the block, or of the frame if it is its first
	small [maxHeader]byte
	block *block
	own   *block // where there is no watcher
	first bool   // the next block is the frame's first
	last  bool   // block is the frame's last

	unit []byte // what the decompressor has not taken yet
	err  error  // why there is no more; io.EOF at the blob's end
	from error  // what r failed with, if it did
}

// phase says what comes next.
type phase uint8

const (
	atFrame phase = iota
	atBlock
	atChecksum
)

func (f *feed) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for len(f.unit) == 0 {
		if f.err == nil {
			f.err = f.next()
		}
		if f.err != nil {
			return 0, f.err
		}
	}
	n := copy(p, f.unit)
	f.unit = f.unit[n:]
	if len(f.unit) == 0 && f.block != nil {
		f.taken()
	}
	return n, nil
}

// taken is called when the decompressor has a whole block.
func (f *feed) taken() {
	if f.watch != nil {
		f.watch.follow(f.block)
		if f.last {
			f.watch.endFrame()
		}
	}
	f.block = nil
}

// next reads the next unit.
func (f *feed) next() error {
	if f.inState && len(f.state) == 0 {
		if f.phase != atBlock {
			return fmt.Errorf("%w: the state of a point is not the beginning of a zstd frame", index.ErrMalformed)
		}
		f.inState = false
	}
	switch f.phase {
	case atFrame:
		return f.nextFrame()
	case atBlock:
		if !f.first {
			f.begin = f.in
		}
		return f.nextBlock()
	}
	f.phase = atFrame
	if err := f.full(f.small[:checksumSize], "the checksum of a zstd frame"); err != nil {
		return err
	}
	if !f.resumed {
		f.unit = f.small[:checksumSize]
	}
	f.resumed = false
	return nil
}

// nextFrame reads the header of the next frame that is not to be skipped.
func (f *feed) nextFrame() error {
	for {
		f.begin = f.in
		if err := f.full(f.small[:magicSize], ""); err != nil {
			return err
		}
		if string(f.small[1:magicSize]) != skipMagic || f.small[0]>>4 != 5 {
			break
		}
		if err := f.skip(); err != nil {
			return err
		}
	}
	if string(f.small[:magicSize]) != frameMagic {
		return fmt.Errorf("%w: no zstd frame at %d: %x", index.ErrMalformed, f.begin, f.small[:magicSize])
	}
	const what = "the header of a zstd frame"
	if err := f.full(f.small[magicSize:magicSize+1], what); err != nil {
		return err
	}
	h := f.small[:headerSize(f.small[magicSize])]
	if err := f.full(h[magicSize+1:], what); err != nil {
		return err
	}
	var err error
	if f.frame, err = parseHeader(h); err != nil {
		return fmt.Errorf("at %d: %w", f.begin, err)
	}
	if f.resumed = f.inState; f.resumed {
		h[magicSize] &^= flagChecksum
	}
	if f.watch != nil {
		f.watch.beginFrame(f.begin, f.frame)
	}
	f.phase, f.first, f.unit = atBlock, true, h
	return nil
}

// skip skips what follows the magic of a skippable frame.
func (f *feed) skip() error {
	b := f.small[magicSize : 2*magicSize]
	const what = "a skippable frame"
	if err := f.full(b, what); err != nil {
		return err
	}
	left := int64(b[0]) | int64(b[1])<<8 | int64(b[2])<<16 | int64(b[3])<<24
	if f.inState {
		return fmt.Errorf("%w: a skippable frame in the state of a point", index.ErrMalformed)
	}
	for left > 0 {
		n, err := f.r.Discard(int(min(left, 1<<20)))
		f.in += int64(n)
		left -= int64(n)
		if err != nil {
			return f.ended(err, what)
		}
	}
	return nil
}

// nextBlock reads the next block.
func (f *feed) nextBlock() error {
	var b *block
	if f.watch != nil {
		b = f.watch.space()
	} else {
		if f.own == nil {
			f.own = new(block)
		}
		b = f.own
	}
	at := f.in
	const what = "a zstd block"
	h := b.buf[lead : lead+blockHeader]
	if err := f.full(h, what); err != nil {
		return err
	}
	v := int(h[0]) | int(h[1])<<8 | int(h[2])<<16
	b.kind, b.size, b.n = uint8(v>>1&3), v>>3, v>>3
	switch {
	case b.kind == blockReserved || b.size > maxBlock || int64(b.size) > f.frame.window:
		return fmt.Errorf("%w: zstd block of kind %d and %d bytes at %d", index.ErrMalformed, b.kind, b.size, at)
	case b.kind == blockRLE:
		b.n = 1
	}
	if err := f.full(b.buf[lead+blockHeader:lead+blockHeader+b.n], what); err != nil {
		return err
	}
	if f.watch != nil {
		f.watch.beginBlock(at, b, f.first)
	}
	f.first, f.last = false, v&1 != 0
	f.block, f.unit = b, b.bytes()
	if !f.last {
		return nil
	}
	if f.inState {
		return fmt.Errorf("%w: the state of a point ends its frame", index.ErrMalformed)
	}
	f.phase = atFrame
	if f.frame.checksum {
		f.phase = atChecksum
	} else {
		f.resumed = false
	}
	return nil
}

// full reads all of b, which is part of what. The blob may end before it if what
// is empty.
func (f *feed) full(b []byte, what string) error {
	if f.inState {
		if len(f.state) < len(b) {
			return fmt.Errorf("%w: the state of a point ends in %s", index.ErrMalformed, what)
		}
		copy(b, f.state)
		f.state = f.state[len(b):]
		return nil
	}
	n, err := io.ReadFull(f.r, b)
	f.in += int64(n)
	switch {
	case err == nil:
		return nil
	case err == io.EOF && what == "":
		return io.EOF
	case what == "":
		what = "the magic number of a zstd frame"
	}
	return f.ended(err, what)
}

// ended says why what could not be read.
func (f *feed) ended(err error, what string) error {
	if err == io.EOF || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("the blob ends at %d in %s: %w", f.in, what, io.ErrUnexpectedEOF)
	}
	f.from = err
	return err
}
