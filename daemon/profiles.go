package daemon

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/fetch"
	"github.com/varvefs/varve/fetch/profile"
)

// profileSuffix ends the names of profiles in the state directory, which begin as
// their workloads are called.
const profileSuffix = ".json.gz"

func (d *Daemon) profileDir(m digest.Digest) string {
	return filepath.Join(d.dirs.State, "profiles", m.Encoded())
}

func (d *Daemon) profilePath(m digest.Digest, name string) string {
	return filepath.Join(d.profileDir(m), profile.Title(name)+profileSuffix)
}

// localProfile gives the profile of a workload that is kept here, nil if there is
// none.
func (d *Daemon) localProfile(m digest.Digest, name string) (*profile.Profile, error) {
	path := d.profilePath(m, name)
	raw, err := readProfileFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	var p *profile.Profile
	if err == nil {
		p, err = profile.Decode(raw)
	}
	if err == nil && p.Manifest != m.String() {
		err = fmt.Errorf("%w: %.19s", profile.ErrForeign, p.Manifest)
	}
	if err != nil {
		return nil, fmt.Errorf("the start-up profile %s cannot be used: %w", path, err)
	}
	p.Name = name
	return p, nil
}

// readProfileFile reads what may be a profile, whatever lies there.
func readProfileFile(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Size() > profile.MaxBytes {
		return nil, fmt.Errorf("%w: %v, %d bytes", profile.ErrMalformed, st.Mode().Type(), st.Size())
	}
	return io.ReadAll(io.LimitReader(f, profile.MaxBytes+1))
}

// keepProfile puts a profile in the place of the one that its workload had.
func (d *Daemon) keepProfile(p *profile.Profile) error {
	raw, err := p.Encode()
	if err != nil {
		return err
	}
	m := digest.Digest(p.Manifest)
	if err := os.MkdirAll(d.profileDir(m), 0o700); err != nil {
		return err
	}
	return writeWhole(d.profilePath(m, p.Name), raw)
}

// removeProfile deletes a profile and reports whether it was there.
func (d *Daemon) removeProfile(m digest.Digest, name string) (bool, error) {
	err := os.Remove(d.profilePath(m, name))
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	os.Remove(d.profileDir(m)) // if it was the last
	return err == nil, err
}

// profileNames gives the workloads of an image that have a profile here.
func (d *Daemon) profileNames(m digest.Digest) (names []string) {
	files, _ := os.ReadDir(d.profileDir(m))
	for _, f := range files {
		title, ok := strings.CutSuffix(f.Name(), profileSuffix)
		if name, err := profile.ParseName(title); ok && err == nil && profile.Title(name) == title {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// profiled gives the images that have a profile here.
func (d *Daemon) profiled() (all []digest.Digest) {
	dirs, _ := os.ReadDir(filepath.Join(d.dirs.State, "profiles"))
	for _, f := range dirs {
		if m := digest.NewDigestFromEncoded(digest.SHA256, f.Name()); m.Validate() == nil {
			all = append(all, m)
		}
	}
	return all
}

// sweepProfiles removes what a daemon that was killed was about to keep.
func (d *Daemon) sweepProfiles() {
	left, _ := filepath.Glob(filepath.Join(d.dirs.State, "profiles", "*", "tmp-*"))
	for _, path := range left {
		if !strings.HasSuffix(path, profileSuffix) {
			os.Remove(path)
		}
	}
}

// profileLayers names the layers of a tree as profiles do. What lies behind the
// contents in a data file depends on who made the index, and is in no profile.
func profileLayers(t *tree) []profile.Layer {
	out := make([]profile.Layer, len(t.layers))
	for i, h := range t.layers {
		out[i] = profile.Layer{Digest: h.Digest, Size: h.Size()}
		if a := h.About(); a.Index == fetch.KindBundle || a.Index == fetch.KindSOCI {
			out[i].Size = a.Contents
		}
	}
	return out
}
