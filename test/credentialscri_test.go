package test

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/varvefs/varve/bench/forms"
)

// imageService stands in for containerd's.
type imageService struct {
	runtimeapi.UnimplementedImageServiceServer
	onPull func(*runtimeapi.PullImageRequest) error
}

func (s *imageService) ListImages(ctx context.Context, r *runtimeapi.ListImagesRequest) (*runtimeapi.ListImagesResponse, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	grpc.SetHeader(ctx, metadata.Pairs("x-answer", strings.Join(md.Get("x-call"), ",")))
	grpc.SetTrailer(ctx, metadata.Pairs("x-end", "of it"))
	if _, limited := ctx.Deadline(); !limited {
		return nil, status.Error(codes.Internal, "the caller's time limit is lost")
	}
	// More than a message may be by default.
	return &runtimeapi.ListImagesResponse{Images: []*runtimeapi.Image{{Id: r.GetFilter().GetImage().GetImage(), Username: strings.Repeat("x", 5<<20)}}}, nil
}

func (s *imageService) StreamImages(_ *runtimeapi.StreamImagesRequest, out grpc.ServerStreamingServer[runtimeapi.StreamImagesResponse]) error {
	for range 3 {
		if err := out.Send(&runtimeapi.StreamImagesResponse{}); err != nil {
			return err
		}
	}
	return status.Error(codes.DataLoss, "after three")
}

func (s *imageService) PullImage(_ context.Context, r *runtimeapi.PullImageRequest) (*runtimeapi.PullImageResponse, error) {
	if err := s.onPull(r); err != nil {
		return nil, err
	}
	return &runtimeapi.PullImageResponse{ImageRef: "sha256:1"}, nil
}

// serveImages serves it on a socket until the returned function is called.
func serveImages(t *testing.T, socket string, s *imageService) (stop func()) {
	t.Helper()
	l := mustGet[net.Listener](t)(net.Listen("unix", socket))
	srv := grpc.NewServer()
	runtimeapi.RegisterImageServiceServer(srv, s)
	ended := make(chan error, 1)
	go func() { ended <- srv.Serve(l) }()
	return func() { srv.Stop(); must(t, <-ended) }
}

// imageService gives a client of varve's image service.
func (h *host) imageService() (*grpc.ClientConn, runtimeapi.ImageServiceClient) {
	h.t.Helper()
	conn := mustGet[*grpc.ClientConn](h.t)(grpc.NewClient("unix://"+filepath.Join(h.root, "run", "snapshotter.sock"),
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20))))
	h.t.Cleanup(func() { conn.Close() })
	return conn, runtimeapi.NewImageServiceClient(conn)
}

func withTime(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// TestImageServiceProxy passes calls on as they are.
func TestImageServiceProxy(t *testing.T) {
	needRoot(t)
	h := newHost(t)
	socket := filepath.Join(h.root, "cri.sock")
	h.configure("cri_address = \"unix://" + socket + "\"\n")
	h.ok("ps")
	conn, cri := h.imageService()
	ctx := withTime(t)

	_, err := cri.ListImages(ctx, &runtimeapi.ListImagesRequest{})
	if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), socket) {
		t.Errorf("containerd is away: %v", err)
	}
	service := &imageService{}
	stop := serveImages(t, socket, service)
	var head, end metadata.MD
	var list *runtimeapi.ListImagesResponse
	for limit := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) { // it is called again by and by
		list, err = cri.ListImages(metadata.AppendToOutgoingContext(ctx, "x-call", "mine"),
			&runtimeapi.ListImagesRequest{Filter: &runtimeapi.ImageFilter{Image: &runtimeapi.ImageSpec{Image: "this"}}}, grpc.Header(&head), grpc.Trailer(&end))
		if status.Code(err) != codes.Unavailable || time.Now().After(limit) {
			break
		}
	}
	must(t, err)
	if list.Images[0].Id != "this" || len(list.Images[0].Username) != 5<<20 || !slices.Equal(head.Get("x-answer"), []string{"mine"}) || !slices.Equal(end.Get("x-end"), []string{"of it"}) {
		t.Errorf("answer for %q with %v and %v", list.Images[0].Id, head, end)
	}

	stream, err := cri.StreamImages(ctx, &runtimeapi.StreamImagesRequest{})
	must(t, err)
	for i := range 4 {
		_, err := stream.Recv()
		if i < 3 && err != nil || i == 3 && (status.Code(err) != codes.DataLoss || status.Convert(err).Message() != "after three") {
			t.Errorf("message %d of a stream: %v", i, err)
		}
	}
	if _, err = cri.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{}); status.Code(err) != codes.Unimplemented || !strings.Contains(err.Error(), "RemoveImage") {
		t.Errorf("what containerd does not have: %v", err)
	}
	for method, want := range map[string]string{
		"/runtime.v1.ImageService/Later":       "unknown method Later for service runtime.v1.ImageService", // in containerd's words
		"/runtime.v9.ImageService/ListImages":  "unknown service runtime.v9.ImageService",
		"/runtime.v1.RuntimeService/Version":   "unknown method /runtime.v1.RuntimeService/Version",
		"/containerd.services.X.ImageService/": "unknown method",
	} {
		err := conn.Invoke(ctx, method, &runtimeapi.VersionRequest{}, &runtimeapi.VersionResponse{})
		if status.Code(err) != codes.Unimplemented || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", method, err)
		}
	}
	service.onPull = func(r *runtimeapi.PullImageRequest) error {
		return status.Errorf(codes.NotFound, "no %s of %s", r.Image.Image, r.Auth.Username)
	}
	_, err = cri.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: "it"}, Auth: &runtimeapi.AuthConfig{Username: "u", Password: "hidden-word"}})
	if status.Code(err) != codes.NotFound || status.Convert(err).Message() != "no it of u" {
		t.Errorf("a pull that fails: %v", err)
	}

	// Containerd restarts.
	stop()
	os.Remove(socket)
	defer serveImages(t, socket, service)()
	for limit := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		if _, err = cri.ListImages(ctx, &runtimeapi.ListImagesRequest{}); err == nil {
			break
		}
		if time.Now().After(limit) {
			t.Fatalf("containerd is back: %v", err)
		}
	}
	h.hides("hidden-word")
}

// TestPullSecret mounts by what came with a kubelet's pull.
func TestPullSecret(t *testing.T) {
	needRoot(t)
	const secret, wrong = "pull-word", "other-word"
	p := newPrivate(t, 4, "pod:"+secret)
	l, names := small(t, 8, 400_000)
	img := build(t, forms.EStargz, l)
	ref, later := p.push(t, "private/image:1", img), p.push(t, "private/image:2", build(t, forms.Gzip, l))
	h := newHost(t)
	socket := filepath.Join(h.root, "cri.sock")
	h.configure("cri_address = \"" + socket + "\"\n")
	h.fails(4, "mount", ref)
	service := &imageService{}
	defer serveImages(t, socket, service)()
	_, cri := h.imageService()
	pull := func(ref, password string) error {
		_, err := cri.PullImage(withTime(t), &runtimeapi.PullImageRequest{
			Image: &runtimeapi.ImageSpec{Image: ref}, Auth: &runtimeapi.AuthConfig{Username: "pod", Password: password},
		})
		return err
	}
	// The snapshotter is asked while the pull goes on.
	var mounted result
	service.onPull = func(*runtimeapi.PullImageRequest) error {
		mounted = h.run("mount", "--prefetch", "none", ref)
		return nil
	}
	must(t, pull(ref, secret))
	if mounted.code != 0 {
		t.Fatal(mounted)
	}
	dir := strings.TrimSpace(mounted.out)
	helper(t, "sum", filepath.Join(dir, names[0]))
	service.onPull = func(*runtimeapi.PullImageRequest) error { return errors.New("denied") }
	if pull(ref, wrong) == nil {
		t.Error("a pull that containerd refuses succeeds")
	}
	for _, name := range names {
		if got := helper(t, "sum", filepath.Join(dir, name)); got != sumOf(content(name, 400_000)) {
			t.Errorf("%s: digest %s", name, got)
		}
	}
	if p.tokens() < 2 {
		t.Error("no token ran out")
	}
	// Not for another repository, and not on the disk.
	other := p.push(t, "another/image:1", img)
	h.fails(4, "mount", other)
	h.hides(secret, wrong, "pod:"+secret)
	h.ok("umount", dir)
	h.stop()
	h.fails(4, "mount", later)
	must(t, func() error {
		service.onPull = func(*runtimeapi.PullImageRequest) error { return nil }
		return pull(later, secret)
	}())
	h.ok("umount", h.ok("mount", "--wait", later))
	h.hides(secret, wrong, "pod:"+secret)
}

// TestPullSecretOfContainerd has containerd pull for a kubelet, through the daemon
// and by it, and a container read what is not here yet with the pod's secret.
func TestPullSecretOfContainerd(t *testing.T) {
	for _, e := range editions(t) {
		t.Run(e.name, func(t *testing.T) {
			t.Parallel()
			const secret = "pull-word"
			p := newPrivate(t, 6, "pod:"+secret)
			ref := p.push(t, "private/image:1", booted(t, forms.EStargz, "secret"))
			c := newCtrd(t, e, "registry.example/pause:1")
			c.down(syscall.SIGTERM) // else it may know for a while that the daemon is away
			c.stop()
			c.configure("cri_address = \"" + c.socket() + "\"\n")
			c.ok("ps")
			c.up()
			_, cri := c.imageService()
			spec := &runtimeapi.ImageSpec{Image: ref}
			for _, a := range []*runtimeapi.AuthConfig{nil, {Username: "pod", Password: "wrong-word"}} {
				if _, err := cri.PullImage(c.ctx, &runtimeapi.PullImageRequest{Image: spec, Auth: a}); err == nil {
					t.Error("it is pulled without the secret")
				}
			}
			mustGet[*runtimeapi.PullImageResponse](t)(cri.PullImage(c.ctx, &runtimeapi.PullImageRequest{Image: spec, Auth: &runtimeapi.AuthConfig{Username: "pod", Password: secret}}))
			if text := c.metrics(); strings.Contains(text, "varve_snapshotter_fallbacks_total{") {
				t.Errorf("layers were unpacked:\n%s", c.logText())
			}
			c.ctx = namespaces.WithNamespace(c.ctx, "k8s.io")
			img := mustGet[client.Image](t)(c.GetImage(c.ctx, ref))
			code, out := c.start(c.namespace, img, "/bin/child", "sum", "/own/file").ended()
			if code != 0 || strings.TrimSpace(out) != sumOf(content("secret", 300_000)) {
				t.Errorf("the container ends with %d and says %s", code, out)
			}
			c.hides(secret, "pod:"+secret, "wrong-word")
			mustGet[*runtimeapi.RemoveImageResponse](t)(cri.RemoveImage(c.ctx, &runtimeapi.RemoveImageRequest{Image: spec}))
		})
	}
}

// metrics gives the daemon's.
func (h *host) metrics() string {
	h.t.Helper()
	over := h.overSocket()
	defer over.CloseIdleConnections()
	resp, err := over.Get("http://varve/metrics")
	must(h.t, err)
	defer resp.Body.Close()
	return string(mustGet[[]byte](h.t)(io.ReadAll(resp.Body)))
}
