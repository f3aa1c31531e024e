package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/varvefs/varve/fetch"
	"github.com/varvefs/varve/fs"
	"github.com/varvefs/varve/index"
)

// growth is the mount of an image of which layers have no index and are still
// read: served by FUSE from what has passed, until all has; then the face that
// was chosen takes its place, where the kernel lets it.
type growth struct {
	*fs.Served
	tree   *index.Growing
	id     uint64 // see [fs.MountID]; 0 where that is not known
	cancel context.CancelFunc
	done   chan struct{} // the mount is what it will be
}

// Unmount ends the growth with the mount. Who waits for a name would keep it.
func (g *growth) Unmount(lazy bool) error {
	if lazy {
		g.tree.Fail(os.ErrClosed)
	}
	err := g.Served.Unmount(lazy)
	if err == nil {
		g.cancel()
	}
	return err
}

// moment is how long a mount waits for layers that are read whole: a small image
// is then mounted as what it is at once.
const moment = 200 * time.Millisecond

// soon reports whether the layers that are read are all here in a moment, or what
// went wrong with one.
func (t *tree) soon(ctx context.Context) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, moment)
	defer cancel()
	for _, p := range t.passes {
		if p == nil {
			continue
		}
		if err := p.Wait(ctx); ctx.Err() != nil {
			return false, nil
		} else if err != nil {
			return false, err
		}
	}
	return true, nil
}

// grow mounts t, of which layers are still read.
func (m *mount) grow(t *tree, start *start, kind string, n note) error {
	d := m.d
	g := index.NewGrowing(len(t.layers))
	g.Want = func(i int) func() {
		if p := t.passes[i]; p != nil {
			return p.Want()
		}
		return func() {}
	}
	data := make([]fs.Data, len(t.layers))
	keys := make([]string, len(t.layers))
	left := 0
	for i, h := range t.layers {
		if p := t.passes[i]; p != nil {
			data[i], keys[i] = p, p.Key()
			left++
			continue
		}
		data[i], keys[i] = h, h.Key
		entries, err := h.Entries()
		if err == nil {
			err = g.AddAll(i, entries)
		}
		if err != nil {
			t.close()
			return err
		}
	}
	o := fs.Options{Metrics: d.m, Log: d.log, Setuid: m.Setuid, Xattrs: true, Fault: func(i int, off int64, err error) {
		d.fault(readFault{keys[i], off, err})
	}}
	s, err := fs.Serve(m.Dir, fs.NewGrowing(g, data, o), o)
	if err != nil {
		t.close()
		return err
	}
	ctx, fail := context.WithCancelCause(d.life)
	cancel := func() { fail(nil) }
	gr := &growth{Served: s, tree: g, cancel: cancel, done: make(chan struct{})}
	gr.id, _ = fs.MountID(m.Dir)
	for i, p := range t.passes {
		if p != nil {
			p.Watch(func(e index.Entry) {
				if err := g.Add(i, e); err != nil {
					fail(err) // the tree has failed and says so to all who ask
				}
			})
		}
	}
	t.retain() // for the growth, which ends with the mount
	d.mu.Lock()
	m.tree, m.face, m.kind, m.err, m.coming, m.growth, m.start = t, gr, faceFuse, nil, false, gr, start
	start.mounted()
	m.reason = fmt.Sprintf("%d of %d layers are still being read", left, len(t.layers))
	d.m.Mounts.WithLabelValues("mounted", faceFuse).Inc()
	d.mu.Unlock()
	n.warn("%s: %s: listings show what has passed, everything else waits for it (--wait waits here)", m.Image, m.reason)
	d.background.Go(func() {
		defer close(gr.done)
		defer cancel()
		defer t.close()
		if err := m.grown(ctx, gr, t, kind); err != nil {
			g.Fail(err)
			d.mu.Lock()
			if m.growth == gr && d.life.Err() == nil {
				m.err = err
				d.log.Error("mount failed: it must be unmounted and made anew", "mount", m.Name, "image", m.Image, "err", err)
			}
			d.mu.Unlock()
		}
	})
	return nil
}

// grown waits for the layers and then has the mount be what it would have been
// with them from the start.
func (m *mount) grown(ctx context.Context, g *growth, t *tree, kind string) error {
	start := time.Now()
	finished := make(chan error, len(t.passes))
	left := 0
	for i, p := range t.passes {
		if p == nil {
			continue
		}
		left++
		go func() {
			err := p.Wait(ctx)
			switch {
			case err == nil:
				g.tree.Complete(i)
			case ctx.Err() != nil:
				err = context.Cause(ctx) // such as what the tree failed of
			}
			finished <- err
		}()
	}
	for ; left > 0; left-- {
		if err := <-finished; err != nil {
			return err
		}
	}
	o := m.options()
	o.target = t.manifest.Target.String()
	whole, err := m.d.open(ctx, o, func(event) {})
	if err != nil {
		return err
	}
	m.d.mu.Lock()
	defer m.d.mu.Unlock()
	if m.growth != g || m.face != g {
		whole.close()
		return errors.New("it was unmounted")
	}
	m.growth = nil
	if m.start != nil {
		m.start.grown(whole)
	}
	old := m.tree
	m.tree, m.Keys = whole, whole.keys()
	if err := m.changeOver(g, kind); err != nil {
		m.reason = fmt.Sprintf("it was mounted while layers were read, and stays so until it is mounted anew: %v", err)
	}
	go func() { <-g.Served.Done(); old.close() }() // who is in the old mount reads on
	m.d.log.Info("read whole", "mount", m.Name, "image", m.Image, "face", m.kind, "dur", time.Since(start))
	if err := m.save(); err != nil {
		m.d.log.Warn("the record of a mount was not brought up to date", "mount", m.Name, "err", err)
	}
	return nil
}

// changeOver puts the face of a mount in the place of what served it while it
// grew. The caller holds mu.
func (m *mount) changeOver(g *growth, kind string) error {
	if kind != faceKernel {
		return errors.New("only the kernel face can take another's place")
	}
	if g.id == 0 {
		return errors.New("the kernel does not say which mount it is")
	}
	f, err := m.d.faces.beneath(m.Dir, g.id, m.tree, m.Setuid, false)
	if err != nil {
		return err
	}
	m.d.m.Mounts.WithLabelValues("mounted", m.kind).Dec()
	m.face, m.kind, m.reason = f, kind, hasKernelFace
	m.d.m.Mounts.WithLabelValues("mounted", kind).Inc()
	if err := g.Served.Unmount(true); err != nil {
		return err
	}
	if f.served {
		f.id, _ = fs.MountID(m.Dir)
	}
	return nil
}

// keys names the layers as the store does, nil while some are read.
func (t *tree) keys() []string {
	if t.passes != nil {
		return nil
	}
	keys := make([]string, len(t.layers))
	for i, h := range t.layers {
		keys[i] = h.Key
	}
	return keys
}

// whole waits until no layer of the mount is read any more, and fails where one
// could not be.
func (m *mount) whole(ctx context.Context) error {
	m.d.mu.Lock()
	g := m.growth
	m.d.mu.Unlock()
	if g == nil {
		return nil
	}
	select {
	case <-g.done:
	case <-ctx.Done():
	}
	m.d.mu.Lock()
	defer m.d.mu.Unlock()
	switch {
	case m.growth != g: // it is what it will be, or was unmounted
		return nil
	case m.err != nil:
		return fmt.Errorf("mount %q: %w", m.Name, m.err)
	case m.d.life.Err() != nil:
		return fmt.Errorf("mount %q: the daemon was stopped while layers were read", m.Name)
	}
	return ctx.Err()
}

var _ fs.Data = (*fetch.Pass)(nil)
