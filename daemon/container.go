package daemon

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/varvefs/varve/image"
	"github.com/varvefs/varve/run"
	"github.com/varvefs/varve/run/monitor"
)

// container is what the record of a writable mount keeps of the process in it. A
// container is that mount: same id, same name.
type container struct {
	Options    run.Options    `json:"options"`
	Remove     bool           `json:"remove,omitempty"`     // all of it, when the process has ended
	StdinOnce  bool           `json:"stdin_once,omitempty"` // its stdin ends with the first client's
	Args       []string       `json:"args,omitempty"`       // what runs
	StopSignal syscall.Signal `json:"stop_signal,omitempty"`
	Writer     string         `json:"writer,omitempty"` // of its upper, while it runs
	// Active says that the mount is there for the process: it goes when that ends.
	Active bool `json:"active,omitempty"`
}

// process is a container's monitor, from when it is to be launched until what
// follows from its end was done.
type process struct {
	made  *container    // of a mount that is yet to be made
	stood bool          // its monitor was launched; guarded by Daemon.mu
	done  chan struct{} // closed then
	end   Ended         // may be read after that
}

func newProcess() *process { return &process{done: make(chan struct{})} }

// errNotRunning is what a verb gives that needs a container that runs.
var errNotRunning = errors.New("not running")

func (d *Daemon) containerDir(id string) string {
	return filepath.Join(d.dirs.State, "containers", id)
}

// monitorSocket gives the socket of a container's monitor. Its path must be short.
func (d *Daemon) monitorSocket(id string) string {
	path := filepath.Join(d.dirs.Run, "containers", id[:12]+".sock")
	if len(path) > 100 {
		sum := sha256.Sum256([]byte(path))
		path = filepath.Join(os.TempDir(), fmt.Sprintf("varve-%d-%x.sock", os.Geteuid(), sum[:8]))
	}
	return path
}

// makeSockets makes the directory of the monitors' sockets. Who may use the daemon's
// may use them: they get the directory's group.
func (d *Daemon) makeSockets() (mode fs.FileMode, err error) {
	dir := filepath.Join(d.dirs.Run, "containers")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return 0, err
	}
	g, err := user.LookupGroup("varve")
	if err != nil || os.Geteuid() != 0 {
		return 0o600, nil
	}
	gid, err := strconv.Atoi(g.Gid)
	if err == nil {
		err = os.Chown(dir, 0, gid)
	}
	if err == nil {
		err = os.Chmod(dir, 0o750|os.ModeSetgid)
	}
	return 0o660, err
}

// Run mounts an image for writing and has a monitor stand by to start a process in
// it: who attaches to the monitor's socket and says so starts it.
func (d *Daemon) Run(ctx context.Context, o RunOptions, n note) (*Mount, error) {
	if err := o.Run.Check(); err != nil {
		return nil, fmt.Errorf("%w%w", err, silent{errUsage})
	}
	if _, err := monitor.FindRuntime(o.Run.Runtime); err != nil {
		return nil, err
	}
	p := newProcess()
	p.made = &container{Options: o.Run, Remove: o.Remove, StdinOnce: o.StdinOnce, Active: true}
	o.RW, o.Setuid, o.proc = true, os.Geteuid() == 0, p
	v, err := d.Mount(ctx, o.MountOptions, n)
	if err != nil {
		return nil, err
	}
	m, err := d.launch(ctx, v.ID, p)
	if err != nil {
		d.giveUp(v.ID)
		close(p.done)
	} else {
		err = ctx.Err() // who asked for it went away
	}
	if err != nil {
		_, rerr := d.Remove(UnmountOptions{Mount: v.ID, Force: true})
		return nil, errors.Join(err, rerr)
	}
	return m, nil
}

// giveUp has a mount be none of a process that was not launched.
func (d *Daemon) giveUp(id string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if m := d.mounts[id]; m != nil {
		m.proc = nil
		m.Container.Active = false
	}
}

// StartContainer brings the mount of a container back that has ended, and has a
// monitor stand by, as Run does. Of one that runs it only tells.
func (d *Daemon) StartContainer(ctx context.Context, o StartOptions, n note) (*Mount, error) {
	m, p, err := d.claim(ctx, o.Mount)
	if err != nil {
		return nil, err
	}
	if p == nil {
		v, err := d.inspect(ctx, m.ID)
		return &v, err
	}
	give := func(err error) (*Mount, error) {
		d.giveUp(m.ID)
		d.mu.Lock()
		if m.tree == nil && m.Unmounted == nil {
			m.Unmounted = now()
		}
		err = errors.Join(err, m.save())
		d.mu.Unlock()
		close(p.done)
		return nil, err
	}
	if _, err := monitor.FindRuntime(m.Container.Options.Runtime); err != nil {
		return give(err)
	}
	if m.Unmounted != nil {
		again := MountOptions{Name: m.Name, Setuid: os.Geteuid() == 0, Prefetch: m.Prefetch, Profile: m.Profile, RecordFor: m.RecordFor}
		again.Auth, again.AuthConfig, again.Offline, again.proc = o.Auth, o.AuthConfig, m.Offline, p
		if _, err := d.Mount(ctx, again, n); err != nil {
			return give(err)
		}
	}
	v, err := d.launch(ctx, m.ID, p)
	if err != nil {
		d.takeDown(m)
		return give(err)
	}
	return v, nil
}

// claim makes a container that has ended the caller's to start: p is its new
// process. It is nil where the container has one already.
func (d *Daemon) claim(ctx context.Context, name string) (m *mount, p *process, err error) {
	for {
		d.mu.Lock()
		m, err = d.findContainer(name)
		if err == nil && m.proc == nil && (m.coming || m.jobs < 0) {
			err = m.onItsWay()
		}
		if err != nil {
			d.mu.Unlock()
			return nil, nil, err
		}
		old := m.proc
		if old == nil {
			p = newProcess()
			m.proc = p
			m.Container.Active = true
		} else if !old.stood {
			err = m.onItsWay()
		}
		d.mu.Unlock()
		if err != nil || old == nil || d.stands(m) {
			return m, p, err
		}
		if err := old.wait(ctx); err != nil {
			return nil, nil, err
		}
	}
}

// wait waits until a process has ended, and what follows from that.
func (p *process) wait(ctx context.Context) error {
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// stands reports whether a container has a monitor.
func (d *Daemon) stands(m *mount) bool {
	st, err := monitor.State(d.containerDir(m.ID))
	return err == nil && st.Monitor != 0
}

// findContainer is find for verbs that want a container. The caller holds mu.
func (d *Daemon) findContainer(name string) (*mount, error) {
	m, err := d.find(name)
	if err != nil {
		return nil, err
	}
	if m.Container == nil {
		return nil, &Error{Message: fmt.Sprintf("%s is a mount without a process: `varve run` makes one with", m.Name), Exit: ExitError}
	}
	return m, nil
}

// launch has a monitor stand beside the mount, which is up.
func (d *Daemon) launch(ctx context.Context, id string, p *process) (*Mount, error) {
	d.mu.Lock()
	m := d.mounts[id]
	if m == nil || m.tree == nil {
		d.mu.Unlock()
		return nil, fmt.Errorf("%w: the mount went away", errNotRunning)
	}
	manifest := m.tree.manifest
	d.mu.Unlock()
	config, err := d.imageConfig(manifest)
	if err != nil {
		return nil, err
	}
	c := m.Container
	args, err := run.Command(c.Options, config)
	if err != nil {
		return nil, err
	}
	stop, err := run.StopSignal(c.Options, config)
	if err != nil {
		return nil, err
	}
	mode, err := d.makeSockets()
	if err != nil {
		return nil, err
	}
	dir := d.containerDir(id)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	err = monitor.Write(monitor.Config{
		RuntimeRoot: filepath.Join(d.dirs.Run, "runtime"),
		Container:   run.Container{ID: id, Root: m.Dir, Dir: dir, Volumes: filepath.Join(d.dirs.State, "volumes"), Options: c.Options, Image: config},
		Socket:      d.monitorSocket(id), SocketMode: mode, StdinOnce: c.StdinOnce,
	})
	if err != nil {
		return nil, err
	}
	if err := monitor.Launch(ctx, dir, self, MonitorVerb); err != nil {
		var se *monitor.StartError
		if errors.As(err, &se) {
			err = &Error{Message: se.Message, Exit: se.Code}
		}
		return nil, err
	}
	d.mu.Lock()
	c.Args, c.StopSignal, c.Writer, p.stood = args, stop, m.overlay, true
	v := m.view(true)
	d.mu.Unlock()
	d.background.Go(func() { d.watchContainer(m, p) })
	return &v, nil
}

// MonitorVerb is the hidden verb by which this program is a container's monitor: it
// calls [monitor.Main].
const MonitorVerb = "monitor"

// imageConfig gives what an image that is here says of its processes.
func (d *Daemon) imageConfig(m *image.Manifest) (c ocispec.ImageConfig, err error) {
	id, err := image.ParseName(m.Target.Encoded())
	if err != nil {
		return c, err
	}
	_, raw, err := d.images.Get(id, m.Platform)
	if err != nil {
		return c, fmt.Errorf("the image that was mounted: %w", err)
	}
	var doc ocispec.Image
	if err := json.Unmarshal(raw, &doc); err != nil {
		return c, fmt.Errorf("image config: %w", err)
	}
	return doc.Config, nil
}

// containerView says what is known of a mount's process. It reads the container's
// directory and asks nobody. The caller holds mu.
func (m *mount) containerView() *Container {
	c := m.Container
	if c == nil {
		return nil
	}
	dir := m.d.containerDir(m.ID)
	v := &Container{
		Args: c.Args, Options: c.Options, Remove: c.Remove, StopSignal: c.StopSignal,
		Dir: dir, LogPath: filepath.Join(dir, "log.json"), Socket: m.d.monitorSocket(m.ID), FetchedBefore: m.before,
	}
	if m.tree != nil && m.proc != nil {
		k, kernel := m.below().(*kernelFace)
		o, adopted := m.face.(*overlay)
		v.Served = !(kernel && !k.served && m.union == nil || adopted && o.lower == nil)
	}
	st, err := monitor.State(dir)
	if err != nil {
		v.State.Status = monitor.Created
		if !errors.Is(err, fs.ErrNotExist) {
			v.State.Error = err.Error()
		}
		return v
	}
	s := &v.State
	s.Status, s.Pid, s.StartedAt = st.State, st.Pid, st.Started
	s.Paused, s.Dead = st.State == monitor.Paused, st.State == monitor.Dead
	s.Running = st.State == monitor.Running || s.Paused
	v.Waiting = st.State == monitor.Created && st.Monitor != 0
	if st.Exit != nil {
		s.ExitCode, s.FinishedAt, s.OOMKilled, s.Error = st.Exit.Code, st.Exit.Finished, st.Exit.OOMKilled, st.Exit.Error
	}
	return v
}

// fetchedBefore gives what the network had brought for an image's layers before
// they were opened.
func (d *Daemon) fetchedBefore(m *image.Manifest) (n int64) {
	for _, l := range m.Layers {
		for _, known := range d.fetcher.Layers(l.Digest.String()) {
			n += known.Fetched()
		}
	}
	return n
}

// command is a container's command line, as docker shows it.
func (c *Container) Command() string { return strings.Join(c.Args, " ") }

// Ended is how a container ended.
type Ended struct {
	ExitCode  int       `json:"ExitCode"`
	Error     string    `json:"Error,omitempty"` // why it was not started, or what it ended of
	OOMKilled bool      `json:"OOMKilled"`
	Finished  time.Time `json:"FinishedAt,omitzero"`
	Fetched   int64     `json:"Fetched"` // bytes that the network brought for its image since the mount was asked for
}
