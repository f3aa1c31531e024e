package forms

import (
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Server is a registry on the loopback interface.
type Server struct {
	http     *http.Server
	listener net.Listener
	done     sync.WaitGroup
}

// Registry serves a registry whose blobs lie in dir, on a free port of the
// loopback interface. Its manifests are in memory and end with it.
func Registry(dir string) (*Server, error) {
	h, err := NewHandler(dir)
	if err != nil {
		return nil, err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("start registry: %w", err)
	}
	s := &Server{http: &http.Server{Handler: h}, listener: listener}
	s.done.Go(func() { _ = s.http.Serve(listener) }) // ends with Close
	return s, nil
}

// Addr is the registry's host:port.
func (s *Server) Addr() string { return s.listener.Addr().String() }

// Close ends the registry and its connections.
func (s *Server) Close() error {
	err := s.http.Close()
	s.done.Wait()
	return err
}

// NewHandler is a registry without a server. Manifests, tags and referrers are
// those of ggcr's registry; blobs are served from files here, because that one
// digests a blob for every range of it and holds uploads in memory. A blob
// that one repository has can be mounted in, and read from, every other.
func NewHandler(dir string) (http.Handler, error) {
	for _, sub := range []string{"sha256", "uploads"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o777); err != nil {
			return nil, fmt.Errorf("make registry: %w", err)
		}
	}
	return &handler{
		dir: dir,
		rest: registry.New(
			registry.WithBlobHandler(registry.NewDiskBlobHandler(dir)),
			registry.WithReferrersSupport(true),
			registry.Logger(log.New(io.Discard, "", 0)),
		),
	}, nil
}

type handler struct {
	dir  string
	rest http.Handler
}

func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	repo, last, upload := blobPath(r.URL.Path)
	var err error
	switch {
	case repo == "":
		h.rest.ServeHTTP(w, r)
		return
	case upload:
		err = h.upload(w, r, repo, last)
	case r.Method == http.MethodGet || r.Method == http.MethodHead:
		err = h.blob(w, r, last)
	case r.Method == http.MethodDelete:
		err = h.remove(w, last)
	default:
		err = &refusal{http.StatusMethodNotAllowed, "UNSUPPORTED", r.Method}
	}
	if err == nil {
		return
	}
	var no *refusal
	switch {
	case errors.As(err, &no):
	case errors.Is(err, fs.ErrNotExist):
		no = &refusal{http.StatusNotFound, "BLOB_UNKNOWN", last}
	default:
		no = &refusal{http.StatusInternalServerError, "UNKNOWN", err.Error()}
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(no.status)
	fmt.Fprintf(w, `{"errors":[{"code":%q,"message":%q}]}`, no.code, no.message)
}

// refusal is an error in the registry's own words.
type refusal struct {
	status        int
	code, message string
}

func (r *refusal) Error() string { return r.code + ": " + r.message }

// blobPath takes /v2/repo/blobs/digest or /v2/repo/blobs/uploads/[id] apart;
// repo is empty for other paths.
func blobPath(path string) (repo, last string, upload bool) {
	rest, ok := strings.CutPrefix(path, "/v2/")
	if !ok {
		return "", "", false
	}
	if i := strings.LastIndex(rest, "/blobs/uploads"); i > 0 {
		id := strings.TrimPrefix(rest[i+len("/blobs/uploads"):], "/")
		if !strings.Contains(id, "/") {
			return rest[:i], id, true
		}
	}
	if i := strings.LastIndex(rest, "/blobs/"); i > 0 && !strings.Contains(rest[i+len("/blobs/"):], "/") {
		return rest[:i], rest[i+len("/blobs/"):], false
	}
	return "", "", false
}

func (h *handler) file(digest string) (string, error) {
	d, err := v1.NewHash(digest)
	if err != nil || d.Algorithm != "sha256" {
		return "", &refusal{http.StatusBadRequest, "DIGEST_INVALID", digest}
	}
	return filepath.Join(h.dir, d.Algorithm, d.Hex), nil
}

func (h *handler) blob(w http.ResponseWriter, r *http.Request, digest string) error {
	path, err := h.file(digest)
	if err != nil {
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Docker-Content-Digest", digest)
	w.Header().Set("ETag", strconv.Quote(digest))
	http.ServeContent(w, r, "", time.Time{}, f)
	return nil
}

func (h *handler) remove(w http.ResponseWriter, digest string) error {
	path, err := h.file(digest)
	if err != nil {
		return err
	}
	if err := os.Remove(path); err != nil {
		return err
	}
	w.WriteHeader(http.StatusAccepted)
	return nil
}

func (h *handler) upload(w http.ResponseWriter, r *http.Request, repo, id string) error {
	digest := r.URL.Query().Get("digest")
	if r.Method == http.MethodPost && id == "" {
		if from := r.URL.Query().Get("mount"); from != "" {
			if path, err := h.file(from); err != nil {
				return err
			} else if _, err := os.Stat(path); err == nil {
				created(w, repo, from)
				return nil
			}
		}
		id = rand.Text()
		if err := os.WriteFile(filepath.Join(h.dir, "uploads", id), nil, 0o666); err != nil {
			return err
		}
		if digest == "" {
			h.accepted(w, repo, id, 0)
			return nil
		}
	}
	part := filepath.Join(h.dir, "uploads", filepath.Base("/"+id))
	f, err := os.OpenFile(part, os.O_RDWR|os.O_APPEND, 0)
	if id == "" || errors.Is(err, fs.ErrNotExist) {
		return &refusal{http.StatusNotFound, "BLOB_UPLOAD_UNKNOWN", id}
	}
	if err != nil {
		return err
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	switch r.Method {
	case http.MethodGet:
		uploadHeader(w, repo, id, size)
		w.WriteHeader(http.StatusNoContent)
		return nil
	case http.MethodDelete:
		w.WriteHeader(http.StatusNoContent)
		return os.Remove(part)
	case http.MethodPatch, http.MethodPut, http.MethodPost:
	default:
		return &refusal{http.StatusMethodNotAllowed, "UNSUPPORTED", r.Method}
	}
	if begin, _, ok := strings.Cut(r.Header.Get("Content-Range"), "-"); ok && begin != strconv.FormatInt(size, 10) {
		return &refusal{http.StatusRequestedRangeNotSatisfiable, "BLOB_UPLOAD_INVALID", "begins elsewhere"}
	}
	n, err := io.Copy(f, r.Body)
	if err != nil {
		return err
	}
	if r.Method == http.MethodPatch {
		h.accepted(w, repo, id, size+n)
		return nil
	}
	if err := h.finish(f, part, digest); err != nil {
		return err
	}
	created(w, repo, digest)
	return nil
}

// finish checks an upload and gives it its name.
func (h *handler) finish(f *os.File, part, digest string) error {
	path, err := h.file(digest)
	if err != nil {
		return err
	}
	sum := sha256.New()
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	if _, err := io.Copy(sum, f); err != nil {
		return err
	}
	if got := digestOf(sum); got != digest {
		os.Remove(part)
		return &refusal{http.StatusBadRequest, "DIGEST_INVALID", got}
	}
	return os.Rename(part, path)
}

func (h *handler) accepted(w http.ResponseWriter, repo, id string, size int64) {
	uploadHeader(w, repo, id, size)
	w.WriteHeader(http.StatusAccepted)
}

func uploadHeader(w http.ResponseWriter, repo, id string, size int64) {
	w.Header().Set("Location", "/v2/"+repo+"/blobs/uploads/"+id)
	w.Header().Set("Range", fmt.Sprintf("0-%d", max(size-1, 0)))
}

func created(w http.ResponseWriter, repo, digest string) {
	w.Header().Set("Location", "/v2/"+repo+"/blobs/"+digest)
	w.Header().Set("Docker-Content-Digest", digest)
	w.WriteHeader(http.StatusCreated)
}
