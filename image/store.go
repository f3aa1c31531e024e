package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Annotations of the store's own on entries of its index.json.
const (
	annotationPlatform = "dev.varve.platform"
	annotationManifest = "dev.varve.manifest"
)

// A Store is an OCI layout on disk of names, manifests and configs. Of layers it
// has only those that were made here. One process at a time uses it, by as many
// goroutines as it likes.
//
// Blobs are written before the names that need them, each whole or not at all.
// Manifests and configs are checked by digest when they are read; layers are
// for their reader to check.
type Store struct {
	dir       string
	recovered error // what was damaged when it was opened

	mu   sync.Mutex            // guards index.json, the set of blobs, and held
	held map[digest.Digest]int // leases of blobs that no manifest may name yet
}

// Record is what the store knows of one image for one platform.
type Record struct {
	Name     Name          // zero for an image whose name went to another
	Target   digest.Digest // what the name points at: the image ID
	Manifest digest.Digest
	Platform string // normalised, "" if neither list nor config say

	// Sources are images in whose repositories some of the layers lie, other
	// than the repository of Name: a commit's base, what a tag was given to.
	Sources []Name
}

// same reports whether two records are of one entry.
func (r Record) same(o Record) bool {
	return r.Name == o.Name && r.Target == o.Target && r.Manifest == o.Manifest && r.Platform == o.Platform
}

// OpenStore opens or makes the store in a directory. A damaged list of names is
// moved aside, see Recovered.
func OpenStore(dir string) (*Store, error) {
	s := &Store{dir: dir, held: map[digest.Digest]int{}}
	if err := os.MkdirAll(filepath.Join(dir, "blobs", "sha256"), 0o755); err != nil {
		return nil, fmt.Errorf("open image store: %w", err)
	}
	file := filepath.Join(dir, ocispec.ImageLayoutFile)
	if _, err := os.Stat(file); errors.Is(err, os.ErrNotExist) {
		if err := writeFile(file, []byte(`{"imageLayoutVersion":"`+ocispec.ImageLayoutVersion+`"}`)); err != nil {
			return nil, fmt.Errorf("open image store: %w", err)
		}
	}
	s.removeTemps()
	if _, err := s.read(); errors.Is(err, ErrMalformed) {
		if rerr := s.moveAside(err); rerr != nil {
			return nil, fmt.Errorf("%w: move it aside: %w", err, rerr)
		}
	} else if err != nil {
		return nil, err // perhaps whole: it is only not ours to read
	}
	return s, nil
}

// moveAside takes a list of names that cannot be read out of the way: the blobs
// stay, and what was mounted can be asked for again.
func (s *Store) moveAside(cause error) error {
	file := filepath.Join(s.dir, ocispec.ImageIndexFile)
	aside := file + ".damaged"
	if err := os.RemoveAll(aside); err != nil {
		return err
	}
	if err := os.Rename(file, aside); err != nil {
		return err
	}
	s.recovered = fmt.Errorf("%w: moved to %s, names are asked of their registries again", cause, aside)
	return nil
}

// Recovered says what OpenStore found damaged and moved aside, nil if nothing.
func (s *Store) Recovered() error { return s.recovered }

// Put stores an image under its name, with its Sources. A name that stood for
// another image of the platform moves; that image stays, without a name.
func (s *Store) Put(m *Manifest, config []byte) error { return s.PutFrom(m, config, nil) }

// PutFrom is [Store.Put] for an image some of whose layers lie elsewhere than
// its name says: sources are added to what m.Sources and the store already know
// of that manifest. They are names of registries' repositories, of layouts and
// of archives, and at most 100.
func (s *Store) PutFrom(m *Manifest, config []byte, sources []Name) error {
	if err := s.put(m, config, sources); err != nil {
		return fmt.Errorf("store image %s: %w", m.Name.Familiar(), err)
	}
	return nil
}

func (s *Store) put(m *Manifest, config []byte, sources []Name) error {
	if err := verify(m.ConfigDesc.Digest, config); err != nil {
		return err
	}
	if err := verify(m.Digest, m.Raw); err != nil {
		return err
	}
	c, err := ParseConfig(config)
	if err != nil {
		return err
	}
	target := m.Target
	if target == "" {
		target = m.Digest
	}
	docs := maps.Clone(m.Blobs)
	if docs == nil {
		docs = map[digest.Digest][]byte{}
	}
	docs[m.Digest], docs[m.ConfigDesc.Digest] = m.Raw, config
	if docs[target] == nil {
		return fmt.Errorf("the bytes of %s are missing", target)
	}
	platform := m.Platform
	if platform == "" {
		platform = c.Platform()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	index, err := s.read()
	if err != nil {
		return err
	}
	r := Record{Name: m.Name, Target: target, Manifest: m.Digest, Platform: platform}
	r.Sources = addSources(addSources(nil, m.Name, m.Sources...), m.Name, sources...)
	for _, old := range index.records() {
		if old.Manifest == m.Digest {
			r.Sources = addSources(r.Sources, m.Name, old.Sources...)
		}
	}
	if err := checkSources(r.Sources); err != nil {
		return err
	}
	for d, b := range docs {
		if err := s.writeBlob(d, b); err != nil {
			return err
		}
	}
	index.set(r, int64(len(docs[target])), mediaTypeOf(docs[target]))
	return s.write(index)
}

func mediaTypeOf(raw []byte) string {
	d, _ := parseDocument(raw, "")
	return d.MediaType
}

func (s *Store) writeBlob(d digest.Digest, b []byte) error {
	if err := verify(d, b); err != nil {
		return err
	}
	file := s.blobFile(d)
	if have, err := readRegular(file, int64(len(b))); err == nil && verify(d, have) == nil {
		return nil
	}
	if err := makeWay(file); err != nil {
		return err
	}
	return writeFile(file, b)
}

// Get finds an image by name, by ID or by the first 12 or more digits of one,
// for a platform; "" is this machine's, or the only one there is. All bytes
// are checked against their digests.
func (s *Store) Get(n Name, platform string) (*Manifest, []byte, error) {
	match, err := newMatcher(platform)
	if err != nil {
		return nil, nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	index, err := s.read()
	if err != nil {
		return nil, nil, err
	}
	found, err := index.find(n)
	if err != nil {
		return nil, nil, err
	}
	rec, err := choosePlatform(n, match, found)
	if err != nil {
		return nil, nil, err
	}
	m, config, err := s.load(rec)
	if err != nil {
		return nil, nil, fmt.Errorf("image %s: %w", n.Familiar(), err)
	}
	return m, config, nil
}

func choosePlatform(n Name, match matcher, found []Record) (Record, error) {
	var best *Record
	var spec ocispec.Platform
	var have []string
	for _, r := range found {
		p := parsePlatform(r.Platform)
		// What was pulled without a list was wanted as it is.
		fits := r.Platform == "" || match.match(p) || !match.strict && r.Target == r.Manifest
		if fits && (best == nil || match.any.Less(p, spec)) {
			best, spec = &r, p
		}
		have = append(have, r.Platform)
	}
	if best == nil {
		return Record{}, failf(ErrNoPlatform, nil, "image %s is here only for %s, not for %s", n.Familiar(), strings.Join(have, ", "), match.asked)
	}
	return *best, nil
}

func (s *Store) load(r Record) (*Manifest, []byte, error) {
	raw, err := s.readBlob(r.Manifest, MaxManifest)
	if err != nil {
		return nil, nil, err
	}
	m, err := ParseManifest(raw, "")
	if err != nil {
		return nil, nil, err
	}
	m.Name, m.Target, m.Digest, m.Platform, m.Sources = r.Name, r.Target, r.Manifest, r.Platform, r.Sources
	m.Blobs = map[digest.Digest][]byte{r.Manifest: raw}
	if r.Target != r.Manifest {
		if m.Blobs[r.Target], err = s.readBlob(r.Target, MaxManifest); err != nil {
			return nil, nil, err
		}
	}
	config, err := s.readBlob(m.ConfigDesc.Digest, MaxConfig)
	if err != nil {
		return nil, nil, err
	}
	return m, config, nil
}

func (s *Store) readBlob(d digest.Digest, most int64) ([]byte, error) {
	if err := d.Validate(); err != nil {
		return nil, failf(ErrMalformed, err, "digest %q: %s", clip(string(d)), err)
	}
	b, err := readRegular(s.blobFile(d), most)
	if err != nil {
		// The name is there, so it is no ErrNotFound of the caller's.
		return nil, failf(ErrMalformed, err, "the image store is damaged, mount it with --pull always: %s", err)
	}
	if err := verify(d, b); err != nil {
		return nil, failf(ErrMalformed, err, "the image store is damaged, mount it with --pull always: blob %s", err)
	}
	return b, nil
}

// List gives all images, the named first, in the order of their names.
func (s *Store) List() ([]Record, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	index, err := s.read()
	if err != nil {
		return nil, err
	}
	all := index.records()
	slices.SortStableFunc(all, func(a, b Record) int {
		switch {
		case a.Name.IsZero() != b.Name.IsZero():
			if a.Name.IsZero() {
				return 1
			}
			return -1
		case a.Name != b.Name:
			return strings.Compare(a.Name.Familiar(), b.Name.Familiar())
		}
		return strings.Compare(a.Platform, b.Platform)
	})
	return all, nil
}

// Tag gives the image src the further name dst, for all platforms that are
// here. What was called dst loses that name. The new name has the sources of
// the old, and the old itself: the layers are still only there.
func (s *Store) Tag(src, dst Name) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	index, err := s.read()
	if err != nil {
		return err
	}
	found, err := index.find(src)
	if err != nil {
		return err
	}
	for _, r := range found {
		d := index.descriptor(r)
		r.Sources = addSources(addSources(nil, dst, r.Sources...), dst, r.Name)
		if err := checkSources(r.Sources); err != nil {
			return fmt.Errorf("tag image %s: %w", src.Familiar(), err)
		}
		r.Name = dst
		index.set(r, d.Size, d.MediaType)
	}
	return s.write(index)
}

// Remove takes a name away; for an ID, all names of that image. Blobs that no
// image needs any more and no [BlobWriter] holds are deleted, and their digests
// given.
func (s *Store) Remove(n Name) ([]digest.Digest, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	index, err := s.read()
	if err != nil {
		return nil, err
	}
	found, err := index.find(n)
	if err != nil {
		return nil, err
	}
	for _, r := range found {
		index.drop(r)
	}
	if err := s.write(index); err != nil {
		return nil, err
	}
	return s.sweep(index)
}

// live gives the blobs that must stay: what a record leads to, layers that are
// here among it, and what is held. The caller holds mu.
func (s *Store) live(index *storeIndex) (map[digest.Digest]bool, error) {
	live := map[digest.Digest]bool{}
	for d := range s.held {
		live[d] = true
	}
	for _, r := range index.records() {
		m, _, err := s.load(r)
		if err != nil {
			return nil, err
		}
		live[r.Target], live[r.Manifest], live[m.ConfigDesc.Digest] = true, true, true
		for _, l := range m.Layers {
			live[l.Digest] = true
		}
	}
	return live, nil
}

// sweep deletes the blobs that are not live. One record that cannot be read
// keeps what it may have named: nothing is deleted then. The caller holds mu.
func (s *Store) sweep(index *storeIndex) ([]digest.Digest, error) {
	live, err := s.live(index)
	if err != nil {
		return nil, fmt.Errorf("remove image: %w", err)
	}
	var gone []digest.Digest
	dirs, err := os.ReadDir(filepath.Join(s.dir, "blobs"))
	if err != nil {
		return nil, fmt.Errorf("remove image: %w", err)
	}
	for _, dir := range dirs {
		if !dir.IsDir() {
			continue // a blob on its way
		}
		files, err := os.ReadDir(filepath.Join(s.dir, "blobs", dir.Name()))
		if err != nil {
			return nil, fmt.Errorf("remove image: %w", err)
		}
		for _, f := range files {
			d := digest.NewDigestFromEncoded(digest.Algorithm(dir.Name()), f.Name())
			if live[d] {
				continue
			}
			if err := os.Remove(filepath.Join(s.dir, "blobs", dir.Name(), f.Name())); err != nil {
				return gone, fmt.Errorf("remove image: %w", err)
			}
			if d.Validate() == nil {
				gone = append(gone, d)
			}
		}
	}
	return gone, nil
}

func (s *Store) read() (*storeIndex, error) {
	index := &storeIndex{Index: ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}}
	file := filepath.Join(s.dir, ocispec.ImageIndexFile)
	b, err := readRegular(file, maxIndex)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return index, nil
	case errors.Is(err, ErrMalformed), errors.Is(err, syscall.EIO):
		return nil, failf(ErrMalformed, err, "the image store is damaged: %s", err)
	case err != nil:
		return nil, fmt.Errorf("read image store: %w", err)
	}
	if index.Index, err = parseIndex(b); err != nil {
		return nil, failf(ErrMalformed, err, "the image store is damaged: %s: %s", file, err)
	}
	return index, nil
}

// readRegular reads a file of the store's own, at most so many bytes.
func readRegular(file string, most int64) ([]byte, error) {
	f, size, err := openRegular(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if size > most {
		return nil, malformed("%s has %d bytes, the limit is %d", file, size, most)
	}
	b := make([]byte, size)
	n, err := io.ReadFull(f, b)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return b[:n], nil
}

func (s *Store) write(index *storeIndex) error {
	if index.Manifests == nil {
		index.Manifests = []ocispec.Descriptor{}
	}
	b, err := json.MarshalIndent(index.Index, "", " ")
	if err != nil {
		return fmt.Errorf("write image store: %w", err)
	}
	if err := writeFile(filepath.Join(s.dir, ocispec.ImageIndexFile), b); err != nil {
		return fmt.Errorf("write image store: %w", err)
	}
	return nil
}

// writeFile puts a file in place whole: the name never stands for half of it,
// also after the power went.
func writeFile(file string, b []byte) (err error) {
	dir := filepath.Dir(file)
	f, err := os.CreateTemp(dir, tempPrefix+"*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
		}
	}()
	if _, err = f.Write(b); err != nil {
		return err
	}
	if err = f.Chmod(0o644); err != nil {
		return err
	}
	if err = f.Sync(); err != nil {
		return err
	}
	if err = f.Close(); err != nil {
		return err
	}
	if err = os.Rename(f.Name(), file); err != nil {
		return err
	}
	return syncDir(dir)
}
