package daemon

import (
	"context"
	"errors"
	"io"
	"os"
	"sync"

	"github.com/opencontainers/go-digest"
	"golang.org/x/time/rate"

	"github.com/varvefs/varve/fetch"
	"github.com/varvefs/varve/image"
)

// blobs says where an image's layers are: in the image store, if they were made
// here; else where the image came from, or what it was made of.
type blobs struct {
	d       *Daemon
	sources []image.Source // the first is asked first; none when offline

	mu    sync.Mutex // guards files
	files []*os.File // layers of the image store
}

// blob gives a layer's bytes, nil if they are not here and the network may not
// be asked. What it gives lives until Close.
func (b *blobs) blob(l image.Layer) (fetch.Blob, error) { return b.limited(l, nil) }

// limited is blob for who takes what the network brings no faster than a limit
// allows, if there is one.
func (b *blobs) limited(l image.Layer, limit *rate.Limiter) (fetch.Blob, error) {
	f, size, err := b.d.images.OpenBlob(l.Digest)
	if err == nil {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.files = append(b.files, f)
		return fetch.File{R: f, N: size}, nil
	}
	if !errors.Is(err, image.ErrNotFound) {
		return nil, err
	}
	var origins []fetch.Origin
	var errs []error
	for _, s := range b.sources {
		at, err := s.Blob(l)
		switch {
		case err != nil:
			errs = append(errs, err)
		case at.Local != nil:
			return fetch.File{R: at.Local, N: at.Size}, nil
		}
		for _, o := range at.Origins {
			via := o.Transport
			if limit != nil {
				via = slow{via, limit}
			}
			origins = append(origins, fetch.Origin{URL: o.URL, Transport: via})
		}
	}
	if len(origins) == 0 {
		return nil, errors.Join(errs...)
	}
	return fetch.NewRemote(l.Size, b.d.m, origins...), nil
}

func (b *blobs) Close() {
	for _, s := range b.sources {
		s.Close()
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, f := range b.files {
		f.Close()
	}
}

// Local reports whether a layer needs no network.
func (b *blobs) Local(id digest.Digest) bool { return b.d.images.HasBlob(id) }

// Open reads a layer's blob from an offset to its end, going on where a
// connection broke.
func (b *blobs) Open(ctx context.Context, l image.Layer, off int64) (io.ReadCloser, error) {
	at, err := b.blob(l)
	if err == nil && at == nil {
		err = fetch.ErrOffline
	}
	if err != nil {
		return nil, err
	}
	return b.d.fetcher.Stream(ctx, at, off), nil
}
