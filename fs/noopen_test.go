package fs

import (
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/varvefs/varve/index"
	"github.com/varvefs/varve/metrics"

	"github.com/prometheus/client_golang/prometheus"
)

// TestNoOpen refuses what the kernel would ask for with each open and close.
func TestNoOpen(t *testing.T) {
	o := Options{Metrics: metrics.New(prometheus.NewRegistry())}
	for name, raw := range map[string]fuse.RawFileSystem{
		"tree": NewTree(nil, nil, o), "growing": NewGrowing(index.NewGrowing(0), nil, o), "data": NewDataFiles(o, nil),
	} {
		if st := raw.Open(nil, &fuse.OpenIn{}, &fuse.OpenOut{}); st != fuse.ENOSYS {
			t.Errorf("%s: open: %v", name, st)
		}
		if st := raw.Flush(nil, &fuse.FlushIn{}); st != fuse.ENOSYS {
			t.Errorf("%s: flush: %v", name, st)
		}
	}
}
