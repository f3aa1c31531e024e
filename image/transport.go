package image

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"time"
)

// newTransport is what all requests go through in the end. It sets no time for
// a whole request: a blob may take hours on a thin line, and who reads it
// watches its progress.
func newTransport() *http.Transport {
	return &http.Transport{
		Proxy:       http.ProxyFromEnvironment,
		DialContext: dialer(10 * time.Second),
		// Frames of many layers are fetched at once from few hosts.
		MaxIdleConns:          256,
		MaxIdleConnsPerHost:   32,
		IdleConnTimeout:       90 * time.Second,
		TLSHandshakeTimeout:   10 * time.Second,
		ResponseHeaderTimeout: 30 * time.Second,
		ExpectContinueTimeout: time.Second,
		ForceAttemptHTTP2:     true,
		// Digests are of the bytes as they are stored.
		DisableCompression: true,
	}
}

func dialer(timeout time.Duration) func(context.Context, string, string) (net.Conn, error) {
	return (&net.Dialer{Timeout: timeout, KeepAlive: 30 * time.Second}).DialContext
}

// tuned makes base fit a host's TLS files. The key tells two results apart: it
// is made of the files' contents, so that a renewed certificate is taken at
// the next opening. A base that is not Go's own transport is used as it is.
func tuned(base http.RoundTripper, h host) (func() http.RoundTripper, string, error) {
	t, ok := base.(*http.Transport)
	if !ok || h.tls.isZero() && h.dial == 0 {
		return func() http.RoundTripper { return base }, "", nil
	}
	conf := &tls.Config{}
	// Not of t itself: net/http writes to that when it first uses or clones it.
	if own := t.Clone().TLSClientConfig; own != nil {
		conf = own.Clone()
	}
	sum := sha256.New()
	fmt.Fprintf(sum, "%v %v\n", h.tls.skipVerify, h.dial)
	if h.tls.skipVerify {
		conf.InsecureSkipVerify = true
	}
	for i, file := range h.tls.ca {
		pem, err := os.ReadFile(file)
		if err != nil {
			return nil, "", fmt.Errorf("CA of registry %s: %w", h.addr, err)
		}
		if i == 0 {
			if conf.RootCAs == nil {
				conf.RootCAs = systemPool()
			} else {
				conf.RootCAs = conf.RootCAs.Clone()
			}
		}
		if !conf.RootCAs.AppendCertsFromPEM(pem) {
			return nil, "", fmt.Errorf("CA of registry %s: %s holds no PEM certificate", h.addr, file)
		}
		fmt.Fprintf(sum, "ca %x\n", sha256.Sum256(pem))
	}
	for _, pair := range h.tls.client {
		cert, key := pair[0], pair[1]
		if key == "" {
			key = cert
		}
		c, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			return nil, "", fmt.Errorf("client certificate for registry %s: %w", h.addr, err)
		}
		conf.Certificates = append(conf.Certificates, c)
		fmt.Fprintf(sum, "client %x\n", sha256.Sum256(c.Certificate[0]))
	}
	return func() http.RoundTripper {
		t := t.Clone()
		t.TLSClientConfig = conf
		if h.dial > 0 {
			t.DialContext = dialer(h.dial)
		}
		return t
	}, hex.EncodeToString(sum.Sum(nil)), nil
}

func systemPool() *x509.CertPool {
	if pool, err := x509.SystemCertPool(); err == nil {
		return pool
	}
	return x509.NewCertPool()
}

// isLoopback reports whether a host[:port] is this machine.
func isLoopback(addr string) bool {
	name := hostname(addr)
	if name == "localhost" || strings.HasSuffix(name, ".localhost") {
		return true
	}
	ip, err := netip.ParseAddr(name)
	return err == nil && ip.IsLoopback()
}

// isInternal reports whether a host[:port] is an address, not a name, that
// only this machine or its network can reach.
func isInternal(addr string) bool {
	ip, err := netip.ParseAddr(hostname(addr))
	if err != nil {
		return isLoopback(addr)
	}
	ip = ip.Unmap()
	return ip.IsLoopback() || ip.IsPrivate() || ip.IsLinkLocalUnicast() || ip.IsUnspecified()
}

// isLinkLocal reports whether a host[:port] is an address of the link, or the
// one that EC2 has in its place under IPv6: where machines in a cloud are told
// who they are.
func isLinkLocal(addr string) bool {
	ip, err := netip.ParseAddr(hostname(addr))
	return err == nil && (ip.Unmap().IsLinkLocalUnicast() || ip == netip.MustParseAddr("fd00:ec2::254"))
}

func hostname(addr string) string {
	if h, _, err := net.SplitHostPort(addr); err == nil {
		addr = h
	}
	return strings.TrimSuffix(strings.Trim(strings.ToLower(addr), "[]"), ".")
}
