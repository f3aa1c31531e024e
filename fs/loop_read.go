package fs

import (
	"encoding/binary"
	"errors"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/hanwen/go-fuse/v2/splice"
	"golang.org/x/sys/unix"
)

// reader answers READs without go-fuse's protocol server, which copies all that
// is read once more and allocates for each request.
type reader interface {
	Read(cancel <-chan struct{}, h *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status)
	// Local reports whether what a node contains is on this machine.
	Local(node uint64) bool
}

const outHeader = 16 // struct fuse_out_header

// answerRead handles a READ and sends what was read, a large result by way of a
// pipe. Interrupts are not for it: no reader is let go before its answer.
func (l *loop) answerRead(b *buffers, n int) {
	h := (*fuse.ReadIn)(unsafe.Pointer(&b.in[0]))
	var r fuse.ReadResult
	st := fuse.EIO
	if n >= int(unsafe.Sizeof(*h)) {
		r, st = l.reads.Read(nil, h, nil)
	}
	if r != nil {
		defer r.Done()
	}
	head := b.out[:outHeader]
	switch r := r.(type) {
	case *copied:
		// Who is answered asks again at once: others are seen before.
		if l.crowd.Load() <= 0 && l.waiting() {
			l.crowd.Store(crowdReads)
		}
		l.send(b.in, st, head, r.buf[:r.n])
	case *held:
		if l.splice(b.in, head, r) {
			return
		}
		b.room(n)
		data := b.out[outHeader:][:r.n]
		n, st := r.Readv([][]byte{data})
		if !st.Ok() {
			n = 0
		}
		l.send(b.in, st, b.out[:outHeader], data[:n])
	default: // an error, or the end of the file
		l.send(b.in, st, head, nil)
	}
}

// mayReadWait reports whether a READ gives the lead away: where it waits for the
// network, where it is so large that the disk has much to do, and where others have
// waited for one of late.
func (l *loop) mayReadWait(request []byte) bool {
	if len(request) < int(unsafe.Sizeof(fuse.ReadIn{})) {
		return false
	}
	if l.crowd.Load() > 0 {
		l.crowd.Add(-1)
		return true
	}
	h := (*fuse.ReadIn)(unsafe.Pointer(&request[0]))
	return h.Size > small || !l.reads.Local(h.NodeId)
}

// waiting reports whether a request waits to be read.
func (l *loop) waiting() bool {
	p := []unix.PollFd{{Fd: int32(l.fd), Events: unix.POLLIN}}
	n, err := unix.Poll(p, 0)
	return err == nil && n > 0 && p[0].Revents&unix.POLLIN != 0
}

// header makes that of an answer to a request.
func header(request []byte, st fuse.Status, head []byte, n int) {
	e := binary.NativeEndian
	e.PutUint32(head[0:], uint32(outHeader+n))
	e.PutUint32(head[4:], uint32(-st))
	copy(head[8:16], request[8:16])
}

func (l *loop) send(request []byte, st fuse.Status, head, data []byte) {
	header(request, st, head, len(data))
	for {
		_, err := unix.Writev(l.fd, [][]byte{head, data})
		if !errors.Is(err, unix.EINTR) {
			l.sent(outHeader+len(data), err)
			return
		}
	}
}

// splice sends what is read by way of a pipe, so that it is copied once. It
// reports whether an answer was sent, or need not be any more.
func (l *loop) splice(request, head []byte, r *held) bool {
	p, err := splice.Get()
	if err != nil {
		return false
	}
	defer splice.Done(p)
	total := outHeader + r.n
	if p.Grow(total+pageSize) != nil { // the last page may be begun twice
		return false
	}
	header(request, fuse.OK, head, r.n)
	if n, err := p.Write(head); err != nil || n != outHeader {
		return false
	}
	if n, err := p.LoadFromAt(r.fd, r.n, r.off); err != nil || n != r.n {
		return false
	}
	_, err = p.WriteTo(uintptr(l.fd), total)
	l.sent(total, err)
	return true
}

const pageSize = 4 << 10
