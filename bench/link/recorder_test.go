package link

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func record(t *testing.T) *Recorder {
	t.Helper()
	blob := strings.Repeat("0123456789", 1000)
	upstream := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch ClassOf(r) {
		case Ping:
			w.WriteHeader(http.StatusUnauthorized)
		case Token:
			io.WriteString(w, `{"token":"t"}`)
		case Manifest:
			io.WriteString(w, "{}")
		case Blob:
			http.ServeContent(w, r, "", time.Time{}, strings.NewReader(blob))
		default:
			http.NotFound(w, r)
		}
	}))
	t.Cleanup(upstream.Close)
	r := NewRecorder(strings.TrimPrefix(upstream.URL, "http://"))
	if err := r.Listen(context.Background()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func get(t *testing.T, r *Recorder, path, rng string) (*http.Response, string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+r.Addr()+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	if rng != "" {
		req.Header.Set("Range", rng)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return resp, string(body), err
}

func TestClassOf(t *testing.T) {
	for path, want := range map[string]Class{
		"/v2/":                          Ping,
		"/v2":                           Ping,
		"/token":                        Token,
		"/service/token":                Token,
		"/v2/a/manifests/latest":        Manifest,
		"/v2/a/b/manifests/sha256:00":   Manifest,
		"/v2/a/blobs/sha256:00":         Blob,
		"/v2/manifests/x/blobs/sha256:": Blob,
		"/v2/a/blobs/uploads/":          Other,
		"/v2/a/blobs/uploads/12":        Other,
		"/v2/a/referrers/sha256:00":     Referrer,
		"/v2/a/tags/list":               Other,
		"/v2/_catalog":                  Other,
		"/metrics":                      Other,
	} {
		if got := ClassOf(httptest.NewRequest(http.MethodGet, path, nil)); got != want {
			t.Errorf("%s is %v, want %v", path, got, want)
		}
	}
}

func TestRecorderCounts(t *testing.T) {
	r := record(t)
	for _, q := range [][2]string{
		{"/v2/", ""}, {"/token", ""}, {"/v2/a/manifests/x", ""},
		{"/v2/a/blobs/sha256:00", ""}, {"/v2/a/blobs/sha256:00", "bytes=10-14"},
	} {
		if _, _, err := get(t, r, q[0], q[1]); err != nil {
			t.Fatal(err)
		}
		// What the client has read is in the log already, without waiting.
		if last := r.Requests(); last[len(last)-1].Status == 0 {
			t.Errorf("%s: answered before it was logged", q[0])
		}
	}
	want := Totals{Ping: {1, 0}, Token: {1, 13}, Manifest: {1, 2}, Blob: {2, 10005}}
	if diff := cmp.Diff(want, r.Totals()); diff != "" {
		t.Error(diff)
	}
	if got := r.Totals().All(); got != (Total{5, 10020}) {
		t.Errorf("all: %+v", got)
	}
	last := r.Requests()[4]
	wantLast := Request{Class: Blob, Method: "GET", Path: "/v2/a/blobs/sha256:00", Range: "bytes=10-14", Status: 206, Bytes: 5}
	if diff := cmp.Diff(wantLast, last, cmpopts.IgnoreFields(Request{}, "Start", "Done")); diff != "" {
		t.Error(diff)
	}
	r.Reset()
	if got := r.Totals(); got != (Totals{}) {
		t.Errorf("after Reset: %+v", got)
	}
}

func TestFaults(t *testing.T) {
	const path, rng = "/v2/a/blobs/sha256:00", "bytes=100-199"
	tests := map[string]struct {
		fault  Fault
		status int
		size   int
		header [2]string
		broken bool
	}{
		"busy":          {fault: Fault{Status: 429, Header: http.Header{"Retry-After": {"1"}}}, status: 429, header: [2]string{"Retry-After", "1"}},
		"answered":      {fault: Fault{Status: 401, Body: []byte("no")}, status: 401, size: 2},
		"answered part": {fault: Fault{Status: 200, Body: []byte("0123"), Break: AbortBody, After: 2}, status: 200, size: 2, broken: true},
		"truncated":     {fault: Fault{Break: AbortBody, After: 40}, status: 206, size: 40, broken: true},
		"nothing":       {fault: Fault{Break: AbortBody}, status: 206, broken: true},
		"longer":        {fault: Fault{Break: AbortBody, After: 100}, status: 206, size: 100},
		"no range":      {fault: Fault{DropRange: true}, status: 200, size: 10000},
		"wrong range":   {fault: Fault{Header: http.Header{"Content-Range": {"bytes 0-99/10000"}}}, status: 206, size: 100, header: [2]string{"Content-Range", "bytes 0-99/10000"}},
		"removed":       {fault: Fault{Header: http.Header{"Content-Range": nil}}, status: 206, size: 100, header: [2]string{"Content-Range", ""}},
		"late":          {fault: Fault{Delay: time.Millisecond}, status: 206, size: 100},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			r := record(t)
			r.SetFault(func(q *http.Request) *Fault { return &test.fault })
			resp, body, err := get(t, r, path, rng)
			if (err != nil) != test.broken {
				t.Fatalf("error %v, want one: %v", err, test.broken)
			}
			if resp.StatusCode != test.status || len(body) != test.size {
				t.Errorf("status %d, %d bytes; want %d, %d", resp.StatusCode, len(body), test.status, test.size)
			}
			if key := test.header[0]; key != "" && resp.Header.Get(key) != test.header[1] {
				t.Errorf("%s: %q, want %q", key, resp.Header.Get(key), test.header[1])
			}
			log := r.Requests()
			if len(log) != 1 || !log[0].Fault || log[0].Status != test.status || log[0].Bytes != int64(test.size) {
				t.Errorf("log %+v", log)
			}
			r.SetFault(nil)
			if _, body, err := get(t, r, path, rng); err != nil || len(body) != 100 {
				t.Errorf("without a fault: %d bytes, %v", len(body), err)
			}
		})
	}
}

func TestFaultCorrupt(t *testing.T) {
	r := record(t)
	r.SetFault(func(*http.Request) *Fault { return &Fault{Corrupt: 3} })
	_, body, err := get(t, r, "/v2/a/blobs/sha256:00", "bytes=0-4")
	if want := "01" + string([]byte{^byte('2')}) + "34"; err != nil || body != want {
		t.Errorf("%q, %v; want %q", body, err, want)
	}
}

func TestFaultStall(t *testing.T) {
	r := record(t)
	r.SetFault(func(*http.Request) *Fault { return &Fault{Break: StallBody, After: 7} })
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	req, _ := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+r.Addr()+"/v2/a/blobs/sha256:00", nil)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if _, err := io.ReadFull(resp.Body, make([]byte, 7)); err != nil {
		t.Fatal(err)
	}
	more := make(chan error, 1)
	go func() {
		_, err := resp.Body.Read(make([]byte, 1))
		more <- err
	}()
	select {
	case err := <-more:
		t.Fatalf("read on: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	cancel()
	if err := <-more; !errors.Is(err, context.Canceled) && !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("after the client went: %v", err)
	}
	if got := r.Totals()[Blob]; got != (Total{1, 7}) {
		t.Errorf("total %+v", got)
	}
}
