package daemon

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/varvefs/varve/fs"
)

// lookEvery is how often the layers of mounts are looked at: nobody waits for what
// comes of it, and it costs a few loads of memory a mount.
const lookEvery = time.Second

// attend has mounts become the best that they can be while their layers become
// whole, and gives up what is cached twice, until ctx ends.
func (d *Daemon) attend(ctx context.Context) {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	rest := rest{}
	for last := time.Now(); ; {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		d.mu.Lock()
		layers := map[string]fs.Data{}
		for _, m := range d.mounts {
			m.advance()
			if m.tree != nil && m.growth == nil {
				for _, h := range m.tree.layers {
					layers[h.Key] = h
				}
			}
		}
		d.mu.Unlock()
		if time.Since(last) >= restAfter {
			last = time.Now()
			rest.forget(layers, d.faces.forget)
		}
	}
}

// advance makes use of it where all layers of a mount are whole: the kernel reads
// them in place from then on, or reads further ahead of what it asks us for. Not
// while its start is recorded, which needs to see what is read. The caller holds
// mu.
func (m *mount) advance() {
	if m.tree == nil || m.growth != nil || m.coming || m.face == nil || !m.tree.ready() || m.start.reading() {
		return
	}
	switch f := m.below().(type) {
	case *kernelFace:
		if !f.served || m.RW || m.Base || f.stays != nil && (f.again.IsZero() || time.Now().Before(f.again)) {
			return
		}
		f.stays, f.again = m.toPlain(f), time.Time{}
		if errors.Is(f.stays, fs.ErrCovered) || errors.Is(f.stays, errNotReady) {
			f.again = time.Now().Add(10 * lookEvery) // it may not stay so
		}
	case interface{ ReadFar() }:
		f.ReadFar()
	}
}

// below gives the face of the image: that which overlayfs lies on, where there is
// one.
func (m *mount) below() face {
	if o, ok := m.face.(*overlay); ok && o.lower != nil {
		return o.lower.face
	}
	return m.face
}

// ready reports whether the kernel may read all layers by itself.
func (t *tree) ready() bool {
	for _, h := range t.layers {
		if !ready(h) {
			return false
		}
	}
	return true
}

// errNotReady says that a layer was dropped while its mount changed over.
var errNotReady = errors.New("a layer is not whole any more")

// toPlain puts a mount of the layers' own files in the place of old, which reads
// some of them from us: nothing of ours is in the way from then on. Who is in the
// old one stays there and is served, every new path leads to the new one; inodes
// keep their numbers, since both are of the same index. The caller holds mu.
func (m *mount) toPlain(old *kernelFace) error {
	if old.id == 0 {
		return errors.New("the kernel does not say which mount it is")
	}
	f, err := m.d.faces.beneath(m.Dir, old.id, m.tree, m.Setuid, true)
	if err != nil {
		m.d.log.Debug("a mount does not change over", "mount", m.Name, "err", err)
		return err
	}
	m.tree.retain() // for who is in the old one
	t := m.tree
	m.face = f
	err = old.Unmount(true)
	go func() { <-old.Done(); t.close() }()
	if err != nil {
		m.d.log.Error("the mount whose place was taken stays", "mount", m.Name, "err", err)
	}
	m.d.log.Info("changed over to plain files", "mount", m.Name, "image", m.Image)
	return nil
}

// faceReason says why the mount has its face, and what still stands between the
// kernel and the layers' files. The caller holds mu.
func (m *mount) faceReason() string {
	if m.face == nil {
		return m.reason
	}
	k, ok := m.below().(*kernelFace)
	if !ok {
		return m.reason
	}
	partial, unproven := 0, 0
	for _, h := range m.tree.layers {
		if !h.Whole() {
			partial++
		} else if !ready(h) {
			unproven++
		}
	}
	n := len(m.tree.layers)
	switch {
	case !k.served:
		return m.reason + "; it reads the layers' own files"
	case partial > 0 && unproven > 0:
		return fmt.Sprintf("%s; the daemon serves layers: of %d, %d are not whole and %d not proven", m.reason, n, partial, unproven)
	case partial > 0:
		return fmt.Sprintf("%s; the daemon serves layers: of %d, %d are not whole", m.reason, n, partial)
	case unproven > 0:
		return fmt.Sprintf("%s; the daemon serves layers: of %d, %d are not proven", m.reason, n, unproven)
	case m.RW:
		return m.reason + "; all layers are whole, but the daemon serves them until no writable mount of the image is up"
	case k.stays != nil:
		return fmt.Sprintf("%s; all layers are whole, but the daemon serves them until it is mounted anew: %v", m.reason, k.stays)
	}
	return m.reason + "; all layers are whole, and it is about to read their own files, once its start is recorded"
}
