package daemon

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/varvefs/varve/fs"
	"github.com/varvefs/varve/fs/upper"
)

// lower is an image's face that overlayfs mounts lie on: one for all writable
// mounts of the image, so that they share its page cache too.
type lower struct {
	f    *faces
	dir  string
	face face
	tree *tree
	refs int // guarded by faces.mu
}

// union mounts t and up as one at the mount's directory.
func (f *faces) union(m *mount, writer, kind string, t *tree, up *upper.Dir) (face, error) {
	if writer == overlayFuse {
		o := f.options(t, m.Setuid)
		u, err := fs.NewUnion(t.index.Image, t.data(), up, o)
		if err != nil {
			return nil, err
		}
		s, err := fs.ServeUnion(m.Dir, u, o)
		if err != nil {
			return nil, err
		}
		m.union = u
		return s, nil
	}
	// After a crash those who are still in the old mount must not keep the new one
	// from coming.
	if m.target == "" || m.Unmounted != nil {
		if used, err := fs.UpperInUse(up); err != nil {
			return nil, err
		} else if used {
			return nil, &Error{Message: fmt.Sprintf("the changes of %q are in use: somebody is still in a mount of them that was taken out of sight (a directory or a file open there)", m.Name), Exit: ExitBusy}
		}
	}
	l, err := f.lower(t, kind)
	if err != nil {
		return nil, err
	}
	o := f.options(t, m.Setuid)
	o.Steady = kind == faceKernel
	k, err := fs.MountOverlay(m.Dir, l.dir, up, o)
	if err != nil {
		return nil, errors.Join(err, l.release())
	}
	return &overlay{k, l}, nil
}

// lower gives the shared face of t, mounted where only the daemon's user comes.
func (f *faces) lower(t *tree, kind string) (*lower, error) {
	sum := sha256.Sum256([]byte(kind + " " + t.index.path))
	dir := filepath.Join(f.d.dirs.Lowers(), fmt.Sprintf("%x", sum[:8]))
	f.lowering.Lock()
	defer f.lowering.Unlock()
	f.mu.Lock()
	l := f.lowers[dir]
	if l != nil {
		l.refs++
	}
	f.mu.Unlock()
	if l != nil {
		return l, nil
	}
	if err := fs.Detach(dir); err != nil { // of a daemon that died
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	got, err := f.mount(dir, kind, t, false)
	if err != nil {
		os.Remove(dir)
		return nil, err
	}
	t.retain()
	l = &lower{f: f, dir: dir, face: got, tree: t, refs: 1}
	f.mu.Lock()
	f.lowers[dir] = l
	f.mu.Unlock()
	return l, nil
}

// release unmounts the face when nobody lies on it any more.
func (l *lower) release() error {
	if l == nil { // of an earlier daemon
		return nil
	}
	l.f.lowering.Lock()
	defer l.f.lowering.Unlock()
	l.f.mu.Lock()
	l.refs--
	last := l.refs == 0
	if last {
		delete(l.f.lowers, l.dir)
	}
	l.f.mu.Unlock()
	if !last {
		return nil
	}
	// The kernel may take a moment to let go of what lay on it.
	if err := l.face.Unmount(false); err != nil {
		if err := l.face.Unmount(true); err != nil {
			return err
		}
	}
	os.Remove(l.dir)
	go func() { <-l.face.Done(); l.tree.close() }()
	return nil
}

// overlay is the kernel's overlayfs over a lower.
type overlay struct {
	*fs.Kernel
	lower *lower
}

// Unmount ends the mount. Where somebody is in it and lazy takes it out of sight,
// what it lies on stays until the daemon ends: nobody says when they have left.
func (o *overlay) Unmount(lazy bool) error {
	if err := o.Kernel.Unmount(lazy); err != nil {
		return err
	}
	select {
	case <-o.Done():
		return o.lower.release()
	default:
		return nil
	}
}
