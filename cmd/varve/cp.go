package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/daemon"
)

func (a *app) cpCmd() *cobra.Command {
	c := copier{}
	var quiet bool
	cmd := &cobra.Command{
		Use:   "cp [flags] MOUNT:PATH|IMAGE:/PATH|PATH|- MOUNT:PATH|PATH|-",
		Short: "Copy files between a mount or an image and the local filesystem",
		Long: `Copy files between a mount or an image and the local filesystem.

One of the two is a path in a mount, or, as what is copied, in an image; such a
one is counted from the root, with or without a slash. A local path that has a colon in it must begin with a
slash or a dot. "-" as the first is a tar on standard input, which is unpacked
into a directory; as the second, a tar on standard output.

A directory that ends in "/." is copied without itself. Symlinks in a mount or
an image lead nowhere else. Copied files belong to who copies them, in a mount
to root if root copies. What gives privileges (set-id bits, capabilities) or
reaches hardware (device files) leaves a mount or an image only with --archive.`,
		Example: "  varve cp debian:12:/etc/os-release .\n  varve cp conf/. work:/etc/app\n" +
			"  tar c *.so | varve cp - work:/usr/lib\n  varve cp -a work:/var/lib/app - | ssh host tar x",
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			var err error
			if c.client, err = a.client(); err != nil {
				return err
			}
			c.in, c.out = cmd.InOrStdin(), cmd.OutOrStdout()
			tty := isTerminal(os.Stderr)
			c.tell = !quiet && (tty || cmd.Flags().Changed("quiet"))
			c.meter.w, c.meter.show = os.Stderr, c.tell && tty
			return c.copy(cmd.Context(), args[0], args[1])
		},
	}
	f := cmd.Flags()
	imageFlags(f, &c.ImageOptions)
	f.BoolVarP(&c.archive, "archive", "a", false, "keep owners, set-id bits, capabilities, ACLs and device files")
	f.BoolVarP(&c.follow, "follow-link", "L", false, "copy what a symlink leads to, where SRC is one")
	f.BoolVarP(&quiet, "quiet", "q", false, "say nothing while copying and at its end (default if there is no terminal)")
	return cmd
}

// copier copies between the two sides.
type copier struct {
	daemon.ImageOptions
	archive bool
	follow  bool
	tell    bool // at the end, what was copied

	client *daemon.Client
	in     io.Reader
	out    io.Writer
	meter  meter
}

// copy copies src to dst. The words of the refusals are docker's.
func (c *copier) copy(ctx context.Context, src, dst string) error {
	if src == "" {
		return usageError{errors.New("source can not be empty")}
	}
	if dst == "" {
		return usageError{errors.New("destination can not be empty")}
	}
	from, err := parseEnd(src)
	if err != nil {
		return err
	}
	to, err := parseEnd(dst)
	if err != nil {
		return err
	}
	switch {
	case from.of != "" && to.of != "":
		return usageError{errors.New("copying between containers is not supported: copy to a directory or with - first")}
	case from.of != "":
		return c.outOf(ctx, from, to.path)
	case to.image:
		return usageError{fmt.Errorf("the image %s cannot be changed: mount it with --rw, and commit the mount", to.of)}
	case to.of != "":
		return c.into(ctx, from.path, to)
	}
	return usageError{errors.New("must specify at least one container source: MOUNT:PATH or IMAGE:/PATH")}
}

// outOf copies from a mount or an image.
func (c *copier) outOf(ctx context.Context, from end, dst string) error {
	if err := setImage(&c.ImageOptions, from.of); err != nil {
		return err
	}
	if !from.image {
		err := flush(ctx, c.client, from.of)
		if err != nil && (!from.rooted() || exitCode(err) != daemon.ExitNotFound) {
			return err
		}
	}
	p := keepTrailing(path.Join("/", from.path), from.path)
	o := daemon.ExportOptions{ImageOptions: c.ImageOptions, Path: path.Clean(p), Follow: c.follow || assertsDir(p)}
	st, err := c.client.Stat(ctx, o)
	if err != nil {
		return err
	}
	s := source{dir: st.Mode&unix.S_IFMT == unix.S_IFDIR, contents: specifiesSelf(p) || st.Path == "/", name: path.Base(o.Path)}
	if assertsDir(p) && !s.dir {
		return fmt.Errorf("%s:%s: not a directory", from.of, from.path)
	}
	o.Path, o.Follow = st.Path, false
	export := func(w io.Writer) error { return c.client.Export(ctx, o, w) }
	if dst == "-" {
		return c.toStream(export, s, st.Path)
	}
	if dst, err = absolute(dst); err != nil {
		return err
	}
	t, err := findLocal(dst)
	if err != nil {
		return err
	}
	name, err := s.plan(t)
	if err != nil {
		return err
	}
	root, err := unix.Open(t.dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: t.dir, Err: err}
	}
	defer unix.Close(root)
	u := unpacker{
		root: root, dir: ".", resolve: unix.RESOLVE_BENEATH,
		rename: renamer(st.Path, name), archive: c.archive, guard: true, warn: c.warn,
	}
	if c.archive {
		u.owner = headerOwner
	}
	c.meter.label = "Copying from " + from.of
	err = pipe(export, func(r io.Reader) error { return u.unpack(c.meter.count(ctx, r)) })
	size := c.meter.n
	if !s.dir {
		size = st.Size
	}
	return c.end(err, size, dst)
}

// toStream writes the tar as it comes, but for its names where they are to be
// others.
func (c *copier) toStream(export func(io.Writer) error, s source, path string) error {
	if f, ok := c.out.(*os.File); ok && isTerminal(f) {
		return usageError{errors.New("cowardly refusing to write a tar to a terminal: redirect it")}
	}
	name := s.name
	if s.contents {
		name = "."
	}
	if path == "/" || filepath.Base(path) == name {
		return export(c.out)
	}
	return pipe(export, func(r io.Reader) error { return rebase(c.out, r, renamer(path, name)) })
}

// into copies into a mount.
func (c *copier) into(ctx context.Context, src string, to end) error {
	m, err := c.client.Inspect(ctx, to.of)
	if err != nil {
		return err
	}
	switch {
	case m.State != "mounted":
		return fmt.Errorf("the mount %s is %s: mount it with --rw --name %[1]s", m.Name, m.State)
	case !m.RW:
		return usageError{fmt.Errorf("the mount %s is read-only: mount it with --rw", m.Name)}
	}
	root, err := openMount(m.Dir)
	if err != nil {
		return err
	}
	defer unix.Close(root)
	return c.intoRoot(ctx, src, to, root)
}

// intoRoot copies into the directory of a mount that is open.
func (c *copier) intoRoot(ctx context.Context, src string, to end, root int) error {
	t, err := find(root, keepTrailing(path.Join("/", to.path), to.path), inRoot)
	var missing noParentError
	switch {
	case errors.As(err, &missing):
		return notFound("Could not find the file %s in mount %s", missing.dir, to.of)
	case err != nil:
		return fmt.Errorf("%s: %w", to.of, err)
	case t.exists && !t.isDir && !t.regular:
		return fmt.Errorf("destination %q must be a directory or a regular file", to.of+":"+to.path)
	}
	u := unpacker{root: root, dir: t.dir, resolve: inRoot, archive: c.archive, warn: c.warn}
	switch {
	case c.archive:
		u.owner = headerOwner
	case os.Geteuid() == 0:
		u.owner = rootOwner
	}
	c.meter.label = "Copying to " + to.of
	if src == "-" {
		if !t.isDir {
			return fmt.Errorf("destination %q must be a directory", to.of+":"+to.path)
		}
		if f, ok := c.in.(*os.File); ok && isTerminal(f) {
			return usageError{errors.New("standard input is a terminal: - wants a tar there")}
		}
		err := c.unpackIn(ctx, &u)
		return c.end(err, c.meter.n, to.of+":"+to.path)
	}
	if src, err = absolute(src); err != nil {
		return err
	}
	p, err := newPacker(src, c.follow)
	if err != nil {
		return err
	}
	defer p.root.Close()
	name, err := p.plan(t)
	if err != nil {
		return err
	}
	p.archive, p.warn = c.archive, c.warn
	if err := p.avoid(root, t.dir); err != nil {
		return err
	}
	err = pipe(func(w io.Writer) error { return p.pack(ctx, w, name) },
		func(r io.Reader) error { return u.unpack(c.meter.count(ctx, r)) })
	return c.end(err, p.bytes, to.of+":"+to.path)
}

// unpackIn unpacks standard input. Neither an interrupt nor a failure waits for
// more of it: who is blocked in reading it stays so until the process ends.
func (c *copier) unpackIn(ctx context.Context, u *unpacker) error {
	r, w := io.Pipe()
	defer r.Close()
	defer context.AfterFunc(ctx, func() { w.CloseWithError(ctx.Err()) })()
	go func() {
		_, err := io.Copy(w, c.in)
		w.CloseWithError(err)
	}()
	in, err := decompress(c.meter.count(ctx, r))
	if err != nil {
		return err
	}
	return u.unpack(in)
}

// end clears the meter and says what was copied, as docker does: the size of the
// contents, and what went through between the two sides if that is another.
func (c *copier) end(err error, size int64, dst string) error {
	c.meter.clear()
	if err != nil || !c.tell {
		return err
	}
	s := "Successfully copied " + human(size)
	if size != c.meter.n {
		s += " (transferred " + human(c.meter.n) + ")"
	}
	fmt.Fprintln(c.meter.w, oneLine(s+" to "+dst))
	return nil
}

// warn says what is left out of a copy that goes on.
func (c *copier) warn(line string) {
	c.meter.clear()
	fmt.Fprintln(c.meter.w, "varve: warning: "+oneLine(line))
}

// errStopped is what the writer's end of a pipe sees when the reader gave up.
var errStopped = errors.New("the reader has stopped")

// pipe runs the two ends of a pipe and gives the error that came first.
func pipe(write func(io.Writer) error, read func(io.Reader) error) error {
	r, w := io.Pipe()
	done := make(chan error)
	go func() {
		err := write(w)
		w.CloseWithError(err)
		done <- err
	}()
	err := read(r)
	r.CloseWithError(errStopped)
	if werr := <-done; werr != nil && !errors.Is(werr, errStopped) {
		return werr
	}
	return err
}

// meter shows how much went through.
type meter struct {
	w     io.Writer
	show  bool // while it goes: w is a terminal
	label string
	n     int64 // bytes

	mu   sync.Mutex // guards last: both ends of a copy may have something to say
	last time.Time  // when it was drawn; zero if it is not to be seen
}

// count gives a reader that counts, and that ends when ctx does.
func (m *meter) count(ctx context.Context, r io.Reader) io.Reader { return &countingReader{ctx, r, m} }

type countingReader struct {
	ctx context.Context // for as long as one copy takes
	r   io.Reader
	m   *meter
}

func (c *countingReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := c.r.Read(p)
	c.m.n += int64(n)
	c.m.draw()
	return n, err
}

func (m *meter) draw() {
	const step = 75 * time.Millisecond
	m.mu.Lock()
	defer m.mu.Unlock()
	if now := time.Now(); m.show && now.Sub(m.last) >= step {
		m.last = now
		fmt.Fprintf(m.w, "\r\x1b[2K%s - %s", oneLine(m.label), human(m.n))
	}
}

func (m *meter) clear() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.last.IsZero() {
		fmt.Fprint(m.w, "\r\x1b[2K")
		m.last = time.Time{}
	}
}
