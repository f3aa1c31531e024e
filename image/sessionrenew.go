package image

import (
	"context"
	"encoding/base64"
	"errors"
	"net/http"
	"slices"
	"sync/atomic"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

const (
	// renewPause keeps a denied session from asking for a token, and trying what was
	// refused before, at every request.
	renewPause = time.Second
	// maxMisses is how many tokens in a row are of no use before the credential that
	// they are given for, which was good, is thought to be no longer.
	maxMisses = 2
	// maxRefused bounds how many of them are remembered.
	maxRefused = 64
)

// errNoMore: all credentials that there are were refused.
var errNoMore = errors.New("no other credential is known")

// state gives how to speak to the host. With used, which the host refused, it
// gives something newer: another's renewal if there was one, else its own, for c
// if the host named a challenge.
func (s *session) state(ctx context.Context, used *state, c challenge) (state, error) {
	select {
	case s.busy <- struct{}{}:
	case <-ctx.Done():
		return state{}, ctx.Err()
	}
	defer func() { <-s.busy }()
	if s.now.err != nil && s.tooSoon(s.now.failed) {
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
	case used != nil && used.turn != st.turn:
		return st, nil // renewed while we waited
	case s.tooSoon(s.barren):
		return state{}, errNoMore
	}
	if c.scheme != "" {
		st.challenge = c
	}
	fresh, err := s.renew(ctx, st, used != nil)
	switch {
	case err == nil:
	case errors.Is(err, errNoMore) && used == nil:
		fresh = st // the host may want none
	case ctx.Err() != nil:
		return state{}, err
	default:
		// The scheme is known all the same.
		s.now.scheme, s.now.challenge = st.scheme, st.challenge
		if errors.Is(err, errNoMore) {
			s.barren = time.Now()
		} else {
			s.now.err, s.now.failed = err, time.Now()
		}
		return state{}, err
	}
	s.now = fresh
	return fresh, nil
}

// tooSoon reports whether nothing can be better than at a time. Who opens an image
// anew may have brought what was missing.
func (s *session) tooSoon(failed time.Time) bool {
	return time.Since(failed) < renewPause && s.opened.Load() <= failed.UnixNano()
}

// renew gives a state with another header than st, which the host has refused if
// refused is set. A token that ran out is asked for again with what it was asked
// for before; then the sources are asked in their order, but for credentials that
// were refused already, then nobody's token, and those last. An answer by HTTP
// stays a *transport.Error.
func (s *session) renew(ctx context.Context, st state, refused bool) (state, error) {
	now := time.Now()
	sources := s.auth.sources()
	if st.header != "" && refused {
		sources = s.turnedDown(&st, sources)
	}
	// same gives what came of the same credential what is known of that.
	same := func(fresh state) state {
		if fresh.sum == st.sum {
			fresh.proven, fresh.misses = st.proven, st.misses
		}
		return fresh
	}
	var denial error
	for _, late := range []bool{false, true} {
		// may says whether a credential is to be tried in this round.
		may := func(sum credentialSum) bool {
			since, no := s.refused[sum]
			return late == no && (!late || now.Sub(since) >= renewPause)
		}
		for _, src := range sources {
			fresh, err := s.try(ctx, st, src, may)
			if err == nil {
				return same(fresh), nil
			}
			if !errors.Is(err, ErrUnauthorized) && !denies(err) && !errors.Is(err, errNoMore) || ctx.Err() != nil {
				return state{}, err
			}
			if denial == nil && !errors.Is(err, errNoMore) {
				denial = err
			}
		}
		if st.challenge.scheme == "bearer" && may(credentialSum{}) {
			fresh, err := s.with(ctx, st, authn.AuthConfig{}, credentialSum{}, "")
			if err == nil {
				return same(fresh), nil
			}
			if !denies(err) || ctx.Err() != nil {
				return state{}, err
			}
			s.refuse(credentialSum{}, "")
			if denial == nil {
				denial = err
			}
		}
	}
	if denial == nil {
		denial = errNoMore
	}
	return state{}, denial
}

// turnedDown notes that the host has refused st, and gives the sources in the
// order in which they are asked now.
func (s *session) turnedDown(st *state, sources []source) []source {
	if st.taken.Load() {
		st.proven, st.misses = true, 0
	} else {
		st.misses++
	}
	if st.proven && st.misses <= maxMisses && st.challenge.scheme == "bearer" && !basic(*st) {
		delete(s.refused, st.sum) // only its token ran out
	} else {
		s.refuse(st.sum, st.from)
	}
	if st.proven {
		return firstOf(sources, st.from)
	}
	return sources
}

// firstOf puts the source of a name before the others.
func firstOf(sources []source, name string) []source {
	i := slices.IndexFunc(sources, func(s source) bool { return s.name == name })
	if i <= 0 {
		return sources
	}
	out := append([]source{sources[i]}, sources[:i]...)
	return append(out, sources[i+1:]...)
}

// try asks one source, and past its cache if what it gives was refused before.
func (s *session) try(ctx context.Context, st state, src source, may func(credentialSum) bool) (state, error) {
	var denial error
	for _, find := range []func(context.Context) ([]authn.AuthConfig, error){src.find, src.again} {
		if find == nil {
			break
		}
		creds, err := find(ctx)
		if err != nil && ctx.Err() == nil {
			return state{}, failf(ErrUnauthorized, err, "%s", err)
		}
		if err != nil {
			return state{}, err
		}
		for _, ac := range creds {
			sum := sumOf(ac)
			if !may(sum) {
				continue
			}
			fresh, err := s.with(ctx, st, ac, sum, src.name)
			if err == nil || !denies(err) {
				return fresh, err
			}
			s.refuse(sum, src.name)
			if denial == nil {
				denial = err
			}
		}
		if len(creds) == 0 {
			break // there is nothing that a cache could be wrong about
		}
	}
	if denial == nil {
		denial = errNoMore
	}
	return state{}, denial
}

// denies reports whether a token service refused a credential.
func denies(err error) bool {
	var answer *transport.Error
	return errors.As(err, &answer) && answer.StatusCode == http.StatusUnauthorized
}

// refuse remembers that the host does not take a credential.
func (s *session) refuse(sum credentialSum, from string) {
	if _, known := s.refused[sum]; !known {
		if s.auth.log != nil && from != "" {
			s.auth.log.Warn("credentials are refused, others are tried", "registry", s.host.addr, "from", from)
		}
		if len(s.refused) >= maxRefused {
			clear(s.refused)
		}
	}
	s.refused[sum] = time.Now()
}

// with gives a state in which requests carry a credential, or the token that it
// is good for.
func (s *session) with(ctx context.Context, st state, ac authn.AuthConfig, sum credentialSum, from string) (state, error) {
	header := basicHeader(ac)
	if st.challenge.scheme == "bearer" {
		scopes := s.scopes
		if sc := st.challenge.scope; sc != "" && !slices.Contains(scopes, sc) {
			scopes = append(slices.Clone(scopes), sc)
		}
		token, err := s.askToken(ctx, st, scopes, ac)
		if err != nil {
			return state{}, tokenError(s.host.addr, err)
		}
		header = "Bearer " + token
	}
	if header == "" {
		return state{}, errNoMore // an identity token is of no use without a token service
	}
	return state{
		scheme: st.scheme, challenge: st.challenge,
		header: header, turn: st.turn + 1, from: from, sum: sum, taken: new(atomic.Bool),
	}, nil
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
