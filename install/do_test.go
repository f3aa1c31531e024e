package install

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	introspectionapi "github.com/containerd/containerd/api/services/introspection/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// introspection is a containerd that tells of its plugins.
type introspection struct {
	introspectionapi.UnimplementedIntrospectionServer
	failed func() string // what CRI says, "" if it is well
}

func (i *introspection) Plugins(context.Context, *introspectionapi.PluginsRequest) (*introspectionapi.PluginsResponse, error) {
	skipped := &introspectionapi.Plugin{Type: "io.containerd.snapshotter.v1", ID: "btrfs", InitErr: status.New(codes.Unknown, "no btrfs: skip plugin").Proto()}
	cri := &introspectionapi.Plugin{Type: "io.containerd.grpc.v1", ID: "cri"}
	if s := i.failed(); s != "" {
		cri.InitErr = status.New(codes.Unknown, s).Proto()
	}
	return &introspectionapi.PluginsResponse{Plugins: []*introspectionapi.Plugin{skipped, cri}}, nil
}

// node is a machine that systemd runs, with a containerd of version 2.2 whose
// configuration is imported, so that only the drop-in has to be written.
type node struct {
	*machine
	dump     func(dropIn string) (string, error) // nil: it takes everything
	state    string                              // of its unit
	started  int64                               // microseconds after the boot
	failed   string                              // what CRI says after a restart
	restarts int
}

func newNode(t *testing.T) (*node, *Containerd) {
	m := newMachine(t, map[string]string{configPath: "version = 3\nimports = ['/etc/containerd/conf.d/*.toml']\n", "/run/systemd/system/x": ""})
	n := &node{machine: m, state: "active", started: 1}
	m.answer = n.say
	c := m.containerd("")
	c.Node, c.Socket = m.node(false), "/c.sock"
	l, err := net.Listen("unix", m.dir+"/c.sock")
	must(t, err)
	srv := grpc.NewServer()
	introspectionapi.RegisterIntrospectionServer(srv, &introspection{failed: func() string {
		if n.restarts == 0 || !n.exists() {
			return ""
		}
		return n.failed
	}})
	done := make(chan struct{})
	go func() { srv.Serve(l); close(done) }()
	t.Cleanup(func() { srv.Stop(); <-done })
	return n, c
}

const nodeDropIn = "/etc/containerd/conf.d/varve.toml"

func (n *node) exists() bool {
	_, err := os.Stat(n.dir + nodeDropIn)
	return err == nil
}

func (n *node) say(line string) (string, error) {
	switch {
	case line == "containerd --version":
		return "containerd github.com/containerd/containerd/v2 v2.2.1 dea7da592f5d1d2b7755e3a161be07f43fad8f75\n", nil
	case strings.HasSuffix(line, "config dump"):
		b, _ := os.ReadFile(n.dir + nodeDropIn)
		if n.dump != nil {
			return n.dump(string(b))
		}
		return "root = '/r'\n" + string(b), nil
	case strings.HasPrefix(line, "systemctl is-active containerd.service"):
		return n.state + "\n", nil
	case strings.HasPrefix(line, "systemctl show --property=ExecMainStart"):
		return fmt.Sprint(n.started), nil
	case strings.HasPrefix(line, "systemctl show"):
		return "ExecStart={ path=/usr/bin/containerd ; argv[]=/usr/bin/containerd ; }\n", nil
	case line == "systemctl restart containerd.service":
		n.restarts++
		return "", nil
	}
	return "", fmt.Errorf("%s: not known here", line)
}

// TestRestart restarts containerd when it runs with an older configuration, and only
// then.
func TestRestart(t *testing.T) {
	n, c := newNode(t)
	for i, step := range []struct {
		change   func()
		restarts int
		said     string
	}{
		{func() {}, 1, "restarted containerd.service"},
		{func() { n.started = 1 << 60 }, 1, ""}, // it was started just now
		{func() { c.Default = true }, 2, "restarted containerd.service"},
		{func() { n.started = 1 }, 3, "restarted containerd.service"}, // somebody wrote the file and did not restart
		{func() { c.NoRestart = true }, 3, "is left to you"},
		{func() { c.NoRestart = false; n.state = "inactive"; c.Default = false }, 3, "containerd.service does not run"},
	} {
		step.change()
		said, err := n.install(c)
		must(t, err)
		if n.restarts != step.restarts || !strings.Contains(strings.Join(said, "\n"), step.said) || step.said == "" && len(said) > 0 {
			t.Errorf("step %d: %d restarts, %q; want %d, %q", i, n.restarts, said, step.restarts, step.said)
		}
	}
	must(t, os.RemoveAll(n.dir+"/run/systemd"))
	n.state = "active"
	c.Default = true
	if said, err := n.install(c); err != nil || n.restarts != 3 || !strings.Contains(strings.Join(said, "\n"), "restart containerd yourself") {
		t.Errorf("without systemd: %q, %v, %d restarts", said, err, n.restarts)
	}
}

// TestPutBack gives containerds that do not take what was written.
func TestPutBack(t *testing.T) {
	for _, tt := range []struct {
		name, want string
		set        func(*node)
		restarts   int
	}{
		{"refused before", "before anything was changed: containerd does not take", func(n *node) {
			n.dump = func(string) (string, error) { return "", errNo }
		}, 0},
		{"refused after", "does not take /etc/containerd/config.toml: no (everything is as it was)", func(n *node) {
			n.dump = func(d string) (string, error) {
				if d != "" {
					return "", errNo
				}
				return "", nil
			}
		}, 0},
		{"not understood", "what containerd says of", func(n *node) {
			n.dump = func(string) (string, error) { return "= no TOML", nil }
		}, 0},
		{"ignored", "containerd takes <nil> for proxy_plugins.varve", func(n *node) {
			n.dump = func(string) (string, error) { return "root = '/r'\n", nil }
		}, 0},
		{"shadowed", "containerd takes overlayfs for plugins.io.containerd.cri.v1.images.snapshotter", func(n *node) {
			n.dump = func(d string) (string, error) {
				return strings.Replace(d, "cri.v1.images']\n    snapshotter = 'varve'", "cri.v1.images']\n    snapshotter = 'overlayfs'", 1), nil
			}
		}, 0},
		{"side effects", "would also change plugins.other.x from 1 to 2", func(n *node) {
			n.dump = func(d string) (string, error) {
				if d == "" {
					return "[plugins.other]\nx = 1\n", nil
				}
				return d + "\n[plugins.other]\nx = 2\n", nil
			}
		}, 0},
		{"a plugin fails", "io.containerd.grpc.v1.cri: no runtime", func(n *node) { n.failed = "no runtime" }, 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n, c := newNode(t)
			c.Default = true
			tt.set(n)
			n.refuses(tt.want, func() error { _, err := n.install(c); return err })
			if n.restarts != tt.restarts {
				t.Errorf("%d restarts, want %d", n.restarts, tt.restarts)
			}
		})
	}
}

// TestFailedBefore does not take for its own fault what was broken already.
func TestFailedBefore(t *testing.T) {
	n, c := newNode(t)
	n.failed, n.restarts = "broken for long", 1
	n.put(nodeDropIn, header) // as if it had been there
	if said, err := n.install(c); err != nil || n.restarts != 2 {
		t.Error(said, err)
	}
}

// TestWhoseConfig reads the file that the service's command line names.
func TestWhoseConfig(t *testing.T) {
	n, c := newNode(t)
	n.put("/opt/c.toml", "version = 3\nimports = ['/opt/conf.d/*.toml']\n")
	inner := n.answer
	for _, line := range []string{"argv[]=/usr/bin/containerd --config /opt/c.toml ; ", "argv[]=/usr/bin/containerd -c=/opt/c.toml ; "} {
		n.answer = func(asked string) (string, error) {
			if strings.HasPrefix(asked, "systemctl show --property=ExecStart ") {
				return line, nil
			}
			return inner(asked)
		}
		p, err := c.PlanInstall(context.Background())
		must(t, err)
		if len(p.Changes) != 1 || p.Changes[0].Path != "/opt/conf.d/varve.toml" {
			t.Errorf("%s: %+v", line, p.Changes)
		}
	}
	// Of another file's containerd systemd knows nothing.
	c.Config = configPath
	if said, err := n.install(c); err != nil || n.restarts > 0 || !strings.Contains(strings.Join(said, "\n"), "does not read "+configPath) {
		t.Errorf("%q, %v, %d restarts", said, err, n.restarts)
	}
}

// TestK3s installs on nodes whose configuration is generated.
func TestK3s(t *testing.T) {
	dir := K3s.agentDir()
	const generated = "# File generated by k3s. DO NOT EDIT.\nversion = 3\nroot = \"/var/lib/rancher/k3s/agent/containerd\"\n"
	for _, tt := range []struct {
		name  string
		files map[string]string
		want  []string // files that change
	}{
		{"imports", map[string]string{"config.toml": generated + "imports = [\"" + dir + "/config-v3.toml.d/*.toml\"]\n"}, []string{"config-v3.toml.d/varve.toml"}},
		{"no template", map[string]string{"config.toml": generated}, []string{"config-v3.toml.d/varve.toml", "config-v3.toml.tmpl"}},
		{"a template", map[string]string{"config.toml": generated, "config-v3.toml.tmpl": base + "[debug]\n"}, []string{"config-v3.toml.d/varve.toml", "config-v3.toml.tmpl.before-varve", "config-v3.toml.tmpl"}},
		{"version 2", map[string]string{"config.toml": strings.Replace(generated, "3\n", "2\n", 1)}, []string{"config.toml.d/varve.toml", "config.toml.tmpl"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			files := map[string]string{}
			for name, text := range tt.files {
				files[filepath.Join(dir, name)] = text
			}
			m := newMachine(t, files)
			before := m.tree()
			c := m.containerd("2.1")
			p, err := c.PlanInstall(context.Background())
			must(t, err)
			var got []string
			for _, ch := range p.Changes {
				got = append(got, strings.TrimPrefix(ch.Path, dir+"/"))
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("changes %q, want %q", got, tt.want)
			}
			if _, err := c.Do(context.Background(), p); err != nil {
				t.Fatal(err)
			}
			if len(tt.want) > 1 {
				line := importLine(p.site.pattern, "\n")
				if text := m.get(p.site.importIn); !strings.HasPrefix(text, line) || !strings.Contains(text, base) {
					t.Errorf("the template is %q", text)
				}
				// Until it is started again, and after.
				if said, err := m.install(c); err != nil || len(said) > 0 {
					t.Error(said, err)
				}
				m.put(dir+"/config.toml", line+tt.files["config.toml"])
			}
			if said, err := m.install(c); err != nil || len(said) > 0 {
				t.Error(said, err)
			}
			m.put(dir+"/config.toml", tt.files["config.toml"])
			if _, err := m.uninstall(c); err != nil {
				t.Fatal(err)
			}
			os.Remove(filepath.Dir(m.dir + p.site.dropIn)) // stays where k3s had it
			if now := m.tree(); now != before {
				t.Errorf("left:\n%s\nit was:\n%s", now, before)
			}
		})
	}
}
