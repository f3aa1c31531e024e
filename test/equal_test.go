package test

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/bench/forms"
)

var faces = []string{"kernel", "fuse"}

// kinds is an image of every type of file and every attribute, with whiteouts,
// within what go-containerregistry flattens rightly.
func kinds(t *testing.T) [][]byte {
	a := newLayer(t)
	a.add(tar.Header{Typeflag: tar.TypeDir, Name: "./", Mode: 0o751, Uid: 7, Gid: 8, ModTime: time.Unix(1_500_000_000, 5)}, nil)
	a.dir("sizes", "kinds", "attrs", "names", "gone", "many", "keep")
	for _, n := range []int{0, 1, 100, 4095, 4096, 4097, 65536, 1 << 20, 5 << 20, 9 << 20} {
		a.file(fmt.Sprintf("sizes/%d", n), content("sizes", n))
	}
	holes := make([]byte, 3<<20)
	copy(holes[1<<20:], "in the middle of zeroes")
	a.file("sizes/zeroes", make([]byte, 1<<20))
	a.file("sizes/holes", holes)

	a.file("kinds/file", []byte("one inode, four names\n"))
	a.hardlink("kinds/second", "kinds/file")
	a.hardlink("names/third", "kinds/file")
	a.hardlink("a-fourth-before-them-all", "kinds/file")
	a.symlink("kinds/link", "file")
	a.symlink("kinds/absolute", "/kinds/file")
	a.symlink("kinds/nowhere", "../nowhere")
	a.symlink("kinds/long", strings.Repeat("0123456789", 400))
	a.symlink("kinds/todir", "../sizes")
	a.add(tar.Header{Typeflag: tar.TypeFifo, Name: "kinds/fifo", Mode: 0o620}, nil)
	a.add(tar.Header{Typeflag: tar.TypeChar, Name: "kinds/null", Devmajor: 1, Devminor: 3, Mode: 0o666}, nil)
	a.add(tar.Header{Typeflag: tar.TypeBlock, Name: "kinds/disk", Devmajor: 300, Devminor: 70_000, Mode: 0o660, Gid: 6}, nil)

	a.add(tar.Header{Typeflag: tar.TypeReg, Name: "attrs/setuid", Mode: 0o4755}, []byte("s"))
	a.add(tar.Header{Typeflag: tar.TypeReg, Name: "attrs/setgid", Mode: 0o2711, Gid: 42}, []byte("g"))
	a.add(tar.Header{Typeflag: tar.TypeReg, Name: "attrs/unreadable", Mode: 0o1}, []byte("u"))
	a.add(tar.Header{Typeflag: tar.TypeDir, Name: "attrs/sticky/", Mode: 0o1777}, nil)
	a.add(tar.Header{Typeflag: tar.TypeReg, Name: "attrs/owner", Uid: 3_000_000_000, Gid: 4_000_000_000}, []byte("o"))
	a.add(tar.Header{Typeflag: tar.TypeReg, Name: "attrs/old", ModTime: time.Unix(-1_000_000_000, 987_654_321)}, []byte("1938"))
	a.add(tar.Header{Typeflag: tar.TypeReg, Name: "attrs/second-before", ModTime: time.Unix(-1, 0)}, nil)
	a.add(tar.Header{Typeflag: tar.TypeReg, Name: "attrs/late", ModTime: time.Unix(5_000_000_000, 1)}, []byte("2128"))
	capability := "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	a.add(tar.Header{Typeflag: tar.TypeReg, Name: "attrs/capable", Mode: 0o755, PAXRecords: xattrs("security.capability", capability)}, []byte("c"))
	a.add(tar.Header{Typeflag: tar.TypeReg, Name: "attrs/user", PAXRecords: xattrs("user.empty", "", "user.nul", "a\x00b\xff", "user.long", strings.Repeat("x", 2000), "trusted.t", "1")}, []byte("x"))
	a.add(tar.Header{Typeflag: tar.TypeDir, Name: "attrs/dir/", PAXRecords: xattrs("user.of", "a directory")}, nil)
	a.add(tar.Header{Typeflag: tar.TypeSymlink, Name: "attrs/link", Linkname: "user", Mode: 0o777, PAXRecords: xattrs("trusted.of", "a symlink")}, nil)

	a.file("names/"+strings.Repeat("n", 255), []byte("255"))
	a.file("names/"+strings.Repeat("é", 127), []byte("254"))
	a.file("names/new\nline", []byte("n"))
	a.file("names/sp ace\ttab\\back\"quote'", []byte("s"))
	a.file("names/-rf", []byte("-"))
	a.file("names/...", []byte("dots"))
	a.file("names/日本語 🦊", []byte("u"))
	deep := ""
	for i := range 60 {
		deep += fmt.Sprintf("level-%d/", i)
		a.dir(deep)
	}
	a.file(deep+"bottom", []byte("deep"))
	for i := range 3000 {
		a.file(fmt.Sprintf("many/%d-%s", i, strings.Repeat("x", i%50)), nil)
	}
	a.dir("gone/dir", "gone/dir/sub")
	a.file("gone/file", []byte("gone"))
	a.file("gone/dir/sub/file", []byte("gone"))
	a.file("gone/stays", []byte("stays"))
	a.file("keep/replaced", []byte("old"))

	b := newLayer(t)
	b.dir("gone", "keep")
	b.whiteout("gone/file", "gone/dir", "gone/never-was")
	b.file("keep/replaced", content("new", 10_000))
	b.symlink("keep/added", "replaced")

	c := newLayer(t)
	c.add(tar.Header{Typeflag: tar.TypeDir, Name: "keep/", Mode: 0o700, Uid: 5, ModTime: time.Unix(1_700_000_000, 0)}, nil)
	c.file("keep/third", content("third", 5000))
	return [][]byte{a.bytes(), b.bytes(), c.bytes()}
}

// layered is an image of what layers do to one another.
func layered(t *testing.T) [][]byte {
	a := newLayer(t)
	a.dir("opaque", "opaque/sub", "late", "swap", "swap/below", "links", "acl", "hidden")
	a.file("opaque/old", []byte("old"))
	a.file("opaque/sub/old", []byte("old"))
	a.file("late/old", []byte("old"))
	a.file("swap/below/old", []byte("old"))
	a.file("file-then-dir", []byte("file"))
	a.symlink("link-then-dir", "opaque")
	a.file("links/target", content("target", 6000))
	a.file("links/other", []byte("other"))
	a.symlink("links/outside", "../../../../etc/passwd")
	a.file("hidden/a", []byte("a"))
	a.file("twice", []byte("first"))
	acl := "\x02\x00\x00\x00\x01\x00\x06\x00\xff\xff\xff\xff\x02\x00\x04\x00\xe8\x03\x00\x00\x04\x00\x04\x00\xff\xff\xff\xff\x10\x00\x06\x00\xff\xff\xff\xff\x20\x00\x00\x00\xff\xff\xff\xff"
	a.add(tar.Header{Typeflag: tar.TypeReg, Name: "acl/file", Mode: 0o660, PAXRecords: xattrs("system.posix_acl_access", acl)}, []byte("a"))
	a.add(tar.Header{Typeflag: tar.TypeDir, Name: "acl/dir/", Mode: 0o750, PAXRecords: xattrs("system.posix_acl_default", acl)}, nil)

	b := newLayer(t)
	b.dir("opaque")
	b.opaque("opaque")
	b.file("opaque/new", []byte("new"))
	b.dir("late")
	b.file("late/new", []byte("new"))
	b.opaque("late")
	b.file("swap", []byte("a file for a while"))
	b.dir("file-then-dir")
	b.file("file-then-dir/inside", []byte("in"))
	b.dir("link-then-dir")
	b.file("link-then-dir/inside", []byte("in"))
	b.dir("links")
	b.hardlink("links/across", "links/target")
	b.whiteout("links/other")
	b.whiteout("hidden")
	b.file("twice", content("second", 4096))

	c := newLayer(t)
	c.dir("swap", "swap/below", "hidden", "opaque", "opaque/sub", "links")
	c.file("swap/below/new", []byte("new"))
	c.file("hidden/b", []byte("back"))
	c.file("opaque/sub/third", []byte("third"))
	c.file("links/other", []byte("back"))
	c.add(tar.Header{Typeflag: tar.TypeReg, Name: "twice", Mode: 0o600, Uid: 12}, content("third", 9000))
	return [][]byte{a.bytes(), b.bytes(), c.bytes()}
}

// tarForm reports whether a form keeps the layer's tar as it was.
func tarForm(f forms.Form) bool { return f == forms.Tar || f == forms.Gzip || f == forms.Zstd }

// secondsOnly reports whether a form's table of contents has no nanoseconds.
func secondsOnly(f forms.Form) bool { return f == forms.EStargz || f == forms.ZstdChunked }

// everywhere mounts an image in every form, with both faces, and compares it.
// rooted says whether want knows what the image says of its root.
func everywhere(t *testing.T, layers [][]byte, want tree, rooted bool) {
	cut := want.roundSeconds()
	for _, form := range forms.Forms() {
		img := build(t, form, layers...)
		r := newRegistry(t)
		ref := r.push("tree:1", img)
		want := want
		if secondsOnly(form) {
			want = cut
		}
		for _, face := range faces {
			t.Run(string(form)+"/"+face, func(t *testing.T) { compare(t, ref, face, want, rooted) })
		}
	}
}

func compare(t *testing.T, image, face string, want tree, rooted bool) {
	t.Helper()
	h := newHost(t)
	dir := h.ok("mount", "--wait", "--face", face, image)
	got := readTree(t, dir)
	if !rooted {
		got["."] = want["."]
	}
	sameTree(t, want, got)
	h.ok("umount", dir)
}

func TestTreeOfKinds(t *testing.T) {
	needRoot(t)
	layers := kinds(t)
	everywhere(t, layers, extracted(t, build(t, forms.Tar, layers...)), true)
}

func TestTreeOfLayers(t *testing.T) {
	needRoot(t)
	layers := layered(t)
	everywhere(t, layers, applied(t, layers...), false)
}

// TestNamesThatAreNotUTF8 needs forms without JSON, which cannot hold them.
func TestNamesThatAreNotUTF8(t *testing.T) {
	needRoot(t)
	l := newLayer(t)
	l.dir(".", "d")
	l.file("d/\xff\xfe", []byte("bytes"))
	l.file("d/caf\xe9", content("latin", 5000))
	l.symlink("d/link", "caf\xe9")
	l.hardlink("d/\x80", "d/caf\xe9")
	layer := l.bytes()
	want := applied(t, layer)
	if _, ok := want["d/caf\xe9"]; !ok {
		t.Fatal("the oracle has not kept the name")
	}
	for _, form := range forms.Forms() {
		if tarForm(form) {
			_, ref := serve(t, form, layer)
			for _, face := range faces {
				t.Run(string(form)+"/"+face, func(t *testing.T) { compare(t, ref, face, want, false) })
			}
		}
	}
}

// TestSparse reads what GNU tar writes of sparse files, in its three forms.
func TestSparse(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	f, err := os.Create(filepath.Join(dir, "sparse"))
	must(t, err)
	for _, off := range []int64{0, 100_000, 1 << 20, 7<<20 + 123} {
		_, err := f.WriteAt(content("piece", 5000), off)
		must(t, err)
	}
	must(t, f.Truncate(9<<20+1))
	must(t, f.Close())
	must(t, os.WriteFile(filepath.Join(dir, "after"), []byte("after"), 0o644))
	must(t, unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600))
	must(t, os.Chmod(dir, 0o755))
	want := readTree(t, dir)
	for _, kind := range []string{"--format=gnu", "--format=posix --sparse-version=0.0", "--format=posix --sparse-version=0.1", "--format=posix --sparse-version=1.0"} {
		args := append(strings.Fields(kind), "--sparse", "--numeric-owner", "-C", dir, "-cf", "-", ".")
		var out, errs bytes.Buffer
		cmd := exec.Command("tar", args...)
		cmd.Stdout, cmd.Stderr = &out, &errs
		if err := cmd.Run(); err != nil {
			t.Fatalf("tar %s: %v\n%s", kind, err, &errs)
		}
		want := want
		if kind == "--format=gnu" {
			want = want.wholeSeconds()
		}
		_, ref := serve(t, forms.Gzip, out.Bytes())
		for _, face := range faces {
			t.Run(strings.ReplaceAll(kind, " ", "")+"/"+face, func(t *testing.T) { compare(t, ref, face, want, true) })
		}
	}
}

// TestTreeOfThisMachine packs a real tree: the sources of Go's commands.
func TestTreeOfThisMachine(t *testing.T) {
	needRoot(t)
	out, err := exec.Command("go", "env", "GOROOT").Output()
	must(t, err)
	src := filepath.Join(strings.TrimSpace(string(out)), "src", "cmd")
	want := readTree(t, src)
	var packed bytes.Buffer
	must(t, forms.Pack(context.Background(), src, &packed))
	cut := want.roundSeconds()
	for i, form := range forms.Forms() {
		img := mustGet[v1.Image](t)(forms.LoadTar(context.Background(), bytes.NewReader(packed.Bytes()), form, forms.Options{Dir: t.TempDir(), Level: 1}))
		ref := newRegistry(t).push("go/src:latest", img)
		want := want
		if secondsOnly(form) {
			want = cut
		}
		// Every form with one face, both faces with several forms.
		face := faces[i%2]
		t.Run(string(form)+"/"+face, func(t *testing.T) { compare(t, ref, face, want, true) })
	}
}
