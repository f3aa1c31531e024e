package fs

import (
	"sync"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// held is a range of a data file on its way to the kernel: nothing of it may be
// dropped before it was sent. It is go-fuse's own result for a descriptor but for
// that.
type held struct {
	fuse.ReadResult
	data Data
	fd   uintptr
	off  int64
	n    int
}

// hold gives [off, off+n) of a data file once it is there.
func hold(d Data, off, n int64) (fuse.ReadResult, error) {
	if err := d.Hold(off, n); err != nil {
		return nil, err
	}
	return send(d, off, n)
}

// send gives [off, off+n) of a data file, which is held and let go when it was sent.
func send(d Data, off, n int64) (fuse.ReadResult, error) {
	if n <= small {
		defer d.Release()
		return read(d.Fd(), off, int(n))
	}
	fd := uintptr(d.Fd())
	return &held{fuse.ReadResultFd(fd, off, int(n)), d, fd, off, int(n)}, nil
}

func (h *held) Done() { h.data.Release() }

// Seekable lets go-fuse splice.
func (h *held) Seekable() (fd uintptr, off int64, n int) { return h.fd, h.off, h.n }

// small is the largest read that is copied: a pipe takes three calls where this
// takes two, which costs more than the second copy of so little.
const small = 32 << 10

// copied is a small range of a data file.
type copied struct {
	buf  *[small]byte
	n    int
	then func() // called when it was sent, if not nil
}

var copies = sync.Pool{New: func() any { return new([small]byte) }}

func read(fd int, off int64, n int) (fuse.ReadResult, error) {
	c := &copied{buf: copies.Get().(*[small]byte)}
	for {
		var err error
		if c.n, err = syscall.Pread(fd, c.buf[:n], off); err == nil {
			return c, nil
		} else if err != syscall.EINTR {
			c.Done()
			return nil, err
		}
	}
}

func (c *copied) Size() int { return c.n }
func (c *copied) Done() {
	copies.Put(c.buf)
	if c.then != nil {
		c.then()
	}
}
func (c *copied) Bytes([]byte) ([]byte, fuse.Status) { return c.buf[:c.n], fuse.OK }

// Slices has go-fuse write the bytes without a pipe.
func (c *copied) Slices() ([][]byte, fuse.Status) { return [][]byte{c.buf[:c.n]}, fuse.OK }

// Readv lets the union's loop read into its own memory.
func (h *held) Readv(dst [][]byte) (int, fuse.Status) {
	var total int
	for _, p := range dst {
		p = p[:min(len(p), h.n-total)]
		n, err := syscall.Pread(int(h.fd), p, h.off+int64(total))
		if err != nil {
			return total, fuse.ToStatus(err)
		}
		if total += n; n < len(p) || total == h.n {
			break
		}
	}
	return total, fuse.OK
}
