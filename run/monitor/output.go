package monitor

import (
	"sync"
	"time"
)

// queued is how many frames wait for a client before it holds the process up.
const queued = 64

// output is what a process writes, to all who are attached. The zero value is
// ready.
type output struct {
	mu      sync.Mutex // guards what follows
	clients map[*client]struct{}
	last    []byte // the exit, when it is over
}

// client is one who is attached.
type client struct {
	frames chan []byte   // closed after the exit
	gone   chan struct{} // closed when it takes no more
	sent   chan struct{} // closed when all is sent that will be
	leave  func()        // closes gone
}

// join attaches a client: what is written from now on, and the exit, wait for it to
// be sent. The caller has them sent, or calls leave.
func (o *output) join() *client {
	c := &client{frames: make(chan []byte, queued), gone: make(chan struct{}), sent: make(chan struct{})}
	c.leave = sync.OnceFunc(func() {
		close(c.gone)
		o.mu.Lock()
		defer o.mu.Unlock()
		delete(o.clients, c)
	})
	o.mu.Lock()
	if o.last != nil {
		c.frames <- o.last
		close(c.frames)
	} else {
		if o.clients == nil {
			o.clients = map[*client]struct{}{}
		}
		o.clients[c] = struct{}{}
	}
	o.mu.Unlock()
	return c
}

// send sends what a client gets until the exit is sent, the client takes nothing for
// stall, or it leaves.
func (c *client) send(w *wire, stall time.Duration) {
	defer close(c.sent)
	defer c.leave()
	for {
		select {
		case <-c.gone:
			return
		case frame, more := <-c.frames:
			if !more {
				return
			}
			w.SetWriteDeadline(time.Now().Add(stall))
			if w.send(frame) != nil {
				w.Close()
				return
			}
		}
	}
}

func (o *output) all() []*client {
	o.mu.Lock()
	defer o.mu.Unlock()
	all := make([]*client, 0, len(o.clients))
	for c := range o.clients {
		all = append(all, c)
	}
	return all
}

// attached reports whether anybody is.
func (o *output) attached() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.clients) > 0
}

// publish gives every client a frame, waiting for those that are behind.
func (o *output) publish(frame []byte) {
	for _, c := range o.all() {
		select {
		case c.frames <- frame:
		case <-c.gone:
		}
	}
}

// finish gives every client, and whoever comes later, the exit. Nothing is
// published after it.
func (o *output) finish(e Exit) {
	last := encodeJSON(kindExit, e)
	o.mu.Lock()
	o.last = last
	all := o.clients
	o.clients = nil
	o.mu.Unlock()
	for c := range all {
		select {
		case c.frames <- last:
		case <-c.gone:
		}
		close(c.frames)
	}
}
