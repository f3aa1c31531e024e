package commit

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/fs/upper"
	"github.com/varvefs/varve/index"
)

// Data is the data file of a layer.
type Data interface {
	// Hold returns nil when [off, off+n) of the data file holds the layer's bytes.
	// They stay there until Release, which is then called once.
	Hold(off, n int64) error
	Release()
	// Fd gives a descriptor of the data file that stays open meanwhile.
	Fd() int
}

// ExportOptions say what is exported. The zero value is the whole tree.
type ExportOptions struct {
	// Path is what alone is exported, as docker's cp wants it: the first entry is
	// its last name, the others lie below that. "" and "/" are the root, which
	// then has no entry of its own. Symlinks are not followed.
	Path string

	// Warn is told what could not be kept, in sentences for the user. It may be
	// nil.
	Warn func(text string)
}

// Export writes what a mount of the image with an upper shows, or the image alone
// where up is nil, as a flat tar: sorted, owners by number, hard links kept, no
// whiteouts. data has one element a device of the index; of it only what the
// upper has not replaced is asked for.
func Export(ctx context.Context, w io.Writer, lower *index.Image, up *upper.Dir, data []Data, o ExportOptions) error {
	only, err := index.Clean("/" + o.Path)
	if err != nil {
		return fmt.Errorf("export: %w", err)
	}
	if o.Warn == nil {
		o.Warn = func(string) {}
	}
	if n := len(lower.Devices()); n != len(data) {
		return fmt.Errorf("export: an image of %d layers with the data of %d", n, len(data))
	}
	ahead := ahead{data: data, free: make(chan struct{}, aheadFiles)}
	defer ahead.wait()
	out := bufio.NewWriterSize(w, 1<<20)
	x := exporter{
		tar: tar.NewWriter(out), merged: merged{im: lower, up: up, only: only}, data: data, warn: o.Warn,
		ahead: &ahead,
		upper: map[uint64]string{}, lower: map[uint64]string{}, buf: make([]byte, 1<<20),
	}
	if err := x.run(ctx); err != nil {
		return fmt.Errorf("export: %w", err)
	}
	if err := errors.Join(x.tar.Close(), out.Flush()); err != nil {
		return fmt.Errorf("export: %w", err)
	}
	return nil
}

type exporter struct {
	tar    *tar.Writer
	merged merged
	data   []Data
	ahead  *ahead
	warn   func(text string)
	upper  map[uint64]string // the name of the first of several hard links, by the
	lower  map[uint64]string // inode of the upper and the nid of the image
	buf    []byte
}

// run writes the entries while the tree is walked some way before them.
func (x *exporter) run(ctx context.Context) error {
	found := false
	queue := make([]*leaf, 0, lookAhead)
	flush := func(keep int) error {
		for len(queue) > keep {
			if err := x.entry(ctx, queue[0]); err != nil {
				return fmt.Errorf("%.200q: %w", "/"+queue[0].change.Path, err)
			}
			queue = append(queue[:0], queue[1:]...)
		}
		return nil
	}
	err := x.merged.walk(ctx, func(it *leaf) error {
		found = true
		x.ahead.add(it)
		queue = append(queue, it)
		return flush(lookAhead - 1)
	})
	if err == nil {
		err = flush(0)
	}
	if err == nil && !found {
		err = fmt.Errorf("%.200q: %w", "/"+x.merged.only, index.ErrNotExist)
	}
	return err
}

func (x *exporter) entry(ctx context.Context, it *leaf) error {
	c := it.change
	if c.Path == "" {
		return nil
	}
	if c.Type() == unix.S_IFSOCK {
		x.warn(fmt.Sprintf("%q is a socket, which no tar can hold: it is left out", "/"+c.Path))
		return nil
	}
	h, lost, err := header(c, nil)
	if err != nil {
		return err
	}
	for _, name := range lost {
		x.warn(fmt.Sprintf("%q: the extended attribute %q cannot be kept in a tar: it is left out", "/"+c.Path, name))
	}
	if x.merged.only != "" { // docker cp's names begin with the one that was asked for
		h.Name = path.Base(x.merged.only) + h.Name[len(x.merged.only):]
	}
	if !c.IsDir() && c.Nlink > 1 {
		links, id := x.upper, c.Ino
		if it.in != nil {
			links, id = x.lower, it.in.Nid
		}
		if first, ok := links[id]; ok {
			link(h, first)
		} else {
			links[id] = h.Name
		}
	}
	if err := x.tar.WriteHeader(h); err != nil {
		return err
	}
	if h.Typeflag != tar.TypeReg || h.Size == 0 {
		return nil
	}
	if it.in != nil {
		return x.fromImage(ctx, it)
	}
	f, err := x.merged.up.Open(c.Path)
	if err != nil {
		return err
	}
	defer f.Close()
	n, err := io.CopyBuffer(struct{ io.Writer }{x.tar}, struct{ io.Reader }{io.LimitReader(stopping{ctx, f}, h.Size)}, x.buf)
	if err == nil && n < h.Size {
		err = fmt.Errorf("%w: it has %d bytes instead of %d", ErrChanged, n, h.Size)
	}
	return err
}

// fromImage copies a file of the image from its data file.
func (x *exporter) fromImage(ctx context.Context, it *leaf) error {
	for at := int64(0); at < it.in.Size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(int64(len(x.buf)), it.in.Size-at)
		d := x.data[it.device]
		if err := d.Hold(it.off+at, n); err != nil {
			return err
		}
		got, err := unix.Pread(d.Fd(), x.buf[:n], it.off+at)
		d.Release()
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err == nil && got == 0 {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return fmt.Errorf("read data file at %d: %w", it.off+at, err)
		}
		if _, err := x.tar.Write(x.buf[:got]); err != nil {
			return err
		}
		at += int64(got)
	}
	return nil
}

// lookAhead is how many names are read before the one that is written, so that
// the contents of several are fetched at once: a cold image would cost a round
// trip a file otherwise.
const lookAhead = 64

// ahead asks for contents before they are needed. Who needs them asks again, and
// is told what went wrong.
type ahead struct {
	data  []Data
	free  chan struct{} // holds one of each file that is asked for
	group sync.WaitGroup
}

const (
	aheadFiles = 8
	aheadBytes = 4 << 20 // of one file
)

func (a *ahead) add(it *leaf) {
	if it.in == nil || it.in.Size == 0 || !isRegular(it.in) {
		return
	}
	select {
	case a.free <- struct{}{}:
	default:
		return // enough is under way
	}
	a.group.Go(func() {
		if d := a.data[it.device]; d.Hold(it.off, min(it.in.Size, aheadBytes)) == nil {
			d.Release()
		}
		<-a.free
	})
}

// wait waits until nothing is asked for any more.
func (a *ahead) wait() { a.group.Wait() }

func isRegular(in *index.Inode) bool { return in.Mode&unix.S_IFMT == unix.S_IFREG }
