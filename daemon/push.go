package daemon

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/varvefs/varve/commit"
	"github.com/varvefs/varve/image"
)

// Push sends an image that is here to its registry.
func (d *Daemon) Push(ctx context.Context, o PushOptions, n note) (*Pushed, error) {
	name, err := image.ParseName(o.Image)
	if err != nil {
		return nil, fmt.Errorf("%w%w", err, silent{errUsage})
	}
	if name.IsLocal() || name.IsID() {
		return nil, fmt.Errorf("push %s: only a name of a repository can be pushed to: commit it under one%w", name.Familiar(), silent{errUsage})
	}
	m, config, err := d.images.Get(name, o.Platform)
	if err != nil {
		return nil, err
	}
	b := d.blobsOf(m, o.ImageOptions, n)
	defer b.Close()
	return d.push(ctx, name, m, config, b, o.ImageOptions, n)
}

// blobsOf says where the layers of an image that is in the store are.
func (d *Daemon) blobsOf(m *image.Manifest, o ImageOptions, n note) *blobs {
	b := &blobs{d: d}
	for _, from := range append(m.Sources, m.Name) {
		if from.IsZero() || from.IsID() {
			continue
		}
		if s, err := d.source(from, o); err != nil {
			n.warn("%v", err)
		} else if s != nil {
			b.sources = append(b.sources, s)
		}
	}
	return b
}

func (d *Daemon) push(ctx context.Context, name image.Name, m *image.Manifest, config []byte, b *blobs, o ImageOptions, n note) (*Pushed, error) {
	// Layers are mounted from the repositories of the same registry that have
	// them, which the token must allow to read.
	var from []string
	for _, s := range sourcesOf(m) {
		if s.Registry() == name.Registry() && s.Repository() != name.Repository() {
			from = append(from, s.Repository())
		}
	}
	auth := o.Auth
	auth.Inline = o.AuthConfig
	base, transport, err := d.registries.Endpoint(name, image.Options{Insecure: o.Insecure, Auth: auth, Log: d.log}, from...)
	if err != nil {
		return nil, err
	}
	n(event{Status: &Status{Status: "The push refers to repository [" + name.Registry() + "/" + name.Repository() + "]"}})
	got, err := commit.Push(ctx, m, config, commit.PushOptions{
		Target: name, Base: base, Transport: transport, MountFrom: from, Blobs: b,
		Sessions: &sessions{dir: filepath.Join(d.dirs.State, "uploads")}, Report: n.report,
	})
	if err != nil {
		return nil, err
	}
	n(event{Status: &Status{Status: got.Line(name)}})
	for outcome, c := range map[string]commit.Count{"uploaded": got.Uploaded, "mounted": got.Mounted, "exists": got.Existed, "piped": got.Streamed} {
		d.m.PushBlobs.WithLabelValues(outcome).Add(float64(c.Blobs))
	}
	return &Pushed{
		Ref: name.Familiar(), Digest: got.Digest.String(), Size: got.Size, Uploaded: Count(got.Uploaded),
		Mounted: Count(got.Mounted), Existed: Count(got.Existed), Streamed: Count(got.Streamed),
	}, nil
}

// report tells of a blob on its way.
func (n note) report(id, status string, current, total int64) {
	n(event{Status: &Status{ID: id, Status: status, Current: current, Total: total}})
}

// sessions keeps the places of unfinished uploads, one file each: a registry may
// sign them, so only the daemon's user reads them.
type sessions struct {
	dir string
	mu  sync.Mutex
}

func (s *sessions) path(key string) string {
	return filepath.Join(s.dir, fmt.Sprintf("%x.json", sha256.Sum256([]byte(key))))
}

func (s *sessions) Load(key string) (commit.Session, bool) {
	const most = 1 << 20
	var got commit.Session
	st, err := os.Lstat(s.path(key))
	if err != nil || !st.Mode().IsRegular() || st.Size() > most {
		return got, false
	}
	b, err := os.ReadFile(s.path(key))
	if err == nil {
		err = json.Unmarshal(b, &got)
	}
	return got, err == nil
}

// Store keeps what it can: without it a push sends more.
func (s *sessions) Store(key string, at commit.Session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b, err := json.Marshal(at)
	if err != nil || os.MkdirAll(s.dir, 0o700) != nil {
		return
	}
	tmp := s.path(key) + ".tmp"
	if os.WriteFile(tmp, b, 0o600) == nil {
		os.Rename(tmp, s.path(key))
	}
}

func (s *sessions) Drop(key string) { os.Remove(s.path(key)) }
