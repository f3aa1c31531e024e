package daemon

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/varvefs/varve/image"
)

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
		if m.Base {
			m.Dir = filepath.Join(d.dirs.Lowers(), m.Name)
		}
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
		if o.proc != nil && o.proc.made != nil {
			return nil, &Error{Message: fmt.Sprintf("the name %q is already in use by %s of %s: remove it (varve rm) or choose another with --name", o.Name, other.ID[:12], other.Image), Exit: ExitBusy}
		}
		if other.Unmounted == nil || other.coming || other.jobs < 0 || other.proc != o.proc {
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
	m := &mount{record: record{MountOptions: o, ID: newID(), Created: time.Now()}, d: d, proc: o.proc}
	if o.proc != nil {
		m.Container = o.proc.made
	}
	return m, nil
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
	m.Setuid = o.Setuid || m.Container != nil && os.Geteuid() == 0
	m.Prefetch, m.Profile, m.RecordFor = o.Prefetch, o.Profile, o.RecordFor
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
