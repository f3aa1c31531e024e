package fetch

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/varvefs/varve/bench/link"
	"github.com/varvefs/varve/index"
)

// sharedOf makes a layer's indexes on another machine, with spans of 256 KiB in the
// zTOC.
func sharedOf(t testing.TB, l *layer) *Shared {
	t.Helper()
	m := on(t, t.TempDir(), quick)
	q := m.request(l)
	q.Blob = File{bytes.NewReader(l.blob), l.Size}
	s, err := m.Index(context.Background(), q, 256<<10)
	if err != nil {
		t.Fatal(err)
	}
	m.empty(t)
	return s
}

// published is an index as an image's referrers have it.
func published(kind string, doc []byte) Found {
	return Found{
		Kind: kind, Digest: fmt.Sprintf("sha256:%x", sha256.Sum256(doc)), Why: "in a test",
		Bytes: func(context.Context) ([]byte, error) { return doc, nil },
	}
}

// with asks for a layer that has indexes.
func (m *machine) with(l *layer, s *site, fs ...Found) Request {
	q := m.request(l)
	if s != nil {
		q = m.request(l, s.origin(l))
	}
	q.Find = func(context.Context) ([]Found, error) { return fs, nil }
	return q
}

func (m *machine) must(t testing.TB, q Request) *Handle {
	t.Helper()
	h, err := m.Open(context.Background(), q)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	return h
}

// indexedLayers are layers with the indexes that can be made of them.
func indexedLayers(t testing.TB) map[string]indexed {
	t.Helper()
	fs := volumes(3, 1<<20)
	tarball := makeTar(t, fs)
	all := map[string]indexed{}
	for name, pack := range map[string]func(testing.TB, []byte) []byte{"tar": raw, "gzip": gz, "zstd": manyFrames} {
		l := packLayer(t, tarball, fs, pack)
		s := sharedOf(t, l)
		all[name+", bundle"] = indexed{l, published(KindBundle, s.Bundle)}
		if s.ZTOC != nil {
			all[name+", soci"] = indexed{l, published(KindSOCI, s.ZTOC)}
		}
	}
	if len(all) != 5 {
		t.Fatalf("%d indexes", len(all))
	}
	return all
}

type indexed struct {
	*layer
	Found
}

func TestFoundIndex(t *testing.T) {
	for name, l := range indexedLayers(t) {
		t.Run(name, func(t *testing.T) {
			s := serve(t, l.layer)
			m := on(t, t.TempDir(), quick)
			q := m.with(l.layer, s, l.Found)
			q.Index = "require"
			h := m.must(t, q)
			if rs := s.ranges(); len(rs) != 0 {
				t.Errorf("asked for %q", rs)
			}
			if a := h.About(); !a.Unproven || a.Index != l.Kind || a.DiffID != "" || a.Size != l.Size || !strings.Contains(a.Why, "in a test") {
				t.Errorf("%+v", a)
			}
			want := span(t, h, "volume1")
			checkFile(t, h, find(t, l.layer, "volume1"))
			if diff := cmp.Diff([]string{want}, s.ranges()); diff != "" {
				t.Error(diff)
			}
			doc, _ := l.Bytes(context.Background())
			from, end := bounds(t, want)
			if got, want := h.Fetched(), end-from+int64(len(doc)); got != want || end-from >= l.Size {
				t.Errorf("%d bytes fetched, want %d; the blob has %d", got, want, l.Size)
			}
			if h.Whole() || m.count(t, "lazy_fallbacks_total", "") != 0 {
				t.Errorf("whole: %v, %d fallbacks", h.Whole(), m.count(t, "lazy_fallbacks_total", ""))
			}
			key := h.Key
			m.close(t)

			// With the network away, the key finds what the index found.
			m = on(t, m.dir, quick)
			if _, err := m.Open(context.Background(), m.request(l.layer)); !errors.Is(err, ErrOffline) {
				t.Errorf("without its key: %v", err)
			}
			q = m.request(l.layer)
			q.Key = key
			h = m.must(t, q)
			checkFile(t, h, find(t, l.layer, "volume1"))
			if _, err := content(h, entry(t, h, "last")); !errors.Is(err, ErrOffline) {
				t.Errorf("missing bytes: %v", err)
			}
			h = m.must(t, m.with(l.layer, nil, l.Found))
			checkFile(t, h, find(t, l.layer, "volume1"))
			q.Key = "sha256:" + strings.Repeat("0", 64) + strings.TrimPrefix(key, l.layer.Digest)
			if _, err := m.Open(context.Background(), q); !errors.Is(err, ErrOffline) {
				t.Errorf("with another's key: %v", err)
			}

			// Who wants no index gets the layer under its own digest.
			s.Reset()
			q = m.with(l.layer, s, l.Found)
			q.Index, q.Key = "none", key
			q.Find = func(context.Context) ([]Found, error) { t.Error("asked for indexes"); return nil, nil }
			h = m.must(t, q)
			if h.Key != l.layer.Digest || h.About().Index != "checkpoints" || m.count(t, "lazy_fallbacks_total", "not_wanted") != 1 {
				t.Errorf("%q, %+v", h.Key, h.About())
			}
			if diff := cmp.Diff([]string{asked(0, l.Size)}, s.ranges()); diff != "" {
				t.Error(diff)
			}
			checkAll(t, h, l.layer)
		})
	}
}

// TestIndexNotUsed reads layers whole whose indexes are not to be had or wrong at
// first sight. Those are not looked at again.
func TestIndexNotUsed(t *testing.T) {
	fs := volumes(3, 1<<20)
	l := packLayer(t, makeTar(t, fs), fs, gz)
	other := packLayer(t, makeTar(t, fs[1:]), fs[1:], gz)
	good, others := sharedOf(t, l), sharedOf(t, other)
	lying, err := index.ReadBundle(good.Bundle)
	if err != nil {
		t.Fatal(err)
	}
	lying.DiffID = other.diffID
	gone := published(KindBundle, good.Bundle)
	gone.Bytes = func(context.Context) ([]byte, error) { return nil, ErrUnavailable }
	for name, test := range map[string]struct {
		found  []Found
		err    error // of Find
		reason string
		used   bool // the last one is
		kept   bool // that the first is wrong
	}{
		"none":                  {reason: "no_index"},
		"cannot be asked for":   {err: ErrUnavailable, reason: "index_unreachable"},
		"unreachable":           {found: []Found{gone}, reason: "index_unreachable"},
		"bundle cut":            {found: []Found{published(KindBundle, good.Bundle[:len(good.Bundle)-1])}, reason: "index_malformed", kept: true},
		"bundle empty":          {found: []Found{published(KindBundle, nil)}, reason: "index_malformed", kept: true},
		"bundle of another":     {found: []Found{published(KindBundle, others.Bundle)}, reason: "index_malformed", kept: true},
		"bundle of other diffs": {found: []Found{published(KindBundle, bundle(t, lying))}, reason: "index_malformed", kept: true},
		"zTOC cut":              {found: []Found{published(KindSOCI, good.ZTOC[:len(good.ZTOC)/2])}, reason: "index_malformed", kept: true},
		"zTOC empty":            {found: []Found{published(KindSOCI, nil)}, reason: "index_malformed", kept: true},
		"zTOC of another":       {found: []Found{published(KindSOCI, others.ZTOC)}, reason: "index_malformed", kept: true},
		"zTOC for a bundle":     {found: []Found{published(KindBundle, good.ZTOC)}, reason: "index_malformed", kept: true},
		"kind nobody knows":     {found: []Found{published("other", good.Bundle)}, reason: "index_malformed", kept: true},
		"second is good":        {found: []Found{published(KindBundle, nil), published(KindSOCI, good.ZTOC)}, used: true, kept: true},
		"first is unreachable":  {found: []Found{gone, published(KindSOCI, good.ZTOC)}, used: true},
	} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, l)
			m := on(t, t.TempDir(), quick)
			q := m.with(l, s)
			var bytesAsked atomic.Int32
			q.Find = func(context.Context) ([]Found, error) {
				found := append([]Found(nil), test.found...)
				for i, x := range found {
					found[i].Bytes = func(ctx context.Context) ([]byte, error) {
						if i == 0 {
							bytesAsked.Add(1)
						}
						return x.Bytes(ctx)
					}
				}
				return found, test.err
			}
			if !test.used {
				q.Index = "require"
				if _, err := m.Open(context.Background(), q); !errors.Is(err, ErrNoIndex) {
					t.Errorf("required, and %v", err)
				}
				if rs := s.ranges(); len(rs) != 0 {
					t.Errorf("asked for %q", rs)
				}
				m.empty(t)
				m.close(t)
				os.RemoveAll(filepath.Join(m.dir, "refused"))
				m = on(t, m.dir, quick)
				q.Index, q.Blob = "", NewRemote(l.Size, m.m, s.origin(l))
				bytesAsked.Store(0)
			}
			h := m.must(t, q)
			checkAll(t, h, l)
			if used := h.About().Index != "checkpoints"; used != test.used {
				t.Errorf("%+v", h.About())
			}
			if n := m.count(t, "lazy_fallbacks_total", ""); test.used != (n == 0) || n != m.count(t, "lazy_fallbacks_total", test.reason) {
				t.Errorf("%d fallbacks, %d of them %s", n, m.count(t, "lazy_fallbacks_total", test.reason), test.reason)
			}
			if !test.used {
				if diff := cmp.Diff([]string{asked(0, l.Size)}, s.ranges()); diff != "" {
					t.Error(diff)
				}
			}
			if len(test.found) == 0 {
				return
			}
			if got := m.store.Refused(test.found[0].key(l.Digest)); got != test.kept {
				t.Errorf("refused: %v", got)
			}
			if n := m.count(t, "verify_failures_total", "index"); n > 0 != test.kept {
				t.Errorf("%d failures counted", n)
			}
			m.close(t)
			if err := os.RemoveAll(filepath.Join(m.dir, "layers")); err != nil {
				t.Fatal(err)
			}
			m = on(t, m.dir, quick)
			q.Blob = NewRemote(l.Size, m.m, s.origin(l))
			h = m.must(t, q)
			checkAll(t, h, l)
			if n := bytesAsked.Load(); test.kept != (n == 1) {
				t.Errorf("the first was asked for %d times", n)
			}
			if test.kept && !test.used && m.count(t, "lazy_fallbacks_total", "index_refused") != 1 {
				t.Error("it is not counted that it was refused")
			}
		})
	}
}

func bundle(t testing.TB, b *index.Bundle) []byte {
	t.Helper()
	var buf bytes.Buffer
	if err := index.WriteBundle(&buf, b); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// TestConfigLies has an image whose config names another diffID than the layer has
// not take the index from others.
func TestConfigLies(t *testing.T) {
	fs := volumes(2, 1<<20)
	l := packLayer(t, makeTar(t, fs), fs, gz)
	x := published(KindSOCI, sharedOf(t, l).ZTOC)
	s := serve(t, l)
	m := on(t, t.TempDir(), quick)
	h := m.must(t, m.with(l, s, x))
	readAll(t, h)
	if err := proof(t, h); err != nil {
		t.Fatal(err)
	}
	q := m.with(l, s, x)
	q.DiffID = func() (string, error) { return "sha256:" + strings.Repeat("0", 64), nil }
	if _, err := m.Open(context.Background(), q); !errors.Is(err, ErrVerify) {
		t.Errorf("got %v", err)
	}
	if m.store.Refused(h.Key) {
		t.Error("its index was refused")
	}
	checkAll(t, m.must(t, m.with(l, s, x)), l)
}

// TestIndexIsAskedForOnce opens a layer for many at once.
func TestIndexIsAskedForOnce(t *testing.T) {
	fs := volumes(2, 1<<20)
	l := packLayer(t, makeTar(t, fs), fs, gz)
	x := published(KindBundle, sharedOf(t, l).Bundle)
	m := on(t, t.TempDir(), quick)
	s := serve(t, l)
	var asked atomic.Int32
	inner := x.Bytes
	x.Bytes = func(ctx context.Context) ([]byte, error) { asked.Add(1); return inner(ctx) }
	done := make(chan error)
	for range 16 {
		go func() {
			h, err := m.Open(context.Background(), m.with(l, s, x))
			if err == nil {
				h.Close()
			}
			done <- err
		}()
	}
	for range 16 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if n := asked.Load(); n != 1 {
		t.Errorf("%d times", n)
	}
}

// TestCorruptFoundSpan spoils what is read by the indexes of others: nothing wrong is
// served, or lies in the data file.
func TestCorruptFoundSpan(t *testing.T) {
	for name, l := range indexedLayers(t) {
		t.Run(name, func(t *testing.T) {
			s := serve(t, l.layer)
			m := on(t, t.TempDir(), quick)
			h := m.must(t, m.with(l.layer, s, l.Found))
			r, e := span(t, h, "first"), entry(t, h, "first")
			s.spoil(&link.Fault{Corrupt: 700}, &link.Fault{Corrupt: 700})
			if _, err := content(h, e); !errors.Is(err, ErrVerify) {
				t.Fatalf("got %v", err)
			}
			if diff := cmp.Diff([]string{r, r}, s.ranges()); diff != "" {
				t.Error(diff)
			}
			disk := make([]byte, e.Size)
			_, err := h.data.File().ReadAt(disk, e.Data)
			if right := find(t, l.layer, "first").data; err != nil || !bytes.Equal(disk, right) && len(bytes.Trim(disk, "\x00")) != 0 {
				t.Errorf("on disk there is %.20q, %v", disk, err)
			}
			forgive(h)
			s.Reset()
			s.spoil(&link.Fault{Corrupt: 700})
			checkFile(t, h, find(t, l.layer, "first"))
			if diff := cmp.Diff([]string{r, r}, s.ranges()); diff != "" {
				t.Error(diff)
			}
			readAll(t, h)
			if err := proof(t, h); err != nil {
				t.Error(err)
			}
		})
	}
}
