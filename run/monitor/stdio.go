package monitor

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/console"
	runc "github.com/containerd/go-runc"
	"golang.org/x/sys/unix"
)

// lastBytes is how long output is waited for in all, and lastSize how much of it is
// taken, the most that a pipe holds (pipe(7)), after a process ended whose stdio
// somebody else still has open and may write to for ever.
const (
	lastBytes = 2 * time.Second
	lastSize  = 1 << 20
)

// stdio is one process' standard streams: pipes, or a terminal. It is the runtime's
// IO (runc.IO) for the call that makes the process.
type stdio struct {
	out output

	theirs    []*os.File // the process' ends, until it has them
	cmdIn     *os.File
	cmdOut    *os.File
	cmdErr    *os.File
	socket    *runc.Socket // on which the runtime gives the terminal; nil without one
	received  chan error
	terminal  console.Console // guarded by mu, as what follows
	in        io.WriteCloser  // nil without input
	size      console.WinSize
	mu        sync.Mutex
	sources   []source
	over      atomic.Bool // the process ended
	log       *logWriter  // nil: not logged
	pumps     sync.WaitGroup
	closeOnce sync.Once
}

// source is what a process writes to.
type source struct {
	stream string
	kind   byte
	file   *os.File
}

// newStdio makes the streams of a process. A terminal comes by a socket at path.
func newStdio(tty, stdin bool, path string, log *logWriter) (s *stdio, err error) {
	s = &stdio{log: log}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	if tty {
		// What the runtime itself says is in its log.
		null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
		if err != nil {
			return s, err
		}
		s.theirs = append(s.theirs, null)
		s.cmdIn, s.cmdOut, s.cmdErr = null, null, null
		os.Remove(path)
		if s.socket, err = runc.NewConsoleSocket(path); err != nil {
			return s, fmt.Errorf("listen for the terminal: %w", err)
		}
		s.received = make(chan error, 1)
		go func() { s.received <- s.receive() }()
		return s, nil
	}
	pipe := func() (r, w *os.File) {
		if err == nil {
			r, w, err = os.Pipe()
		}
		return r, w
	}
	if stdin {
		r, w := pipe()
		if err != nil {
			return s, err
		}
		s.cmdIn, s.in = r, w
		s.theirs = append(s.theirs, r)
	}
	for _, o := range []struct {
		to *(*os.File)
		source
	}{{&s.cmdOut, source{"stdout", kindStdout, nil}}, {&s.cmdErr, source{"stderr", kindStderr, nil}}} {
		r, w := pipe()
		if err != nil {
			return s, err
		}
		*o.to = w
		s.theirs = append(s.theirs, w)
		o.file = r
		s.sources = append(s.sources, o.source)
	}
	return s, nil
}

// receive takes the terminal that the runtime made.
func (s *stdio) receive() error {
	c, err := s.socket.ReceiveMaster()
	if err != nil {
		return fmt.Errorf("receive the terminal: %w", err)
	}
	// A descriptor of its own, which reads and writes without holding a thread.
	fd, err := unix.FcntlInt(c.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		c.Close()
		return err
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		c.Close()
		return err
	}
	f := os.NewFile(uintptr(fd), "pty")
	s.mu.Lock()
	defer s.mu.Unlock()
	s.terminal, s.in = c, f
	s.sources = []source{{"stdout", kindStdout, f}}
	if s.size.Height > 0 && s.size.Width > 0 {
		return c.Resize(s.size)
	}
	return nil
}

// resize sets the terminal's size, or keeps it until there is one.
func (s *stdio) resize(height, width uint16) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.size = console.WinSize{Height: height, Width: width}
	if s.terminal == nil {
		return nil
	}
	return s.terminal.Resize(s.size)
}

// created is called when the runtime has made the process: its ends are its own
// from then on. It waits for the terminal.
func (s *stdio) created() error {
	s.release()
	if s.socket == nil {
		return nil
	}
	select {
	case err := <-s.received:
		s.socket.Close()
		return err
	case <-time.After(10 * time.Second):
		s.socket.Close()
		return errors.New("the runtime gave no terminal")
	}
}

func (s *stdio) release() {
	for _, f := range s.theirs {
		f.Close()
	}
	s.theirs = nil
}

// pump begins to read what the process writes.
func (s *stdio) pump() {
	for _, src := range s.sources {
		s.pumps.Add(1)
		go func() {
			defer s.pumps.Done()
			s.copy(src)
		}()
	}
}

// copy takes a stream to the log and to the clients until its end.
func (s *stdio) copy(src source) {
	buf := make([]byte, maxData)
	wait, size := lastBytes, lastSize
	for {
		began, over := time.Now(), s.over.Load()
		n, err := src.file.Read(buf)
		took := time.Since(began) // who takes the output may take longer, and loses none
		if n > 0 {
			if s.log != nil {
				s.log.write(src.stream, buf[:n])
			}
			s.out.publish(encode(src.kind, buf[:n]))
		}
		if over {
			wait, size = wait-took, size-n
		}
		if s.over.Load() {
			src.file.SetReadDeadline(time.Now().Add(wait))
		}
		switch {
		case err == nil && size > 0:
		case errors.Is(err, unix.EIO) && s.terminal != nil && !s.over.Load():
			// Nobody has the terminal open just now; somebody may again.
			time.Sleep(10 * time.Millisecond)
		default:
			return
		}
	}
}

// drained is called when the process ended, and waits until all it wrote was
// published.
func (s *stdio) drained() {
	s.over.Store(true)
	for _, src := range s.sources {
		src.file.SetReadDeadline(time.Now().Add(lastBytes))
	}
	s.pumps.Wait()
}

// write gives the process input. An error is its having closed its end.
func (s *stdio) write(p []byte) error {
	s.mu.Lock()
	in := s.in
	s.mu.Unlock()
	if in == nil {
		return os.ErrClosed
	}
	_, err := in.Write(p)
	return err
}

// closeInput ends the input. A terminal's has no end.
func (s *stdio) closeInput() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.in != nil && s.socket == nil {
		s.in.Close()
		s.in = nil
	}
}

// Close gives all of it back, when the process is gone.
func (s *stdio) Close() error {
	s.closeOnce.Do(func() {
		s.release()
		if s.socket != nil {
			s.socket.Close()
		}
		s.closeInput()
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, src := range s.sources {
			src.file.Close()
		}
		if s.terminal != nil {
			s.terminal.Close()
		}
	})
	return nil
}

// console is where the runtime gives the terminal to, nil without one.
func (s *stdio) console() runc.ConsoleSocket {
	if s.socket == nil {
		return nil
	}
	return s.socket
}

// Set, Stdin, Stdout and Stderr are runc.IO's.
func (s *stdio) Set(cmd *exec.Cmd) {
	if s.cmdIn != nil {
		cmd.Stdin = s.cmdIn
	}
	cmd.Stdout, cmd.Stderr = s.cmdOut, s.cmdErr
}

func (s *stdio) Stdin() io.WriteCloser { return s.in }
func (s *stdio) Stdout() io.ReadCloser { return nil }
func (s *stdio) Stderr() io.ReadCloser { return nil }
