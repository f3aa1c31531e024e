package fs

import (
	"fmt"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/fs/upper"
	"github.com/varvefs/varve/index"
)

// A lowerPlace is a name in a directory of the image.
type lowerPlace struct {
	dir  uint64 // nid
	name string
}

// lowerScan is one walk over the index, made when a file of the image is first
// changed: a file's inode says nothing of its names.
type lowerScan struct {
	once  sync.Once
	err   error
	spans []span
	links map[uint64][]lowerPlace // by nid, of files with several names
}

// A span is where a directory's files begin in the index: they lie one after
// another, those of another directory before or behind.
type span struct{ first, dir uint64 }

func (s *lowerScan) run(im *index.Image) error {
	s.once.Do(func() { s.err = s.walk(im) })
	return s.err
}

func (s *lowerScan) walk(im *index.Image) error {
	s.links = map[uint64][]lowerPlace{}
	dirs := []uint64{im.Root()}
	for seen := uint64(1); len(dirs) > 0; {
		nid := dirs[len(dirs)-1]
		dirs = dirs[:len(dirs)-1]
		dir, err := im.Inode(nid)
		if err != nil {
			return err
		}
		first := ^uint64(0)
		var bad error
		err = im.ReadDir(&dir, 0, func(d index.Dirent, _ uint64) bool {
			if isDots(d.Name) {
				return true
			}
			if d.ModeType() == unix.S_IFDIR {
				dirs = append(dirs, d.Nid)
				if seen++; seen > im.Inodes() {
					bad = fmt.Errorf("%w: directories lie in one another", index.ErrMalformed)
				}
				return bad == nil
			}
			var in index.Inode
			if in, bad = im.Inode(d.Nid); bad != nil {
				return false
			}
			if in.Nlink > 1 {
				s.links[d.Nid] = append(s.links[d.Nid], lowerPlace{nid, string(d.Name)})
			} else {
				first = min(first, d.Nid)
			}
			return true
		})
		if err == nil {
			err = bad
		}
		if err != nil {
			return err
		}
		if first != ^uint64(0) {
			s.spans = append(s.spans, span{first, nid})
		}
	}
	slices.SortFunc(s.spans, func(a, b span) int {
		if a.first < b.first {
			return -1
		}
		return 1
	})
	return nil
}

func isDots(name []byte) bool { return string(name) == "." || string(name) == ".." }

// lowerNames gives all names of a lower inode.
func (u *Union) lowerNames(in *index.Inode) ([]lowerPlace, error) {
	im := u.low.im
	if in.IsDir() {
		dir, err := im.Lookup(in, "..")
		if err != nil {
			return nil, err
		}
		name, err := u.nameIn(dir, in.Nid)
		return []lowerPlace{{dir, name}}, err
	}
	if err := u.scan.run(im); err != nil {
		return nil, err
	}
	if in.Nlink > 1 {
		return u.scan.links[in.Nid], nil
	}
	spans := u.scan.spans
	i, found := slices.BinarySearchFunc(spans, in.Nid, func(s span, nid uint64) int {
		switch {
		case s.first < nid:
			return -1
		case s.first > nid:
			return 1
		}
		return 0
	})
	if !found {
		i--
	}
	if i < 0 {
		return nil, fmt.Errorf("%w: inode %d has no name", index.ErrMalformed, in.Nid)
	}
	name, err := u.nameIn(spans[i].dir, in.Nid)
	return []lowerPlace{{spans[i].dir, name}}, err
}

// nameIn finds the name that a directory of the image has for an inode.
func (u *Union) nameIn(dir, nid uint64) (name string, err error) {
	in, err := u.low.im.Inode(dir)
	if err != nil {
		return "", err
	}
	err = u.low.im.ReadDir(&in, 0, func(d index.Dirent, _ uint64) bool {
		if d.Nid == nid && !isDots(d.Name) {
			name = string(d.Name)
		}
		return name == ""
	})
	if err == nil && name == "" {
		err = fmt.Errorf("%w: inode %d is not in directory %d", index.ErrMalformed, nid, dir)
	}
	return name, err
}

// lowerChild finds a name in the directory of the image that shows through a
// node. ok is false where there is none.
func (u *Union) lowerChild(dir *node, name string) (in index.Inode, ok bool, err error) {
	if dir.lower == 0 {
		return in, false, nil
	}
	parent, err := u.low.im.Inode(dir.lower)
	if err != nil {
		return in, false, err
	}
	nid, err := u.low.im.Lookup(&parent, name)
	if err == index.ErrNotExist {
		return in, false, nil
	}
	if err == nil {
		in, err = u.low.im.Inode(nid)
	}
	return in, err == nil, err
}

// visible says whether a directory of the image can be seen, and gives its node
// if it has one. Its caller holds ns.
func (u *Union) visible(nid uint64) (n *node, ok bool, err error) {
	if n := u.node(u.number(nid)); n != nil {
		return n, !n.dead && n.lower == nid, nil
	}
	in, err := u.low.im.Inode(nid)
	if err != nil {
		return nil, false, err
	}
	names, err := u.lowerNames(&in)
	if err != nil {
		return nil, false, err
	}
	parent, ok, err := u.visible(names[0].dir)
	if err != nil || !ok || parent == nil {
		return nil, ok, err
	}
	var st unix.Stat_t
	f, err := u.look(parent, names[0].name, &st)
	switch {
	case err != nil || f.there && f.lower != nid:
		return nil, false, err
	case !f.there:
		return nil, true, nil
	}
	return u.adopt(place{parent, names[0].name}, &st, nid), true, nil
}

// A found is what the upper has under a name.
type found struct {
	there    bool
	whiteout bool
	lower    uint64 // of a directory: the one of the image that shows through it, or 0
}

// look looks a name up in the upper's part of a directory. Its caller holds ns.
func (u *Union) look(dir *node, name string, st *unix.Stat_t) (f found, err error) {
	r, err := u.reachIn(dir, name)
	if err != nil {
		return f, err
	}
	defer r.done()
	if err := u.up.Stat(r.At, st); err != nil {
		if err == unix.ENOENT {
			err = nil
		}
		return f, err
	}
	f.there, f.whiteout = true, upper.IsWhiteout(st)
	f.lower, err = u.merged(dir, name, r.At, st)
	return f, err
}

// merged gives the directory of the image that shows through one of the upper,
// or 0.
func (u *Union) merged(dir *node, name string, at upper.At, st *unix.Stat_t) (lower uint64, err error) {
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return 0, nil
	}
	in, ok, err := u.lowerChild(dir, name)
	if err != nil || !ok || !in.IsDir() {
		return 0, err
	}
	if n := u.node(u.number(in.Nid)); n != nil && n.place == (place{dir, name}) && !n.dead {
		return n.lower, nil
	}
	opaque, err := u.up.IsOpaque(at)
	if err != nil || opaque {
		return 0, err
	}
	return in.Nid, nil
}

// visiblePlaces gives those names of a lower inode that can be seen and that the
// upper has nothing in the place of. Its caller holds ns.
func (u *Union) visiblePlaces(names []lowerPlace) (seen []lowerPlace, err error) {
	for _, p := range names {
		dir, ok, err := u.visible(p.dir)
		if err != nil {
			return nil, err
		}
		if ok && dir != nil {
			taken, err := u.taken(dir, p.name)
			if err != nil {
				return nil, err
			}
			ok = !taken
		}
		if ok {
			seen = append(seen, p)
		}
	}
	return seen, nil
}

// taken says whether the upper has anything under a name. Its caller holds ns.
func (u *Union) taken(dir *node, name string) (bool, error) {
	r, err := u.reachIn(dir, name)
	if err != nil {
		return false, err
	}
	defer r.done()
	var st unix.Stat_t
	err = r.Lstat(&st)
	if err == unix.ENOENT {
		return false, nil
	}
	return err == nil, err
}

// linksLeft is the link count of an inode that only the lower has: the image's,
// less the names that were taken away. Its caller holds ns.
func (u *Union) linksLeft(in *index.Inode) (uint32, error) {
	u.mu.RLock()
	left, known := u.links[in.Nid]
	u.mu.RUnlock()
	if known {
		return left, nil
	}
	if in.IsDir() || in.Nlink <= 1 || u.fresh {
		return in.Nlink, nil
	}
	names, err := u.lowerNames(in)
	if err != nil {
		return 0, err
	}
	seen, err := u.visiblePlaces(names)
	if err != nil {
		return 0, err
	}
	u.mu.Lock()
	u.links[in.Nid] = uint32(len(seen))
	u.mu.Unlock()
	return uint32(len(seen)), nil
}

// unlinkLower counts that a name of an inode that only the lower has is going
// away, before a whiteout says so. Its caller holds ns for writing.
func (u *Union) unlinkLower(in *index.Inode) error {
	left := uint32(0)
	if !in.IsDir() {
		var err error
		if left, err = u.linksLeft(in); err != nil {
			return err
		}
		left = max(left, 1) - 1
	}
	u.mu.Lock()
	u.links[in.Nid] = left
	u.mu.Unlock()
	return nil
}
