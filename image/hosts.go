package image

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// dockerHub is the host that serves the registry called docker.io.
const dockerHub = "registry-1.docker.io"

// Where containerd and docker keep what they know of registries.
var defaultHostsDirs = []string{"/etc/containerd/certs.d", "/etc/docker/certs.d"}

// host is one place to ask for the images of a registry: a mirror, or the
// registry itself.
type host struct {
	schemes []string // to be tried in this order until one answers
	addr    string   // host or host:port
	prefix  string   // path of the API's root, "/v2" if not overridden
	ns      string   // the registry's name, told to a host that is not it
	pull    bool     // may be asked for manifests and blobs by digest
	resolve bool     // may say which digest a tag has
	push    bool     // a mirror that is to be pushed to in the registry's place
	header  http.Header
	tls     tlsFiles
	dial    time.Duration // time to connect, 0 for the default
}

// tlsFiles are the paths and switches that make a TLS configuration.
type tlsFiles struct {
	ca         []string
	client     [][2]string // certificate and key; no key: in the same file
	skipVerify bool
}

func (t tlsFiles) isZero() bool { return len(t.ca) == 0 && len(t.client) == 0 && !t.skipVerify }

// hostTable is a host's table in hosts.toml, and its top level for the server.
type hostTable struct {
	Capabilities []string       `toml:"capabilities"`
	CA           any            `toml:"ca"`
	Client       any            `toml:"client"`
	SkipVerify   bool           `toml:"skip_verify"`
	Header       map[string]any `toml:"header"`
	OverridePath bool           `toml:"override_path"`
	DialTimeout  string         `toml:"dial_timeout"`
}

// hosts gives the hosts to ask for a registry, in order, the registry itself
// last. dirs are those of hosts.toml, none for what the node says; n may be nil.
// The files are read at every call: they may change under a daemon that runs for
// months.
func (n *Node) hosts(registry string, dirs []string, insecure bool) ([]host, error) {
	var cri criRegistry
	if n != nil && len(dirs) == 0 {
		if n.Containerd != "" {
			cri = n.cri()
		}
		dirs = n.HostsDir
		if len(dirs) == 0 {
			dirs = cri.dirs()
		}
	}
	if len(dirs) == 0 {
		dirs = defaultHostsDirs
	}
	hosts, err := hostsIn(dirs, registry)
	if err == nil && hosts == nil {
		if hosts, err = cri.hosts(registry); hosts == nil {
			hosts = []host{{}}
		}
	}
	if err != nil {
		return nil, err
	}
	for i := range hosts {
		hosts[i].complete(registry, cri, insecure)
	}
	return hosts, nil
}

// hostsIn gives what the first directory says that is there for a registry, nil
// if none is. As with containerd an empty one says that there is nothing to say.
func hostsIn(roots []string, registry string) ([]host, error) {
	for _, dir := range hostDirs(roots, registry) {
		if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
			continue
		} else if err != nil {
			return nil, fmt.Errorf("mirrors of registry %s: %w", registry, err)
		}
		file := filepath.Join(dir, "hosts.toml")
		b, err := readBounded(file, maxConfig)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("mirrors of registry %s: %w", registry, err)
		}
		if len(b) == 0 {
			certs, err := certFiles(dir)
			if err != nil {
				return nil, fmt.Errorf("certificates of registry %s: %w", registry, err)
			}
			return []host{{tls: certs}}, nil
		}
		hosts, err := parseHosts(dir, b)
		if err != nil {
			return nil, failf(ErrMalformed, err, "mirrors of registry %s: %s: %s", registry, file, err)
		}
		return hosts, nil
	}
	return nil, nil
}

// complete fills in what the files left open.
func (h *host) complete(registry string, cri criRegistry, insecure bool) {
	if h.addr == "" {
		h.addr, h.prefix, h.pull, h.resolve = registry, "/v2", true, true
	}
	if h.addr == "docker.io" { // which serves no images, but stands in containerd's own examples
		h.addr = dockerHub
	}
	if h.tls.isZero() {
		h.tls = cri.tls(h.addr)
	}
	if h.addr != registry && (registry != "docker.io" || h.addr != dockerHub) {
		h.ns = registry
	}
	if insecure && h.ns == "" {
		h.tls.skipVerify = true
	}
	if len(h.schemes) > 0 {
		// Who says something of TLS for a host that is written with http means it,
		// if the port leaves it open (containerd's core/remotes/docker/config).
		if h.schemes[0] == "http" && !h.tls.isZero() && !strings.HasSuffix(h.addr, ":80") {
			h.schemes = []string{"https", "http"}
		}
		return
	}
	switch {
	case isLoopback(h.addr):
		// As docker does: nobody listens in on the loopback, and a registry there
		// seldom has a certificate.
		h.tls.skipVerify = h.tls.skipVerify || h.tls.isZero()
		h.schemes = []string{"http", "https"}
	case insecure:
		h.schemes = []string{"https", "http"}
	default:
		h.schemes = []string{"https"}
	}
}

// hostDirs lists the directories that could describe a registry, in containerd's
// order: in each root the ways to write a port, then the default for all.
func hostDirs(roots []string, registry string) []string {
	names := []string{registry}
	if i := strings.LastIndexByte(registry, ':'); i > 0 && !strings.HasSuffix(registry, "]") {
		name := registry[:i] + "_" + registry[i+1:] + "_"
		names = []string{name, strings.ReplaceAll(name, ":", ""), registry, registry[:i] + "_" + registry[i+1:]}
	}
	var dirs []string
	for _, root := range roots {
		for _, name := range append(names, "_default") {
			dirs = append(dirs, filepath.Join(root, name))
		}
	}
	return dirs
}

// parseHosts reads a hosts.toml. Relative paths in it are from dir. The last
// host is the server; its addr is empty if that is the registry itself.
func parseHosts(dir string, b []byte) ([]host, error) {
	var file struct {
		hostTable
		Server string               `toml:"server"`
		Hosts  map[string]hostTable `toml:"host"`
	}
	if err := toml.Unmarshal(b, &file); err != nil {
		return nil, err
	}
	var hosts []host
	for _, name := range hostOrder(b, file.Hosts) {
		h, err := file.Hosts[name].host(dir, name)
		if err != nil {
			return nil, fmt.Errorf("host %q: %w", clip(name), err)
		}
		if h.addr == "" {
			return nil, fmt.Errorf("host %q is no URL", clip(name))
		}
		hosts = append(hosts, h)
	}
	server, err := file.host(dir, file.Server)
	if err != nil {
		return nil, fmt.Errorf("server %q: %w", clip(file.Server), err)
	}
	return append(hosts, server), nil
}

// hostOrder gives the keys of the host table as they stand in the file, which
// a map does not keep; those written in another form than [host."x"] follow.
func hostOrder(b []byte, hosts map[string]hostTable) []string {
	var order []string
	p := unstable.Parser{}
	p.Reset(b)
	for p.NextExpression() {
		e := p.Expression()
		if e.Kind != unstable.Table {
			continue
		}
		var parts []string
		for it := e.Key(); it.Next(); {
			parts = append(parts, string(it.Node().Data))
		}
		if len(parts) < 2 || parts[0] != "host" || slices.Contains(order, parts[1]) {
			continue
		}
		if _, ok := hosts[parts[1]]; ok {
			order = append(order, parts[1])
		}
	}
	var rest []string
	for name := range hosts {
		if !slices.Contains(order, name) {
			rest = append(rest, name)
		}
	}
	slices.Sort(rest)
	return append(order, rest...)
}

func (t hostTable) host(dir, server string) (host, error) {
	var h host
	if server != "" {
		if !strings.Contains(server, "://") {
			server = "https://" + server
		}
		u, err := url.Parse(server)
		if err != nil {
			return h, errors.New("not a URL")
		}
		if u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
			return h, errors.New("not a URL of http or https")
		}
		if u.User != nil {
			return h, errors.New("credentials belong into auth.json, not into the URL")
		}
		h.schemes, h.addr = []string{u.Scheme}, u.Host
		h.prefix = strings.TrimSuffix(path.Clean("/"+u.Path), "/")
		if !t.OverridePath && !strings.HasSuffix(h.prefix, "/v2") {
			h.prefix += "/v2"
		}
	}
	h.pull, h.resolve = len(t.Capabilities) == 0, len(t.Capabilities) == 0
	for _, c := range t.Capabilities {
		switch strings.ToLower(c) {
		case "pull":
			h.pull = true
		case "resolve":
			h.resolve = true
		case "push":
			// Only where it is written out: containerd takes a host without a list for
			// one that does all, but few who name a mirror mean to publish there.
			h.push = true
		}
	}
	if t.DialTimeout != "" {
		d, err := time.ParseDuration(t.DialTimeout)
		if err != nil || d < 0 {
			return h, fmt.Errorf("dial_timeout %q is no duration", clip(t.DialTimeout))
		}
		h.dial = d
	}
	for key, value := range t.Header {
		vs, err := stringList(value)
		if err != nil {
			return h, fmt.Errorf("header %q: %w", clip(key), err)
		}
		if h.header == nil {
			h.header = http.Header{}
		}
		h.header[http.CanonicalHeaderKey(key)] = vs
	}
	ca, err := stringList(t.CA)
	if err != nil {
		return h, fmt.Errorf("ca: %w", err)
	}
	for _, file := range ca {
		h.tls.ca = append(h.tls.ca, absIn(dir, file))
	}
	if h.tls.client, err = clientPairs(dir, t.Client); err != nil {
		return h, fmt.Errorf("client: %w", err)
	}
	h.tls.skipVerify = t.SkipVerify
	return h, nil
}

// clientPairs reads the three forms of client: a file, files, pairs of files.
func clientPairs(dir string, v any) ([][2]string, error) {
	if s, ok := v.(string); ok {
		v = []any{s}
	}
	list, ok := v.([]any)
	if !ok && v != nil {
		return nil, errors.New("neither a path nor a list of them")
	}
	var pairs [][2]string
	for _, e := range list {
		files, err := stringList(e)
		switch {
		case err != nil:
			return nil, err
		case len(files) == 1:
			pairs = append(pairs, [2]string{absIn(dir, files[0])})
		case len(files) == 2:
			pairs = append(pairs, [2]string{absIn(dir, files[0]), absIn(dir, files[1])})
		default:
			return nil, fmt.Errorf("a pair of %d files", len(files))
		}
	}
	return pairs, nil
}

func stringList(v any) ([]string, error) {
	switch v := v.(type) {
	case nil:
		return nil, nil
	case string:
		return []string{v}, nil
	case []any:
		var list []string
		for _, e := range v {
			s, ok := e.(string)
			if !ok {
				return nil, fmt.Errorf("%T where a string should be", e)
			}
			list = append(list, s)
		}
		return list, nil
	}
	return nil, fmt.Errorf("%T where a string or a list of them should be", v)
}

func absIn(dir, file string) string {
	if filepath.IsAbs(file) {
		return file
	}
	return filepath.Join(dir, file)
}

// certFiles finds docker's form: *.crt are CAs, X.cert with X.key a client.
func certFiles(dir string) (tlsFiles, error) {
	var t tlsFiles
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return t, nil
	}
	if err != nil {
		return t, err
	}
	for _, e := range entries {
		file := filepath.Join(dir, e.Name())
		switch filepath.Ext(file) {
		case ".crt":
			t.ca = append(t.ca, file)
		case ".cert":
			pair := [2]string{file}
			key := strings.TrimSuffix(file, ".cert") + ".key"
			if _, err := os.Stat(key); err == nil {
				pair[1] = key
			}
			t.client = append(t.client, pair)
		}
	}
	return t, nil
}
