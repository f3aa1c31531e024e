package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/varvefs/varve/bench/link"
)

// wire is the way to the registry: daemon, link, recorder, registry.
type wire struct {
	link *link.Link
	rec  *link.Recorder
	from link.Counters
}

func (b *bench) wire(ctx context.Context, p link.Profile) (*wire, error) {
	w := &wire{rec: link.NewRecorder(b.registry)}
	if err := w.rec.Listen(ctx); err != nil {
		return nil, err
	}
	var err error
	if w.link, err = link.Start(ctx, w.rec.Addr(), p); err != nil {
		return nil, errors.Join(err, w.rec.Close())
	}
	return w, nil
}

func (w *wire) Close() error { return errors.Join(w.link.Close(), w.rec.Close()) }

// image is the name of an image as the daemon has to ask for it.
func (w *wire) image(name string) string { return w.ref(name, tagEStargz) }

// ref is the name of any other image.
func (w *wire) ref(repo, tag string) string { return w.link.Addr() + "/" + repo + ":" + tag }

// reset begins to count from nothing.
func (w *wire) reset() {
	w.rec.Reset()
	w.from = w.link.Counters()
}

func (w *wire) moved() link.Counters { return w.link.Counters().Sub(w.from) }

// requests says what was asked for, by class.
func (w *wire) requests() string {
	var out []string
	for c, t := range w.rec.Totals() {
		if t.Requests > 0 {
			out = append(out, fmt.Sprintf("%d %s", t.Requests, link.Class(c)))
		}
	}
	if out == nil {
		return "none"
	}
	return strings.Join(out, ", ")
}
