package test

import (
	"context"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/containerd/containerd/v2/pkg/namespaces"

	"github.com/varvefs/varve/bench/forms"
)

// TestContainerdCRI does what a kubelet does: it pulls images, runs a pod with the
// machine's network, asks what images take, and removes it all.
func TestContainerdCRI(t *testing.T) {
	for _, e := range editions(t) {
		t.Run(e.name, func(t *testing.T) {
			t.Parallel()
			r := newRegistry(t)
			img := mustGet[v1.Image](t)(mutate.Config(booted(t, forms.EStargz, "pause"), v1.Config{Entrypoint: []string{"/bin/child", "wait", "/etc"}}))
			pause := r.push("pause:1", img)
			c := newCtrd(t, e, pause)
			c.ctx = namespaces.WithNamespace(c.ctx, "k8s.io") // CRI's
			c.runsPods()
		})
	}
}

func (c *ctrd) runsPods() {
	t := c.t
	conn := mustGet[*grpc.ClientConn](t)(grpc.NewClient("unix://"+c.socket(), grpc.WithTransportCredentials(insecure.NewCredentials())))
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 6*time.Minute)
	defer cancel()
	im, rt := cri.NewImageServiceClient(conn), cri.NewRuntimeServiceClient(conn)

	r, made, ref := c.pushed(forms.EStargz, "pod")
	layers, _ := blobs(t, made)
	before := c.files()
	uid := filepath.Base(c.dir)
	pod := &cri.PodSandboxConfig{
		Metadata: &cri.PodSandboxMetadata{Name: "pod", Uid: uid, Namespace: "default"}, LogDirectory: c.path("logs"),
		Linux: &cri.LinuxPodSandboxConfig{
			CgroupParent:    "/" + c.namespace,
			SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: &cri.NamespaceOption{Network: cri.NamespaceMode_NODE}},
		},
	}
	spec := &cri.ImageSpec{Image: ref}
	pulled := mustGet[*cri.PullImageResponse](t)(im.PullImage(ctx, &cri.PullImageRequest{Image: spec, SandboxConfig: pod}))
	got, _ := r.requests(made)
	withoutLookups(got, 3)
	asked(t, "PullImage", got, map[string]int{"manifest": 3, "config": 2, "blob": len(layers)})
	for i, l := range layers {
		if c.contents()[l] {
			t.Errorf("containerd has layer %d itself", i)
		}
	}

	sandbox := mustGet[*cri.RunPodSandboxResponse](t)(rt.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: pod})).PodSandboxId
	var ids []string
	for _, name := range []string{"a", "b", "c"} {
		k := mustGet[*cri.CreateContainerResponse](t)(rt.CreateContainer(ctx, &cri.CreateContainerRequest{
			PodSandboxId: sandbox, SandboxConfig: pod,
			Config: &cri.ContainerConfig{
				Metadata: &cri.ContainerMetadata{Name: name}, Image: &cri.ImageSpec{Image: pulled.ImageRef},
				Command: []string{"/bin/child", "wait", "/own"}, LogPath: name + ".log",
				Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{
					NamespaceOptions: pod.Linux.SecurityContext.NamespaceOptions, ReadonlyRootfs: name == "c",
				}},
			},
		}))
		_, err := rt.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: k.ContainerId})
		must(t, err)
		ids = append(ids, k.ContainerId)
	}
	c.lowersAre("a pod of three containers, and its pause", 2)
	for _, id := range ids {
		out := mustGet[*cri.ExecSyncResponse](t)(rt.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: id, Cmd: []string{"/bin/child", "sum", "/own/file"}, Timeout: 60}))
		if strings.TrimSpace(string(out.Stdout)) != sumOf(content("pod", 300_000)) {
			t.Errorf("ExecSync: exit %d: %s%s", out.ExitCode, out.Stdout, out.Stderr)
		}
	}

	// CRI asks once what a layer takes. Asked anew, it is what is here by now.
	r.settled()
	c.down(syscall.SIGTERM)
	c.up()
	c.criTakes(ctx, im)
	out, err := rt.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: ids[0], Cmd: []string{"/bin/child", "sum", "/own/user"}, Timeout: 60})
	if err != nil || strings.TrimSpace(string(out.Stdout)) != sumOf(content("pod user", 100_000)) {
		t.Errorf("ExecSync when containerd was started anew: %v, %v", out, err)
	}

	_, err = rt.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: sandbox})
	must(t, err)
	_, err = rt.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: sandbox})
	must(t, err)
	for _, image := range []string{ref, c.pause} {
		_, err := im.RemoveImage(ctx, &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: image}})
		must(t, err)
	}
	c.collect()
	c.lowersAre("all is removed", 0)
	c.leftAre("all is removed", before)
	c.criTakes(ctx, im)
}

// criTakes waits until CRI says that images take what they do, but for what
// containers have written.
func (c *ctrd) criTakes(ctx context.Context, im cri.ImageServiceClient) {
	c.t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		var taken int64
		for _, n := range c.taken() {
			taken += n
		}
		info, err := im.ImageFsInfo(ctx, &cri.ImageFsInfoRequest{})
		if err == nil && len(info.ImageFilesystems) == 1 {
			used := int64(info.ImageFilesystems[0].UsedBytes.GetValue())
			if used >= taken && used <= taken+100_000 {
				return
			}
		}
		if time.Now().After(end) {
			c.t.Errorf("images take %d bytes, and are said to take %v, %v", taken, info, err)
			return
		}
	}
}
