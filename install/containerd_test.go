package install

import (
	"context"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/platforms"
	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files")

// golden compares a text with a file of testdata.
func golden(t *testing.T, name, got string) {
	t.Helper()
	arch := strings.TrimPrefix(platforms.Format(platforms.DefaultSpec()), "linux")
	got = strings.ReplaceAll(got, arch+"'", "/amd64'")
	path := filepath.Join("testdata", name)
	if *update {
		must(t, os.MkdirAll("testdata", 0o755))
		must(t, os.WriteFile(path, []byte(got), 0o644))
	}
	want, err := os.ReadFile(path)
	must(t, err)
	if d := cmp.Diff(string(want), got); d != "" {
		t.Errorf("%s (-want +got):\n%s", name, d)
	}
}

const configPath = "/etc/containerd/config.toml"

// debian is the configuration of Debian's package.
const debian = `version = 2

[plugins]
  [plugins."io.containerd.grpc.v1.cri"]
    [plugins."io.containerd.grpc.v1.cri".cni]
      bin_dir = "/usr/lib/cni"
      conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.internal.v1.opt"]
    path = "/var/lib/containerd/opt"
`

// kubernetes is one of version 3, as for a node whose runtime has options and whose
// transfer service has rows.
const kubernetes = `# managed by hand
version = 3
imports = [
  "/etc/containerd/conf.d/registry.toml", # ours
]

[plugins.'io.containerd.cri.v1.images']
  snapshotter = 'overlayfs'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = 'io.containerd.runc.v2'
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
    SystemdCgroup = true
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = 'linux/riscv64'
  snapshotter = 'native'
`

const registry = "version = 3\n[plugins.'io.containerd.cri.v1.images'.registry]\n  config_path = '/etc/containerd/certs.d'\n"

// mirrors makes CRI pull without the transfer service.
const mirrors = "version = 3\n[plugins.'io.containerd.cri.v1.images'.registry.mirrors.\"docker.io\"]\n  endpoint = ['https://mirror.test']\n"

// TestInstall writes the drop-ins for all that differ, twice, and takes them back.
func TestInstall(t *testing.T) {
	for _, tt := range []struct {
		name, version string
		files         map[string]string
		set           func(*Containerd)
	}{
		{"none-1.6", "1.6", nil, nil},
		{"debian-1.6", "1.6.20~ds1", map[string]string{configPath: debian}, nil},
		{"debian-1.6-default", "1.6", map[string]string{configPath: debian}, func(c *Containerd) { c.Default = true }},
		{"debian-1.7-class", "1.7", map[string]string{configPath: debian}, func(c *Containerd) { c.RuntimeClass = true }},
		{"debian-2.2-both", "2.2", map[string]string{configPath: debian}, func(c *Containerd) { c.Default, c.RuntimeClass = true, true }},
		{"debian-2.4-default", "2.4", map[string]string{configPath: debian}, func(c *Containerd) { c.Default = true }},
		{"none-2.4", "v2.4.2", nil, func(c *Containerd) { c.Name = "stargz" }},
		{"kubernetes-2.2-both", "2.2", map[string]string{configPath: kubernetes, "/etc/containerd/conf.d/registry.toml": registry}, func(c *Containerd) { c.Default, c.RuntimeClass = true, true }},
		{"kubernetes-2.0-default", "2.0", map[string]string{configPath: kubernetes, "/etc/containerd/conf.d/registry.toml": registry}, func(c *Containerd) { c.Default = true }},
		{"mirrors-2.2-default", "2.2", map[string]string{configPath: kubernetes, "/etc/containerd/conf.d/registry.toml": mirrors}, func(c *Containerd) { c.Default = true }},
		{"imported-2.2", "2.2", map[string]string{configPath: "version = 3\nimports = ['conf.d/*.toml']\n"}, nil},
		{"crlf-2.2", "2.2", map[string]string{configPath: "# windows\r\nversion = 3\r\n[grpc]\r\n  uid = 0\r\n"}, nil},
		{"empty-list-2.2", "2.2", map[string]string{configPath: "imports = []\nversion = 3"}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newMachine(t, tt.files)
			before := m.tree()
			c := m.containerd(tt.version)
			if tt.set != nil {
				tt.set(c)
			}
			p, err := c.PlanInstall(context.Background())
			must(t, err)
			var s strings.Builder
			p.Changes.Show(&s)
			golden(t, tt.name, s.String())
			if now := m.tree(); now != before {
				t.Errorf("the plan has changed something: %s", now)
			}
			if _, err := c.Do(context.Background(), p); err != nil {
				t.Fatal(err)
			}
			after := m.tree()
			said, err := m.install(c)
			must(t, err)
			if now := m.tree(); now != after || len(said) > 0 {
				t.Errorf("the second installation says %q and leaves:\n%s\nafter the first:\n%s", said, now, after)
			}
			if _, err := m.uninstall(c); err != nil {
				t.Fatal(err)
			}
			// A directory on the way is not taken for one of ours.
			made := newMachine(t, tt.files)
			must(t, os.MkdirAll(filepath.Join(made.dir, "/etc/containerd"), 0o755))
			if p.site.main.covers(p.site.dropIn) {
				must(t, os.MkdirAll(filepath.Join(made.dir, "/etc/containerd/conf.d"), 0o755))
			}
			if d := cmp.Diff(made.tree(), m.tree()); d != "" {
				t.Errorf("what is left (-want +got):\n%s", d)
			}
			if said, err := m.uninstall(c); err != nil || len(said) > 0 {
				t.Errorf("the second removal: %q, %v", said, err)
			}
			if len(m.ran) > 0 {
				t.Errorf("programs were run: %q", m.ran)
			}
		})
	}
}

// TestUninstallAfterEdits takes only the import back where others have edited the file
// since.
func TestUninstallAfterEdits(t *testing.T) {
	for _, tt := range []struct{ before, edit, with, want string }{
		{debian, "version = 2", "version = 2 # still", strings.Replace(debian, "version = 2", "version = 2 # still", 1)},
		{"version = 3\nimports = ['a*.toml']\n", "'a*.toml'", "'b*.toml', 'a*.toml'", "version = 3\nimports = ['b*.toml', 'a*.toml']\n"},
		{"version = 3\nimports = ['a*.toml']\n", "conf.d/varve*.toml\"", "conf.d/varve*.toml\", 'z*.toml'", "version = 3\nimports = ['a*.toml', 'z*.toml']\n"},
		{"version = 3\n", "varve*.toml\"", "varve*.toml\", 'z*.toml'", "imports = ['z*.toml']" + marked + "\nversion = 3\n"},
	} {
		m := newMachine(t, map[string]string{configPath: tt.before})
		c := m.containerd("2.2")
		if _, err := m.install(c); err != nil {
			t.Fatal(err)
		}
		m.put(configPath, strings.Replace(m.get(configPath), tt.edit, tt.with, 1))
		if _, err := m.uninstall(c); err != nil {
			t.Fatal(err)
		}
		if got := m.get(configPath); got != tt.want {
			t.Errorf("%q became %q, want %q", tt.before, got, tt.want)
		}
	}
}

// TestUpgrade changes what an earlier installation wrote.
func TestUpgrade(t *testing.T) {
	m := newMachine(t, map[string]string{configPath: debian})
	c := m.containerd("1.7")
	c.Default = true
	if _, err := m.install(c); err != nil {
		t.Fatal(err)
	}
	// The administrator changes what the drop-in has a copy of.
	edited := strings.Replace(m.get(configPath), "/usr/lib/cni", "/opt/cni", 1)
	m.put(configPath, edited)
	if said, err := m.install(c); err != nil || len(said) != 1 {
		t.Fatal(said, err)
	}
	if got := m.get("/etc/containerd/conf.d/varve.toml"); !strings.Contains(got, "/opt/cni") || strings.Contains(got, "/usr/lib/cni") {
		t.Errorf("the copy is still the old one:\n%s", got)
	}
	if m.get(configPath) != edited {
		t.Error("config.toml was changed again")
	}
}

// TestRefused gives what must not be touched.
func TestRefused(t *testing.T) {
	for _, tt := range []struct {
		name, version, want string
		files               map[string]string
		set                 func(*machine, *Containerd)
	}{
		{"syntax", "2.2", "config.toml, line 2, column", map[string]string{configPath: "version = 3\nimports = [\n"}, nil},
		{"version 1", "1.7", "is of version 1", map[string]string{configPath: "disabled_plugins = [\"cri\"]\n"}, nil},
		{"version of words", "2.2", "none of containerd's", map[string]string{configPath: "version = 'three'\n"}, nil},
		{"imports of numbers", "2.2", "not a path", map[string]string{configPath: "version = 3\nimports = [3]\n"}, nil},
		{"imports of one word", "2.2", "not a list", map[string]string{configPath: "version = 3\nimports = 'x'\n"}, nil},
		{"import missing", "2.2", "file does not exist", map[string]string{configPath: "version = 3\nimports = ['x.toml']\n"}, nil},
		{"import broken", "2.2", "x.toml, line 1", map[string]string{configPath: "version = 3\nimports = ['x*.toml']\n", "/etc/containerd/x.toml": "="}, nil},
		{"bad pattern", "2.2", "syntax error in pattern", map[string]string{configPath: "version = 3\nimports = ['[*']\n"}, nil},
		{"name taken", "2.2", "has proxy_plugins.varve already", map[string]string{configPath: "version = 3\n[proxy_plugins.varve]\n  type = 'snapshot'\n"}, nil},
		{"another name", "2.2", "has this snapshotter as stargz already", map[string]string{configPath: "version = 3\n[proxy_plugins.stargz]\n  type = 'snapshot'\n  address = '/run/varve/snapshotter.sock'\n"}, nil},
		{"containerd's own name", "2.2", "of that name itself", nil, func(_ *machine, c *Containerd) { c.Name = "overlayfs" }},
		{"strange name", "2.2", "small letters", nil, func(_ *machine, c *Containerd) { c.Name = "a b" }},
		{"strange version", "two", "not understood", nil, nil},
		{"old", "1.5", "too old", nil, nil},
		{"no version", "", "say its version", nil, nil},
		{"a class before 1.7", "1.6", "one snapshotter for all pods", nil, func(_ *machine, c *Containerd) { c.RuntimeClass = true }},
		{"not ours", "2.2", "not written by varve", map[string]string{"/etc/containerd/conf.d/varve.toml": "version = 3\n"}, nil},
		{"read-only", "2.2", "read-only (mode 0444)", map[string]string{configPath: "version = 3\n"}, func(m *machine, _ *Containerd) { must(m.t, os.Chmod(m.dir+configPath, 0o444)) }},
		{"a link", "2.2", "is a link to real.toml", map[string]string{"/etc/containerd/real.toml": "version = 3\n"}, func(m *machine, _ *Containerd) { must(m.t, os.Symlink("real.toml", m.dir+configPath)) }},
		{"a directory", "2.2", "is not a file", map[string]string{configPath + "/x": ""}, nil},
		{"huge", "2.2", "at most", map[string]string{configPath: strings.Repeat("#\n", maxFile)}, nil},
		{"two containerds", "2.2", "serves one only", map[string]string{configPath: "version = 3\n", K3s.agentDir() + "/config-v3.toml.d/varve.toml": header + "address = '/run/varve/snapshotter.sock'\n"}, nil},
		{"k3s that never ran", "2.2", "start it once", map[string]string{K3s.agentDir() + "/x": ""}, nil},
		{"k3s with imports", "2.2", "has imports of its own", map[string]string{K3s.agentDir() + "/config.toml": "version = 3\n", K3s.agentDir() + "/config-v3.toml.tmpl": "version = 3\nimports = ['x']\n"}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newMachine(t, tt.files)
			c := m.containerd(tt.version)
			if tt.set != nil {
				tt.set(m, c)
			}
			m.refuses(tt.want, func() error { _, err := m.install(c); return err })
		})
	}
}

// A link or a read-only file is fine where nothing has to be written to it.
func TestImportedAlready(t *testing.T) {
	m := newMachine(t, map[string]string{"/etc/containerd/real.toml": "version = 3\nimports = ['/etc/containerd/conf.d/*.toml']\n"})
	must(t, os.Symlink("real.toml", m.dir+configPath))
	if said, err := m.install(m.containerd("2.2")); err != nil || len(said) != 1 {
		t.Fatal(said, err)
	}
}

// FuzzImports adds an import to any file and takes it away again.
func FuzzImports(f *testing.F) {
	for _, s := range []string{debian, kubernetes, "version = 3\nimports = [ ]\n", "version=3\r\nimports=['a' , \"b\",\r\n]", "imports = ['''\n]''']\nversion = 2 # [imports]\n[a]\nimports = 3", "'version' = 2"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		c, err := parseConfig("/x/config.toml", []byte(text))
		if err != nil || c.covers("/x/varve.toml") || len(c.imports) > 0 && strings.Contains(strings.Join(c.imports, ""), "varve") {
			return
		}
		with, err := addImport([]byte(text), "/x/varve*.toml")
		if err != nil {
			return
		}
		now, err := parseConfig("/x/config.toml", with)
		if err != nil {
			t.Fatalf("%q does not parse: %v", with, err)
		}
		if !now.covers("/x/varve.toml") || len(now.imports) != len(c.imports)+1 || now.version != c.version {
			t.Fatalf("%q became %q", text, with)
		}
		if back, err := removeImport(with, "/x/varve*.toml"); err != nil || string(back) != text {
			t.Fatalf("%q came back as %q: %v", text, back, err)
		}
	})
}
