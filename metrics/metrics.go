// Package metrics holds the Prometheus collectors of a daemon, in one struct
// that is given a registerer. Labels come from small closed sets: never a
// digest, a path or a mount.
package metrics

import (
	"runtime"
	"runtime/debug"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
)

// Metrics is what varve counts. A nil *Metrics is not usable; [New] with a nil
// registerer gives one that nobody scrapes.
type Metrics struct {
	Mounts         *prometheus.GaugeVec     // state, face
	MountSeconds   *prometheus.HistogramVec // result
	FuseSeconds    *prometheus.HistogramVec // op, result; its count is the number of operations
	ReadBytes      *prometheus.CounterVec   // source: cache, registry, local
	FetchRequests  *prometheus.CounterVec   // reason, code
	FetchBytes     *prometheus.CounterVec   // reason
	FetchSeconds   *prometheus.HistogramVec // reason
	FetchRetries   *prometheus.CounterVec   // reason
	AheadBytes     *prometheus.CounterVec   // use: fetched, read
	VerifyFailures *prometheus.CounterVec   // kind: chunk, layer, index
	LazyFallbacks  *prometheus.CounterVec   // reason
	Restores       *prometheus.CounterVec   // outcome
	CommitSeconds  *prometheus.HistogramVec // result
	CommitBytes    prometheus.Counter       // compressed
	PushBlobs      *prometheus.CounterVec   // outcome: uploaded, mounted, exists, piped
	CopyUpBytes    prometheus.Counter
	CopyUpSeconds  prometheus.Histogram

	SnapshotSeconds   *prometheus.HistogramVec // method, code; its count is the number of calls
	SnapshotFallbacks prometheus.Counter
}

// Version is the program's version, set when it is built.
var Version = "0.1.0-dev"

// New makes the collectors and registers them, and those of the Go runtime and
// the process, with reg.
func New(reg prometheus.Registerer) *Metrics {
	if reg == nil {
		reg = prometheus.NewRegistry()
	}
	reg = prometheus.WrapRegistererWithPrefix("varve_", reg)
	seconds := prometheus.ExponentialBuckets(50e-6, 4, 11) // 50 us to 52 s
	m := &Metrics{
		Mounts:         gauge("mounts", "Mounts by state and face.", "state", "face"),
		MountSeconds:   histogram("mount_duration_seconds", "Time from a mount's request to its readiness.", seconds, "result"),
		FuseSeconds:    histogram("fuse_request_duration_seconds", "FUSE operations answered by the daemon.", seconds, "op", "result"),
		ReadBytes:      counter("read_bytes_total", "Bytes that became readable, by where they came from.", "source"),
		FetchRequests:  counter("fetch_requests_total", "Requests for blobs, by reason and class of answer.", "reason", "code"),
		FetchBytes:     counter("fetch_bytes_total", "Compressed bytes received.", "reason"),
		FetchSeconds:   histogram("fetch_duration_seconds", "Time of a request to its first byte.", seconds, "reason"),
		FetchRetries:   counter("fetch_retries_total", "Requests made again.", "reason"),
		AheadBytes:     counter("ahead_bytes_total", "Compressed bytes of frames that were fetched before anybody asked for them, and of those the ones that were then read.", "use"),
		VerifyFailures: counter("verify_failures_total", "Bytes that did not match their digest.", "kind"),
		LazyFallbacks:  counter("lazy_fallbacks_total", "Layers that had to be read whole.", "reason"),
		Restores:       counter("restores_total", "Mounts brought back after a start.", "outcome"),
		CommitSeconds:  histogram("commit_duration_seconds", "Time of a commit, with its push.", seconds, "result"),
		CommitBytes:    prometheus.NewCounter(prometheus.CounterOpts{Name: "commit_bytes_total", Help: "Compressed bytes of the layers that were committed."}),
		PushBlobs:      counter("push_blobs_total", "Blobs of pushed images, by how they came to the registry.", "outcome"),
		CopyUpBytes:    prometheus.NewCounter(prometheus.CounterOpts{Name: "copy_up_bytes_total", Help: "Bytes of an image's files copied to an upper because they were to be changed."}),
		CopyUpSeconds:  prometheus.NewHistogram(prometheus.HistogramOpts{Name: "copy_up_duration_seconds", Help: "Time of copying one file to an upper.", Buckets: seconds}),

		SnapshotSeconds:   histogram("snapshotter_request_duration_seconds", "Calls of containerd to the snapshotter.", seconds, "method", "code"),
		SnapshotFallbacks: prometheus.NewCounter(prometheus.CounterOpts{Name: "snapshotter_fallbacks_total", Help: "Layers that containerd had to unpack because their image cannot be mounted."}),
	}
	build := gauge("build_info", "What is running.", "version", "revision", "goversion")
	build.WithLabelValues(Version, Revision(), runtime.Version()).Set(1)
	reg.MustRegister(build, m.Mounts, m.MountSeconds, m.FuseSeconds, m.ReadBytes, m.FetchRequests,
		m.FetchBytes, m.FetchSeconds, m.FetchRetries, m.AheadBytes, m.VerifyFailures, m.LazyFallbacks, m.Restores, m.CommitSeconds, m.CommitBytes, m.PushBlobs, m.CopyUpBytes, m.CopyUpSeconds,
		m.SnapshotSeconds, m.SnapshotFallbacks)
	return m
}

// Runtime registers the collectors of the Go runtime and the process.
func Runtime(reg prometheus.Registerer) {
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
}

// StoreBytes registers a gauge of what the store holds, asked when scraped.
func StoreBytes(reg prometheus.Registerer, bytes func() float64) {
	reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "varve_store_bytes", Help: "Bytes that the store takes on its disk.",
	}, bytes))
}

// Revision is the commit that the program was built from, if known.
func Revision() string {
	info, ok := debug.ReadBuildInfo()
	if ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				return s.Value
			}
		}
	}
	return "unknown"
}

func counter(name, help string, labels ...string) *prometheus.CounterVec {
	return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
}

func gauge(name, help string, labels ...string) *prometheus.GaugeVec {
	return prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: name, Help: help}, labels)
}

func histogram(name, help string, buckets []float64, labels ...string) *prometheus.HistogramVec {
	return prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: name, Help: help, Buckets: buckets}, labels)
}
