package upper

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// ErrBusy is what [Dir.Stamp] gives when somebody writes to the upper all the
// time.
var ErrBusy = errors.New("the upper is being written to")

// tick is longer than the kernel's clock for the times of files may stand still
// (a jiffy, 10 ms at HZ=100): what was changed less than that ago may be changed
// again and have the same times.
const tick = 20 * time.Millisecond

// Stamp hashes what tells a change of anything in the upper: every path, with
// its inode, times, size and mode. Two that are equal prove that nothing was
// changed between the end of the first and the beginning of the second.
//
// A store to a mapped page that is dirty already leaves no trace: see
// [Dir.WriteBack].
func (d *Dir) Stamp(ctx context.Context) (stamp [sha256.Size]byte, err error) {
	for range 3 {
		before := time.Now()
		var newest time.Time
		if stamp, newest, err = d.stamp(ctx); err != nil {
			return stamp, err
		}
		if before.Sub(newest) > tick {
			return stamp, nil
		}
		select {
		case <-ctx.Done():
			return stamp, ctx.Err()
		case <-time.After(2 * tick):
		}
	}
	return stamp, fmt.Errorf("%s: %w", d.path, ErrBusy)
}

func (d *Dir) stamp(ctx context.Context) (stamp [sha256.Size]byte, newest time.Time, err error) {
	sum := sha256.New()
	var b []byte
	err = d.scan(ctx, func(n *node) error {
		le := binary.LittleEndian
		b = append(b[:0], n.path...)
		b = append(b, 0) // no name has it
		if n.isWhiteout() {
			// It may be a hard link of one that overlayfs made for all: then its
			// times change with every other.
			b = append(b, 'D')
			sum.Write(b)
			return nil
		}
		for _, v := range []uint64{
			n.st.Ino, n.st.Size, uint64(n.st.Mode), uint64(n.st.Ctime.Sec), uint64(n.st.Mtime.Sec),
			uint64(n.st.Ctime.Nsec)<<32 | uint64(n.st.Mtime.Nsec),
		} {
			b = le.AppendUint64(b, v)
		}
		sum.Write(b)
		// What a clock that was set back left in the future is not new for that.
		if t := time.Unix(n.st.Ctime.Sec, int64(n.st.Ctime.Nsec)); t.After(newest) && t.Before(time.Now().Add(tick)) {
			newest = t
		}
		return nil
	})
	sum.Sum(stamp[:0])
	return stamp, newest, err
}

// Usage is [Dir.Usage] of an upper that somebody else may have open.
func Usage(ctx context.Context, path string) (bytes, inodes int64, err error) {
	fd, err := unix.Open(filepath.Join(path, treeName), unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, 0, fmt.Errorf("upper %s: %w", path, err)
	}
	defer unix.Close(fd)
	return (&Dir{path: path, tree: fd}).Usage(ctx)
}

// Usage gives the bytes that the upper takes on disk and the number of its
// inodes, hard links counted once.
func (d *Dir) Usage(ctx context.Context) (bytes, inodes int64, err error) {
	seen := map[uint64]bool{}
	err = d.scan(ctx, func(n *node) error {
		if n.fd < 0 && n.st.Nlink > 1 {
			if seen[n.st.Ino] {
				return nil
			}
			seen[n.st.Ino] = true
		}
		bytes += int64(n.st.Blocks) * 512 // whatever the filesystem's blocks are (statx(2))
		inodes++
		return nil
	})
	return bytes, inodes, err
}
