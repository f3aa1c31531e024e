package daemon

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/index"
)

// stream writes events as they come, from any goroutine.
type stream struct {
	mu    sync.Mutex
	enc   *json.Encoder
	flush *http.ResponseController
}

func (s *stream) send(e event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.enc.Encode(e) == nil {
		s.flush.Flush()
	}
}

// handleList walks a path of an image that need not be mounted.
func (d *Daemon) handleList(w http.ResponseWriter, r *http.Request) {
	var o PathOptions
	if !decode(w, r, &o) {
		return
	}
	t, in, err := d.look(r.Context(), o, false)
	if err != nil {
		reply(w, nil, err)
		return
	}
	defer t.close()
	enc := json.NewEncoder(w)
	root := "/" + strings.Trim(o.Path, "/")
	if !in.IsDir() {
		enc.Encode(t.file(root, &in))
		return
	}
	t.list(root, &in, o.Recursive, func(f File) bool { return enc.Encode(f) == nil })
}

// list gives a directory's names, and those of the directories in it, each
// begun by an entry of its own, as `ls -R` shows them.
func (t *tree) list(path string, dir *index.Inode, recursive bool, fn func(File) bool) bool {
	head := t.file(path, dir)
	head.Dir = true
	if !fn(head) {
		return false
	}
	type sub struct {
		path string
		in   index.Inode
	}
	var subs []sub
	ok := true
	t.index.ReadDir(dir, 0, func(e index.Dirent, _ uint64) bool {
		name := string(e.Name)
		if name == "." || name == ".." {
			return true
		}
		in, err := t.index.Inode(e.Nid)
		if err != nil {
			return false
		}
		p := strings.TrimSuffix(path, "/") + "/" + name
		if recursive && in.IsDir() {
			subs = append(subs, sub{p, in})
		}
		ok = fn(t.file(p, &in))
		return ok
	})
	for _, s := range subs {
		if !ok || !t.list(s.path, &s.in, true, fn) {
			return false
		}
	}
	return ok
}

func (t *tree) file(path string, in *index.Inode) File {
	f := File{
		Path: path, Mode: in.Mode, Nlink: in.Nlink, UID: in.UID, GID: in.GID, Size: in.Size, Rdev: in.Rdev,
		ModTime: time.Unix(in.Mtime, int64(in.MtimeNs)).UTC(),
	}
	if link, err := t.index.Readlink(in); err == nil {
		f.Link = string(link)
	}
	return f
}

// look opens an image and finds a path in it. Symlinks on the way are followed
// inside the image; the last one only if follow says so.
func (d *Daemon) look(ctx context.Context, o PathOptions, follow bool) (*tree, index.Inode, error) {
	t, err := d.open(ctx, o.ImageOptions, func(event) {})
	if err != nil {
		return nil, index.Inode{}, err
	}
	in, err := t.resolve(o.Path, follow)
	if err != nil {
		t.close()
		return nil, in, fmt.Errorf("%s: %s: %w", o.Image, o.Path, err)
	}
	return t, in, nil
}

// maxFollow is how many symlinks one path may lead through: the kernel's
// MAXSYMLINKS.
const maxFollow = 40

// resolve finds a path in the image.
func (t *tree) resolve(path string, follow bool) (index.Inode, error) {
	m := merged{tree: t}
	p, err := m.resolve(path, follow)
	if err != nil {
		return index.Inode{}, err
	}
	return *p.in, nil
}

// cat gives what writes a file of an image, fetching only what it needs.
func (d *Daemon) cat(ctx context.Context, o PathOptions) (func(io.Writer) error, error) {
	t, in, err := d.look(ctx, o, true)
	if err != nil {
		return nil, err
	}
	if in.Mode&unix.S_IFMT != unix.S_IFREG {
		t.close()
		return nil, fmt.Errorf("%s: %s: not a regular file", o.Image, o.Path)
	}
	return func(w io.Writer) error {
		defer t.close()
		if err := t.copy(ctx, w, &in); err != nil {
			return fmt.Errorf("%s: %s: %w", o.Image, o.Path, err)
		}
		return nil
	}, nil
}

// copy writes a file's bytes to w, a step at a time.
func (t *tree) copy(ctx context.Context, w io.Writer, in *index.Inode) error {
	const step = 4 << 20
	device, off, ok, err := t.index.Extent(in)
	if err != nil || !ok {
		return err
	}
	l := t.layers[device]
	buf := make([]byte, min(step, in.Size))
	for end := off + in.Size; off < end; {
		n := min(int64(len(buf)), end-off)
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := l.Hold(off, n); err != nil {
			return err
		}
		got, err := unix.Pread(l.Fd(), buf[:n], off)
		l.Release()
		if err != nil || got == 0 {
			return fmt.Errorf("data file: %d of %d bytes: %w", got, n, err)
		}
		if _, err := w.Write(buf[:got]); err != nil {
			return err
		}
		off += int64(got)
	}
	return nil
}
