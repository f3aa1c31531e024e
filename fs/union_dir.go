package fs

import (
	"sync"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/fs/upper"
	"github.com/varvefs/varve/index"
)

// subdirs is by how much the link count of a directory that two show through
// differs from the lower's: each directory in it counts one.
type subdirs struct {
	mu    sync.Mutex // guards both
	known bool
	more  int
}

func (s *subdirs) add(n int) {
	s.mu.Lock()
	s.more += n // where it is not known, it is counted from the disk
	s.mu.Unlock()
}

// mergedLinks gives the link count of a directory that the lower shows through.
// Its caller holds ns.
func (u *Union) mergedLinks(n *node) (uint32, error) {
	dir, err := u.low.im.Inode(n.lower)
	if err != nil {
		return 0, lowerError{err}
	}
	n.subdirs.mu.Lock()
	defer n.subdirs.mu.Unlock()
	if !n.subdirs.known {
		more := 0
		err := u.eachUpper(n, func(e *upper.Dirent) error {
			nid, err := u.low.im.Lookup(&dir, string(e.Name))
			var in index.Inode
			if err == nil {
				in, err = u.low.im.Inode(nid)
			}
			if err == nil && in.IsDir() {
				more--
			} else if err != nil && err != index.ErrNotExist {
				return lowerError{err}
			}
			if e.Type == unix.DT_DIR {
				more++
			}
			return nil
		})
		if err != nil {
			return 0, err
		}
		n.subdirs.more, n.subdirs.known = more, true
	}
	return uint32(int(dir.Nlink) + n.subdirs.more), nil
}

// eachUpper gives the names in the upper's part of a directory, whiteouts among
// them, with their types. Its caller holds ns.
func (u *Union) eachUpper(n *node, fn func(e *upper.Dirent) error) error {
	r, err := u.reach(n)
	if err != nil {
		return err
	}
	defer r.done()
	var bad error
	err = upper.ReadDir(r.Dir, func(e *upper.Dirent) bool {
		if isDots(e.Name) {
			return true
		}
		if e.Type == unix.DT_UNKNOWN {
			var st unix.Stat_t
			if bad = (upper.At{Dir: r.Dir, Name: string(e.Name)}).Lstat(&st); bad != nil {
				return false
			}
			e.Type = uint8(st.Mode >> 12)
		}
		bad = fn(e)
		return bad == nil
	})
	if err == nil {
		err = bad
	}
	return err
}

// A listing is what READDIR of an open directory reads from: the image's own, or
// one made of both parts when it was opened or rewound. Its cookies are those of
// the index, and after them one for each name of the upper.
type listing struct {
	mu      sync.Mutex // guards what follows
	own     bool       // made of both; else read straight from the index
	started bool
	changes uint64 // of the node, when it was made
	names   []listed
}

type listed struct {
	name   string
	ino    uint64
	mode   uint32
	cookie uint64 // to go on from after it
	upper  bool
}

// upperCookies lie past all of the index, and below what a 32-bit off_t holds as
// long as an index allows it.
const upperCookies = 1 << 32

// listings are the open directories.
type listings struct {
	mu   sync.Mutex // guards both
	open map[uint64]*listing
	last uint64
}

func (l *listings) add() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open == nil {
		l.open = map[uint64]*listing{}
	}
	l.last++
	l.open[l.last] = &listing{}
	return l.last
}

func (l *listings) get(fh uint64) *listing {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.open[fh]
}

func (u *Union) OpenDir(cancel <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) (st fuse.Status) {
	defer u.ops.done(opOpendir, time.Now(), &st)
	out.Fh = u.listing.add()
	// Nobody else changes the directory, and the kernel drops what it caches of it
	// when it does (fuse_readdir_cached in fs/fuse/readdir.c).
	out.OpenFlags = fuse.FOPEN_CACHE_DIR | fuse.FOPEN_KEEP_CACHE
	return fuse.OK
}

func (u *Union) ReleaseDir(in *fuse.ReleaseIn) {
	u.listing.mu.Lock()
	delete(u.listing.open, in.Fh)
	u.listing.mu.Unlock()
}

func (u *Union) ReadDir(cancel <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) (st fuse.Status) {
	defer u.ops.done(opReaddir, time.Now(), &st)
	return u.readDir(in, out, false)
}

func (u *Union) ReadDirPlus(cancel <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) (st fuse.Status) {
	defer u.ops.done(opReaddirplus, time.Now(), &st)
	return u.readDir(in, out, true)
}

func (u *Union) readDir(in *fuse.ReadIn, out *fuse.DirEntryList, plus bool) fuse.Status {
	l := u.listing.get(in.Fh)
	if l == nil {
		return fuse.EBADF
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	u.ns.RLock()
	defer u.ns.RUnlock()
	n := u.node(in.NodeId)
	if n == nil && !u.isLower(in.NodeId) {
		return fuse.Status(unix.ESTALE)
	}
	if in.Offset == 0 || !l.started {
		l.started, l.own, l.names = true, n != nil, nil
		if n != nil {
			if err := u.list(n, l); err != nil {
				return upperStatus(err)
			}
		}
	}
	// Entries come with what they are only while nothing has changed: a name that
	// was taken away meanwhile must not come back.
	fill := plus && (n == nil || l.own && l.changes == n.changes.Load())
	if !l.own {
		return upperStatus(u.listLower(in.NodeId, in.Offset, out, plus, fill))
	}
	return upperStatus(u.emit(n, l, in.Offset, out, plus, fill))
}

// listLower answers from the index. Its caller holds ns.
func (u *Union) listLower(id, from uint64, out *fuse.DirEntryList, plus, fill bool) error {
	dir, err := u.low.inode(id)
	if err != nil {
		return lowerError{err}
	}
	var bad error
	err = u.low.im.ReadDir(&dir, from, func(d index.Dirent, next uint64) bool {
		if !plus {
			return out.AddDirEntry(dirEntry(d, next))
		}
		e := out.AddDirLookupEntry(dirEntry(d, next))
		if e == nil {
			return false
		}
		if !fill || isDots(d.Name) {
			return true
		}
		var in index.Inode
		if in, bad = u.low.im.Inode(d.Nid); bad == nil {
			bad = u.lowerEntry(e, &in)
		}
		return bad == nil
	})
	if err == nil {
		err = bad
	}
	if err != nil {
		return lowerError{err}
	}
	return nil
}

// list makes a listing of both parts of a directory. Its caller holds ns.
func (u *Union) list(n *node, l *listing) error {
	l.changes = n.changes.Load()
	parent := n.ino()
	if n.parent != nil {
		parent = n.parent.ino()
	}
	if n.dead {
		return nil
	}
	var tail []listed
	hidden := map[string]struct{}{}
	err := u.eachUpper(n, func(e *upper.Dirent) error {
		name := string(e.Name)
		if n.lower != 0 {
			hidden[name] = struct{}{}
		}
		if e.Type == unix.DT_CHR {
			var st unix.Stat_t
			r, err := u.reachIn(n, name)
			if err != nil {
				return err
			}
			err = r.Lstat(&st)
			r.done()
			if err != nil || upper.IsWhiteout(&st) {
				return err
			}
		}
		tail = append(tail, listed{name: name, ino: u.inoOf(e.Ino), mode: uint32(e.Type) << 12, upper: true})
		return nil
	})
	if err != nil {
		return err
	}
	l.names = append(l.names,
		listed{name: ".", ino: n.ino(), mode: unix.S_IFDIR, cookie: 1},
		listed{name: "..", ino: parent, mode: unix.S_IFDIR, cookie: 2})
	if n.lower != 0 {
		if err := u.listShown(n.lower, l, hidden); err != nil {
			return err
		}
	}
	for i := range tail {
		tail[i].cookie = upperCookies + uint64(i)
		if tail[i].mode == unix.S_IFDIR && n.lower != 0 {
			if in, ok, err := u.lowerChild(n, tail[i].name); err == nil && ok {
				if k := u.node(u.number(in.Nid)); k != nil && k.place == (place{n, tail[i].name}) && !k.dead {
					tail[i].ino = k.ino()
				} else if in.IsDir() {
					var st unix.Stat_t
					if f, err := u.look(n, tail[i].name, &st); err == nil && f.lower != 0 {
						tail[i].ino = f.lower
					}
				}
			}
		}
	}
	l.names = append(l.names, tail...)
	return nil
}

// listShown adds what the upper hides nothing of.
func (u *Union) listShown(lower uint64, l *listing, hidden map[string]struct{}) error {
	dir, err := u.low.im.Inode(lower)
	if err != nil {
		return lowerError{err}
	}
	err = u.low.im.ReadDir(&dir, 0, func(d index.Dirent, next uint64) bool {
		if isDots(d.Name) {
			return true
		}
		if _, ok := hidden[string(d.Name)]; !ok {
			// Past the cookies of the two dots, which sort anywhere in the index.
			l.names = append(l.names, listed{name: string(d.Name), ino: d.Nid, mode: d.ModeType(), cookie: next + 2})
		}
		return true
	})
	if err != nil {
		return lowerError{err}
	}
	return nil
}

// inoOf gives the number that a file of the upper is shown with.
func (u *Union) inoOf(ino uint64) uint64 {
	u.mu.RLock()
	defer u.mu.RUnlock()
	if nid, ok := u.origins[ino]; ok {
		return nid
	}
	return u.base + ino
}

// emit answers from a listing. Its caller holds ns.
func (u *Union) emit(n *node, l *listing, from uint64, out *fuse.DirEntryList, plus, fill bool) error {
	lo, hi := 0, len(l.names)
	for lo < hi {
		if mid := (lo + hi) / 2; l.names[mid].cookie > from {
			hi = mid
		} else {
			lo = mid + 1
		}
	}
	for i := lo; i < len(l.names); i++ {
		d := &l.names[i]
		e := fuse.DirEntry{Name: d.name, Ino: d.ino, Mode: d.mode, Off: d.cookie}
		if !plus {
			if d.upper && u.up.Form == upper.Override && d.mode == unix.S_IFREG {
				e.Mode = 0 // it may stand for another type
			}
			if !out.AddDirEntry(e) {
				return nil
			}
			continue
		}
		to := out.AddDirLookupEntry(e)
		if to == nil {
			return nil
		}
		if !fill || d.name == "." || d.name == ".." {
			continue
		}
		if d.upper {
			if err := u.lookup(n, d.name, to); err != nil {
				return err
			}
			if to.NodeId == 0 {
				*to = fuse.EntryOut{} // what is not there is nothing to be told of here
			} else {
				out.FixMode(to.Mode) // a file may stand for another type
			}
			continue
		}
		in, err := u.low.im.Inode(d.ino)
		if err == nil {
			err = u.lowerEntry(to, &in)
		}
		if err != nil {
			return lowerError{err}
		}
	}
	return nil
}
