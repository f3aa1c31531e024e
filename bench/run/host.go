package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
)

// systemByHand is a mount of ours and the runtime, without containerd.
const systemByHand = "varve mount and the runtime"

// ourSnapshotter is what containerd calls ours here.
const ourSnapshotter = "varve"

// shim is what containerd starts for a container.
const shim = "containerd-shim-runc-v2"

// host is a machine with a containerd and one more snapshotter than its own.
type host struct {
	c       *containerd
	ours    *server      // if that is varve
	other   *snapshotter // if it is not
	started int          // containers
}

// host starts a containerd, which starts the containers too, and the snapshotter.
func (b *bench) host(ctx context.Context, w *wire, system string) (h *host, err error) {
	h = &host{}
	defer func() {
		if err != nil {
			err = errors.Join(err, h.close())
		}
	}()
	address := ""
	if system == systemStargz {
		if h.other, err = b.snapshotter(ctx, w, kindStargz); err != nil {
			return h, err
		}
		address = h.other.socket()
	} else {
		if h.ours, err = b.fresh(ctx, "node"); err != nil {
			return h, err
		}
		address = filepath.Join(h.ours.root, "run", "snapshotter.sock")
	}
	h.c, err = b.containerd(ctx, fmt.Sprintf("[proxy_plugins.%s]\n  type = \"snapshot\"\n  address = %q\n", h.name(), address))
	return h, err
}

// name is that of the snapshotter.
func (h *host) name() string {
	if h.other != nil {
		return h.other.kind.name
	}
	return ourSnapshotter
}

// pull has the snapshotter know an image, as its own client does that.
func (h *host) pull(ctx context.Context, ref string) error {
	var cmd *exec.Cmd
	if h.other != nil {
		cmd = h.c.client(ctx, h.c.b.rivals.ctrRemote, "image", "rpull", "--plain-http", "--snapshotter", h.name(), ref)
	} else {
		cmd = exec.CommandContext(ctx, h.c.b.varve, "--root", h.ours.root, "pull", "--quiet", "--containerd", "--containerd-address", h.c.socket(), ref)
		cmd.Dir = "/"
	}
	_, err := output(cmd)
	return err
}

// run runs a container of an image, until it has ended unless it is detached. The
// container stays, as it does after `ctr run`.
func (h *host) run(ctx context.Context, snapshotter, ref string, flags []string, argv ...string) error {
	program := h.c.b.rivals.ctr
	if h.other != nil {
		program = h.c.b.rivals.ctrRemote
	}
	said, err := output(h.c.client(ctx, program, h.args(snapshotter, ref, flags, argv)...))
	if err == nil {
		h.c.b.say("  %s: %.200q", strings.Join(argv, " "), said)
	}
	return err
}

// args are those of ctr for a new container. Its name is one that no other containerd
// of the machine has: cgroups and the runtime's state have it too.
func (h *host) args(snapshotter, ref string, flags, argv []string) []string {
	h.started++
	args := append([]string{"run", "--snapshotter", snapshotter, "--runc-binary", h.c.b.rivals.runtime}, flags...)
	return append(append(args, ref, fmt.Sprintf("bench-%d-%d", os.Getpid(), h.started)), argv...)
}

// start runs an image's workload.
func (h *host) start(ctx context.Context, ref, workload string) error {
	return h.run(ctx, h.name(), ref, nil, "/bin/sh", "-c", workload)
}

// crowd runs a workload in n containers at once and says how long it was until the
// last one had ended.
func (h *host) crowd(ctx context.Context, snapshotter, ref, workload string, n int) (time.Duration, error) {
	start := time.Now()
	var g errgroup.Group
	for range n {
		cmd := h.c.ctr(ctx, h.args(snapshotter, ref, nil, []string{"/bin/sh", "-c", workload})...)
		g.Go(func() error {
			_, err := output(cmd)
			return err
		})
	}
	err := g.Wait()
	return time.Since(start), err
}

// list gives the names of all containers, or of all tasks: those that run.
func (h *host) list(ctx context.Context, what string) ([]string, error) {
	said, err := h.c.ctr(ctx, what, "ls", "-q").Output()
	if err != nil {
		return nil, fmt.Errorf("list %ss: %w", what, err)
	}
	return strings.Fields(string(said)), nil
}

// clear removes all containers.
func (h *host) clear(ctx context.Context) error {
	for _, remove := range [][]string{{"task", "rm", "--force"}, {"container", "rm"}} {
		ids, err := h.list(ctx, remove[0])
		if err != nil {
			return err
		}
		if len(ids) == 0 {
			continue
		}
		if _, err := output(h.c.ctr(ctx, append(remove, ids...)...)); err != nil {
			return err
		}
	}
	return nil
}

// cpu is what the snapshotter's daemon has computed so far.
func (h *host) cpu() (time.Duration, error) {
	if h.other != nil {
		return cpuOf(h.other.cmd.Process.Pid)
	}
	return h.ours.cpu()
}

// fell counts layers that containerd had to unpack although ours was asked for
// them.
func (h *host) fell(ctx context.Context) (n int, err error) {
	err = h.ours.metrics(ctx, func(name, _ string, v float64) {
		if name == "varve_snapshotter_fallbacks_total" {
			n += int(v)
		}
	})
	return n, err
}

// close ends the containers and the daemons, and removes what they kept.
func (h *host) close() (err error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if h.c != nil {
		err = errors.Join(h.clear(ctx), h.c.close())
	}
	if h.ours != nil {
		err = errors.Join(err, h.ours.discard())
	}
	return errors.Join(err, h.other.close())
}

// byHand is a mount of ours and a container of the runtime on it.
type byHand struct{ *oursNode }

func (n byHand) start(ctx context.Context, ref, workload string) error {
	dir, err := n.root(ctx, ref)
	if err != nil {
		return err
	}
	return n.s.bench.contain(ctx, dir, workload)
}

// dropImages empties the page cache, but for the programs that start containers: a
// machine that has run anything has those.
func (b *bench) dropImages(ctx context.Context) error {
	if err := dropCaches(); err != nil {
		return err
	}
	r := &b.rivals
	for _, path := range []string{b.varve, r.containerd, filepath.Join(filepath.Dir(r.containerd), shim), r.ctr, r.ctrRemote, r.stargz, r.runtime} {
		f, err := os.Open(path)
		if err != nil {
			continue // a rival that is not here
		}
		_, err = io.Copy(io.Discard, f)
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	// Their libraries too.
	_, err := output(exec.CommandContext(ctx, r.runtime, "--version"))
	return err
}
