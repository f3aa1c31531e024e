package forms

import (
	"bytes"
	"io"
)

const (
	// splitBits gives chunks of 64 KiB on average, as containers/storage cuts
	// them. Its rolling sum is another one: where the cuts fall is the
	// writer's own business.
	splitBits = 16
	// minHole is the shortest run of zeros that becomes a chunk of its own.
	minHole = 1 << 10
)

// gear is the table of a rolling hash over the last 64 bytes.
var gear = func() (table [256]uint64) {
	x := uint64(0)
	for i := range table { // splitmix64
		x += 0x9e3779b97f4a7c15
		z := x
		z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
		z = (z ^ z>>27) * 0x94d049bb133111eb
		table[i] = z ^ z>>31
	}
	return table
}()

// chunker cuts the content of one file by what is in it. Bytes go to write;
// cut ends a chunk, which is a hole when all of it is a long run of zeros.
type chunker struct {
	write func(p []byte) error
	cut   func(hole bool) error

	hash    uint64
	zeros   int64 // read but not yet written
	pending bool  // bytes were written since the last cut
}

var zeroPage [4 << 10]byte

// run cuts all of r.
func (c *chunker) run(r io.Reader, buf []byte) error {
	for {
		n, err := r.Read(buf)
		if werr := c.take(buf[:n]); werr != nil {
			return werr
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
	}
	if err := c.endZeros(); err != nil {
		return err
	}
	return c.end(false)
}

func (c *chunker) take(p []byte) error {
	for len(p) > 0 {
		if p[0] == 0 {
			rest := bytes.TrimLeft(p, "\x00")
			c.zeros += int64(len(p) - len(rest))
			p = rest
			continue
		}
		if err := c.endZeros(); err != nil {
			return err
		}
		// Zeros end a stretch only where they may begin a hole or go on in
		// the next buffer.
		stretch := bytes.Index(p, zeroPage[:minHole])
		if stretch < 0 {
			stretch = len(bytes.TrimRight(p, "\x00"))
		}
		if err := c.data(p[:stretch]); err != nil {
			return err
		}
		p = p[stretch:]
	}
	return nil
}

// endZeros writes the run of zeros that has just ended.
func (c *chunker) endZeros() error {
	n := c.zeros
	c.zeros = 0
	hole := n >= minHole
	if hole {
		if err := c.end(false); err != nil {
			return err
		}
	}
	for n > 0 {
		p := zeroPage[:min(n, int64(len(zeroPage)))]
		n -= int64(len(p))
		if !hole {
			if err := c.data(p); err != nil {
				return err
			}
			continue
		}
		c.pending = true
		if err := c.write(p); err != nil {
			return err
		}
	}
	if hole {
		return c.end(true)
	}
	return nil
}

func (c *chunker) data(p []byte) error {
	begin := 0
	for i, b := range p {
		c.hash = c.hash<<1 + gear[b]
		if c.hash>>(64-splitBits) != 0 {
			continue
		}
		c.pending = true
		if err := c.write(p[begin : i+1]); err != nil {
			return err
		}
		if err := c.end(false); err != nil {
			return err
		}
		begin = i + 1
	}
	if begin == len(p) {
		return nil
	}
	c.pending = true
	return c.write(p[begin:])
}

func (c *chunker) end(hole bool) error {
	if !c.pending {
		return nil
	}
	c.pending = false
	return c.cut(hole)
}
