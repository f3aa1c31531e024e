package daemon

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"

	"github.com/varvefs/varve/fs"
	"github.com/varvefs/varve/fs/upper"
	"github.com/varvefs/varve/run/monitor"
)

// resumeContainer takes up a container of an earlier daemon: what ran on goes on,
// in the mount that it was started in; what has ended meanwhile is ended here too.
func (d *Daemon) resumeContainer(ctx context.Context, m *mount) error {
	st, err := monitor.State(d.containerDir(m.ID))
	if err == nil && st.State == monitor.Dead {
		d.log.Error("a container has no monitor any more: it is ended", "mount", m.Name)
		st, err = d.reap(m.ID)
	}
	if err != nil || st.Monitor == 0 {
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			d.log.Error("a container of an earlier run", "mount", m.Name, "err", err)
		}
		err = fs.Detach(m.Dir)
		d.mu.Lock()
		m.coming = false
		d.mu.Unlock()
		d.endContainer(m, st)
		return err
	}
	p := newProcess()
	p.stood = true
	d.mu.Lock()
	m.proc = p
	d.mu.Unlock()
	defer d.background.Go(func() { d.watchContainer(m, p) })
	if m.Container.Writer == overlayKernel {
		return m.adopt(ctx)
	}
	// Its root went with the daemon that served it. What is mounted anew is for who
	// looks at the changes, and for the next start.
	return d.bringBack(ctx, m)
}

// adopt takes up a mount that an earlier daemon has left because a container runs in
// it. It must not be mounted anew meanwhile: a second overlayfs would take the
// first one's work directory away, and with it every further change of a file of
// the image.
func (m *mount) adopt(ctx context.Context) (err error) {
	if is, err := isOverlay(m.Dir); err != nil || !is {
		return errors.Join(err, errors.New("its mount is gone: its container goes on with one of its own, and start it anew to have it back here"))
	}
	o := m.options()
	o.target, o.keys = m.Target, m.Keys
	t, err := m.d.open(ctx, o, func(event) {})
	if err != nil {
		return err
	}
	up, err := upper.Open(m.Upper)
	if err != nil {
		t.close()
		return upperError(err)
	}
	m.d.mu.Lock()
	defer m.d.mu.Unlock()
	m.tree, m.upper, m.face, m.err, m.coming = t, up, &overlay{Kernel: fs.Adopt(m.Dir)}, nil, false
	m.kind, m.reason = faceKernel, "it was mounted by an earlier daemon, and a container runs in it"
	m.overlay, m.overlayReason = overlayKernel, m.reason
	m.d.m.Mounts.WithLabelValues("mounted", m.kind).Inc()
	return nil
}

// leave gives up a mount that stays, because a container runs in it. The caller
// holds mu.
func (m *mount) leave() {
	if m.start != nil {
		m.start.end()
	}
	m.upper.Close()
	m.tree.close()
	m.tree, m.face, m.upper, m.start = nil, nil, nil, nil
}

// stays reports whether the mount outlives the daemon. The caller holds mu.
func (m *mount) stays() bool {
	return m.proc != nil && m.tree != nil && m.overlay == overlayKernel && m.d.stands(m)
}

// isOverlay reports whether overlayfs is what is mounted at dir.
func isOverlay(dir string) (is bool, err error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return false, err
	}
	if real, err := filepath.EvalSymlinks(filepath.Dir(dir)); err == nil {
		dir = filepath.Join(real, filepath.Base(dir))
	}
	for line := range strings.Lines(string(b)) {
		before, after, _ := strings.Cut(line, " - ")
		if f := strings.Fields(before); len(f) > 4 && unescape(f[4]) == dir {
			is = strings.HasPrefix(after, "overlay ")
		}
	}
	return is, nil
}

// sweepContainers removes the directories of containers that are no more: a daemon
// was killed over them.
func (d *Daemon) sweepContainers() {
	entries, _ := os.ReadDir(d.containerDir(""))
	for _, e := range entries {
		if _, err := os.Lstat(d.recordPath(e.Name())); !errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err := d.removeContainerDir(e.Name()); err != nil {
			d.log.Warn("what is left of a container is not all gone", "id", e.Name(), "err", err)
		}
	}
}
