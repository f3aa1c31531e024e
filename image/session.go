package image

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"time"
)

// userAgent is what registries see of us.
const userAgent = "varve"

// session is one repository on one host with one set of credentials: the
// transport that all its manifests and blobs share. The first request finds
// out how the host is to be spoken to, with no ping before it: that would cost
// every cold mount a round trip. A 401 is met with one new token for all that
// wait. Requests for other hosts, where a blob was redirected to, pass
// through bare.
//
// Requests are made for https://ADDR/v2/...; the scheme, the path and the ns
// parameter are set here.
type session struct {
	host   host
	base   http.RoundTripper
	auth   lookup
	scopes []string
	opened atomic.Int64 // last by a caller, in nanoseconds of Unix time

	busy    chan struct{}               // held, by sending into it, while what follows is read or changed
	now     state                       // how the host is spoken to
	refused map[credentialSum]time.Time // credentials that the host did not take, and when
	barren  time.Time                   // when there was none left
}

// state is what a session has found out; it is replaced, not changed.
type state struct {
	scheme    string // "" before the first answer
	challenge challenge
	header    string        // Authorization, "" for none
	turn      int           // how often the header was made anew
	from      string        // the source of the credential in it
	sum       credentialSum // of that
	taken     *atomic.Bool  // the host took it once; nil without a header
	proven    bool          // the host took another token for the same credential
	misses    int           // tokens since then that it did not take
	err       error         // why the last renewal failed
	failed    time.Time
}

func newSession(h host, base http.RoundTripper, auth lookup, scopes ...string) *session {
	s := &session{
		host: h, base: base, auth: auth, scopes: scopes,
		busy: make(chan struct{}, 1), refused: map[credentialSum]time.Time{},
	}
	s.opened.Store(time.Now().UnixNano())
	return s
}

// RoundTrip implements http.RoundTripper.
func (s *session) RoundTrip(req *http.Request) (*http.Response, error) {
	if !s.ours(req.URL) {
		return s.base.RoundTrip(req)
	}
	resp, st, err := s.first(req)
	if err != nil {
		if req.Body != nil {
			req.Body.Close()
		}
		return nil, err
	}
	if resp == nil {
		resp, err = s.send(req, st)
	}
	// The first refusal may be for want of a credential, others for one that ran
	// out or is of no use here.
	for try := 0; try < maxTries && err == nil && refused(resp, st); try++ {
		again, ok := rewound(req)
		if !ok {
			return resp, nil
		}
		fresh, ferr := s.state(req.Context(), &st, parseChallenge(resp.Header))
		if ferr != nil && resp.StatusCode == http.StatusUnauthorized && !errors.Is(ferr, errNoMore) {
			discard(resp)
			return nil, ferr
		}
		if ferr != nil {
			return resp, nil
		}
		discard(resp)
		st = fresh
		resp, err = s.send(again, st)
	}
	if err == nil && st.taken != nil && takes(resp) {
		st.taken.Store(true)
	}
	return resp, err
}

// maxTries bounds how many credentials one request is sent with.
const maxTries = 8

// takes reports whether an answer says that the host took the credential.
func takes(resp *http.Response) bool {
	return resp.StatusCode < 400 || resp.StatusCode == http.StatusNotFound || resp.StatusCode == http.StatusRequestedRangeNotSatisfiable
}

// rewound gives req to be sent once more, if its body can be.
func rewound(req *http.Request) (*http.Request, bool) {
	if req.Body == nil || req.Body == http.NoBody {
		return req, true
	}
	if req.GetBody == nil {
		return nil, false
	}
	body, err := req.GetBody()
	if err != nil {
		return nil, false
	}
	again := req.Clone(req.Context())
	again.Body = body
	return again, true
}

func basic(st state) bool { return strings.HasPrefix(st.header, "Basic ") }

// first gives how to speak to the host, and, where req itself was what found
// that out, its answer. Others wait for it.
func (s *session) first(req *http.Request) (*http.Response, state, error) {
	if req.Body == nil || req.Body == http.NoBody {
		select {
		case s.busy <- struct{}{}:
		case <-req.Context().Done():
			return nil, state{}, req.Context().Err()
		}
		if s.now.scheme == "" && s.now.err == nil {
			defer func() { <-s.busy }()
			return s.open(req)
		}
		<-s.busy
	}
	st, err := s.state(req.Context(), nil, challenge{})
	return nil, st, err
}

// open sends the first request of a session, by each scheme that the host may
// speak. The caller holds busy.
func (s *session) open(req *http.Request) (resp *http.Response, st state, err error) {
	var worst error
	for _, scheme := range s.host.schemes {
		st = state{scheme: scheme}
		resp, err = s.send(req, st)
		if err == nil && s.spoken(resp, scheme) {
			s.now = st
			return resp, st, nil
		}
		if err == nil {
			discard(resp)
			err = errors.New("it speaks TLS")
		}
		if worst == nil {
			worst = err
		}
	}
	return nil, state{}, worst
}

// spoken reports whether an answer settles the scheme: a server of TLS answers
// plain HTTP with a 400, where it answers at all.
func (s *session) spoken(resp *http.Response, scheme string) bool {
	return scheme != "http" || len(s.host.schemes) == 1 || resp.StatusCode != http.StatusBadRequest
}

// refused reports whether new credentials could help: after a 401, and after a
// 403 to nobody, to a token that was never taken, or under basic authentication,
// with which ECR says that a password ran out.
func refused(resp *http.Response, st state) bool {
	switch resp.StatusCode {
	case http.StatusUnauthorized:
		return true
	case http.StatusForbidden:
		return st.header == "" || basic(st) || !st.taken.Load()
	}
	return false
}

// ours reports whether a URL is on the session's own host. While the scheme is
// not settled both are: what is to be asked is written as https.
func (s *session) ours(u *url.URL) bool {
	for _, scheme := range s.host.schemes {
		if withPort(u.Host, u.Scheme) == withPort(s.host.addr, scheme) && (u.Scheme == scheme || len(s.host.schemes) > 1) {
			return true
		}
	}
	return len(s.host.schemes) > 1 && u.Host == s.host.addr
}

func withPort(addr, scheme string) string {
	addr = strings.ToLower(addr)
	u := url.URL{Host: addr}
	if u.Port() != "" {
		return addr
	}
	if scheme == "http" {
		return addr + ":80"
	}
	return addr + ":443"
}

// send sends a copy of req with what the host wants, so that the caller's
// request, whose headers http.Client takes along to where it is redirected,
// never carries a credential.
func (s *session) send(req *http.Request, st state) (*http.Response, error) {
	out := req.Clone(req.Context())
	out.URL.Scheme = st.scheme
	if rest, ok := strings.CutPrefix(out.URL.Path, "/v2/"); ok && s.host.prefix != "/v2" {
		out.URL.Path, out.URL.RawPath = s.host.prefix+"/"+rest, ""
	}
	if s.host.ns != "" {
		q := out.URL.Query()
		q.Set("ns", s.host.ns)
		out.URL.RawQuery = q.Encode()
	}
	s.addHeader(out)
	if st.header != "" {
		out.Header.Set("Authorization", st.header)
	}
	return s.base.RoundTrip(out)
}

// addHeader adds what hosts.toml says.
func (s *session) addHeader(req *http.Request) {
	for k, vs := range s.host.header {
		req.Header[k] = slices.Clone(vs)
	}
	if req.Header.Get("User-Agent") == "" {
		req.Header.Set("User-Agent", userAgent)
	}
}

// ping finds the scheme and the challenge. Any answer by HTTP settles the
// scheme; what does not look like a registry will show at the first manifest,
// and many mirrors have no such page.
func (s *session) ping(ctx context.Context) (string, challenge, error) {
	ctx, cancel := context.WithTimeout(ctx, tokenTime)
	defer cancel()
	var first error
	for _, scheme := range s.host.schemes {
		u := url.URL{Scheme: scheme, Host: s.host.addr, Path: "/v2/"}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
		if err != nil {
			return "", challenge{}, err
		}
		resp, err := s.send(req, state{scheme: scheme})
		if err != nil {
			if first == nil {
				first = err
			}
			continue
		}
		discard(resp)
		if !s.spoken(resp, scheme) {
			continue
		}
		c := challenge{}
		if resp.StatusCode == http.StatusUnauthorized {
			c = parseChallenge(resp.Header)
		}
		return scheme, c, nil
	}
	return "", challenge{}, first
}

// discard reads the little that is left, so that the connection is kept.
func discard(resp *http.Response) {
	io.CopyN(io.Discard, resp.Body, 64<<10)
	resp.Body.Close()
}
