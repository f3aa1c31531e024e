package fs

import (
	"encoding/binary"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// A loop answers the requests of a connection. Mostly one thread does it all:
// it reads a request, handles it and writes the answer, so that a program that
// does one thing after another meets the same warm thread each time, and nobody
// else is woken. go-fuse's own server has several threads read in turns, which
// costs a request as much again.
//
// A request that may take long (it waits for a disk, or for the network) is not
// let hold up others: the thread that has it gives the lead away before, where
// the request tells, or has it taken away by the watch, where one turns out to take
// longer than a tick. Giving it away costs half as much as the reading of a page
// from a disk: what reads of it, and nobody else asks, keeps the lead.
type loop struct {
	*conn
	server *fuse.ProtocolServer
	reads  reader // nil where server answers READs too
	log    *slog.Logger
	most   int // bytes of the largest request

	// turn counts what the leader does: even while it reads, odd while it
	// handles. Who changes it from odd leads.
	turn    atomic.Uint64
	crowd   atomic.Int32  // READs to come that are to give the lead away, others having waited for one
	idle    chan struct{} // wakes the watch
	resting atomic.Bool   // the watch sleeps until it is woken
	ended   chan struct{}
	threads sync.WaitGroup
	spare   chan *buffers
}

// buffers are those of a thread. What is spare is kept: made anew for each thread
// that takes the lead they would cost more than what it does.
type buffers struct{ in, out []byte }

const (
	maxSpare = 8                // buffers that are kept for threads to come
	besides  = 1 << 12          // more than any request or answer has beside its data
	ordinary = 64<<10 + besides // of what is no READ, WRITE or READDIR: an extended attribute
)

// room has out hold the answer to the request: a READ's and a READDIR's may be as
// long as the request says, and is seldom long.
func (b *buffers) room(n int) {
	need := ordinary
	switch request := b.in[:n]; {
	case n < int(unsafe.Sizeof(fuse.ReadIn{})):
	case opcode(request) == requestRead, opcode(request) == requestReaddir, opcode(request) == requestReaddirPlus:
		size := binary.NativeEndian.Uint32(request[unsafe.Offsetof(fuse.ReadIn{}.Size):])
		need = max(need, besides+int(min(size, 2*maxRead)))
	}
	if len(b.out) < need {
		b.out = make([]byte, need)
	}
}

const (
	tick       = 500 * time.Microsecond // one request may keep others from being read
	crowdReads = 64                     // until it is tried again whether others wait
)

// newLoop makes what answers the requests of a connection, of which the longest WRITE
// has so many bytes.
func newLoop(c *conn, raw fuse.RawFileSystem, opts *fuse.MountOptions, write int, log *slog.Logger) *loop {
	return &loop{
		conn: c, server: fuse.NewProtocolServer(raw, opts), log: log, most: max(ordinary, write+besides),
		idle: make(chan struct{}, 1), ended: make(chan struct{}), spare: make(chan *buffers, maxSpare),
	}
}

func (l *loop) buffers() *buffers {
	select {
	case b := <-l.spare:
		return b
	default:
		return &buffers{make([]byte, l.most), make([]byte, ordinary)}
	}
}

func (l *loop) giveBack(b *buffers) {
	select {
	case l.spare <- b:
	default:
	}
}

// run serves until the mount has ended and all requests are answered.
func (l *loop) run() {
	l.threads.Add(1)
	go l.lead(l.turn.Load())
	go l.watch()
	l.threads.Wait()
	close(l.ended)
	unix.Close(l.fd)
}

// init answers the kernel's first request, INIT, which sets what may be changed
// afterwards, such as how far the kernel reads ahead. It is called before run, if
// at all.
func (l *loop) init() error {
	b := l.buffers()
	defer l.giveBack(b)
	for {
		n, err := unix.Read(l.fd, b.in)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err == nil {
			l.answer(b, n)
		}
		return err
	}
}

// lead reads and handles requests for as long as it has the lead, which began
// with this turn.
func (l *loop) lead(turn uint64) {
	defer l.threads.Done()
	b := l.buffers()
	defer l.giveBack(b)
	for {
		n, err := unix.Read(l.fd, b.in)
		switch {
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENOENT):
			continue // ENOENT: the request was interrupted before it was read
		case err != nil:
			if !errors.Is(err, unix.ENODEV) { // unmounted
				l.log.Error("FUSE connection", "err", err)
			}
			return
		}
		turn++
		l.turn.Store(turn)
		if l.resting.Load() && l.resting.CompareAndSwap(true, false) {
			l.idle <- struct{}{}
		}
		leading := true
		if l.mayWait(b.in[:n]) {
			leading = !l.pass(turn)
		}
		l.answer(b, n)
		if !leading || !l.turn.CompareAndSwap(turn, turn+1) {
			return // another leads by now
		}
		turn++
	}
}

// pass gives the lead to another thread, if the one that handles turn has it.
func (l *loop) pass(turn uint64) bool {
	if !l.turn.CompareAndSwap(turn, turn+1) {
		return false
	}
	l.threads.Add(1)
	go l.lead(turn + 1)
	return true
}

// watch takes the lead from a thread that is with one request for a tick or two.
// When nothing was asked for a while it rests.
func (l *loop) watch() {
	const quiet = 200 // ticks
	for still := 0; ; {
		last := l.turn.Load()
		select {
		case <-l.ended:
			return
		case <-time.After(tick):
		}
		now := l.turn.Load()
		switch {
		case now != last:
			still = 0
		case now%2 == 1:
			l.pass(now)
		default:
			still++
		}
		if still < quiet {
			continue
		}
		l.resting.Store(true)
		// What came meanwhile is seen here, or its thread sees that we rest.
		if l.turn.Load() != now && l.resting.CompareAndSwap(true, false) {
			still = 0
			continue
		}
		select {
		case <-l.ended:
			return
		case <-l.idle:
			still = 0
		}
	}
}

// mayWait reports whether a request is one that waits for a disk while others ask, or
// for the network.
func (l *loop) mayWait(request []byte) bool {
	const ( // include/uapi/linux/fuse.h
		opWrite, opFsync, opFsyncdir, opFallocate, opCopyFileRange = 16, 20, 30, 43, 47
	)
	if len(request) < outHeader {
		return false
	}
	switch opcode(request) {
	case requestRead:
		return l.reads == nil || l.mayReadWait(request)
	case opWrite, opFsync, opFsyncdir, opFallocate, opCopyFileRange:
		return true
	}
	return false
}

const ( // include/uapi/linux/fuse.h
	requestRead        = 15
	requestInit        = 26
	requestReaddir     = 28
	requestInterrupt   = 36
	requestReaddirPlus = 44
)

func opcode(request []byte) uint32 { return binary.NativeEndian.Uint32(request[4:]) }

// answer handles a request and writes its answer, if it has one.
func (l *loop) answer(b *buffers, n int) {
	if l.reads != nil && n >= 16 {
		switch opcode(b.in) {
		case requestRead:
			l.answerRead(b, n)
			return
		case requestInterrupt:
			return
		}
	}
	b.room(n)
	m, st := l.server.HandleRequest([][]byte{b.in[:n]}, [][]byte{b.out})
	if n >= 16 && opcode(b.in) == requestInit && m >= outHeader+int(unsafe.Sizeof(fuse.InitOut{})) {
		// The kernel has who reads offer room for the longest WRITE each time.
		(*fuse.InitOut)(unsafe.Pointer(&b.out[outHeader])).MaxWrite = uint32(l.most - besides)
	}
	switch {
	case m > 0:
	case st.Ok() || n < outHeader:
		return
	default: // it could not be understood, and still its caller waits
		header(b.in, fuse.EIO, b.out, 0)
		m = outHeader
	}
	for {
		_, err := unix.Write(l.fd, b.out[:m])
		if !errors.Is(err, unix.EINTR) {
			l.sent(m, err)
			return
		}
	}
}

// sent is told how the writing of an answer ended.
func (l *loop) sent(bytes int, err error) {
	switch {
	case err == nil, errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV):
		return // ENOENT: nobody waits for it any more
	}
	l.log.Error("FUSE answer", "bytes", bytes, "err", err)
}
