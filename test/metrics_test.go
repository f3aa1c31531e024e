package test

import (
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/varvefs/varve/bench/forms"
)

func scrape(t *testing.T, c *http.Client, url string) string {
	t.Helper()
	resp, err := c.Get(url)
	must(t, err)
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	must(t, err)
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("GET %s: %s", url, resp.Status)
	}
	return string(b)
}

// overSocket gives a client of the daemon's socket, whose idle connections are the
// caller's to close.
func (h *host) overSocket() *http.Client {
	return &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(h.root, "run/varve.sock"))
	}}}
}

func TestMetrics(t *testing.T) {
	needRoot(t)
	l, names := small(t, 20, 50_000)
	plain := newLayer(t)
	plain.file("plain", []byte("x"))
	_, ref := serve(t, forms.EStargz, l)
	_, whole := serve(t, forms.Gzip, plain.bytes())
	h := newHost(t)
	dir := h.ok("mount", "--face", "fuse", ref)
	h.ok("mount", "--wait", whole)
	helper(t, "sum", filepath.Join(dir, names[0]))
	if _, err := os.Lstat(filepath.Join(dir, "nowhere")); err == nil {
		t.Error("a name that is not there")
	}
	over := h.overSocket()
	text := scrape(t, over, "http://varve/metrics")
	for _, want := range []string{
		`varve_build_info\{goversion="go[^"]+",revision="[^"]*",version="[^"]+"\} 1`,
		`varve_mounts\{face="fuse",state="mounted"\} 1`,
		`varve_mount_duration_seconds_count\{result="ok"\} 2`,
		`varve_fuse_request_duration_seconds_count\{op="read",result="ok"\} [1-9]`,
		`varve_fuse_request_duration_seconds_count\{op="lookup",result="ok"\} [1-9]`,
		`varve_read_bytes_total\{source="registry"\} [1-9]`,
		`varve_fetch_requests_total\{code="2xx",reason="demand"\} 1`,
		`varve_fetch_bytes_total\{reason="(demand|index)"\} [1-9]`,
		`varve_fetch_duration_seconds_count\{reason="demand"\} 1`,
		`varve_lazy_fallbacks_total\{reason="no_index"\} 1`,
		`varve_store_bytes [1-9]`,
		`process_open_fds [1-9]`,
		`go_goroutines [1-9]`,
	} {
		if !regexp.MustCompile(`(?m)^` + want).MatchString(text) {
			t.Errorf("no metric %s", want)
		}
	}
	// Labels come from small sets: never a digest, a path or an address.
	for _, never := range []string{"sha256:", h.root, "127.0.0.1", "files/"} {
		if strings.Contains(text, never) {
			t.Errorf("%q stands in the metrics", never)
		}
	}
	if got := scrape(t, over, "http://varve/livez"); got != "ok\n" {
		t.Errorf("livez: %q", got)
	}
	h.ok("umount", "--all")
	if text := scrape(t, over, "http://varve/metrics"); !strings.Contains(text, `varve_mounts{face="fuse",state="mounted"} 0`) {
		t.Error("an unmounted image is still counted")
	}
	over.CloseIdleConnections()
}

// TestMetricsPort serves Prometheus on a loopback address, and on no other.
func TestMetricsPort(t *testing.T) {
	h := newHost(t)
	h.fails(1, "daemon", "--metrics", "0.0.0.0:0")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	addr := l.Addr().String()
	l.Close()
	must(t, os.MkdirAll(filepath.Join(h.root, "config"), 0o755))
	must(t, os.WriteFile(filepath.Join(h.root, "config", "config.toml"), []byte("metrics = \""+addr+"\"\n"), 0o644))
	h.ok("ps")
	if text := scrape(t, http.DefaultClient, "http://"+addr+"/metrics"); !strings.Contains(text, "varve_build_info") {
		t.Errorf("metrics: %q", text)
	}
	resp, err := http.Get("http://" + addr + "/v1/mounts")
	must(t, err)
	resp.Body.Close()
	if resp.StatusCode != http.StatusNotFound {
		t.Errorf("the port serves more than metrics: %s", resp.Status)
	}
	http.DefaultClient.CloseIdleConnections()
	h.stop()
	must(t, os.WriteFile(filepath.Join(h.root, "config", "config.toml"), []byte("metrisc = \"\"\n"), 0o644))
	if line := h.fails(1, "ps"); !strings.Contains(line, "metrisc") {
		t.Errorf("an unknown setting is not named: %s", line)
	}
}
