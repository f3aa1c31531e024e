package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"os/user"
	"runtime"
	"strconv"
	"time"

	sdnotify "github.com/coreos/go-systemd/v22/daemon"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/metrics"
)

// serve answers on the socket, and Prometheus on a loopback port if asked, until
// ctx ends.
func (d *Daemon) serve(ctx context.Context, c Config, ready func()) error {
	inherited, err := inheritedSockets()
	if err != nil {
		return err
	}
	l := inherited[socketName]
	if l == nil {
		if l, err = listen(d.dirs.Socket); err != nil {
			return err
		}
	}
	if err := d.guardSocket(); err != nil {
		l.Close()
		return err
	}
	srv := &http.Server{Handler: d.mux(), BaseContext: func(net.Listener) context.Context { return ctx }, ReadHeaderTimeout: 10 * time.Second}
	failed := make(chan error, 2+len(c.Services))
	go func() { failed <- srv.Serve(peers{l}) }()
	if c.Metrics != "" {
		ms, err := d.serveMetrics(c.Metrics, failed)
		if err != nil {
			srv.Close()
			return err
		}
		defer ms.Close()
	}
	for _, s := range c.Services {
		stop, err := d.serveOn(s, c, inherited, failed)
		if err != nil {
			srv.Close()
			return err
		}
		defer stop()
	}
	d.log.Info("ready", "socket", d.dirs.Socket, "version", metrics.Version)
	sdnotify.SdNotify(false, sdnotify.SdNotifyReady)
	defer sdnotify.SdNotify(false, sdnotify.SdNotifyStopping)
	if ready != nil {
		ready()
	}
	select {
	case <-ctx.Done():
		err = nil
	case err = <-failed:
	}
	shut, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	srv.Shutdown(shut)
	return err
}

// removeDeadSocket makes room for ours where a daemon died. The path may have
// come from the environment: what is no socket, or one that answers, is not ours
// to remove.
func removeDeadSocket(path string) error {
	st, err := os.Lstat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err != nil:
		return err
	case st.Mode()&os.ModeSocket == 0:
		return fmt.Errorf("%s is not a socket: choose another path for the daemon's", path)
	case answers(path):
		return fmt.Errorf("%s is the socket of something else that runs: choose another path for the daemon's", path)
	}
	return os.Remove(path)
}

func (d *Daemon) serveMetrics(addr string, failed chan<- error) (*http.Server, error) {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, fmt.Errorf("metrics address %q: %w", addr, err)
	}
	if ip := net.ParseIP(host); host != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return nil, fmt.Errorf("metrics address %q: only loopback addresses are served", addr)
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("metrics: %w", err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", d.metricsHandler())
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	go func() {
		if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			failed <- err
		}
	}()
	return srv, nil
}

func (d *Daemon) metricsHandler() http.Handler {
	return promhttp.HandlerFor(d.registry, promhttp.HandlerOpts{})
}

// guardSocket lets in the daemon's user, and the group varve where root's daemon
// finds one.
func (d *Daemon) guardSocket() error {
	mode := os.FileMode(0o600)
	if g, err := user.LookupGroup("varve"); err == nil && os.Geteuid() == 0 {
		gid, err := strconv.Atoi(g.Gid)
		if err != nil {
			return err
		}
		if err := os.Chown(d.dirs.Socket, 0, gid); err != nil {
			return err
		}
		mode = 0o660
	}
	return os.Chmod(d.dirs.Socket, mode)
}

// peers refuses connections of users that the socket's mode would not let in,
// in the moment before it has that mode.
type peers struct{ net.Listener }

func (p peers) Accept() (net.Conn, error) {
	for {
		c, err := p.Listener.Accept()
		if err != nil || allowed(c) {
			return c, err
		}
		c.Close()
	}
}

func allowed(c net.Conn) bool {
	raw, err := c.(*net.UnixConn).SyscallConn()
	if err != nil {
		return false
	}
	var cred *unix.Ucred
	if cerr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); cerr != nil || err != nil {
		return false
	}
	if cred.Uid == 0 || int(cred.Uid) == os.Geteuid() {
		return true
	}
	g, err := user.LookupGroup("varve")
	if err != nil || os.Geteuid() != 0 {
		return false
	}
	u, err := user.LookupId(strconv.Itoa(int(cred.Uid)))
	if err != nil {
		return false
	}
	ids, _ := u.GroupIds()
	for _, id := range append(ids, strconv.Itoa(int(cred.Gid))) {
		if id == g.Gid {
			return true
		}
	}
	return false
}

func (d *Daemon) mux() *http.ServeMux {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/version", func(w http.ResponseWriter, r *http.Request) {
		v := ThisVersion()
		v.PID, v.Root = os.Getpid(), d.dirs.State
		reply(w, v, nil)
	})
	mux.HandleFunc("GET /v1/mounts", func(w http.ResponseWriter, r *http.Request) { reply(w, d.list(), nil) })
	follow(mux, "POST /v1/mounts", func(ctx context.Context, o MountOptions, n note) (event, error) {
		m, err := d.Mount(ctx, o, n)
		return event{Mount: m}, err
	})
	follow(mux, "POST /v1/commit", func(ctx context.Context, o CommitOptions, n note) (event, error) {
		c, err := d.Commit(ctx, o, n)
		return event{Commit: c}, err
	})
	follow(mux, "POST /v1/push", func(ctx context.Context, o PushOptions, n note) (event, error) {
		p, err := d.Push(ctx, o, n)
		return event{Push: p}, err
	})
	follow(mux, "POST /v1/pull", func(ctx context.Context, o PullOptions, n note) (event, error) {
		p, err := d.Pull(ctx, o, n)
		return event{Pulled: p}, err
	})
	follow(mux, "POST /v1/warm", func(ctx context.Context, o WarmOptions, n note) (event, error) {
		w, err := d.Warm(ctx, o, n)
		return event{Warmed: w}, err
	})
	follow(mux, "POST /v1/convert", func(ctx context.Context, o ConvertOptions, n note) (event, error) {
		c, err := d.Convert(ctx, o, n)
		return event{Converted: c}, err
	})
	follow(mux, "POST /v1/index", func(ctx context.Context, o IndexOptions, n note) (event, error) {
		x, err := d.Index(ctx, o, n)
		return event{Indexed: x}, err
	})
	handle(mux, "POST /v1/indexes", func(ctx context.Context, o ImageOptions) (any, error) { return d.Indexes(ctx, o) })
	handle(mux, "POST /v1/indexes/rm", func(ctx context.Context, o IndexRemoval) (any, error) { return d.RemoveIndexes(ctx, o) })
	handle(mux, "POST /v1/profiles", func(ctx context.Context, o ProfileOptions) (any, error) { return d.Profiles(ctx, o) })
	handle(mux, "POST /v1/profiles/show", func(ctx context.Context, o ProfileOptions) (any, error) { return d.ShowProfile(ctx, o) })
	handle(mux, "POST /v1/profiles/push", func(ctx context.Context, o ProfileOptions) (any, error) { return d.PushProfile(ctx, o) })
	handle(mux, "POST /v1/profiles/pull", func(ctx context.Context, o ProfileOptions) (any, error) { return d.PullProfile(ctx, o) })
	handle(mux, "POST /v1/profiles/rm", func(ctx context.Context, o ProfileOptions) (any, error) { return d.RemoveProfiles(ctx, o) })
	follow(mux, "POST /v1/profiles/import", func(ctx context.Context, o ProfileOptions, n note) (event, error) {
		p, err := d.ImportProfile(ctx, o, n)
		return event{Profile: p}, err
	})
	handle(mux, "POST /v1/store/drop", func(_ context.Context, o DropOptions) (any, error) { return d.Drop(o) })
	d.handleContainers(mux)
	handle(mux, "POST /v1/diff", func(ctx context.Context, o UnmountOptions) (any, error) { return d.Diff(ctx, o.Mount) })
	handle(mux, "POST /v1/rm", func(_ context.Context, o UnmountOptions) (any, error) { return d.Remove(o) })
	handle(mux, "POST /v1/prune", func(context.Context, struct{}) (any, error) { return d.Prune() })
	handle(mux, "POST /v1/stat", func(ctx context.Context, o ExportOptions) (any, error) { return d.stat(ctx, o) })
	pour(mux, "POST /v1/export", d.export)
	pour(mux, "POST /v1/save", d.save)
	pour(mux, "POST /v1/layer", d.layerBlob)
	handle(mux, "POST /v1/unmount", func(_ context.Context, o UnmountOptions) (any, error) { return d.Unmount(o) })
	handle(mux, "POST /v1/inspect", func(ctx context.Context, o UnmountOptions) (any, error) { return d.inspect(ctx, o.Mount) })
	mux.HandleFunc("POST /v1/ls", d.handleList)
	pour(mux, "POST /v1/cat", d.cat)
	mux.HandleFunc("POST /v1/stop", func(w http.ResponseWriter, r *http.Request) {
		reply(w, struct{}{}, nil)
		d.stop()
	})
	mux.Handle("GET /metrics", d.metricsHandler())
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "ok\n") })
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	return mux
}

// ThisVersion says what this program is.
func ThisVersion() Version {
	return Version{Version: metrics.Version, GoVersion: runtime.Version(), Revision: metrics.Revision()}
}

// handle registers a call that takes one JSON document and answers with one.
func handle[In any](mux *http.ServeMux, pattern string, call func(context.Context, In) (any, error)) {
	mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		var in In
		if !decode(w, r, &in) {
			return
		}
		out, err := call(r.Context(), in)
		reply(w, out, err)
	})
}

func decode(w http.ResponseWriter, r *http.Request, in any) bool {
	dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<20))
	dec.DisallowUnknownFields()
	if err := dec.Decode(in); err != nil {
		reply(w, nil, fmt.Errorf("request: %w: %w", errUsage, err))
		return false
	}
	return true
}

func reply(w http.ResponseWriter, out any, err error) {
	w.Header().Set("Content-Type", "application/json")
	if err != nil {
		w.WriteHeader(http.StatusUnprocessableEntity)
		out = wire(err)
	}
	json.NewEncoder(w).Encode(out)
}

// follow registers a call that tells what goes on, then gives a result or an
// error. A client that goes away cancels what it asked for.
func follow[In any](mux *http.ServeMux, pattern string, call func(context.Context, In, note) (event, error)) {
	mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		var in In
		if !decode(w, r, &in) {
			return
		}
		s := &stream{enc: json.NewEncoder(w), flush: http.NewResponseController(w)}
		e, err := call(r.Context(), in, s.send)
		if err != nil {
			e = event{Error: wire(err)}
		}
		s.send(e)
	})
}

// pour registers a call whose answer is bytes. open says what is wrong before
// the first of them, or gives what writes them; what goes wrong on the way is
// said in the trailer.
func pour[In any](mux *http.ServeMux, pattern string, open func(context.Context, In) (func(io.Writer) error, error)) {
	mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		var in In
		if !decode(w, r, &in) {
			return
		}
		write, err := open(r.Context(), in)
		if err != nil {
			reply(w, nil, err)
			return
		}
		w.Header().Set("Trailer", errorTrailer)
		w.WriteHeader(http.StatusOK)
		if err := write(w); err != nil {
			msg, _ := json.Marshal(wire(err))
			w.Header().Set(errorTrailer, string(msg))
		}
	})
}
