package image

import (
	"context"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/opencontainers/go-digest"
)

// A Source holds one image, or several of one name. It is safe for use by
// several goroutines. What its blobs point at may be read until Close.
type Source interface {
	// Resolve finds the manifest for a platform; "" is this machine's.
	Resolve(ctx context.Context, platform string) (*Manifest, error)
	// Config gives the bytes of the image config, checked against its digest,
	// at most MaxConfig of them.
	Config(ctx context.Context, m *Manifest) ([]byte, error)
	// Blob says where a layer's bytes are. It asks no network.
	Blob(l Layer) (Blob, error)
	Close() error
}

// Blob says where a blob's bytes are: at Origins over HTTP, the preferred
// first, or in Local. They are not yet checked against the digest.
type Blob struct {
	Digest  digest.Digest
	Size    int64
	Origins []Origin
	Local   io.ReaderAt // nil if remote; Size bytes from 0; valid until the Source is closed
}

// Origin is one place to GET a blob from, by range. Transport must be used for
// URL and for all it redirects to: it settles the scheme, adds what the host
// wants, and gives other hosts no credential.
type Origin struct {
	URL       string
	Transport http.RoundTripper
	Registry  string // host, for logs and metrics of a closed set of hosts
}

// Options say how an image is opened. The zero value works.
type Options struct {
	Insecure bool              // plain HTTP and unverified TLS, also elsewhere than on the loopback
	Auth     Auth              // where credentials are looked for
	HostsDir []string          // directories of hosts.toml and certificates; nil: containerd's and docker's
	Log      *slog.Logger      // nil: that of the Registries
	Base     http.RoundTripper // nil: that of the Registries
}

// Registries is a daemon's memory of registries: connections, schemes and
// tokens, one for each repository and set of credentials, however many mounts
// use it. It is safe for use by several goroutines.
type Registries struct {
	// Node is what the machine knows, nil for nothing. It is set before the first
	// use.
	Node *Node

	log  *slog.Logger
	base http.RoundTripper
	wait func(context.Context, time.Duration) error // between attempts

	listing listings // how registries are asked what refers to a manifest

	mu       sync.Mutex // guards the maps
	tuned    map[tunedKey]http.RoundTripper
	sessions map[sessionKey]*session
}

type tunedKey struct {
	base http.RoundTripper
	tls  string
}

type sessionKey struct {
	base             http.RoundTripper
	tls              string
	schemes          string
	addr, prefix, ns string
	header           string
	registry, repo   string
	actions          string
	auth             Auth
}

// NewRegistries makes an empty memory. A nil base is Go's transport with time
// limits that suit blobs, proxies taken from the environment.
func NewRegistries(log *slog.Logger, base http.RoundTripper) *Registries {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	if base == nil {
		base = newTransport()
	}
	return &Registries{
		log: log, base: base, wait: sleep,
		tuned:    map[tunedKey]http.RoundTripper{},
		sessions: map[sessionKey]*session{},
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Close closes idle connections.
func (r *Registries) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	type idler interface{ CloseIdleConnections() }
	if t, ok := r.base.(idler); ok {
		t.CloseIdleConnections()
	}
	for _, rt := range r.tuned {
		if t, ok := rt.(idler); ok {
			t.CloseIdleConnections()
		}
	}
	return nil
}

// Source opens what n names. Of a registry nothing is asked yet; a layout or
// archive is opened and its list of members read.
func (r *Registries) Source(n Name, o Options) (Source, error) {
	switch n.kind {
	case remoteKind:
		return r.remote(n, o)
	case layoutKind:
		return openLayout(n)
	case archiveKind:
		return openArchive(n)
	case idKind:
		return nil, failf(ErrNotFound, nil, "No such image: %s: an ID names only what is already here, name its repository to pull it", n)
	}
	return nil, malformed("invalid reference format: the name is empty")
}

// Transport gives what a client of go-containerregistry needs to read and
// write the repository of n at its registry: remote.Write and its kin take it by
// remote.WithTransport and then neither ping nor ask for a token. Its token is
// for pulling and pushing n's repository. More names repositories of the same
// registry that it may pull from too, so that blobs can be mounted from them:
//
//	rt, err := registries.Transport(n, options, "library/debian")
//	...
//	err = remote.Write(ref, img, remote.WithTransport(rt))
//
// Where it leads is what [Registries.Endpoint] says.
func (r *Registries) Transport(n Name, o Options, more ...string) (http.RoundTripper, error) {
	s, err := r.pushSession(n, o, more)
	if err != nil {
		return nil, err
	}
	// A Wrapper is how that library is told that a transport is complete; this
	// is the one way to make one that adds nothing.
	return transport.FromToken(ggcrRegistry(n), authn.Anonymous, hubAlias{s}, &transport.Challenge{}, nil)
}

// Endpoint says where an image is pushed to: the root of the API, which ends in
// "/v2/", and what speaks to it with a token that may pull and push n's
// repository and pull the repositories in more. It asks no network.
//
//	base, rt, err := registries.Endpoint(n, options, "library/debian")
//	...
//	u := base.JoinPath(n.Repository(), "blobs", "uploads", "/")
//	u.RawQuery = url.Values{"mount": {digest}, "from": {"library/debian"}}.Encode()
//	resp, err := (&http.Client{Transport: rt}).Post(u.String(), "", nil)
//
// The transport settles what the URL leaves open, as [Origin] says: the scheme
// where there is a choice, the path and the headers that hosts.toml gives. It
// may be used for all that the registry answers with, the Location of an upload
// too: what lies on another host gets no credential. A request whose body can
// be sent once more (GetBody) survives a token that ran out.
//
// The place is the registry itself, for docker.io the host that serves it;
// mirrors are passed by, but for the first one of hosts.toml whose capabilities
// name push.
func (r *Registries) Endpoint(n Name, o Options, more ...string) (base *url.URL, rt http.RoundTripper, err error) {
	s, err := r.pushSession(n, o, more)
	if err != nil {
		return nil, nil, err
	}
	return &url.URL{Scheme: s.host.schemes[0], Host: s.host.addr, Path: "/v2/"}, s, nil
}

// pushSession gives the session for pushing n.
func (r *Registries) pushSession(n Name, o Options, more []string) (*session, error) {
	if n.kind != remoteKind {
		return nil, malformed("%s is in no registry", n.Familiar())
	}
	hosts, err := r.Node.hosts(n.domain, o.HostsDir, o.Insecure)
	if err != nil {
		return nil, err
	}
	target := hosts[len(hosts)-1]
	if i := slices.IndexFunc(hosts, func(h host) bool { return h.push }); i >= 0 {
		target = hosts[i]
	}
	scopes := []string{scopeOf(n.repo, "pull,push")}
	for _, repo := range more {
		if scope := scopeOf(repo, "pull"); repo != n.repo && !slices.Contains(scopes, scope) {
			scopes = append(scopes, scope)
		}
	}
	return r.session(n, target, o, scopes)
}

// session gives the one session for a host, repository and credentials.
func (r *Registries) session(n Name, h host, o Options, scopes []string) (*session, error) {
	base := o.Base
	if base == nil {
		base = r.base
	}
	build, tlsKey, err := tuned(base, h)
	if err != nil {
		return nil, err
	}
	// Credentials of the registry are for the registry; a mirror has its own.
	auth := lookup{auth: o.Auth, node: r.Node, log: o.Log, registry: n.domain, repository: n.repo}
	if auth.log == nil {
		auth.log = r.log
	}
	if h.ns != "" {
		auth.registry, auth.behind = h.addr, n.domain
	}
	if !reflect.TypeOf(base).Comparable() {
		return newSession(h, build(), auth, scopes...), nil
	}
	key := sessionKey{
		base: base, tls: tlsKey, schemes: strings.Join(h.schemes, " "),
		addr: h.addr, prefix: h.prefix, ns: h.ns, header: headerKey(h.header),
		registry: auth.registry, repo: n.repo, actions: strings.Join(scopes, " "), auth: o.Auth,
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if s := r.sessions[key]; s != nil {
		s.opened.Store(time.Now().UnixNano())
		return s, nil
	}
	rt := r.tuned[tunedKey{base, tlsKey}]
	if rt == nil {
		rt = build()
		r.tuned[tunedKey{base, tlsKey}] = rt
	}
	if len(r.sessions) >= maxSessions {
		r.forget()
	}
	s := newSession(h, rt, auth, scopes...)
	r.sessions[key] = s
	return s, nil
}

// maxSessions bounds what is remembered of repositories, among it the credentials
// that callers sent. Who uses a session keeps it.
const maxSessions = 1024

// forget drops the session that was opened longest ago. The caller holds mu.
func (r *Registries) forget() {
	var oldest sessionKey
	first := true
	for key, s := range r.sessions {
		if first || s.opened.Load() < r.sessions[oldest].opened.Load() {
			oldest, first = key, false
		}
	}
	delete(r.sessions, oldest)
}

func headerKey(h http.Header) string {
	var b strings.Builder
	h.Write(&b)
	return b.String()
}
