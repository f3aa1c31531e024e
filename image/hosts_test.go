package image

import (
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var noNode *Node

func TestParseHosts(t *testing.T) {
	got, err := parseHosts("/d", []byte(`
server = "https://reg.test/"
future = 1
[host."https://z.test"]
  capabilities = ["pull"]
  ca = "ca.pem"
  [host."https://z.test".header]
    x-key = ["a", "b"]
[host."http://a.test:80/proxy"]
  client = [["c.pem", "/k.pem"], ["both.pem"]]
  skip_verify = true
[host."https://o.test/api"]
  override_path = true
  capabilities = ["resolve", "pull", "later"]
`))
	if err != nil {
		t.Fatal(err)
	}
	want := []host{
		{schemes: []string{"https"}, addr: "z.test", prefix: "/v2", pull: true, header: http.Header{"X-Key": {"a", "b"}}, tls: tlsFiles{ca: []string{"/d/ca.pem"}}},
		{schemes: []string{"http"}, addr: "a.test:80", prefix: "/proxy/v2", pull: true, resolve: true,
			tls: tlsFiles{client: [][2]string{{"/d/c.pem", "/k.pem"}, {"/d/both.pem"}}, skipVerify: true}},
		{schemes: []string{"https"}, addr: "o.test", prefix: "/api", pull: true, resolve: true},
		{schemes: []string{"https"}, addr: "reg.test", prefix: "/v2", pull: true, resolve: true},
	}
	if d := cmp.Diff(want, got, cmp.AllowUnexported(host{}, tlsFiles{})); d != "" {
		t.Error(d)
	}
}

func TestHostsFor(t *testing.T) {
	root := t.TempDir()
	write := func(name, text string) {
		file := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("a.test:5000/hosts.toml", `[host."https://one.test"]`)
	write("b.test_5000_/hosts.toml", `[host."https://two.test"]`)
	write("_default/hosts.toml", `[host."https://any.test"]`)
	write("bad.test/hosts.toml", `[host`)
	write("docker.test/ca.crt", "x")
	for registry, want := range map[string]string{
		"a.test:5000": "one.test a.test:5000",
		"b.test:5000": "two.test b.test:5000",
		"c.test":      "any.test c.test",
		"docker.io":   "any.test registry-1.docker.io",
		"docker.test": "docker.test",
	} {
		hosts, err := noNode.hosts(registry, []string{root}, false)
		if err != nil {
			t.Errorf("%s: %v", registry, err)
			continue
		}
		var got []string
		for i, h := range hosts {
			got = append(got, h.addr)
			if last := i == len(hosts)-1; last != (h.ns == "") || !last && h.ns != registry {
				t.Errorf("%s: host %s has ns %q", registry, h.addr, h.ns)
			}
		}
		if s := strings.Join(got, " "); s != want {
			t.Errorf("%s: %s, want %s", registry, s, want)
		}
	}
	_, err := noNode.hosts("bad.test", []string{root}, false)
	if !errors.Is(err, ErrMalformed) || !strings.Contains(err.Error(), filepath.Join(root, "bad.test/hosts.toml")) {
		t.Errorf("bad toml: %v", err)
	}
}

func TestSchemes(t *testing.T) {
	for _, tt := range []struct {
		registry string
		insecure bool
		want     string
	}{
		{"localhost:5000", false, "http https"},
		{"127.0.0.1:5000", false, "http https"},
		{"[::1]:5000", false, "http https"},
		{"10.0.0.1:5000", false, "https"},
		{"reg.test", false, "https"},
		{"reg.test", true, "https http"},
	} {
		hosts, err := noNode.hosts(tt.registry, []string{t.TempDir()}, tt.insecure)
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(hosts[0].schemes, " "); got != tt.want {
			t.Errorf("%s: %s, want %s", tt.registry, got, tt.want)
		}
	}
}

func FuzzParseHosts(f *testing.F) {
	f.Add([]byte("server = \"https://x\"\n[host.\"http://y\"]\nca=[\"a\"]\n"))
	f.Add([]byte("[host]\n\"a\" = {client=[[\"x\",\"y\"]]}\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		hosts, err := parseHosts("/d", b)
		if err == nil && len(hosts) == 0 {
			t.Error("no host at all")
		}
		for i, h := range hosts[:max(len(hosts)-1, 0)] {
			if h.addr == "" || len(h.schemes) != 1 {
				t.Errorf("host %d: %+v", i, h)
			}
		}
	})
}
