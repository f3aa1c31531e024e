package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/remote"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/daemon"
)

// node is a machine on which images are started: a daemon or several with stores
// of their own, which are empty at first.
type node interface {
	// pull fetches what has to be there before root: all of the image for some,
	// nothing for ours.
	pull(ctx context.Context, ref string) error
	// root gives a directory that a container can have as its root and write to.
	// There is one at a time.
	root(ctx context.Context, ref string) (dir string, err error)
	// leave takes that directory away. What was fetched stays.
	leave(ctx context.Context) error
	// cpu is what the daemon that serves the image has computed so far, and peak
	// the most memory it has had resident, in bytes. Both are 0 without a daemon.
	cpu() (time.Duration, error)
	peak() (int64, error)
	// close ends the daemons and removes what they kept.
	close() error
}

// oursNode is a varve daemon. It is asked by the program, as users do.
type oursNode struct {
	s     *server
	flags []string // of mount
	mount string
}

func (b *bench) oursNode(ctx context.Context, flags ...string) (*oursNode, error) {
	s, err := b.fresh(ctx, "node")
	return &oursNode{s: s, flags: flags}, err
}

func (n *oursNode) pull(context.Context, string) error { return nil }

func (n *oursNode) root(ctx context.Context, ref string) (string, error) {
	args := append([]string{"--root", n.s.root, "mount", "--rw", "--insecure", "--name", "start"}, n.flags...)
	cmd := exec.CommandContext(ctx, n.s.bench.varve, append(args, ref)...)
	cmd.Dir = "/"
	dir, err := output(cmd)
	if err != nil {
		return "", err
	}
	n.mount = "start"
	return dir, nil
}

func (n *oursNode) leave(ctx context.Context) error {
	if n.mount == "" {
		return nil
	}
	_, err := n.s.client.Unmount(ctx, daemon.UnmountOptions{Mount: n.mount, Force: true, Remove: true})
	n.mount = ""
	return err
}

func (n *oursNode) cpu() (time.Duration, error) { return n.s.cpu() }

func (n *oursNode) peak() (int64, error) {
	r, err := n.s.rss()
	return r.peak, err
}

func (n *oursNode) close() error {
	return errors.Join(n.leave(context.Background()), n.s.discard())
}

// ctrNode is a containerd with overlayfs or with a lazy snapshotter.
type ctrNode struct {
	c     *containerd
	s     *snapshotter // nil for overlayfs
	chain string       // of the image's uppermost layer
	turn  int          // of the snapshot
	dir   string
}

func (b *bench) ctrNode(ctx context.Context, w *wire, kind snapshotterKind, image target) (n *ctrNode, err error) {
	n = &ctrNode{}
	if n.chain, err = b.chainID(ctx, image); err != nil {
		return nil, err
	}
	more := ""
	if kind.program != nil {
		if n.s, err = b.snapshotter(ctx, w, kind); err != nil {
			return nil, err
		}
		more = fmt.Sprintf("[proxy_plugins.%s]\n  type = \"snapshot\"\n  address = %q\n", kind.name, n.s.socket())
	}
	if n.c, err = b.containerd(ctx, more); err != nil {
		return nil, errors.Join(err, n.s.close())
	}
	return n, nil
}

func (n *ctrNode) name() string {
	if n.s == nil {
		return "overlayfs"
	}
	return n.s.kind.name
}

func (n *ctrNode) pull(ctx context.Context, ref string) error {
	cmd := n.c.ctr(ctx, "image", "pull", "--plain-http", "--snapshotter", n.name(), ref)
	if n.s != nil {
		args := append([]string{"image", "rpull", "--plain-http", "--snapshotter", n.name()}, n.s.kind.pullFlags...)
		cmd = n.c.client(ctx, n.c.b.rivals.ctrRemote, append(args, ref)...)
	}
	_, err := output(cmd)
	return err
}

// root makes a snapshot over the image as `ctr run` does and mounts it where ctr
// says how.
func (n *ctrNode) root(ctx context.Context, _ string) (string, error) {
	dir := filepath.Join(n.c.dir, "rootfs")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	n.turn++
	said, err := output(n.c.ctr(ctx, "snapshots", "--snapshotter", n.name(), "prepare", "--target", dir, n.key(), n.chain))
	if err != nil {
		return "", err
	}
	// It prints a mount(8) for a shell.
	if _, err := output(exec.CommandContext(ctx, "sh", "-ec", said)); err != nil {
		return "", err
	}
	n.dir = dir
	return dir, nil
}

func (n *ctrNode) key() string { return fmt.Sprintf("start-%d", n.turn) }

func (n *ctrNode) leave(ctx context.Context) error {
	if n.dir == "" {
		return nil
	}
	if err := unix.Unmount(n.dir, 0); err != nil {
		return fmt.Errorf("unmount %s: %w", n.dir, err)
	}
	n.dir = ""
	_, err := output(n.c.ctr(ctx, "snapshots", "--snapshotter", n.name(), "rm", n.key()))
	return err
}

func (n *ctrNode) cpu() (time.Duration, error) {
	if n.s != nil {
		return cpuOf(n.s.cmd.Process.Pid)
	}
	return n.c.cpu()
}

func (n *ctrNode) peak() (int64, error) {
	pid := n.c.cmd.Process.Pid
	if n.s != nil {
		pid = n.s.cmd.Process.Pid
	}
	r, err := rssOf(pid)
	return r.peak, err
}

func (n *ctrNode) close() error {
	err := n.leave(context.Background())
	if n.s == nil {
		return errors.Join(err, n.c.close())
	}
	// The snapshotter's mounts are below its own directory; they go with it.
	return errors.Join(err, n.c.close(), n.s.close())
}

// chainID names the snapshot of an image's uppermost layer. A client has it from
// the image's config, which it fetches in any case.
func (b *bench) chainID(ctx context.Context, image target) (string, error) {
	ref, err := b.reference(image.repo, image.tag)
	if err != nil {
		return "", err
	}
	img, err := remote.Image(ref, remote.WithContext(ctx), remote.WithPlatform(platform))
	if err != nil {
		return "", err
	}
	config, err := img.ConfigFile()
	if err != nil {
		return "", err
	}
	if len(config.RootFS.DiffIDs) == 0 {
		return "", fmt.Errorf("%s has no layers", ref)
	}
	chain := config.RootFS.DiffIDs[0].String()
	for _, d := range config.RootFS.DiffIDs[1:] {
		chain = fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(chain+" "+d.String()))) // as the image specification says
	}
	return chain, nil
}

// unpackedNode is the full pull by programs without a daemon: skopeo fetches the
// image, umoci unpacks it, overlayfs is mounted over the tree.
type unpackedNode struct {
	b      *bench
	dir    string
	merged string // the root there is
}

func (b *bench) unpackedNode() (*unpackedNode, error) {
	n := &unpackedNode{b: b, dir: filepath.Join(b.dir, "unpacked")}
	if err := b.remove(n.dir); err != nil {
		return nil, err
	}
	return n, os.MkdirAll(n.dir, 0o755)
}

func (n *unpackedNode) layout() string { return filepath.Join(n.dir, "layout") }
func (n *unpackedNode) rootfs() string { return filepath.Join(n.dir, "bundle", "rootfs") }

func (n *unpackedNode) pull(ctx context.Context, ref string) error {
	for _, argv := range [][]string{
		{n.b.rivals.skopeo, "copy", "--quiet", "--src-tls-verify=false", "docker://" + ref, "oci:" + n.layout() + ":image"},
		{n.b.rivals.umoci, "unpack", "--image", n.layout() + ":image", filepath.Dir(n.rootfs())},
	} {
		if _, err := output(exec.CommandContext(ctx, argv[0], argv[1:]...)); err != nil {
			return err
		}
	}
	return nil
}

// root is an overlay over the tree, with nothing written yet.
func (n *unpackedNode) root(ctx context.Context, _ string) (string, error) {
	scratch, err := os.MkdirTemp(n.dir, "root-")
	if err != nil {
		return "", err
	}
	upper, work, merged := filepath.Join(scratch, "upper"), filepath.Join(scratch, "work"), filepath.Join(scratch, "merged")
	for _, dir := range []string{upper, work, merged} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return "", err
		}
	}
	if err := unix.Mount("overlay", merged, "overlay", 0, "lowerdir="+n.rootfs()+",upperdir="+upper+",workdir="+work); err != nil {
		return "", fmt.Errorf("mount an overlay on %s: %w", merged, err)
	}
	n.merged = merged
	return merged, nil
}

func (n *unpackedNode) leave(context.Context) error {
	if n.merged == "" {
		return nil
	}
	if err := unix.Unmount(n.merged, 0); err != nil {
		return fmt.Errorf("unmount %s: %w", n.merged, err)
	}
	scratch := filepath.Dir(n.merged)
	n.merged = ""
	return n.b.remove(scratch)
}

func (n *unpackedNode) cpu() (time.Duration, error) { return 0, nil }
func (n *unpackedNode) peak() (int64, error)        { return 0, nil }

func (n *unpackedNode) close() error {
	return errors.Join(n.leave(context.Background()), n.b.remove(n.dir))
}

// output runs a command and gives the last line of what it prints, without the
// line's end.
func output(cmd *exec.Cmd) (string, error) {
	var said, wrong strings.Builder
	cmd.Stdout, cmd.Stderr = &said, &wrong
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s: %w: %.500s", strings.Join(cmd.Args, " "), err, strings.TrimSpace(said.String()+"\n"+wrong.String()))
	}
	lines := strings.Split(strings.TrimSpace(said.String()), "\n")
	return lines[len(lines)-1], nil
}

// unmountBelow takes away what a daemon that has ended left mounted below a
// directory of ours.
func unmountBelow(dir string) error {
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	var errs []error
	lines := strings.Split(string(info), "\n")
	for _, line := range slices.Backward(lines) { // what is mounted in another comes after it
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			errs = append(errs, unix.Unmount(f[4], unix.MNT_DETACH))
		}
	}
	return errors.Join(errs...)
}
