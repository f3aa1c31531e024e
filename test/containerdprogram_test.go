package test

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/varvefs/varve/bench/forms"
	"github.com/varvefs/varve/bench/link"
)

// withShell is a layer with this machine's shell and all that its loader reads.
func withShell(t *testing.T) []byte {
	l := newLayer(t)
	l.dir("bin", "lib", "lib64", "etc", "proc", "sys", "dev", "run")
	seen := map[string]bool{}
	var add func(to, from string)
	add = func(to, from string) {
		if seen[to] {
			return
		}
		seen[to] = true
		l.add(tar.Header{Typeflag: tar.TypeReg, Name: to, Mode: 0o755}, mustGet[[]byte](t)(os.ReadFile(from)))
		f := mustGet[*elf.File](t)(elf.Open(from))
		defer f.Close()
		for _, h := range f.Progs {
			if h.Type == elf.PT_INTERP {
				b := make([]byte, h.Filesz)
				mustGet[int](t)(h.ReadAt(b, 0))
				path := string(bytes.TrimRight(b, "\x00"))
				add(path[1:], path)
			}
		}
		for _, lib := range mustGet[[]string](t)(f.ImportedLibraries()) {
			found, err := filepath.Glob("/lib/*-linux-gnu/" + lib)
			if err != nil || len(found) == 0 {
				continue // the loader itself, say
			}
			add("lib/"+lib, found[0])
		}
	}
	add("bin/sh", "/bin/sh")
	l.file("etc/passwd", []byte("root:x:0:0:root:/:/bin/sh\n"))
	return l.bytes()
}

// TestContainerdProgram pulls an image of which nothing is known: what any program of
// it reads before its first line comes at once, and nothing else.
func TestContainerdProgram(t *testing.T) {
	withContainerd(t, func(t *testing.T, c *ctrd) {
		own := newLayer(t)
		own.file("big", content("big", 8<<20))
		img := build(t, forms.EStargz, withShell(t), own.bytes())
		r := newRegistry(t)
		got := c.pull(r.push("shell:1", img))
		soon(t, func() error {
			b, err := os.ReadFile(filepath.Join(c.root, "state", "daemon.log"))
			if err == nil && !strings.Contains(string(b), "source=program") {
				err = errors.New("what a program needs is not here")
			}
			return err
		})
		if n := r.rec.Totals().All().Bytes; n > 6<<20 {
			t.Errorf("%d bytes were fetched", n)
		}
		r.rec.SetFault(func(*http.Request) *link.Fault { return &link.Fault{Status: http.StatusForbidden} })
		if out := c.does("shell", got, "/bin/sh", "-c", "echo it runs"); !strings.Contains(out, "it runs") {
			t.Errorf("with the registry away it says %q", out)
		}
	})
}
