package index

import "slices"

// wait is a lookup that may have to wait. The zero value is ready.
type wait struct {
	wake  chan struct{} // has a value when the lookup is to be tried again
	names []string      // that can settle it: on the path, and "" for the root
	on    *growLayer    // that settles it
	layer int           // whose entries that takes, as Want was told
	done  func()        // of Want
}

// lookup tries once.
func (w *wait) lookup(g *Growing, dir uint64, name string) (n GrowingNode, settled bool, err error) {
	g.mu.Lock()
	w.leave()
	d, err := g.directory(dir)
	layer := -1
	if err == nil {
		g.tree.refresh(d)
		if len(d.place.parts) == 0 || len(name) > MaxName {
			err = ErrNotExist
		} else {
			var f found
			f, layer = g.tree.find(&d.place, name, view{top: len(g.layers) - 1})
			switch {
			case layer >= 0:
				w.enter(g.layers[layer], d, name)
				layer = g.blocker(layer)
			case f.inode == nil:
				err = ErrNotExist
			default:
				n = g.nodeOf(d, name, f)
			}
		}
	}
	g.mu.Unlock()
	if layer >= 0 {
		w.want(g, layer)
	}
	return n, layer < 0, err
}

// blocker gives the layer whose entries another one waits for, or itself.
func (g *Growing) blocker(layer int) int {
	for g.layers[layer].blocked >= 0 { // always a lower one
		layer = g.layers[layer].blocked
	}
	return layer
}

// enter has the wait be told of what a layer says of the name, and of the
// directories on the way to it.
func (w *wait) enter(l *growLayer, d *mergedDir, name string) {
	if w.wake == nil {
		w.wake = make(chan struct{}, 1)
		w.names = []string{name, ""}
		for ; d.parent != nil; d = d.parent {
			w.names = append(w.names, d.name)
		}
	}
	select {
	case <-w.wake:
	default:
	}
	w.on = l
	l.waiters = append(l.waiters, w)
}

// leave undoes enter.
func (w *wait) leave() {
	if l := w.on; l != nil {
		i := slices.Index(l.waiters, w)
		l.waiters = slices.Delete(l.waiters, i, i+1)
		w.on = nil
	}
}

func (w *wait) cares(name string) bool { return slices.Contains(w.names, name) }

func (w *wait) signal() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// want tells whose entries are waited for, where that is not known yet.
func (w *wait) want(g *Growing, layer int) {
	if g.Want == nil || w.done != nil && w.layer == layer {
		return
	}
	if w.done != nil {
		w.done()
	}
	w.layer, w.done = layer, g.Want(layer)
}

// end ends the wait.
func (w *wait) end(g *Growing) {
	if w.wake != nil {
		g.mu.Lock()
		w.leave()
		g.mu.Unlock()
	}
	if w.done != nil {
		w.done()
	}
}

// signal has all who wait for a layer try again.
func (l *growLayer) signal() {
	for _, w := range l.waiters {
		w.signal()
	}
}
