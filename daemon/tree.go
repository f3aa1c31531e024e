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

	"golang.org/x/sync/errgroup"

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
	refs int // guarded by Daemon.indexMu
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

// sharedIndex opens the merged index of layers, building it where it is missing
// or damaged. The caller releases it. Who builds one holds up only those who want
// the same.
func (d *Daemon) sharedIndex(layers []*fetch.Handle) (*sharedIndex, error) {
	path := d.indexPath(layers)
	for {
		d.indexMu.Lock()
		if s := d.indexes[path]; s != nil {
			s.refs++
			d.indexMu.Unlock()
			return s, nil
		}
		d.indexMu.Unlock()
		_, err, _ := d.indexing.Do(path, func() (any, error) {
			im, err := openIndex(path, layers)
			if err != nil {
				return nil, fmt.Errorf("index: %w", err)
			}
			d.indexMu.Lock()
			defer d.indexMu.Unlock()
			if d.indexes[path] != nil {
				return nil, im.Close() // another was faster
			}
			d.indexes[path] = &sharedIndex{Image: im, d: d, path: path}
			return nil, nil
		})
		if err != nil {
			return nil, err
		}
	}
}

func openIndex(path string, layers []*fetch.Handle) (*index.Image, error) {
	im, err := index.Open(path)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, index.ErrMalformed) {
		if err = buildIndex(path, layers); err == nil {
			im, err = index.Open(path)
		}
	}
	return im, err
}

func (s *sharedIndex) release() {
	s.d.indexMu.Lock()
	defer s.d.indexMu.Unlock()
	if s.refs--; s.refs == 0 {
		delete(s.d.indexes, s.path)
		s.Close()
	}
}

// buildIndex merges the layers' names into a new index file.
func buildIndex(path string, layers []*fetch.Handle) (err error) {
	entries := make([][]index.Entry, len(layers))
	var eg errgroup.Group
	for i, l := range layers {
		eg.Go(func() (err error) {
			entries[i], err = l.Entries()
			return err
		})
	}
	if err := eg.Wait(); err != nil {
		return err
	}
	t, err := index.Merge(entries)
	if err != nil {
		return err
	}
	devices := make([]index.Device, len(layers))
	for i, l := range layers {
		_, hex, _ := strings.Cut(l.Digest, ":")
		devices[i] = index.Device{Tag: hex[:min(len(hex), 64)], Size: l.Size()}
	}
	f, err := os.CreateTemp(filepath.Dir(path), "tmp-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	w := bufio.NewWriterSize(f, 1<<20)
	if err = t.WriteTo(w, devices); err == nil {
		err = w.Flush()
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	// The names of all layers were on the heap for a moment. A daemon that serves
	// mounts for weeks gives that memory back now, not at some later collection.
	entries, t = nil, nil
	debug.FreeOSMemory()
	if st, err := os.Lstat(path); err == nil && st.IsDir() {
		os.RemoveAll(path) // somebody's doing: a file cannot take its place
	}
	return os.Rename(f.Name(), path)
}
