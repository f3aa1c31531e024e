package commit

import (
	"context"
	"crypto/sha256"
	"encoding"
	"fmt"
	"hash"
	"io"
	"sync"

	"github.com/opencontainers/go-digest"
)

const (
	markEvery  = 4 << 20  // bytes between the marks in memory
	storeEvery = 64 << 20 // bytes between those that are stored
	showEvery  = 256 << 10
)

// tally is the SHA-256 of a blob's bytes from its start, as far as they were
// read. It can be taken back to any mark: what the registry did not keep is
// read, and so hashed, once more.
type tally struct {
	hash  hash.Hash
	n     int64
	marks []Mark // in order of offset, none beyond n
}

func newTally() *tally { return &tally{hash: sha256.New()} }

func (t *tally) write(p []byte) {
	t.hash.Write(p)
	t.n += int64(len(p))
	last := int64(0)
	if len(t.marks) > 0 {
		last = t.marks[len(t.marks)-1].Offset
	}
	if t.n-last < markEvery {
		return
	}
	if state, err := t.hash.(encoding.BinaryMarshaler).MarshalBinary(); err == nil {
		t.marks = append(t.marks, Mark{t.n, state})
	}
}

// back goes to a state at or before off, the last one there is, from which the
// bytes up to off are still to be written.
func (t *tally) back(off int64) {
	if t.n >= 0 && t.n <= off {
		return
	}
	for len(t.marks) > 0 {
		m := t.marks[len(t.marks)-1]
		if m.Offset <= off && t.hash.(encoding.BinaryUnmarshaler).UnmarshalBinary(m.State) == nil {
			t.n = m.Offset
			return
		}
		t.marks = t.marks[:len(t.marks)-1]
	}
	t.hash.Reset()
	t.n = 0
}

// stored thins the marks out for a Session.
func (t *tally) stored() []Mark {
	var marks []Mark
	next := int64(storeEvery)
	for _, m := range t.marks {
		if m.Offset >= next {
			marks = append(marks, m)
			next = m.Offset + storeEvery
		}
	}
	return marks
}

// load takes a Session's marks, those that are in order and in the blob.
func (t *tally) load(marks []Mark, size int64) {
	t.hash.Reset()
	t.n, t.marks = 0, nil
	last := int64(0)
	for _, m := range marks {
		if m.Offset <= last || m.Offset > size {
			return
		}
		t.marks, last = append(t.marks, m), m.Offset
	}
	if last > 0 {
		t.n = -1 // in no state: back is to find one
	}
}

func (t *tally) sum() digest.Digest {
	return digest.NewDigest(digest.SHA256, t.hash)
}

// body is the part of a blob that one request carries, hashed as it is read.
type body struct {
	u    *upload
	src  io.ReadCloser
	w    *watch
	done <-chan struct{} // closed when the request ends
	left int64

	mu     sync.Mutex // guards what follows, the upload's tally and sent while open
	closed bool
	shown  int64
}

// body opens the blob for the bytes from off to end. What lies between the last
// mark and off is read and hashed but not sent.
func (u *upload) body(ctx context.Context, w *watch, off, end int64) (io.ReadCloser, error) {
	u.tally.back(off)
	w.reading()
	defer w.rest(w.stall)
	from := u.tally.n
	src, err := u.open(ctx, from)
	if err != nil {
		return nil, u.source(err)
	}
	buf := make([]byte, 64<<10)
	for u.tally.n < off {
		n, err := src.Read(buf[:min(int64(len(buf)), off-u.tally.n)])
		u.tally.write(buf[:n])
		u.received(n)
		w.reading()
		if err != nil && u.tally.n < off {
			src.Close()
			return nil, u.source(err)
		}
	}
	return &body{u: u, src: src, w: w, done: ctx.Done(), left: end - off, shown: off}, nil
}

// source gives an error of reading the blob's bytes its name.
func (u *upload) source(err error) error {
	if err == io.EOF {
		err = fmt.Errorf("the blob ends before its %d bytes: %w", u.size, io.ErrUnexpectedEOF)
	}
	return sourceError{err}
}

func (b *body) Read(p []byte) (int, error) {
	if b.left == 0 {
		b.w.rest(b.w.answer)
		return 0, io.EOF
	}
	select {
	case <-b.done:
		return 0, io.ErrClosedPipe
	default:
	}
	if int64(len(p)) > b.left {
		p = p[:b.left]
	}
	b.w.reading()
	n, err := b.src.Read(p) // outside mu, so that Close can end it
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		b.w.stop()
		return 0, io.ErrClosedPipe
	}
	b.w.rest(b.w.stall)
	b.left -= int64(n)
	if b.left == 0 {
		b.w.rest(b.w.answer)
	}
	u := b.u
	u.tally.write(p[:n])
	u.sent = max(u.sent, u.tally.n)
	if u.tally.n/storeEvery != (u.tally.n-int64(n))/storeEvery {
		u.store() // for a push that does not live to see the answer
	}
	u.received(n)
	u.count(func(d *Pushed) { d.Sent += int64(n) })
	if !u.quiet && (u.tally.n-b.shown >= showEvery || b.left == 0) {
		b.shown = u.tally.n
		u.report(u.digest, "Pushing", u.tally.n, u.size)
	}
	switch {
	case err == io.EOF && b.left == 0:
		return n, nil
	case err != nil:
		return n, u.source(err)
	}
	return n, nil
}

// Close ends all reading: a transport may still be at it when it gave an answer.
func (b *body) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return nil
	}
	b.closed = true
	return b.src.Close()
}

// received counts what a blob elsewhere cost to read.
func (u *upload) received(n int) {
	if !u.local && n > 0 {
		u.count(func(d *Pushed) { d.Received += int64(n) })
	}
}
