package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/varvefs/varve/fetch"
	"github.com/varvefs/varve/fs"
	"github.com/varvefs/varve/fs/upper"
	"github.com/varvefs/varve/image"
)

// record is what a mount needs to come back after a restart.
type record struct {
	MountOptions
	ID        string     `json:"id"`
	Target    string     `json:"target"`
	Manifest  string     `json:"manifest,omitempty"`  // digest of the platform's
	OwnDir    bool       `json:"own_dir"`             // we made the directory and remove it
	OwnUpper  bool       `json:"own_upper,omitempty"` // the upper lies in the state directory
	Unmounted *time.Time `json:"unmounted,omitempty"` // since when only its changes are kept
	Created   time.Time  `json:"created"`
	Keys      []string   `json:"keys,omitempty"` // of the layers in the store
	Container *container `json:"container,omitempty"`
}

// mount is a mount, or the record of one that is down: it could not be brought
// back, or it was unmounted and has changes to keep.
type mount struct {
	record
	d      *Daemon
	tree   *tree // nil where it is down
	face   face
	kind   string
	reason string
	err    error // why it is down
	coming bool  // on its way up for a client

	growth *growth // of an image of which layers are still read; guarded by Daemon.mu

	jobs int      // what reads the upper now, see [mount.use]; guarded by Daemon.mu
	proc *process // of a container that runs, or is on its way; guarded by Daemon.mu

	before int64 // what the network had brought for its layers before it was up

	restoring bool   // the daemon brings it back, after its own restart
	start     *start // of one that is up; guarded by Daemon.mu

	// Of a writable mount that is up.
	upper         *upper.Dir
	union         *fs.Union // nil where the kernel writes
	overlay       string
	overlayReason string
}

// Mount mounts an image.
func (d *Daemon) Mount(ctx context.Context, o MountOptions, n note) (_ *Mount, err error) {
	if err := o.checkStart(); err != nil {
		return nil, err
	}
	start := time.Now()
	defer func() {
		result := "ok"
		if err != nil {
			result = "error"
		}
		d.m.MountSeconds.WithLabelValues(result).Observe(time.Since(start).Seconds())
	}()
	m, err := d.reserve(o)
	if err != nil {
		return nil, err
	}
	again := m.Unmounted
	err = m.up(ctx, n)
	d.mu.Lock()
	switch {
	case err != nil:
	case m.tree == nil:
		err = errors.New("it was unmounted at once")
	default:
		m.Target, m.Manifest, m.Unmounted = m.tree.manifest.Target.String(), m.tree.manifest.Digest.String(), nil
		m.Keys = m.tree.keys()
		err = m.save()
	}
	if err != nil {
		m.down(true)
		m.Unmounted = again
		d.mu.Unlock()
		if again == nil {
			d.forget(m)
		} else {
			m.removeDir()
		}
		return nil, err
	}
	v := m.view(true)
	d.mu.Unlock()
	d.log.Info("mounted", "mount", m.Name, "image", m.Image, "dir", m.Dir, "face", v.Face, "overlay", v.Overlay, "dur", time.Since(start))
	return &v, nil
}

// up opens the image and mounts its face, the upper over it if there is one.
func (m *mount) up(ctx context.Context, n note) (err error) {
	kind, reason, err := m.d.faces.choose(m.Face)
	if err != nil {
		return err
	}
	s := m.starting(kind, n)
	defer func() {
		if err != nil {
			s.end()
		}
	}()
	o := m.options()
	o.keys = m.Keys
	open := func(growing bool) (*tree, error) {
		r, err := m.d.resolve(ctx, o, n)
		if err != nil {
			return nil, err
		}
		r.ready = s.opened
		if m.Container != nil {
			m.before = m.d.fetchedBefore(r.manifest)
		}
		s.resolved(r)
		return r.tree(ctx, n, growing)
	}
	t, err := open(!m.Wait && !m.RW)
	if err != nil {
		return err
	}
	if t.passes != nil {
		soon, err := t.soon(ctx)
		if err == nil {
			err = ctx.Err()
		}
		if err == nil && !soon {
			s.growing(t)
			return m.grow(t, s, kind, n)
		}
		t.close()
		if err != nil {
			return err
		}
		if t, err = open(false); err != nil {
			return err
		}
	}
	var f face
	if m.RW {
		f, err = m.writable(t, kind)
	} else {
		f, err = m.d.faces.mount(m.Dir, kind, t, m.Setuid)
	}
	if err != nil {
		t.close()
		return err
	}
	if m.union != nil {
		kind, reason = faceFuse, "the daemon writes the upper itself"
	}
	m.d.mu.Lock()
	defer m.d.mu.Unlock()
	m.tree, m.face, m.kind, m.reason, m.err, m.coming, m.start = t, f, kind, reason, nil, false, s
	s.mounted()
	m.d.m.Mounts.WithLabelValues("mounted", kind).Inc()
	m.advance()
	return nil
}

// options gives those of the mount's image.
func (m *mount) options() ImageOptions {
	o := m.ImageOptions
	o.alone = m.Prefetch == prefetchNone
	return o
}

// down takes the face away. The caller holds mu.
func (m *mount) down(lazy bool) error {
	m.coming = false
	if m.tree == nil {
		return nil
	}
	if m.jobs > 0 {
		return &Error{Message: fmt.Sprintf("the mount %q is being read (committed or exported): try again when that has ended", m.Name), Exit: ExitBusy}
	}
	if err := m.face.Unmount(lazy); err != nil {
		return err
	}
	m.d.m.Mounts.WithLabelValues("mounted", m.kind).Dec()
	if m.start != nil {
		m.start.end()
		m.start = nil
	}
	t, up, done := m.tree, m.upper, m.face.Done()
	if m.Base { // a snapshot needs it, or nobody does: who is still in it has it open
		t.unuse()
	}
	if _, ok := m.face.(*overlay); ok && up != nil {
		// Nobody tells when the last has left what the kernel serves. Whether the
		// upper is free then is asked of the kernel, see [fs.UpperInUse].
		up.Close()
		up = nil
	}
	m.tree, m.face, m.upper, m.union, m.growth = nil, nil, nil, nil, nil
	end := func() {
		if up != nil {
			up.Close()
		}
		t.close()
	}
	select {
	case <-done:
		end()
	default:
		// Somebody is still in it and reads from the index.
		go func() { <-done; end() }()
	}
	return nil
}

// notOurs is what is said of a mount that containers lie on. They would go on
// without what it brings them.
func (m *mount) notOurs() error {
	if !m.Base {
		return nil
	}
	return &Error{Message: fmt.Sprintf("the mount %q is containerd's, whose containers lie on it: it goes with them, and with the image", m.Name), Exit: ExitBusy}
}

// onItsWay is what is said of a mount that another verb is bringing up.
func (m *mount) onItsWay() error {
	return &Error{Message: fmt.Sprintf("the mount %q is on its way up: interrupt who mounts it, or try again in a moment", m.Name), Exit: ExitBusy}
}

// forget removes all trace of a mount that is down, its changes too if it was
// never up.
func (d *Daemon) forget(m *mount) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.mounts, m.ID)
	os.Remove(d.recordPath(m.ID))
	m.removeDir()
	if m.OwnUpper {
		m.dropUpper()
	}
}

// removeDir removes the directory that was made for the mount. It fails if it is
// not empty, as it should.
func (m *mount) removeDir() {
	if m.OwnDir {
		os.Remove(m.Dir)
	}
}

// Unmount ends a mount. One that cannot be written is forgotten, one that can
// keeps its changes until they are removed.
func (d *Daemon) Unmount(o UnmountOptions) (string, error) {
	d.mu.Lock()
	m, err := d.find(o.Mount)
	if err == nil && m.coming {
		err = m.onItsWay()
	}
	if err == nil && !o.own {
		err = m.notOurs()
	}
	if err == nil && m.proc != nil {
		err = &Error{Message: fmt.Sprintf("the container %q runs in that mount: `varve stop %[1]s` ends it, and the mount with it", m.Name), Exit: ExitBusy}
	}
	if err == nil && m.Unmounted != nil {
		if err = &(Error{Message: fmt.Sprintf("%s is not mounted: `varve rm %[1]s` deletes its changes", m.Name), Exit: ExitError}); o.Remove {
			err = nil
		}
	}
	if err == nil {
		if err = m.down(o.Lazy); errors.Is(err, fs.ErrBusy) {
			err = fmt.Errorf("%s is busy: %s%w", m.Dir, whoIsIn(m.Dir), silent{fs.ErrBusy})
			if o.Force {
				err = m.down(true)
			}
		}
	}
	keep := err == nil && m.RW && m.Target != ""
	if keep && m.Unmounted == nil {
		m.Unmounted, m.err = now(), nil
		err = m.save()
		m.removeDir()
	}
	d.mu.Unlock()
	if err != nil {
		return "", err
	}
	switch {
	case !keep:
		d.forget(m)
	case o.Remove:
		if _, err := d.Remove(UnmountOptions{Mount: m.ID}); err != nil {
			return "", err
		}
	}
	d.log.Info("unmounted", "mount", m.Name, "dir", m.Dir)
	return m.Name, nil
}

// find gives the mount that a name, a directory, an id or the beginning of one
// means. The caller holds mu.
func (d *Daemon) find(s string) (*mount, error) {
	var byID []*mount
	dir := filepath.Clean(s)
	if filepath.IsAbs(dir) {
		if parent, err := filepath.EvalSymlinks(filepath.Dir(dir)); err == nil { // dir itself may be a dead mount
			dir = filepath.Join(parent, filepath.Base(dir))
		}
		if real, err := os.Readlink(dir); err == nil && filepath.IsAbs(real) {
			dir = filepath.Clean(real)
		}
	}
	for _, m := range d.mounts {
		if m.Name == s || m.Dir == dir && (m.Unmounted == nil || m.coming) {
			return m, nil
		}
		if len(s) >= 3 && strings.HasPrefix(m.ID, s) {
			byID = append(byID, m)
		}
	}
	switch len(byID) {
	case 0:
		return nil, fmt.Errorf("No such mount: %s%w", s, silent{errNoMount})
	case 1:
		return byID[0], nil
	}
	return nil, fmt.Errorf("%q is the beginning of %d ids: give more of it", s, len(byID))
}

// findIn is find for those who only read: a directory may also lie in the mount,
// as for git. The caller holds mu.
func (d *Daemon) findIn(s string) (*mount, error) {
	m, err := d.find(s)
	if err == nil || !filepath.IsAbs(s) {
		return m, err
	}
	var best *mount
	for _, o := range d.mounts {
		if o.tree != nil && within(filepath.Clean(s), o.Dir) && (best == nil || len(o.Dir) > len(best.Dir)) {
			best = o
		}
	}
	if best != nil {
		return best, nil
	}
	return m, err
}

// silent keeps a sentinel in the chain of an error whose text says it already.
type silent struct{ error }

func (silent) Error() string   { return "" }
func (s silent) Unwrap() error { return s.error }

// list gives the mounts, the oldest first.
func (d *Daemon) list() []Mount {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := make([]Mount, 0, len(d.mounts))
	for _, m := range d.mounts {
		if m.tree != nil || m.Target != "" { // else it is on its way for the first time
			out = append(out, m.view(false))
		}
	}
	slices.SortFunc(out, func(a, b Mount) int { return a.Created.Compare(b.Created) })
	return out
}

func (d *Daemon) inspect(ctx context.Context, s string) (Mount, error) {
	d.mu.Lock()
	m, err := d.findIn(s)
	if err != nil {
		d.mu.Unlock()
		return Mount{}, err
	}
	v := m.view(true)
	d.mu.Unlock()
	if v.Upper != "" {
		// It may be large, or gone, or somebody writes to it: nobody waits for this.
		if v.UpperBytes, _, err = upper.Usage(ctx, v.Upper); err != nil {
			d.log.Warn("the size of an upper is not known", "mount", v.Name, "err", err)
		}
	}
	return v, nil
}

// view says what is known of m.
func (m *mount) view(layers bool) Mount {
	name, _ := image.ParseName(m.Image)
	v := Mount{
		ID: m.ID, Name: m.Name, Image: name.Familiar(), Target: m.Target, Dir: m.Dir, Created: m.Created,
		State: "mounted", Face: m.kind, FaceReason: m.faceReason(), Offline: m.Offline, Platform: m.Platform,
		Base: m.Base, RW: m.RW, Upper: m.Upper, Overlay: m.overlay, OverlayReason: m.overlayReason, Unmounted: m.Unmounted,
		Container: m.containerView(),
	}
	if m.tree == nil {
		switch {
		case m.coming:
			v.State = "restoring"
		case m.err != nil:
			v.State, v.Error = "failed", m.err.Error()
		case m.Unmounted != nil:
			v.State = "unmounted"
		default:
			v.State = "restoring"
		}
		return v
	}
	t := m.tree
	if m.start != nil {
		m.start.view(&v)
	}
	if m.growth != nil {
		v.State = "reading"
	}
	if m.err != nil {
		v.State, v.Error = "failed", m.err.Error()
	}
	v.Target, v.Manifest, v.Config = t.manifest.Target.String(), t.manifest.Digest.String(), t.manifest.ConfigDesc.Digest.String()
	if t.manifest.Platform != "" {
		v.Platform = t.manifest.Platform
	}
	if t.index != nil {
		v.Files = t.index.Inodes()
	}
	for i, h := range t.layers {
		var l Layer
		if h == nil {
			l = passOf(t.passes[i])
		} else {
			l = layerOf(h)
			if err := h.Ensure(0, 0); err != nil { // its index was refused
				v.State, v.Error = "failed", err.Error()
			}
		}
		l.MediaType = t.manifest.Layers[i].MediaType
		v.Size += l.Size
		v.Fetched += l.Fetched
		v.Local += l.Local
		if layers {
			v.Layers = append(v.Layers, l)
		}
	}
	return v
}

// layerOf says what is known of a layer that can be read.
func layerOf(h *fetch.Handle) Layer {
	a := h.About()
	return Layer{
		Digest: h.Digest, DiffID: a.DiffID, Format: a.Format, Index: a.Index, Reason: a.Why, Unproven: a.Unproven,
		Size: a.Size, Fetched: h.Fetched(), Local: h.Local(), Whole: h.Whole(),
	}
}

// passOf says what is known of one that is still read.
func passOf(p *fetch.Pass) Layer {
	a := p.About()
	n, size := p.Read()
	return Layer{Digest: p.Digest(), Format: a.Format, Reason: a.Why, Size: size, Fetched: n, Local: n}
}
