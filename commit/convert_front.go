package commit

import (
	"archive/tar"
	"context"
	"io"
	"strings"

	"github.com/varvefs/varve/index"
)

// sight is what a layer says of a name. Of several entries of that name it has the
// first.
type sight struct {
	head   *tar.Header
	number int   // of the entry in the tar
	off    int64 // of its contents in the tar
	sparse bool  // which are not in one piece

	entries, dirs int  // how many have the name, and how many of them are directories
	below         bool // there are entries below the name
	whiteout      bool // there is a whiteout of it
	opaque        bool // it is an opaque directory
}

func has(sights map[string]*sight, name string) bool {
	return sights[name] != nil && sights[name].entries > 0
}

// isDir reports whether all that a layer says of a name is that it is a directory.
func (s *sight) isDir() bool { return s.entries > 0 && s.entries == s.dirs }

// sightsOf finds what a layer says of some names. names holds, with a name, all
// directories on the way to it.
func sightsOf(ctx context.Context, f *spooled, names map[string]bool) (map[string]*sight, error) {
	in := f.reader()
	t := newLayerReader(in)
	sights := map[string]*sight{}
	at := func(name string) *sight {
		if !names[name] {
			return &sight{} // nobody asked
		}
		if sights[name] == nil {
			sights[name] = &sight{}
		}
		return sights[name]
	}
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		e, err := t.next()
		if err == io.EOF {
			return sights, nil
		}
		if err != nil {
			return nil, asMalformed(err)
		}
		dir, base := splitName(e.name)
		for d := dir; e.name != ""; d, _ = splitName(d) {
			if names[d] {
				at(d).below = true
			}
			if d == "" {
				break
			}
		}
		switch {
		case base == whiteoutOpaque:
			at(dir).opaque = true
		case strings.HasPrefix(base, whiteoutPrefix+whiteoutPrefix): // AUFS' own
		case strings.HasPrefix(base, whiteoutPrefix):
			at(join(dir, base[len(whiteoutPrefix):])).whiteout = true
		case names[e.name]:
			s := at(e.name)
			if s.entries == 0 {
				s.head, s.number, s.sparse = e.head, e.number, e.sparse
				if s.off, err = in.Seek(0, io.SeekCurrent); err != nil {
					return nil, err
				}
			}
			s.entries++
			if e.head.Typeflag == tar.TypeDir {
				s.dirs++
			}
		}
	}
}

// hides reports whether a layer that has no entry of a name hides what lower
// layers call so.
func hides(sights map[string]*sight, name string) bool {
	if s := sights[name]; s != nil && s.whiteout {
		return true
	}
	for dir := name; dir != ""; {
		dir, _ = splitName(dir)
		if s := sights[dir]; s != nil && (s.whiteout || s.opaque || s.entries > s.dirs) {
			return true
		}
	}
	return false
}

// arrange says which entries of a layer come first so that the files that were
// taken do: they, in their order, each after the directories it lies in. Of a hard
// link it is the file itself, whose contents are meant; the link stays where it is,
// as all does that has no contents.
//
// A file stays where it is, too, if anything could come of moving it: if its name,
// or one on the way to it, is in the layer more than once, as something else, or
// as a whiteout.
func arrange(ctx context.Context, f *spooled, names map[string]bool, sights map[string]*sight, taken []string) ([]*sight, error) {
	files, sights, err := linked(ctx, f, names, sights, taken)
	if err != nil {
		return nil, err
	}
	var front []*sight
	moved := map[string]bool{}
	for _, name := range files {
		if moved[name] || !movable(sights, name) {
			continue
		}
		var parents []string
		for dir, _ := splitName(name); !moved[dir]; dir, _ = splitName(dir) {
			if moved[dir] = true; has(sights, dir) {
				parents = append(parents, dir)
			}
			if dir == "" {
				break
			}
		}
		for i := len(parents) - 1; i >= 0; i-- {
			front = append(front, sights[parents[i]])
		}
		moved[name] = true
		front = append(front, sights[name])
	}
	return front, nil
}

func movable(sights map[string]*sight, name string) bool {
	s := sights[name]
	if s == nil || s.entries != 1 || s.head.Typeflag != tar.TypeReg || s.sparse || s.below || s.whiteout {
		return false
	}
	for dir := name; dir != ""; {
		dir, _ = splitName(dir)
		if s := sights[dir]; s != nil && (s.whiteout || s.entries > 0 && !s.isDir()) {
			return false
		}
	}
	return true
}

// maxLinks is how many hard links to hard links are followed.
const maxLinks = 8

// linked puts the files in the place of hard links to them. The layer is looked
// through again for what they name that nobody asked for yet.
func linked(ctx context.Context, f *spooled, names map[string]bool, sights map[string]*sight, taken []string) ([]string, map[string]*sight, error) {
	files := append([]string(nil), taken...)
	for range maxLinks {
		more := map[string]bool{}
		links := false
		for i, name := range files {
			s := sights[name]
			if s == nil || s.entries != 1 || s.head.Typeflag != tar.TypeLink {
				continue
			}
			target, err := index.Clean(s.head.Linkname)
			if err != nil {
				return nil, nil, err
			}
			links = true
			files[i] = target
			if !names[target] {
				addWithParents(more, target)
			}
		}
		if !links {
			break
		}
		if len(more) == 0 {
			continue
		}
		// The caller's names are for all layers.
		for name := range names {
			more[name] = true
		}
		names = more
		var err error
		if sights, err = sightsOf(ctx, f, names); err != nil {
			return nil, nil, err
		}
	}
	return files, sights, nil
}

// addFront writes what comes first, and the mark that ends it. It gives the numbers
// of the entries that were written.
func addFront(ctx context.Context, p *Packer, f *spooled, front []*sight) (map[int]bool, error) {
	if len(front) == 0 {
		return nil, nil
	}
	skip := map[int]bool{}
	for _, s := range front {
		var r io.Reader
		if s.head.Size > 0 {
			r = io.NewSectionReader(f, s.off, s.head.Size)
		}
		if err := addAgain(ctx, p, s.head, r); err != nil {
			return nil, err
		}
		skip[s.number] = true
	}
	return skip, endFront(ctx, p)
}
