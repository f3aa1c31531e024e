package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/varvefs/varve/fs"
	"github.com/varvefs/varve/fs/upper"
)

// Remove deletes a mount's record and its changes. One that is mounted is
// refused, unless forced.
func (d *Daemon) Remove(o UnmountOptions) (Removed, error) {
	ended, err := d.settle(o)
	if err != nil {
		return Removed{}, err
	}
	if ended != nil {
		o.Mount = ended.ID
	}
	d.mu.Lock()
	m, err := d.find(o.Mount)
	switch {
	case ended != nil && errors.Is(err, errNoMount): // its end has removed it
		d.mu.Unlock()
		return Removed{ID: ended.ID, Name: ended.Name}, nil
	case err != nil:
	case m.Base:
		err = m.notOurs()
	case m.coming || m.proc != nil:
		err = m.onItsWay()
	case m.jobs != 0:
		err = &Error{Message: fmt.Sprintf("the mount %q is in use: try again when that has ended", m.Name), Exit: ExitBusy}
	case m.tree != nil && !o.Force:
		err = &Error{Message: fmt.Sprintf("the mount %q is mounted at %s: umount it first, or force it with -f", m.Name, m.Dir), Exit: ExitBusy}
	default:
		// Taken out of sight it would end a moment later, and have its upper until then.
		if err = m.down(false); errors.Is(err, fs.ErrBusy) {
			err = m.down(true)
		}
		if err == nil {
			m.jobs = -1 // for us alone
		}
	}
	d.mu.Unlock()
	if err != nil {
		return Removed{}, err
	}
	r := Removed{ID: m.ID, Name: m.Name}
	if err := d.dropContainer(m); err != nil {
		d.mu.Lock()
		m.jobs = 0
		d.mu.Unlock()
		return r, fmt.Errorf("remove %s: %w", m.Name, err)
	}
	if m.Upper != "" {
		if r.Bytes, err = m.dropUpper(); err != nil {
			d.mu.Lock()
			m.jobs, m.Unmounted = 0, now()
			serr := m.save()
			d.mu.Unlock()
			err = errors.Join(err, serr)
			return r, fmt.Errorf("remove the changes of %s: %w", m.Name, upperError(err))
		}
	}
	m.OwnUpper = false
	d.forget(m)
	d.log.Info("removed", "mount", m.Name, "bytes", r.Bytes)
	return r, nil
}

// removing begins the name of an upper of ours that is being deleted: a daemon
// that is killed over it goes on when it starts again.
const removing = ".removing-"

// dropUpper deletes the mount's upper and says how large it was.
func (m *mount) dropUpper() (int64, error) {
	up, err := upper.Open(m.Upper)
	if errors.Is(err, upper.ErrNone) {
		os.Remove(m.Upper)
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	// Directories may be shut even to who owns them: what is in those is deleted
	// uncounted.
	size, _, _ := up.Usage(context.Background())
	if !m.OwnUpper {
		return size, up.Remove()
	}
	if err := up.Close(); err != nil {
		return size, err
	}
	gone := filepath.Join(filepath.Dir(m.Upper), removing+m.ID)
	if err := os.Rename(m.Upper, gone); err != nil {
		return size, err
	}
	return size, upper.RemoveAll(gone)
}

// sweepUppers ends what a daemon was killed over.
func (d *Daemon) sweepUppers() {
	entries, _ := os.ReadDir(filepath.Join(d.dirs.State, "uppers"))
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), removing) {
			if err := upper.RemoveAll(filepath.Join(d.dirs.State, "uppers", e.Name())); err != nil {
				d.log.Warn("changes that were removed are not all gone", "err", err)
			}
		}
	}
}

// Prune removes all mounts that are unmounted, with their changes.
func (d *Daemon) Prune() ([]Removed, error) {
	d.mu.Lock()
	var ids []string
	for _, m := range d.mounts {
		if m.Unmounted != nil && !m.coming && m.jobs == 0 && m.tree == nil && m.proc == nil {
			ids = append(ids, m.ID)
		}
	}
	d.mu.Unlock()
	out := []Removed{}
	var errs []error
	for _, id := range ids {
		r, err := d.Remove(UnmountOptions{Mount: id})
		if errors.Is(err, errNoMount) {
			continue // somebody was faster
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		out = append(out, r)
	}
	return out, errors.Join(errs...)
}
