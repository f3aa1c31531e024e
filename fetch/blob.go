// Package fetch brings the bytes of layers: a registry's blob by single ranges,
// with mirrors, redirects and retries; decompressed, verified and handed to the
// store. It knows no files and no FUSE: a caller names a range of a layer's data
// file, and it is there when [Layer.Ensure] returns nil.
package fetch

import (
	"context"
	"errors"
	"fmt"
	"io"
)

var (
	// ErrVerify says that bytes did not match their digest.
	ErrVerify = errors.New("verification failed")
	// ErrUnavailable says that no origin gave the bytes in time.
	ErrUnavailable = errors.New("not to be had")
	// ErrOffline says that bytes are missing and the network may not be asked.
	ErrOffline = errors.New("missing, and the mount is offline")

	// ErrNoRoom says that the store's disk is nearly full, and what is left is for
	// those who wait.
	ErrNoRoom = errors.New("the disk of the store is nearly full: what is left is kept for what is read")

	errUnranged = errors.New("the registry does not serve ranges")
	errAnswer   = errors.New("not the bytes that were asked for")
	errStalled  = errors.New("nothing came for too long")
)

// Blob is where a layer's compressed bytes are.
type Blob interface {
	// Size is the blob's length in bytes.
	Size() int64
	// Open gives [off, off+n) of the blob, n > 0, in one attempt. Where the
	// origin cannot serve ranges the body is the whole blob and at is 0; else at
	// is off. The caller closes the body. Canceling ctx ends it.
	Open(ctx context.Context, off, n int64) (body io.ReadCloser, at int64, err error)
}

// File is a blob that lies in a file of this machine.
type File struct {
	R io.ReaderAt
	N int64
}

func (f File) Size() int64 { return f.N }

func (f File) Open(_ context.Context, off, n int64) (io.ReadCloser, int64, error) {
	if off < 0 || n < 0 || n > f.N-off {
		return nil, 0, fmt.Errorf("%w: bytes %d to %d of a blob of %d", ErrUnavailable, off, off+n, f.N)
	}
	return io.NopCloser(io.NewSectionReader(f.R, off, n)), off, nil
}

// anyOf is one blob that several mounts know by different sources.
type anyOf []Blob

func (a anyOf) Size() int64 { return a[0].Size() }

func (a anyOf) Open(ctx context.Context, off, n int64) (body io.ReadCloser, at int64, err error) {
	for _, b := range a {
		body, at, err = b.Open(ctx, off, n)
		if err == nil || ctx.Err() != nil {
			return body, at, err
		}
	}
	return nil, 0, err
}

// remote reports whether a blob's bytes come over the network.
func remote(b Blob) bool {
	switch b := b.(type) {
	case File:
		return false
	case anyOf:
		return remote(b[0])
	}
	return true
}
