package test

import (
	"fmt"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	ctrdcontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/varvefs/varve/bench/forms"
)

// TestPullIntoBroken ends pulls in the middle of a layer that is unpacked.
func TestPullIntoBroken(t *testing.T) {
	withContainerd(t, func(t *testing.T, c *ctrd) {
		own := newLayer(t)
		own.dir("own")
		own.file("own/file", noise(1, 8<<20))
		img := build(t, forms.EStargz, bootable(t), own.bytes())
		r := newRegistry(t)
		g := gated(t, r)
		r.push("broken/image:1", img)
		ref := g.addr + "/broken/image:1"
		layers, sizes := blobs(t, img)
		c.ok("pull", ref) // what comes from now on is for containerd
		into := c.into("--snapshotter", "overlayfs", ref)

		for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGKILL} {
			g.let(layers[1], sizes[1]/2)
			cmd := c.command(into...)
			must(t, cmd.Start())
			c.ingested(layers[1], sizes[1]/4)
			must(t, cmd.Process.Signal(sig))
			cmd.Wait()
			if _, err := c.GetImage(c.ctx, ref); err == nil {
				t.Errorf("%v: an image that is half here has its name", sig)
			}
			ls := mustGet[[]leases.Lease](t)(c.LeasesService().List(c.ctx))
			if sig == syscall.SIGKILL {
				if len(ls) != 1 || ls[0].Labels["containerd.io/gc.expire"] == "" {
					t.Fatalf("leases that will end by themselves: %v", ls)
				}
				break
			}
			if code := cmd.ProcessState.ExitCode(); code != 130 {
				t.Errorf("interrupted: exit %d", code)
			}
			c.has("interrupted", "overlayfs", nil, nil)
		}
		g.let(layers[1], all)
		r.rec.Reset()
		c.ok(into...)
		_, ranges := r.requests(img)
		from := int64(-1)
		for _, q := range ranges {
			if path.Base(q.Path) == layers[1] {
				fmt.Sscanf(q.Range, "bytes=%d-", &from)
			}
		}
		if from < sizes[1]/4 {
			t.Errorf("what was here is not gone on with: byte %d of %d is asked for", from, sizes[1])
		}
		if got := c.sums("overlayfs", ref, "/own/file"); got != sumOf(noise(1, 8<<20)) {
			t.Errorf("a container sees digest %s", got)
		}
		for _, l := range mustGet[[]leases.Lease](t)(c.LeasesService().List(c.ctx)) {
			must(t, c.LeasesService().Delete(c.ctx, l)) // as its end will
		}
		c.has("pulled after all", "overlayfs", chainIDs(t, img), append(documents(t, img), layers...))
		c.removeImage(ref)
	})
}

// ingested waits until containerd has so much of a blob.
func (c *ctrd) ingested(id string, n int64) {
	c.t.Helper()
	for {
		for _, s := range mustGet[[]ctrdcontent.Status](c.t)(c.ContentStore().ListStatuses(c.ctx)) {
			if strings.HasSuffix(s.Ref, id) && s.Offset >= n {
				return
			}
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// TestPullIntoAtOnce pulls one image several times at once, in two namespaces.
func TestPullIntoAtOnce(t *testing.T) {
	withContainerd(t, func(t *testing.T, c *ctrd) {
		r, img, ref := c.pushed(forms.EStargz, "once")
		var wg sync.WaitGroup
		for i := range 6 {
			args := c.into("-q", ref)
			switch i % 3 {
			case 1:
				args = c.into("-q", "--snapshotter", "overlayfs", ref)
			case 2:
				args = append(args, "--containerd=other")
			}
			wg.Go(func() {
				if res := c.run(args...); res.code != 0 || res.out != ref+"\n" {
					t.Error(res)
				}
			})
		}
		wg.Wait()
		r.settled()
		layers, _ := blobs(t, img)
		c.has("pulled", "varve", chainIDs(t, img), append(documents(t, img), layers...))
		c.has("pulled", "overlayfs", chainIDs(t, img), append(documents(t, img), layers...))
		other := *c
		other.ctx = namespaces.WithNamespace(c.ctx, "other")
		other.has("pulled for another namespace", "varve", chainIDs(t, img), documents(t, img))
		for _, s := range []string{"varve", "overlayfs"} {
			if got := c.sums(s, ref, "/own/file"); got != sumOf(content("once", 300_000)) {
				t.Errorf("%s: a container sees digest %s", s, got)
			}
		}
		c.removeImage(ref)
		other.has("removed in one namespace", "varve", chainIDs(t, img), documents(t, img))
		other.removeImage(ref)
		other.has("removed", "varve", nil, nil)
	})
}

// TestPullIntoCRI pulls an image for the kubelet, who then knows it as if it had been
// pulled by him.
func TestPullIntoCRI(t *testing.T) {
	for _, e := range editions(t) {
		t.Run(e.name, func(t *testing.T) {
			t.Parallel()
			c := newCtrd(t, e, "registry.example/pause:1")
			_, img, ref := c.pushed(forms.EStargz, "cri")
			c.ok("pull", "--containerd=k8s.io", "--containerd-address", c.socket(), ref)
			conn := mustGet[*grpc.ClientConn](t)(grpc.NewClient("unix://"+c.socket(), grpc.WithTransportCredentials(insecure.NewCredentials())))
			defer conn.Close()
			cri := runtimeapi.NewImageServiceClient(conn)
			docs := documents(t, img)
			pinned := strings.TrimSuffix(ref, ":1") + "@" + docs[0]
			for _, name := range []string{ref, docs[1], pinned} {
				soon(t, func() error { // CRI hears of a name after it was given
					got := mustGet[*runtimeapi.ImageStatusResponse](t)(cri.ImageStatus(c.ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: name}}))
					im := got.Image
					if im == nil || im.Id != docs[1] || !slices.Equal(im.RepoTags, []string{ref}) || !slices.Equal(im.RepoDigests, []string{pinned}) {
						return fmt.Errorf("%s is known as %v", name, im)
					}
					return nil
				})
			}
			c.ctx = namespaces.WithNamespace(c.ctx, "k8s.io")
			c.has("pulled", "varve", chainIDs(t, img), docs)
			mustGet[*runtimeapi.RemoveImageResponse](t)(cri.RemoveImage(c.ctx, &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: docs[1]}}))
			c.has("removed by the kubelet", "varve", nil, nil)
		})
	}
}

// TestPullIntoNowhere has what cannot be pulled into containerd, and says why.
func TestPullIntoNowhere(t *testing.T) {
	es := editions(t)
	c := newCtrd(t, es[len(es)-1], "")
	img := booted(t, forms.EStargz, "nowhere")
	r := newRegistry(t)
	ref := r.push("no/image:1", img)
	alien := r.push("no/alien:1", changeConfig(t, img, func(f map[string]any) { f["architecture"] = "s390x" }))
	missing := filepath.Join(c.dir, "none")
	fails := func(code int, want []string, args ...string) {
		t.Helper()
		res := c.run(args...)
		lines := strings.Split(strings.TrimSuffix(res.err, "\n"), "\n")
		last := lines[len(lines)-1]
		if res.code != code || strings.Contains(res.out, "Status:") {
			t.Errorf("want exit %d: %s", code, res)
		}
		for _, w := range want {
			if !strings.Contains(last, w) {
				t.Errorf("want %q: %s", w, res)
			}
		}
	}
	fails(1, []string{"no containerd at " + missing, "--containerd-address"}, "pull", "--containerd", "--containerd-address", missing, ref)
	fails(1, []string{"no snapshotter stargz", "varve install containerd"}, c.into("--snapshotter", "stargz", ref)...)
	fails(2, []string{"--snapshotter is for --containerd"}, "pull", "--snapshotter", "varve", ref)
	fails(2, []string{"--insecure"}, c.into("--insecure", ref)...)
	fails(2, []string{"--authfile"}, c.into("--authfile", "/dev/null", ref)...)
	fails(2, []string{"--all-platforms"}, c.into("--all-platforms", ref)...)
	fails(2, []string{"registry"}, c.into("oci:"+c.dir)...)
	fails(3, []string{"s390x", runtime.GOARCH}, c.into(alien)...)
	fails(3, []string{runtime.GOARCH, "riscv64"}, c.into("--platform", "linux/riscv64", ref)...)
	fails(3, []string{"no/none"}, c.into(r.rec.Addr()+"/no/none:1")...)
	if got := c.ok("pull", "-q", "--containerd="+c.namespace, "--containerd-address", "unix://"+c.socket(), "--platform", "linux/s390x", alien); got != alien {
		t.Errorf("an image of a platform that was named: %s", got)
	}
	c.removeImage(alien)
	user := newHostAs(t, &syscall.Credential{Uid: nobody, Gid: nobody})
	if line := user.fails(1, "pull", "--containerd", "--containerd-address", c.socket(), ref); !strings.Contains(line, "may not use containerd") {
		t.Errorf("a plain user: %s", line)
	}
	r.close()
	fails(5, []string{r.rec.Addr()}, c.into(ref)...)
	c.has("nothing", "overlayfs", nil, nil)
	if len(user.processes()) > 0 {
		t.Error("a pull that could not begin has started a daemon")
	}
}
