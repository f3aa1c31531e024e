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
	"github.com/varvefs/varve/fs/upper"
	"github.com/varvefs/varve/image"
)

// record is what a mount needs to come back after a restart.
type record struct {
	MountOptions
	ID        string     `json:"id"`
	Target    string     `json:"target"`
	OwnDir    bool       `json:"own_dir"`             // we made the directory and remove it
	OwnUpper  bool       `json:"own_upper,omitempty"` // the upper lies in the state directory
	Unmounted *time.Time `json:"unmounted,omitempty"` // since when only its changes are kept
	Created   time.Time  `json:"created"`
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

	jobs int // what reads the upper now, see [mount.use]; guarded by Daemon.mu

	// Of a writable mount that is up.
	upper         *upper.Dir
	union         *fs.Union // nil where the kernel writes
	overlay       string
	overlayReason string
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
	m, err := d.reserve(o)
	if err != nil {
		return nil, err
	}
	again := m.Unmounted
	if err = m.up(ctx, n); err == nil {
		m.Target, m.Unmounted = m.tree.manifest.Target.String(), nil
		err = m.save()
	}
	d.mu.Lock()
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
	d.log.Info("mounted", "mount", m.Name, "image", m.Image, "dir", m.Dir, "face", m.kind, "overlay", m.overlay, "dur", time.Since(start))
	return &v, nil
}

// reserve gives a mount its name and directory, both for itself alone. A name
// whose changes are kept brings that mount back.
func (d *Daemon) reserve(o MountOptions) (*mount, error) {
	if !o.RW && (o.Upper != "" || o.Overlay != "") && o.Image != "" {
		return nil, fmt.Errorf("--upper and --overlay are for writable mounts: give --rw as well%w", silent{errUsage})
	}
	if real, err := filepath.EvalSymlinks(o.Dir); err == nil && o.Dir != "" {
		o.Dir = real // a mount lies on a directory, not on a link to one
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	m, err := d.named(o)
	if err != nil {
		return nil, err
	}
	for _, other := range d.mounts {
		if other != m && o.Dir != "" && other.Dir == o.Dir && other.Unmounted == nil {
			return nil, &Error{Message: fmt.Sprintf("%s is already the mount %q of %s", o.Dir, other.Name, other.Image), Exit: ExitBusy}
		}
	}
	was := m.record
	if o.Dir != "" {
		m.Dir, m.OwnDir = o.Dir, false
	} else if m.Dir == "" {
		m.Dir, m.OwnDir = filepath.Join(d.dirs.Mounts(), m.Name), true
	}
	if m.OwnDir {
		if err := os.Mkdir(m.Dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			m.record = was
			return nil, err
		}
	}
	if err := d.checkDir(m.Dir); err != nil {
		m.removeDir()
		m.record = was
		return nil, err
	}
	m.coming = true
	d.mounts[m.ID] = m
	return m, nil
}

// named gives the mount that a request is for: a new one, or one that was
// unmounted and has its name. The caller holds mu.
func (d *Daemon) named(o MountOptions) (*mount, error) {
	var kept *mount
	for _, other := range d.mounts {
		if o.Name == "" || other.Name != o.Name {
			continue
		}
		if other.Unmounted == nil || other.coming || other.jobs < 0 {
			return nil, &Error{Message: fmt.Sprintf("the name %q is in use by the mount %s of %s: umount it or choose another with --name", o.Name, other.ID[:12], other.Image), Exit: ExitBusy}
		}
		kept = other
	}
	if o.Image == "" && kept == nil {
		if o.Name == "" {
			return nil, fmt.Errorf("the image is missing%w", silent{errUsage})
		}
		return nil, fmt.Errorf("No such mount: %s: there are no changes to bring back (varve ps -a lists what there is)%w", o.Name, silent{errNoMount})
	}
	if kept != nil {
		return kept, kept.again(o)
	}
	name, err := image.ParseName(o.Image)
	if err != nil {
		return nil, fmt.Errorf("%w%w", err, silent{errUsage})
	}
	o.Image = name.String()
	if o.Name == "" {
		o.Name = d.freeName(name)
	} else if !validName.MatchString(o.Name) {
		return nil, fmt.Errorf("name %q: want letters, digits, '_', '.' and '-', a letter or digit first%w", o.Name, silent{errUsage})
	}
	return &mount{record: record{MountOptions: o, ID: newID(), Created: time.Now()}, d: d}, nil
}

// again prepares a mount whose changes were kept for coming back, as o asks.
func (m *mount) again(o MountOptions) error {
	refuse := func(format string, args ...any) error {
		return &Error{Message: fmt.Sprintf("the name %q keeps changes to %s", m.Name, m.Image) + fmt.Sprintf(format, args...), Exit: ExitBusy}
	}
	if o.Image != "" {
		name, err := image.ParseName(o.Image)
		if err != nil {
			return fmt.Errorf("%w%w", err, silent{errUsage})
		}
		if name.String() != m.Image {
			return refuse(": `varve rm %s` deletes them, --name chooses another name", m.Name)
		}
	}
	if o.Upper != "" && o.Upper != m.Upper {
		return refuse(" in %s: leave --upper away, or choose another name", m.Upper)
	}
	m.Auth, m.AuthConfig, m.Offline = o.Auth, o.AuthConfig, o.Offline
	m.Insecure = m.Insecure || o.Insecure
	if o.Overlay != "" {
		m.Overlay = o.Overlay
	}
	if o.Face != "" {
		m.Face = o.Face
	}
	m.Setuid = o.Setuid
	m.target = m.Target
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

// up opens the image and mounts its face, the upper over it if there is one.
func (m *mount) up(ctx context.Context, n note) error {
	kind, reason, err := m.d.faces.choose(m.Face)
	if err != nil {
		return err
	}
	t, err := m.d.open(ctx, m.ImageOptions, n)
	if err != nil {
		return err
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
	m.tree, m.face, m.kind, m.reason, m.err, m.coming = t, f, kind, reason, nil, false
	m.d.m.Mounts.WithLabelValues("mounted", kind).Inc()
	return nil
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
	t, up, done := m.tree, m.upper, m.face.Done()
	if _, ok := m.face.(*overlay); ok && up != nil {
		// Nobody tells when the last has left what the kernel serves. Whether the
		// upper is free then is asked of the kernel, see [fs.UpperInUse].
		up.Close()
		up = nil
	}
	m.tree, m.face, m.upper, m.union = nil, nil, nil, nil
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
		State: "mounted", Face: m.kind, FaceReason: m.reason, Offline: m.Offline, Platform: m.Platform,
		RW: m.RW, Upper: m.Upper, Overlay: m.overlay, OverlayReason: m.overlayReason, Unmounted: m.Unmounted,
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
