package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
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
// words of the machine, then a sum a frame that the caller keeps there. A frame is present when its bytes were verified and
// written since the machine started, and nobody but a daemon that ended in order
// has touched the files since. Else it is doubted: it is verified once more.
//
// The header's stamp and sum are those of the data file and the bitmaps when they
// were last closed. A daemon that was killed leaves them behind the times, and so
// does whoever changes the files by hand.
const (
	presenceMagic  = "varvepr3"
	presenceHeader = 80 // magic 8, frames 8, bytes fetched 8, stamp 8, sum 8, boot id 36
	fetchedAt      = 16
	stampAt        = 24
	sumAt          = 32
	bootAt         = 40
	bootLen        = 36
)

// stampOf tells whether a file was changed: by its size and, which nobody sets
// by hand, the time of its inode's last change.
func stampOf(info fs.FileInfo) uint64 {
	st := info.Sys().(*syscall.Stat_t)
	return uint64(st.Ctim.Nano()) ^ uint64(st.Size)<<1
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func words(frames int) int { return (frames + 31) / 32 }

// presenceSize is the length of the presence file: two bitmaps, and the sums.
func presenceSize(frames int) int { return presenceHeader + 8*words(frames) + 4*frames }

func writePresence(w io.Writer, boot string, stamp uint64, frames int, fetched int64, present bool) error {
	b := make([]byte, presenceSize(frames))
	copy(b, presenceMagic)
	binary.NativeEndian.PutUint64(b[8:], uint64(frames))
	binary.NativeEndian.PutUint64(b[fetchedAt:], uint64(fetched))
	binary.NativeEndian.PutUint64(b[stampAt:], stamp)
	copy(b[bootAt:bootAt+bootLen], boot)
	if present {
		for i := range frames {
			at := presenceHeader + i/32*4
			binary.NativeEndian.PutUint32(b[at:], binary.NativeEndian.Uint32(b[at:])|1<<(i%32))
		}
	}
	binary.NativeEndian.PutUint64(b[sumAt:], sumOf(b))
	_, err := w.Write(b)
	return err
}

func sumOf(presence []byte) uint64 {
	frames := int(binary.NativeEndian.Uint64(presence[8:]))
	return uint64(crc32.Checksum(presence[presenceHeader:presenceHeader+8*words(frames)], castagnoli))
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
	sums    []uint32
	frames  int
	missing atomic.Int64
}

// Open opens a layer's data file, which must have the given size and number of
// frames, or answers ErrNotFound, or ErrDamaged where the presence file is not
// one for it. A data file that was cut counts as empty.
func (s *Store) Open(digest string, dataSize int64, frames int) (_ *Data, err error) {
	path := filepath.Join(s.layerDir(digest), dataName)
	f, err := s.open(digest, dataName, os.O_RDWR)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	raw, err := s.mapPresence(digest, frames)
	if err != nil {
		return nil, fmt.Errorf("layer %s: %w", digest, err)
	}
	defer func() {
		if err != nil {
			unix.Munmap(raw)
		}
	}()
	d := &Data{file: f, fd: int(f.Fd()), path: path, raw: raw, frames: frames}
	n, sum := words(frames), sumOf(raw)
	if n > 0 {
		all := unsafe.Slice((*uint32)(unsafe.Pointer(&raw[presenceHeader])), 2*n+frames)
		d.present, d.doubted, d.sums = all[:n:n], all[n:2*n:2*n], all[2*n:]
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
	case binary.NativeEndian.Uint64(raw[sumAt:]) != sum:
		// Which bits are right nobody knows: what is not there will not verify.
		clear(d.present)
		for i := range frames {
			d.doubted[i/32] |= 1 << (i % 32)
		}
	case boot != s.boot, binary.NativeEndian.Uint64(raw[stampAt:]) != stampOf(st):
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

func (s *Store) mapPresence(digest string, frames int) ([]byte, error) {
	f, err := s.open(digest, presenceName, os.O_RDWR)
	if errors.Is(err, ErrNotFound) {
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
	size := presenceSize(frames)
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

// Close closes the files, as they are to be trusted when they are opened again.
// Nothing may use d any more.
func (d *Data) Close() error {
	if st, err := d.file.Stat(); err == nil {
		binary.NativeEndian.PutUint64(d.raw[stampAt:], stampOf(st))
		binary.NativeEndian.PutUint64(d.raw[sumAt:], sumOf(d.raw))
	}
	return errors.Join(unix.Munmap(d.raw), d.file.Close())
}

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

// SetSum keeps the sum of what of frame i no digest proves, and Sum gives it.
func (d *Data) SetSum(i int, sum uint32) { atomic.StoreUint32(&d.sums[i], sum) }

// Sum gives what SetSum kept, 0 if it did not.
func (d *Data) Sum(i int) uint32 { return atomic.LoadUint32(&d.sums[i]) }

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
