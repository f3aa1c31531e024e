package link

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// clock waits more exactly than the runtime's timers do. An idle runtime
// sleeps in epoll_wait, whose timeout is rounded up to a millisecond
// (runtime/netpoll_epoll.go): as much as the round trip of a near link. A
// timerfd wakes the same epoll_wait when it is due.
type clock struct {
	timer  *os.File
	unhook func() bool
}

// newClock makes a clock that ends with ctx. It is for one goroutine.
func newClock(ctx context.Context) (*clock, error) {
	fd, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_NONBLOCK|unix.TFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("create timerfd: %w", err)
	}
	c := &clock{timer: os.NewFile(uintptr(fd), "timerfd")}
	c.unhook = context.AfterFunc(ctx, func() { c.timer.Close() })
	return c, nil
}

func (c *clock) close() {
	c.unhook()
	c.timer.Close()
}

// sleep waits until t; an error says that the clock's context ended first.
func (c *clock) sleep(t time.Time) error {
	d := time.Until(t)
	if d <= 0 {
		return nil
	}
	raw, err := c.timer.SyscallConn()
	if err != nil {
		return err
	}
	spec := unix.ItimerSpec{Value: unix.NsecToTimespec(d.Nanoseconds())}
	var set error
	if err := raw.Control(func(fd uintptr) { set = unix.TimerfdSettime(int(fd), 0, &spec, nil) }); err != nil {
		return err
	}
	if set != nil {
		return set
	}
	var expired [8]byte
	if n, err := c.timer.Read(expired[:]); err != nil {
		return err
	} else if n != len(expired) {
		return errors.New("short read of a timerfd")
	}
	return nil
}
