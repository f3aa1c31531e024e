package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

// ggcr's own bearer transport is not used: it asks for a token once for every
// request that meets a 401, however many wait, keeps a refresh token in place
// of the helpers, runs a helper for every request under basic authentication,
// and refuses token services at private addresses even to a registry that is
// at one.

// challenge is what a registry wants: the parsed WWW-Authenticate.
type challenge struct {
	scheme  string // "bearer", "basic", "" for nothing
	realm   string
	service string
	scope   string
}

var challengeParam = regexp.MustCompile(`([a-zA-Z_]+)="([^"]*)"`)

// parseChallenge takes the first challenge that can be met.
func parseChallenge(h http.Header) challenge {
	for _, v := range h.Values("WWW-Authenticate") {
		scheme, rest, _ := strings.Cut(strings.TrimSpace(v), " ")
		c := challenge{scheme: strings.ToLower(scheme)}
		if c.scheme != "bearer" && c.scheme != "basic" {
			continue
		}
		for _, m := range challengeParam.FindAllStringSubmatch(rest, -1) {
			switch strings.ToLower(m[1]) {
			case "realm":
				c.realm = m[2]
			case "service":
				c.service = m[2]
			case "scope":
				c.scope = m[2]
			}
		}
		return c
	}
	return challenge{}
}

// tokenTime bounds one request for a token, ping or the like.
const tokenTime = 30 * time.Second

// askToken gives a bearer token for the scopes. What hosts.toml adds to requests
// it adds here too, as containerd does: tokens may depend on it.
func (s *session) askToken(ctx context.Context, st state, scopes []string, ac authn.AuthConfig) (string, error) {
	if ac.RegistryToken != "" {
		return ac.RegistryToken, nil
	}
	addr, plain, c := s.host.addr, st.scheme == "http", st.challenge
	ctx, cancel := context.WithTimeout(ctx, tokenTime)
	defer cancel()
	u, err := url.Parse(c.realm)
	if err != nil || c.realm == "" {
		return "", malformed("registry %s names no token service", addr)
	}
	if err := checkRealm(u, addr, plain); err != nil {
		return "", err
	}
	client := &http.Client{Transport: s.base, CheckRedirect: func(req *http.Request, via []*http.Request) error {
		if len(via) >= 5 || req.Method != http.MethodGet {
			return errors.New("token service redirects")
		}
		// Go keeps Authorization for subdomains; a secret goes nowhere but to
		// the host it was meant for.
		if req.URL.Host != via[0].URL.Host || req.URL.Scheme != via[0].URL.Scheme {
			req.Header.Del("Authorization")
			for k := range s.host.header {
				req.Header.Del(k)
			}
		}
		return checkRealm(req.URL, addr, plain)
	}}
	if ac.IdentityToken != "" {
		token, err := s.postToken(ctx, client, *u, c.service, scopes, ac.IdentityToken)
		var answer *transport.Error
		if !errors.As(err, &answer) || answer.StatusCode != http.StatusNotFound && answer.StatusCode != http.StatusMethodNotAllowed {
			return token, err
		}
		// Not every service has the OAuth2 form.
	}
	q := u.Query()
	if c.service != "" {
		q.Set("service", c.service)
	}
	q["scope"] = scopes
	u.RawQuery = q.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return "", err
	}
	s.addHeader(req)
	if ac.Username != "" || ac.Password != "" {
		req.SetBasicAuth(ac.Username, ac.Password)
	}
	return readToken(client.Do(req))
}

// postToken trades an identity token (docker login with OAuth) for a token.
func (s *session) postToken(ctx context.Context, client *http.Client, u url.URL, service string, scopes []string, identity string) (string, error) {
	form := url.Values{
		"grant_type":    {"refresh_token"},
		"refresh_token": {identity},
		"client_id":     {"varve"},
		"scope":         {strings.Join(scopes, " ")},
	}
	if service != "" {
		form.Set("service", service)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, u.String(), strings.NewReader(form.Encode()))
	if err != nil {
		return "", err
	}
	s.addHeader(req)
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	return readToken(client.Do(req))
}

func readToken(resp *http.Response, err error) (string, error) {
	if err != nil {
		return "", scrubbed{err}
	}
	defer resp.Body.Close()
	if err := checkAnswer(resp); err != nil {
		return "", err
	}
	var t struct {
		Token       string `json:"token"`
		AccessToken string `json:"access_token"`
	}
	// The answer may hold a secret even when it is not understood: its text
	// goes into no error.
	if json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&t) != nil || t.Token == "" && t.AccessToken == "" {
		return "", malformed("the token service %s gives no token", resp.Request.URL.Host)
	}
	if t.Token == "" {
		t.Token = t.AccessToken
	}
	return t.Token, nil
}

// checkRealm keeps a registry from sending the daemon, and the credentials, to
// plain HTTP or to addresses inside, such as a cloud's metadata service. A
// registry that is inside itself may have its token service there too.
func checkRealm(u *url.URL, addr string, plain bool) error {
	switch {
	case u.Scheme != "https" && (u.Scheme != "http" || !plain):
		return failf(ErrUnauthorized, nil, "registry %s names a token service that is not HTTPS", addr)
	case u.User != nil:
		return failf(ErrUnauthorized, nil, "registry %s names a token service with credentials in its URL", addr)
	case isInternal(u.Host) && !isInternal(addr) && hostname(u.Host) != hostname(addr):
		return failf(ErrUnauthorized, nil, "registry %s names a token service at the internal address %s", addr, u.Host)
	case isLinkLocal(u.Host) && hostname(u.Host) != hostname(addr):
		return failf(ErrUnauthorized, nil, "registry %s names a token service at the link-local address %s", addr, u.Host)
	}
	return nil
}

// scopeOf is the scope of a repository in the token protocol.
func scopeOf(repository, actions string) string {
	return fmt.Sprintf("repository:%s:%s", repository, actions)
}
