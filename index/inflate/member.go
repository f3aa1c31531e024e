package inflate

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/varvefs/varve/index"
)

// maxName bounds a member's name and its comment with their zeroes, as Go's own
// reader does.
const maxName = 512

// Flags of a gzip header.
const (
	hasSum = 1 << (iota + 1)
	hasExtra
	hasName
	hasComment
)

// header reads a member's header, or what may follow the last member.
func (z *Reader) header() error {
	z.in.align()
	at := z.in.offset()
	c, err := z.in.byte()
	if err == io.EOF && z.begun {
		return io.EOF
	}
	if err == nil && z.begun && c == 0 {
		return z.padding()
	}
	if err == nil {
		err = z.fields(c)
	}
	if err == io.EOF {
		return fmt.Errorf("gzip header at %d: %w", at, io.ErrUnexpectedEOF)
	}
	if err != nil {
		return err
	}
	z.out.begin()
	z.first = z.out.at(z.out.wr)
	z.whole, z.next = true, block
	return nil
}

// fields reads a header behind its first byte. Where the blob ends it gives
// io.EOF.
func (z *Reader) fields(c byte) error {
	at := z.in.offset() - 1
	sum := crc32.NewIEEE()
	h := [10]byte{c}
	one := make([]byte, 1)
	next := func() (byte, error) {
		c, err := z.in.byte()
		one[0] = c
		sum.Write(one)
		return c, err
	}
	sum.Write(h[:1])
	for i := 1; i < len(h); i++ {
		if i == 1 && c != 0x1f || i == 2 && h[1] != 0x8b {
			return fmt.Errorf("%w: no gzip member at %d: %x", index.ErrMalformed, at, h[:i])
		}
		var err error
		if h[i], err = next(); err != nil {
			return err
		}
	}
	if h[2] != 8 {
		return fmt.Errorf("%w: gzip member at %d: method %d", index.ErrMalformed, at, h[2])
	}
	flags := h[3]
	if flags&hasExtra != 0 {
		lo, _ := next()
		hi, err := next()
		for n := int(hi)<<8 | int(lo); n > 0 && err == nil; n-- {
			_, err = next()
		}
		if err != nil {
			return err
		}
	}
	for _, f := range []byte{hasName, hasComment} {
		if flags&f == 0 {
			continue
		}
		for n := 1; ; n++ {
			c, err := next()
			if err != nil {
				return err
			}
			if c == 0 {
				break
			}
			if n == maxName {
				return fmt.Errorf("%w: gzip member at %d: its name or comment is longer than %d bytes", index.ErrMalformed, at, maxName)
			}
		}
	}
	if flags&hasSum != 0 {
		want := uint16(sum.Sum32())
		lo, _ := next()
		hi, err := next()
		if err != nil {
			return err
		}
		if uint16(hi)<<8|uint16(lo) != want {
			return fmt.Errorf("%w: gzip member at %d: its header does not match its sum", index.ErrMalformed, at)
		}
	}
	return nil
}

// trailer reads a member's, and gives the points that lie in the member.
func (z *Reader) trailer() error {
	z.in.align()
	var t [8]byte
	for i := range t {
		var err error
		if t[i], err = z.in.byte(); err == io.EOF {
			return io.ErrUnexpectedEOF
		} else if err != nil {
			return err
		}
	}
	z.out.add()
	out := z.out.at(z.out.wr)
	if z.whole {
		if sum := binary.LittleEndian.Uint32(t[:]); sum != z.out.sum {
			return fmt.Errorf("%w: gzip member that ends at %d does not match its sum", index.ErrMalformed, z.in.offset())
		}
		if size := binary.LittleEndian.Uint32(t[4:]); size != uint32(out-z.first) {
			return fmt.Errorf("%w: gzip member that ends at %d has %d bytes where %d are wanted", index.ErrMalformed, z.in.offset(), out-z.first, size)
		}
	}
	z.begun, z.next = true, header
	// A point at out may have bytes behind it in the next member, or nothing.
	return z.points.settle(&z.out, out-1)
}

func (z *Reader) padding() error {
	for {
		c, err := z.in.byte()
		if err == io.EOF {
			return io.EOF
		}
		if err != nil {
			return err
		}
		if c != 0 {
			return fmt.Errorf("%w: gzip has other data at %d, behind its zero padding", index.ErrMalformed, z.in.offset()-1)
		}
	}
}
