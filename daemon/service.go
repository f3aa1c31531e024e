package daemon

import (
	"fmt"
	"log/slog"
	"net"
	"os"

	"github.com/coreos/go-systemd/v22/activation"

	"github.com/varvefs/varve/image"
	"github.com/varvefs/varve/metrics"
)

// Service is something that a daemon serves on a socket of its own, for others than
// varve's own verbs.
type Service struct {
	Socket string // its path
	Name   string // by which systemd hands the socket over, as the unit gives it
	// Serve answers on l until stop is called. What it cannot go on after is sent to
	// failed, and ends the daemon.
	Serve func(s Served, l net.Listener, failed chan<- error) (stop func(), err error)
}

// Served is what a service has of its daemon.
type Served struct {
	Dirs    Dirs
	Chains  *Chains
	Log     *slog.Logger
	Metrics *metrics.Metrics

	CRIAddress string       // of containerd's own services
	Pulls      *image.Pulls // where what came with pulls is kept
}

// serveOn begins a service, on the socket that systemd listens on in our stead, or
// on one of our own.
func (d *Daemon) serveOn(s Service, c Config, inherited map[string]net.Listener, failed chan<- error) (stop func(), err error) {
	l := inherited[s.Name]
	if l == nil {
		if l, err = listen(s.Socket); err != nil {
			return nil, err
		}
	}
	of := Served{
		Dirs: d.dirs, Chains: d.chains, Log: d.log, Metrics: d.m,
		CRIAddress: otherwise(c.Registries.CRIAddress, containerdSocket), Pulls: d.registries.Node.Pulls,
	}
	if stop, err = s.Serve(of, peers{l}, failed); err != nil {
		l.Close()
	}
	return stop, err
}

// listen makes a socket of our own.
func listen(path string) (net.Listener, error) {
	if err := removeDeadSocket(path); err != nil {
		return nil, err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	// Where the umask lets others in, [peers] does not.
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// socketName is how systemd calls the socket of varve's own verbs.
const socketName = "varve"

// inheritedSockets gives the sockets that systemd listens on in our stead: they are
// there before we are, so that nobody finds nobody there.
func inheritedSockets() (map[string]net.Listener, error) {
	named, err := activation.ListenersWithNames()
	if err != nil {
		return nil, fmt.Errorf("sockets of systemd: %w", err)
	}
	out := map[string]net.Listener{}
	for name, ls := range named {
		if len(ls) > 0 && ls[0] != nil {
			out[name] = ls[0]
		}
	}
	return out, nil
}
