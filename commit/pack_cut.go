package commit

import (
	"archive/tar"
	"context"
)

const (
	mib = 1 << 20
	// maxChunk is the most bytes of a file in one chunk, and so the most that is
	// fetched and decompressed for one byte of a large file. eStargz's builder
	// has 4 MiB; a quarter of that is no larger to the percent.
	maxChunk = mib
	// headSlack is the room in a frame for headers behind its last chunk.
	headSlack = 64 << 10
)

// form is how the tar is cut for a compression.
type form struct {
	frame int  // bytes of tar after which a frame is complete
	chunk int  // most bytes of a file in one chunk, at most frame; 0: files are cut like all else
	group int  // chunks share a member up to so many bytes of tar; 0: they share none
	roll  bool // chunks end where the content says so
	codec func() (codec, error)
}

// size gives the room in a frame.
func (f form) size() int {
	if f.chunk == 0 {
		return f.frame
	}
	return f.frame + headSlack
}

// cutter takes the bytes of the tar and cuts them into frames, members and
// chunks, by nothing but what they are. It belongs to the goroutine that adds.
type cutter struct {
	form  form
	line  *line
	split *tarSplit // nil but for ZstdChunked
	ctx   context.Context

	f     *frame // the present one, nil before its first byte
	size  int64  // bytes of the entry's content
	left  int64  // of them yet to come
	whole *whole // nil while the file may have but one chunk
	roll  roller
}

// Write takes what tar.Writer writes: contents after begin until all of them
// have come, and headers and padding otherwise.
func (c *cutter) Write(p []byte) (int, error) {
	n := len(p)
	for len(p) > 0 {
		k, err := c.take(p)
		if err != nil {
			return 0, err
		}
		p = p[k:]
	}
	return n, nil
}

func (c *cutter) take(p []byte) (int, error) {
	if c.left == 0 {
		if c.split != nil {
			c.split.head(p)
		}
		return len(p), c.plain(p)
	}
	p = p[:min(int64(len(p)), c.left)]
	if c.split != nil {
		c.split.body(p, int64(len(p)) == c.left)
	}
	if c.form.chunk == 0 {
		c.left -= int64(len(p))
		return len(p), c.plain(p)
	}
	return len(p), c.data(p)
}

// plain takes bytes between which a frame may end anywhere.
func (c *cutter) plain(p []byte) error {
	for len(p) > 0 {
		if c.f != nil && len(c.f.raw) == cap(c.f.raw) {
			c.flush()
		}
		if err := c.need(); err != nil {
			return err
		}
		n := min(len(p), cap(c.f.raw)-len(c.f.raw))
		c.f.raw = append(c.f.raw, p[:n]...)
		p = p[n:]
	}
	return nil
}

// need sees to it that there is a frame.
func (c *cutter) need() (err error) {
	if c.f == nil {
		c.f, err = c.line.frame(c.ctx)
	}
	return err
}

// begin starts an entry whose header has been written and whose content follows.
// It keeps h.
func (c *cutter) begin(h *tar.Header, size int64) error {
	if c.split != nil {
		if err := c.split.file(h, size); err != nil {
			return err
		}
	}
	c.size, c.left, c.whole = size, size, nil
	if c.form.chunk == 0 {
		return nil
	}
	if size == 0 {
		if err := c.need(); err != nil {
			return err
		}
		c.f.items = append(c.f.items, item{head: h, last: true})
		return nil
	}
	c.roll = newRoller()
	return c.open(h)
}

// open starts a chunk, in the present member where the form lets it; h is nil
// for a file's further ones.
//
// A member's first chunk always stands at its beginning: readers take a chunk
// with an inner offset for one that follows another.
func (c *cutter) open(h *tar.Header) error {
	n := int(min(c.left, int64(c.form.chunk)))
	if c.form.roll {
		n = min(n, rollAverage) // more is seen to by room
	}
	if f := c.f; f != nil {
		if !f.holds || len(f.raw)-f.start()+n > c.form.group || len(f.raw)+n > cap(f.raw) {
			f.end()
		}
		if f.start() == len(f.raw) && (len(f.raw) >= c.form.frame || len(f.raw)+n > cap(f.raw)) {
			c.flush()
		}
	}
	if err := c.need(); err != nil {
		return err
	}
	c.item(item{head: h, from: len(c.f.raw), at: c.size - c.left, hole: c.roll.hole})
	return nil
}

// item starts a chunk in the present frame and member.
func (c *cutter) item(it item) {
	it.data, it.member, it.whole = true, len(c.f.members), c.whole
	c.f.items = append(c.f.items, it)
	c.f.holds = true
}

// data takes content of the entry.
func (c *cutter) data(p []byte) error {
	for len(p) > 0 {
		have := len(c.f.raw) - c.f.last().from
		most := c.form.chunk - have
		n, how := min(len(p), most), rollOn
		if c.form.roll {
			n, how = c.roll.next(p[:n], have)
		}
		if n == 0 && have == 0 { // a hole that ended with the chunk before
			c.f.last().hole = false
			continue
		}
		if n == most && how == rollOn {
			how = rollCut
		}
		if err := c.room(n); err != nil {
			return err
		}
		c.f.raw = append(c.f.raw, p[:n]...)
		p = p[n:]
		c.left -= int64(n)
		if how == rollHole {
			c.hole()
		}
		if how != rollCut && c.left > 0 {
			continue
		}
		c.end(len(c.f.raw))
		if c.left > 0 {
			if err := c.open(nil); err != nil {
				return err
			}
		}
	}
	return nil
}

// end ends the present chunk.
func (c *cutter) end(to int) {
	it := c.f.last()
	it.to, it.last = to, c.left == 0 && to == len(c.f.raw)
	if !it.last && c.whole == nil {
		c.whole = &whole{done: make(chan struct{})}
		it.whole = c.whole
	}
	if c.form.group == 0 {
		c.f.endAt(to)
	}
}

// hole makes the zeroes at the end of the present chunk one of their own.
func (c *cutter) hole() {
	c.roll.hole = true
	it := c.f.last()
	from := max(it.from, len(c.f.raw)-minHole)
	if from == it.from {
		it.hole = true
		return
	}
	c.end(from)
	c.item(item{from: from, at: c.size - c.left - int64(len(c.f.raw)-from), hole: true})
}

// room sees to it that n more bytes of the present chunk fit the frame. Where
// they do not, the chunk moves to another frame, which has room for the largest.
func (c *cutter) room(n int) error {
	old := c.f
	if len(old.raw)+n <= cap(old.raw) {
		return nil
	}
	f, err := c.line.frame(c.ctx)
	if err != nil {
		return err
	}
	it := *old.last()
	f.raw = append(f.raw, old.raw[it.from:]...)
	old.raw = old.raw[:it.from]
	old.items = old.items[:len(old.items)-1]
	c.flush()
	it.from = 0
	c.f = f
	c.item(it)
	return nil
}

// flush ends the present frame.
func (c *cutter) flush() {
	if f := c.f; f != nil {
		c.f = nil
		f.end()
		c.line.send(f)
	}
}
