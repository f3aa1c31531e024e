package link

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"testing"
	"time"
)

// serve runs handle for every connection to a new loopback address.
func serve(t *testing.T, handle func(*net.TCPConn)) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				handle(c.(*net.TCPConn))
			})
		}
	})
	t.Cleanup(func() { listener.Close(); wg.Wait() })
	return listener.Addr().String()
}

func echo(c *net.TCPConn) {
	_, _ = io.Copy(c, c)
	_ = c.CloseWrite()
}

func start(t *testing.T, upstream string, p Profile) *Link {
	t.Helper()
	l, err := Start(context.Background(), upstream, p)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func dial(t *testing.T, l *Link) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", l.Addr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(time.Minute))
	return c.(*net.TCPConn)
}

func noise(seed uint64, n int) []byte {
	var key [32]byte
	key[0] = byte(seed)
	b := make([]byte, n)
	rand.NewChaCha8(key).Read(b)
	return b
}

func TestBytesComeBackWhole(t *testing.T) {
	for _, p := range []Profile{None, Datacenter, {Name: "narrow", RTT: 4 * time.Millisecond, Rate: 20e6}} {
		t.Run(p.Name, func(t *testing.T) {
			l := start(t, serve(t, echo), p)
			const conns, size = 4, 1<<20 + 4321
			var wg sync.WaitGroup
			for i := range conns {
				c := dial(t, l)
				wg.Go(func() {
					data := noise(uint64(i), size)
					go func() {
						_, _ = c.Write(data)
						_ = c.CloseWrite()
					}()
					got, err := io.ReadAll(c)
					if err != nil {
						t.Error(err)
					}
					if !bytes.Equal(got, data) {
						t.Errorf("connection %d: %d bytes came back changed, want %d", i, len(got), size)
					}
				})
			}
			wg.Wait()
			want := Counters{Conns: conns, Up: conns * size, Down: conns * size}
			if got := l.Counters(); got != want {
				t.Errorf("counters %+v, want %+v", got, want)
			}
		})
	}
}

// The bounds on time are lower bounds only: a slow machine must not fail them.
func TestDelayAndHandshake(t *testing.T) {
	const rtt = 60 * time.Millisecond
	l := start(t, serve(t, echo), Profile{RTT: rtt})
	begin := time.Now()
	c := dial(t, l)
	var b [1]byte
	for i, atLeast := range []time.Duration{2 * rtt, 3 * rtt} { // handshake and echo, then one echo
		if _, err := c.Write([]byte{byte(i)}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, b[:]); err != nil {
			t.Fatal(err)
		}
		if b[0] != byte(i) {
			t.Fatalf("got %d, want %d", b[0], i)
		}
		if d := time.Since(begin); d < atLeast {
			t.Errorf("answer %d after %v, want %v at least", i, d, atLeast)
		}
	}
}

func TestDelayIsNotPerWrite(t *testing.T) {
	// 200 writes of a link that took the delay for each would last 20 s.
	l := start(t, serve(t, echo), Profile{RTT: 200 * time.Millisecond})
	c := dial(t, l)
	begin := time.Now()
	go func() {
		for i := range 200 {
			_, _ = c.Write([]byte{byte(i)})
			time.Sleep(time.Millisecond)
		}
		_ = c.CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil {
		t.Fatal(err)
	}
	for i, b := range got {
		if b != byte(i) {
			t.Fatalf("byte %d is %d", i, b)
		}
	}
	if d := time.Since(begin); len(got) != 200 || d > 10*time.Second {
		t.Errorf("%d bytes in %v", len(got), d)
	}
}

func TestRateIsShared(t *testing.T) {
	const size, conns = 200_000, 4
	l := start(t, serve(t, func(c *net.TCPConn) { _, _ = c.Write(noise(9, size)) }), Profile{Rate: 4_000_000})
	begin := time.Now()
	var wg sync.WaitGroup
	for range conns {
		c := dial(t, l)
		wg.Go(func() {
			if n, err := io.Copy(io.Discard, c); n != size || err != nil {
				t.Errorf("%d bytes, %v", n, err)
			}
		})
	}
	wg.Wait()
	if d, atLeast := time.Since(begin), conns*size*time.Second/4_000_000; d < atLeast {
		t.Errorf("%v for what takes %v", d, atLeast)
	}
	if got := l.Counters(); got.Down != conns*size || got.Up != 0 {
		t.Errorf("counters %+v", got)
	}
}

func TestBackpressure(t *testing.T) {
	l := start(t, serve(t, func(c *net.TCPConn) {
		_, _ = c.Write(make([]byte, 8<<20))
	}), None)
	l.Cut(Stall) // before the connection, so that nothing gets through
	c := dial(t, l)
	time.Sleep(300 * time.Millisecond)
	if got := l.Counters().Down; got > inFlight {
		t.Errorf("%d bytes on a link that is cut, want %d at most", got, inFlight)
	}
	l.Restore()
	if n, err := io.Copy(io.Discard, c); n != 8<<20 || err != nil {
		t.Errorf("%d bytes, %v", n, err)
	}
}

func TestCutStall(t *testing.T) {
	l := start(t, serve(t, echo), None)
	c := dial(t, l)
	ping(t, c)
	l.Cut(Stall)
	late := dial(t, l) // a connection can still be begun
	for _, c := range []*net.TCPConn{c, late} {
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		if n, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("read %d, %v over a cut link", n, err)
		}
	}
	l.Restore()
	for _, c := range []*net.TCPConn{c, late} {
		c.SetReadDeadline(time.Now().Add(time.Minute))
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		ping(t, c)
	}
}

func TestCutReset(t *testing.T) {
	l := start(t, serve(t, echo), None)
	c := dial(t, l)
	ping(t, c)
	l.Cut(Reset)
	if _, err := io.ReadAll(c); err == nil {
		t.Error("connection ended in peace, want a reset")
	}
	if c, err := net.Dial("tcp", l.Addr()); err == nil {
		c.SetDeadline(time.Now().Add(time.Minute))
		if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("new connection over a cut link: %v", err)
		}
		c.Close()
	}
	l.Restore()
	ping(t, dial(t, l))
}

func ping(t *testing.T, c *net.TCPConn) {
	t.Helper()
	if _, err := c.Write([]byte("ping")); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 4)
	if _, err := io.ReadFull(c, b); err != nil || string(b) != "ping" {
		t.Fatalf("echo %q, %v", b, err)
	}
}

func TestServerMayBreakOff(t *testing.T) {
	l := start(t, serve(t, func(c *net.TCPConn) {
		_, _ = io.ReadFull(c, make([]byte, 4))
		_ = c.SetLinger(0)
	}), None)
	c := dial(t, l)
	if _, err := c.Write([]byte("ping")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(c); err == nil {
		t.Error("the server's reset did not come through")
	}
}

func TestNoUpstream(t *testing.T) {
	l := start(t, "127.0.0.1:1", None)
	if c, err := net.Dial("tcp", l.Addr()); err == nil { // the reset may come first
		if _, err := io.ReadAll(c); err == nil {
			t.Error("read from no upstream without an error")
		}
		c.Close()
	}
	if _, err := Start(context.Background(), "nowhere", None); err == nil {
		t.Error("an upstream without a port was taken")
	}
}

func TestCloseBreaksAndWaits(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	upstream := serve(t, echo)
	for _, stop := range []func(*Link){
		func(l *Link) { l.Close() },
		func(l *Link) { l.Cut(Stall); l.Close() },
		func(l *Link) { cancel() },
	} {
		l, err := Start(ctx, upstream, Profile{RTT: 10 * time.Second})
		if err != nil {
			t.Fatal(err)
		}
		c := dial(t, l)
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		stop(l)
		if _, err := io.ReadAll(c); err == nil {
			t.Error("connection outlived its link")
		}
		l.Close()
		l.Close()
	}
}
