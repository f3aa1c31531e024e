package run

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// probe tells what a container is like to who is in it.
const probe = `package main

import (
	"bufio"
	"encoding/json"
	"os"
	"strings"
	"syscall"
)

func main() {
	r := map[string]string{}
	r["cwd"], _ = os.Getwd()
	r["host"], _ = os.Hostname()
	r["args"] = strings.Join(os.Args[1:], " ")
	for _, kv := range os.Environ() {
		k, v, _ := strings.Cut(kv, "=")
		r["env "+k] = v
	}
	for key, file := range map[string]string{
		"hosts": "/etc/hosts", "hostname": "/etc/hostname", "in": "/data/in", "comm": "/proc/1/comm", "oom": "/proc/self/oom_score_adj",
		"memory": "/sys/fs/cgroup/memory/memory.limit_in_bytes", "memory.max": "/sys/fs/cgroup/memory.max",
		"pids": "/sys/fs/cgroup/pids/pids.max", "pids.max": "/sys/fs/cgroup/pids.max",
		"cpu": "/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "cpu.max": "/sys/fs/cgroup/cpu.max",
	} {
		if b, err := os.ReadFile(file); err == nil {
			r[key] = strings.TrimSpace(string(b))
		}
	}
	f, _ := os.Open("/proc/self/status")
	for s := bufio.NewScanner(f); s.Scan(); {
		k, v, _ := strings.Cut(s.Text(), ":")
		r["status "+k] = strings.Join(strings.Fields(v), " ")
	}
	for _, file := range []string{"/new", "/data/new", "/tmp/new", "/host/new", "/sys/new", "/proc/sys/kernel/domainname", "/etc/hosts"} {
		f, err := os.OpenFile(file, os.O_CREATE|os.O_WRONLY, 0600)
		r["write "+file] = "ok"
		if err != nil {
			r["write "+file] = err.(*os.PathError).Err.Error()
		}
		f.Close()
	}
	var limit syscall.Rlimit
	syscall.Getrlimit(syscall.RLIMIT_CORE, &limit)
	if limit.Cur == 4096 && limit.Max == 8192 {
		r["core"] = "as asked"
	}
	links, _ := os.ReadDir("/sys/class/net")
	for _, l := range links {
		r["net"] += l.Name() + " "
	}
	if err := syscall.Mount("none", "/tmp", "tmpfs", 0, ""); err != nil {
		r["mount"] = err.Error()
	}
	var fs syscall.Statfs_t
	syscall.Statfs("/dev/shm", &fs)
	if fs.Blocks*uint64(fs.Bsize) == 64<<20 {
		r["shm"] = "64m"
	}
	if fi, err := os.Stat("/dev/mine"); err == nil && fi.Mode()&os.ModeCharDevice != 0 {
		r["device"] = "there"
	}
	if _, err := os.ReadFile("/proc/keys"); err == nil {
		b, _ := os.ReadFile("/proc/keys")
		r["keys"] = string(b)
	}
	json.NewEncoder(os.Stdout).Encode(r)
}
`

// runtimes are crun and runc as this machine can run them. crun wants no version 2
// of control groups beside version 1.
func runtimes(t *testing.T) map[string][]string {
	t.Helper()
	out := map[string][]string{}
	for _, name := range []string{"crun", "runc"} {
		file, err := exec.LookPath(name)
		need(t, err == nil, name)
		out[name] = []string{file}
	}
	if raw, err := os.ReadFile("/sys/fs/cgroup/unified/cgroup.controllers"); err == nil && len(raw) > 0 && os.Geteuid() == 0 {
		out["crun"] = append([]string{"unshare", "-m", "sh", "-c", `umount /sys/fs/cgroup/unified; exec "$@"`, "sh"}, out["crun"]...)
	}
	return out
}

// container is one with the probe for a root.
func container(t *testing.T, probe string) Container {
	t.Helper()
	root := t.TempDir()
	must(t, os.Chmod(root, 0o755))
	write(t, root, map[string]string{
		"etc/passwd": "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34:web:/var/www:/bin/sh\n", "etc/group": "root:x:0:\nweb:x:34:\nextra:x:90:web\n",
		"data/in": "the image's", "bin/": "", "tmp/": "",
	})
	must(t, os.Chmod(filepath.Join(root, "tmp"), 0o1777))
	bin, err := os.ReadFile(probe)
	must(t, err)
	must(t, os.WriteFile(filepath.Join(root, "bin/probe"), bin, 0o755))
	return Container{ID: fmt.Sprintf("varve-run-test-%d-%d", os.Getpid(), time.Now().UnixNano()), Root: root, Dir: t.TempDir(), Volumes: t.TempDir()}
}

// start runs a container to its end and gives what the probe said.
func start(t *testing.T, runtime []string, c Container) map[string]string {
	t.Helper()
	b, err := Make(context.Background(), c)
	must(t, err)
	if len(b.Warnings) > 0 {
		t.Logf("warnings: %q", b.Warnings)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	args := append(slices.Clone(runtime[1:]), "--root", t.TempDir())
	if strings.HasSuffix(runtime[len(runtime)-1], "crun") && b.NoCgroups {
		args = append(args, "--cgroup-manager=disabled")
	}
	cmd := exec.CommandContext(ctx, runtime[0], append(args, "run", "--bundle", b.Dir, c.ID)...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v: %v\n%s", cmd.Args, err, &stderr)
	}
	must(t, Tidy(c))
	got := map[string]string{}
	if err := json.Unmarshal(stdout.Bytes(), &got); err != nil {
		t.Fatalf("%v: %q", err, &stdout)
	}
	return got
}

func expect(t *testing.T, got, want map[string]string) {
	t.Helper()
	for key, w := range want {
		if got[key] != w {
			t.Errorf("%s: %q, want %q", key, got[key], w)
		}
	}
}

// TestRuntimes starts containers as root by crun and by runc.
func TestRuntimes(t *testing.T) {
	need(t, os.Geteuid() == 0, "a root user for this test")
	bin := build(t, probe)
	cg, err := readCgroups()
	must(t, err)
	for name, runtime := range runtimes(t) {
		t.Run(name, func(t *testing.T) {
			t.Run("usual", func(t *testing.T) {
				c := container(t, bin)
				c.Image = ocispec.ImageConfig{Entrypoint: []string{"probe"}, Cmd: []string{"a", "b"}, Env: []string{"A=1"}}
				host, err := os.Hostname()
				must(t, err)
				before := names(t, c.Root)
				got := start(t, runtime, c)
				expect(t, got, map[string]string{
					"cwd": "/", "host": host, "hostname": host, "args": "a b", "env A": "1", "env PATH": defaultPath, "env HOME": "/root", "env HOSTNAME": host, "env TERM": "",
					"status Uid": "0 0 0 0", "status CapEff": "00000000a80425fb", "status CapBnd": "00000000a80425fb", "status CapInh": "0000000000000000", "status CapAmb": "0000000000000000",
					"status Seccomp": "2", "status NoNewPrivs": "0", "comm": "probe",
					"write /new": "ok", "write /proc/sys/kernel/domainname": "read-only file system", "write /etc/hosts": "ok",
					"mount": "operation not permitted", "shm": "64m", "keys": "",
				})
				if links, err := os.ReadDir("/sys/class/net"); err == nil && len(strings.Fields(got["net"])) != len(links) {
					t.Errorf("not the host's network: %q", got["net"])
				}
				// Nothing is left in the root but what the container wrote.
				if d := cmp.Diff(slices.Sorted(slices.Values(append(before, "data/new", "new", "tmp/new"))), names(t, c.Root)); d != "" {
					t.Errorf("the root after it: %s", d)
				}
			})
			t.Run("asked", func(t *testing.T) {
				c := container(t, bin)
				hostDir := filepath.Join(t.TempDir(), "made/on/demand")
				c.Image = ocispec.ImageConfig{Cmd: []string{"sh"}, User: "root", WorkingDir: "/elsewhere", Volumes: map[string]struct{}{"/data": {}}}
				c.Options = Options{
					Cmd: []string{"/bin/probe"}, User: "web", Workdir: "/data/deep/er", Hostname: "box", Network: NetworkNone, ReadOnly: true,
					Env: []string{"HOME=/h"}, AddHosts: []string{"db:10.0.0.1"},
					Volumes:  []string{hostDir + ":/host:ro"},
					Tmpfs:    []string{"/tmp"},
					Security: Security{CapAdd: []string{"SYS_TIME"}, CapDrop: []string{"NET_RAW"}, Opt: []string{"no-new-privileges"}, Devices: []string{"/dev/full:/dev/mine"}},
					Limits:   Limits{Memory: 64 << 20, CPUs: 0.5, Pids: 99, OOMScoreAdj: 321, Ulimits: []string{"core=4096:8192"}},
				}
				must(t, os.Chmod(filepath.Join(c.Root, "data"), 0o777))
				if !cg.cfs || !cg.controllers["memory"] || !cg.controllers["pids"] {
					need(t, false, "control groups of memory, cpu and pids")
				}
				want := map[string]string{
					"cwd": "/data/deep/er", "host": "box", "hostname": "box", "env HOME": "/h", "in": "the image's",
					"status Uid": "33 33 33 33", "status Gid": "34 34 34 34", "status Groups": "34 90",
					"status CapEff": "0000000000000000", "status CapBnd": "00000000aa0405fb", "status NoNewPrivs": "1",
					"write /new": "read-only file system", "write /data/new": "ok", "write /tmp/new": "ok", "write /host/new": "read-only file system",
					"core": "as asked", "oom": "321", "net": "lo ", "device": "there", "hosts": strings.TrimSpace(localHosts + "10.0.0.1\tdb"),
				}
				if cg.unified {
					want["memory.max"], want["pids.max"], want["cpu.max"] = "67108864", "99", "50000 100000"
				} else {
					want["memory"], want["pids"], want["cpu"] = "67108864", "99", "50000"
				}
				expect(t, start(t, runtime, c), want)
				if _, err := os.Stat(filepath.Join(c.Root, "data/new")); err == nil {
					t.Error("what was written to a volume is in the root")
				}
				// A second start has the volume again.
				vol := filepath.Join(c.Dir, "volumes", place{dest: "/data"}.directory(), "_data")
				must(t, os.WriteFile(filepath.Join(vol, "in"), []byte("changed"), 0o644))
				expect(t, start(t, runtime, c), map[string]string{"in": "changed"})
			})
			t.Run("privileged", func(t *testing.T) {
				c := container(t, bin)
				c.Options = Options{Cmd: []string{"probe"}, Security: Security{Privileged: true}}
				want := map[string]string{"status Seccomp": "0", "mount": ""}
				want["status CapEff"] = status(t, "CapBnd")
				expect(t, start(t, runtime, c), want)
				c.Options.Security.Opt = []string{`seccomp={"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mount"],"action":"SCMP_ACT_ERRNO","errnoRet":38}]}`}
				want["status Seccomp"], want["mount"] = "2", "function not implemented"
				expect(t, start(t, runtime, c), want)
			})
			t.Run("init", func(t *testing.T) {
				_, err := findInit()
				need(t, err == nil, "an init, such as catatonit")
				c := container(t, bin)
				c.Options = Options{Cmd: []string{"probe", "x"}, Init: true}
				expect(t, start(t, runtime, c), map[string]string{"args": "x", "comm": "init"})
			})
		})
	}
}

// TestPlainUser starts containers as a user of the machine, and as that user's root
// in a user namespace, by running this test again.
func TestPlainUser(t *testing.T) {
	const key, uid = "VARVE_RUN_TEST_PROBE", 12345
	bin := os.Getenv(key)
	if bin == "" {
		need(t, os.Geteuid() == 0, "a root user for this test")
		dir, err := os.MkdirTemp("", "varve-run-")
		must(t, err)
		t.Cleanup(func() { os.RemoveAll(dir) })
		must(t, os.Chown(dir, uid, uid))
		self, err := os.ReadFile("/proc/self/exe")
		must(t, err)
		must(t, os.WriteFile(filepath.Join(dir, "test"), self, 0o755))
		raw, err := os.ReadFile(build(t, probe))
		must(t, err)
		must(t, os.WriteFile(filepath.Join(dir, "probe"), raw, 0o755))
		for name, within := range map[string][]string{"plain": nil, "nested": {"unshare", "-Urm"}} {
			t.Run(name, func(t *testing.T) {
				args := []string{"-m", "sh", "-c", `umount /sys/fs/cgroup/unified 2>/dev/null; exec setpriv --reuid "$0" --regid "$0" --clear-groups "$@"`, strconv.Itoa(uid)}
				args = append(append(args, within...), filepath.Join(dir, "test"), "-test.run=^TestPlainUser$", "-test.v")
				inner := exec.Command("unshare", args...)
				inner.Env = append(os.Environ(), key+"="+filepath.Join(dir, "probe"), "TMPDIR="+dir, "HOME="+dir, "XDG_RUNTIME_DIR="+dir)
				inner.Dir = dir
				out, err := inner.CombinedOutput()
				need(t, !bytes.Contains(out, []byte("--- SKIP: TestPlainUser")), "user namespaces for plain users")
				if err != nil || !bytes.Contains(out, []byte("--- PASS: TestPlainUser")) {
					t.Fatalf("as user %d: %v\n%s", uid, err, out)
				}
			})
		}
		return
	}
	need(t, exec.Command("unshare", "-Ur", "true").Run() == nil, "user namespaces for plain users")
	for name, runtime := range runtimes(t) {
		t.Run(name, func(t *testing.T) {
			for _, network := range []string{NetworkHost, NetworkNone} {
				c := container(t, bin)
				c.Options = Options{Cmd: []string{"probe"}, Network: network, Volumes: []string{"/data"}, Workdir: "/made"}
				expect(t, start(t, runtime, c), map[string]string{
					"cwd": "/made", "in": "the image's", "status Uid": "0 0 0 0", "status CapEff": "00000000a80425fb", "status Seccomp": "2",
					"env HOME": "/root", "write /new": "ok", "write /data/new": "ok", "shm": "64m",
				})
			}
		})
	}
	c := container(t, bin)
	for want, o := range map[string]Options{
		"user 33:34 does not exist in the container of a plain user": {Cmd: []string{"probe"}, User: "web"},
		"need control groups, which a container of a plain user":     {Cmd: []string{"probe"}, Limits: Limits{Memory: 64 << 20}},
	} {
		c.Options = o
		if _, err := Make(context.Background(), c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want %q", err, want)
		}
	}
}

// names are all below a directory, sorted.
func names(t *testing.T, dir string) (out []string) {
	t.Helper()
	must(t, filepath.WalkDir(dir, func(name string, _ os.DirEntry, err error) error {
		if rel, _ := filepath.Rel(dir, name); rel != "." {
			out = append(out, rel)
		}
		return err
	}))
	slices.Sort(out)
	return out
}

// status is a line of this process's /proc/self/status.
func status(t *testing.T, key string) string {
	t.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", unix.Getpid()))
	must(t, err)
	for line := range strings.Lines(string(raw)) {
		if k, v, _ := strings.Cut(line, ":"); k == key {
			return strings.TrimSpace(v)
		}
	}
	t.Fatalf("no %s", key)
	return ""
}
