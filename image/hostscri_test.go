package image

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// described gives hosts in a short form.
func described(hosts []host) string {
	var out []string
	for _, h := range hosts {
		s := strings.Join(h.schemes, "|") + "://" + h.addr + h.prefix
		if h.tls.skipVerify {
			s += " skip"
		}
		if len(h.tls.ca) > 0 {
			s += " " + strings.Join(h.tls.ca, ",")
		}
		out = append(out, s)
	}
	return strings.Join(out, "; ")
}

// TestRegistriesOfContainerd reads the registry table of CRI's configuration, in
// the three places that it has had.
func TestRegistriesOfContainerd(t *testing.T) {
	for _, plugin := range []string{"cri", "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images"} {
		dir := t.TempDir()
		n := &Node{HostsDir: []string{filepath.Join(dir, "certs.d")}}
		n.Containerd = putFile(t, filepath.Join(dir, "config.toml"), strings.ReplaceAll(`
version = 2
imports = ["conf.d/*.toml", "gone.toml"]
[plugins."P".registry.mirrors."docker.io"]
  endpoint = ["https://mirror.test", "cache.test/hub", "http://127.0.0.1:5000"]
[plugins."P".registry.mirrors."own.test"]
  endpoint = ["http://own.test"]
[plugins."P".registry.mirrors."dir.test"]
  endpoint = ["http://not.this"]
[plugins."P".registry.configs."mirror.test".tls]
  ca_file = "/ca.pem"
[plugins."P".registry.configs."registry-1.docker.io".auth]
  auth = "aHViOnA="
[plugins."other".registry]
  mirrors = 3
`, "P", plugin))
		putFile(t, filepath.Join(dir, "conf.d", "a.toml"), strings.ReplaceAll(`
imports = ["../config.toml"]
[plugins."P".registry.mirrors."*"]
  endpoint = ["https://all.test"]
[plugins."P".registry.configs."skip.test".tls]
  insecure_skip_verify = true
[plugins."P".registry.configs."reg.test".auth]
  identitytoken = "ident"
`, "P", plugin))
		putFile(t, filepath.Join(dir, "certs.d", "dir.test", "hosts.toml"), "server = \"https://s.test\"\n")
		for registry, want := range map[string]string{
			"docker.io": "https://mirror.test/v2 /ca.pem; https://cache.test/hub; http://127.0.0.1:5000/v2; https://registry-1.docker.io/v2",
			"own.test":  "http://own.test/v2",
			"skip.test": "https://all.test/v2; https://skip.test/v2 skip",
			"dir.test":  "https://s.test/v2",
		} {
			hosts, err := n.hosts(registry, nil, false)
			if got := described(hosts); err != nil || got != want {
				t.Errorf("%s: %s: %v\n%s\nwant\n%s", plugin, registry, err, got, want)
			}
		}
		for registry, want := range map[string]string{"docker.io": "hub", "reg.test": "ident", "mirror.test": ""} {
			creds, err := n.criAuth(registry)
			got := ""
			for _, ac := range creds {
				got += ac.Username + ac.IdentityToken
			}
			if err != nil || got != want {
				t.Errorf("%s: %s: %q, %v", plugin, registry, got, err)
			}
		}
	}
}

func TestConfigPathOfContainerd(t *testing.T) {
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	n := &Node{Containerd: putFile(t, filepath.Join(dir, "config.toml"), fmt.Sprintf("[plugins.\"io.containerd.cri.v1.images\".registry]\nconfig_path = \"%s:%s\"\n", a, b))}
	putFile(t, filepath.Join(b, "reg.test", "hosts.toml"), `[host."https://b.test"]`)
	hosts, err := n.hosts("reg.test", nil, false)
	if got := described(hosts); err != nil || got != "https://b.test/v2; https://reg.test/v2" {
		t.Errorf("%v: %s", err, got)
	}
	// In containerd's order all of a directory comes before the next one.
	putFile(t, filepath.Join(a, "_default", "hosts.toml"), `[host."https://a.test"]`)
	hosts, err = n.hosts("reg.test", nil, false)
	if got := described(hosts); err != nil || got != "https://a.test/v2; https://reg.test/v2" {
		t.Errorf("%v: %s", err, got)
	}
}

// TestBrokenContainerdConfig: it is said, and what needs none of it goes on.
func TestBrokenContainerdConfig(t *testing.T) {
	const secret = "hunter2"
	for _, text := range []string{
		"[plugins.cri.registry.configs.\"a\".auth]\npassword = hunter2\n",
		"[plugins.cri.registry.configs.\"a\".auth]\npassword = [\"hunter2\"]\n",
		"[plugins.cri.registry]\nmirrors = \"hunter2\"\n",
	} {
		var log bytes.Buffer
		n := &Node{HostsDir: []string{t.TempDir()}, Log: slog.New(slog.NewTextHandler(&log, nil))}
		n.Containerd = putFile(t, filepath.Join(t.TempDir(), "config.toml"), text)
		hosts, err := n.hosts("reg.test", nil, false)
		if got := described(hosts); err != nil || got != "https://reg.test/v2" {
			t.Errorf("%v: %s", err, got)
		}
		if _, err = n.criAuth("reg.test"); !errors.Is(err, ErrMalformed) {
			t.Errorf("credentials: %v", err)
		}
		if said := log.String() + fmt.Sprint(err); !strings.Contains(said, n.Containerd) || !strings.Contains(said, "line 2") || strings.Contains(said, secret) {
			t.Errorf("it is said: %s", said)
		}
	}
	// A circle, and more imports than anybody has.
	dir := t.TempDir()
	for i := range maxImports + 1 {
		putFile(t, filepath.Join(dir, fmt.Sprintf("%d.toml", i)), `imports = ["*.toml"]`)
	}
	if _, err := readCRI(filepath.Join(dir, "0.toml")); !errors.Is(err, ErrMalformed) {
		t.Errorf("many imports: %v", err)
	}
}

// TestHostsAsContainerd has the cases of containerd's docs/hosts.md and
// core/remotes/docker/config that are easily missed.
func TestHostsAsContainerd(t *testing.T) {
	root := t.TempDir()
	write := func(name, text string) { putFile(t, filepath.Join(root, name, "hosts.toml"), text) }
	write("_default", `[host."https://any.test"]`)
	write("docker.io", "server = \"https://docker.io\"\n[host.\"https://registry-1.docker.io\"]\n  capabilities = [\"pull\", \"resolve\"]\n")
	write("only.test", `server = "https://registry.example.com"`)
	write("tls.test", "[host.\"http://192.168.31.250:5000\"]\n  skip_verify = true\n[host.\"http://plain.test:80\"]\n  skip_verify = true\n[host.\"http://bare.test\"]\n")
	write("none.test", "capabilities = []\n")
	write("empty.test", "")
	putFile(t, filepath.Join(root, "empty.test", "ca.crt"), "x")
	putFile(t, filepath.Join(root, "itself.test", "README"), "x") // no mirror of _default
	write("path.test", "[host.\"https://h.test/v2/upstream\"]\noverride_path = true\n[host.\"https://r.test/us\"]\n")
	for registry, want := range map[string]string{
		"other.test":  "https://any.test/v2; https://other.test/v2",
		"docker.io":   "https://registry-1.docker.io/v2; https://registry-1.docker.io/v2",
		"only.test":   "https://registry.example.com/v2",
		"tls.test":    "https|http://192.168.31.250:5000/v2 skip; http://plain.test:80/v2 skip; http://bare.test/v2; https://tls.test/v2",
		"none.test":   "https://none.test/v2",
		"empty.test":  "https://empty.test/v2 " + filepath.Join(root, "empty.test", "ca.crt"),
		"itself.test": "https://itself.test/v2",
		"path.test":   "https://h.test/v2/upstream; https://r.test/us/v2; https://path.test/v2",
	} {
		hosts, err := noNode.hosts(registry, []string{root}, false)
		if d := cmp.Diff(want, described(hosts)); d != "" || err != nil {
			t.Errorf("%s: %v %s", registry, err, d)
		}
		for _, h := range hosts {
			if !h.pull || !h.resolve {
				t.Errorf("%s: %s may not be asked", registry, h.addr)
			}
		}
	}
}

func FuzzContainerdConfig(f *testing.F) {
	f.Add([]byte("imports=[\"a\"]\n[plugins.cri.registry.mirrors.\"*\"]\nendpoint=[\"http://a/b\",\"::\"]\n[plugins.cri.registry.configs.a.tls]\nca_file=\"x\"\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := parseCRI(b)
		if err != nil {
			return
		}
		hosts, err := c.Plugins.V1.Registry.hosts("reg.test")
		if err != nil {
			return
		}
		for i, h := range hosts {
			if h.addr == "" && i < len(hosts)-1 {
				t.Errorf("host %d: %+v", i, h)
			}
		}
	})
}
