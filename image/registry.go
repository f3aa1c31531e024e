package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// registry is an image in a registry, with the mirrors before it.
type registry struct {
	name     Name
	log      *slog.Logger
	sessions []*session // mirrors in order, the registry last
	insecure bool
	base     http.RoundTripper
	wait     func(context.Context, time.Duration) error
}

func (r *Registries) remote(n Name, o Options) (*registry, error) {
	hosts, err := r.Node.hosts(n.domain, o.HostsDir, o.Insecure)
	if err != nil {
		return nil, err
	}
	g := &registry{name: n, log: o.Log, insecure: o.Insecure, base: o.Base, wait: r.wait}
	if g.log == nil {
		g.log = r.log
	}
	if g.base == nil {
		g.base = r.base
	}
	for _, h := range hosts {
		s, err := r.session(n, h, o, []string{scopeOf(n.repo, "pull")})
		if err != nil {
			return nil, err
		}
		g.sessions = append(g.sessions, s)
	}
	return g, nil
}

func (g *registry) Close() error { return nil }

// url is a path of the repository on a session's host; the session makes of it
// what the host wants.
func (g *registry) url(s *session, kind, id string) string {
	u := url.URL{Scheme: s.host.schemes[0], Host: s.host.addr, Path: "/v2/" + g.name.repo + "/" + kind + "/" + id}
	return u.String()
}

func (g *registry) Resolve(ctx context.Context, platform string) (*Manifest, error) {
	return resolve(g.name, platform, func(want *ocispec.Descriptor) ([]byte, string, error) {
		id, pinned := g.name.tag, false
		switch {
		case want != nil:
			id, pinned = want.Digest.String(), true
		case g.name.digest != "":
			id, pinned = g.name.digest.String(), true
		}
		var pin digest.Digest
		if pinned {
			pin = digest.Digest(id)
		}
		return g.get(ctx, "manifests", id, pin, strings.Join(manifestTypes, ", "), MaxManifest)
	})
}

func (g *registry) Config(ctx context.Context, m *Manifest) ([]byte, error) {
	d := m.ConfigDesc
	if len(d.Data) > 0 && verify(d.Digest, d.Data) == nil {
		return d.Data, nil
	}
	raw, _, err := g.get(ctx, "blobs", d.Digest.String(), d.Digest, "", MaxConfig)
	return raw, err
}

func (g *registry) Blob(l Layer) (Blob, error) {
	if err := l.Digest.Validate(); err != nil {
		return Blob{}, failf(ErrMalformed, err, "layer %q: %s", clip(string(l.Digest)), err)
	}
	b := Blob{Digest: l.Digest, Size: l.Size}
	// A foreign layer is where its URLs say and perhaps in the registry. They
	// come from the manifest: an address inside is not what they are for, and one
	// of the link, where clouds hand out credentials, never.
	for _, s := range l.URLs {
		if u, err := url.Parse(s); err == nil && !isLinkLocal(u.Host) && (g.insecure || !isInternal(u.Host)) {
			b.Origins = append(b.Origins, Origin{URL: s, Transport: foreign{g.base}, Registry: u.Host})
		}
	}
	for _, s := range g.sessions {
		if s.host.pull {
			b.Origins = append(b.Origins, Origin{URL: g.url(s, "blobs", l.Digest.String()), Transport: s, Registry: s.host.addr})
		}
	}
	return b, nil
}

// get reads one small document, from the first host that has it with the right
// digest. The error is that of the registry itself, which is asked last.
func (g *registry) get(ctx context.Context, kind, id string, pin digest.Digest, accept string, most int64) ([]byte, string, error) {
	var last error
	for _, s := range g.sessions {
		if !s.host.pull || !s.host.resolve && pin == "" {
			continue
		}
		raw, mediaType, err := g.try(ctx, s, kind, id, accept, most)
		if err == nil && pin != "" {
			err = verify(pin, raw)
		}
		if err == nil {
			return raw, mediaType, nil
		}
		if ctx.Err() != nil {
			return nil, "", fmt.Errorf("pull %s: %w", g.name.Familiar(), classify(g.name, s.host.addr, ctx.Err()))
		}
		last = classify(g.name, s.host.addr, err)
		if s != g.sessions[len(g.sessions)-1] {
			g.log.Warn("mirror failed, the next is asked", "ref", g.name.Familiar(), "host", s.host.addr, "err", last)
		}
	}
	if last == nil {
		last = failf(ErrUnreachable, nil, "pull %s: hosts.toml leaves no host that may be asked for it", g.name.Familiar())
	}
	return nil, "", last
}

// documentTime bounds the reading of one document of a few MiB.
const documentTime = 2 * time.Minute

// attempts is how often a host is asked that fails in a way that passes.
const attempts = 3

func (g *registry) try(ctx context.Context, s *session, kind, id, accept string, most int64) (raw []byte, mediaType string, err error) {
	ctx, cancel := context.WithTimeout(ctx, documentTime)
	defer cancel()
	pause := 200 * time.Millisecond
	for i := range attempts {
		var after time.Duration
		raw, mediaType, after, err = g.ask(ctx, s, kind, id, accept, most)
		if err == nil || !passing(err) || i == attempts-1 {
			break
		}
		if g.wait(ctx, max(pause, after)) != nil {
			break
		}
		pause *= 4
	}
	return raw, mediaType, err
}

func (g *registry) ask(ctx context.Context, s *session, kind, id, accept string, most int64) ([]byte, string, time.Duration, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, g.url(s, kind, id), nil)
	if err != nil {
		return nil, "", 0, err
	}
	if accept != "" {
		req.Header.Set("Accept", accept)
	}
	resp, err := (&http.Client{Transport: s}).Do(req)
	if err != nil {
		return nil, "", 0, scrubbed{err}
	}
	defer resp.Body.Close()
	if err := checkAnswer(resp); err != nil {
		return nil, "", retryAfter(resp.Header), err
	}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, most+1))
	if err != nil {
		return nil, "", 0, err
	}
	if int64(len(raw)) > most {
		return nil, "", 0, about(g.name, malformed("%s sends a document of more than %d bytes", s.host.addr, most))
	}
	return raw, resp.Header.Get("Content-Type"), 0, nil
}

// retryAfter is what the host asks for, up to the patience of one who waits at
// a terminal.
func retryAfter(h http.Header) time.Duration {
	n, err := strconv.Atoi(h.Get("Retry-After"))
	if err != nil || n < 0 {
		return 0
	}
	return time.Duration(min(n, 10)) * time.Second
}

// passing reports whether the same request may do better in a moment.
func passing(err error) bool {
	var answer *transport.Error
	if errors.As(err, &answer) {
		return answer.StatusCode == http.StatusTooManyRequests || answer.StatusCode >= 500 && answer.StatusCode != http.StatusNotImplemented
	}
	return errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) ||
		errors.Is(err, syscall.EPIPE) || errors.Is(err, net.ErrClosed)
}

// ggcrRegistry is n's registry as go-containerregistry writes it.
func ggcrRegistry(n Name) name.Registry {
	r, err := name.NewRegistry(n.domain)
	if err != nil {
		return name.Registry{}
	}
	return r
}

// hubAlias lets go-containerregistry, which knows docker.io as
// index.docker.io, use a session for the host that serves it.
type hubAlias struct{ *session }

func (h hubAlias) RoundTrip(req *http.Request) (*http.Response, error) {
	n := h.host.addr
	if !h.ours(req.URL) && (req.URL.Host == name.DefaultRegistry && n == dockerHub || req.URL.Host == h.host.ns) {
		req = req.Clone(req.Context())
		req.URL.Host, req.Host = n, ""
		req.URL.Scheme = h.host.schemes[0]
	}
	return h.session.RoundTrip(req)
}

// foreign is the transport of a foreign layer's URLs. It sees redirects too.
type foreign struct{ http.RoundTripper }

func (f foreign) RoundTrip(req *http.Request) (*http.Response, error) {
	if isLinkLocal(req.URL.Host) {
		if req.Body != nil {
			req.Body.Close()
		}
		return nil, malformed("a foreign layer leads to the link-local address %s", req.URL.Host)
	}
	return f.RoundTripper.RoundTrip(req)
}

// checkAnswer gives the error of an answer that is not 200. The library loses
// the status of one that is long or breaks off: it gets only what was read here.
func checkAnswer(resp *http.Response) error {
	if resp.StatusCode == http.StatusOK {
		return nil
	}
	const most = 32 << 10
	text, _ := io.ReadAll(io.LimitReader(resp.Body, most))
	cut := *resp
	cut.Body = io.NopCloser(bytes.NewReader(text))
	return transport.CheckError(&cut, http.StatusOK)
}
