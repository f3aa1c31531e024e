package fs

import (
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/fs/upper"
)

// maxCopy is how much a read takes from memory rather than by splice, whose
// pipes cost more than that.
const maxCopy = 64 << 10

func (u *Union) Read(cancel <-chan struct{}, h *fuse.ReadIn, buf []byte) (_ fuse.ReadResult, st fuse.Status) {
	n := u.node(h.NodeId)
	if n == nil {
		return u.low.Read(cancel, h, buf)
	}
	defer u.ops.done(opRead, time.Now(), &st)
	fd, err := u.fd(n, false)
	if err != nil {
		return nil, upperStatus(err)
	}
	if h.Size > maxCopy {
		return fuse.ReadResultFd(uintptr(fd), int64(h.Offset), int(h.Size)), fuse.OK
	}
	for {
		k, err := unix.Pread(fd, buf[:h.Size], int64(h.Offset))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, upperStatus(err)
		}
		return fuse.ReadResultVector([][]byte{buf[:k]}), fuse.OK
	}
}

func (u *Union) Write(cancel <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	return u.Writev(cancel, in, [][]byte{data})
}

func (u *Union) Writev(cancel <-chan struct{}, in *fuse.WriteIn, data [][]byte) (_ uint32, st fuse.Status) {
	defer u.begin(opWrite, &st)()
	n, err := u.own(in.NodeId, whole)
	if err != nil {
		return 0, upperStatus(err)
	}
	fd, err := u.fd(n, true)
	if err != nil {
		return 0, upperStatus(err)
	}
	var total int
	for _, b := range data {
		for len(b) > 0 {
			k, err := unix.Pwrite(fd, b, int64(in.Offset)+int64(total))
			if err == unix.EINTR {
				continue
			}
			if err != nil && total == 0 {
				return 0, upperStatus(err)
			}
			if err != nil || k == 0 {
				return uint32(total), fuse.OK
			}
			total += k
			b = b[k:]
		}
	}
	if in.WriteFlags&fuse.WRITE_KILL_SUIDGID != 0 {
		if err := u.tame(n, upper.At{Dir: fd, Live: true}); err != nil {
			return 0, upperStatus(err)
		}
	}
	return uint32(total), fuse.OK
}

func (u *Union) Fallocate(cancel <-chan struct{}, in *fuse.FallocateIn) (st fuse.Status) {
	defer u.begin(opAllocate, &st)()
	n, err := u.own(in.NodeId, whole)
	if err != nil {
		return upperStatus(err)
	}
	fd, err := u.fd(n, true)
	if err != nil {
		return upperStatus(err)
	}
	if err := unix.Fallocate(fd, in.Mode, int64(in.Offset), int64(in.Length)); err != nil {
		return upperStatus(err)
	}
	if in.Uid != 0 {
		return upperStatus(u.tame(n, upper.At{Dir: fd, Live: true}))
	}
	return fuse.OK
}

// Lseek looks for data and holes. Where those of the lower lie is not known
// before it is fetched: its files are all data.
func (u *Union) Lseek(cancel <-chan struct{}, in *fuse.LseekIn, out *fuse.LseekOut) fuse.Status {
	n := u.node(in.NodeId)
	if n != nil {
		fd, err := u.fd(n, false)
		if err != nil {
			return upperStatus(err)
		}
		// The offset is the descriptor's, which all share, but everything else here
		// says where it reads and writes.
		off, err := unix.Seek(fd, int64(in.Offset), int(in.Whence))
		out.Offset = uint64(off)
		return upperStatus(err)
	}
	inode, err := u.low.inode(in.NodeId)
	if err != nil {
		return status(err)
	}
	switch {
	case in.Offset >= uint64(inode.Size):
		return fuse.Status(unix.ENXIO)
	case in.Whence == unix.SEEK_DATA:
		out.Offset = in.Offset
	case in.Whence == unix.SEEK_HOLE:
		out.Offset = uint64(inode.Size)
	default:
		return fuse.EINVAL
	}
	return fuse.OK
}

// CopyFileRange copies within the upper's filesystem, or from a layer's data
// file to it.
func (u *Union) CopyFileRange(cancel <-chan struct{}, in *fuse.CopyFileRangeIn) (_ uint32, st fuse.Status) {
	defer u.begin(opWrite, &st)()
	to, err := u.own(in.NodeIdOut, whole)
	if err != nil {
		return 0, upperStatus(err)
	}
	dst, err := u.fd(to, true)
	if err != nil {
		return 0, upperStatus(err)
	}
	const most = 64 << 20 // a short copy is allowed, a long silence is not
	n := int64(min(in.Len, most))
	src, off := -1, int64(in.OffIn)
	if from := u.node(in.NodeId); from != nil {
		src, err = u.fd(from, false)
	} else {
		var data Data
		if data, off, n, err = u.lowerRange(in.NodeId, off, n); data != nil {
			defer data.Release()
			src = data.Fd()
		}
	}
	if err != nil || n == 0 {
		return 0, upperStatus(err)
	}
	at := int64(in.OffOut)
	for {
		k, err := unix.CopyFileRange(src, &off, dst, &at, int(n), 0)
		if err == unix.EINTR {
			continue
		}
		if err == unix.EINVAL || err == unix.ENOSYS {
			err = unix.EXDEV // which the kernel answers by reading and writing
		}
		return uint32(max(k, 0)), upperStatus(err)
	}
}

// lowerRange makes a part of a lower file ready to be read from its data file,
// which the caller releases; nil where there is nothing to read.
func (u *Union) lowerRange(id uint64, from, size int64) (data Data, off, n int64, err error) {
	in, err := u.low.inode(id)
	if err != nil {
		return nil, 0, 0, lowerError{err}
	}
	device, off, ok, err := u.low.im.Extent(&in)
	if err != nil {
		return nil, 0, 0, lowerError{err}
	}
	if n = min(size, in.Size-from); !ok || n <= 0 {
		return nil, 0, 0, nil
	}
	data = u.low.layers[device]
	if err := data.Hold(off+from, n); err != nil {
		u.low.fault(device, off+from, err)
		return nil, 0, 0, lowerError{err}
	}
	return data, off + from, n, nil
}

func (u *Union) Fsync(cancel <-chan struct{}, in *fuse.FsyncIn) (st fuse.Status) {
	defer u.ops.done(opSync, time.Now(), &st)
	n := u.node(in.NodeId)
	if n == nil {
		return fuse.OK
	}
	fd, err := u.fd(n, false)
	if err != nil {
		return upperStatus(err)
	}
	return upperStatus(syncFile(fd, in.FsyncFlags))
}

// syncFile brings a file to the disk. Bit 0 of flags is FUSE_FSYNC_FDATASYNC.
func syncFile(fd int, flags uint32) error {
	for {
		var err error
		if flags&1 != 0 {
			err = unix.Fdatasync(fd)
		} else {
			err = unix.Fsync(fd)
		}
		if err != unix.EINTR {
			return err
		}
	}
}

func (u *Union) FsyncDir(cancel <-chan struct{}, in *fuse.FsyncIn) (st fuse.Status) {
	defer u.ops.done(opSync, time.Now(), &st)
	n := u.node(in.NodeId)
	if n == nil {
		return fuse.OK
	}
	u.ns.RLock()
	defer u.ns.RUnlock()
	r, err := u.reach(n)
	if err != nil {
		return upperStatus(err)
	}
	defer r.done()
	fd, err := r.Open(unix.O_RDONLY | unix.O_DIRECTORY)
	if err != nil {
		return upperStatus(err)
	}
	defer unix.Close(fd)
	return upperStatus(syncFile(fd, in.FsyncFlags))
}
