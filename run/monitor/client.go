package monitor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"time"
)

// Client speaks to the monitor of one container. Every call is a connection of
// its own, so calls may run side by side. ErrGone is returned where no monitor
// answers any more.
type Client struct{ socket string }

// Dial gives the client of a socket, if a monitor answers there.
func Dial(ctx context.Context, socket string) (*Client, error) {
	c := &Client{socket: socket}
	w, err := c.dial(ctx)
	if err != nil {
		return nil, err
	}
	w.Close()
	return c, nil
}

func (c *Client) dial(ctx context.Context) (*wire, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", c.socket)
	switch {
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ENOENT):
		return nil, ErrGone
	case err != nil:
		return nil, fmt.Errorf("reach the container's monitor: %w", err)
	}
	return &wire{Conn: conn}, nil
}

// ask opens a connection with a request and gives the reply. ctx ends the
// connection until end is called, which closes it too.
func (c *Client) ask(ctx context.Context, r request) (w *wire, rep reply, end func(), err error) {
	w, err = c.dial(ctx)
	if err != nil {
		return nil, rep, nil, err
	}
	stop := context.AfterFunc(ctx, func() { w.Close() })
	end = func() {
		stop()
		w.Close()
	}
	if err = w.send(encodeJSON(kindRequest, r)); err == nil {
		err = w.receiveJSON(kindReply, &rep)
	}
	if err == nil {
		err = rep.err()
	} else {
		err = lost(ctx, err)
	}
	if err != nil {
		end()
		return nil, rep, nil, err
	}
	return w, rep, end, nil
}

// lost is what a broken connection means.
func lost(ctx context.Context, err error) error {
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE):
		return ErrGone
	}
	return fmt.Errorf("speak to the container's monitor: %w", err)
}

// once is a request that is no more than its reply.
func (c *Client) once(ctx context.Context, r request) (reply, error) {
	_, rep, end, err := c.ask(ctx, r)
	if err == nil {
		end()
	}
	return rep, err
}

// Start starts the container that was only created. It returns its time. If it
// could not be started the error is a StartError, and the monitor ends.
func (c *Client) Start(ctx context.Context) (time.Time, error) {
	rep, err := c.once(ctx, request{Op: opStart})
	return rep.Started, err
}

// Signal sends a signal to the container's init. SIGKILL also thaws a paused one.
// Before the start the signals that ask for an end (HUP, INT, QUIT, TERM, KILL)
// end the monitor; the container stays created, and who attached gets a
// StartError whose code is 128 and the signal's number.
func (c *Client) Signal(ctx context.Context, sig syscall.Signal) error {
	_, err := c.once(ctx, request{Op: opSignal, Signal: int(sig)})
	return err
}

// Resize sets the size of the container's terminal, in characters.
func (c *Client) Resize(ctx context.Context, height, width uint16) error {
	_, err := c.once(ctx, request{Op: opResize, Height: height, Width: width})
	return err
}

// Pause freezes the container until Resume. It is an error if it is paused.
func (c *Client) Pause(ctx context.Context) error {
	_, err := c.once(ctx, request{Op: opPause})
	return err
}

// Resume thaws what Pause froze. It is an error if it is not paused.
func (c *Client) Resume(ctx context.Context) error {
	_, err := c.once(ctx, request{Op: opResume})
	return err
}

// Freeze freezes the container until thaw is called, ctx ends or this process does,
// however it ends. It may be paused already and stays so then.
func (c *Client) Freeze(ctx context.Context) (thaw func() error, err error) {
	w, _, end, err := c.ask(ctx, request{Op: opFreeze})
	if err != nil {
		return nil, err
	}
	return func() error {
		defer end()
		var rep reply
		err := w.send(encode(kindDetach, nil))
		if err == nil {
			err = w.receiveJSON(kindReply, &rep)
		}
		if err != nil {
			return lost(ctx, err)
		}
		return rep.err()
	}, nil
}

// Wait waits for the container's end.
func (c *Client) Wait(ctx context.Context) (Exit, error) {
	w, _, end, err := c.ask(ctx, request{Op: opWait})
	if err != nil {
		return Exit{}, err
	}
	defer end()
	var e Exit
	if err := w.receiveJSON(kindExit, &e); err != nil {
		return e, lost(ctx, err)
	}
	return e, nil
}

// Stop sends sig, waits up to grace (for ever if negative) for the container's
// end, then kills it, and tells how it ended.
func (c *Client) Stop(ctx context.Context, sig syscall.Signal, grace time.Duration) (Exit, error) {
	w, _, end, err := c.ask(ctx, request{Op: opWait})
	if err != nil {
		return Exit{}, err
	}
	defer end()
	if err := c.Signal(ctx, sig); err != nil {
		return Exit{}, err
	}
	var kill *time.Timer
	if grace >= 0 {
		kill = time.AfterFunc(grace, func() { _ = c.Signal(ctx, syscall.SIGKILL) })
		defer kill.Stop()
	}
	var e Exit
	if err := w.receiveJSON(kindExit, &e); err != nil {
		return e, lost(ctx, err)
	}
	return e, nil
}
