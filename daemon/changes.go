package daemon

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/varvefs/varve/commit"
	"github.com/varvefs/varve/fs"
	"github.com/varvefs/varve/fs/upper"
	"github.com/varvefs/varve/image"
)

// using is a mount whose changes are being read: up or not, it stays as it is
// until it is released.
type using struct {
	*mount
	tree    *tree
	upper   *upper.Dir // nil of a mount that cannot be written
	union   *fs.Union  // nil where the daemon does not write
	release func()
}

// use opens what reading a mount's changes needs. The caller releases it.
func (d *Daemon) use(ctx context.Context, name string, n note) (*using, error) {
	d.mu.Lock()
	m, err := d.findIn(name)
	if err == nil && m.growth != nil {
		d.mu.Unlock()
		if err := m.whole(ctx); err != nil {
			return nil, err
		}
		return d.use(ctx, name, n)
	}
	switch {
	case err != nil:
	case m.coming || m.jobs < 0:
		err = m.onItsWay()
	case m.tree == nil && m.jobs > 0:
		err = &Error{Message: fmt.Sprintf("the mount %q is being read (committed or exported): try again when that has ended", m.Name), Exit: ExitBusy}
	default:
		m.jobs++
	}
	if err != nil {
		d.mu.Unlock()
		return nil, err
	}
	u := &using{mount: m, tree: m.tree, upper: m.upper, union: m.union}
	if u.tree != nil {
		u.tree.retain()
	}
	d.mu.Unlock()
	done := func() {
		d.mu.Lock()
		m.jobs--
		d.mu.Unlock()
	}
	u.release = func() { u.tree.close(); done() }
	if u.tree != nil {
		return u, nil
	}
	// It is down: what it needs is opened for us alone.
	o := m.ImageOptions
	o.target = m.Target
	if u.tree, err = d.open(ctx, o, n); err != nil {
		done()
		return nil, err
	}
	if m.RW {
		if u.upper, err = upper.Open(m.Upper); err != nil {
			u.release()
			return nil, upperError(err)
		}
		u.release = func() { u.upper.Close(); u.tree.close(); done() }
	}
	return u, nil
}

// Diff lists what changed in a mount, from its upper alone.
func (d *Daemon) Diff(ctx context.Context, name string) ([]Delta, error) {
	u, err := d.use(ctx, name, func(event) {})
	if err != nil {
		return nil, err
	}
	defer u.release()
	return u.deltas(ctx)
}

func (u *using) deltas(ctx context.Context) ([]Delta, error) {
	out := []Delta{}
	if u.upper == nil {
		return out, nil
	}
	ds, err := commit.Diff(ctx, u.upper, u.tree.index.Image)
	if err != nil {
		return nil, fmt.Errorf("diff %s: %w", u.Name, err)
	}
	ds = slices.DeleteFunc(ds, u.mountPointDelta(ds))
	for _, c := range ds {
		out = append(out, Delta{Kind: string(c.Kind), Path: c.Path, Size: c.Size})
	}
	return out, nil
}

// hold keeps the mount's changes as they are while fn reads them, which it may
// be asked to do again. Where the daemon writes the upper, writers wait; where the
// kernel does, nobody can hold them: then the upper is looked at before and
// after, and one that changed meanwhile is read again. pause false takes what
// comes.
func (u *using) hold(ctx context.Context, pause bool, fn func() error) error {
	if u.upper == nil || !pause {
		return fn()
	}
	if u.union != nil {
		release, err := u.union.Hold(ctx)
		if err != nil {
			return err
		}
		defer release()
	}
	const attempts = 3
	for range attempts {
		still, err := u.still(ctx)
		if errors.Is(err, upper.ErrBusy) {
			continue
		}
		if err != nil {
			return err
		}
		ferr := fn()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		after, err := u.upper.Stamp(ctx)
		if err != nil && !errors.Is(err, upper.ErrBusy) {
			return err
		}
		if err == nil && after == still {
			return ferr
		}
	}
	return &Error{Message: fmt.Sprintf("the mount %q is being written to all the time, so that no moment of it can be kept: stop who writes, or take what comes with --no-pause", u.Name), Exit: ExitBusy}
}

// still gives the upper's stamp at a moment from which on no change can go
// unseen, also none through a mapping: what is dirty is written back, and what was
// stored to meanwhile would be dirty again.
func (u *using) still(ctx context.Context) (stamp [32]byte, err error) {
	before, err := u.upper.Stamp(ctx)
	if err != nil {
		return stamp, err
	}
	if err := u.upper.WriteBack(ctx); err != nil {
		return stamp, err
	}
	if stamp, err = u.upper.Stamp(ctx); err == nil && stamp != before {
		err = upper.ErrBusy
	}
	return stamp, err
}

// createdOr gives the time of a commit.
func createdOr(t *time.Time) time.Time {
	if t != nil {
		return t.UTC()
	}
	return time.Now().UTC()
}

// names gives the names whose repositories have an image's layers: its own, and
// those of what it was made of.
func sourcesOf(m *image.Manifest) []image.Name {
	out := m.Sources
	if !m.Name.IsZero() && !m.Name.IsID() {
		out = append([]image.Name{m.Name}, out...)
	}
	return out
}
