package fetch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/varvefs/varve/metrics"
)

// Origin is one place that serves a blob: its URL there, and the transport that
// authenticates to its registry and to no other host.
type Origin struct {
	URL       string
	Transport http.RoundTripper
}

// Remote is a blob over HTTP, from the first origin that gives it. Where an
// origin redirects to, later requests go at once, until that is refused.
type Remote struct {
	origins []*origin
	size    int64
	m       *metrics.Metrics

	mu    sync.Mutex
	first int // the origin that served last
}

type origin struct {
	url    string
	client *http.Client

	mu       sync.Mutex
	redirect string // where url last led; may hold a signature, never logged
}

// NewRemote gives a blob of size bytes at the origins, best first.
func NewRemote(size int64, m *metrics.Metrics, origins ...Origin) *Remote {
	r := &Remote{size: size, m: m}
	for _, o := range origins {
		r.origins = append(r.origins, &origin{url: o.URL, client: &http.Client{Transport: o.Transport}})
	}
	return r
}

func (r *Remote) Size() int64 { return r.size }

// StatusError is an answer that is not the bytes asked for.
type StatusError struct {
	Code       int
	Host       string
	RetryAfter time.Duration // 0 where the answer does not say
}

func (e *StatusError) Error() string {
	return fmt.Sprintf("%s answered %d %s", e.Host, e.Code, http.StatusText(e.Code))
}

// Temporary reports whether the same request may succeed later.
func (e *StatusError) Temporary() bool {
	return e.Code >= 500 || e.Code == http.StatusTooManyRequests || e.Code == http.StatusRequestTimeout
}

// Open asks the origins in turn, beginning with the one that served last. When
// all fail, the error is the one that gives most hope.
func (r *Remote) Open(ctx context.Context, off, n int64) (io.ReadCloser, int64, error) {
	r.mu.Lock()
	first := r.first
	r.mu.Unlock()
	var worst error
	for k := range r.origins {
		i := (first + k) % len(r.origins)
		body, at, err := r.origins[i].open(ctx, off, n, r.size, r.m)
		if err == nil {
			r.mu.Lock()
			r.first = i
			r.mu.Unlock()
			return &served{body, r, i}, at, nil
		}
		if worst == nil || temporary(err) && !temporary(worst) {
			worst = err
		}
		if ctx.Err() != nil {
			r.skip(i) // it may be the one that let the time run out
			break
		}
	}
	if worst == nil {
		worst = errors.New("the blob has no origin")
	}
	return nil, 0, worst
}

// skip makes the next request begin with another origin than the one that was
// found bad, however many find it so at a time.
func (r *Remote) skip(bad int) {
	r.mu.Lock()
	if r.first == bad {
		r.first = (bad + 1) % len(r.origins)
	}
	r.mu.Unlock()
}

// served is a body that knows which origin gave it.
type served struct {
	io.ReadCloser
	r      *Remote
	origin int
}

// spoilt says that the bytes are wrong or do not come.
func (s *served) spoilt() { s.r.skip(s.origin) }

func (o *origin) open(ctx context.Context, off, n, size int64, m *metrics.Metrics) (io.ReadCloser, int64, error) {
	o.mu.Lock()
	target := o.redirect
	o.mu.Unlock()
	if target != "" {
		body, at, err := o.get(ctx, target, off, n, size, m)
		if err == nil {
			return body, at, nil
		}
		// A signature that ran out, a cache that forgot, a host that is gone: ask
		// again where the redirect came from, at once if this is an answer.
		o.mu.Lock()
		if o.redirect == target {
			o.redirect = ""
		}
		o.mu.Unlock()
		if temporary(err) {
			return nil, 0, err
		}
	}
	return o.get(ctx, o.url, off, n, size, m)
}

func (o *origin) get(ctx context.Context, target string, off, n, size int64, m *metrics.Metrics) (_ io.ReadCloser, _ int64, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target, nil)
	if err != nil {
		return nil, 0, redact(err)
	}
	req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", off, off+n-1))
	req.Header.Set("Accept-Encoding", "identity")
	start := time.Now()
	resp, err := o.client.Do(req)
	reason := reasonOf(ctx)
	if err != nil {
		m.FetchRequests.WithLabelValues(reason, "error").Inc()
		return nil, 0, redact(err)
	}
	m.FetchRequests.WithLabelValues(reason, strconv.Itoa(resp.StatusCode/100)+"xx").Inc()
	m.FetchSeconds.WithLabelValues(reason).Observe(time.Since(start).Seconds())
	defer func() {
		if err != nil {
			resp.Body.Close()
		}
	}()
	host := resp.Request.URL.Host
	if enc := resp.Header.Get("Content-Encoding"); enc != "" && enc != "identity" && resp.StatusCode < 300 {
		return nil, 0, fmt.Errorf("%s: %w: content encoding %q added to a blob by a proxy on the way", host, errAnswer, enc)
	}
	at := off
	switch resp.StatusCode {
	case http.StatusPartialContent:
		if err := checkContentRange(resp.Header.Get("Content-Range"), off, n, size); err != nil {
			return nil, 0, fmt.Errorf("%s: %w", host, err)
		}
	case http.StatusOK:
		if resp.ContentLength >= 0 && resp.ContentLength != size {
			return nil, 0, fmt.Errorf("%s: %w: %d bytes for a blob of %d", host, errAnswer, resp.ContentLength, size)
		}
		at = 0
	default:
		return nil, 0, &StatusError{Code: resp.StatusCode, Host: host, RetryAfter: retryAfter(resp.Header.Get("Retry-After"), time.Now())}
	}
	if final := resp.Request.URL.String(); final != o.url {
		o.mu.Lock()
		o.redirect = final
		o.mu.Unlock()
	}
	return resp.Body, at, nil
}

// checkContentRange holds an answer against what was asked. The range may be
// shorter than asked: what is missing is asked for again.
func checkContentRange(h string, off, n, size int64) error {
	bad := fmt.Errorf("%w: Content-Range %.80q for bytes %d to %d of %d", errAnswer, h, off, off+n-1, size)
	span, total, ok := strings.Cut(strings.TrimPrefix(h, "bytes "), "/")
	from, to, ok2 := strings.Cut(span, "-")
	if !ok || !ok2 || !strings.HasPrefix(h, "bytes ") {
		return bad
	}
	a, err1 := strconv.ParseInt(from, 10, 64)
	b, err2 := strconv.ParseInt(to, 10, 64)
	if err1 != nil || err2 != nil || a != off || b < a || b > off+n-1 {
		return bad
	}
	if total == "*" {
		return nil
	}
	if t, err := strconv.ParseInt(total, 10, 64); err != nil || t != size {
		return bad
	}
	return nil
}

// retryAfter reads the header in both its forms, at most two minutes.
func retryAfter(h string, now time.Time) time.Duration {
	d := time.Duration(0)
	if s, err := strconv.Atoi(h); err == nil {
		d = time.Duration(min(s, 3600)) * time.Second
	} else if t, err := http.ParseTime(h); err == nil {
		d = t.Sub(now)
	}
	return min(max(d, 0), 2*time.Minute)
}

var query = regexp.MustCompile(`\?[^\s"]*`)

// redact takes queries, which may be signatures, out of a transport error: that
// of the URL, and that of a Location which net/http could not read.
func redact(err error) error {
	var ue *url.Error
	if !errors.As(err, &ue) {
		return err
	}
	host := "a URL that cannot be read"
	if u, perr := url.Parse(ue.URL); perr == nil {
		host = u.Host
	}
	if cause := ue.Err.Error(); query.MatchString(cause) {
		return fmt.Errorf("%s %s: %s", strings.ToUpper(ue.Op), host, query.ReplaceAllString(cause, "?..."))
	}
	return fmt.Errorf("%s %s: %w", strings.ToUpper(ue.Op), host, ue.Err)
}

type reasonKey struct{}

// withReason says for the metrics why bytes are asked for.
func withReason(ctx context.Context, reason string) context.Context {
	return context.WithValue(ctx, reasonKey{}, reason)
}

func reasonOf(ctx context.Context) string {
	if r, ok := ctx.Value(reasonKey{}).(string); ok {
		return r
	}
	return "demand"
}
