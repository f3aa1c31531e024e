package monitor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"syscall"
	"time"
)

// server answers the clients of one container.
type server struct {
	c        *container
	ctx      context.Context // the monitor's own life
	sessions sync.WaitGroup
	first    sync.Once // who gives input first, and ends it with StdinOnce
}

// serve takes clients until the listener is closed.
func (s *server) serve(l net.Listener) {
	for {
		conn, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			time.Sleep(10 * time.Millisecond) // out of descriptors
			continue
		}
		s.sessions.Add(1)
		go func() {
			defer s.sessions.Done()
			defer conn.Close()
			s.session(&wire{Conn: conn})
		}()
	}
}

// patience bounds how long a client may take for its request and for the answer.
const patience = 10 * time.Second

func (s *server) session(w *wire) {
	w.SetDeadline(time.Now().Add(patience))
	var r request
	if err := w.receiveJSON(kindRequest, &r); err != nil {
		return
	}
	w.SetDeadline(time.Time{})
	answer := func(rep reply, err error) bool {
		if err != nil {
			rep = failed(err)
		}
		w.SetWriteDeadline(time.Now().Add(patience))
		return w.send(encodeJSON(kindReply, rep)) == nil && err == nil
	}
	switch r.Op {
	case opStart:
		at, err := s.c.start(s.ctx)
		answer(reply{Started: at}, err)
	case opAttach:
		s.attach(w, r, answer)
	case opExec:
		s.exec(w, r, answer)
	case opSignal:
		answer(reply{}, s.c.signal(s.ctx, r.Target, syscall.Signal(r.Signal)))
	case opResize:
		answer(reply{}, s.resize(r))
	case opPause:
		answer(reply{}, s.c.pause(s.ctx, false))
	case opResume:
		answer(reply{}, s.c.resume(s.ctx, false))
	case opFreeze:
		if err := s.c.pause(s.ctx, true); !answer(reply{}, err) {
			if err == nil {
				s.c.resume(s.ctx, true)
			}
			return
		}
		// Until it says so, is gone, or nothing is left to thaw.
		thawed := make(chan struct{})
		go func() {
			defer close(thawed)
			_, _, _ = w.receive()
		}()
		select {
		case <-thawed:
		case <-s.c.over:
		}
		answer(reply{}, s.c.resume(s.ctx, true))
	case opWait:
		if answer(reply{}, nil) {
			s.wait(w)
		}
	case opPing:
		answer(reply{}, nil)
	default:
		answer(reply{}, fmt.Errorf("no such request: %q", r.Op))
	}
}

func (s *server) resize(r request) error {
	if r.Target == "" {
		return s.c.stdio.resize(r.Height, r.Width)
	}
	s.c.mu.Lock()
	p := s.c.execs[r.Target]
	s.c.mu.Unlock()
	if p == nil {
		return errNotRunning(s.c)
	}
	return p.stdio.resize(r.Height, r.Width)
}

// wait tells a client of the container's end, if it is still there then.
func (s *server) wait(w *wire) {
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		_, _, _ = w.receive()
	}()
	select {
	case <-s.c.over:
		w.SetWriteDeadline(time.Now().Add(patience))
		w.send(encodeJSON(kindExit, s.c.exit))
	case <-gone:
	}
}

// attach joins a client to the container's own stdio.
func (s *server) attach(w *wire, r request, answer func(reply, error) bool) {
	once := false
	if r.Stdin && s.c.cfg.StdinOnce {
		s.first.Do(func() { once = true })
	}
	c := s.c.stdio.out.join() // who is answered is attached
	if !answer(reply{}, nil) {
		c.leave()
		if once {
			s.c.stdio.closeInput()
		}
		return
	}
	if r.Height > 0 && r.Width > 0 {
		s.c.stdio.resize(r.Height, r.Width)
	}
	go c.send(w, s.c.cfg.stall())
	if r.Start {
		// What keeps it from starting is its exit, which the client gets.
		go func() { _, _ = s.c.start(s.ctx) }()
	}
	// What is typed before there is a terminal waits for it.
	s.input(w, c, s.c.stdio, once, s.c.prepared)
}

// exec runs a further process and joins a client to it.
func (s *server) exec(w *wire, r request, answer func(reply, error) bool) {
	if r.Exec == nil || len(r.Exec.Cmd) == 0 {
		answer(reply{}, errors.New("exec: no command specified"))
		return
	}
	p, pump, err := s.c.exec(s.ctx, *r.Exec, r.Height, r.Width)
	if err != nil {
		answer(reply{}, err)
		return
	}
	var c *client
	there := answer(reply{Target: p.name, Started: now()}, nil)
	if there && !r.Exec.Detach {
		c = p.stdio.out.join()
		go c.send(w, s.c.cfg.stall())
	}
	pump()
	if c == nil {
		p.stdio.closeInput()
		return
	}
	ready := make(chan struct{})
	close(ready)
	s.input(w, c, p.stdio, true, ready)
}

// input takes what a client sends until it is gone or all is said. ends says that
// the process' input ends with the client's, ready when there is an input.
func (s *server) input(w *wire, c *client, to *stdio, ends bool, ready <-chan struct{}) {
	defer func() {
		c.leave()
		<-c.sent
	}()
	over := make(chan struct{})
	go func() {
		defer close(over)
		s.frames(w, to, ends, ready)
	}()
	select {
	case <-over: // the client is gone
	case <-c.sent: // the process is
	}
	w.Close()
	<-over
}

func (s *server) frames(w *wire, to *stdio, ends bool, ready <-chan struct{}) {
	for {
		kind, payload, err := w.receive()
		<-ready
		switch {
		case err == nil && kind == kindDetach:
			return
		case err == nil && kind == kindStdin:
			// If it does not read, its input is thrown away.
			_ = to.write(payload)
		case err == nil && kind == kindStdinEnd:
			if ends {
				to.closeInput()
			}
		default:
			if ends {
				to.closeInput()
			}
			return
		}
	}
}
