package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/singleflight"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/fetch"
	"github.com/varvefs/varve/fetch/store"
	"github.com/varvefs/varve/fs"
	"github.com/varvefs/varve/image"
	"github.com/varvefs/varve/metrics"
)

// Daemon serves the mounts of one store.
type Daemon struct {
	dirs       Dirs
	log        *slog.Logger
	m          *metrics.Metrics
	registry   *prometheus.Registry
	registries *image.Registries
	images     *image.Store
	fetcher    *fetch.Fetcher
	faces      *faces
	chains     *Chains
	using      inUse
	stop       context.CancelFunc
	life       context.Context // ends with the daemon

	faults     chan readFault
	background sync.WaitGroup // restoring, logging faults

	mu     sync.Mutex // guards what follows
	mounts map[string]*mount

	indexing singleflight.Group

	profileMu sync.Mutex // held while a profile that is kept here is changed
	unpushed  unpushed

	indexMu sync.Mutex // guards what follows
	indexes map[string]*sharedIndex
}

// Run serves until ctx ends or a client stops it. ready, if not nil, is called
// when the socket answers and the mounts of an earlier run are back.
func Run(ctx context.Context, c Config, ready func()) (err error) {
	if err := c.Dirs.make(); err != nil {
		return err
	}
	unlock, err := lock(filepath.Join(c.Dirs.State, "lock"), c.Dirs.Socket)
	if err != nil {
		return err
	}
	defer unlock()
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	d := &Daemon{dirs: c.Dirs, log: c.Log, stop: stop, life: ctx, registry: prometheus.NewRegistry(), mounts: map[string]*mount{}, faults: make(chan readFault, 64), indexes: map[string]*sharedIndex{}}
	d.m = metrics.New(d.registry)
	metrics.Runtime(d.registry)
	st, err := store.Open(c.Dirs.Cache)
	if err != nil {
		return err
	}
	metrics.StoreBytes(d.registry, func() float64 { return float64(st.Bytes()) })
	if d.images, err = image.OpenStore(filepath.Join(c.Dirs.State, "images")); err != nil {
		return err
	}
	if err := d.images.Recovered(); err != nil {
		d.log.Error("image store", "err", err)
	}
	d.registries = image.NewRegistries(d.log, nil)
	d.registries.Node = c.node()
	defer d.registries.Close()
	d.fetcher = fetch.New(fetch.Config{Store: st, Metrics: d.m, Log: d.log, Patience: c.Patience, BackgroundRate: c.BackgroundRate, BackgroundHours: c.BackgroundHours})
	defer func() { err = errors.Join(err, d.fetcher.Close()) }()
	d.faces = newFaces(d)
	d.chains = &Chains{d: d, open: map[string]*pulledImage{}}
	defer d.faces.close()
	defer d.unmountAll()
	defer d.background.Wait()
	defer stop()
	d.sweep()
	d.background.Go(func() { d.logFaults(ctx) })
	d.background.Go(func() { d.attend(ctx) })
	d.background.Go(func() { d.faces.probe() }) // while the first client still asks its registry
	d.restore(ctx)
	return d.serve(ctx, c, ready)
}

// lock keeps a second daemon from the same state. The lock file holds the pid of
// who has it. A daemon that is just ending is waited for; one that answers at its
// socket is not, or this one would take over when that one is stopped.
func lock(path, socket string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	for patience := 5 * time.Second; ; patience -= 10 * time.Millisecond {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			break
		}
		if patience <= 0 || answers(socket) {
			pid, _ := io.ReadAll(io.LimitReader(f, 16))
			f.Close()
			return nil, fmt.Errorf("%s is in use by the daemon with pid %s", filepath.Dir(path), pid)
		}
		time.Sleep(10 * time.Millisecond)
	}
	f.Truncate(0)
	fmt.Fprintf(f, "%d", os.Getpid())
	return func() { f.Close() }, nil
}

func answers(socket string) bool {
	c, err := net.Dial("unix", socket)
	if err != nil {
		return false
	}
	c.Close()
	return true
}

// unlocked reports whether no daemon has the lock.
func unlocked(path string) bool {
	f, err := os.Open(path)
	if err != nil {
		return true
	}
	defer f.Close()
	return unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB) == nil
}

// readFault is a read that failed.
type readFault struct {
	layer string // its key
	off   int64
	err   error
}

// fault hands a failed read to the log. It does not block: a reader waits for
// its answer, and an unmount may wait for the reader.
func (d *Daemon) fault(f readFault) {
	select {
	case d.faults <- f:
	default: // the log is full of them already
	}
}

// logFaults logs a file that cannot be read once, and once more when it still
// cannot be after a minute: a reader asks for it in several places, and again.
func (d *Daemon) logFaults(ctx context.Context) {
	type key struct{ layer, mount, path string }
	seen := map[key]time.Time{}
	for {
		select {
		case <-ctx.Done():
			return
		case f := <-d.faults:
			mount, path := d.pathOf(f)
			if k := (key{f.layer, mount, path}); time.Since(seen[k]) > time.Minute {
				if len(seen) > 4096 {
					clear(seen)
				}
				seen[k] = time.Now()
				d.log.Error("read failed", "op", "read", "path", path, "mount", mount, "layer", digestOf(f.layer), "off", f.off, "err", f.err)
			}
		}
	}
}

func digestOf(key string) string {
	digest, _, _ := strings.Cut(key, "+")
	return digest
}

// pathOf finds a file that lies where a read failed.
func (d *Daemon) pathOf(f readFault) (mount, path string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, m := range d.mounts {
		if m.tree == nil || m.tree.index == nil {
			continue
		}
		for device, h := range m.tree.layers {
			if h.Key == f.layer {
				if path, ok := m.tree.index.PathAt(device, f.off); ok {
					return m.Name, path
				}
			}
		}
	}
	return "", ""
}

// treeFault gives fs.Fault for a tree whose devices are these layers.
func (d *Daemon) treeFault(layers []*fetch.Handle) fs.Fault {
	return func(device int, off int64, err error) { d.fault(readFault{layers[device].Key, off, err}) }
}

// unmountAll takes the mounts down but keeps their records, for the next start.
func (d *Daemon) unmountAll() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, m := range d.mounts {
		if m.stays() {
			m.leave()
			continue
		}
		// A container that runs in what this process serves keeps it from ending.
		if err := m.down(m.proc != nil); err != nil {
			if !errors.Is(err, fs.ErrBusy) {
				d.log.Error("unmount", "mount", m.Name, "err", err)
			}
			m.down(true)
		}
	}
}
