package test

import (
	"context"
	"io"
	"path"
	"slices"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/varvefs/varve/bench/forms"
	"github.com/varvefs/varve/bench/link"
)

// registry is a registry behind a recorder of its requests.
type registry struct {
	t      *testing.T
	server *forms.Server
	rec    *link.Recorder
}

func newRegistry(t *testing.T) *registry {
	t.Helper()
	s := mustGet[*forms.Server](t)(forms.Registry(t.TempDir()))
	r := &registry{t: t, server: s, rec: link.NewRecorder(s.Addr())}
	must(t, r.rec.Listen(context.Background()))
	t.Cleanup(r.close)
	return r
}

func (r *registry) close() {
	r.rec.Close()
	r.server.Close()
}

// push puts an image under a name and gives the reference by which the recorder
// sees what is asked for it.
func (r *registry) push(name string, img v1.Image) string {
	r.t.Helper()
	must(r.t, forms.Push(context.Background(), img, r.server.Addr()+"/"+name))
	r.rec.Reset()
	return r.rec.Addr() + "/" + name
}

// serve writes layers in a form and pushes them to a registry of their own.
func serve(t *testing.T, form forms.Form, layers ...[]byte) (*registry, string) {
	t.Helper()
	r := newRegistry(t)
	return r, r.push("test/image:1", build(t, form, layers...))
}

func build(t *testing.T, form forms.Form, layers ...[]byte) v1.Image {
	t.Helper()
	open := make([]forms.Opener, len(layers))
	for i, l := range layers {
		open[i] = opener(l)
	}
	return mustGet[v1.Image](t)(forms.FromLayers(context.Background(), form, forms.Options{Dir: t.TempDir()}, open...))
}

// requests gives what was asked since the last call, by class, configs apart
// from the blobs of layers.
func (r *registry) requests(img v1.Image) (asked map[string]int, ranges []link.Request) {
	r.t.Helper()
	config := mustGet[v1.Hash](r.t)(img.ConfigName())
	asked = map[string]int{}
	for _, q := range r.rec.Requests() {
		switch {
		case q.Class != link.Blob:
			asked[q.Class.String()]++
		case path.Base(q.Path) == config.String():
			asked["config"]++
		default:
			asked["blob"]++
			ranges = append(ranges, q)
		}
	}
	r.rec.Reset()
	return asked, ranges
}

// settled waits until every answer that was begun has ended: what is fetched along
// with what was asked for may come after it.
func (r *registry) settled() {
	r.t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		if !slices.ContainsFunc(r.rec.Requests(), func(q link.Request) bool { return !q.Done }) {
			return
		}
		if time.Now().After(end) {
			r.t.Fatalf("answers do not end: %v", r.rec.Requests())
		}
	}
}

type nopCloser struct{ io.Reader }

func (nopCloser) Close() error { return nil }
