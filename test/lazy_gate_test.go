package test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"path"
	"sync"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// gate stands before a registry's recorder and lets no more of a blob pass than it
// was told to: a link that is as slow as a test needs, without a clock.
type gate struct {
	addr  string
	proxy *httputil.ReverseProxy

	mu     sync.Mutex // guards what follows
	change *sync.Cond
	limit  map[string]int64 // by digest, the bytes from a blob's start that may pass
	passed map[string]int64 // by digest, the bytes that do, each as often as it does
	sent   map[string]int64 // by digest, those of them that were handed on
	spoilt map[string]int64 // by digest, the byte that is inverted, counted from 1
}

// all lifts a limit.
const all = -1

// gated puts a gate before a registry, whose references then begin with its addr.
func gated(t *testing.T, r *registry) *gate {
	t.Helper()
	g := &gate{limit: map[string]int64{}, passed: map[string]int64{}, sent: map[string]int64{}, spoilt: map[string]int64{}}
	g.change = sync.NewCond(&g.mu)
	g.proxy = &httputil.ReverseProxy{
		Rewrite: func(p *httputil.ProxyRequest) {
			p.SetURL(&url.URL{Scheme: "http", Host: r.rec.Addr()})
			p.Out.Host = p.In.Host
		},
		FlushInterval: -1,
		ErrorLog:      log.New(io.Discard, "", 0),
		Transport:     &http.Transport{DisableCompression: true},
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	g.addr = l.Addr().String()
	s := &http.Server{Handler: g}
	var served sync.WaitGroup
	served.Go(func() { s.Serve(l) })
	t.Cleanup(func() {
		s.Close()
		served.Wait()
		g.proxy.Transport.(*http.Transport).CloseIdleConnections()
	})
	return g
}

// let lets the first n bytes of a blob pass, or all.
func (g *gate) let(digest string, n int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.limit[digest] = n
	g.change.Broadcast()
}

// spoil inverts a byte of a blob, counted from 1, or with 0 none.
func (g *gate) spoil(digest string, at int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.spoilt[digest] = at
}

// reached waits until a blob's bytes have passed up to its limit.
func (g *gate) reached(digest string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for g.sent[digest] < g.limit[digest] {
		g.change.Wait()
	}
}

// bytes gives how many bytes of a blob have passed. Who has got one finds it counted.
func (g *gate) bytes(digest string) int64 {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.passed[digest]
}

func (g *gate) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	stop := context.AfterFunc(req.Context(), func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.change.Broadcast()
	})
	defer stop()
	g.proxy.ServeHTTP(&gatedAnswer{ResponseWriter: w, g: g, req: req, digest: path.Base(req.URL.Path)}, req)
}

// gatedAnswer is an answer on its way through a gate.
type gatedAnswer struct {
	http.ResponseWriter
	g      *gate
	req    *http.Request
	digest string
	off    int64 // of the next byte in the blob
}

func (a *gatedAnswer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

func (a *gatedAnswer) WriteHeader(status int) {
	if status == http.StatusPartialContent {
		fmt.Sscanf(a.req.Header.Get("Range"), "bytes=%d-", &a.off)
	}
	a.ResponseWriter.WriteHeader(status)
	http.NewResponseController(a.ResponseWriter).Flush()
}

func (a *gatedAnswer) Write(p []byte) (sent int, err error) {
	for len(p) > 0 && err == nil {
		var n, may int
		if may, err = a.may(len(p)); err == nil {
			n, err = a.ResponseWriter.Write(a.spoil(p[:may]))
		}
		if err == nil {
			err = http.NewResponseController(a.ResponseWriter).Flush()
		}
		a.went(n, may)
		sent, p = sent+n, p[n:]
	}
	return sent, err
}

// may waits until at least a byte may pass, and counts those that may.
func (a *gatedAnswer) may(n int) (may int, err error) {
	a.g.mu.Lock()
	defer a.g.mu.Unlock()
	defer func() { a.g.passed[a.digest] += int64(may) }()
	for {
		limit, ok := a.g.limit[a.digest]
		switch {
		case a.req.Context().Err() != nil:
			return 0, io.ErrClosedPipe
		case !ok || limit == all:
			return n, nil
		case a.off < limit:
			return int(min(int64(n), limit-a.off)), nil
		}
		a.g.change.Wait()
	}
}

func (a *gatedAnswer) spoil(p []byte) []byte {
	a.g.mu.Lock()
	defer a.g.mu.Unlock()
	if i := a.g.spoilt[a.digest] - 1 - a.off; i >= 0 && i < int64(len(p)) {
		p = bytes.Clone(p)
		p[i] = ^p[i]
	}
	return p
}

// went says how many bytes were handed on of those that were counted.
func (a *gatedAnswer) went(n, counted int) {
	a.g.mu.Lock()
	defer a.g.mu.Unlock()
	a.off += int64(n)
	a.g.passed[a.digest] += int64(n - counted)
	a.g.sent[a.digest] += int64(n)
	a.g.change.Broadcast()
}

// blobs gives the digests and sizes of an image's layers, lowest first.
func blobs(t *testing.T, img v1.Image) (digests []string, sizes []int64) {
	t.Helper()
	m := mustGet[*v1.Manifest](t)(img.Manifest())
	for _, l := range m.Layers {
		digests, sizes = append(digests, l.Digest.String()), append(sizes, l.Size)
	}
	return digests, sizes
}
