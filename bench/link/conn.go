package link

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
)

// conn is one forwarded connection: two pipes over the lanes of its link.
type conn struct {
	link   *Link
	client *net.TCPConn
	ctx    context.Context // ends when the connection is broken
	cancel context.CancelFunc

	mu     sync.Mutex // guards server, broken
	server *net.TCPConn
	broken bool
}

// packet is what a pipe has on its way. No data is the end of the stream.
type packet struct {
	data    []byte
	arrives time.Time
}

func newConn(l *Link, client *net.TCPConn) *conn {
	c := &conn{link: l, client: client}
	c.ctx, c.cancel = context.WithCancel(l.ctx)
	return c
}

// abort breaks both ends with a reset.
func (c *conn) abort() {
	c.cancel()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.broken = true
	for _, end := range []*net.TCPConn{c.client, c.server} {
		if end != nil {
			end.SetLinger(0)
			end.Close()
		}
	}
}

func (c *conn) run() {
	defer c.cancel()
	accepted := time.Now()
	rtt := c.link.Profile().RTT
	if !c.dial() {
		sleep(c.ctx, accepted.Add(rtt)) // a refusal takes its round trip too
		c.abort()
		return
	}
	// Our own accept cost the client nothing. On a real link its first byte
	// leaves one round trip after the SYN, and the server's first byte half a
	// round trip later.
	var wg sync.WaitGroup
	wg.Go(func() { c.pipe(c.server, c.client, &c.link.up, accepted.Add(rtt)) })
	wg.Go(func() { c.pipe(c.client, c.server, &c.link.down, accepted.Add(rtt+rtt/2)) })
	wg.Wait()
	c.client.Close()
	c.server.Close()
}

func (c *conn) dial() bool {
	var d net.Dialer
	nc, err := d.DialContext(c.ctx, "tcp", c.link.upstream)
	if err != nil {
		return false
	}
	server := nc.(*net.TCPConn)
	c.client.SetReadBuffer(socketBuffer)
	server.SetReadBuffer(socketBuffer)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.broken {
		server.Close()
		return false
	}
	c.server = server
	return true
}

// pipe carries src to dst over the lane, beginning not before begin, and
// returns when the stream has ended or the connection is broken.
func (c *conn) pipe(dst, src *net.TCPConn, ln *lane, begin time.Time) {
	// The window bounds bytes; the capacity only bounds very small packets.
	window := semaphore.NewWeighted(inFlight)
	queue := make(chan packet, 1024)
	var wg sync.WaitGroup
	wg.Go(func() {
		defer close(queue)
		if err := c.send(src, ln, begin, window, queue); err != nil {
			c.abort()
		}
	})
	if err := c.deliver(dst, window, queue); err != nil {
		c.abort()
		for range queue { // the sender's context has ended
		}
	}
	wg.Wait()
}

// send reads src and books the lane for what it read, one chunk at a time: so
// connections that share the lane take turns.
func (c *conn) send(src io.Reader, ln *lane, begin time.Time, window *semaphore.Weighted, queue chan<- packet) error {
	for {
		buf := make([]byte, c.link.Profile().chunk())
		n, err := src.Read(buf)
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if !sleep(c.ctx, begin) {
			return c.ctx.Err()
		}
		if n > 0 {
			if err := window.Acquire(c.ctx, int64(n)); err != nil {
				return err
			}
		}
		p := c.link.Profile()
		sent := ln.book(p, n)
		ln.bytes.Add(int64(n))
		if n > 0 || err != nil {
			select {
			case queue <- packet{buf[:n], sent.Add(p.delay())}:
			case <-c.ctx.Done():
				return c.ctx.Err()
			}
		}
		if err != nil {
			return nil
		}
		if !sleep(c.ctx, sent.Add(-ahead)) {
			return c.ctx.Err()
		}
	}
}

// deliver writes what arrives, when it arrives.
func (c *conn) deliver(dst *net.TCPConn, window *semaphore.Weighted, queue <-chan packet) error {
	exact, err := newClock(c.ctx)
	if err != nil {
		return err
	}
	defer exact.close()
	for p := range queue {
		if err := exact.sleep(p.arrives); err != nil {
			return err
		}
		if !c.link.passable(c.ctx) {
			return c.ctx.Err()
		}
		if len(p.data) == 0 {
			return dst.CloseWrite()
		}
		if _, err := dst.Write(p.data); err != nil {
			return err
		}
		window.Release(int64(len(p.data)))
	}
	return c.ctx.Err()
}
