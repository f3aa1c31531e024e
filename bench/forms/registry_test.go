package forms

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
)

func ask(t *testing.T, method, url string, body io.Reader, header ...string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(context.Background(), method, url, body)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(b)
}

func TestRegistryBlobs(t *testing.T) {
	base := "http://" + serve(t) + "/v2/a/b/blobs/"
	blob := noise(5, 100_000)
	digest := hashBytes(blob).String()

	if resp, _ := ask(t, "GET", base+digest, nil); resp.StatusCode != 404 {
		t.Errorf("absent blob: %d", resp.StatusCode)
	}
	if resp, _ := ask(t, "GET", base+"sha256:../../etc", nil); resp.StatusCode/100 != 4 {
		t.Errorf("bad digest: %d", resp.StatusCode)
	}
	if resp, _ := ask(t, "POST", base+"uploads/?mount="+digest+"&from=c", nil); resp.StatusCode != 202 {
		t.Errorf("mount of an absent blob: %d", resp.StatusCode)
	}

	// In two parts and a check, then once more whole.
	resp, _ := ask(t, "POST", base+"uploads/", nil)
	at := strings.TrimSuffix(base, "/v2/a/b/blobs/") + resp.Header.Get("Location")
	if resp, _ := ask(t, "PATCH", at, bytes.NewReader(blob[:60_000]), "Content-Range", "0-59999"); resp.StatusCode != 202 || resp.Header.Get("Range") != "0-59999" {
		t.Errorf("first part: %d, %v", resp.StatusCode, resp.Header)
	}
	if resp, _ := ask(t, "PATCH", at, bytes.NewReader(blob[:5]), "Content-Range", "0-4"); resp.StatusCode != 416 {
		t.Errorf("part in the wrong place: %d", resp.StatusCode)
	}
	if resp, _ := ask(t, "PUT", at+"?digest="+digest, bytes.NewReader(blob[60_000:])); resp.StatusCode != 201 {
		t.Errorf("last part: %d", resp.StatusCode)
	}
	if resp, _ := ask(t, "PUT", at+"?digest="+digest, nil); resp.StatusCode != 404 {
		t.Errorf("finished upload: %d", resp.StatusCode)
	}
	if resp, _ := ask(t, "POST", base+"uploads/?digest="+hashBytes(nil).String(), bytes.NewReader(blob)); resp.StatusCode != 400 {
		t.Errorf("wrong digest: %d", resp.StatusCode)
	}
	if resp, _ := ask(t, "POST", base+"uploads/?digest="+digest, bytes.NewReader(blob)); resp.StatusCode != 201 {
		t.Errorf("whole upload: %d", resp.StatusCode)
	}
	if resp, _ := ask(t, "POST", base+"uploads/?mount="+digest+"&from=c", nil); resp.StatusCode != 201 {
		t.Errorf("mount: %d", resp.StatusCode)
	}

	if resp, _ := ask(t, "HEAD", base+digest, nil); resp.ContentLength != 100_000 || resp.Header.Get("Docker-Content-Digest") != digest {
		t.Errorf("head: %v", resp.Header)
	}
	for _, test := range []struct {
		rng    string
		status int
		begin  int
		end    int
	}{
		{"", 200, 0, 100_000},
		{"bytes=0-0", 206, 0, 1},
		{"bytes=500-1499", 206, 500, 1500},
		{"bytes=99000-", 206, 99_000, 100_000},
		{"bytes=99000-200000", 206, 99_000, 100_000},
		{"bytes=100000-100001", 416, 0, 0},
	} {
		var header []string
		if test.rng != "" {
			header = []string{"Range", test.rng}
		}
		resp, body := ask(t, "GET", base+digest, nil, header...)
		if resp.StatusCode != test.status || resp.StatusCode < 400 && body != string(blob[test.begin:test.end]) {
			t.Errorf("%q: status %d, %d bytes", test.rng, resp.StatusCode, len(body))
		}
		if want := fmt.Sprintf("bytes %d-%d/100000", test.begin, test.end-1); test.status == 206 && resp.Header.Get("Content-Range") != want {
			t.Errorf("%q: %q, want %q", test.rng, resp.Header.Get("Content-Range"), want)
		}
	}

	var wg sync.WaitGroup
	for i := range 32 {
		wg.Go(func() {
			begin, end := i*3000, i*3000+2999
			if _, body := ask(t, "GET", base+digest, nil, "Range", fmt.Sprintf("bytes=%d-%d", begin, end)); body != string(blob[begin:end+1]) {
				t.Errorf("range %d: wrong bytes", i)
			}
		})
	}
	wg.Wait()

	if resp, _ := ask(t, "DELETE", base+digest, nil); resp.StatusCode != 202 {
		t.Errorf("delete: %d", resp.StatusCode)
	}
	if resp, _ := ask(t, "HEAD", base+digest, nil); resp.StatusCode != 404 {
		t.Errorf("deleted blob: %d", resp.StatusCode)
	}
}

func TestRegistryReferrers(t *testing.T) {
	addr := serve(t)
	img, _ := plain(t)
	if err := Push(context.Background(), img, addr+"/a:plain"); err != nil {
		t.Fatal(err)
	}
	resp, body := ask(t, "GET", "http://"+addr+"/v2/a/referrers/"+hashBytes(nil).String(), nil)
	if resp.StatusCode != http.StatusOK || !strings.Contains(body, "manifests") {
		t.Errorf("%d: %s", resp.StatusCode, body)
	}
}

func TestUploadStaysInItsFolder(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(dir+"/secret", []byte("s"), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := Registry(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	resp, _ := ask(t, "PATCH", "http://"+s.Addr()+"/v2/a/blobs/uploads/..", strings.NewReader("x"))
	if resp.StatusCode/100 == 2 {
		t.Errorf("status %d", resp.StatusCode)
	}
}
