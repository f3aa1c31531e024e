package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/opencontainers/go-digest"
)

// ErrRefused: the registry does not do what was asked of it, whoever asks: it
// deletes nothing, it takes no such manifest, a blob is too large for it.
var ErrRefused = errors.New("refused")

const (
	leastSpeed   = 64 << 10 // bytes a second that a body must move at, on average
	maxRedirects = 5
	maxURL       = 8 << 10 // bytes of a URL that a registry gives
	maxAnswer    = 32 << 10
)

// line is one host that is spoken to about one repository.
type line struct {
	*session
	wait  func(context.Context, time.Duration) error
	repo  string
	doing string // what errors begin with
}

// call is one request. The zero of what is not set means none.
type call struct {
	method string
	url    *url.URL
	head   http.Header
	body   []byte
	most   int64 // bytes of the answer that are wanted; more are an error
	codes  []int // of success, nil: 200
	stay   bool  // a redirect to another host is the answer, not followed
}

// reply is an answer, read to its end.
type reply struct {
	code int
	head http.Header
	url  *url.URL // where it came from, after redirects
	body []byte   // of a success
}

// at is a path of the repository; the session makes of it what the host wants.
func (l *line) at(path string) *url.URL {
	return &url.URL{Scheme: l.host.schemes[0], Host: l.host.addr, Path: "/v2/" + l.repo + "/" + path}
}

// once sends a request a single time. The error of an answer that is no success
// is a *transport.Error, and the reply is given with it.
func (l *line) once(ctx context.Context, c call) (*reply, error) {
	ctx, cancel := context.WithTimeout(ctx, documentTime+time.Duration(len(c.body)/leastSpeed)*time.Second)
	defer cancel()
	var body io.Reader
	if c.body != nil {
		body = bytes.NewReader(c.body)
	}
	req, err := http.NewRequestWithContext(ctx, c.method, c.url.String(), body)
	if err != nil {
		return nil, scrubbed{err}
	}
	for k, vs := range c.head {
		req.Header[k] = slices.Clone(vs)
	}
	resp, err := (&http.Client{Transport: l.session, CheckRedirect: c.checkRedirect}).Do(req)
	if err != nil {
		return nil, scrubbed{err}
	}
	defer resp.Body.Close()
	a := &reply{code: resp.StatusCode, head: resp.Header, url: req.URL}
	if resp.Request != nil {
		a.url = resp.Request.URL
	}
	codes := c.codes
	if codes == nil {
		codes = []int{http.StatusOK}
	}
	if !slices.Contains(codes, a.code) {
		// As in checkAnswer: the library gets only what was read.
		text, _ := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
		cut := *resp
		cut.Body = io.NopCloser(bytes.NewReader(text))
		return a, transport.CheckError(&cut, codes...)
	}
	if c.most == 0 {
		discard(resp)
		return a, nil
	}
	if a.body, err = io.ReadAll(io.LimitReader(resp.Body, c.most+1)); err != nil {
		return nil, err
	}
	if int64(len(a.body)) > c.most {
		return nil, malformed("%s sends a document of more than %d bytes", l.host.addr, c.most)
	}
	return a, nil
}

// again repeats what fails in a way that passes.
func (l *line) again(ctx context.Context, fn func() (*reply, error)) (*reply, error) {
	pause := 200 * time.Millisecond
	for i := 1; ; i++ {
		a, err := fn()
		if err == nil || i == attempts || !passing(err) {
			return a, err
		}
		var after time.Duration
		if a != nil {
			after = retryAfter(a.head)
		}
		if werr := l.wait(ctx, max(pause, after)); werr != nil {
			return nil, werr
		}
		pause *= 4
	}
}

// checkRedirect keeps a redirect from turning a request into something else or
// leading where it must not. That credentials stay with the host is the
// session's doing.
func (c call) checkRedirect(req *http.Request, via []*http.Request) error {
	from := via[len(via)-1].URL
	if r := req.Response; r != nil && r.Request != nil {
		from = r.Request.URL // with the scheme that was spoken
	}
	switch {
	case c.stay && !strings.EqualFold(req.URL.Hostname(), from.Hostname()):
		return http.ErrUseLastResponse
	case len(via) > maxRedirects:
		return malformed("%s redirects more than %d times", via[0].URL.Host, maxRedirects)
	case req.Method != c.method:
		return malformed("%s redirects %s as %s", from.Host, c.method, req.Method)
	}
	if err := checkPlace(from, req.URL); err != nil {
		return malformed("%s redirects %s", from.Host, err)
	}
	return nil
}

// checkPlace says whether what is at from may send us to another place.
func checkPlace(from, to *url.URL) error {
	switch {
	case to.Scheme != "https" && to.Scheme != "http" || to.Host == "":
		return errors.New("to what is no URL of http or https")
	case to.User != nil:
		return errors.New("to a URL with credentials in it")
	case from.Scheme == "https" && to.Scheme == "http":
		return fmt.Errorf("from HTTPS to plain HTTP at %s", to.Host)
	case isInternal(to.Host) && !isInternal(from.Host),
		isLinkLocal(to.Host) && hostname(to.Host) != hostname(from.Host):
		return fmt.Errorf("to the internal address %s", to.Host)
	}
	return nil
}

// reference resolves a URL that an answer gives, as it is to be asked for.
func (l *line) reference(a *reply, s string) (*url.URL, error) {
	if s == "" || len(s) > maxURL {
		return nil, malformed("%s gives a URL of %d bytes", l.host.addr, len(s))
	}
	u, err := a.url.Parse(s)
	if err != nil {
		return nil, malformed("%s gives what is no URL", l.host.addr)
	}
	u.Fragment, u.RawFragment = "", ""
	if u.Scheme == "http" && a.url.Scheme == "https" && strings.EqualFold(u.Host, a.url.Host) {
		u.Scheme = "https" // it does not know of the TLS before it
	}
	if err := checkPlace(a.url, u); err != nil {
		return nil, malformed("%s leads %s", l.host.addr, err)
	}
	// The session puts the host's own path in the place of /v2.
	if rest, ok := strings.CutPrefix(u.Path, l.host.prefix+"/"); ok && l.ours(u) {
		u.Path, u.RawPath = "/v2/"+rest, ""
	}
	return u, nil
}

// next gives the page after an answer, nil if it was the last. Pages of other
// hosts are not followed.
func (l *line) next(a *reply) (*url.URL, error) {
	s := nextLink(a.head)
	if s == "" {
		return nil, nil
	}
	u, err := l.reference(a, s)
	if err != nil {
		return nil, err
	}
	if !strings.EqualFold(u.Host, a.url.Host) || u.Scheme != a.url.Scheme {
		return nil, malformed("its next page is at another host, %s", clip(u.Host))
	}
	return u, nil
}

// nextLink reads the target of rel="next" from Link headers (RFC 8288).
func nextLink(h http.Header) string {
	for _, v := range h.Values("Link") {
		for {
			_, rest, ok := strings.Cut(v, "<")
			if !ok {
				break
			}
			target, rest, ok := strings.Cut(rest, ">")
			if !ok {
				break
			}
			// The parameters go to the next link; none of ours has a < in it.
			params := rest
			if i := strings.IndexByte(rest, '<'); i >= 0 {
				params = rest[:i]
			}
			for p := range strings.FieldsFuncSeq(params, func(r rune) bool { return r == ';' || r == ',' }) {
				k, rel, _ := strings.Cut(strings.TrimSpace(p), "=")
				if strings.EqualFold(strings.TrimSpace(k), "rel") && slices.Contains(strings.Fields(strings.ToLower(strings.Trim(strings.TrimSpace(rel), `"`))), "next") {
					return target
				}
			}
			v = rest
		}
	}
	return ""
}

// sameDigest checks what the registry says that it has, if it says so.
func (l *line) sameDigest(a *reply, d digest.Digest) error {
	if got := a.head.Get("Docker-Content-Digest"); got != "" && got != d.String() {
		return malformed("%s says that it has %s in place of %s", l.host.addr, clip(got), d)
	}
	return nil
}

// failed gives an error its kind and its words.
func (l *line) failed(err error) error {
	var known *failure
	var answer *transport.Error
	switch {
	case err == nil:
		return nil
	case errors.Is(err, context.Canceled):
		return fmt.Errorf("%s: %w", l.doing, scrubbed{err})
	case errors.As(err, &known):
		return failf(known.kind, err, "%s: %s", l.doing, known.msg)
	case errors.As(err, &answer):
		return l.refusal(answer)
	}
	return failf(ErrUnreachable, err, "%s: registry %s: %s", l.doing, l.host.addr, networkText(l.host.addr, err))
}

func (l *line) refusal(answer *transport.Error) error {
	host, text := l.host.addr, answerText(answer)
	switch code := answer.StatusCode; {
	case code == http.StatusUnauthorized, code == http.StatusForbidden:
		return failf(ErrUnauthorized, answer, "%s: %s denies access, it may require 'docker login %s' or 'podman login %s': %s", l.doing, host, host, host, text)
	case code == http.StatusNotFound:
		return failf(ErrNotFound, answer, "%s: %s says %s", l.doing, host, text)
	case code == http.StatusRequestEntityTooLarge:
		return failf(ErrRefused, answer, "%s: it is too large for %s or a proxy before it: %s", l.doing, host, text)
	case code == http.StatusTooManyRequests:
		return failf(ErrUnreachable, answer, "%s: %s asks to slow down, try again later or log in: %s", l.doing, host, text)
	case code == http.StatusNotImplemented, code >= 400 && code < 500:
		return failf(ErrRefused, answer, "%s: %s refuses it: %s", l.doing, host, text)
	case code >= 500:
		return failf(ErrUnreachable, answer, "%s: %s fails, try again later: %s", l.doing, host, text)
	}
	return failf(ErrMalformed, answer, "%s: %s does not answer as a registry: %s", l.doing, host, text)
}

// renamed says of an error of pulling what was really read: "No such image"
// would mislead.
func renamed(doing string, err error) error {
	var known *failure
	var answer *transport.Error
	if errors.As(err, &answer) && answer.StatusCode == http.StatusNotFound {
		return failf(ErrNotFound, err, "%s: not there: %s", doing, answerText(answer))
	}
	if errors.As(err, &known) {
		return failf(known.kind, err, "%s: %s", doing, known.msg)
	}
	return fmt.Errorf("%s: %w", doing, err)
}

// codesOf are the codes of a registry's error.
func codesOf(err error) []string {
	var answer *transport.Error
	var codes []string
	if errors.As(err, &answer) {
		for _, e := range answer.Errors {
			codes = append(codes, string(e.Code))
		}
	}
	return codes
}
