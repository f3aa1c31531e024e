package fetch

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/varvefs/varve/bench/forms"
	"github.com/varvefs/varve/bench/link"
	"github.com/varvefs/varve/fetch/store"
	"github.com/varvefs/varve/index"
	"github.com/varvefs/varve/metrics"
)

// file is a regular file of a test's layer.
type file struct {
	name string
	data []byte
}

func noise(n int, seed uint64) []byte {
	p := make([]byte, n)
	for i := range p {
		seed = seed*6364136223846793005 + 1442695040888963407
		p[i] = byte(seed >> 56)
	}
	return p
}

const chunkSize = 16 << 10

// files are of many chunks, of one, of none, the same twice, and of zeroes.
func files() []file {
	holed := make([]byte, 60<<10)
	copy(holed[9<<10:], noise(3000, 5))
	return []file{
		{"big", noise(10*chunkSize+77, 1)},
		{"small", []byte("hello")},
		{"copy", noise(3*chunkSize, 2)},
		{"of/copy", noise(3*chunkSize, 2)},
		{"holed", holed},
		{"zeros", make([]byte, 2*chunkSize)},
		{"empty", nil},
		{"last", noise(4*chunkSize, 3)},
	}
}

func makeTar(t testing.TB, fs []file) []byte {
	t.Helper()
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, f := range fs {
		h := tar.Header{Name: f.name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(f.data)), ModTime: time.Unix(1700000000, 0)}
		if err := tw.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write(f.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// layer is a layer with its blob and what was put into it.
type layer struct {
	Request
	diffID string
	blob   []byte
	files  []file
}

func makeLayer(t testing.TB, form forms.Form, fs []file) *layer {
	t.Helper()
	return makeChunked(t, form, fs, chunkSize)
}

func makeChunked(t testing.TB, form forms.Form, fs []file, size int) *layer {
	t.Helper()
	opts := forms.Options{Dir: t.TempDir(), ChunkSize: size, Level: 1}
	img, err := forms.LoadTar(context.Background(), bytes.NewReader(makeTar(t, fs)), form, opts)
	if err != nil {
		t.Fatal(err)
	}
	m, err := img.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	ls, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	blob, err := readLayer(ls[0])
	if err != nil {
		t.Fatal(err)
	}
	diffID, err := ls[0].DiffID()
	if err != nil {
		t.Fatal(err)
	}
	d := m.Layers[0]
	return &layer{
		Request: Request{Digest: d.Digest.String(), Size: d.Size, MediaType: string(d.MediaType), Annotations: d.Annotations},
		diffID:  diffID.String(), blob: blob, files: fs,
	}
}

// packLayer makes a layer of a tar, compressed as a whole.
func packLayer(t testing.TB, tarball []byte, fs []file, pack func(testing.TB, []byte) []byte) *layer {
	t.Helper()
	blob := pack(t, tarball)
	return &layer{
		Request: Request{Digest: fmt.Sprintf("sha256:%x", sha256.Sum256(blob)), Size: int64(len(blob))},
		diffID:  fmt.Sprintf("sha256:%x", sha256.Sum256(tarball)), blob: blob, files: fs,
	}
}

func readLayer(l v1.Layer) ([]byte, error) {
	rc, err := l.Compressed()
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	return io.ReadAll(rc)
}

// site is a registry that keeps a log of what it is asked and spoils answers.
type site struct {
	*link.Recorder
	transport *http.Transport
}

var single = regexp.MustCompile(`^bytes=[0-9]+-[0-9]+$`)

// serve begins a registry that has the layers. Whatever a test does with it, it
// is asked for nothing but single ranges.
func serve(t testing.TB, ls ...*layer) *site {
	t.Helper()
	dir := t.TempDir()
	h, err := forms.NewHandler(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range ls {
		algorithm, hex, _ := strings.Cut(l.Digest, ":")
		if err := os.WriteFile(filepath.Join(dir, algorithm, hex), l.blob, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	upstream := httptest.NewServer(h)
	t.Cleanup(upstream.Close)
	s := &site{link.NewRecorder(strings.TrimPrefix(upstream.URL, "http://")), &http.Transport{MaxIdleConnsPerHost: 64}}
	if err := s.Listen(context.Background()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.transport.CloseIdleConnections()
		for _, q := range s.Requests() {
			if q.Method != http.MethodGet || !single.MatchString(q.Range) {
				t.Errorf("asked for %s with range %q", q.Method, q.Range)
			}
		}
		s.Close()
	})
	return s
}

func (s *site) origin(l *layer) Origin {
	return Origin{URL: "http://" + s.Addr() + "/v2/repo/blobs/" + l.Digest, Transport: s.transport}
}

// ranges lists the ranges that were asked for, in their order.
func (s *site) ranges() (rs []string) {
	for _, q := range s.Requests() {
		rs = append(rs, q.Range)
	}
	return rs
}

// spoil gives the first answers the faults, and leaves the others alone.
func (s *site) spoil(fs ...*link.Fault) {
	var mu sync.Mutex
	s.SetFault(func(*http.Request) *link.Fault {
		mu.Lock()
		defer mu.Unlock()
		if len(fs) == 0 {
			return nil
		}
		f := fs[0]
		fs = fs[1:]
		return f
	})
}

// always gives every answer the fault.
func (s *site) always(f link.Fault) {
	s.SetFault(func(*http.Request) *link.Fault { return &f })
}

// quick never ends a wait in a test that does not want it to.
var quick = Patience{Stall: time.Minute, Total: 5 * time.Minute, Base: time.Microsecond}

// hasty gives up where a test has nothing else to show. A busy machine may take
// longer for what succeeds: only a step that is to fail has it.
var hasty = Patience{Stall: 50 * time.Millisecond, Total: 200 * time.Millisecond, Base: time.Microsecond}

// soon waits until something is so, which may take a busy machine its time, and
// reports whether it ever was.
func soon(is func() bool) bool {
	for end := time.Now().Add(time.Minute); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			return false
		}
	}
	return true
}

type machine struct {
	*Fetcher
	dir    string
	counts *prometheus.Registry
}

// count gives the sum of a metric over its labels, or of the one with this value.
func (m *machine) count(t testing.TB, name, value string) (n int) {
	t.Helper()
	all, err := m.counts.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range all {
		for _, c := range f.GetMetric() {
			wanted := value == ""
			for _, l := range c.GetLabel() {
				wanted = wanted || l.GetValue() == value
			}
			if wanted && f.GetName() == "varve_"+name {
				n += int(c.GetCounter().GetValue())
			}
		}
	}
	return n
}

// on makes a Fetcher of the store in dir and closes it at the end.
func on(t testing.TB, dir string, p Patience) *machine {
	t.Helper()
	st, err := store.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	reg := prometheus.NewRegistry()
	f := New(Config{Store: st, Metrics: metrics.New(reg), Log: slog.New(slog.DiscardHandler), Patience: p})
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return &machine{f, dir, reg}
}

func (m *machine) close(t testing.TB) {
	t.Helper()
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
}

// request names the layer as it is had from the origins, or not at all. Nothing is
// fetched but what is asked for.
func (m *machine) request(l *layer, origins ...Origin) Request {
	q := l.Request
	q.NoAhead = true
	q.DiffID = func() (string, error) { return l.diffID, nil }
	if len(origins) > 0 {
		q.Blob = NewRemote(l.Size, m.m, origins...)
	}
	return q
}

func (m *machine) open(t testing.TB, l *layer, origins ...Origin) *Handle {
	t.Helper()
	h, err := m.Open(context.Background(), m.request(l, origins...))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	return h
}

func (m *machine) path(l *layer, name string) string {
	key, err := l.key()
	if err != nil {
		panic(err)
	}
	return filepath.Join(m.dir, "layers", strings.Replace(key, ":", "-", 1), name)
}

// restart makes the store believe that the machine has started since.
func (m *machine) restart(t testing.TB, l *layer) {
	t.Helper()
	m.edit(t, l, "present", func(b []byte) []byte {
		copy(b[40:], "00000000-0000-0000-0000-000000000000") // store's bootAt
		return b
	})
}

func (m *machine) edit(t testing.TB, l *layer, name string, change func([]byte) []byte) {
	t.Helper()
	b, err := os.ReadFile(m.path(l, name))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(m.path(l, name), change(b), 0o600); err != nil {
		t.Fatal(err)
	}
}

// entry finds a file by its name.
func entry(t testing.TB, h *Handle, name string) index.Entry {
	t.Helper()
	es, err := h.Entries()
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range es {
		if e.Name == name {
			return e
		}
	}
	t.Fatalf("the layer has no %q", name)
	return index.Entry{}
}

// content reads a file as a face does.
func content(h *Handle, e index.Entry) ([]byte, error) {
	if err := h.Ensure(e.Data, e.Size); err != nil {
		return nil, err
	}
	b := make([]byte, e.Size)
	f, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", h.Fd()))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	_, err = f.ReadAt(b, e.Data)
	return b, err
}

func checkFile(t testing.TB, h *Handle, f file) {
	t.Helper()
	got, err := content(h, entry(t, h, f.name))
	if err != nil {
		t.Errorf("%q: %v", f.name, err)
	} else if !bytes.Equal(got, f.data) {
		t.Errorf("%q: contents differ", f.name)
	}
}

func checkAll(t testing.TB, h *Handle, l *layer) {
	t.Helper()
	for _, f := range l.files {
		checkFile(t, h, f)
	}
}

// span gives the blob's range that holds a file, as a Range header says it.
func span(t testing.TB, h *Handle, name string) string {
	t.Helper()
	e := entry(t, h, name)
	from, to := h.frames.PiecesIn(e.Data, e.Size)
	if from == to {
		t.Fatalf("%q has no pieces", name)
	}
	first, last := h.frames.Frame(h.frames.FrameOf(from)), h.frames.Frame(h.frames.FrameOf(to-1))
	return asked(first.Offset, last.Offset+last.Length)
}

func asked(from, end int64) string { return fmt.Sprintf("bytes=%d-%d", from, end-1) }

// bounds undoes asked.
func bounds(t testing.TB, r string) (from, end int64) {
	t.Helper()
	if _, err := fmt.Sscanf(r, "bytes=%d-%d", &from, &end); err != nil {
		t.Fatalf("%q: %v", r, err)
	}
	return from, end + 1
}

func find(t testing.TB, l *layer, name string) file {
	t.Helper()
	for _, f := range l.files {
		if f.name == name {
			return f
		}
	}
	t.Fatalf("no file %q", name)
	return file{}
}
