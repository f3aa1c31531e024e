package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/bits"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	dataName     = "data"
	presenceName = "present"
)

// The presence file: a header, then two bitmaps of one bit a frame, in 32-bit
// words of the machine. A frame is present when its bytes were verified and
// written since the machine started. It is doubted when that was before: the
// bytes may not have reached the disk, so they are verified once more.
const (
	presenceMagic  = "varvepr1"
	presenceHeader = 64 // magic 8, frames 8, bytes fetched 8, boot id 36
	fetchedAt      = 16
	bootAt         = 24
	bootLen        = 36
)

func words(frames int) int { return (frames + 31) / 32 }

func writePresence(w io.Writer, boot string, frames int, fetched int64, present bool) error {
	b := make([]byte, presenceHeader+8*words(frames))
	copy(b, presenceMagic)
	binary.NativeEndian.PutUint64(b[8:], uint64(frames))
	binary.NativeEndian.PutUint64(b[fetchedAt:], uint64(fetched))
	copy(b[bootAt:bootAt+bootLen], boot)
	if present {
		for i := range frames {
			at := presenceHeader + i/32*4
			binary.NativeEndian.PutUint32(b[at:], binary.NativeEndian.Uint32(b[at:])|1<<(i%32))
		}
	}
	_, err := w.Write(b)
	return err
}

// Data is an open data file with the presence of its frames. Its methods are
// safe for concurrent use.
type Data struct {
	file    *os.File
	fd      int
	path    string
	raw     []byte // the presence file, mapped
	present []uint32
	doubted []uint32
	frames  int
	missing atomic.Int64
}

// Open opens a layer's data file, which must have the given size and number of
// frames, or answers ErrNotFound, or ErrDamaged where the presence file is not
// one for it. A data file that was cut counts as empty.
func (s *Store) Open(digest string, dataSize int64, frames int) (_ *Data, err error) {
	path := filepath.Join(s.layerDir(digest), dataName)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("layer %s: %w", digest, ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	raw, err := mapPresence(filepath.Join(s.layerDir(digest), presenceName), frames)
	if err != nil {
		return nil, fmt.Errorf("layer %s: %w", digest, err)
	}
	defer func() {
		if err != nil {
			unix.Munmap(raw)
		}
	}()
	d := &Data{file: f, fd: int(f.Fd()), path: path, raw: raw, frames: frames}
	n := words(frames)
	if n > 0 {
		all := unsafe.Slice((*uint32)(unsafe.Pointer(&raw[presenceHeader])), 2*n)
		d.present, d.doubted = all[:n:n], all[n:]
		d.present[n-1] &= ^uint32(0) >> (32*n - frames) // a bit of no frame must not be counted
	}
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	switch boot := string(raw[bootAt : bootAt+bootLen]); {
	case st.Size() != dataSize:
		clear(d.present)
		clear(d.doubted)
		if err = f.Truncate(dataSize); err != nil {
			return nil, fmt.Errorf("layer %s: %w", digest, err)
		}
	case boot != s.boot:
		for i := range d.present {
			d.doubted[i] |= d.present[i]
			d.present[i] = 0
		}
	}
	copy(raw[bootAt:], s.boot)
	d.missing.Store(int64(frames))
	for _, w := range d.present {
		d.missing.Add(-int64(bits.OnesCount32(w)))
	}
	return d, nil
}

func mapPresence(path string, frames int) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: no presence file", ErrDamaged)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	size := presenceHeader + 8*words(frames)
	if st.Size() != int64(size) {
		return nil, fmt.Errorf("%w: the presence file has %d bytes, want %d", ErrDamaged, st.Size(), size)
	}
	raw, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	if string(raw[:8]) != presenceMagic || binary.NativeEndian.Uint64(raw[8:]) != uint64(frames) {
		unix.Munmap(raw)
		return nil, fmt.Errorf("%w: the presence file is not one", ErrDamaged)
	}
	return raw, nil
}

// Close closes the files. Nothing may use d any more.
func (d *Data) Close() error { return errors.Join(unix.Munmap(d.raw), d.file.Close()) }

// File gives the data file; it belongs to d.
func (d *Data) File() *os.File { return d.file }

// Fd gives the data file's descriptor; it belongs to d.
func (d *Data) Fd() int { return d.fd }

// Path gives the data file's path.
func (d *Data) Path() string { return d.path }

// Present reports whether frame i may be read.
func (d *Data) Present(i int) bool {
	return atomic.LoadUint32(&d.present[i/32])&(1<<(i%32)) != 0
}

// Doubted reports whether frame i was present before the machine last started.
func (d *Data) Doubted(i int) bool {
	return atomic.LoadUint32(&d.doubted[i/32])&(1<<(i%32)) != 0
}

// SetPresent says that frame i was verified and written.
func (d *Data) SetPresent(i int) {
	bit := uint32(1) << (i % 32)
	if atomic.OrUint32(&d.present[i/32], bit)&bit == 0 {
		d.missing.Add(-1)
	}
	atomic.AndUint32(&d.doubted[i/32], ^bit)
}

// Punch makes [off, off+n) zeroes, before a missing range is filled by someone
// who skips zeroes.
func (d *Data) Punch(off, n int64) error {
	return unix.Fallocate(int(d.file.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

// Drop says that frame i is not to be trusted.
func (d *Data) Drop(i int) {
	bit := uint32(1) << (i % 32)
	if atomic.AndUint32(&d.present[i/32], ^bit)&bit != 0 {
		d.missing.Add(1)
	}
	atomic.AndUint32(&d.doubted[i/32], ^bit)
}

// Missing gives the number of frames that are not present.
func (d *Data) Missing() int { return int(d.missing.Load()) }

// AddFetched counts bytes that the network brought for this layer, and Fetched
// gives their sum since the layer came into the store.
func (d *Data) AddFetched(n int64) { atomic.AddInt64(d.fetched(), n) }

func (d *Data) Fetched() int64 { return atomic.LoadInt64(d.fetched()) }

func (d *Data) fetched() *int64 { return (*int64)(unsafe.Pointer(&d.raw[fetchedAt])) }

func blocks(info fs.FileInfo) int64 {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return st.Blocks * 512
	}
	return info.Size()
}
