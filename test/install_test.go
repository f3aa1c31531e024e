package test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/varvefs/varve/bench/forms"
)

// bare is what an administrator has before he knows of varve, but for directories and
// addresses.
func (c *ctrd) bare() string {
	version := 3
	if c.major == 1 {
		version = 2
	}
	return fmt.Sprintf("version = %d\nroot = %q\nstate = %q\n[grpc]\n  address = %q\n[plugins.'io.containerd.internal.v1.opt']\n  path = %q\n",
		version, c.path("root"), c.path("state"), c.socket(), c.path("opt"))
}

// plugins gives the lines on plugins of a containerd that runs, by type and name.
func (c *ctrd) plugins() map[string]string {
	c.t.Helper()
	all := map[string]string{}
	for line := range strings.Lines(c.ctrOK("plugins", "ls")) {
		if f := strings.Fields(line); len(f) > 3 {
			all[f[0]+"."+f[1]] = f[3]
		}
	}
	return all
}

// criPull pulls an image as the kubelet does, for a pod of a runtime class.
func (c *ctrd) criPull(ref, class string) {
	c.t.Helper()
	conn := mustGet[*grpc.ClientConn](c.t)(grpc.NewClient("unix://"+c.socket(), grpc.WithTransportCredentials(insecure.NewCredentials())))
	defer conn.Close()
	ctx, cancel := context.WithTimeout(c.ctx, time.Minute)
	defer cancel()
	_, err := cri.NewImageServiceClient(conn).PullImage(ctx, &cri.PullImageRequest{
		Image:         &cri.ImageSpec{Image: ref, RuntimeHandler: class},
		SandboxConfig: &cri.PodSandboxConfig{Metadata: &cri.PodSandboxMetadata{Name: "pod"}, Annotations: map[string]string{"io.containerd.cri.runtime-handler": class}},
	})
	must(c.t, err)
}

// TestInstallContainerd installs the snapshotter for a containerd that has never heard
// of it, starts that, pulls as the kubelet and ctr do, and uninstalls.
func TestInstallContainerd(t *testing.T) {
	for _, e := range editions(t) {
		for _, how := range []string{"--default", "--runtime-class"} {
			t.Run(e.name+how, func(t *testing.T) {
				c := newCtrd(t, e, "")
				c.down(syscall.SIGTERM)
				config := c.path("config.toml")
				must(t, os.WriteFile(config, []byte(c.bare()), 0o640))
				must(t, os.Chmod(config, 0o640))
				args := []string{"--config", config, "--containerd", filepath.Join(c.bin, "containerd")}
				install := append([]string{"install", "containerd", how}, args...)
				uninstall := append([]string{"uninstall", "containerd", "--containerd-address", c.socket()}, args...)
				if c.major == 1 && how == "--runtime-class" && strings.Contains(string(mustGet[[]byte](t)(exec.Command(filepath.Join(c.bin, "containerd"), "--version").Output())), " 1.6") {
					if said := c.fails(1, install...); !strings.Contains(said, "one snapshotter for all pods") {
						t.Error(said)
					}
					c.up()
					return
				}
				if shown := c.ok(append(install, "--dry-run")...); !strings.Contains(shown, "+++ "+c.path("conf.d/varve.toml")) {
					t.Errorf("--dry-run: %s", shown)
				}
				if b := mustGet[[]byte](t)(os.ReadFile(config)); string(b) != c.bare() {
					t.Error("--dry-run has changed the configuration")
				}
				c.ok(install...)
				if said := c.ok(install...); said != "nothing to do" {
					t.Errorf("a second time: %s", said)
				}
				c.up()
				all := c.plugins()
				for _, p := range []string{"io.containerd.snapshotter.v1.varve", "io.containerd.grpc.v1.cri"} {
					if all[p] != "ok" {
						t.Errorf("plugin %s: %q", p, all[p])
					}
				}
				c.installedPulls(how)

				_, err := c.NewContainer(c.ctx, "keeps", client.WithSnapshotter("varve"), client.WithNewSpec())
				must(t, err)
				if said := c.fails(1, uninstall...); !strings.Contains(said, c.namespace+"/keeps") {
					t.Errorf("uninstalled under a container: %s", said)
				}
				if said := c.fails(1, append(install, "--name", "stargz", "--containerd-address", c.socket())...); !strings.Contains(said, c.namespace+"/keeps") {
					t.Errorf("renamed under a container: %s", said)
				}
				must(t, c.ContainerService().Delete(c.ctx, "keeps"))
				c.ok(uninstall...)
				if said := c.ok(uninstall...); said != "nothing to do" {
					t.Errorf("a second time: %s", said)
				}
				st := mustGet[os.FileInfo](t)(os.Stat(config))
				if b := mustGet[[]byte](t)(os.ReadFile(config)); string(b) != c.bare() || st.Mode().Perm() != 0o640 {
					t.Errorf("%v %s", st.Mode(), b)
				}
				if left, _ := filepath.Glob(c.path("con*")); len(left) != 1 {
					t.Errorf("left: %q", left)
				}
				c.down(syscall.SIGTERM)
				c.up()
				if p := c.plugins()["io.containerd.snapshotter.v1.varve"]; p != "" {
					t.Errorf("the plugin is still there: %s", p)
				}
			})
		}
	}
}

// installedPulls pulls an image by CRI, which must be lazy, and on new containerds one
// by ctr, which names no image to snapshotters of old ones.
func (c *ctrd) installedPulls(how string) {
	t := c.t
	_, img, ref := c.pushed(forms.EStargz, "install"+how)
	class := ""
	if how == "--runtime-class" {
		class = "varve"
	}
	c.criPull(ref, class)
	pulls := []string{"k8s.io"}
	if c.major > 1 {
		c.ctrOK("image", "pull", "--plain-http", "--snapshotter", "varve", ref)
		pulls = append(pulls, c.namespace)
	}
	layers, _ := blobs(t, img)
	for _, ns := range pulls {
		list := func(args ...string) string { return c.ctrOK(append([]string{"--namespace", ns}, args...)...) }
		if n := strings.Count(list("snapshots", "--snapshotter", "varve", "list"), "Committed"); n != len(layers) {
			t.Errorf("%s: %d snapshots for %d layers", ns, n, len(layers))
		}
		contents := list("content", "list", "--quiet")
		for _, d := range layers {
			if strings.Contains(contents, d) {
				t.Errorf("%s: layer %s was fetched whole", ns, d)
			}
		}
	}
	c.ctrOK("--namespace", "k8s.io", "image", "remove", "--sync", ref)
}

// TestUnitSockets starts the daemon with sockets under the names that the units give.
func TestUnitSockets(t *testing.T) {
	needRoot(t)
	activate, err := exec.LookPath("systemd-socket-activate")
	need(t, err == nil, "systemd-socket-activate")
	h := newHost(t)
	machine := filepath.Join(h.root, "machine")
	h.ok("install", "systemd", "--prefix", machine)
	var args, names []string
	for _, unit := range []string{"varve.socket", "varve-snapshotter.socket"} {
		b := mustGet[[]byte](t)(os.ReadFile(filepath.Join(machine, "etc/systemd/system", unit)))
		for line := range strings.Lines(string(b)) {
			k, v, _ := strings.Cut(strings.TrimSpace(line), "=")
			switch k {
			case "ListenStream":
				must(t, os.MkdirAll(filepath.Dir(v), 0o755))
				args = append(args, "-l", v)
			case "FileDescriptorName":
				names = append(names, v)
			}
		}
	}
	var env []string
	for _, e := range h.env {
		env = append(env, "-E", e)
	}
	cmd := exec.Command(activate, append(append(append(env, args...), "--fdname="+strings.Join(names, ":")), varve, "daemon")...)
	log := mustGet[*os.File](t)(os.Create(filepath.Join(h.root, "log")))
	defer log.Close()
	cmd.Stdout, cmd.Stderr, cmd.Dir = log, log, h.root
	must(t, cmd.Start())
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	sockets := []string{filepath.Join(h.root, "run/varve.sock"), filepath.Join(h.root, "run/snapshotter.sock")}
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		_, err1 := os.Stat(sockets[0])
		_, err2 := os.Stat(sockets[1])
		if err1 == nil && err2 == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the sockets do not come")
		}
	}
	if pid := h.pid(); pid != cmd.Process.Pid { // it becomes the daemon when somebody comes
		b, _ := os.ReadFile(log.Name())
		t.Errorf("the daemon is process %d, not %d\n%s", pid, cmd.Process.Pid, b)
	}
	h.ok("daemon", "stop")
	<-ended
}

// TestInstallRefused gives those who cannot, and machines that cannot.
func TestInstallRefused(t *testing.T) {
	needRoot(t)
	user := newHostAs(t, &syscall.Credential{Uid: 65534, Gid: 65534})
	for _, verb := range []string{"install", "uninstall"} {
		for _, what := range []string{"containerd", "systemd"} {
			if said := user.fails(1, verb, what); !strings.Contains(said, "only root can do this") {
				t.Errorf("%s %s: %s", verb, what, said)
			}
		}
	}
	if shown := user.ok("install", "systemd", "--dry-run"); !strings.Contains(shown, "+ListenStream="+user.root+"/run/varve.sock\n") {
		t.Errorf("--dry-run: %s", shown)
	}
	if _, err := os.Stat("/run/systemd/system"); err != nil {
		if said := newHost(t).fails(1, "install", "systemd"); !strings.Contains(said, "systemd does not run this machine") {
			t.Error(said)
		}
	}
	// k3s and Docker on a machine whose files are elsewhere.
	h := newHost(t)
	machine := filepath.Join(h.root, "machine")
	agent := filepath.Join(machine, "var/lib/rancher/k3s/agent/etc/containerd")
	must(t, os.MkdirAll(agent, 0o755))
	if said := h.fails(1, "install", "containerd", "--prefix", machine, "--k3s"); !strings.Contains(said, "start it once") {
		t.Error(said)
	}
	must(t, os.WriteFile(filepath.Join(agent, "config.toml"), []byte("version = 3\n"), 0o644))
	shown := h.ok("install", "containerd", "--prefix", machine, "--containerd-version", "2.1", "--default", "--dry-run")
	for _, want := range []string{"+++ /var/lib/rancher/k3s/agent/etc/containerd/config-v3.toml.d/varve.toml\n", "config-v3.toml.tmpl\n", `+{{ template "base" . }}`} {
		if !strings.Contains(shown, want) {
			t.Errorf("k3s: %q is not in %s", want, shown)
		}
	}
	shown = h.ok("install", "containerd", "--prefix", machine, "--containerd-version", "2.1", "--docker", "--dry-run")
	for _, want := range []string{"+++ /etc/containerd/conf.d/varve.toml\n", "+++ /etc/docker/daemon.json\n", `+  "storage-driver": "varve"`} {
		if !strings.Contains(shown, want) {
			t.Errorf("Docker: %q is not in %s", want, shown)
		}
	}
	if entries, _ := os.ReadDir(machine); len(entries) != 1 {
		t.Errorf("--dry-run has written: %v", entries)
	}
}
