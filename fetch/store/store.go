// Package store keeps the data files of layers on disk: which frames of them
// are there, and that nothing is trusted which was not verified since the
// machine started.
//
// A layer is a directory, layers/<digest with "-" for ":">, put there whole by
// a rename: the sparse data file, the presence file, and documents that the
// caller names and the store does not read (the layer's table of contents, its
// frame table). It is made under tmp/.
package store

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrNotFound says that the store does not have the layer.
var ErrNotFound = errors.New("not in the store")

// ErrDamaged says that what the store has of a layer cannot be used.
var ErrDamaged = errors.New("damaged in the store")

// Store is a directory of layers. It is safe for concurrent use by one process;
// the caller keeps a second process out.
type Store struct {
	dir  string
	boot string
}

// Open makes the directory if it is missing, readable by its owner only, and
// removes what an interrupted run left half-made.
func Open(dir string) (*Store, error) {
	for _, d := range []string{dir, filepath.Join(dir, "layers")} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, fmt.Errorf("make the store: %w", err)
		}
	}
	if err := os.RemoveAll(filepath.Join(dir, "tmp")); err != nil {
		return nil, fmt.Errorf("clean the store: %w", err)
	}
	if err := os.Mkdir(filepath.Join(dir, "tmp"), 0o700); err != nil {
		return nil, fmt.Errorf("make the store: %w", err)
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, err
	}
	return &Store{dir: dir, boot: strings.TrimSpace(string(boot))}, nil
}

func (s *Store) layerDir(digest string) string {
	return filepath.Join(s.dir, "layers", strings.ReplaceAll(digest, ":", "-"))
}

// Digests lists the layers that the store has.
func (s *Store) Digests() ([]string, error) {
	es, err := os.ReadDir(filepath.Join(s.dir, "layers"))
	if err != nil {
		return nil, err
	}
	var ds []string
	for _, e := range es {
		ds = append(ds, strings.Replace(e.Name(), "-", ":", 1))
	}
	return ds, nil
}

// open opens a file of a layer, or answers ErrNotFound where there is none and
// ErrDamaged where it is no file of ours: the daemon writes as root, and must not
// follow a link that somebody put there, nor wait for a FIFO.
func (s *Store) open(digest, name string, flag int) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(s.layerDir(digest), name), flag|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("layer %s: %s: %w", digest, name, ErrNotFound)
	}
	for _, odd := range []error{unix.ELOOP, unix.EISDIR, unix.ENXIO, unix.ENOTDIR} {
		if errors.Is(err, odd) {
			return nil, fmt.Errorf("layer %s: %w: %w", digest, ErrDamaged, err)
		}
	}
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && (!st.Mode().IsRegular() || st.Sys().(*syscall.Stat_t).Nlink > 1) {
		err = fmt.Errorf("layer %s: %w: %s is not a file of its own", digest, ErrDamaged, name)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// Document gives a document of a layer, or ErrNotFound.
func (s *Store) Document(digest, name string) ([]byte, error) {
	f, err := s.open(digest, name, os.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(f)
}

// Map gives a document mapped into memory. The caller unmaps it.
func (s *Store) Map(digest, name string) ([]byte, error) {
	f, err := s.open(digest, name, os.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if st.Size() == 0 || st.Size() > 1<<36 {
		return nil, fmt.Errorf("layer %s: %w: %s has %d bytes", digest, ErrDamaged, name, st.Size())
	}
	return unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ, unix.MAP_SHARED)
}

// Replace puts a document in the place of the one a layer has. Who has that one
// open or mapped goes on with it.
func (s *Store) Replace(digest, name string, write func(io.Writer) error) error {
	dir := s.layerDir(digest)
	tmp := filepath.Join(dir, name+".new")
	os.Remove(tmp)
	err := writeFile(tmp, write)
	if err == nil {
		err = os.Rename(tmp, filepath.Join(dir, name))
	}
	if err != nil {
		return fmt.Errorf("layer %s: %w", digest, err)
	}
	return syncDir(dir)
}

// Refuse remembers that what a layer's key stands for was found to be wrong, and
// Refused whether it was.
func (s *Store) Refuse(key string) error {
	dir := filepath.Join(s.dir, "refused")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, filepath.Base(s.layerDir(key))), nil, 0o600)
}

// Refused reports whether Refuse was told of the key.
func (s *Store) Refused(key string) bool {
	_, err := os.Lstat(filepath.Join(s.dir, "refused", filepath.Base(s.layerDir(key))))
	return err == nil
}

// Remove forgets a layer. Its open files stay usable until they are closed.
func (s *Store) Remove(digest string) error { return os.RemoveAll(s.layerDir(digest)) }

// Temp gives a file that is gone when the store is next opened, if the caller does
// not remove it first.
func (s *Store) Temp() (*os.File, error) { return os.CreateTemp(filepath.Join(s.dir, "tmp"), "file-") }

// Room gives how many bytes may still be kept of what nobody waits for: the last
// part of the disk is for what somebody does. It is negative where that is begun.
func (s *Store) Room() int64 {
	const reserve = 256 << 20
	var st unix.Statfs_t
	if err := unix.Statfs(s.dir, &st); err != nil {
		return 0
	}
	return int64(st.Bavail)*st.Bsize - min(reserve, int64(st.Blocks)*st.Bsize/10)
}

// Bytes gives what the store takes on its disk, holes not counted.
func (s *Store) Bytes() int64 { return bytesIn(s.dir) }

// Usage gives what a layer takes of that.
func (s *Store) Usage(digest string) int64 { return bytesIn(s.layerDir(digest)) }

func bytesIn(dir string) (n int64) {
	filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return nil
		}
		if info, err := d.Info(); err == nil {
			n += blocks(info)
		}
		return nil
	})
	return n
}

// Staging is a layer in the making. Until [Staging.Commit] nobody sees it.
type Staging struct {
	s      *Store
	digest string
	dir    string
	data   *os.File
}

// Stage begins a layer. Call [Staging.Discard] in any case when done with it.
func (s *Store) Stage(digest string) (*Staging, error) {
	dir, err := os.MkdirTemp(filepath.Join(s.dir, "tmp"), "layer-")
	if err != nil {
		return nil, fmt.Errorf("stage layer %s: %w", digest, err)
	}
	f, err := os.OpenFile(filepath.Join(dir, dataName), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		os.RemoveAll(dir)
		return nil, fmt.Errorf("stage layer %s: %w", digest, err)
	}
	return &Staging{s: s, digest: digest, dir: dir, data: f}, nil
}

// File gives the data file as it is filled. It belongs to the staging.
func (g *Staging) File() *os.File { return g.data }

// WriteAt writes into the data file.
func (g *Staging) WriteAt(p []byte, off int64) (int, error) { return g.data.WriteAt(p, off) }

// Document adds a document.
func (g *Staging) Document(name string, write func(io.Writer) error) error {
	return writeFile(filepath.Join(g.dir, name), write)
}

// Commit gives the layer its name: the data file its size, frames frames of
// which all or none are present, and fetched, the bytes that the network brought
// for it so far. If another caller was faster, theirs stays.
func (g *Staging) Commit(dataSize int64, frames int, fetched int64, present bool) error {
	if err := g.commit(dataSize, frames, fetched, present); err != nil {
		return fmt.Errorf("commit layer %s: %w", g.digest, err)
	}
	return nil
}

func (g *Staging) commit(dataSize int64, frames int, fetched int64, present bool) error {
	if err := g.data.Truncate(dataSize); err != nil {
		return err
	}
	st, err := g.data.Stat()
	if err != nil {
		return err
	}
	if err := writeFile(filepath.Join(g.dir, presenceName), func(w io.Writer) error {
		return writePresence(w, g.s.boot, stampOf(st), frames, fetched, present)
	}); err != nil {
		return err
	}
	// The documents and their names are synced. The data is not: what it holds
	// is doubted after the next start of the machine and verified before it is
	// served.
	if err := syncDir(g.dir); err != nil {
		return err
	}
	to := g.s.layerDir(g.digest)
	if err := os.Rename(g.dir, to); err != nil {
		if _, serr := os.Stat(to); serr != nil {
			return err
		}
	}
	return syncDir(filepath.Dir(to))
}

// Discard removes what was not committed.
func (g *Staging) Discard() {
	g.data.Close()
	os.RemoveAll(g.dir)
}

func writeFile(path string, write func(io.Writer) error) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	err = write(f)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
