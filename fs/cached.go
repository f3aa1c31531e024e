package fs

import "golang.org/x/sys/unix"

// Cached gives how many pages of a file the page cache holds, and how many of
// those have not reached the disk: cachestat(2), of Linux 6.5.
func Cached(fd int) (pages, dirty uint64, err error) {
	var st unix.Cachestat_t
	if err := unix.Cachestat(uint(fd), new(unix.CachestatRange), &st, 0); err != nil {
		return 0, 0, err
	}
	return st.Cache, st.Dirty + st.Writeback, nil
}

// Forget has the page cache give up what it holds of a file. It is for data files
// under a mount, which caches by itself what was read of it: moving pages there
// instead (SPLICE_F_MOVE) does nothing where the disk's filesystem caches in units
// of more than a page, as ext4 does (fuse_try_move_folio in fs/fuse/dev.c).
func Forget(fd int) error { return unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED) }

// WillNeed has the disk read a range of a file that is about to be asked for. It
// does not wait for it.
func WillNeed(fd int, off, n int64) error { return unix.Fadvise(fd, off, n, unix.FADV_WILLNEED) }
