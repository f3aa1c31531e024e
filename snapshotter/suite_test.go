package snapshotter

import (
	"context"
	"log/slog"
	"os"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"github.com/prometheus/client_golang/prometheus"
)

// TestSuite has containerd's own tests of snapshotters run.
func TestSuite(t *testing.T) {
	needRoot(t)
	testsuite.SnapshotterSuite(t, "overlayfs", func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		s, err := New(Config{Root: root, Images: &images{}, Log: slog.New(slog.DiscardHandler), Fell: prometheus.NewCounter(prometheus.CounterOpts{})})
		if err != nil {
			return nil, nil, err
		}
		return s, s.Close, nil
	})
}

func needRoot(t *testing.T) {
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("VARVE_NO_SKIP") != "" {
		t.Fatal("mounting overlayfs needs root")
	}
	t.Skip("mounting overlayfs needs root")
}
