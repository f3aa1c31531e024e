package monitor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"

	"github.com/containerd/console"
	"golang.org/x/sys/unix"
)

// Attach joins s to the container's stdio until it ends, and tells how. ctx ends
// the attachment, not the container (a command that proxies signals must not pass
// one that signals end). The error is a StartError, ErrDetached, ErrSlow, ErrGone
// (also when the monitor is killed), ctx.Err(), or what went wrong with s. A read
// of s.In may go on after it returns.
func (c *Client) Attach(ctx context.Context, s Streams, o AttachOptions) (Exit, error) {
	r := request{Op: opAttach, Start: o.Start, Stdin: s.In != nil}
	return c.stream(ctx, s, r, o)
}

// Exec runs a further process in the container, joined to s, and tells how it
// ended. It goes on if the client goes away. Errors are as Attach's.
func (c *Client) Exec(ctx context.Context, s Streams, o ExecOptions) (Exit, error) {
	r := request{Op: opExec, Exec: &o.Process}
	if o.Process.Detach {
		_, err := c.once(ctx, r)
		return Exit{}, err
	}
	if !o.Process.Interactive {
		s.In = nil
	}
	r.Stdin = s.In != nil
	return c.stream(ctx, s, r, AttachOptions{TTY: o.Process.TTY, DetachKeys: o.DetachKeys, SigProxy: o.SigProxy})
}

// stream is a request whose answer is a process' output.
func (c *Client) stream(ctx context.Context, s Streams, r request, o AttachOptions) (Exit, error) {
	// Before anything is asked: a signal that comes early is passed on too.
	passed := make(chan os.Signal, 16)
	if o.SigProxy {
		signal.Notify(passed, proxied...)
		defer signal.Stop(passed)
	}
	in, out := terminalOf(s.In), terminalOf(s.Out)
	var keys []byte
	if in != nil {
		var err error
		if keys, err = parseKeys(o.DetachKeys); err != nil {
			return Exit{}, err
		}
	}
	sized := in
	if out != nil {
		sized = out
	}
	if o.TTY && sized != nil {
		signal.Notify(passed, unix.SIGWINCH)
		defer signal.Stop(passed)
		if size, err := sized.Size(); err == nil {
			r.Height, r.Width = size.Height, size.Width
		}
	}
	w, rep, end, err := c.ask(ctx, r)
	if err != nil {
		return Exit{}, err
	}
	defer end()
	if o.TTY && in != nil {
		if err := in.SetRaw(); err != nil {
			return Exit{}, fmt.Errorf("make the terminal raw: %w", err)
		}
		defer in.Reset()
	}
	over := make(chan struct{})
	defer close(over)
	go c.pass(ctx, passed, over, rep.Target, sized)
	typed := make(chan error, 1)
	var detached atomic.Bool
	if s.In != nil {
		go func() { typed <- feed(w, s.In, &keyScanner{keys: keys}, &detached) }()
	}
	read := make(chan streamed, 1)
	go func() {
		e, err := show(ctx, w, s, o)
		read <- streamed{e, err}
	}()
	for {
		select {
		case err := <-typed:
			switch {
			case errors.Is(err, ErrDetached):
				end()
				<-read
				return Exit{}, err
			case err != nil:
				// The process may still write; if the monitor is gone, show tells.
				typed = nil
			}
		case r := <-read:
			switch {
			case r.err == nil:
			case detached.Load(): // what broke the connection
				r.err = ErrDetached
			case errors.Is(r.err, ErrGone) && c.there(ctx):
				r.err = ErrSlow
			}
			return r.Exit, r.err
		}
	}
}

type streamed struct {
	Exit
	err error
}

// there reports whether the monitor still answers.
func (c *Client) there(ctx context.Context) bool {
	_, err := c.once(ctx, request{Op: opPing})
	return err == nil
}

// show writes what the process writes until its end.
func show(ctx context.Context, w *wire, s Streams, o AttachOptions) (Exit, error) {
	for {
		kind, payload, err := w.receive()
		if err != nil {
			return Exit{}, lost(ctx, err)
		}
		switch kind {
		case kindStdout:
			err = put(s.Out, payload)
		case kindStderr:
			err = put(s.Err, payload)
		case kindStarted:
			var rep reply
			if err = json.Unmarshal(payload, &rep); err == nil && o.Started != nil {
				o.Started(rep.Started)
			}
		case kindExit:
			var e Exit
			if err := json.Unmarshal(payload, &e); err != nil {
				return e, err
			}
			if e.Error != "" {
				return e, &StartError{Code: e.Code, Message: e.Error}
			}
			return e, nil
		}
		if err != nil {
			return Exit{}, err
		}
	}
}

func put(w io.Writer, p []byte) error {
	if w == nil {
		return nil
	}
	_, err := w.Write(p)
	return err
}

// feed sends what r gives until its end, or until the keys are typed.
func feed(w *wire, r io.Reader, keys *keyScanner, detached *atomic.Bool) error {
	buf := make([]byte, maxData)
	for {
		n, err := r.Read(buf)
		if n > 0 {
			p, detach := keys.scan(buf[:n])
			if len(p) > 0 {
				if err := w.send(encode(kindStdin, p)); err != nil {
					return err
				}
			}
			if detach {
				detached.Store(true)
				_ = w.send(encode(kindDetach, nil))
				return ErrDetached
			}
		}
		if err != nil { // of a reader that fails no more will come either
			return w.send(encode(kindStdinEnd, nil))
		}
	}
}

// proxied are the signals that are passed on: those that a user sends.
var proxied = []os.Signal{
	unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2, unix.SIGALRM, unix.SIGCONT,
}

// pass passes signals on, and sizes of the terminal.
func (c *Client) pass(ctx context.Context, signals <-chan os.Signal, over <-chan struct{}, target string, sized console.Console) {
	for {
		var sig os.Signal
		select {
		case <-over:
			return
		case sig = <-signals:
		}
		number, ok := sig.(syscall.Signal)
		switch {
		case !ok:
		case number == unix.SIGWINCH:
			if size, err := sized.Size(); err == nil {
				// A size that is not set is no reason to end.
				_, _ = c.once(ctx, request{Op: opResize, Target: target, Height: size.Height, Width: size.Width})
			}
		default:
			// If it does not run any more, its end is on its way.
			_, _ = c.once(ctx, request{Op: opSignal, Target: target, Signal: int(number)})
		}
	}
}

// terminalOf gives the terminal that v is, nil if it is none.
func terminalOf(v any) console.Console {
	f, ok := v.(*os.File)
	if !ok || f == nil {
		return nil
	}
	c, err := console.ConsoleFromFile(f)
	if err != nil {
		return nil
	}
	return c
}
