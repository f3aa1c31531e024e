package image

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

// What a caller branches on. Every error of the package that has one of these
// causes wraps it; the message itself is complete without it.
var (
	// ErrNotFound: the registry, the archive or the store has no such image.
	ErrNotFound = errors.New("not found")
	// ErrUnauthorized: the registry asks for other credentials, or for some.
	ErrUnauthorized = errors.New("unauthorized")
	// ErrUnreachable: no usable answer came: DNS, dial, TLS, timeout, 429, 5xx.
	ErrUnreachable = errors.New("unreachable")
	// ErrNoPlatform: the image exists, but not for the platform asked.
	ErrNoPlatform = errors.New("no such platform")
	// ErrMalformed: foreign bytes (a name, a manifest, a config, an archive) are
	// not what they should be, or do not have the digest they were asked by.
	ErrMalformed = errors.New("malformed")
)

// failure is an error whose message stands for itself and whose kind is one of
// the sentinels: "No such image: x" must not be followed by ": not found".
type failure struct {
	kind  error
	msg   string
	cause error
}

func (f *failure) Error() string { return f.msg }

func (f *failure) Unwrap() []error {
	if f.cause == nil {
		return []error{f.kind}
	}
	return []error{f.kind, f.cause}
}

func failf(kind, cause error, format string, args ...any) error {
	return &failure{kind: kind, cause: cause, msg: oneLine(fmt.Sprintf(format, args...))}
}

func malformed(format string, args ...any) error {
	return failf(ErrMalformed, nil, format, args...)
}

// oneLine keeps foreign text (a registry's answer, a helper's output) from
// breaking or flooding a log line.
func oneLine(s string) string {
	const most = 600
	s = strings.Join(strings.Fields(s), " ")
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "…"
	}
	return s
}

// clip keeps one hostile name from filling an error.
func clip(s string) string {
	const most = 80
	if len(s) > most {
		return strings.ToValidUTF8(s[:most], "") + "…"
	}
	return s
}

// denied says in docker's words that the registry wants other credentials.
func denied(n Name, host, text string, cause error) error {
	return failf(ErrUnauthorized, cause,
		"pull access denied for %s, repository does not exist or may require 'docker login %s' or 'podman login %s': %s", n.Familiar(), host, host, text)
}

// classify gives an error of talking to host about n its kind and its words.
// What already has a kind, and what the caller itself cancelled, stays.
func classify(n Name, host string, err error) error {
	var known *failure
	var answer *transport.Error
	switch {
	case err == nil:
		return nil
	case errors.Is(err, context.Canceled):
		return scrubbed{err}
	case errors.As(err, &known):
		return known
	case errors.As(err, &answer):
		return classifyAnswer(n, host, answer)
	}
	return failf(ErrUnreachable, err, "pull %s: registry %s: %s", n.Familiar(), host, networkText(host, err))
}

func classifyAnswer(n Name, host string, answer *transport.Error) error {
	text := answerText(answer)
	switch code := answer.StatusCode; {
	case code == http.StatusNotFound:
		return failf(ErrNotFound, answer, "No such image: %s: %s says %s", n.Familiar(), host, text)
	case code == http.StatusUnauthorized, code == http.StatusForbidden:
		return denied(n, host, text, answer)
	case code == http.StatusTooManyRequests:
		return failf(ErrUnreachable, answer, "pull %s: %s asks to slow down, try again later or log in: %s", n.Familiar(), host, text)
	case code >= 500:
		return failf(ErrUnreachable, answer, "pull %s: %s fails, try again later: %s", n.Familiar(), host, text)
	}
	return failf(ErrMalformed, answer, "pull %s: %s does not answer as a registry: %s", n.Familiar(), host, text)
}

// answerText is the registry's own text without the URL, whose query may hold
// a signature.
func answerText(answer *transport.Error) string {
	var parts []string
	for _, d := range answer.Errors {
		switch {
		case d.Message != "":
			parts = append(parts, d.Message)
		case d.Code != "":
			parts = append(parts, string(d.Code))
		}
	}
	if len(parts) == 0 {
		return fmt.Sprintf("%d %s", answer.StatusCode, http.StatusText(answer.StatusCode))
	}
	return strings.Join(parts, "; ")
}

// What may hold a signature or a password: queries and user parts of URLs, also
// those of a Location that net/http could not read and quotes in its error.
var (
	quotedQueries = regexp.MustCompile(`("(?:\\.|[^"\\?])*\?)(?:\\.|[^"\\])*"`)
	queries       = regexp.MustCompile(`\?[^\s"]*`)
	users         = regexp.MustCompile(`//[^/\s"]*@`)
)

func scrub(s string) string {
	s = quotedQueries.ReplaceAllString(s, `${1}..."`)
	s = queries.ReplaceAllString(s, "?...")
	return users.ReplaceAllString(s, "//...@")
}

// scrubbed is an error of a transport that may be shown.
type scrubbed struct{ error }

func (s scrubbed) Error() string { return scrub(s.error.Error()) }
func (s scrubbed) Unwrap() error { return s.error }

// networkText names the usual reasons for having no answer, with what helps.
func networkText(host string, err error) string { return scrub(reasonText(host, err)) }

func reasonText(host string, err error) string {
	// The URL of a redirect may be signed: only the cause is shown.
	for u := (*url.Error)(nil); errors.As(err, &u); {
		err = u.Err
	}
	var (
		dns     *net.DNSError
		invalid x509.CertificateInvalidError
		unknown x509.UnknownAuthorityError
		name    x509.HostnameError
		record  tls.RecordHeaderError
		timeout interface{ Timeout() bool }
	)
	switch {
	case errors.As(err, &dns) && dns.IsNotFound:
		return fmt.Sprintf("no address for %s, check the name and DNS", dns.Name)
	case errors.As(err, &dns):
		return fmt.Sprintf("cannot look up %s, check DNS and the network: %s", dns.Name, dns.Err)
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return fmt.Sprintf("its certificate is not valid at this machine's time %s, check the clock: %s",
			time.Now().UTC().Format(time.RFC3339), invalid.Detail)
	case errors.As(err, &unknown):
		return fmt.Sprintf("its certificate is signed by an unknown authority, put the CA into /etc/containerd/certs.d/%s or the system's pool", host)
	case errors.As(err, &name):
		return "its certificate is for another name: " + name.Error()
	case errors.As(err, &record), strings.Contains(err.Error(), "server gave HTTP response to HTTPS client"):
		return "it speaks plain HTTP, not HTTPS; --insecure allows that"
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded),
		errors.As(err, &timeout) && timeout.Timeout():
		return "no answer in time, check the network and proxies: " + err.Error()
	}
	return err.Error()
}
