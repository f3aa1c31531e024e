package image

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/opencontainers/go-digest"
)

// tempPrefix begins the names of files that have no final name yet.
const tempPrefix = ".tmp-"

// A BlobWriter takes in the bytes of one layer that is made here. Until Commit
// they lie in a file without a name in the layout. From Commit on the writer
// holds a lease: no Remove deletes the blob before Release, whether or not a
// manifest names it yet. So an image is stored as
//
//	w, err := store.NewBlob()
//	...
//	defer w.Discard()             // whatever fails, nothing is left
//	... write, hash ...
//	err = w.Commit(digest, size)  // the blob is there, and held
//	err = store.PutFrom(m, ...)   // a manifest names it
//	w.Release()                   // the manifest alone keeps it
//
// A writer is used by one goroutine at a time.
type BlobWriter struct {
	store *Store
	file  *os.File // nil once committed or ended
	size  int64
	held  digest.Digest // "" before Commit and after the end
}

// NewBlob begins a blob. The caller ends it with Release or Discard.
func (s *Store) NewBlob() (*BlobWriter, error) {
	f, err := os.CreateTemp(filepath.Join(s.dir, "blobs"), tempPrefix+"*")
	if err != nil {
		return nil, fmt.Errorf("begin blob: %w", err)
	}
	return &BlobWriter{store: s, file: f}, nil
}

// Write appends to the blob.
func (w *BlobWriter) Write(p []byte) (int, error) {
	if w.file == nil {
		return 0, fmt.Errorf("write blob: %w", os.ErrClosed)
	}
	n, err := w.file.Write(p)
	w.size += int64(n)
	if err != nil {
		return n, fmt.Errorf("write blob: %w", err)
	}
	return n, nil
}

// Commit puts the bytes in place as the blob d of size bytes, on stable storage
// when it returns, and holds it. The digest is believed: who wrote the bytes
// has hashed them. After an error the writer can only be ended.
func (w *BlobWriter) Commit(d digest.Digest, size int64) error {
	if err := w.commit(d, size); err != nil {
		w.drop()
		return fmt.Errorf("keep blob %s: %w", clip(string(d)), err)
	}
	return nil
}

func (w *BlobWriter) commit(d digest.Digest, size int64) error {
	if err := d.Validate(); err != nil {
		return failf(ErrMalformed, err, "%s", err)
	}
	if err := checkAlgorithm(d); err != nil {
		return err
	}
	switch {
	case w.file == nil:
		return os.ErrClosed
	case w.size != size:
		return malformed("%d bytes were written of %d", w.size, size)
	}
	if err := w.file.Sync(); err != nil {
		return err
	}
	s := w.store
	file := s.blobFile(d)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := makeWay(file); err != nil {
		return err
	}
	if err := os.Rename(w.file.Name(), file); err != nil {
		return err
	}
	// Under the same lock as the rename, so that no sweep comes between.
	s.held[d]++
	w.held = d
	err := errors.Join(w.file.Close(), syncDir(filepath.Dir(file)))
	w.file = nil
	if err != nil {
		s.release(d)
		w.held = ""
	}
	return err
}

// Release ends the writer: a committed blob stays as long as a manifest in the
// store names it, anything else is gone at once. It may be called again.
func (w *BlobWriter) Release() {
	w.drop()
	s := w.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if w.held != "" {
		s.release(w.held)
		w.held = ""
	}
}

// Discard ends the writer for a caller that gave up: the blob too is deleted,
// unless a manifest in the store names it or another writer holds it. After
// Release it does nothing.
func (w *BlobWriter) Discard() {
	w.drop()
	s := w.store
	s.mu.Lock()
	defer s.mu.Unlock()
	d := w.held
	if d == "" {
		return
	}
	s.release(d)
	w.held = ""
	// What cannot be told to be of no use is left to the next sweep.
	index, err := s.read()
	if err != nil {
		return
	}
	if live, err := s.live(index); err == nil && !live[d] {
		os.Remove(s.blobFile(d))
	}
}

// drop deletes the file of a writer that has not committed.
func (w *BlobWriter) drop() {
	if w.file != nil {
		w.file.Close()
		os.Remove(w.file.Name())
		w.file = nil
	}
}

// release takes one lease of a blob away. The caller holds mu.
func (s *Store) release(d digest.Digest) {
	if s.held[d]--; s.held[d] <= 0 {
		delete(s.held, d)
	}
}

// OpenBlob opens a blob that is here, at its first byte, and gives its size.
// The caller closes it. The bytes are not checked against the digest. What is
// not here is an ErrNotFound, what is no regular file an ErrMalformed.
func (s *Store) OpenBlob(d digest.Digest) (*os.File, int64, error) {
	if err := d.Validate(); err != nil {
		return nil, 0, failf(ErrMalformed, err, "digest %q: %s", clip(string(d)), err)
	}
	f, size, err := openRegular(s.blobFile(d))
	if errors.Is(err, os.ErrNotExist) {
		return nil, 0, failf(ErrNotFound, err, "blob %s is not in the image store", d)
	}
	if err != nil {
		return nil, 0, fmt.Errorf("open blob %s: %w", d, err)
	}
	return f, size, nil
}

// HasBlob reports whether OpenBlob would find the blob.
func (s *Store) HasBlob(d digest.Digest) bool {
	if d.Validate() != nil {
		return false
	}
	info, err := os.Lstat(s.blobFile(d))
	return err == nil && info.Mode().IsRegular()
}

func (s *Store) blobFile(d digest.Digest) string {
	return filepath.Join(s.dir, filepath.FromSlash(blobPath(d)))
}

// openRegular opens a file of the store's own for reading. What is not a
// regular file is an ErrMalformed: a link is not followed, a pipe not waited
// for.
func openRegular(file string) (*os.File, int64, error) {
	f, err := os.OpenFile(file, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if errors.Is(err, syscall.ELOOP) || errors.Is(err, syscall.ENXIO) { // a link, a socket
		return nil, 0, failf(ErrMalformed, err, "%s is not a regular file", file)
	}
	if err != nil {
		return nil, 0, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = malformed("%s is not a regular file", file)
	}
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, info.Size(), nil
}

// makeWay readies the place of a file that is about to be renamed there: a
// rename takes the place of anything but a directory.
func makeWay(file string) error {
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	if st, err := os.Lstat(file); err == nil && st.IsDir() {
		return os.RemoveAll(file)
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// removeTemps deletes what a killed daemon was writing. What cannot be deleted
// costs room and nothing else.
func (s *Store) removeTemps() {
	for _, pattern := range []string{".", "blobs", filepath.Join("blobs", digest.SHA256.String())} {
		dir := filepath.Join(s.dir, pattern)
		entries, err := os.ReadDir(dir)
		if err != nil {
			continue
		}
		for _, e := range entries {
			if strings.HasPrefix(e.Name(), tempPrefix) {
				os.RemoveAll(filepath.Join(dir, e.Name()))
			}
		}
	}
}
