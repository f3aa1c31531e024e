package commit

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/varvefs/varve/image"
)

// Limits of a conversation with a registry. None is on a whole body.
const (
	stallTime    = 60 * time.Second // for one step of progress, or an answer
	sourceTime   = 5 * time.Minute  // for the source, which resumes by itself
	commitTime   = 5 * time.Minute  // for a registry to put a large blob in its place
	removeTime   = 5 * time.Second
	maxRedirects = 5
	maxLocation  = 8 << 10 // bytes of a URL
	maxAnswer    = 64 << 10
	maxTries     = 8  // failures in a row without progress
	firstTries   = 4  // the same before the registry has answered at all
	maxFailures  = 60 // of one blob in all
	maxPause     = 60 * time.Second
)

// client speaks to the target's registry.
type client struct {
	http  *http.Client
	base  url.URL
	repo  string
	stall time.Duration
	wait  func(context.Context, time.Duration) error
	met   atomic.Bool // it has answered
}

func newClient(o PushOptions) *client {
	host := o.Target.Registry()
	if host == "docker.io" {
		// As Docker Hub's API is called; the transport knows where it really is.
		host = "index.docker.io"
	}
	c := &client{base: url.URL{Scheme: "https", Host: host}, repo: o.Target.Repository(), stall: o.stall, wait: o.wait}
	if o.Base != nil {
		c.base = url.URL{Scheme: o.Base.Scheme, Host: o.Base.Host}
	}
	if c.stall == 0 {
		c.stall = stallTime
	}
	if c.wait == nil {
		c.wait = sleep
	}
	c.http = &http.Client{Transport: o.Transport, CheckRedirect: checkRedirect}
	return c
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

func (c *client) url(path string, query url.Values) *url.URL {
	u := c.base
	u.Path = "/v2/" + c.repo + "/" + path
	u.RawQuery = query.Encode()
	return &u
}

// answer is a response, read to its end as far as it matters.
type answer struct {
	code  int
	head  http.Header
	url   *url.URL // where it came from, after redirects
	moved bool     // redirected to another host
	size  int64    // Content-Length, -1 if not told
	text  []byte   // of an error
}

// request is what is sent. body makes the bytes anew for a redirect or for new
// credentials; nil: none.
type request struct {
	method   string
	url      *url.URL
	head     http.Header
	body     func(context.Context, *watch) (io.ReadCloser, error)
	length   int64
	patience time.Duration // for the answer after the body; 0: the client's
}

// once sends a request a single time. The error is final unless passing.
func (c *client) once(ctx context.Context, r request) (_ *answer, passing bool, _ error) {
	if r.patience == 0 {
		r.patience = c.stall
	}
	rctx, w := newWatch(ctx, max(r.patience, c.stall))
	defer w.stop()
	w.stall, w.answer = c.stall, r.patience
	req, err := http.NewRequestWithContext(rctx, r.method, r.url.String(), nil)
	if err != nil {
		return nil, false, pushErrorf(image.ErrMalformed, nil, "%s: the URL of the upload cannot be used", r.url.Host)
	}
	for k, v := range r.head {
		req.Header[k] = v
	}
	if r.body != nil {
		var open io.Closer
		req.GetBody = func() (io.ReadCloser, error) {
			if open != nil {
				open.Close()
			}
			b, err := r.body(rctx, w)
			if err == nil {
				open = b
			}
			return b, err
		}
		req.ContentLength = r.length
		if req.Body, err = req.GetBody(); err != nil {
			if cause := context.Cause(rctx); cause != nil && ctx.Err() == nil {
				err = cause
			}
			err, passing = networkError(ctx, r.url.Host, err)
			return nil, passing, err
		}
		// The transport may read on after an early answer: not from here on.
		defer func() { open.Close() }()
	}
	resp, err := c.http.Do(req)
	if err != nil {
		if cause := context.Cause(rctx); cause != nil && ctx.Err() == nil {
			err = cause
		}
		err, passing = networkError(ctx, r.url.Host, err)
		return nil, passing, err
	}
	defer resp.Body.Close()
	c.met.Store(true)
	a := &answer{code: resp.StatusCode, head: resp.Header, size: resp.ContentLength, url: resp.Request.URL}
	a.moved = len(req.URL.Host) > 0 && resp.Request.Response != nil && !strings.EqualFold(a.url.Host, r.url.Host)
	a.text, _ = io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	passing = a.code == http.StatusTooManyRequests || a.code == http.StatusRequestTimeout ||
		a.code >= 500 && a.code != http.StatusNotImplemented
	return a, passing, nil
}

// remove asks a registry to forget an upload. It is a courtesy, paid also by a
// push that was cancelled, but not for long: registries clean up by themselves.
func (c *client) remove(ctx context.Context, place *url.URL) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), removeTime)
	defer cancel()
	c.once(ctx, request{method: http.MethodDelete, url: place})
}

// ask sends a request without a body, again while that may help.
func (c *client) ask(ctx context.Context, b *budget, doing string, r request) (*answer, error) {
	for {
		a, passing, err := c.once(ctx, r)
		if !passing {
			return a, err
		}
		if err == nil {
			err = a.failed(doing)
		}
		if err := c.pause(ctx, b, a, err); err != nil {
			return nil, err
		}
	}
}

// budget bounds how often one blob may fail.
type budget struct{ row, all int }

func newBudget() *budget { return &budget{} }

// progress is told that the registry has taken bytes.
func (b *budget) progress() { b.row = 0 }

// pause waits before the next attempt, as long as the registry asks for if it
// does; a is its answer, nil for none. It gives err back when the attempts are
// spent.
func (c *client) pause(ctx context.Context, b *budget, a *answer, err error) error {
	b.row++
	b.all++
	if b.row >= maxTries || b.all >= maxFailures || b.row >= firstTries && !c.met.Load() {
		return err
	}
	d := min(500*time.Millisecond<<(b.row-1), 30*time.Second)
	d = d/2 + rand.N(d/2+1) // many uploads fail together and should not return so
	if a != nil {
		if after := retryAfter(a.head, time.Now()); after > 0 {
			d = after
		}
	}
	if werr := c.wait(ctx, d); werr != nil {
		return werr
	}
	return nil
}

// retryAfter reads either form of the header, up to what a user would wait.
func retryAfter(h http.Header, now time.Time) time.Duration {
	v := h.Get("Retry-After")
	var d time.Duration
	if n, err := strconv.Atoi(v); err == nil {
		d = time.Duration(min(max(n, 0), 3600)) * time.Second
	} else if t, err := http.ParseTime(v); err == nil {
		d = t.Sub(now)
	}
	return min(max(d, 0), maxPause)
}

// watch ends a request on which nothing moves.
type watch struct {
	timer         *time.Timer
	cancel        context.CancelCauseFunc
	source        atomic.Bool // what is waited for is the source, not the registry
	stall, answer time.Duration
}

func newWatch(ctx context.Context, d time.Duration) (context.Context, *watch) {
	ctx, cancel := context.WithCancelCause(ctx)
	w := &watch{cancel: cancel}
	w.timer = time.AfterFunc(d, func() {
		if w.source.Load() {
			cancel(sourceError{errStalled})
		} else {
			cancel(errStalled)
		}
	})
	return ctx, w
}

// rest gives the registry time for the next step, reading the source for its.
func (w *watch) rest(d time.Duration) {
	w.source.Store(false)
	w.timer.Reset(d)
}

func (w *watch) reading() {
	w.source.Store(true)
	w.timer.Reset(sourceTime)
}

func (w *watch) stop() {
	w.timer.Stop()
	w.cancel(context.Canceled)
}

// checkRedirect keeps a redirect from turning an upload into something else or
// leading into a circle, to plain HTTP or inside. That credentials stay with
// the registry is the transport's doing.
func checkRedirect(req *http.Request, via []*http.Request) error {
	first := via[0]
	switch {
	case len(via) > maxRedirects:
		return &redirectError{fmt.Sprintf("redirects more than %d times", maxRedirects)}
	case req.Method != first.Method:
		return &redirectError{fmt.Sprintf("redirects %s as %s", first.Method, req.Method)}
	}
	if err := checkPlace(via[len(via)-1].URL, req.URL); err != nil {
		return &redirectError{"redirects " + err.Error()}
	}
	return nil
}

// checkPlace says whether a registry at from may send an upload to another place.
func checkPlace(from, to *url.URL) error {
	switch {
	case to.Scheme != "https" && to.Scheme != "http" || to.Host == "":
		return fmt.Errorf("to what is no URL of http or https")
	case to.User != nil:
		return fmt.Errorf("to a URL with credentials in it")
	case strings.EqualFold(to.Hostname(), from.Hostname()):
		return nil
	case from.Scheme == "https" && to.Scheme == "http":
		return fmt.Errorf("from HTTPS to plain HTTP at %s", to.Host)
	case isInside(to.Hostname()) && !isInside(from.Hostname()):
		return fmt.Errorf("to the internal address %s", to.Host)
	}
	return nil
}

func isInside(host string) bool {
	ip, err := netip.ParseAddr(host)
	if err != nil {
		return strings.EqualFold(host, "localhost")
	}
	ip = ip.Unmap()
	return ip.IsLoopback() || ip.IsPrivate() || ip.IsLinkLocalUnicast() || ip.IsUnspecified()
}

// location gives where an upload goes on. The last answer's is the one to use:
// it carries the state of the upload.
func (a *answer) location() (*url.URL, error) {
	s := a.head.Get("Location")
	bad := func(why string) error {
		return pushErrorf(image.ErrMalformed, nil, "%s gives an upload a location %s", a.url.Host, why)
	}
	if s == "" || len(s) > maxLocation {
		return nil, bad(fmt.Sprintf("of %d bytes", len(s)))
	}
	u, err := a.url.Parse(s)
	if err != nil {
		return nil, bad("that is no URL")
	}
	u.Fragment, u.RawFragment = "", ""
	if u.Scheme == "http" && a.url.Scheme == "https" && strings.EqualFold(u.Host, a.url.Host) {
		// A registry that does not know of the TLS before it.
		u.Scheme = "https"
	}
	if err := checkPlace(a.url, u); err != nil {
		return nil, bad(err.Error())
	}
	return u, nil
}

// received reads the Range of an upload: how many bytes the registry has. "0-0"
// is what distribution says of an empty one (blobupload.go, blobUploadResponse).
func (a *answer) received() (int64, bool) {
	s := strings.TrimSpace(a.head.Get("Range"))
	s = strings.TrimPrefix(strings.TrimPrefix(s, "bytes="), "bytes ")
	first, last, ok := strings.Cut(s, "-")
	if !ok || first != "0" {
		return 0, false
	}
	n, err := strconv.ParseInt(last, 10, 64)
	switch {
	case err != nil || n < -1 || n == 1<<63-1:
		return 0, false
	case n <= 0:
		return 0, true
	}
	return n + 1, true
}

// putManifest is the last request: what the tag points at is there by now.
func (c *client) putManifest(ctx context.Context, m *image.Manifest, t image.Name) error {
	id := t.Tag()
	if id == "" {
		id = m.Digest.String()
	}
	r := request{
		method: http.MethodPut, url: c.url("manifests/"+id, nil), patience: commitTime,
		head: http.Header{"Content-Type": {m.MediaType}}, length: int64(len(m.Raw)),
		body: func(context.Context, *watch) (io.ReadCloser, error) {
			return io.NopCloser(bytes.NewReader(m.Raw)), nil
		},
	}
	a, err := c.ask(ctx, newBudget(), "put manifest", r)
	if err != nil {
		return fmt.Errorf("put manifest: %w", err)
	}
	switch a.code {
	case http.StatusCreated, http.StatusOK, http.StatusAccepted:
	default:
		return a.failed("put manifest")
	}
	return a.sameDigest(m.Digest, "put manifest")
}

// sameDigest checks what the registry says that it has, if it says so.
func (a *answer) sameDigest(d digest.Digest, doing string) error {
	if got := a.head.Get("Docker-Content-Digest"); got != "" && got != d.String() {
		return pushErrorf(image.ErrMalformed, nil, "%s: %s says that it has %.80q in place of %s", doing, a.url.Host, got, d)
	}
	return nil
}
