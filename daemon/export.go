package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/commit"
	"github.com/varvefs/varve/fs/upper"
	"github.com/varvefs/varve/image"
	"github.com/varvefs/varve/index"
)

// export gives what writes the flat tar of a mount or an image, or of a path in
// one. Symlinks on the way to the path are followed inside the tree.
func (d *Daemon) export(ctx context.Context, o ExportOptions) (func(io.Writer) error, error) {
	u, err := d.useEither(ctx, o)
	if err != nil {
		return nil, err
	}
	m := merged{u.tree, u.upper}
	at, err := m.resolve(o.Path, o.Follow)
	if err != nil {
		u.release()
		return nil, fmt.Errorf("%s: %s: %w", o.Image, o.Path, err)
	}
	data := make([]commit.Data, len(u.tree.layers))
	for i, l := range u.tree.layers {
		data[i] = l
	}
	return func(w io.Writer) error {
		defer u.release()
		return commit.Export(ctx, w, u.tree.index.Image, u.upper, data, commit.ExportOptions{
			Path: at.path, Warn: func(text string) { d.log.Warn("export", "from", o.Image, "warning", text) },
		})
	}, nil
}

// stat tells of a path in a mount or an image.
func (d *Daemon) stat(ctx context.Context, o ExportOptions) (File, error) {
	u, err := d.useEither(ctx, o)
	if err != nil {
		return File{}, err
	}
	defer u.release()
	m := merged{u.tree, u.upper}
	at, err := m.resolve(o.Path, o.Follow)
	if err != nil {
		return File{}, fmt.Errorf("%s: %s: %w", o.Image, o.Path, err)
	}
	if c := at.change; c != nil {
		return File{
			Path: "/" + at.path, Mode: c.Mode, Nlink: c.Nlink, UID: c.UID, GID: c.GID, Size: c.Size,
			ModTime: time.Unix(c.Mtime.Unix()).UTC(), Link: c.Link,
		}, nil
	}
	return u.tree.file("/"+at.path, at.in), nil
}

// useEither opens a mount by its name, else an image by its.
func (d *Daemon) useEither(ctx context.Context, o ExportOptions) (*using, error) {
	n := note(func(event) {})
	u, err := d.use(ctx, o.Image, n)
	if !errors.Is(err, errNoMount) {
		return u, err
	}
	if _, perr := image.ParseName(o.Image); perr != nil {
		return nil, err // it can only have been meant for a mount
	}
	t, err := d.open(ctx, o.ImageOptions, n)
	if err != nil {
		return nil, err
	}
	return &using{tree: t, release: t.close}, nil
}

// merged is the tree that a mount shows, to look names up in.
type merged struct {
	tree  *tree
	upper *upper.Dir // nil for the image alone
}

// place is a name of a merged tree: the upper's or the image's.
type place struct {
	path   string        // from the root, which is ""
	change *upper.Change // nil where the image's shows
	in     *index.Inode  // the image's, nil where it is hidden or there is none
}

func (p *place) mode() uint32 {
	if p.change != nil {
		return p.change.Mode
	}
	return p.in.Mode
}

// resolve finds a path. Symlinks on the way are followed inside the tree, the
// last one only if follow says so.
func (m *merged) resolve(name string, follow bool) (*place, error) {
	root, err := m.child(nil, "")
	if err != nil {
		return nil, err
	}
	at := []*place{root}
	followed := 0
	for rest := name; rest != ""; {
		var part string
		part, rest, _ = strings.Cut(rest, "/")
		cur := at[len(at)-1]
		if cur.mode()&unix.S_IFMT != unix.S_IFDIR {
			return nil, unix.ENOTDIR
		}
		switch part {
		case "", ".":
			continue
		case "..":
			at = at[:max(1, len(at)-1)]
			continue
		}
		next, err := m.child(cur, part)
		if err != nil {
			return nil, err
		}
		if next.mode()&unix.S_IFMT != unix.S_IFLNK || !follow && strings.Trim(rest, "/") == "" {
			at = append(at, next)
			continue
		}
		if followed++; followed > maxFollow {
			return nil, unix.ELOOP
		}
		link, err := m.link(next)
		if err != nil {
			return nil, err
		}
		if strings.HasPrefix(link, "/") {
			at = at[:1]
		}
		rest = link + "/" + rest
	}
	return at[len(at)-1], nil
}

func (m *merged) link(p *place) (string, error) {
	if p.change != nil {
		return p.change.Link, nil
	}
	b, err := m.tree.index.Readlink(p.in)
	return string(b), err
}

// child finds a name in a directory; without one, the root.
func (m *merged) child(dir *place, name string) (*place, error) {
	p := &place{}
	if dir != nil {
		p.path = path.Join(dir.path, name)
	}
	if dir == nil || dir.in != nil {
		in, err := m.below(dir, name)
		if err != nil && !errors.Is(err, index.ErrNotExist) {
			return nil, err
		}
		if err == nil {
			p.in = &in
		}
	}
	if m.upper != nil && (dir == nil || dir.change != nil) {
		c, err := m.upper.Lookup(p.path)
		switch {
		case err == nil && c.Whiteout:
			return nil, index.ErrNotExist
		case err == nil:
			p.change = c
			if p.in != nil && (!c.IsDir() || c.Opaque || !p.in.IsDir()) {
				p.in = nil
			}
		case !errors.Is(err, unix.ENOENT):
			return nil, err
		}
	}
	if p.change == nil && p.in == nil {
		return nil, index.ErrNotExist
	}
	return p, nil
}

// below finds a name in the image's part of a directory.
func (m *merged) below(dir *place, name string) (index.Inode, error) {
	im := m.tree.index
	if dir == nil {
		return im.Inode(im.Root())
	}
	if !dir.in.IsDir() {
		return index.Inode{}, index.ErrNotExist
	}
	nid, err := im.Lookup(dir.in, name)
	if err != nil {
		return index.Inode{}, err
	}
	return im.Inode(nid)
}
