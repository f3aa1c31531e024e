package daemon

import (
	"context"
	"net"
	"path"
	"path/filepath"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"github.com/varvefs/varve/snapshotter"
)

// serveSnapshots answers containerd on a socket, or makes one, until stop is called.
func (d *Daemon) serveSnapshots(l net.Listener, failed chan<- error) (stop func(), err error) {
	if l == nil {
		if l, err = listen(d.dirs.Snapshots()); err != nil {
			return nil, err
		}
	}
	sn, err := snapshotter.New(snapshotter.Config{
		Root: filepath.Join(d.dirs.State, "containerd"), Images: d.chains, Log: d.log, Fell: d.m.SnapshotFallbacks,
	})
	if err != nil {
		l.Close()
		return nil, err
	}
	srv := grpc.NewServer(grpc.UnaryInterceptor(d.timeCall))
	snapshotsapi.RegisterSnapshotsServer(srv, snapshotservice.FromSnapshotter(sn))
	go func() {
		if err := srv.Serve(peers{l}); err != nil {
			failed <- err
		}
	}()
	return func() {
		srv.Stop()
		if err := sn.Close(); err != nil {
			d.log.Error("close the snapshotter", "err", err)
		}
	}, nil
}

// timeCall counts a call and says why it failed: containerd does not always.
func (d *Daemon) timeCall(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	start := time.Now()
	out, err := handler(ctx, req)
	method, code := path.Base(info.FullMethod), status.Code(err)
	d.m.SnapshotSeconds.WithLabelValues(method, code.String()).Observe(time.Since(start).Seconds())
	d.log.Debug("snapshotter", "method", method, "code", code, "dur", time.Since(start), "err", err)
	return out, err
}
