package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/daemon"
)

// TestCopyStream copies as tars, in and out.
func TestCopyStream(t *testing.T) {
	src := plant(t, t.TempDir(), sources...)
	s := &served{mount: daemon.Mount{Dir: src, State: "mounted"}}
	names := func(b []byte) (names []string) {
		for tr := tar.NewReader(bytes.NewReader(b)); ; {
			h, err := tr.Next()
			if err != nil {
				return names
			}
			name := h.Name
			if h.Typeflag == tar.TypeLink {
				name += " = " + h.Linkname
			}
			names = append(names, name)
		}
	}
	dirNames := func(as string) []string {
		return []string{as, as + "a", as + "dangling", as + "empty/", as + "hard = " + as + "a", as + "link", as + "sub/", as + "sub/b"}
	}
	contents := []string{"./", "a", "dangling", "empty/", "hard = a", "link", "sub/", "sub/b"}
	for _, tt := range []struct {
		args []string
		want []string
	}{
		{[]string{"m:/file", "-"}, []string{"file"}},
		{[]string{"m:flink", "-"}, []string{"flink"}},
		{[]string{"-L", "m:flink", "-"}, []string{"flink"}},
		{[]string{"m:/dir", "-"}, dirNames("dir/")},
		{[]string{"m:/dir/.", "-"}, contents},
		{[]string{"-L", "m:/dlink", "-"}, dirNames("dlink/")},
		{[]string{"m:/dlink/.", "-"}, contents},
	} {
		out, err := s.cp(t.Context(), t, nil, tt.args...)
		if d := cmp.Diff(tt.want, names(out)); d != "" || err != nil {
			t.Errorf("%q: %v\n%s", tt.args, err, d)
		}
	}
	whole, err := s.cp(t.Context(), t, nil, "m:/", "-")
	if err != nil {
		t.Fatal(err)
	}
	var gz, zst bytes.Buffer
	zw := gzip.NewWriter(&gz)
	zw.Write(whole)
	zw.Close()
	sw, _ := zstd.NewWriter(&zst)
	sw.Write(whole)
	sw.Close()
	for name, in := range map[string][]byte{"tar": whole, "gzip": gz.Bytes(), "zstd": zst.Bytes()} {
		dst := t.TempDir()
		if err := into(t, &copier{}, bytes.NewReader(in), "-", dst, "/"); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		// The root itself has its own time, which is not copied.
		ts, _ := unix.TimeToTimespec(old)
		unix.UtimesNano(dst, []unix.Timespec{ts, ts})
		if d := cmp.Diff(tree(t, src), tree(t, dst)); d != "" {
			t.Errorf("%s: (-want +got)\n%s", name, d)
		}
	}
	if err := into(t, &copier{}, strings.NewReader("\xfd7zXZ\x00..."), "-", t.TempDir(), "/"); err == nil || !strings.Contains(err.Error(), "xz") {
		t.Errorf("xz: %v", err)
	}
	if err := into(t, &copier{}, strings.NewReader(""), "-", t.TempDir(), "/"); err != nil {
		t.Errorf("empty: %v", err)
	}
}

// TestCopyBroken has the daemon fail in the middle: what was there before stays,
// and nothing is half there.
func TestCopyBroken(t *testing.T) {
	src := plant(t, t.TempDir(), "d/")
	whole := pour(t, dir("d"), reg("d/a", "first"), reg("d/b", strings.Repeat("x", 5000)))
	for _, cut := range []int{0, 100, 2500, 3072, 4096} {
		s := &served{
			mount: daemon.Mount{Dir: src, State: "mounted"}, tar: whole[:cut:cut],
			err: &daemon.Error{Message: "the registry is away", Exit: daemon.ExitUnreachable},
		}
		if s.tar == nil {
			s.tar = []byte{}
		}
		dst := plant(t, t.TempDir(), "d/", "d/b old")
		_, err := s.cp(t.Context(), t, nil, "m:/d", dst)
		if exitCode(err) != daemon.ExitUnreachable || message(err) != "the registry is away" {
			t.Errorf("cut at %d: %v, exit %d", cut, err, exitCode(err))
		}
		es, _ := os.ReadDir(dst + "/d")
		for _, e := range es {
			b, _ := os.ReadFile(filepath.Join(dst, "d", e.Name()))
			if name := e.Name(); name == "b" && string(b) != "old" || name == "a" && string(b) != "first" || name != "a" && name != "b" {
				t.Errorf("cut at %d: %s is %.20q", cut, name, b)
			}
		}
	}
	// An error after the tar's own end counts as well.
	s := &served{
		mount: daemon.Mount{Dir: src, State: "mounted"}, tar: whole,
		err: &daemon.Error{Message: "wrong bytes", Exit: daemon.ExitVerify},
	}
	for _, args := range [][]string{{"m:/d", t.TempDir()}, {"m:/d", "-"}, {"m:/d/.", "-"}} {
		if _, err := s.cp(t.Context(), t, nil, args...); exitCode(err) != daemon.ExitVerify {
			t.Errorf("%q: %v, exit %d", args, err, exitCode(err))
		}
	}
}

// TestCopyInterrupted interrupts a copy that waits for standard input.
func TestCopyInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	r, w := io.Pipe()
	defer w.Close()
	go func() {
		b := pour(t, reg("a", strings.Repeat("x", 1<<16)))
		w.Write(b[:1<<15])
		cancel()
	}()
	dst := t.TempDir()
	root, err := unix.Open(dst, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(root)
	c := &copier{in: r}
	c.meter.w = io.Discard
	if err := c.intoRoot(ctx, "-", end{of: "m", path: "/"}, root); message(err) != "interrupted" {
		t.Errorf("%v", err)
	}
	if es, _ := os.ReadDir(dst); len(es) != 0 {
		t.Errorf("left %v", es)
	}
}

// TestCopySays compares what is said at the end, and what on the way.
func TestCopySays(t *testing.T) {
	src, dst := plant(t, t.TempDir(), "f 12345", "d/", "d/a 1", "d/b 22"), t.TempDir()
	unix.Mknod(src+"/d/sock", unix.S_IFSOCK|0o600, 0)
	for _, tt := range []struct {
		from, to, want string
	}{
		{"f", "/", "Successfully copied 5B (transferred 2.05kB) to m:/\n"},
		{"d", "/x", "varve: warning: skipped the socket " + src + "/d/sock\nSuccessfully copied 3B (transferred 4.61kB) to m:/x\n"},
	} {
		var b bytes.Buffer
		c := &copier{tell: true}
		root, err := unix.Open(dst, unix.O_PATH|unix.O_DIRECTORY, 0)
		if err != nil {
			t.Fatal(err)
		}
		c.meter.w = &b
		err = c.intoRoot(t.Context(), src+"/"+tt.from, end{of: "m", path: tt.to}, root)
		unix.Close(root)
		if b.String() != tt.want || err != nil {
			t.Errorf("%q, %v, want %q", b.String(), err, tt.want)
		}
	}
	var b bytes.Buffer
	m := meter{w: &b, show: true, label: "Copying to m\x1b", n: 2048}
	m.draw()
	m.last = time.Now().Add(time.Hour) // however long it takes, the next comes
	m.draw()                           // too early to be seen
	m.clear()
	m.clear()
	if want := "\r\x1b[2KCopying to m - 2.05kB\r\x1b[2K"; b.String() != want {
		t.Errorf("%q, want %q", b.String(), want)
	}
}
