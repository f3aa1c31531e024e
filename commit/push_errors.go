package commit

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"strings"

	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/varvefs/varve/image"
)

// pushError is an error whose message is complete and whose kind, one of image's
// sentinels, a caller branches on.
type pushError struct {
	kind, cause error
	msg         string
}

func (e *pushError) Error() string { return e.msg }

func (e *pushError) Unwrap() []error {
	var list []error
	for _, err := range []error{e.kind, e.cause} {
		if err != nil {
			list = append(list, err)
		}
	}
	return list
}

func pushErrorf(kind, cause error, format string, args ...any) error {
	return &pushError{kind: kind, cause: cause, msg: tidy(fmt.Sprintf(format, args...))}
}

// kindOf finds the kind of an error to wrap.
func kindOf(err error) error {
	for _, k := range []error{image.ErrUnauthorized, image.ErrNotFound, image.ErrUnreachable, image.ErrMalformed} {
		if errors.Is(err, k) {
			return k
		}
	}
	return nil
}

// Queries of upload URLs hold the registry's signature, or that of the storage
// behind it; errors of net/http quote them.
var pushQuery = regexp.MustCompile(`\?[^\s"]*`)

// tidy keeps foreign text from breaking or flooding a line, and from telling a
// signature.
func tidy(s string) string {
	const most = 800
	s = strings.Join(strings.Fields(pushQuery.ReplaceAllString(s, "?...")), " ")
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "…"
	}
	return s
}

// errStalled ends a request on which nothing moved any more.
var errStalled = errors.New("nothing moved for too long")

// redirectError is a redirect that is not followed.
type redirectError struct{ msg string }

func (e *redirectError) Error() string { return e.msg }

// sourceError is a failure to read what is to be uploaded. The source resumes by
// itself, so another attempt would not help.
type sourceError struct{ error }

func (e sourceError) Unwrap() error { return e.error }

// networkError gives an error of having no answer its kind, and reports whether
// the same request may do better in a moment. ctx is the caller's.
func networkError(ctx context.Context, host string, err error) (_ error, passing bool) {
	var (
		source   sourceError
		redirect *redirectError
		answer   *transport.Error
		cert     *tls.CertificateVerificationError
	)
	switch {
	case ctx.Err() != nil:
		return ctx.Err(), false
	case errors.As(err, &source):
		return fmt.Errorf("read: %w", source.error), false
	case errors.As(err, &redirect):
		return pushErrorf(image.ErrMalformed, nil, "%s %s", host, redirect.msg), false
	case errors.As(err, &answer):
		// The transport could not get a token.
		if answer.StatusCode == http.StatusUnauthorized || answer.StatusCode == http.StatusForbidden {
			return refusal(host, diagnostics(answer), err), false
		}
		return pushErrorf(image.ErrUnreachable, err, "%s: its token service answers %d", host, answer.StatusCode), true
	case kindOf(err) != nil && !errors.Is(err, image.ErrUnreachable):
		var known error = err
		for u := (*url.Error)(nil); errors.As(known, &u); {
			known = u.Err
		}
		return known, false
	}
	for u := (*url.Error)(nil); errors.As(err, &u); {
		err = u.Err
	}
	return pushErrorf(image.ErrUnreachable, err, "%s: %s", host, err), !errors.As(err, &cert)
}

func diagnostics(e *transport.Error) string {
	for _, d := range e.Errors {
		if d.Message != "" {
			return d.Message
		}
	}
	return http.StatusText(e.StatusCode)
}

// refusal says that other credentials are wanted.
func refusal(host, text string, cause error) error {
	return pushErrorf(image.ErrUnauthorized, cause,
		"push access denied, it may require 'docker login %s' or 'podman login %s': %s", host, host, text)
}

// failed gives the error of an answer that was not hoped for. doing is what it
// was an answer to.
func (a *answer) failed(doing string) error {
	host := a.url.Host
	switch {
	case a.code == http.StatusUnauthorized, a.code == http.StatusForbidden:
		return refusal(host, a.says(), nil)
	case a.code == http.StatusTooManyRequests:
		return pushErrorf(image.ErrUnreachable, nil, "%s: %s asks to slow down, try again later: %s", doing, host, a.says())
	case a.code >= 500:
		return pushErrorf(image.ErrUnreachable, nil, "%s: %s fails, try again later: %s", doing, host, a.says())
	case a.code == http.StatusNotFound:
		return pushErrorf(image.ErrNotFound, nil, "%s: %s says %s", doing, host, a.says())
	case a.code >= 400:
		return pushErrorf(image.ErrMalformed, nil, "%s: %s refuses it: %s", doing, host, a.says())
	}
	return pushErrorf(image.ErrMalformed, nil, "%s: %s does not answer as a registry: %d %s", doing, host, a.code, http.StatusText(a.code))
}

// says is the registry's own text of an error, with the status.
func (a *answer) says() string {
	var body struct {
		Errors []struct {
			Code    string `json:"code"`
			Message string `json:"message"`
		} `json:"errors"`
	}
	var parts []string
	if json.Unmarshal(a.text, &body) == nil {
		for _, e := range body.Errors {
			if text := strings.Trim(e.Code+": "+e.Message, ": "); text != "" {
				parts = append(parts, text)
			}
		}
	}
	status := fmt.Sprintf("%d %s", a.code, http.StatusText(a.code))
	if len(parts) == 0 {
		return status
	}
	return status + ", " + strings.Join(parts, "; ")
}
