package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/varvefs/varve/image"
)

// criProxy stands between a kubelet and containerd's image service: what a pod's
// pull secrets say does not reach a snapshotter otherwise. Every call is passed on
// as it is; of a pull the credentials are kept, in memory alone.
type criProxy struct {
	conn  *grpc.ClientConn
	pulls *image.Pulls
	log   *slog.Logger
}

// maxCall bounds one message, as containerd and the kubelet do.
const maxCall = 16 << 20

// newCRIProxy makes a proxy for the socket at an address. It connects at the first
// call, and anew when containerd was away. The caller closes it.
func newCRIProxy(address string, pulls *image.Pulls, log *slog.Logger) (*criProxy, error) {
	if !strings.Contains(address, "://") {
		address = "unix://" + address
	}
	if !strings.HasPrefix(address, "unix:///") {
		return nil, fmt.Errorf("cri_address %q: want unix:///path/to/containerd.sock", address)
	}
	slow := backoff.DefaultConfig
	slow.MaxDelay = 3 * time.Second // as the kubelet waits for it
	conn, err := grpc.NewClient(address,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: slow, MinConnectTimeout: 10 * time.Second}),
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(passing()), grpc.MaxCallRecvMsgSize(maxCall), grpc.MaxCallSendMsgSize(maxCall)),
	)
	if err != nil {
		return nil, fmt.Errorf("cri_address: %w", err)
	}
	return &criProxy{conn: conn, pulls: pulls, log: log}, nil
}

func (p *criProxy) Close() error { return p.conn.Close() }

// options make a server pass on the calls that nothing else is registered for.
func (p *criProxy) options() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.UnknownServiceHandler(p.pass), grpc.ForceServerCodecV2(passing()), grpc.MaxRecvMsgSize(maxCall),
	}
}

// pass is one call. The image service takes one message a call in all its
// versions, and answers with one or a stream of them.
func (p *criProxy) pass(_ any, in grpc.ServerStream) (err error) {
	method, _ := grpc.MethodFromServerStream(in)
	if !strings.HasPrefix(method, "/runtime.") || !strings.HasSuffix(path.Dir(method), ".ImageService") {
		return status.Errorf(codes.Unimplemented, "unknown method %s", method)
	}
	var req frame
	if err := in.RecvMsg(&req); err != nil {
		return err
	}
	if path.Base(method) == "PullImage" {
		ended := p.pulled(req)
		defer func() { ended(err == nil) }()
	}
	start := time.Now()
	err = p.relay(in, method, req)
	p.log.Debug("image service", "method", path.Base(method), "code", status.Code(err), "dur", time.Since(start))
	return err
}

func (p *criProxy) relay(in grpc.ServerStream, method string, req frame) error {
	ctx, cancel := context.WithCancel(in.Context())
	defer cancel()
	if md, ok := metadata.FromIncomingContext(ctx); ok {
		ctx = metadata.NewOutgoingContext(ctx, md)
	}
	out, err := p.conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, method)
	if err != nil {
		return err
	}
	// What sending fails of, receiving says.
	if err := out.SendMsg(&req); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if err := out.CloseSend(); err != nil {
		return err
	}
	if md, err := out.Header(); err == nil {
		if err := in.SetHeader(md); err != nil {
			return err
		}
	}
	for {
		var answer frame
		err := out.RecvMsg(&answer)
		if err != nil {
			in.SetTrailer(out.Trailer())
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err == nil {
			err = in.SendMsg(&answer)
		}
		if err != nil {
			return err
		}
	}
}

// pulled keeps what came with a pull.
func (p *criProxy) pulled(req frame) (ended func(ok bool)) {
	var r runtimeapi.PullImageRequest
	err := passing().Unmarshal(mem.BufferSlice{mem.SliceBuffer(req)}, &r)
	a := r.GetAuth()
	if err != nil || a == nil { // containerd says what is wrong with it
		return func(bool) {}
	}
	return p.pulls.Came(r.GetImage().GetImage(), image.PullCredential{
		Username: a.Username, Password: a.Password, Auth: a.Auth,
		ServerAddress: a.ServerAddress, IdentityToken: a.IdentityToken, RegistryToken: a.RegistryToken,
	})
}

// frame is a message that nobody looks into.
type frame []byte

// passer is the usual codec, which leaves frames as they are.
type passer struct{ encoding.CodecV2 }

func passing() passer { return passer{encoding.GetCodecV2(proto.Name)} }

func (c passer) Marshal(v any) (mem.BufferSlice, error) {
	if f, ok := v.(*frame); ok {
		return mem.BufferSlice{mem.SliceBuffer(*f)}, nil
	}
	return c.CodecV2.Marshal(v)
}

func (c passer) Unmarshal(data mem.BufferSlice, v any) error {
	if f, ok := v.(*frame); ok {
		*f = data.Materialize()
		return nil
	}
	return c.CodecV2.Unmarshal(data, v)
}
