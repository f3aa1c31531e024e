package upper

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// WriteBack begins to write what is dirty of the upper's files to disk, which
// takes the right to write from every page that somebody has mapped: the next
// store to one has a page fault and updates the file's times, for [Dir.Stamp] to
// see. It does not wait until all is written.
func (d *Dir) WriteBack(ctx context.Context) error {
	return d.scan(ctx, func(n *node) error {
		if n.typ() != unix.S_IFREG || n.st.Size == 0 {
			return nil
		}
		fd, err := openQuietly(n.dirfd, n.name, unix.O_NOFOLLOW|unix.O_NONBLOCK)
		if err != nil {
			if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ELOOP) {
				return nil // something else by now, which the stamps will tell
			}
			return fmt.Errorf("%s: %w", clip(n.path), err)
		}
		defer unix.Close(fd)
		// A page that is on its way already may have been stored to since.
		err = unix.SyncFileRange(fd, 0, 0, unix.SYNC_FILE_RANGE_WAIT_BEFORE|unix.SYNC_FILE_RANGE_WRITE)
		if err != nil && !errors.Is(err, unix.ESPIPE) && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("write back %s: %w", clip(n.path), err)
		}
		return nil
	})
}
