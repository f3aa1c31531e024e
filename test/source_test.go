package test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/varvefs/varve/bench/forms"
)

// TestSources mounts the same image from the other places that may hold one.
func TestSources(t *testing.T) {
	needRoot(t)
	layers := layered(t)
	want := applied(t, layers...)
	for _, form := range []forms.Form{forms.Gzip, forms.EStargz, forms.ZstdChunkedContainers} {
		img := build(t, form, layers...)
		want := want
		if secondsOnly(form) {
			want = want.roundSeconds()
		}
		for kind, source := range sources(t, img) {
			// An archive of docker's keeps no annotations: what is left of a
			// layer with a table of contents is its tar.
			if strings.HasPrefix(source, "docker-archive:") && !tarForm(form) {
				continue
			}
			for _, face := range faces {
				t.Run(string(form)+"/"+kind+"/"+face, func(t *testing.T) { compare(t, source, face, want, false) })
			}
		}
	}
}

func sources(t *testing.T, img v1.Image) map[string]string {
	t.Helper()
	dir := t.TempDir()
	oci := filepath.Join(dir, "layout")
	p := mustGet[layout.Path](t)(layout.Write(oci, empty.Index))
	must(t, p.AppendImage(img, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": "tagged"})))
	ociTar := filepath.Join(dir, "layout.tar")
	packDir(t, oci, ociTar)
	docker := filepath.Join(dir, "saved.tar")
	must(t, tarball.WriteToFile(docker, mustGet[name.Tag](t)(name.NewTag("example.com/saved:1")), img))
	return map[string]string{
		"layout": "oci:" + oci, "tag": "oci:" + oci + ":tagged", "layouttar": "oci:" + ociTar,
		"docker": "docker-archive:" + docker, "dockertag": "docker-archive:" + docker + ":example.com/saved:1",
	}
}

func packDir(t *testing.T, dir, path string) {
	t.Helper()
	f, err := os.Create(path)
	must(t, err)
	defer f.Close()
	must(t, forms.Pack(t.Context(), dir, f))
}

func TestSourceMistakes(t *testing.T) {
	needRoot(t)
	l, _ := small(t, 3, 10)
	s := sources(t, build(t, forms.Gzip, l))
	h := newHost(t)
	h.fails(3, "mount", "oci:"+h.root+"/nowhere")
	h.fails(3, "mount", "docker-archive:"+h.root+"/nowhere.tar")
	h.fails(3, "mount", s["layout"]+":other-tag")
	h.fails(3, "mount", s["docker"]+":example.com/saved:2")
	junk := filepath.Join(h.root, "junk.tar")
	must(t, os.WriteFile(junk, content("junk", 5000), 0o644))
	h.fails(6, "mount", "docker-archive:"+junk)
	h.fails(6, "mount", "oci:"+junk)
}
