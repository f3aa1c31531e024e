package test

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	ctrdcontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/opencontainers/image-spec/identity"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// bootable is the layer that test/child runs from, with what a runtime wants to
// find, and files for it to change. Its bytes are the same in every test.
func bootable(t *testing.T) []byte {
	l := newLayer(t)
	l.dir("bin", "proc", "sys", "dev", "run", "etc", "tmp", "changed", "changed/dir")
	l.add(tar.Header{Typeflag: tar.TypeReg, Name: "bin/child", Mode: 0o755}, mustGet[[]byte](t)(os.ReadFile(child)))
	for _, name := range []string{"0", "1", "2", "3", "4", "5", "dir/old", "dir/older"} {
		l.file("changed/"+name, content("changed/"+name, 5000))
	}
	return l.bytes()
}

// stacked gives layers with what containerd unpacks as it is in the tar: files of
// every type, and what layers do to one another.
func stacked(t *testing.T) [][]byte {
	a := newLayer(t)
	a.dir("kinds", "opaque", "opaque/sub", "swap", "hidden", "links")
	a.file("kinds/file", content("kinds", 70_000))
	a.hardlink("kinds/second", "kinds/file")
	a.hardlink("links/third", "kinds/file")
	a.symlink("kinds/link", "file")
	a.add(tar.Header{Typeflag: tar.TypeFifo, Name: "kinds/fifo", Mode: 0o620}, nil)
	a.add(tar.Header{Typeflag: tar.TypeChar, Name: "kinds/null", Devmajor: 1, Devminor: 3, Mode: 0o666}, nil)
	a.add(tar.Header{Typeflag: tar.TypeDir, Name: "kinds/sticky/", Mode: 0o1777}, nil)
	a.add(tar.Header{Typeflag: tar.TypeReg, Name: "kinds/setuid", Uid: 1000, Gid: 70_000, Mode: 0o4755}, []byte("s"))
	capability := "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	a.add(tar.Header{Typeflag: tar.TypeReg, Name: "kinds/capable", Mode: 0o755, PAXRecords: xattrs("security.capability", capability, "user.of", "a file")}, []byte("c"))
	a.file("opaque/old", []byte("old"))
	a.file("opaque/sub/old", []byte("old"))
	a.file("swap/old", []byte("old"))
	a.file("hidden/a", []byte("a"))
	a.file("twice", []byte("first"))

	b := newLayer(t)
	b.dir("opaque")
	b.opaque("opaque")
	b.file("opaque/new", []byte("new"))
	b.file("swap", []byte("a file for a while"))
	b.dir("kinds")
	b.whiteout("hidden", "kinds/fifo", "never-was")
	b.file("twice", content("second", 4096))

	c := newLayer(t)
	c.dir("swap", "hidden", "opaque", "opaque/sub")
	c.file("swap/new", []byte("new"))
	c.file("hidden/b", []byte("back"))
	c.file("opaque/sub/third", []byte("third"))
	c.add(tar.Header{Typeflag: tar.TypeReg, Name: "twice", Mode: 0o600, Uid: 12}, content("third", 9000))
	return [][]byte{a.bytes(), b.bytes(), c.bytes()}
}

// pull pulls an image lazily, as nerdctl does.
func (c *ctrd) pull(ref string, more ...client.RemoteOpt) client.Image {
	c.t.Helper()
	return mustGet[client.Image](c.t)(c.tryPull(ref, more...))
}

func (c *ctrd) tryPull(ref string, more ...client.RemoteOpt) (client.Image, error) {
	opts := append([]client.RemoteOpt{
		client.WithPullUnpack, client.WithPullSnapshotter("varve"),
		client.WithImageHandlerWrapper(snapshotters.AppendInfoHandlerWrapper(ref)),
	}, more...)
	return c.Pull(c.ctx, ref, opts...)
}

// pullWhole pulls an image as containerd does by itself.
func (c *ctrd) pullWhole(ref string) client.Image {
	c.t.Helper()
	return mustGet[client.Image](c.t)(c.Pull(c.ctx, ref, client.WithPullUnpack, client.WithPullSnapshotter("overlayfs")))
}

// top gives the snapshot of an image's highest layer.
func (c *ctrd) top(img client.Image) string {
	c.t.Helper()
	ids, err := img.RootFS(c.ctx)
	must(c.t, err)
	return identity.ChainID(ids).String()
}

func (c *ctrd) varveSnapshots() snapshots.Snapshotter { return c.SnapshotService("varve") }

// contents gives what lies in containerd's content store.
func (c *ctrd) contents() map[string]bool {
	c.t.Helper()
	all := map[string]bool{}
	must(c.t, c.ContentStore().Walk(c.ctx, func(i ctrdcontent.Info) error {
		all[i.Digest.String()] = true
		return nil
	}))
	return all
}

// view gives the tree that a snapshotter shows of an image.
func (c *ctrd) view(snapshotter string, img client.Image) (tr tree) {
	c.t.Helper()
	c.seen(snapshotter, c.top(img), func(dir string) { tr = readTree(c.t, dir) })
	return tr
}

// seen has f look at a snapshot, read-only.
func (c *ctrd) seen(snapshotter, parent string, f func(dir string)) {
	c.t.Helper()
	ctx, done, err := c.WithLease(c.ctx) // or it is collected meanwhile
	must(c.t, err)
	defer done(ctx)
	s := c.SnapshotService(snapshotter)
	key := "view of " + parent
	m := mustGet[[]mount.Mount](c.t)(s.View(ctx, key, parent))
	dir := mustGet[string](c.t)(os.MkdirTemp(c.dir, "view"))
	must(c.t, mount.All(m, dir))
	defer mount.UnmountAll(dir, 0)
	f(dir)
	must(c.t, mount.UnmountAll(dir, 0))
	must(c.t, s.Remove(ctx, key))
}

// contained is a container that runs.
type contained struct {
	client.Container
	c    *ctrd
	task client.Task
	exit <-chan client.ExitStatus
	out  *output

	execs int
}

// output is what a container says, for who asks while it does.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// launch is how a container is made.
type launch struct {
	snapshot client.NewContainerOpts // nil for a new one
	spec     []oci.SpecOpts
	network  bool // of its own
}

// create makes a container that does not run yet.
func (c *ctrd) create(id string, img client.Image, l launch, args ...string) (client.Container, error) {
	if l.snapshot == nil {
		l.snapshot = client.WithNewSnapshot(id, img)
	}
	spec := append([]oci.SpecOpts{oldSpec, oci.WithImageConfig(img), oci.WithProcessArgs(args...)}, l.spec...)
	if !l.network {
		spec = append(spec, oci.WithHostNamespace(specs.NetworkNamespace))
	}
	return c.NewContainer(c.ctx, id, client.WithImage(img), client.WithSnapshotter("varve"), l.snapshot,
		client.WithRuntime("io.containerd.runc.v2", &options.Options{BinaryName: c.runc}), client.WithNewSpec(spec...))
}

// oldSpec asks for what the distribution's crun knows.
func oldSpec(_ context.Context, _ oci.Client, _ *containers.Container, s *oci.Spec) error {
	s.Version = "1.0.2"
	return nil
}

// start makes a container of an image and starts it.
func (c *ctrd) start(id string, img client.Image, args ...string) *contained {
	c.t.Helper()
	return c.startAs(id, img, launch{}, args...)
}

func (c *ctrd) startAs(id string, img client.Image, l launch, args ...string) *contained {
	c.t.Helper()
	return c.begin(mustGet[client.Container](c.t)(c.create(id, img, l, args...)))
}

// begin starts a container that is there.
func (c *ctrd) begin(k client.Container) *contained {
	c.t.Helper()
	r := &contained{Container: k, c: c, out: &output{}}
	var err error
	r.task, err = k.NewTask(c.ctx, cio.NewCreator(cio.WithStreams(nil, r.out, r.out), cio.WithFIFODir(c.path("fifo"))))
	must(c.t, err)
	r.exit, err = r.task.Wait(c.ctx)
	must(c.t, err)
	must(c.t, r.task.Start(c.ctx))
	return r
}

// ended waits until the container has ended, which may take a signal, removes it
// and gives what it said.
func (r *contained) ended() (code uint32, out string) {
	r.c.t.Helper()
	code, out = r.over()
	must(r.c.t, r.Delete(r.c.ctx, client.WithSnapshotCleanup))
	return code, out
}

// over is ended without removing the container.
func (r *contained) over() (code uint32, out string) {
	r.c.t.Helper()
	status := <-r.exit
	must(r.c.t, status.Error())
	if io := r.task.IO(); io != nil {
		io.Wait()
	}
	_, err := r.task.Delete(r.c.ctx)
	must(r.c.t, err)
	return status.ExitCode(), r.out.String()
}

// kill ends the container and removes it.
func (r *contained) kill() {
	r.c.t.Helper()
	must(r.c.t, r.task.Kill(r.c.ctx, 9))
	r.ended()
}

// does runs a container of an image to its end, which must be a good one.
func (c *ctrd) does(id string, img client.Image, args ...string) string {
	c.t.Helper()
	code, out := c.start(id, img, args...).ended()
	if code != 0 {
		c.t.Errorf("%s %v: exit %d: %s", id, args, code, out)
	}
	return strings.TrimSpace(out)
}

// exec runs a command in a container.
func (r *contained) exec(args ...string) string {
	t, c := r.c.t, r.c
	r.execs++
	id := fmt.Sprintf("%s-%d", r.ID(), r.execs)
	t.Helper()
	spec := mustGet[*oci.Spec](t)(r.Spec(c.ctx))
	process := *spec.Process
	process.Args = args
	var out output
	p := mustGet[client.Process](t)(r.task.Exec(c.ctx, id, &process, cio.NewCreator(cio.WithStreams(nil, &out, &out), cio.WithFIFODir(c.path("fifo")))))
	exit := mustGet[<-chan client.ExitStatus](t)(p.Wait(c.ctx))
	must(t, p.Start(c.ctx))
	status := <-exit
	p.IO().Wait()
	_, err := p.Delete(c.ctx)
	must(t, err)
	if status.ExitCode() != 0 {
		t.Errorf("exec %v: exit %d: %s", args, status.ExitCode(), &out)
	}
	return strings.TrimSpace(out.String())
}

// again gives a container that runs to who has lost it with containerd.
func (c *ctrd) again(id string) *contained {
	c.t.Helper()
	r := &contained{c: c, Container: mustGet[client.Container](c.t)(c.LoadContainer(c.ctx, id)), out: &output{}}
	r.task = mustGet[client.Task](c.t)(r.Task(c.ctx, nil))
	r.exit = mustGet[<-chan client.ExitStatus](c.t)(r.task.Wait(c.ctx))
	return r
}

// rootfs gives a path in a running container as this machine sees it.
func (r *contained) rootfs(name string) string {
	return filepath.Join(r.c.dir, "state/io.containerd.runtime.v2.task", r.c.namespace, r.ID(), "rootfs", name)
}

// running starts a container that waits, and waits until it does.
func (c *ctrd) running(id string, img client.Image) *contained {
	c.t.Helper()
	r := c.start(id, img, "/bin/child", "wait", "/etc")
	for r.out.String() != "up\n" {
		time.Sleep(time.Millisecond)
	}
	return r
}

// lowers gives the mounts that containers lie on, and the FUSE mounts.
func (c *ctrd) lowers() (lower, fuse []string) {
	c.t.Helper()
	for _, line := range c.mounts() {
		_, what, _ := strings.Cut(line, " - ")
		if strings.HasPrefix(strings.Fields(line)[4], filepath.Join(c.root, "run/lower")+"/") {
			lower = append(lower, line)
		}
		if strings.HasPrefix(what, "fuse") {
			fuse = append(fuse, line)
		}
	}
	return lower, fuse
}

// lowersAre compares how many mounts containers lie on.
func (c *ctrd) lowersAre(what string, n int) {
	c.t.Helper()
	lower, fuse := c.lowers()
	if len(lower) != n || len(fuse) > 1 {
		c.t.Errorf("%s: %d mounts for containers to lie on, want %d, and %d of FUSE, want one at most:\n%s", what, len(lower), n, len(fuse), strings.Join(c.mounts(), ""))
	}
}
