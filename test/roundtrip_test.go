package test

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/bench/forms"
)

// tool runs a program that is not ours to its end and gives what it printed.
func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	_, err := exec.LookPath(name)
	need(t, err == nil, name)
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "HOME="+t.TempDir())
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, &out, &errs)
	}
	return strings.TrimSpace(out.String())
}

// containerd is a containerd of the test's own.
type containerd struct {
	t    *testing.T
	root string
}

func newContainerd(t *testing.T) *containerd {
	t.Helper()
	bin, err := exec.LookPath("containerd")
	need(t, err == nil, "containerd")
	c := &containerd{t, mustGet[string](t)(os.MkdirTemp("", "vt-ctrd-"))} // short: it makes sockets there
	config := fmt.Sprintf("version = 2\nroot = %q\nstate = %q\n"+
		"disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.snapshotter.v1.btrfs\", \"io.containerd.snapshotter.v1.zfs\", \"io.containerd.snapshotter.v1.devmapper\"]\n"+
		"[grpc]\naddress = %q\n[plugins.\"io.containerd.internal.v1.opt\"]\npath = %q\n",
		c.root+"/root", c.root+"/state", c.root+"/sock", c.root+"/opt")
	must(t, os.WriteFile(c.root+"/config.toml", []byte(config), 0o600))
	cmd := exec.Command(bin, "-c", c.root+"/config.toml")
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	must(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Signal(unix.SIGTERM)
		cmd.Wait()
		if t.Failed() {
			t.Logf("containerd's log:\n%s", &log)
		}
		mounts, _ := os.ReadFile("/proc/self/mountinfo")
		for line := range strings.Lines(string(mounts)) {
			if at := strings.Fields(line)[4]; strings.HasPrefix(at, c.root+"/") {
				t.Logf("containerd left a mount: %s", line)
				unix.Unmount(at, unix.MNT_DETACH)
			}
		}
		os.RemoveAll(c.root)
	})
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if conn, err := net.Dial("unix", c.root+"/sock"); err == nil {
			conn.Close()
			return c
		} else if time.Now().After(deadline) {
			t.Fatalf("containerd does not answer: %v", err)
		}
	}
}

func (c *containerd) ctr(args ...string) string {
	c.t.Helper()
	return tool(c.t, "ctr", append([]string{"-a", c.root + "/sock"}, args...)...)
}

// tree gives what containerd unpacked of an image.
func (c *containerd) tree(ref string) tree {
	c.t.Helper()
	dir := filepath.Join(c.root, "mnt")
	must(c.t, os.MkdirAll(dir, 0o700))
	c.ctr("image", "mount", ref, dir)
	defer c.ctr("image", "unmount", "--rm", dir)
	return readTree(c.t, dir)
}

// asUnpacked compares a mount's tree with one that another tool unpacked: it knows
// parts of a second, takes tables of contents for files, and has a root of its
// own.
func asUnpacked(t *testing.T, want, got tree) {
	t.Helper()
	got = got.roundSeconds()
	delete(got, ".no.prefetch.landmark")
	delete(got, "stargz.index.json")
	got["."] = want["."]
	sameTree(t, want, got)
}

// runnable is a mount of an image with a program in it, edited, and the
// arguments of a commit that make the program its command.
func runnable(t *testing.T, d *distribution, overlay string) (h *host, dir string, want tree, run []string) {
	t.Helper()
	p := newLayer(t)
	p.dir("bin")
	p.add(tar.Header{Typeflag: tar.TypeReg, Name: "bin/child", Mode: 0o755}, mustGet[[]byte](t)(os.ReadFile(child)))
	base := d.put(t, "team/base:1", build(t, forms.EStargz, append(committable(t), p.bytes())...))
	h = newHost(t)
	dir = h.writable(overlay, "w", base)
	editAll(t, dir, overlay)
	h.ok("umount", "w") // see TestCommitKinds
	h.ok("mount", "--name", "w")
	return h, dir, readTree(t, dir).wholeSeconds(), []string{"-c", `ENTRYPOINT ["/bin/child"]`, "-c", `CMD ["sum", "/new/large"]`}
}

// TestRoundTrip commits and pushes to a real registry, and has others pull,
// unpack and run it.
func TestRoundTrip(t *testing.T) {
	needRoot(t)
	d := newDistribution(t, false)
	h, dir, want, run := runnable(t, d, "kernel")
	prints := sumOf(content("large", 3<<20))
	ctrd := newContainerd(t)
	for _, compression := range []string{"estargz", "gzip", "zstd", "zstd:chunked"} {
		t.Run(compression, func(t *testing.T) {
			name := "team/app:" + strings.ReplaceAll(compression, ":", "-")
			digest := h.commit(append(append([]string{"--push", "--compression", compression}, run...), "w", d.ref(name))...)
			ref := d.addr + "/" + name

			ctrd.ctr("image", "pull", "--plain-http", ref)
			asUnpacked(t, want, ctrd.tree(ref))
			if out := ctrd.ctr("run", "--rm", ref, "c-"+filepath.Base(name[len("team/app:"):])); out != prints {
				t.Errorf("run by containerd it prints %q, want %q", out, prints)
			}

			layout := filepath.Join(t.TempDir(), "layout")
			tool(t, "skopeo", "copy", "-q", "--src-tls-verify=false", "docker://"+ref, "oci:"+layout+":1")
			index := mustGet[[]byte](t)(os.ReadFile(filepath.Join(layout, "index.json")))
			if !strings.Contains(string(index), digest) {
				t.Errorf("skopeo made of %s: %s", digest, index)
			}
			if strings.HasPrefix(compression, "zstd") {
				return // which umoci does not know
			}
			bundle := filepath.Join(t.TempDir(), "bundle")
			tool(t, "umoci", "unpack", "--image", layout+":1", bundle)
			asUnpacked(t, want, readTree(t, filepath.Join(bundle, "rootfs")))
			if out := crun(t, bundle); out != prints {
				t.Errorf("run by crun it prints %q, want %q", out, prints)
			}
		})
	}
	sameTree(t, want, readTree(t, dir).wholeSeconds())
	h.ok("umount", "-a")
}

// crun runs a bundle. It is told of no control groups, which it does not manage on
// every machine.
func crun(t *testing.T, bundle string) string {
	t.Helper()
	_, err := exec.LookPath("crun")
	need(t, err == nil, "crun")
	file := filepath.Join(bundle, "config.json")
	var spec map[string]any
	must(t, json.Unmarshal(mustGet[[]byte](t)(os.ReadFile(file)), &spec))
	spec["process"].(map[string]any)["terminal"] = false
	linux := spec["linux"].(map[string]any)
	delete(linux, "resources")
	delete(linux, "cgroupsPath")
	linux["namespaces"] = without(linux["namespaces"], "cgroup")
	spec["mounts"] = without(spec["mounts"], "cgroup")
	must(t, os.WriteFile(file, mustGet[[]byte](t)(json.Marshal(spec)), 0o600))
	// Where both versions of control groups are mounted it refuses to begin.
	return tool(t, "unshare", "-m", "sh", "-c", `umount /sys/fs/cgroup/unified 2>/dev/null; exec crun --root "$1" --cgroup-manager=disabled run -b "$2" varve-test-$$`,
		"sh", t.TempDir(), bundle)
}

// without drops the elements of a type from a list of a runtime's configuration.
func without(list any, typ string) (kept []any) {
	for _, e := range list.([]any) {
		if e.(map[string]any)["type"] != typ {
			kept = append(kept, e)
		}
	}
	return kept
}

// TestSaveLoads saves commits whose bases are not here and has others load the
// tar.
func TestSaveLoads(t *testing.T) {
	needRoot(t)
	d := newDistribution(t, false)
	h, _, want, run := runnable(t, d, "fuse")
	ctrd := newContainerd(t)
	pod := podman(t)
	for _, compression := range []string{"estargz", "gzip", "zstd", "zstd:chunked"} {
		t.Run(compression, func(t *testing.T) {
			// A name for each: who loads two under one name keeps one.
			name := "example.com/saved/" + strings.ReplaceAll(compression, ":", "-") + ":1"
			digest := h.commit(append(append([]string{"--compression", compression}, run...), "w", name)...)
			config := mustGet[v1.Hash](t)(h.made(digest).ConfigName())
			file := filepath.Join(t.TempDir(), "saved.tar")
			if out := h.ok("save", "-o", file, name); out != "" {
				t.Errorf("save -o printed %q", out)
			}

			ctrd.ctr("image", "import", "--digests", file)
			if out := ctrd.ctr("image", "ls", "name=="+name); !strings.Contains(out, digest) {
				t.Errorf("containerd loaded %s", out)
			}
			asUnpacked(t, want, ctrd.tree(name))

			if out := pod("load", "-i", file); !strings.Contains(out, "Loaded image: "+name) {
				t.Errorf("podman load: %s", out)
			}
			if id := pod("image", "inspect", "--format", "{{.Id}}", name); id != config.Hex {
				t.Errorf("podman loaded %s, want %s", id, config)
			}
			dir := pod("image", "mount", name)
			asUnpacked(t, want, readTree(t, dir))
			pod("image", "unmount", name)

			for _, from := range []string{"docker-archive:" + file + ":" + name, "oci-archive:" + file} {
				to := filepath.Join(t.TempDir(), "dir")
				tool(t, "skopeo", "copy", "-q", from, "dir:"+to)
				if m := mustGet[*v1.Manifest](t)(v1.ParseManifest(bytes.NewReader(mustGet[[]byte](t)(os.ReadFile(filepath.Join(to, "manifest.json")))))); m.Config.Digest != config {
					t.Errorf("%s has the config %s, want %s", from, m.Config.Digest, config)
				}
			}
			// And here: the tar is both of the forms that are mounted.
			again := h.ok("mount", "--wait", "--name", "again", "oci:"+file)
			sameAgain(t, filepath.Join(h.root, "run/mnt/w"), again)
			h.ok("umount", "again")
			again = h.ok("mount", "--wait", "--name", "again", "docker-archive:"+file)
			asUnpacked(t, want, readTree(t, again)) // it knows of no table of contents
			h.ok("umount", "again")
		})
	}
	// Several in one, to standard output, are the same bytes each time.
	args := []string{"save", "example.com/saved/estargz:1", "example.com/saved/gzip:1"}
	first := h.run(args...)
	if second := h.run(args...); first.code != 0 || second.out != first.out {
		t.Errorf("two tars of the same images differ: %d and %d bytes, %s", len(first.out), len(second.out), first.err)
	}
	var list []struct{ RepoTags []string }
	must(t, json.Unmarshal(tarOf(t, first.out)["manifest.json"].content, &list))
	if len(list) != 2 || list[0].RepoTags[0] != args[1] || list[1].RepoTags[0] != args[2] {
		t.Errorf("manifest.json: %v", list)
	}
	h.fails(3, "save", "-o", filepath.Join(h.root, "none.tar"), args[1], d.ref("no/such:1"))
	missing(t, filepath.Join(h.root, "none.tar"))
	h.ok("umount", "-a")
}

// podman gives a podman with a store of the test's own.
func podman(t *testing.T) func(args ...string) string {
	dir := mustGet[string](t)(os.MkdirTemp("", "vt-podman-"))
	global := []string{
		"--root", dir + "/root", "--runroot", dir + "/run", "--tmpdir", dir + "/tmp", "--storage-driver", "vfs",
		"--cgroup-manager", "cgroupfs", "--events-backend", "none",
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return func(args ...string) string {
		t.Helper()
		return tool(t, "podman", append(global[:len(global):len(global)], args...)...)
	}
}
