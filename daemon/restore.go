package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/varvefs/varve/fs"
)

func (d *Daemon) recordPath(id string) string {
	return filepath.Join(d.dirs.State, "mounts", id+".json")
}

// save writes the mount's record, whole or not at all.
func (m *mount) save() error {
	kept := m.record
	kept.AuthConfig = ""
	b, err := json.Marshal(kept)
	if err != nil {
		return err
	}
	return writeWhole(m.d.recordPath(m.ID), b)
}

// writeWhole puts a file in the place of another, whole or not at all.
func writeWhole(path string, b []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), "tmp-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// restore brings back the mounts of an earlier run, without asking a registry:
// manifests, names and frames are here. One that cannot come back stays listed
// with the reason, until it is unmounted. Where the cache was deleted they need
// the registry after all: then the daemon does not wait for them.
func (d *Daemon) restore(ctx context.Context) {
	paths, _ := filepath.Glob(filepath.Join(d.dirs.State, "mounts", "*.json"))
	var wg sync.WaitGroup
	defer func() {
		done := make(chan struct{})
		d.background.Go(func() { wg.Wait(); close(done) })
		select {
		case <-done:
		case <-time.After(5 * time.Second):
			d.log.Warn("mounts are still being restored")
		}
	}()
	for _, p := range paths {
		m := &mount{d: d}
		b, err := os.ReadFile(p)
		if err == nil {
			err = json.Unmarshal(b, &m.record)
		}
		if err != nil || m.ID == "" || filepath.Base(p) != m.ID+".json" {
			d.log.Error("the record of a mount cannot be read and is left alone", "path", p, "err", err)
			continue
		}
		d.mounts[m.ID] = m
		if m.Unmounted != nil {
			continue
		}
		m.coming = true
		wg.Go(func() {
			outcome, back := "remounted", d.bringBack
			if m.Container != nil && m.Container.Active {
				back = d.resumeContainer
			}
			if err := back(ctx, m); err != nil {
				outcome = "failed"
				d.mu.Lock()
				m.err, m.coming = err, false
				d.mu.Unlock()
				d.log.Error("mount not restored", "mount", m.Name, "image", m.Image, "dir", m.Dir, "err", err)
			}
			d.m.Restores.WithLabelValues(outcome).Inc()
		})
	}
}

// sweep removes the directories of mounts that a daemon was killed over before
// it had recorded them. One with anything in it, or mounted on it, stays; those
// of mounts that come back are made again. It ends what else was left half done.
func (d *Daemon) sweep() {
	dirs, _ := filepath.Glob(filepath.Join(d.dirs.Mounts(), "*"))
	for _, dir := range dirs {
		os.Remove(dir)
	}
	// What the kernel's overlayfs lay on is held by that, not by its name.
	lowers, _ := filepath.Glob(filepath.Join(d.dirs.Lowers(), "*"))
	for _, dir := range lowers {
		if err := fs.Detach(dir); err != nil {
			d.log.Warn("a mount of an earlier run stays", "dir", dir, "err", err)
		}
		os.Remove(dir)
	}
	probes, _ := filepath.Glob(filepath.Join(d.dirs.Run, probePrefix+"*"))
	for _, dir := range probes {
		if err := endProbe(dir); err != nil {
			d.log.Warn("a mount of an earlier run's probe stays", "dir", dir, "err", err)
		}
	}
	unsettled, _ := filepath.Glob(filepath.Join(d.dirs.Cache, "index", newIndex+"*"))
	for _, path := range unsettled {
		os.Remove(path)
	}
	d.sweepUppers()
	d.sweepContainers()
	d.sweepProfiles()
}

func (d *Daemon) bringBack(ctx context.Context, m *mount) error {
	if err := fs.Detach(m.Dir); err != nil {
		return err
	}
	if m.OwnDir {
		if err := os.MkdirAll(m.Dir, 0o755); err != nil {
			return err
		}
	}
	if err := d.checkDir(m.Dir); err != nil {
		return err
	}
	m.target, m.restoring = m.Target, true
	defer func() { m.restoring = false }()
	return m.up(ctx, func(event) {})
}

// isMountPoint asks the kernel's list, which needs nothing of what is mounted.
func isMountPoint(dir string) (bool, error) {
	real, err := filepath.EvalSymlinks(filepath.Dir(dir))
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return false, nil
		}
		return false, err
	}
	real = filepath.Join(real, filepath.Base(dir))
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return false, err
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 && unescape(f[4]) == real {
			return true, nil
		}
	}
	return false, nil
}

// unescape undoes the octal escapes of /proc/self/mountinfo.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// whoIsIn names the processes that keep a mount busy.
func whoIsIn(dir string) string {
	var who []string
	procs, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range procs {
		if what := uses(p, dir); what != "" {
			comm, _ := os.ReadFile(filepath.Join(p, "comm"))
			who = append(who, "pid "+filepath.Base(p)+" ("+strings.TrimSpace(string(comm))+", "+what+")")
			if len(who) == 8 {
				break
			}
		}
	}
	if len(who) == 0 {
		return "something is mounted in it, or a process of another mount namespace is"
	}
	return strings.Join(who, ", ")
}

// uses says by what a process holds a mount.
func uses(proc, dir string) string {
	links := []string{"cwd", "root", "exe"}
	fds, _ := filepath.Glob(filepath.Join(proc, "fd", "*"))
	for _, fd := range fds {
		links = append(links, filepath.Join("fd", filepath.Base(fd)))
	}
	for _, l := range links {
		if to, err := os.Readlink(filepath.Join(proc, l)); err == nil && within(to, dir) && filepath.IsAbs(to) {
			return l
		}
	}
	maps, _ := os.ReadFile(filepath.Join(proc, "maps"))
	if strings.Contains(string(maps), " "+dir+"/") {
		return "mapped file"
	}
	return ""
}
