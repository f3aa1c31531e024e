package daemon

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/fetch"
	"github.com/varvefs/varve/fetch/profile"
	"github.com/varvefs/varve/image"
	"github.com/varvefs/varve/index"
)

// WarmOptions are what `varve warm` asks for.
type WarmOptions struct {
	ImageOptions
	Paths   []byte `json:"paths,omitempty"`   // in the image, as [PackPaths] packs them; nil for its start-up profile
	Profile string `json:"profile,omitempty"` // the workload that it is of, "" or "default" for the image's own
	Rate    int64  `json:"rate,omitempty"`    // bytes a second, 0 for no limit
	Detach  bool   `json:"detach,omitempty"`  // leave it to the daemon, in the background
}

// Warmed is what came of it.
type Warmed struct {
	Files   int    `json:"Files"`             // regular files with contents; 0 for a profile
	Bytes   int64  `json:"Bytes"`             // of their contents
	Fetched int64  `json:"Fetched"`           // compressed, of what was missing; 0 if that is still to come
	Profile string `json:"Profile,omitempty"` // what says what a start reads, as [ProfileUse] has it
}

// warmWaste is how many percent of bytes may come besides what was asked for, where
// that saves requests.
const warmWaste = 10

// maxPaths is how many bytes of paths may be asked for at a time.
const maxPaths = 64 << 20

// Warm brings files of an image here before they are read.
func (c *Client) Warm(ctx context.Context, o WarmOptions) (*Warmed, error) {
	e, err := c.follow(ctx, "/v1/warm", o)
	return e.Warmed, err
}

// PackPaths makes paths small enough for a request.
func PackPaths(paths []string) ([]byte, error) {
	text := strings.Join(paths, "\x00")
	if len(text) > maxPaths {
		return nil, fmt.Errorf("%d bytes of paths: want at most %d", len(text), maxPaths)
	}
	return PackProfile([]byte(text))
}

func unpackPaths(packed []byte) ([]string, error) {
	z, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return nil, fmt.Errorf("paths: %w", err)
	}
	text, err := io.ReadAll(io.LimitReader(z, maxPaths+1))
	if err == nil && len(text) > maxPaths {
		err = fmt.Errorf("more than %d bytes", maxPaths)
	}
	if err != nil {
		return nil, fmt.Errorf("paths: %w", err)
	}
	return strings.Split(string(text), "\x00"), nil
}

// Warm brings the contents of files here before they are read. Files that are here
// cost nothing, so a warm that broke goes on when it is called again.
func (d *Daemon) Warm(ctx context.Context, o WarmOptions, n note) (*Warmed, error) {
	paths, err := []string(nil), checkRate(o.Rate)
	if err == nil && o.Paths != nil {
		paths, err = unpackPaths(o.Paths)
	}
	if err == nil {
		o.Profile, err = profile.ParseName(o.Profile)
	}
	if err != nil {
		return nil, fmt.Errorf("%w%w", err, silent{errUsage})
	}
	o.alone = true // to have it open is no reason to fetch more for others
	r, err := d.resolve(ctx, o.ImageOptions, n)
	if err != nil {
		return nil, err
	}
	t := &tree{manifest: r.manifest, resolved: r}
	defer t.close()
	x := &opening{tree: t, note: n, rate: o.Rate}
	if err := x.open(ctx); err != nil {
		return nil, fmt.Errorf("warm %s: %w", r.name.Familiar(), err)
	}
	w := &warming{tree: t}
	if paths == nil {
		err = w.profile(ctx, o.Profile)
	} else {
		err = w.add(ctx, paths)
	}
	if err != nil {
		return nil, fmt.Errorf("warm %s: %w", r.name.Familiar(), err)
	}
	if o.Detach {
		t.retain()
		d.background.Go(func() {
			defer t.close()
			if err := w.bring(d.life, fetch.Bringing{Class: fetch.Background, Rate: o.Rate}); err != nil {
				d.log.Warn("an image was not warmed", "image", r.name.Familiar(), "err", err)
			}
		})
		return &w.out, nil
	}
	m := &bar{note: n, id: r.name.Familiar(), status: "Warming"}
	if err := w.bring(ctx, fetch.Bringing{Class: fetch.Profile, Waste: warmWaste, Rate: o.Rate, Progress: m.at}); err != nil {
		return nil, fmt.Errorf("warm %s: %w", r.name.Familiar(), err)
	}
	n.report(r.name.Familiar(), "Warmed", 0, 0)
	w.out.Fetched = m.total
	return &w.out, nil
}

// warming is what of an image is to be brought.
type warming struct {
	tree  *tree
	wants []fetch.Want
	out   Warmed
}

func (w *warming) bring(ctx context.Context, o fetch.Bringing) error {
	return w.tree.d.fetcher.Bring(ctx, w.wants, o)
}

// profile finds what a start of the image reads, as a mount of it would.
func (w *warming) profile(ctx context.Context, name string) error {
	t := w.tree
	s := &start{d: t.d, log: t.d.log, note: func(event) {}, name: name, ctx: ctx, image: t.resolved, layers: t.layers, sizes: profileLayers(t)}
	s.ask = func() (*profile.Profile, error) {
		if t.o.Offline || t.resolved.name.IsLocal() {
			return nil, nil
		}
		return t.pushedProfile(ctx, name)
	}
	var err error
	if s.local, err = t.d.localProfile(t.manifest.Digest, name); err == nil && s.local != nil {
		err = s.local.Check(t.manifest.Digest.String(), s.sizes)
	}
	if err != nil {
		return err
	}
	whole := !slices.ContainsFunc(t.layers, func(h *fetch.Handle) bool { return !h.Whole() })
	w.out.Profile, w.wants, err = s.wants(t)
	for _, want := range w.wants {
		w.out.Bytes += want.N
	}
	if len(w.wants) > 0 || err != nil || whole {
		return err
	}
	return fmt.Errorf("nothing is known of its start: name what is to be brought (varve warm %s PATH...), bring all of it (varve pull --full %[1]s), or mount it, which records a start-up profile%w", t.resolved.name.Familiar(), silent{image.ErrNotFound})
}

// extent is where a file's bytes lie.
type extent struct {
	device int
	off, n int64
}

// add finds files and those below directories. Symlinks on the way to a path are
// followed inside the image, those below it are not. Nothing is wanted unless all
// paths are there.
func (w *warming) add(ctx context.Context, paths []string) error {
	seen := map[uint64]bool{} // inodes: a file may have several names, and paths may lie in one another
	var extents []extent
	for _, path := range paths {
		in, err := w.tree.resolve(path, true)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		if err := w.walk(ctx, in, seen, &extents); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	slices.SortFunc(extents, func(a, b extent) int {
		return cmp.Or(cmp.Compare(a.device, b.device), cmp.Compare(a.off, b.off))
	})
	w.wants = w.tree.wants(extents)
	return nil
}

// walk adds the regular files of a directory and of those in it, or a single one.
func (w *warming) walk(ctx context.Context, in index.Inode, seen map[uint64]bool, extents *[]extent) error {
	im := w.tree.index
	for todo := []uint64{in.Nid}; len(todo) > 0; {
		nid := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if seen[nid] {
			continue
		}
		seen[nid] = true
		in, err := im.Inode(nid)
		if err != nil {
			return err
		}
		if !in.IsDir() {
			if in.Mode&unix.S_IFMT != unix.S_IFREG {
				continue
			}
			device, off, ok, err := im.Extent(&in)
			if err != nil {
				return err
			}
			if ok {
				*extents = append(*extents, extent{device, off, in.Size})
				w.out.Files++
				w.out.Bytes += in.Size
			}
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		err = im.ReadDir(&in, 0, func(e index.Dirent, _ uint64) bool {
			if name := string(e.Name); name != "." && name != ".." {
				todo = append(todo, e.Nid)
			}
			return true
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// wants makes ranges of extents in the order of the data files, neighbours joined.
func (t *tree) wants(extents []extent) (wants []fetch.Want) {
	for _, e := range extents {
		h := t.layers[e.device]
		if k := len(wants) - 1; k >= 0 && wants[k].Layer == h {
			last := &wants[k]
			if end := last.Off + last.N; e.off <= alignUp(end) {
				last.N = max(end, e.off+e.n) - last.Off
				continue
			}
		}
		wants = append(wants, fetch.Want{Layer: h, Off: e.off, N: e.n})
	}
	return wants
}

// alignUp gives where the next file of a data file begins at the earliest.
func alignUp(off int64) int64 { return (off + index.BlockSize - 1) &^ (index.BlockSize - 1) }
