package fs

import (
	"context"
	"errors"
	"fmt"
	iofs "io/fs"
	"os"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/varvefs/varve/index"
)

// lastErrno is EHWPOISON, the highest that Linux has.
const lastErrno = 133

func TestStatusOfErrnos(t *testing.T) {
	for e := syscall.Errno(1); e <= lastErrno; e++ {
		for _, err := range []error{
			e,
			fmt.Errorf("read layer: %w", e),
			&os.PathError{Op: "read", Path: "data", Err: e},
			errors.Join(errors.New("first"), e),
			os.NewSyscallError("pread", e),
		} {
			if got := status(err); got != fuse.EIO {
				t.Errorf("%T of %d (%v) becomes %v, want EIO", err, int(e), e, got)
			}
		}
	}
}

func TestStatusOfErrors(t *testing.T) {
	for _, test := range []struct {
		err  error
		want fuse.Status
	}{
		{nil, fuse.OK},
		{errors.New("anything"), fuse.EIO},
		{index.ErrNotExist, fuse.ENOENT},
		{fmt.Errorf("look up: %w", index.ErrNotExist), fuse.ENOENT},
		{iofs.ErrNotExist, fuse.EIO},
		{index.ErrMalformed, fuse.EIO},
		{context.Canceled, fuse.EIO},
		{context.DeadlineExceeded, fuse.EIO},
		{os.ErrDeadlineExceeded, fuse.EIO},
		{errors.ErrUnsupported, fuse.EIO},
		{syscall.Errno(0), fuse.EIO},
		{syscall.Errno(512), fuse.EIO}, // ERESTARTSYS, the kernel's own
		{errors.Join(syscall.EINTR, syscall.ENOSYS), fuse.EIO},
	} {
		if got := status(test.err); got != test.want {
			t.Errorf("%v becomes %v, want %v", test.err, got, test.want)
		}
	}
}

func TestUpperStatus(t *testing.T) {
	for e := syscall.Errno(1); e <= lastErrno; e++ {
		want := fuse.Status(e)
		if e == syscall.ENOSYS || e == syscall.EINTR {
			want = fuse.EIO
		}
		for _, err := range []error{e, fmt.Errorf("write: %w", e), &os.PathError{Op: "open", Path: "f", Err: e}, errors.Join(e, errors.New("and then"))} {
			if got := upperStatus(err); got != want {
				t.Errorf("%T of %d (%v) becomes %v, want %v", err, int(e), e, got, want)
			}
		}
		if got := upperStatus(fmt.Errorf("copy up: %w", lowerError{e})); got != fuse.EIO {
			t.Errorf("%v of the lower becomes %v, want EIO", e, got)
		}
	}
	for _, test := range []struct {
		err  error
		want fuse.Status
	}{
		{nil, fuse.OK},
		{errors.New("anything"), fuse.EIO},
		{index.ErrNotExist, fuse.ENOENT},
		{context.DeadlineExceeded, fuse.EIO},
		{syscall.Errno(0), fuse.EIO},
		{syscall.Errno(512), fuse.EIO},
	} {
		if got := upperStatus(test.err); got != test.want {
			t.Errorf("%v becomes %v, want %v", test.err, got, test.want)
		}
	}
}
