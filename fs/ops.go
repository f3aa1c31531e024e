package fs

import (
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/varvefs/varve/metrics"
)

type op int

const (
	opLookup op = iota
	opGetattr
	opReadlink
	opReaddir
	opReaddirplus
	opRead
	opGetxattr
	opListxattr
	opSetattr
	opMake
	opLink
	opUnlink
	opRename
	opOpen
	opRelease
	opWrite
	opAllocate
	opSync
	opSetxattr
	opOpendir
	opCount
)

var opNames = [opCount]string{"lookup", "getattr", "readlink", "readdir", "readdirplus", "read", "getxattr", "listxattr",
	"setattr", "make", "link", "unlink", "rename", "open", "release", "write", "allocate", "sync", "setxattr", "opendir"}

const (
	resultOK = iota
	resultENOENT
	resultEIO
	resultOther
	resultCount
)

var resultNames = [resultCount]string{"ok", "enoent", "eio", "other"}

// ops counts FUSE operations without looking a label up on the way.
type ops [opCount][resultCount]prometheus.Observer

func newOps(m *metrics.Metrics) *ops {
	o := new(ops)
	for i, name := range opNames {
		for k, result := range resultNames {
			o[i][k] = m.FuseSeconds.WithLabelValues(name, result)
		}
	}
	return o
}

// done observes an operation that began at start and ends with st.
func (o *ops) done(i op, start time.Time, st *fuse.Status) {
	k := resultOther
	switch *st {
	case fuse.OK:
		k = resultOK
	case fuse.ENOENT, fuse.Status(syscall.ENODATA):
		k = resultENOENT
	case fuse.EIO:
		k = resultEIO
	}
	o[i][k].Observe(time.Since(start).Seconds())
}
