package snapshotter

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"path"
	"path/filepath"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"github.com/varvefs/varve/daemon"
)

// Service has a daemon serve containerd, and a kubelet the way to containerd's image
// service.
func Service(d daemon.Dirs) daemon.Service {
	return daemon.Service{Name: "varve-snapshotter", Socket: d.Snapshots(), Serve: serve}
}

func serve(d daemon.Served, l net.Listener, failed chan<- error) (stop func(), err error) {
	s, err := New(Config{
		Root: filepath.Join(d.Dirs.State, "containerd"), Images: d.Chains, Log: d.Log, Fell: d.Metrics.SnapshotFallbacks,
	})
	if err != nil {
		return nil, err
	}
	cri, err := newCRIProxy(d.CRIAddress, d.Pulls, d.Log)
	if err != nil {
		s.Close()
		return nil, err
	}
	srv := grpc.NewServer(append(cri.options(), grpc.UnaryInterceptor(timed(d)))...)
	snapshotsapi.RegisterSnapshotsServer(srv, snapshotservice.FromSnapshotter(s))
	go func() {
		if err := srv.Serve(l); err != nil {
			failed <- err
		}
	}()
	return func() {
		srv.Stop()
		if err := errors.Join(cri.Close(), s.Close()); err != nil {
			d.Log.Error("close the snapshotter", "err", err)
		}
	}, nil
}

// timed counts calls, and says why one failed: containerd does not always.
func timed(d daemon.Served) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		start := time.Now()
		out, err := handler(ctx, req)
		method, code := path.Base(info.FullMethod), status.Code(err)
		d.Metrics.SnapshotSeconds.WithLabelValues(method, code.String()).Observe(time.Since(start).Seconds())
		d.Log.LogAttrs(ctx, slog.LevelDebug, "snapshotter", slog.String("op", method), slog.Any("code", code), slog.Duration("dur", time.Since(start)), slog.Any("err", err))
		return out, err
	}
}
