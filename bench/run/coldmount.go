package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/varvefs/varve/bench/link"
)

var faces = []string{"kernel", "fuse"}

// cold is one mount by a new daemon on an empty store.
type cold struct {
	took     time.Duration // until the mountpoint's first listing
	requests string
	start    time.Time
	log      []link.Request
	conns    int64
	down     int64
	files    uint64
	layers   int
}

const farAway = 200 * time.Millisecond

func (b *bench) coldmount(ctx context.Context, out *section) error {
	for _, image := range []string{"large", "debian"} {
		if err := b.have(ctx, image); err != nil {
			return err
		}
	}
	w, err := b.wire(ctx, link.None)
	if err != nil {
		return err
	}
	defer w.Close()
	if err := b.roundTrips(ctx, w, out); err != nil {
		return err
	}
	if err := b.atEdge(ctx, w, out); err != nil {
		return err
	}
	return b.secondMount(ctx, w, out)
}

// roundTrips tells the waiting from the working: the same mount near and far.
func (b *bench) roundTrips(ctx context.Context, w *wire, out *section) error {
	out.line("**Round trips of waiting** in a cold mount, from the request until the first listing of the mountpoint: (T at 200 ms - T at 0 ms) / 200 ms, rate not limited, new daemon and empty store each time, near and far in turns, n=%d each. Target: at most 8. *Until the first HTTP request*: round trips that have passed when the registry hears of it, half of one being its own way; 1.5 is a connection and nothing else. The link lets a connection have 1 MiB on its way, so that a longer body takes up to half a round trip more for each further MiB.", b.n)
	out.line("")
	out.line("| image | layers | files | face | T near s | T far s | round trips | target | until the first HTTP request | connections | requests |")
	out.line("|---|--:|--:|---|--:|--:|--:|---|--:|--:|---|")
	for _, image := range []string{"large", "debian"} {
		for _, face := range faces {
			var near, far []time.Duration
			var last cold
			for range b.n {
				for _, p := range []link.Profile{link.None, {Name: "far", RTT: farAway}} {
					c, err := b.coldOnce(ctx, w, p, image, face)
					if err != nil {
						return err
					}
					if p.RTT == 0 {
						near = append(near, c.took)
					} else {
						far = append(far, c.took)
						last = c
					}
				}
			}
			trips := float64(median(far)-median(near)) / float64(farAway)
			out.line("| %s | %d | %d | %s | %.3f | %.3f | %.2f | %s | %.1f | %d | %s |", image, last.layers, last.files, face,
				median(near).Seconds(), median(far).Seconds(), trips, verdict(trips, 8),
				float64(last.log[0].Start.Sub(last.start))/float64(farAway), last.conns, last.requests)
			b.say("round trips %s %s: %.2f; near ms %s; far ms %s", image, face, trips, all(near, ms), all(far, ms))
			if face == faces[0] {
				b.timeline(last.start, last.log)
			}
		}
	}
	return nil
}

// timeline keeps when each request came, for who wants to know what waits for what.
func (b *bench) timeline(start time.Time, log []link.Request) {
	for _, r := range log {
		b.say("  +%6s ms %s %s range=%q status=%d bytes=%d", ms(r.Start.Sub(start)), r.Method, r.Path, r.Range, r.Status, r.Bytes)
	}
}

func (b *bench) coldOnce(ctx context.Context, w *wire, p link.Profile, image, face string) (c cold, err error) {
	w.link.SetProfile(p)
	s, err := b.fresh(ctx, "cold")
	if err != nil {
		return c, err
	}
	defer func() { err = errors.Join(err, s.discard()) }()
	w.reset()
	c.start = time.Now()
	m, err := s.mount(ctx, w.image(image), face)
	if err != nil {
		return c, err
	}
	names, err := os.ReadDir(m.Dir)
	c.took = time.Since(c.start)
	if err == nil && len(names) == 0 {
		err = fmt.Errorf("%s is empty", m.Dir)
	}
	if err != nil {
		return c, err
	}
	moved := w.moved()
	c.requests, c.down, c.conns = w.requests(), moved.Down, moved.Conns
	c.files, c.layers, c.log = m.Files, len(m.Layers), w.rec.Requests()
	return c, s.unmount(ctx)
}

func (b *bench) atEdge(ctx context.Context, w *wire, out *section) error {
	out.line("")
	out.line("**The same at edge** (50 ms, 50 Mbit/s), n=%d. The link alone needs its bytes / 6.25 MB/s.", b.n)
	out.line("")
	out.line("| image | face | T s | fastest s | MB down | link alone s | requests |")
	out.line("|---|---|--:|--:|--:|--:|---|")
	type key struct{ image, face string }
	took, last := map[key][]time.Duration{}, map[key]cold{}
	images := []string{"large", "debian"}
	for range b.n {
		for _, image := range images {
			for _, face := range faces {
				c, err := b.coldOnce(ctx, w, link.Edge, image, face)
				if err != nil {
					return err
				}
				k := key{image, face}
				took[k], last[k] = append(took[k], c.took), c
			}
		}
	}
	for _, image := range images {
		for _, face := range faces {
			k := key{image, face}
			c := last[k]
			out.line("| %s | %s | %.3f | %.3f | %s | %.2f | %s |", image, face, median(took[k]).Seconds(), lowest(took[k]).Seconds(),
				mb(c.down), float64(c.down)/float64(link.Edge.Rate), c.requests)
			b.say("edge %s %s ms: %s", image, face, all(took[k], ms))
		}
	}
	w.link.SetProfile(link.None)
	return nil
}

// second holds the times of mounts of an image whose index is here.
type second struct{ client, daemon, again []time.Duration }

func (b *bench) secondMount(ctx context.Context, w *wire, out *section) error {
	const n = 11
	out.line("")
	out.line("**Second mount**, `large`, after the daemon has ended and been started again, page cache warm, n=%d. *first* is the daemon's first mount, with its probe of the kernel where the face asks for it; *next* is one more of the same image after an unmount. Targets: no blob request, under 50 ms.", n)
	out.line("")
	out.line("| face | requests, all mounts | first: client ms | first: daemon ms | fastest | next: client ms | fastest | files | target |")
	out.line("|---|---|--:|--:|--:|--:|--:|--:|---|")
	for _, face := range faces {
		if err := b.secondOf(ctx, w, face, n, out); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) secondOf(ctx context.Context, w *wire, face string, n int, out *section) (err error) {
	var t second
	var files uint64
	s, err := b.fresh(ctx, "second")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.discard()) }()
	// One mount more: the first is the cold one.
	for i := range n + 1 {
		if i == 1 {
			w.reset()
		}
		first, _, err := s.timedMount(ctx, w, face)
		if err != nil {
			return err
		}
		dur, err := s.lastDur()
		if err != nil {
			return err
		}
		again, m, err := s.timedMount(ctx, w, face)
		if err != nil {
			return err
		}
		if i > 0 {
			t.client, t.daemon, t.again = append(t.client, first), append(t.daemon, dur), append(t.again, again)
		}
		files = m
		if err := s.stop(); err != nil {
			return err
		}
		if s, err = s.again(ctx); err != nil {
			return err
		}
	}
	worst := max(median(t.client), median(t.daemon))
	blobs := w.rec.Totals()[link.Blob].Requests
	v := verdict(float64(worst), float64(50*time.Millisecond))
	if blobs > 0 {
		v = "missed"
	}
	out.line("| %s | %s | %s | %s | %s | %s | %s | %d | %s |", face, w.requests(), ms(median(t.client)), ms(median(t.daemon)),
		ms(lowest(t.daemon)), ms(median(t.again)), ms(lowest(t.again)), files, v)
	b.say("second %s: client ms %s; daemon ms %s; again ms %s", face, all(t.client, ms), all(t.daemon, ms), all(t.again, ms))
	return nil
}

func (s *server) timedMount(ctx context.Context, w *wire, face string) (time.Duration, uint64, error) {
	start := time.Now()
	m, err := s.mount(ctx, w.image("large"), face)
	took := time.Since(start)
	if err != nil {
		return 0, 0, err
	}
	if _, err := os.ReadDir(m.Dir); err != nil {
		return 0, 0, err
	}
	return took, m.Files, s.unmount(ctx)
}
