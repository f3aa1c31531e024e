package install

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	introspectionapi "github.com/containerd/containerd/api/services/introspection/v1"
	namespacesapi "github.com/containerd/containerd/api/services/namespaces/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
)

// socket gives where containerd answers.
func (c *Containerd) socket(s *site, user table) string {
	if c.Socket != "" {
		return c.Socket
	}
	for _, in := range [][]string{{"plugins", "io.containerd.server.v1.grpc"}, {"grpc"}} {
		if a, _ := at(user, append(in, "address")...).(string); a != "" {
			return a
		}
	}
	if s.flavor != Plain { // both use the path of k3s
		return "/run/k3s/containerd/containerd.sock"
	}
	return "/run/containerd/containerd.sock"
}

// dial makes a connection, which is not tried before it is used.
func (c *Containerd) dial(socket string) (*grpc.ClientConn, error) {
	return grpc.NewClient("unix://"+c.real(socket), grpc.WithTransportCredentials(insecure.NewCredentials()))
}

// failed gives the plugins of a running containerd that did not start, with what they
// said. One that was left out on purpose is not among them.
func failed(ctx context.Context, conn *grpc.ClientConn) (map[string]string, error) {
	r, err := introspectionapi.NewIntrospectionClient(conn).Plugins(ctx, &introspectionapi.PluginsRequest{})
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	for _, p := range r.Plugins {
		if p.InitErr != nil && !strings.Contains(p.InitErr.Message, "skip plugin") {
			out[p.Type+"."+p.ID] = p.InitErr.Message
		}
	}
	return out, nil
}

// settled waits until a containerd that was started anew answers, and says which of
// its plugins failed that had not before.
func (c *Containerd) settled(ctx context.Context, conn *grpc.ClientConn, before map[string]string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		now, err := failed(ctx, conn)
		if err == nil {
			maps.DeleteFunc(now, func(id, _ string) bool { _, was := before[id]; return was })
			var errs []error
			for _, id := range slices.Sorted(maps.Keys(now)) {
				errs = append(errs, fmt.Errorf("%s: %s", id, now[id]))
			}
			return errors.Join(errs...)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("it did not answer within a minute: %w", err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// users gives the containers that lie on a snapshotter, as namespace/ID.
func users(ctx context.Context, conn *grpc.ClientConn, snapshotter string) (ids []string, err error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	ns, err := namespacesapi.NewNamespacesClient(conn).List(ctx, &namespacesapi.ListNamespacesRequest{})
	if err != nil {
		return nil, err
	}
	for _, n := range ns.Namespaces {
		in := metadata.AppendToOutgoingContext(ctx, "containerd-namespace", n.Name)
		r, err := containersapi.NewContainersClient(conn).List(in, &containersapi.ListContainersRequest{})
		if err != nil {
			return nil, err
		}
		for _, k := range r.Containers {
			if k.Snapshotter == snapshotter {
				ids = append(ids, n.Name+"/"+k.ID)
			}
		}
	}
	return ids, nil
}
