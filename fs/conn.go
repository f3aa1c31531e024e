package fs

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// conn is a FUSE connection that we serve ourselves, see [loop].
type conn struct {
	fd int // of /dev/fuse
}

// connect mounts at dir: by mount(2) as root, by fusermount3 otherwise.
func connect(dir string, opts *fuse.MountOptions) (*conn, error) {
	if opts.DirectMountStrict {
		return mountDirect(dir, opts)
	}
	return mountByHelper(dir, opts)
}

func mountDirect(dir string, opts *fuse.MountOptions) (*conn, error) {
	fd, err := unix.Open(fuseDevice, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	data := []string{
		fmt.Sprintf("fd=%d", fd), fmt.Sprintf("rootmode=%o", unix.S_IFDIR),
		fmt.Sprintf("user_id=%d", os.Geteuid()), fmt.Sprintf("group_id=%d", os.Getegid()),
		fmt.Sprintf("max_read=%d", opts.MaxWrite),
	}
	data = append(data, opts.Options...)
	if opts.AllowOther {
		data = append(data, "allow_other")
	}
	if err := unix.Mount(opts.FsName, dir, "fuse."+opts.Name, opts.DirectMountFlags, strings.Join(data, ",")); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return &conn{fd}, nil
}

// mountByHelper has fusermount3 mount and hand over the device, which it sends
// over a socket (util/fusermount.c in libfuse, _FUSE_COMMFD).
func mountByHelper(dir string, opts *fuse.MountOptions) (*conn, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(pair[0])
	theirs := os.NewFile(uintptr(pair[1]), "fusermount3")
	defer theirs.Close()
	options := append([]string{"fsname=" + opts.FsName, "subtype=" + opts.Name, fmt.Sprintf("max_read=%d", opts.MaxWrite)}, opts.Options...)
	cmd := exec.Command("fusermount3", "-o", strings.Join(options, ","), "--", dir)
	cmd.Env = append(os.Environ(), "_FUSE_COMMFD=3")
	cmd.ExtraFiles = []*os.File{theirs}
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("fusermount3: %w: %s", err, bytes.TrimSpace(out))
	}
	control := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(pair[0], make([]byte, 1), control, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("fusermount3: %w", err)
	}
	messages, err := unix.ParseSocketControlMessage(control[:n])
	if err != nil || len(messages) != 1 {
		return nil, fmt.Errorf("fusermount3 handed over no device: %w", err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return nil, fmt.Errorf("fusermount3 handed over no device: %w", err)
	}
	return &conn{fds[0]}, nil
}

// backing has the kernel read and write an open file of ours by itself, and gives
// the number by which it knows it (fuse_backing_open in fs/fuse/passthrough.c).
func (c *conn) backing(fd int) (id int32, err error) {
	const backingOpen = 0x4010e501 // FUSE_DEV_IOC_BACKING_OPEN
	m := fuse.BackingMap{Fd: int32(fd)}
	r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(c.fd), backingOpen, uintptr(unsafe.Pointer(&m)))
	if errno != 0 {
		return 0, errno
	}
	return int32(r), nil
}

// release undoes backing.
func (c *conn) release(id int32) {
	const backingClose = 0x4004e502 // FUSE_DEV_IOC_BACKING_CLOSE
	unix.Syscall(unix.SYS_IOCTL, uintptr(c.fd), backingClose, uintptr(unsafe.Pointer(&id)))
}

// forgetData has the kernel drop what it caches of an inode's data, which writes
// what is dirty of it (struct fuse_notify_inval_inode_out).
func (c *conn) forgetData(id uint64) {
	const notifyInvalInode = 2 // FUSE_NOTIFY_INVAL_INODE
	le := binary.NativeEndian
	b := le.AppendUint32(nil, 16+24)
	b = le.AppendUint32(b, notifyInvalInode)
	b = le.AppendUint64(b, 0) // no request's answer
	b = le.AppendUint64(b, id)
	b = le.AppendUint64(b, 0) // from the first byte
	b = le.AppendUint64(b, 0) // to the last
	unix.Write(c.fd, b)
}

// give puts data into the kernel's cache of an inode's, from off on, if it knows
// the inode (struct fuse_notify_store_out).
func (c *conn) give(id uint64, off int64, data []byte) error {
	const notifyStore = 4 // FUSE_NOTIFY_STORE
	le := binary.NativeEndian
	var h [outHeader + 24]byte
	le.PutUint32(h[0:], uint32(len(h)+len(data)))
	le.PutUint32(h[4:], notifyStore)
	le.PutUint64(h[16:], id)
	le.PutUint64(h[24:], uint64(off))
	le.PutUint32(h[32:], uint32(len(data)))
	_, err := unix.Writev(c.fd, [][]byte{h[:], data})
	return err
}
