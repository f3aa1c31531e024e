package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/varvefs/varve/daemon"
)

// runStats is what a start took.
type runStats struct {
	c     *daemon.Client
	m     *daemon.Mount
	began time.Time
	take  time.Duration // until the process was started
	bytes chan int64    // fetched until then
	done  chan error
	end   daemon.Ended // when done has told
}

// newStats begins to wait for the end of a container that is about to be started, so
// that it is not missed.
func newStats(c *daemon.Client, m *daemon.Mount, began time.Time) *runStats {
	s := &runStats{c: c, m: m, began: began, bytes: make(chan int64, 1), done: make(chan error, 1)}
	quiet := *c
	quiet.Start = false // a daemon that is stopped meanwhile stays so
	s.c = &quiet
	go func() {
		var err error
		s.end, err = s.c.WaitContainer(context.Background(), m.ID)
		s.done <- err
	}()
	return s
}

func (s *runStats) started(at time.Time) {
	s.take = at.Sub(s.began)
	go func() {
		n := int64(-1)
		if m, err := s.c.Inspect(context.Background(), s.m.ID); err == nil && m.Container != nil && m.Unmounted == nil {
			n = m.Fetched - m.Container.FetchedBefore
		}
		s.bytes <- n
	}()
}

// ended waits until the daemon has done what follows from the end, and reports
// whether it knows of it.
func (s *runStats) ended() bool {
	select {
	case err := <-s.done:
		return err == nil
	case <-time.After(30 * time.Second):
		return false
	}
}

func (s *runStats) print(w io.Writer) {
	until := <-s.bytes
	if until < 0 || until > s.end.Fetched { // it had ended by then
		until = s.end.Fetched
	}
	fmt.Fprintf(w, "started after %s with %s fetched; %s fetched in all, of the %s in the image\n",
		s.take.Round(time.Millisecond), human(until), human(s.end.Fetched), human(s.m.Size))
}
