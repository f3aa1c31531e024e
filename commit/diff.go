package commit

import (
	"context"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/fs/upper"
	"github.com/varvefs/varve/index"
)

// Kind is docker's letter for what became of a path.
type Kind byte

// The kinds of changes.
const (
	Added   Kind = 'A'
	Changed Kind = 'C'
	Deleted Kind = 'D'
)

func (k Kind) String() string { return string(rune(k)) }

// MarshalText gives the letter.
func (k Kind) MarshalText() ([]byte, error) { return []byte{byte(k)}, nil }

// Delta is one path that is not what it is in the image.
type Delta struct {
	Kind Kind   `json:"kind"`
	Path string `json:"path"` // absolute
	Mode uint32 `json:"mode"` // st_mode; of what was deleted, the image's
	Size int64  `json:"size"` // bytes of a regular file; of what was deleted, the image's
}

// Diff says what the upper changed of the image, as docker's diff does: sorted by
// path; the directories in which something changed are changed themselves, the
// root excepted; of a directory that is gone only the top is named; what changed
// its type is changed. A directory's own time is none of its attributes.
//
// Of the image it looks up the names that the upper has, and lists the
// directories that were deleted and made again. A regular file that is in the
// upper was opened for writing and counts as changed: only its contents could
// tell otherwise.
func Diff(ctx context.Context, up *upper.Dir, lower *index.Image) ([]Delta, error) {
	d := differ{below: newBelow(lower)}
	if err := up.Walk(ctx, d.add); err != nil {
		return nil, err
	}
	if err := d.leave(0); err != nil {
		return nil, err
	}
	slices.SortFunc(d.out, func(a, b Delta) int { return strings.Compare(a.Path, b.Path) })
	return d.out, nil
}

type differ struct {
	below *below
	out   []Delta
	dirs  []diffDir // the way down to where the walk is
}

// diffDir is a directory that the walk is in.
type diffDir struct {
	change *upper.Change
	listed bool // it is among the changes
	hides  bool // nothing of the image shows in it
	in     index.Inode
	has    bool            // the image has it as a directory
	names  map[string]bool // of the upper, where it hides the image's
}

func (d *differ) add(c *upper.Change) error {
	low, err := d.below.find(c)
	if err != nil {
		return err
	}
	if c.Path == "" {
		d.dirs = append(d.dirs, diffDir{change: c, listed: true, in: low.in, has: true})
		return nil
	}
	dir, name := splitName(c.Path)
	depth := len(d.dirs)
	for d.dirs[depth-1].change.Path != dir {
		depth--
	}
	if err := d.leave(depth); err != nil {
		return err
	}
	parent := &d.dirs[depth-1]
	if c.Whiteout {
		if low.has && !parent.hides { // else it is named when the directory ends
			d.deleted(c.Path, &low.in)
		}
		return nil
	}
	if parent.names != nil {
		parent.names[name] = true
	}
	kind := Added
	if low.has {
		kind = Changed
		same, err := d.below.unchanged(c, &low.in)
		if err != nil {
			return err
		}
		if same {
			kind = 0
		}
	}
	if c.IsDir() {
		sub := diffDir{change: c, listed: kind != 0, hides: parent.hides || c.Opaque, in: low.in, has: low.has && low.in.IsDir()}
		if sub.hides && sub.has {
			sub.names = map[string]bool{}
		}
		d.dirs = append(d.dirs, sub)
	}
	if kind != 0 {
		d.list(kind, c)
	}
	return nil
}

// list adds a change, and the directories it is in.
func (d *differ) list(kind Kind, c *upper.Change) {
	size := c.Size
	if c.Type() != unix.S_IFREG {
		size = 0
	}
	d.out = append(d.out, Delta{Kind: kind, Path: "/" + c.Path, Mode: c.Mode, Size: size})
	d.parents()
}

// deleted adds a name that only the image has.
func (d *differ) deleted(path string, in *index.Inode) {
	size := in.Size
	if in.Mode&unix.S_IFMT != unix.S_IFREG {
		size = 0
	}
	d.out = append(d.out, Delta{Kind: Deleted, Path: "/" + path, Mode: in.Mode, Size: size})
	d.parents()
}

func (d *differ) parents() {
	for i := range d.dirs {
		if p := &d.dirs[i]; !p.listed {
			p.listed = true
			d.out = append(d.out, Delta{Kind: Changed, Path: "/" + p.change.Path, Mode: p.change.Mode})
		}
	}
}

// leave ends the directories below a depth: what the image has in one whose names
// it hides, and the upper has not, is deleted.
func (d *differ) leave(depth int) error {
	for len(d.dirs) > depth {
		dir := &d.dirs[len(d.dirs)-1]
		if dir.names != nil {
			im := d.below.im
			hidden, err := childNames(im, &dir.in)
			if err != nil {
				return err
			}
			for _, name := range hidden {
				if dir.names[name] {
					continue
				}
				nid, err := im.Lookup(&dir.in, name)
				if err != nil {
					return err
				}
				in, err := im.Inode(nid)
				if err != nil {
					return err
				}
				d.deleted(join(dir.change.Path, name), &in)
			}
		}
		d.dirs = d.dirs[:len(d.dirs)-1]
	}
	return nil
}
