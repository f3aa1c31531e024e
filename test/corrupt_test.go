package test

import (
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/varvefs/varve/bench/forms"
	"github.com/varvefs/varve/bench/link"
)

// TestCorruptChunk spoils what is fetched for one file. Its reader gets EIO and
// never a wrong byte or a zero; the log says which file and why, and not at every
// read; other files are as they were.
func TestCorruptChunk(t *testing.T) {
	needRoot(t)
	for _, form := range []forms.Form{forms.EStargz, forms.ZstdChunked, forms.ZstdChunkedContainers} {
		for _, face := range faces {
			t.Run(string(form)+"/"+face, func(t *testing.T) { corruptChunk(t, form, face) })
		}
	}
}

func corruptChunk(t *testing.T, form forms.Form, face string) {
	l, names := small(t, 20, 300_000)
	r, ref := serve(t, form, l)
	h := newHost(t)
	dir := h.ok("mount", "--face", face, ref)
	bad, good := names[10], names[2]
	r.rec.SetFault(func(q *http.Request) *link.Fault {
		if link.ClassOf(q) == link.Blob {
			return &link.Fault{Corrupt: 5000}
		}
		return nil
	})
	for range 3 {
		b, err := os.ReadFile(filepath.Join(dir, bad))
		if !errors.Is(err, syscall.EIO) {
			t.Errorf("%d bytes and %v, want EIO", len(b), err)
		}
		want := content(bad, 300_000)
		if len(b) > len(want) || string(b) != string(want[:len(b)]) {
			t.Errorf("wrong bytes among %d", len(b))
		}
	}
	r.rec.SetFault(nil)
	if got := helper(t, "sum", filepath.Join(dir, good)); got != sumOf(content(good, 300_000)) {
		t.Errorf("%s: digest %s", good, got)
	}
	said := h.logged("level=ERROR")
	if len(said) != 1 { // however many places the kernel asked for
		t.Errorf("the log says %d times: %q", len(said), said)
	}
	for _, line := range said {
		if !strings.Contains(line, bad) || !strings.Contains(line, "op=read") || !strings.Contains(line, h.inspect(dir).Layers[0].Digest) {
			t.Errorf("the log says %s", line)
		}
	}
	if r := h.run("ls", ref); r.code != 0 {
		t.Error(r)
	}
	h.ok("umount", dir)

	// Nothing wrong was kept: the next mount of a new daemon has it right.
	h.stop()
	dir = h.ok("mount", "--face", face, ref)
	if got := helper(t, "sum", filepath.Join(dir, bad)); got != sumOf(content(bad, 300_000)) {
		t.Errorf("%s: digest %s", bad, got)
	}
	h.ok("umount", dir)
}

// TestCatCorrupt ends with the code of a failed verification.
func TestCatCorrupt(t *testing.T) {
	needRoot(t)
	l, names := small(t, 3, 300_000)
	r, ref := serve(t, forms.EStargz, l)
	h := newHost(t)
	h.ok("ls", ref)
	r.rec.SetFault(func(q *http.Request) *link.Fault {
		if link.ClassOf(q) == link.Blob {
			return &link.Fault{Corrupt: 5000}
		}
		return nil
	})
	if line := h.fails(6, "cat", ref, "/"+names[0]); !strings.Contains(line, names[0]) {
		t.Errorf("the file is not named: %s", line)
	}
}
