package daemon

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/fs"
	"github.com/varvefs/varve/fs/upper"
)

// The writers that an upper can have.
const (
	overlayAuto   = "auto"
	overlayKernel = "kernel"
	overlayFuse   = "fuse"
)

// writer is one way to write an upper, and the form that it gives it.
type writer struct {
	kind string
	form upper.Form
}

// writers gives the ways in which an upper can be written here, the best first.
// have is the form of one that is there already, "" for a new one.
func writers(asked string, have upper.Form) ([]writer, error) {
	root, nested := os.Geteuid() == 0, fs.InUserNamespace()
	var all []writer
	if root && nested {
		all = []writer{{overlayKernel, upper.User}, {overlayFuse, upper.Override}, {overlayFuse, upper.User}}
	} else if root {
		all = []writer{{overlayKernel, upper.Trusted}, {overlayFuse, upper.Trusted}, {overlayKernel, upper.User}, {overlayFuse, upper.Override}, {overlayFuse, upper.User}}
	} else {
		all = []writer{{overlayFuse, upper.Override}}
	}
	switch asked {
	case "", overlayAuto, overlayKernel, overlayFuse:
	default:
		return nil, fmt.Errorf("overlay %q: want auto, kernel or fuse%w", asked, silent{errUsage})
	}
	var out []writer
	for _, w := range all {
		if (asked == "" || asked == overlayAuto || asked == w.kind) && (have == "" || have == w.form) {
			out = append(out, w)
		}
	}
	switch {
	case len(out) > 0:
		return out, nil
	case !root && asked == overlayKernel:
		return nil, errors.New("mounting overlayfs needs root, or a user namespace that the daemon runs in (--overlay fuse works without)")
	case have != "" && asked == overlayKernel:
		return nil, fmt.Errorf("the upper was written for a user without privilege (form %q), which the kernel's overlayfs does not understand: use --overlay fuse", have)
	}
	return nil, fmt.Errorf("the upper is of form %q, which this user cannot write: mount it as the user who made it", have)
}

// writable mounts t with the mount's upper over it.
func (m *mount) writable(t *tree, kind string) (_ face, err error) {
	if m.Upper == "" {
		m.Upper, m.OwnUpper = filepath.Join(m.d.dirs.State, "uppers", m.ID), true
	}
	if err := m.d.checkUpper(m); err != nil {
		return nil, err
	}
	up, err := upper.Open(m.Upper)
	fresh := errors.Is(err, upper.ErrNone)
	if err != nil && !fresh {
		return nil, upperError(err)
	}
	if fresh && m.Target != "" { // it was mounted before
		return nil, fmt.Errorf("the changes of %q are gone from %s: bring them back, or delete the mount (varve rm %[1]s)", m.Name, m.Upper)
	}
	var have upper.Form
	if up != nil {
		if up.Image != t.manifest.Digest.String() {
			up.Close()
			return nil, fmt.Errorf("upper %s holds changes to another image (%s): choose another directory with --upper, or mount that image", m.Upper, up.Image)
		}
		have = up.Form
	}
	ways, err := writers(m.Overlay, have)
	if err != nil {
		if up != nil {
			up.Close()
		}
		return nil, err
	}
	var failed []error
	for i, w := range ways {
		if up == nil {
			if up, err = m.newUpper(t, w.form); err != nil {
				return nil, errors.Join(append(failed, err)...)
			}
		}
		f, err := m.d.faces.union(m, w.kind, kind, t, up)
		if err == nil {
			m.upper, m.overlay = up, w.kind
			m.overlayReason = overlayReason(m.Overlay, w, failed)
			return f, nil
		}
		failed = append(failed, fmt.Errorf("%s: %w", w.kind, err))
		if fresh {
			err = up.Remove()
			up = nil
		} else if i == len(ways)-1 {
			err = up.Close()
		}
		if err != nil {
			failed = append(failed, err)
		}
	}
	return nil, fmt.Errorf("the writable mount: %w", errors.Join(failed...))
}

func overlayReason(asked string, w writer, failed []error) string {
	switch {
	case asked == w.kind:
		return "asked for"
	case len(failed) > 0:
		return "the kernel's overlayfs cannot be had: " + failed[0].Error()
	case w.kind == overlayKernel && w.form == upper.User:
		return "the kernel mounts overlayfs in this user namespace"
	case w.kind == overlayKernel:
		return "the kernel mounts overlayfs"
	case os.Geteuid() != 0:
		return "a plain user may not mount overlayfs"
	}
	return fmt.Sprintf("the upper is of form %q", w.form)
}

// newUpper makes the mount's upper, whose root looks like the image's.
func (m *mount) newUpper(t *tree, form upper.Form) (*upper.Dir, error) {
	if m.OwnUpper {
		if err := os.MkdirAll(filepath.Dir(m.Upper), 0o700); err != nil {
			return nil, err
		}
	}
	root, err := t.index.Inode(t.index.Root())
	if err != nil {
		return nil, err
	}
	top := upper.Attr{Mode: root.Mode, UID: root.UID, GID: root.GID, Mtime: unix.Timespec{Sec: root.Mtime, Nsec: int64(root.MtimeNs)}, Xattrs: map[string]string{}}
	err = t.index.Xattrs(&root, func(prefix string, rest, value []byte) bool {
		top.Xattrs[prefix+string(rest)] = string(value)
		return true
	})
	if err != nil {
		return nil, err
	}
	up, err := upper.Create(m.Upper, upper.About{Image: t.manifest.Digest.String(), Form: form}, top)
	if err != nil && m.OwnUpper { // of a full disk as a rule, and nobody would find it again
		err = errors.Join(err, upper.RemoveAll(m.Upper))
	}
	return up, upperError(err)
}

// upperError gives an upper that somebody else has the exit code of a thing in
// use.
func upperError(err error) error {
	if errors.Is(err, upper.ErrInUse) {
		return fmt.Errorf("%w%w", err, silent{fs.ErrBusy})
	}
	return err
}

// checkUpper refuses an upper where the store, another mount's upper or the mount
// itself lies.
func (d *Daemon) checkUpper(m *mount) error {
	if m.OwnUpper {
		return nil
	}
	dir, err := realPath(m.Upper)
	if err != nil {
		return fmt.Errorf("upper: %w", err)
	}
	m.Upper = dir
	for _, own := range []string{d.dirs.State, d.dirs.Cache, d.dirs.Run} {
		if own, err = filepath.EvalSymlinks(own); err != nil {
			return err
		}
		if within(dir, own) || within(own, dir) {
			return fmt.Errorf("upper %s and varve's own directory %s may not lie in one another: choose another directory", dir, own)
		}
	}
	if within(dir, m.Dir) || within(m.Dir, dir) {
		return fmt.Errorf("upper %s and the mount at %s may not lie in one another: choose another directory", dir, m.Dir)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, o := range d.mounts {
		if o == m {
			continue
		}
		if o.Upper != "" && (within(dir, o.Upper) || within(o.Upper, dir)) {
			return &Error{Message: fmt.Sprintf("upper %s: the mount %q has its changes in %s: choose another directory", dir, o.Name, o.Upper), Exit: ExitBusy}
		}
		if within(dir, o.Dir) {
			return fmt.Errorf("upper %s lies in the mount %q at %s: choose another directory", dir, o.Name, o.Dir)
		}
	}
	return nil
}

// realPath resolves the links of a path whose last name need not be there yet.
func realPath(path string) (string, error) {
	real, err := filepath.EvalSymlinks(path)
	if errors.Is(err, os.ErrNotExist) {
		var parent string
		if parent, err = filepath.EvalSymlinks(filepath.Dir(path)); err == nil {
			real = filepath.Join(parent, filepath.Base(path))
		}
	}
	return real, err
}

// now is the time as records keep it.
func now() *time.Time {
	t := time.Now().UTC()
	return &t
}
