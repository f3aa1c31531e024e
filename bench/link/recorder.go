package link

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Class is what a request asks a registry for.
type Class int

const (
	Other    Class = iota // uploads, tags, the catalogue, anything unknown
	Ping                  // /v2/
	Token                 // a token service
	Manifest              // manifests and manifest lists
	Blob                  // blobs, configs among them
	Referrer              // the referrers API
	classes
)

func (c Class) String() string {
	return [...]string{"other", "ping", "token", "manifest", "blob", "referrer"}[c]
}

// ClassOf says what a request asks for, by its path.
func ClassOf(r *http.Request) Class {
	path := r.URL.Path
	rest, isAPI := strings.CutPrefix(path, "/v2/")
	switch {
	case path == "/v2" || isAPI && rest == "":
		return Ping
	case !isAPI && strings.HasSuffix(path, "/token"):
		return Token
	case !isAPI || strings.Contains(rest, "/blobs/uploads/"):
		return Other
	}
	// A repository's name may hold any of these words: the last but one
	// element decides.
	parts := strings.Split(rest, "/")
	if len(parts) < 3 {
		return Other
	}
	switch parts[len(parts)-2] {
	case "manifests":
		return Manifest
	case "blobs":
		return Blob
	case "referrers":
		return Referrer
	}
	return Other
}

// Request is one line of the log.
type Request struct {
	Start  time.Time
	Class  Class
	Method string
	Path   string
	Range  string // the Range header as it came, or empty
	Status int    // 0 when no answer was begun
	Bytes  int64  // of the answer's body
	Fault  bool   // the answer was spoilt on purpose
	Done   bool   // the answer has ended, or broken off
}

// Total sums requests of one class.
type Total struct {
	Requests int64
	Bytes    int64 // of the answers' bodies
}

// Totals holds one sum a class.
type Totals [classes]Total

// All is the sum over the classes.
func (t Totals) All() (sum Total) {
	for _, c := range t {
		sum.Requests += c.Requests
		sum.Bytes += c.Bytes
	}
	return sum
}

// Recorder is an http.Handler that passes requests on to a registry and keeps
// a log of them. The log is never behind the client: a request is in it before
// it is passed on, and a byte before it is sent.
type Recorder struct {
	proxy     *httputil.ReverseProxy
	transport *http.Transport
	server    *http.Server // nil without Listen
	listener  net.Listener
	served    sync.WaitGroup

	mu    sync.Mutex // guards log, fault
	log   []*entry
	fault func(*http.Request) *Fault
}

// entry is a Request under way.
type entry struct {
	Request // Status, Bytes and Done are kept in the fields below
	status  atomic.Int64
	bytes   atomic.Int64
	done    atomic.Bool
}

// NewRecorder passes on to upstream, a host:port that speaks plain HTTP.
func NewRecorder(upstream string) *Recorder {
	r := &Recorder{transport: &http.Transport{
		DisableCompression:  true,
		MaxIdleConnsPerHost: 64,
		DialContext:         (&net.Dialer{}).DialContext,
	}}
	target := &url.URL{Scheme: "http", Host: upstream}
	r.proxy = &httputil.ReverseProxy{
		Rewrite: func(p *httputil.ProxyRequest) {
			p.SetURL(target)
			p.Out.Host = p.In.Host // so that Location leads back here
			if f := faultOf(p.In.Context()); f != nil && f.DropRange {
				p.Out.Header.Del("Range")
			}
		},
		ModifyResponse: func(resp *http.Response) error {
			if f := faultOf(resp.Request.Context()); f != nil {
				f.spoil(resp.Header)
			}
			return nil
		},
		Transport: r.transport,
		ErrorLog:  log.New(io.Discard, "", 0),
	}
	return r
}

// Listen serves the recorder on a free port of the loopback interface.
func (r *Recorder) Listen(ctx context.Context) error {
	var lc net.ListenConfig
	listener, err := lc.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return fmt.Errorf("listen for recorder: %w", err)
	}
	r.listener = listener
	r.server = &http.Server{Handler: r, ErrorLog: r.proxy.ErrorLog}
	r.served.Go(func() { _ = r.server.Serve(listener) }) // ends with Close
	return nil
}

// Addr is the host:port of Listen.
func (r *Recorder) Addr() string { return r.listener.Addr().String() }

// Close ends what Listen began and drops idle connections.
func (r *Recorder) Close() error {
	var err error
	if r.server != nil {
		err = r.server.Close()
		r.served.Wait()
	}
	r.transport.CloseIdleConnections()
	return err
}

// SetFault sets the hook that may spoil answers; nil removes it. The hook is
// called once a request, possibly for several at a time, and returns nil for
// an answer to be left alone.
func (r *Recorder) SetFault(hook func(*http.Request) *Fault) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.fault = hook
}

// Requests is the log in the order the requests came.
func (r *Recorder) Requests() []Request {
	r.mu.Lock()
	defer r.mu.Unlock()
	list := make([]Request, len(r.log))
	for i, e := range r.log {
		list[i] = e.Request
		list[i].Status = int(e.status.Load())
		list[i].Bytes = e.bytes.Load()
		list[i].Done = e.done.Load()
	}
	return list
}

// Totals sums the log by class.
func (r *Recorder) Totals() (t Totals) {
	for _, req := range r.Requests() {
		t[req.Class].Requests++
		t[req.Class].Bytes += req.Bytes
	}
	return t
}

// Reset empties the log. Requests under way are no longer counted.
func (r *Recorder) Reset() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.log = nil
}

func (r *Recorder) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	e := &entry{Request: Request{
		Start:  time.Now(),
		Class:  ClassOf(req),
		Method: req.Method,
		Path:   req.URL.Path,
		Range:  req.Header.Get("Range"),
	}}
	defer e.done.Store(true)
	r.mu.Lock()
	hook := r.fault
	r.mu.Unlock()
	var f *Fault
	if hook != nil {
		f = hook(req)
	}
	e.Fault = f != nil
	r.mu.Lock()
	r.log = append(r.log, e)
	r.mu.Unlock()

	ctx := req.Context()
	out := &answer{ResponseWriter: w, ctx: ctx, entry: e, fault: f}
	if f == nil {
		r.proxy.ServeHTTP(out, req)
		return
	}
	if !f.wait(ctx) {
		return
	}
	if f.Status != 0 {
		f.reply(out)
	} else {
		r.proxy.ServeHTTP(out, req.WithContext(withFault(ctx, f)))
	}
	if out.broken {
		panic(http.ErrAbortHandler) // the server's way to break a connection
	}
}

// answer counts what is sent, and breaks off where a fault says so.
type answer struct {
	http.ResponseWriter
	ctx    context.Context
	entry  *entry
	fault  *Fault
	sent   int64
	broken bool
}

func (a *answer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

func (a *answer) WriteHeader(status int) {
	a.entry.status.Store(int64(status))
	a.ResponseWriter.WriteHeader(status)
}

func (a *answer) Write(p []byte) (int, error) {
	if a.entry.status.Load() == 0 {
		a.entry.status.Store(http.StatusOK)
	}
	if a.fault == nil {
		return a.pass(p)
	}
	head, err := a.fault.split(a.sent, p)
	n, werr := a.pass(head)
	if werr != nil || err == nil {
		return n, werr
	}
	if err := http.NewResponseController(a.ResponseWriter).Flush(); err != nil {
		return n, err
	}
	if a.fault.Break == StallBody {
		<-a.ctx.Done()
	}
	a.broken = true
	return n, err
}

func (a *answer) pass(p []byte) (int, error) {
	a.entry.bytes.Add(int64(len(p)))
	n, err := a.ResponseWriter.Write(p)
	a.entry.bytes.Add(int64(n - len(p)))
	a.sent += int64(n)
	return n, err
}
