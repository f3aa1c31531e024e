package daemon

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/varvefs/varve/fs"
	"github.com/varvefs/varve/image"
)

// record is what a mount needs to come back after a restart.
type record struct {
	MountOptions
	ID      string    `json:"id"`
	Target  string    `json:"target"`
	OwnDir  bool      `json:"own_dir"` // we made the directory and remove it
	Created time.Time `json:"created"`
}

// mount is a mount, or the record of one that could not be brought back.
type mount struct {
	record
	d      *Daemon
	tree   *tree // nil where it is down
	face   face
	kind   string
	reason string
	err    error // why it is down
}

// Mount mounts an image.
func (d *Daemon) Mount(ctx context.Context, o MountOptions, n note) (_ *Mount, err error) {
	start := time.Now()
	defer func() {
		result := "ok"
		if err != nil {
			result = "error"
		}
		d.m.MountSeconds.WithLabelValues(result).Observe(time.Since(start).Seconds())
	}()
	m := &mount{record: record{MountOptions: o, ID: newID(), Created: start}, d: d}
	if err := d.reserve(m); err != nil {
		return nil, err
	}
	if err = m.up(ctx, n); err == nil {
		m.Target = m.tree.manifest.Target.String()
		err = m.save()
	}
	d.mu.Lock()
	if err != nil {
		m.down(true)
		d.mu.Unlock()
		d.forget(m)
		return nil, err
	}
	v := m.view(true)
	d.mu.Unlock()
	d.log.Info("mounted", "mount", m.Name, "image", m.Image, "dir", m.Dir, "face", m.kind, "dur", time.Since(start))
	return &v, nil
}

// reserve gives m its name and directory, both for itself alone.
func (d *Daemon) reserve(m *mount) error {
	name, err := image.ParseName(m.Image)
	if err != nil {
		return fmt.Errorf("%w%w", err, silent{errUsage})
	}
	m.Image = name.String()
	if real, err := filepath.EvalSymlinks(m.Dir); err == nil && m.Dir != "" {
		m.Dir = real // a mount lies on a directory, not on a link to one
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if m.Name == "" {
		m.Name = d.freeName(name)
	} else if !validName.MatchString(m.Name) {
		return fmt.Errorf("name %q: want letters, digits, '_', '.' and '-', a letter or digit first%w", m.Name, silent{errUsage})
	}
	for _, o := range d.mounts {
		if o.Name == m.Name {
			return &Error{Message: fmt.Sprintf("the name %q is in use by the mount %s of %s: umount it or choose another with --name", m.Name, o.ID, o.Image), Exit: ExitBusy}
		}
		if m.Dir != "" && o.Dir == m.Dir {
			return &Error{Message: fmt.Sprintf("%s is already the mount %q of %s", m.Dir, o.Name, o.Image), Exit: ExitBusy}
		}
	}
	if m.Dir == "" {
		m.Dir, m.OwnDir = filepath.Join(d.dirs.Mounts(), m.Name), true
		if err := os.Mkdir(m.Dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	if err := d.checkDir(m.Dir); err != nil {
		if m.OwnDir {
			os.Remove(m.Dir) // fails if it is not empty, as it should
		}
		return err
	}
	d.mounts[m.ID] = m
	return nil
}

// checkDir refuses a directory that a mount would hide something in, or that
// would hide the store.
func (d *Daemon) checkDir(dir string) error {
	refuse := func(format string, args ...any) error {
		return &Error{Message: fmt.Sprintf(format, args...), Exit: ExitError}
	}
	mounted, err := isMountPoint(dir)
	if err != nil {
		return err
	}
	if mounted {
		return &Error{Message: fmt.Sprintf("something is already mounted at %s: unmount it first", dir), Exit: ExitBusy}
	}
	real, err := filepath.EvalSymlinks(dir)
	if errors.Is(err, os.ErrNotExist) {
		return refuse("%s does not exist: make the directory first", dir)
	}
	if err != nil {
		return err
	}
	for _, own := range []string{d.dirs.State, d.dirs.Cache} {
		if own, err = filepath.EvalSymlinks(own); err != nil {
			return err
		}
		if within(real, own) || within(own, real) {
			return refuse("%s and varve's own directory %s may not lie in one another: choose another directory", dir, own)
		}
	}
	st, err := os.Stat(real)
	if err != nil {
		return err
	}
	if !st.IsDir() {
		return refuse("%s is not a directory", dir)
	}
	f, err := os.Open(real)
	if err != nil {
		return err
	}
	defer f.Close()
	if names, _ := f.Readdirnames(1); len(names) > 0 {
		return refuse("%s is not empty: choose an empty directory", dir)
	}
	return nil
}

// within reports whether path is dir or lies below it.
func within(path, dir string) bool {
	rel, err := filepath.Rel(dir, path)
	return err == nil && rel != ".." && !strings.HasPrefix(rel, "../")
}

var (
	validName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}$`)
	notInName = regexp.MustCompile(`[^a-zA-Z0-9_.-]+`)
)

// freeName makes a name from the image's: python, python-2. The caller holds mu.
func (d *Daemon) freeName(n image.Name) string {
	base := n.Repository()
	if base == "" {
		base = strings.TrimSuffix(n.Path(), ".tar")
	}
	base = strings.TrimLeft(notInName.ReplaceAllString(filepath.Base(base), "-"), "_.-")
	if base == "" {
		base = "image"
	}
	base = base[:min(len(base), 100)]
	taken := func(name string) bool {
		for _, m := range d.mounts {
			if m.Name == name {
				return true
			}
		}
		return false
	}
	name := base
	for i := 2; taken(name); i++ {
		name = fmt.Sprintf("%s-%d", base, i)
	}
	return name
}

func newID() string {
	b := make([]byte, 32)
	rand.Read(b)
	return hex.EncodeToString(b)
}

// up opens the image and mounts its face.
func (m *mount) up(ctx context.Context, n note) error {
	kind, reason, err := m.d.faces.choose(m.Face)
	if err != nil {
		return err
	}
	t, err := m.d.open(ctx, m.ImageOptions, n)
	if err != nil {
		return err
	}
	f, err := m.d.faces.mount(m.Dir, kind, t, m.Setuid)
	if err != nil {
		t.close()
		return err
	}
	m.d.mu.Lock()
	defer m.d.mu.Unlock()
	m.tree, m.face, m.kind, m.reason, m.err = t, f, kind, reason, nil
	m.d.m.Mounts.WithLabelValues("mounted", kind).Inc()
	return nil
}

// down takes the face away. The caller holds mu.
func (m *mount) down(lazy bool) error {
	if m.tree == nil {
		return nil
	}
	if err := m.face.Unmount(lazy); err != nil {
		return err
	}
	m.d.m.Mounts.WithLabelValues("mounted", m.kind).Dec()
	t, done := m.tree, m.face.Done()
	m.tree, m.face = nil, nil
	select {
	case <-done:
		t.close()
	default:
		// Somebody is still in it and reads from the index.
		go func() { <-done; t.close() }()
	}
	return nil
}

// forget removes all trace of a mount that is down.
func (d *Daemon) forget(m *mount) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.mounts, m.ID)
	os.Remove(d.recordPath(m.ID))
	if m.OwnDir {
		os.Remove(m.Dir)
	}
}

// Unmount ends a mount and forgets it.
func (d *Daemon) Unmount(o UnmountOptions) (string, error) {
	d.mu.Lock()
	m, err := d.find(o.Mount)
	if err == nil {
		if err = m.down(o.Lazy); errors.Is(err, fs.ErrBusy) {
			err = fmt.Errorf("%s is busy: %s%w", m.Dir, whoIsIn(m.Dir), silent{fs.ErrBusy})
			if o.Force {
				err = m.down(true)
			}
		}
	}
	d.mu.Unlock()
	if err != nil {
		return "", err
	}
	d.forget(m)
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
		if m.Name == s || m.Dir == dir {
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

func (d *Daemon) inspect(s string) (Mount, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	m, err := d.find(s)
	if err != nil {
		return Mount{}, err
	}
	return m.view(true), nil
}

// view says what is known of m.
func (m *mount) view(layers bool) Mount {
	name, _ := image.ParseName(m.Image)
	v := Mount{
		ID: m.ID, Name: m.Name, Image: name.Familiar(), Target: m.Target, Dir: m.Dir, Created: m.Created,
		State: "mounted", Face: m.kind, FaceReason: m.reason, Offline: m.Offline, Platform: m.Platform,
	}
	if m.tree == nil {
		v.State = "restoring"
		if m.err != nil {
			v.State, v.Error = "failed", m.err.Error()
		}
		return v
	}
	t := m.tree
	v.Target, v.Manifest, v.Config = t.manifest.Target.String(), t.manifest.Digest.String(), t.manifest.ConfigDesc.Digest.String()
	if t.manifest.Platform != "" {
		v.Platform = t.manifest.Platform
	}
	v.Files = t.index.Inodes()
	for i, h := range t.layers {
		l := Layer{
			Digest: h.Digest, DiffID: h.About.DiffID, MediaType: t.manifest.Layers[i].MediaType, Format: h.About.Format,
			Reason: h.About.Why, Size: h.About.Size, Fetched: h.Fetched(), Local: h.Local(), Whole: h.Whole(),
		}
		v.Size += l.Size
		v.Fetched += l.Fetched
		v.Local += l.Local
		if layers {
			v.Layers = append(v.Layers, l)
		}
	}
	return v
}
