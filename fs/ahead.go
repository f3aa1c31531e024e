package fs

import (
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/index"
)

// ahead gives the kernel the contents of small files before it asks for them,
// where somebody reads one after the other in the order of the tree, as tar, cp
// and grep do: what a round trip costs is then paid once for many files. It
// begins with the second file in a row. A reader who comes to the end of what was
// given has proven that it was wanted, and is given twice as much.
//
// The kernel takes contents only for inodes that it knows, those of directories
// that were listed, and waits for a page that it is reading until that READ is
// answered (fuse_notify_store in fs/fuse/dev.c). A READ that gives is answered
// after it has; what it gives lies behind its own file, so nobody waits in a circle.
type ahead struct {
	im     *index.Image
	layers []Data
	conn   *conn // set before on
	on     atomic.Bool
	givers atomic.Int32 // how many give now

	mu        sync.Mutex // guards what follows
	runs      [8]run
	spare     int        // the run that is given up for a new one
	stretches []*stretch // that nobody uses now, one for each giver at most
}

// run is a reader who goes from file to file.
type run struct {
	from, next uint64 // nids: small files between were read or given; who reads next goes on
	files      int    // of the last window
}

const (
	aheadFirst  = 8        // files of the first window
	aheadMost   = 128      // files of the largest
	aheadSpan   = 8 << 10  // bytes of the data file, for each file of a window, in which all must lie
	aheadSmall  = 64 << 10 // bytes of the largest file that is given
	aheadAtOnce = 2        // givers
)

// stretch is the memory for a window.
type stretch [aheadMost * aheadSpan]byte

// window is a row of files that lie near one another in a data file.
type window struct {
	device   int
	from, to int64 // of the data file
	files    []aheadFile
	run      uint64 // where its run began
}

type aheadFile struct {
	nid       uint64
	off, size int64
}

// read is told that a file is read from its start, by a caller who holds no
// layer. What it returns, if not nil, is to be called once the READ is answered.
func (a *ahead) read(in *index.Inode) (rest func()) {
	w, next := a.take(in, true)
	if len(w.files) == 0 {
		return nil
	}
	if a.givers.Add(1) > aheadAtOnce {
		a.givers.Add(-1)
		return nil
	}
	a.give(w, next)
	a.givers.Add(-1)
	return func() {
		// The disk is to have read what comes then.
		for range 2 {
			if w, next = a.window(next, len(w.files), nil); len(w.files) == 0 {
				break
			}
			WillNeed(a.layers[w.device].Fd(), w.from, w.to-w.from)
		}
	}
}

// take finds the run that reads in, and gives its next window where more says so,
// with the inode that follows it.
func (a *ahead) take(in *index.Inode, more bool) (w window, next index.Inode) {
	if !a.on.Load() {
		return w, next
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for i := range a.runs {
		if r := &a.runs[i]; r.next == in.Nid && r.next != 0 {
			next = a.following(in, r)
			if more {
				r.files = min(max(aheadFirst, 2*r.files), aheadMost)
				w, next = a.window(next, r.files, r)
				w.run = r.from
			}
			r.next = next.Nid
			return w, next
		}
	}
	for i := range a.runs {
		if r := &a.runs[i]; r.from <= in.Nid && in.Nid < r.next {
			*r = run{} // the kernel has not kept what it was given
		}
	}
	r := &a.runs[a.spare]
	a.spare = (a.spare + 1) % len(a.runs)
	*r = run{from: in.Nid}
	r.next = a.following(in, r).Nid
	return w, next
}

// following gives the next file with contents; its nid is 0 where none is near.
// What other runs than r had is passed over, and they with it, where r is not nil.
func (a *ahead) following(in *index.Inode, r *run) (next index.Inode) {
	next = *in
	for range aheadMost {
		var err error
		if next, err = a.im.Next(&next); err != nil {
			break
		}
		for i := range a.runs {
			if o := &a.runs[i]; r != nil && o != r && o.from <= next.Nid && next.Nid < o.next {
				at := o.next
				*o = run{}
				if next, err = a.im.Inode(at); err != nil {
					return index.Inode{}
				}
			}
		}
		if next.Mode&unix.S_IFMT == unix.S_IFREG && next.Size > 0 {
			return next
		}
	}
	return index.Inode{}
}

// window gives up to so many files from next on, and what follows them.
func (a *ahead) window(next index.Inode, files int, r *run) (w window, _ index.Inode) {
	for next.Nid != 0 && len(w.files) < files && next.Size <= aheadSmall {
		d, off, _, err := a.im.Extent(&next)
		if err != nil {
			break
		}
		lo, hi := off, off+next.Size
		if len(w.files) > 0 {
			lo, hi = min(w.from, lo), max(w.to, hi)
		}
		if len(w.files) > 0 && d != w.device || hi-lo > int64(files*aheadSpan) {
			break
		}
		w.device, w.from, w.to = d, lo, hi
		w.files = append(w.files, aheadFile{next.Nid, off, next.Size})
		next = a.following(&next, r)
	}
	return w, next
}

// load reads the stretch of a window, if all of its layer is here.
func (a *ahead) load(w window, buf *stretch) bool {
	data, n := a.layers[w.device], w.to-w.from
	if !allHere(data) || data.Hold(w.from, n) != nil {
		return false
	}
	defer data.Release()
	got, err := unix.Pread(data.Fd(), buf[:n], w.from)
	return err == nil && int64(got) == n
}

func (a *ahead) stretch() *stretch {
	a.mu.Lock()
	defer a.mu.Unlock()
	if n := len(a.stretches); n > 0 {
		s := a.stretches[n-1]
		a.stretches = a.stretches[:n-1]
		return s
	}
	return new(stretch)
}

func (a *ahead) giveBack(s *stretch) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.stretches = append(a.stretches, s)
}

// give gives the files of a window, if all of their layer is here. Where the
// kernel refuses one, its reader is waited for there.
func (a *ahead) give(w window, next index.Inode) {
	buf := a.stretch()
	defer a.giveBack(buf)
	if !a.load(w, buf) {
		return
	}
	for _, f := range w.files {
		at := f.off - w.from
		if a.conn.give(f.nid, 0, buf[at:at+f.size]) == nil {
			continue
		}
		a.mu.Lock()
		defer a.mu.Unlock()
		for i := range a.runs {
			if r := &a.runs[i]; r.from == w.run && r.next == next.Nid {
				r.next = f.nid
			}
		}
		return
	}
}
