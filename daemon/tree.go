package daemon

import (
	"bufio"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"

	"github.com/varvefs/varve/fetch"
	"github.com/varvefs/varve/index"
)

// indexVersion changes when the same layers give other bytes.
const indexVersion = "2"

// sharedIndex is an index that is mapped once however many mounts read it.
type sharedIndex struct {
	*index.Image
	d    *Daemon
	path string
	file string // where it lies now: a file of its own before it has reached the disk
	refs int    // guarded by Daemon.indexMu, as is
	// unwanted says that its file goes with it.
	unwanted bool
}

// indexPath gives where the index of an image with these layers lies: images
// with the same layers share it.
func (d *Daemon) indexPath(layers []*fetch.Handle) string {
	h := sha256.New()
	fmt.Fprintln(h, indexVersion)
	for _, l := range layers {
		fmt.Fprintln(h, l.Key)
	}
	return filepath.Join(d.dirs.Cache, "index", fmt.Sprintf("%x.erofs", h.Sum(nil)))
}

// dropIndex deletes the merged index of layers, when nobody uses it any more.
func (d *Daemon) dropIndex(digests []string) {
	var layers []*fetch.Handle
	for _, digest := range digests {
		found := d.fetcher.Layers(digest)
		if len(found) != 1 {
			return // which one it was made of is not known
		}
		layers = append(layers, &fetch.Handle{Layer: found[0]})
	}
	path := d.indexPath(layers)
	d.indexMu.Lock()
	defer d.indexMu.Unlock()
	if s := d.indexes[path]; s != nil {
		s.unwanted = true
		return
	}
	os.Remove(path) // it would be found again by its name, no harm done
}

// sharedIndex opens the merged index of layers, building it where it is missing
// or damaged. The caller releases it. Who builds one holds up only those who want
// the same.
func (d *Daemon) sharedIndex(layers []*fetch.Handle) (*sharedIndex, error) {
	path := d.indexPath(layers)
	for {
		d.indexMu.Lock()
		if s := d.indexes[path]; s != nil {
			s.refs++
			s.unwanted = false
			d.indexMu.Unlock()
			return s, nil
		}
		d.indexMu.Unlock()
		_, err, _ := d.indexing.Do(path, func() (any, error) {
			s := &sharedIndex{d: d, path: path}
			if err := s.open(layers); err != nil {
				return nil, fmt.Errorf("index: %w", err)
			}
			d.indexMu.Lock()
			defer d.indexMu.Unlock()
			if d.indexes[path] != nil {
				return nil, s.close() // another was faster
			}
			d.indexes[path] = s
			if s.file != path {
				s.refs++
				d.background.Go(s.settle)
			}
			return nil, nil
		})
		if err != nil {
			return nil, err
		}
	}
}

// open opens the index, building it where it is missing or damaged.
func (s *sharedIndex) open(layers []*fetch.Handle) (err error) {
	s.file = s.path
	s.Image, err = index.Open(s.file)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, index.ErrMalformed) {
		if s.file, err = buildIndex(filepath.Dir(s.path), layers); err == nil {
			if s.Image, err = index.Open(s.file); err != nil {
				os.Remove(s.file)
			}
		}
	}
	return err
}

// settle brings a new index to the disk and gives it its name, which is trusted
// when it is found. A mount does not wait for that.
func (s *sharedIndex) settle() {
	defer s.release()
	// The names of all layers were on the heap for a moment. A daemon that serves
	// mounts for weeks gives that memory back now, not at some later collection.
	debug.FreeOSMemory()
	if err := s.name(); err != nil {
		s.d.log.Warn("an index is not kept", "path", s.path, "err", err)
	}
}

func (s *sharedIndex) name() error {
	f, err := os.Open(s.file)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return err
	}
	if st, err := os.Lstat(s.path); err == nil && st.IsDir() {
		os.RemoveAll(s.path) // somebody's doing: a file cannot take its place
	}
	os.Remove(s.path)
	return os.Link(s.file, s.path)
}

func (s *sharedIndex) release() {
	s.d.indexMu.Lock()
	defer s.d.indexMu.Unlock()
	if s.refs--; s.refs == 0 {
		delete(s.d.indexes, s.path)
		s.close()
		if s.unwanted {
			os.Remove(s.path)
		}
	}
}

func (s *sharedIndex) close() error {
	if s.file != s.path {
		os.Remove(s.file)
	}
	return s.Close()
}

// buildIndex merges the layers' names into a new file of a directory, which has not
// reached the disk when it is there.
func buildIndex(dir string, layers []*fetch.Handle) (path string, err error) {
	// One layer after the other: the entries of all at once would be most of what
	// a daemon ever has on its heap.
	t := index.NewTree()
	devices := make([]index.Device, len(layers))
	for i, l := range layers {
		entries, err := l.Entries()
		if err == nil {
			err = t.Add(entries)
		}
		if err != nil {
			return "", err
		}
		_, hex, _ := strings.Cut(l.Digest, ":")
		devices[i] = index.Device{Tag: hex[:min(len(hex), 64)], Size: l.Size()}
	}
	f, err := os.CreateTemp(dir, newIndex)
	if err != nil {
		return "", err
	}
	w := bufio.NewWriterSize(f, 256<<10)
	if err = t.WriteTo(w, devices); err == nil {
		err = w.Flush()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		os.Remove(f.Name())
		return "", err
	}
	return f.Name(), nil
}

// newIndex begins the names of indexes that have not reached the disk.
const newIndex = "tmp-"
