// Package fs is what the kernel talks to: the tree of an image served straight
// from its index, the data files that the kernel's own EROFS reads through, and
// the mounting of both.
package fs

import (
	"errors"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/varvefs/varve/index"
)

// Data is a layer's data file as the faces read it.
type Data interface {
	// Hold returns nil when [off, off+n) of the data file holds the layer's bytes.
	// They stay there until Release, which is then called once.
	Hold(off, n int64) error
	Release()
	// Fd gives a descriptor of the data file that stays open as long as a face
	// may read.
	Fd() int
	// Size is the data file's length in bytes.
	Size() int64
}

// allHere reports whether all of a data file is known to be here.
func allHere(d Data) bool {
	w, ok := d.(interface{ Whole() bool })
	return ok && w.Whole()
}

// Fault is told of every read that fails: by which data file, at which offset
// of it, and why. It must not block.
type Fault func(device int, off int64, err error)

// status chooses the errno of an error. What it does not know is EIO: never
// ENOSYS, which the kernel takes for "never ask again", never EINTR, which a
// reader of a regular file does not expect, and not the EACCES or ENOENT that
// the network or the store met, which would say something untrue of the file.
func status(err error) fuse.Status {
	switch {
	case err == nil:
		return fuse.OK
	case errors.Is(err, index.ErrNotExist):
		return fuse.ENOENT
	}
	return fuse.EIO
}

// lowerError is an error of reading the lower. It hides what it is from
// [upperStatus]: the EACCES or ENOSPC of the network or the store says nothing
// of the upper.
type lowerError struct{ err error }

func (e lowerError) Error() string { return e.err.Error() }

// maxErrno is the highest of the errnos that the kernel takes from a FUSE
// server, less one (fuse_dev_do_write in fs/fuse/dev.c); from there on they are
// its own.
const maxErrno = 511

// upperStatus chooses the errno of an error met in an upper, whose filesystem
// speaks for itself. It never gives ENOSYS, which the kernel takes for "never ask
// again", nor EINTR.
func upperStatus(err error) fuse.Status {
	errno, ok := err.(syscall.Errno)
	if !ok && (err == nil || !errors.As(err, &errno)) {
		return status(err)
	}
	switch {
	case errno == syscall.ENOSYS, errno == syscall.EINTR, errno == 0, errno > maxErrno:
		return fuse.EIO
	}
	return fuse.Status(errno)
}
