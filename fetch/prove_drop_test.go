package fetch

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/index"
)

// TestDropBesideReaders drops frames while they are read: who reads sees what the
// layer has, and never what is left of it.
func TestDropBesideReaders(t *testing.T) {
	fs := volumes(3, 1<<20)
	l := packLayer(t, makeTar(t, fs), fs, gz)
	m := on(t, t.TempDir(), quick)
	p, b := m.start(t, l)
	defer p.Close()
	es := watch(p)
	var stop, readers sync.WaitGroup
	over := make(chan struct{})
	entries := func() []index.Entry { return slices.Clone(es.until(0)) }
	read := func(d interface {
		Hold(off, n int64) error
		Release()
		Fd() int
	}, seed uint64) {
		r := rand.New(rand.NewPCG(seed, 1))
		for {
			select {
			case <-over:
				return
			default:
			}
			k := r.IntN(len(fs))
			if known := entries(); k >= len(known) || len(fs[k].data) == 0 {
				continue
			} else if from, n := r.IntN(len(fs[k].data)), 1+r.IntN(200_000); true {
				want := fs[k].data[from:min(from+n, len(fs[k].data))]
				at := known[k].Data + int64(from)
				if err := d.Hold(at, int64(len(want))); err != nil {
					t.Errorf("%q: %v", fs[k].name, err)
					return
				}
				got := make([]byte, len(want))
				_, err := unix.Pread(d.Fd(), got, at)
				d.Release()
				if err != nil || !bytes.Equal(got, want) {
					t.Errorf("%q: %d bytes at %d differ, %v", fs[k].name, len(got), from, err)
					return
				}
			}
		}
	}
	// Some read from the pass, and go on when it is over and the layer is dropped.
	for i := range 3 {
		readers.Go(func() { read(p, uint64(i)) })
	}
	var dropped atomic.Int64
	stop.Go(func() {
		for {
			select {
			case <-over:
				return
			default:
			}
			for _, l := range m.Layers(l.Digest) {
				if n, err := l.Drop(); err != nil {
					t.Error(err)
				} else if n > 0 {
					dropped.Add(1)
				}
			}
		}
	})
	b.allow(len(l.blob))
	h := m.openFile(t, l)
	for i := range 3 {
		readers.Go(func() { read(h, uint64(10+i)) })
	}
	time.Sleep(time.Second)
	often := soon(func() bool { return dropped.Load() >= 3 })
	close(over)
	readers.Wait()
	stop.Wait()
	if !often {
		t.Errorf("dropped %d times", dropped.Load())
	}
	checkAll(t, h, l)
}

// TestDropWhileProving takes frames away from who compares all of them.
func TestDropWhileProving(t *testing.T) {
	fs := volumes(3, 1<<20)
	l := packLayer(t, makeTar(t, fs), fs, gz)
	x := published(KindSOCI, sharedOf(t, l).ZTOC)
	for range 3 {
		m := on(t, t.TempDir(), quick)
		q := m.with(l, nil, x)
		q.Blob = File{bytes.NewReader(l.blob), l.Size}
		h := m.must(t, q)
		for range 5 {
			readAll(t, h)
			if _, err := h.Drop(); err != nil {
				t.Fatal(err)
			}
		}
		readAll(t, h)
		checkAll(t, h, l)
		if err := proof(t, h); err != nil {
			t.Error(err)
		}
		dropAll(t, h)
		checkAll(t, h, l)
	}
}

// TestCloseWhileProving ends a proof with the machine, and finds the layer as it
// was.
func TestCloseWhileProving(t *testing.T) {
	fs := volumes(3, 1<<20)
	l := packLayer(t, makeTar(t, fs), fs, gz)
	x := published(KindBundle, sharedOf(t, l).Bundle)
	m := on(t, t.TempDir(), quick)
	q := m.with(l, nil, x)
	q.Blob = File{bytes.NewReader(l.blob), l.Size}
	readAll(t, m.must(t, q))
	m.close(t)
	m = on(t, m.dir, quick)
	h := m.must(t, q)
	if err := proof(t, h); err != nil {
		t.Error(err)
	}
	checkAll(t, h, l)
}

// TestDoubtedSpans starts the machine anew while layers are neither whole nor
// proven. What of a span no digest proves is known by its sum.
func TestDoubtedSpans(t *testing.T) {
	for name, l := range indexedLayers(t) {
		t.Run(name, func(t *testing.T) {
			s := serve(t, l.layer)
			m := on(t, t.TempDir(), quick)
			h := m.must(t, m.with(l.layer, s, l.Found))
			checkFile(t, h, find(t, l.layer, "volume1"))
			e := entry(t, h, "volume1")
			k, _ := h.frames.PiecesIn(e.Data+e.Size/2, 1)
			f := h.frames.Frame(h.frames.FrameOf(k))
			key := h.Key
			m.close(t)

			path := filepath.Join(m.dir, "layers", strings.Replace(key, ":", "-", 1), "data")
			data, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			right := find(t, l.layer, "volume1").data[e.Size/2]
			if err := errors.Join(second(data.WriteAt([]byte{^right}, e.Data+e.Size/2)), data.Close()); err != nil {
				t.Fatal(err)
			}
			m = m.again(t, key)
			q := m.request(l.layer)
			q.Key = key
			h = m.must(t, q)
			if _, err := content(h, e); !errors.Is(err, ErrOffline) {
				t.Errorf("damaged, without a network: %v", err)
			}
			s.Reset()
			h = m.must(t, m.with(l.layer, s, l.Found))
			checkFile(t, h, find(t, l.layer, "volume1"))
			if rs, want := s.ranges(), asked(f.Offset, f.Offset+f.Length); !slices.Equal(rs, []string{want}) {
				t.Errorf("asked for %q, want %q", rs, want)
			}
			readAll(t, h)
			if err := proof(t, h); err != nil {
				t.Error(err)
			}
			checkAll(t, h, l.layer)
		})
	}
}
