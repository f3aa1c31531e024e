package image

import (
	"context"
	"encoding/base64"
	"errors"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
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

	busy chan struct{} // held, by sending into it, while state is read or changed
	now  state         // guarded by busy
}

// state is what a session has found out; it is replaced, not changed.
type state struct {
	scheme    string // "" before the first answer
	challenge challenge
	header    string // Authorization, "" for none
	err       error  // why the last renewal failed
	failed    time.Time
}

// renewPause keeps a denied session from asking for a token at every request.
const renewPause = time.Second

func newSession(h host, base http.RoundTripper, auth lookup, scopes ...string) *session {
	return &session{host: h, base: base, auth: auth, scopes: scopes, busy: make(chan struct{}, 1)}
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
	// The first refusal may be for want of a credential, a second one for a
	// password that ran out.
	for try := 0; try < 2 && err == nil && refused(resp, st); try++ {
		again, ok := rewound(req)
		if !ok {
			return resp, nil
		}
		fresh, ferr := s.state(req.Context(), &st, parseChallenge(resp.Header))
		if ferr != nil && resp.StatusCode == http.StatusUnauthorized {
			discard(resp)
			return nil, ferr
		}
		if ferr != nil || fresh.header == st.header || try > 0 && !basic(fresh) {
			return resp, nil
		}
		discard(resp)
		st = fresh
		resp, err = s.send(again, st)
	}
	return resp, err
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
// 403 to nobody, or under basic authentication, with which ECR says that a
// password ran out.
func refused(resp *http.Response, st state) bool {
	switch resp.StatusCode {
	case http.StatusUnauthorized:
		return true
	case http.StatusForbidden:
		return st.header == "" || basic(st)
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
	for k, vs := range s.host.header {
		out.Header[k] = slices.Clone(vs)
	}
	if out.Header.Get("User-Agent") == "" {
		out.Header.Set("User-Agent", userAgent)
	}
	if st.header != "" {
		out.Header.Set("Authorization", st.header)
	}
	return s.base.RoundTrip(out)
}

// state gives how to speak to the host. With used it gives something newer
// than used: another's renewal if there was one, else its own, for c if the
// host named a challenge.
func (s *session) state(ctx context.Context, used *state, c challenge) (state, error) {
	select {
	case s.busy <- struct{}{}:
	case <-ctx.Done():
		return state{}, ctx.Err()
	}
	defer func() { <-s.busy }()
	if s.now.err != nil && time.Since(s.now.failed) < renewPause {
		return state{}, s.now.err
	}
	st := s.now
	st.err = nil
	switch {
	case st.scheme == "":
		var err error
		if st.scheme, st.challenge, err = s.ping(ctx); err != nil {
			return state{}, err
		}
	case used == nil && s.now.err == nil:
		return st, nil
	case used != nil && used.header != st.header:
		return st, nil // renewed while we waited
	}
	if c.scheme != "" {
		st.challenge = c
	}
	header, err := s.authorize(ctx, st)
	if err != nil {
		if ctx.Err() == nil {
			// The scheme is known all the same.
			s.now.scheme, s.now.challenge = st.scheme, st.challenge
			s.now.err, s.now.failed = err, time.Now()
		}
		return state{}, err
	}
	st.header = header
	s.now = st
	return st, nil
}

// authorize asks files, helpers and the token service. An answer by HTTP stays
// a *transport.Error.
func (s *session) authorize(ctx context.Context, st state) (string, error) {
	ac, err := s.auth.AuthorizationContext(ctx)
	if err != nil {
		return "", err
	}
	if st.challenge.scheme == "bearer" {
		scopes := s.scopes
		if sc := st.challenge.scope; sc != "" && !slices.Contains(scopes, sc) {
			scopes = append(slices.Clone(scopes), sc)
		}
		token, err := askToken(ctx, s.base, s.host.addr, st.scheme == "http", st.challenge, scopes, *ac)
		if err != nil {
			return "", tokenError(s.host.addr, err)
		}
		return "Bearer " + token, nil
	}
	return basicHeader(*ac), nil
}

func basicHeader(ac authn.AuthConfig) string {
	switch {
	case ac.RegistryToken != "":
		return "Bearer " + ac.RegistryToken
	case ac.Username != "" || ac.Password != "":
		return "Basic " + base64.StdEncoding.EncodeToString([]byte(ac.Username+":"+ac.Password))
	}
	return ""
}

// tokenError turns what a token service says about the credentials into a
// refusal: some answer a wrong password with 400.
func tokenError(addr string, err error) error {
	var answer *transport.Error
	if errors.As(err, &answer) && answer.StatusCode >= 400 && answer.StatusCode < 500 && answer.StatusCode != http.StatusTooManyRequests {
		return &transport.Error{StatusCode: http.StatusUnauthorized, Errors: []transport.Diagnostic{{
			Code: transport.UnauthorizedErrorCode, Message: "its token service says " + answerText(answer),
		}}}
	}
	return err
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
