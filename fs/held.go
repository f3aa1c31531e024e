package fs

import (
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
	fd := uintptr(d.Fd())
	return &held{fuse.ReadResultFd(fd, off, int(n)), d, fd, off, int(n)}, nil
}

func (h *held) Done() { h.data.Release() }

// Seekable lets go-fuse splice.
func (h *held) Seekable() (fd uintptr, off int64, n int) { return h.fd, h.off, h.n }

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
