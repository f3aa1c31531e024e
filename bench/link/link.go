package link

import (
	"context"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

const (
	maxChunk = 64 << 10
	// inFlight bounds the bytes a connection has on the link in one direction:
	// the buffer of a window, beyond the bandwidth-delay product of every
	// profile that is likely to be asked for.
	inFlight = 1 << 20
	// socketBuffer keeps the kernel from hiding megabytes before the link.
	socketBuffer = 256 << 10
	// ahead is how far a lane may be booked before its reader waits: enough
	// that late timers leave no gap, little enough that the queue stays short.
	ahead = 2 * time.Millisecond
)

// CutMode says what a cut does to connections.
type CutMode int

const (
	// Stall lets connections stand and be accepted, and moves nothing.
	Stall CutMode = iota
	// Reset breaks the connections there are and refuses new ones.
	Reset
)

// Counters is what has passed so far.
type Counters struct {
	Conns int64 // connections accepted
	Up    int64 // bytes sent onto the link towards the upstream
	Down  int64 // bytes sent onto the link towards the client
}

// Sub gives what has passed since an earlier reading.
func (c Counters) Sub(earlier Counters) Counters {
	return Counters{c.Conns - earlier.Conns, c.Up - earlier.Up, c.Down - earlier.Down}
}

// Link forwards TCP connections to one upstream address through a link of a
// given shape. It models propagation (each byte is as late as the delay says,
// however many are on their way), transmission (all connections of a direction
// share the rate, taking turns) and the handshake (the first byte upstream
// waits one round trip). It models neither loss nor slow start.
type Link struct {
	upstream string
	listener net.Listener
	ctx      context.Context // the link's own life
	cancel   context.CancelFunc
	unhook   func() bool
	wg       sync.WaitGroup

	profile  atomic.Pointer[Profile]
	conns    atomic.Int64
	up, down lane

	mu      sync.Mutex // guards open, refuse, live
	open    chan struct{}
	refuse  bool
	live    map[*conn]struct{}
	stopped sync.Once
}

// lane is one direction of the link.
type lane struct {
	bytes atomic.Int64

	mu   sync.Mutex // guards free
	free time.Time  // when the last booked byte will have been sent
}

// book takes the lane for n bytes and gives the time when they are sent.
func (l *lane) book(p Profile, n int) time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	if now := time.Now(); l.free.Before(now) {
		l.free = now
	}
	l.free = l.free.Add(p.transmit(n))
	return l.free
}

// Start listens on a free port of the loopback interface and forwards to
// upstream, a host:port. The link lives until Close or the end of ctx.
func Start(ctx context.Context, upstream string, p Profile) (*Link, error) {
	if _, _, err := net.SplitHostPort(upstream); err != nil {
		return nil, fmt.Errorf("start link: %w", err)
	}
	var lc net.ListenConfig
	listener, err := lc.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("start link: %w", err)
	}
	l := &Link{
		upstream: upstream,
		listener: listener,
		open:     make(chan struct{}),
		live:     map[*conn]struct{}{},
	}
	close(l.open)
	l.profile.Store(&p)
	l.ctx, l.cancel = context.WithCancel(ctx)
	l.unhook = context.AfterFunc(l.ctx, l.shut)
	l.wg.Go(l.accept)
	return l, nil
}

// Addr is the host:port to connect to.
func (l *Link) Addr() string { return l.listener.Addr().String() }

// Profile is the present shape.
func (l *Link) Profile() Profile { return *l.profile.Load() }

// SetProfile changes the shape for what is sent from now on.
func (l *Link) SetProfile(p Profile) { l.profile.Store(&p) }

// Counters reads the counters.
func (l *Link) Counters() Counters {
	return Counters{Conns: l.conns.Load(), Up: l.up.bytes.Load(), Down: l.down.bytes.Load()}
}

// Cut takes the link away until Restore.
func (l *Link) Cut(mode CutMode) {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-l.open:
		l.open = make(chan struct{})
	default:
	}
	l.refuse = mode == Reset
	if mode == Reset {
		for c := range l.live {
			c.abort()
		}
	}
}

// Restore brings the link back. Connections that stalled go on.
func (l *Link) Restore() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.refuse = false
	select {
	case <-l.open:
	default:
		close(l.open)
	}
}

// Close ends the link and all its connections, and waits for them.
func (l *Link) Close() error {
	l.cancel()
	l.unhook()
	l.shut()
	l.wg.Wait()
	return nil
}

// shut breaks everything; it does not wait.
func (l *Link) shut() {
	l.stopped.Do(func() {
		l.listener.Close()
		l.mu.Lock()
		defer l.mu.Unlock()
		for c := range l.live {
			c.abort()
		}
	})
}

func (l *Link) accept() {
	for {
		nc, err := l.listener.Accept()
		if err != nil {
			if l.ctx.Err() != nil {
				return
			}
			// Out of descriptors is the usual reason; it passes.
			if !sleep(l.ctx, time.Now().Add(10*time.Millisecond)) {
				return
			}
			continue
		}
		c := newConn(l, nc.(*net.TCPConn))
		if !l.admit(c) {
			c.abort()
			continue
		}
		l.conns.Add(1)
		l.wg.Go(func() {
			defer l.forget(c)
			c.run()
		})
	}
}

func (l *Link) admit(c *conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.refuse || l.ctx.Err() != nil {
		return false
	}
	l.live[c] = struct{}{}
	return true
}

func (l *Link) forget(c *conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.live, c)
}

// passable waits while the link is cut; false says that ctx ended.
func (l *Link) passable(ctx context.Context) bool {
	for {
		l.mu.Lock()
		open := l.open
		l.mu.Unlock()
		select {
		case <-ctx.Done():
			return false
		case <-open:
		}
		l.mu.Lock()
		same := open == l.open
		l.mu.Unlock()
		if same {
			return ctx.Err() == nil
		}
	}
}

// sleep waits until t; false says that ctx ended first.
func sleep(ctx context.Context, t time.Time) bool {
	d := time.Until(t)
	if d <= 0 {
		return ctx.Err() == nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
