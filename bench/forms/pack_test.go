package forms

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// tree makes a small root file system of every type that this user may make.
func tree(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	at := func(name string) string { return filepath.Join(root, name) }
	must(os.MkdirAll(at("usr/bin"), 0o755))
	must(os.MkdirAll(at("empty"), 0o711))
	must(os.WriteFile(at("usr/bin/tool"), noise(1, 300_000), 0o755))
	must(os.Link(at("usr/bin/tool"), at("usr/bin/alias")))
	must(os.WriteFile(at("usr/empty"), nil, 0o600))
	must(os.WriteFile(at("usr/small"), []byte("small\n"), 0o644))
	must(os.WriteFile(at("usr/zeros"), make([]byte, 100_000), 0o644))
	holes := append(append(noise(2, 5000), make([]byte, 70_000)...), noise(3, 200_000)...)
	must(os.WriteFile(at("usr/holes"), holes, 0o644))
	must(os.WriteFile(at("usr/"+strings.Repeat("long", 40)), []byte("l"), 0o644))
	must(os.WriteFile(at("usr/naïve"), []byte("n"), 0o644))
	must(os.Symlink("../usr/small", at("usr/link")))
	must(unix.Mkfifo(at("fifo"), 0o640))
	must(os.Chmod(at("usr/small"), 0o755|os.ModeSetuid))
	if err := unix.Setxattr(at("usr/small"), "user.varve", []byte("a\x00b"), 0); err != nil {
		t.Logf("no user xattrs here: %v", err)
	}
	if os.Geteuid() == 0 {
		capability := []byte{1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0} // cap_net_bind_service=ep
		must(unix.Setxattr(at("usr/bin/tool"), "security.capability", capability, 0))
		must(os.Lchown(at("usr/link"), 12, 34))
		if err := unix.Mknod(at("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))); err != nil {
			t.Logf("no devices here: %v", err)
		}
	}
	must(os.Chtimes(at("usr/small"), time.Unix(1e9, 123456789), time.Unix(1e9, 123456789)))
	return root
}

// item is what a tar says of a file, in terms that every form keeps.
type item struct {
	Type       byte
	Mode       int64
	UID, GID   int
	Seconds    int64
	Link       string
	Size       int64
	Sum        string
	Major      int64
	Minor      int64
	Attributes map[string]string
}

// items reads a tar by name. The entries of eStargz's own are left out.
func items(t *testing.T, r io.Reader) map[string]item {
	t.Helper()
	all := map[string]item{}
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		name := filepath.Clean(h.Name)
		if name == "stargz.index.json" || name == ".no.prefetch.landmark" {
			continue
		}
		sum := sha256.New()
		if _, err := io.Copy(sum, tr); err != nil {
			t.Fatal(err)
		}
		i := item{
			Type: h.Typeflag, Mode: h.Mode, UID: h.Uid, GID: h.Gid, Seconds: h.ModTime.Unix(),
			Link: h.Linkname, Size: h.Size, Sum: fmt.Sprintf("%x", sum.Sum(nil)),
			Major: h.Devmajor, Minor: h.Devminor, Attributes: map[string]string{},
		}
		for k, v := range h.PAXRecords {
			if strings.HasPrefix(k, xattrRecord) {
				i.Attributes[k] = v
			}
		}
		if _, ok := all[name]; ok {
			t.Errorf("%s twice", name)
		}
		all[name] = i
	}
}

func pack(t *testing.T, root string) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := Pack(context.Background(), root, &b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestPack(t *testing.T) {
	root := tree(t)
	b := pack(t, root)
	if !bytes.Equal(b, pack(t, root)) {
		t.Error("the same tree gave other bytes")
	}
	if n := len(b) % 512; n != 0 {
		t.Errorf("%d bytes beyond a block", n)
	}
	got := items(t, bytes.NewReader(b))

	want := map[string]byte{
		".": tar.TypeDir, "usr": tar.TypeDir, "usr/bin": tar.TypeDir, "empty": tar.TypeDir, "fifo": tar.TypeFifo,
		"usr/bin/alias": tar.TypeReg, "usr/bin/tool": tar.TypeLink, // by name the alias is the first
		"usr/empty": tar.TypeReg, "usr/small": tar.TypeReg, "usr/zeros": tar.TypeReg, "usr/holes": tar.TypeReg,
		"usr/naïve": tar.TypeReg, "usr/" + strings.Repeat("long", 40): tar.TypeReg, "usr/link": tar.TypeSymlink,
	}
	types := map[string]byte{}
	for name, i := range got {
		types[name] = i.Type
	}
	if _, err := os.Lstat(filepath.Join(root, "null")); err == nil {
		want["null"] = tar.TypeChar
		if n := got["null"]; n.Major != 1 || n.Minor != 3 {
			t.Errorf("device %d:%d", n.Major, n.Minor)
		}
	}
	if diff := cmp.Diff(want, types); diff != "" {
		t.Error(diff)
	}
	if got["usr/bin/tool"].Link != "usr/bin/alias" {
		t.Errorf("hard link to %q", got["usr/bin/tool"].Link)
	}
	if os.Geteuid() == 0 {
		if c := got["usr/bin/alias"].Attributes[xattrRecord+"security.capability"]; len(c) != 20 {
			t.Errorf("capability of %d bytes", len(c))
		}
	}
	if m := got["usr/small"].Mode; m != 0o4755 {
		t.Errorf("mode %o", m)
	}

	for tr := tar.NewReader(bytes.NewReader(b)); ; {
		h, err := tr.Next()
		if err != nil {
			t.Fatal("usr/small not found: ", err)
		}
		if h.Name == "usr/small" {
			if !h.ModTime.Equal(time.Unix(1e9, 123456789)) {
				t.Errorf("time %v", h.ModTime)
			}
			break
		}
	}
}

func TestPackLeavesSocketsOut(t *testing.T) {
	dir, err := os.MkdirTemp("", "s") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	l, err := net.Listen("unix", filepath.Join(dir, "sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if got := items(t, bytes.NewReader(pack(t, dir))); len(got) != 1 {
		t.Errorf("packed %v", got)
	}
}

func TestPackStops(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := Pack(ctx, t.TempDir(), io.Discard); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	if err := Pack(context.Background(), "/nonexistent", io.Discard); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("error %v", err)
	}
}
