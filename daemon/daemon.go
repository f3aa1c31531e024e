package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
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
	stop       context.CancelFunc

	mu     sync.Mutex // guards what follows
	mounts map[string]*mount
	faults map[faultKey]bool // reads that failed and were logged

	indexMu sync.Mutex // guards what follows
	indexes map[string]*sharedIndex
}

// Run serves until ctx ends or a client stops it. ready, if not nil, is called
// when the socket answers and the mounts of an earlier run are back.
func Run(ctx context.Context, c Config, ready func()) (err error) {
	if err := c.Dirs.make(); err != nil {
		return err
	}
	unlock, err := lock(filepath.Join(c.Dirs.State, "lock"))
	if err != nil {
		return err
	}
	defer unlock()
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	d := &Daemon{dirs: c.Dirs, log: c.Log, stop: stop, registry: prometheus.NewRegistry(), mounts: map[string]*mount{}, faults: map[faultKey]bool{}, indexes: map[string]*sharedIndex{}}
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
	d.registries = image.NewRegistries(d.log, nil)
	d.fetcher = fetch.New(fetch.Config{Store: st, Metrics: d.m, Log: d.log, Patience: c.Patience})
	defer func() { err = errors.Join(err, d.fetcher.Close()) }()
	d.faces = newFaces(d)
	defer d.faces.close()
	defer d.unmountAll()
	d.restore(ctx)
	return d.serve(ctx, c.Metrics, ready)
}

// lock keeps a second daemon from the same state. The lock file holds the pid of
// who has it. A daemon that is just ending is waited for.
func lock(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	for patience := 5 * time.Second; ; patience -= 10 * time.Millisecond {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			break
		}
		if patience <= 0 {
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

// unlocked reports whether no daemon has the lock.
func unlocked(path string) bool {
	f, err := os.Open(path)
	if err != nil {
		return true
	}
	defer f.Close()
	return unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB) == nil
}

type faultKey struct {
	layer string
	off   int64
}

// fault logs a read that failed, once, with the path it was for.
func (d *Daemon) fault(layer string, off int64, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	key := faultKey{layer, off}
	if d.faults[key] {
		return
	}
	if len(d.faults) > 4096 {
		clear(d.faults)
	}
	d.faults[key] = true
	for _, m := range d.mounts {
		if m.tree == nil {
			continue
		}
		for device, h := range m.tree.layers {
			if h.Digest != layer {
				continue
			}
			if path, ok := m.tree.index.PathAt(device, off); ok {
				d.log.Error("read failed", "op", "read", "path", path, "mount", m.Name, "layer", layer, "off", off, "err", err)
				return
			}
		}
	}
	d.log.Error("read failed", "op", "read", "layer", layer, "off", off, "err", err)
}

// treeFault gives fs.Fault for a tree whose devices are these layers.
func (d *Daemon) treeFault(layers []*fetch.Handle) fs.Fault {
	return func(device int, off int64, err error) { d.fault(layers[device].Digest, off, err) }
}

// unmountAll takes the mounts down but keeps their records, for the next start.
func (d *Daemon) unmountAll() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, m := range d.mounts {
		if err := m.down(false); err != nil {
			if !errors.Is(err, fs.ErrBusy) {
				d.log.Error("unmount", "mount", m.Name, "err", err)
			}
			m.down(true)
		}
	}
}

var _ http.Handler = (*Daemon)(nil)
