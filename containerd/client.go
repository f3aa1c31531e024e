// Package containerd is a client of containerd that puts images into it as
// containerd's own clients do, but for the layers' bytes: it names the image to the
// snapshotter, and fetches only the layers that the snapshotter does not take.
package containerd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	introspectionapi "github.com/containerd/containerd/api/services/introspection/v1"
	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/content"
	contentproxy "github.com/containerd/containerd/v2/core/content/proxy"
	"github.com/containerd/containerd/v2/core/leases"
	leasesproxy "github.com/containerd/containerd/v2/core/leases/proxy"
	"github.com/containerd/containerd/v2/core/snapshots"
	snapshotsproxy "github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// sockets are where containerd listens: on its own, in k3s and rke2, in k0s.
var sockets = []string{"/run/containerd/containerd.sock", "/run/k3s/containerd/containerd.sock", "/run/k0s/containerd.sock"}

// Address gives the socket that is named, else the one that the environment names
// (CONTAINERD_ADDRESS), else the first that is there.
func Address(named string) string {
	if named = cmp.Or(named, os.Getenv("CONTAINERD_ADDRESS")); named != "" {
		return strings.TrimPrefix(named, "unix://")
	}
	for _, s := range sockets {
		if _, err := os.Stat(s); err == nil {
			return s
		}
	}
	return sockets[0]
}

// Namespace gives the namespace that the environment names (CONTAINERD_NAMESPACE),
// else containerd's default.
func Namespace() string { return cmp.Or(os.Getenv(namespaces.NamespaceEnvVar), namespaces.Default) }

// Config says which containerd is meant, and what in it. All of it is needed.
type Config struct {
	Address     string // of its socket
	Namespace   string
	Snapshotter string // the name that its configuration gives the snapshotter
}

// Client speaks to containerd. It is safe for use by several goroutines.
type Client struct {
	Config
	conn        *grpc.ClientConn
	content     content.Store
	snapshots   snapshots.Snapshotter
	leases      leases.Manager
	images      imagesapi.ImagesClient
	diff        diffapi.DiffClient
	snapshotter string // the socket on which containerd finds the snapshotter, "" if it is its own
}

// maxMessage is the largest message that containerd sends, its own clients' number.
const maxMessage = 16 << 20

// Connect gives a client of a containerd that answers and has the snapshotter. The
// caller closes it.
func Connect(ctx context.Context, c Config) (*Client, error) {
	if err := identifiers.Validate(c.Namespace); err != nil {
		return nil, fmt.Errorf("containerd namespace %q: %w", c.Namespace, err)
	}
	if err := answers(ctx, c.Address); err != nil {
		return nil, err
	}
	path, err := filepath.Abs(c.Address)
	if err != nil {
		return nil, err
	}
	conn, err := grpc.NewClient("unix://"+path,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)))
	if err != nil {
		return nil, fmt.Errorf("containerd at %s: %w", c.Address, err)
	}
	cl := &Client{
		Config: c, conn: conn,
		content:   contentproxy.NewContentStore(contentapi.NewContentClient(conn)),
		snapshots: snapshotsproxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), c.Snapshotter),
		leases:    leasesproxy.NewLeaseManager(leasesapi.NewLeasesClient(conn)),
		images:    imagesapi.NewImagesClient(conn),
		diff:      diffapi.NewDiffClient(conn),
	}
	if err := cl.findSnapshotter(ctx); err != nil {
		conn.Close()
		return nil, err
	}
	return cl, nil
}

// answers says in plain words why a socket is of no use.
func answers(ctx context.Context, path string) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	switch {
	case err == nil:
		return conn.Close()
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, syscall.EACCES):
		return fmt.Errorf("this user may not use containerd at %s: it is root's", path)
	}
	var cause syscall.Errno
	if errors.As(err, &cause) {
		err = cause
	}
	return fmt.Errorf("no containerd at %s: %w (--containerd-address or CONTAINERD_ADDRESS names another socket)", path, err)
}

// findSnapshotter asks containerd for the snapshotter.
func (c *Client) findSnapshotter(ctx context.Context) error {
	filter := fmt.Sprintf("type==io.containerd.snapshotter.v1,id==%q", c.Snapshotter)
	r, err := introspectionapi.NewIntrospectionClient(c.conn).Plugins(ctx, &introspectionapi.PluginsRequest{Filters: []string{filter}})
	if err != nil {
		return fmt.Errorf("containerd at %s: %w", c.Address, plain(err))
	}
	if len(r.Plugins) == 0 {
		return fmt.Errorf("containerd at %s has no snapshotter %s: `varve install containerd` gives it varve's", c.Address, c.Snapshotter)
	}
	p := r.Plugins[0]
	if p.InitErr != nil {
		return fmt.Errorf("containerd at %s has no use of its snapshotter %s: %s", c.Address, c.Snapshotter, p.InitErr.GetMessage())
	}
	c.snapshotter = strings.TrimPrefix(p.Exports["address"], "unix://")
	return nil
}

// SnapshotterSocket is where containerd finds the snapshotter, "" if it is one of
// containerd's own.
func (c *Client) SnapshotterSocket() string { return c.snapshotter }

// Close ends the connection.
func (c *Client) Close() error { return c.conn.Close() }
