package index

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func dir(name string) Entry  { return Entry{Name: name, Mode: unix.S_IFDIR | 0o755, Mtime: 7} }
func file(name string) Entry { return Entry{Name: name, Mode: unix.S_IFREG | 0o644, Mtime: 7} }
func link(name, to string) Entry {
	return Entry{Name: name, Mode: unix.S_IFLNK | 0o777, Link: to}
}
func hard(name, to string) Entry { return Entry{Name: name, HardLink: true, Link: to} }

func sized(name string, size, data int64) Entry {
	e := file(name)
	e.Size, e.Data = size, data
	return e
}

// build merges layers and opens the index that comes of them.
func build(t *testing.T, layers ...[]Entry) *Image {
	t.Helper()
	im, err := tryBuild(t, layers...)
	if err != nil {
		t.Fatal(err)
	}
	return im
}

func tryBuild(t *testing.T, layers ...[]Entry) (*Image, error) {
	t.Helper()
	tree, err := Merge(layers)
	if err != nil {
		return nil, err
	}
	path := filepath.Join(t.TempDir(), "index.erofs")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	devices := make([]Device, len(layers))
	for i, l := range layers {
		devices[i].Tag = fmt.Sprintf("%064d", i)
		for _, e := range l {
			devices[i].Size = max(devices[i].Size, alignUp(e.Data+e.Size, BlockSize))
		}
	}
	if err := tree.WriteTo(f, devices); err != nil {
		return nil, err
	}
	fsck(t, path, devices)
	im, err := Open(path)
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { im.Close() })
	return im, nil
}

// fsck asks the format's own checker.
func fsck(t *testing.T, path string, devices []Device) {
	t.Helper()
	bin, err := exec.LookPath("fsck.erofs")
	if err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal("fsck.erofs is missing: make deps installs it")
		}
		t.Log("fsck.erofs is missing: the image is not checked")
		return
	}
	var args []string
	for i, d := range devices {
		blob := fmt.Sprintf("%s.%d", path, i)
		f, err := os.Create(blob)
		if err != nil {
			t.Fatal(err)
		}
		f.Truncate(d.Size)
		f.Close()
		args = append(args, "--device="+blob)
	}
	if out, err := exec.Command(bin, append(args, path)...).CombinedOutput(); err != nil {
		t.Fatalf("fsck.erofs: %v\n%s", err, out)
	}
}

// list gives every path of an image with what matters of it.
func list(t *testing.T, im *Image) map[string]string {
	t.Helper()
	got := map[string]string{}
	var walk func(path string, nid uint64)
	walk = func(path string, nid uint64) {
		in, err := im.Inode(nid)
		if err != nil {
			t.Fatal(err)
		}
		s := fmt.Sprintf("%o", in.Mode)
		if dev, off, ok, err := im.Extent(&in); in.Mode&unix.S_IFMT == unix.S_IFREG {
			if err != nil {
				t.Fatal(path, err)
			}
			if ok {
				s += fmt.Sprintf(" %d@%d+%d", in.Size, dev, off)
			}
			if in.Nlink > 1 {
				s += fmt.Sprintf(" links=%d", in.Nlink)
			}
		}
		if in.Mode&unix.S_IFMT == unix.S_IFLNK {
			b, err := im.Readlink(&in)
			if err != nil {
				t.Fatal(path, err)
			}
			s += " -> " + string(b)
		}
		im.Xattrs(&in, func(prefix string, rest, value []byte) bool {
			s += fmt.Sprintf(" %s%s=%q", prefix, rest, value)
			return true
		})
		got["/"+path] = s
		if !in.IsDir() {
			return
		}
		subdirs := uint32(0)
		im.ReadDir(&in, 0, func(d Dirent, _ uint64) bool {
			if n := string(d.Name); n != "." && n != ".." {
				if found, err := im.Lookup(&in, n); err != nil || found != d.Nid {
					t.Fatalf("lookup %q in %q: %d, %v; readdir says %d", n, path, found, err, d.Nid)
				}
				if d.ModeType() == unix.S_IFDIR {
					subdirs++
				}
				walk(strings.TrimPrefix(path+"/"+n, "/"), d.Nid)
			}
			return true
		})
		if in.Nlink != 2+subdirs {
			t.Errorf("%q has %d links and %d directories", path, in.Nlink, subdirs)
		}
	}
	walk("", im.Root())
	return got
}

func TestMerge(t *testing.T) {
	const d, f, l = "40755", "100644", "120777"
	tests := []struct {
		name   string
		layers [][]Entry
		want   map[string]string
	}{
		{"implicit parents", [][]Entry{{file("a/b/c")}}, map[string]string{"/": d, "/a": d, "/a/b": d, "/a/b/c": f}},
		{"last of a name wins", [][]Entry{{file("x"), link("x", "y")}}, map[string]string{"/": d, "/x": l + " -> y"}},
		{"directory merges", [][]Entry{{dir("a"), file("a/1")}, {{Name: "a", Mode: unix.S_IFDIR | 0o700}, file("a/2")}},
			map[string]string{"/": d, "/a": "40700", "/a/1": f, "/a/2": f}},
		{"implicit directory keeps the lower's mode", [][]Entry{{{Name: "a", Mode: unix.S_IFDIR | 0o700}}, {file("a/2")}},
			map[string]string{"/": d, "/a": "40700", "/a/2": f}},
		{"file over directory", [][]Entry{{dir("a"), file("a/1")}, {file("a")}}, map[string]string{"/": d, "/a": f}},
		{"file over directory and back", [][]Entry{{dir("a"), file("a/1")}, {file("a"), dir("a")}}, map[string]string{"/": d, "/a": d}},
		{"whiteout", [][]Entry{{file("a"), file("b")}, {file(".wh.a")}}, map[string]string{"/": d, "/b": f}},
		{"whiteout of a tree", [][]Entry{{file("a/b/c")}, {file("a/.wh.b")}}, map[string]string{"/": d, "/a": d}},
		{"whiteout of nothing", [][]Entry{{}, {file("p/.wh.b")}}, map[string]string{"/": d, "/p": d}},
		{"whiteout, then the name again", [][]Entry{{file("a/b")}, {file(".wh.a"), dir("a")}}, map[string]string{"/": d, "/a": d}},
		{"opaque", [][]Entry{{file("a/old"), file("a/s/old")}, {dir("a"), file("a/new"), file("a/s/new"), file("a/.wh..wh..opq")}},
			map[string]string{"/": d, "/a": d, "/a/new": f, "/a/s": d, "/a/s/new": f}},
		{"opaque first", [][]Entry{{file("a/old")}, {file("a/.wh..wh..opq"), file("a/new")}}, map[string]string{"/": d, "/a": d, "/a/new": f}},
		{"AUFS bookkeeping", [][]Entry{{file(".wh..wh.aufs"), dir(".wh..wh.plnk"), file(".wh..wh.plnk/1"), file("a")}}, map[string]string{"/": d, "/a": f}},
		{"hard links", [][]Entry{{sized("a", 9, 4096), hard("b", "a"), hard("c", "b")}},
			map[string]string{"/": d, "/a": f + " 9@0+4096 links=3", "/b": f + " 9@0+4096 links=3", "/c": f + " 9@0+4096 links=3"}},
		{"hard link to a later name", [][]Entry{{hard("c", "b"), hard("b", "a"), sized("a", 9, 4096)}},
			map[string]string{"/": d, "/a": f + " 9@0+4096 links=3", "/b": f + " 9@0+4096 links=3", "/c": f + " 9@0+4096 links=3"}},
		{"hard link to a lower layer", [][]Entry{{sized("a", 9, 4096)}, {hard("b", "a")}},
			map[string]string{"/": d, "/a": f + " 9@0+4096 links=2", "/b": f + " 9@0+4096 links=2"}},
		{"hard link outlives its target", [][]Entry{{sized("a", 9, 4096), hard("b", "a")}, {file(".wh.a")}}, map[string]string{"/": d, "/b": f + " 9@0+4096"}},
		{"hard link to a symlink", [][]Entry{{link("a", "x"), hard("b", "a")}}, map[string]string{"/": d, "/a": l + " -> x", "/b": l + " -> x"}},
		{"symlink as a parent, same layer", [][]Entry{{dir("usr/lib"), link("lib", "usr/lib"), file("lib/x")}},
			map[string]string{"/": d, "/usr": d, "/usr/lib": d, "/usr/lib/x": f, "/lib": l + " -> usr/lib"}},
		{"symlink as a parent, absolute and climbing", [][]Entry{{dir("a"), link("s", "/../../a"), file("s/x")}},
			map[string]string{"/": d, "/a": d, "/a/x": f, "/s": l + " -> /../../a"}},
		{"symlink as a parent, lower layer", [][]Entry{{dir("usr/lib"), link("lib", "usr/lib")}, {file("lib/x")}},
			map[string]string{"/": d, "/usr": d, "/usr/lib": d, "/lib": d, "/lib/x": f}},
		{"symlinks in a circle", [][]Entry{{link("a", "b"), link("b", "a"), file("a/x")}},
			map[string]string{"/": d, "/a": d, "/a/x": f, "/b": l + " -> a"}},
		{"the root", [][]Entry{{{Name: "", Mode: unix.S_IFDIR | 0o700}, file("a")}}, map[string]string{"/": "40700", "/a": f}},
		{"no layer, no name", [][]Entry{{}}, map[string]string{"/": d}},
		{"names that sort before the dots", [][]Entry{{file("!"), file("-x"), file("..."), file("a")}},
			map[string]string{"/": d, "/!": f, "/-x": f, "/...": f, "/a": f}},
		{"xattrs", [][]Entry{{{Name: "a", Mode: unix.S_IFREG | 0o755, Xattrs: []Xattr{
			{"security.capability", []byte("\x01\x00\x00\x02\x00")}, {"system.posix_acl_access", []byte("acl")}, {"user.e", nil}, {"weird.x", nil}}}}},
			map[string]string{"/": d, "/a": `100755 security.capability="\x01\x00\x00\x02\x00" system.posix_acl_access="acl" user.e=""`}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, list(t, build(t, tt.layers...))); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

// implied gives n files, each in depth directories of its own.
func implied(n, depth int) (es []Entry) {
	for i := range n {
		es = append(es, file(fmt.Sprintf("%d/%sf", i, strings.Repeat("d/", depth-1))))
	}
	return es
}

// What grows with the square of a layer's entries keeps every other mount
// waiting. These took half a minute.
func TestMergeInLinearTime(t *testing.T) {
	var chain, opaque []Entry
	const n = 30_000
	for i := range n {
		chain = append(chain, hard(fmt.Sprint(n-i), fmt.Sprint(n-i-1)))
		opaque = append(opaque, file(fmt.Sprintf("d/%d", i)), file("d/.wh..wh..opq"))
	}
	tree, err := Merge([][]Entry{append(chain, file("0")), opaque})
	if err != nil || tree.nodes != 2*n+3 {
		t.Fatal(tree, err)
	}
}

func TestMergeRefuses(t *testing.T) {
	tests := []struct {
		name   string
		layers [][]Entry
		want   string
	}{
		{"hard link to nothing", [][]Entry{{hard("a", "b")}}, `hard link "a" to "b"`},
		{"hard link to itself", [][]Entry{{hard("a", "a")}}, `hard link "a" to "a"`},
		{"hard links in a circle", [][]Entry{{hard("a", "b"), hard("b", "a")}}, "does not have"},
		{"hard link to a directory", [][]Entry{{dir("d"), hard("a", "d")}}, "directory"},
		{"hard link to a whiteout", [][]Entry{{file("x")}, {file(".wh.x"), hard("a", "x")}}, "does not have"},
		{"whiteout of the root", [][]Entry{{file(".wh.")}}, "whiteout"},
		{"whiteout of dots", [][]Entry{{file("a/.wh...")}}, "whiteout"},
		{"a symlink's long name as a parent", [][]Entry{{link("s", strings.Repeat("n", 300)), file("s/f")}}, "300 bytes"},
		{"symlinks that lead too deep", [][]Entry{{link("s", strings.Repeat("d/", 600)+"t"), link(strings.Repeat("d/", 600)+"t", strings.Repeat("e/", 600)), file("s/f")}}, "in one another"},
		{"too many implied directories", [][]Entry{implied(300, 1000)}, "no layer lists"},
		{"a root that is a file", [][]Entry{{file("")}}, "root"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := tryBuild(t, tt.layers...)
			if !errors.Is(err, ErrMalformed) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

func TestExtremes(t *testing.T) {
	var es []Entry
	want := map[string]string{"/": "40755", "/big": "40755"}
	for i := range 100_000 {
		name := fmt.Sprintf("big/%06d-%s", i, strings.Repeat("n", i%248))
		es = append(es, file(name))
		want["/"+name] = "100644"
	}
	for n := range 300 { // tails of every length around a block's end
		name := fmt.Sprintf("l/%03d", n)
		es = append(es, link(name, strings.Repeat("t", 3780+n)))
		want["/"+name] = "120777 -> " + strings.Repeat("t", 3780+n)
	}
	want["/l"] = "40755"
	e := sized("huge", 1<<42, 0)
	e.Xattrs = []Xattr{{"user.big", bytes.Repeat([]byte("v"), MaxXattr)}, {"user.big2", bytes.Repeat([]byte("v"), 50000)}}
	es = append(es, e, Entry{Name: "old", Mode: unix.S_IFREG | 0o4755, Mtime: -5, MtimeNs: 999999999, UID: 1<<32 - 2, GID: 1 << 31})
	rdev, err := Mkdev(4095, 1<<20-1)
	if err != nil {
		t.Fatal(err)
	}
	es = append(es, Entry{Name: "dev", Mode: unix.S_IFBLK | 0o600, Rdev: rdev}, Entry{Name: "fifo", Mode: unix.S_IFIFO | 0o600})
	tree, err := Merge([][]Entry{es})
	if err != nil {
		t.Fatal(err)
	}
	var img, again bytes.Buffer
	devs := []Device{{Tag: "x", Size: 1 << 42}}
	if err := tree.WriteTo(&img, devs); err != nil {
		t.Fatal(err)
	}
	tree, _ = Merge([][]Entry{es})
	tree.WriteTo(&again, devs)
	if !bytes.Equal(img.Bytes(), again.Bytes()) {
		t.Error("the same layers gave two images")
	}
	im, err := newImage(img.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	got := list(t, im)
	for p, w := range want {
		if got[p] != w {
			t.Fatalf("%q: got %q, want %q", p, got[p], w)
		}
	}
	old, err := im.Walk("old")
	if err != nil || old.Mtime != -5 || old.MtimeNs != 999999999 || old.UID != 1<<32-2 || old.GID != 1<<31 || old.Mode != unix.S_IFREG|0o4755 {
		t.Errorf("old: %+v, %v", old, err)
	}
	dev, err := im.Walk("dev")
	if err != nil || Major(dev.Rdev) != 4095 || Minor(dev.Rdev) != 1<<20-1 {
		t.Errorf("dev: %+v, %v", dev, err)
	}
	if _, err := im.Walk("big/nothing"); !errors.Is(err, ErrNotExist) {
		t.Errorf("a name that is not there: %v", err)
	}
	if !im.HasXattrs() {
		t.Error("the image does not say that it has xattrs")
	}
}

func TestReadDirCookies(t *testing.T) {
	var es []Entry
	for i := range 2000 {
		es = append(es, file(fmt.Sprintf("n%d", i)))
	}
	im := build(t, es)
	root, _ := im.Inode(im.Root())
	var all []string
	im.ReadDir(&root, 0, func(d Dirent, _ uint64) bool { all = append(all, string(d.Name)); return true })
	var one []string
	for cookie := uint64(0); ; {
		n := len(one)
		im.ReadDir(&root, cookie, func(d Dirent, next uint64) bool {
			one, cookie = append(one, string(d.Name)), next
			return false
		})
		if len(one) == n {
			break
		}
	}
	if diff := cmp.Diff(all, one); diff != "" || len(all) != 2002 {
		t.Errorf("%d names; one by one:\n%s", len(all), diff)
	}
}

func TestClean(t *testing.T) {
	good := map[string]string{"a": "a", "./a": "a", "/a": "a", "//a//b/": "a/b", "a/../b": "b", ".": "", "/": "", "./": "", "a\nb\xff": "a\nb\xff", "/../a": ""}
	delete(good, "/../a")
	for in, want := range good {
		if got, err := Clean(in); err != nil || got != want {
			t.Errorf("Clean(%q) = %q, %v; want %q", in, got, err, want)
		}
	}
	for _, in := range []string{"", "..", "../x", "/../a", "a/../../x", "a\x00b", strings.Repeat("n", 256), strings.Repeat("d/", 2048) + "x"} {
		if got, err := Clean(in); !errors.Is(err, ErrMalformed) {
			t.Errorf("Clean(%.40q) = %q, %v; want a refusal", in, got, err)
		}
	}
}

func TestFramesRoundTrip(t *testing.T) {
	b := NewBuilder(Gzip)
	digest := func(c byte) (d [32]byte) { d[0] = c; return d }
	add := func(name string, chunks ...Chunk) {
		e := file(name)
		for _, c := range chunks {
			e.Size += c.Size
		}
		if err := b.AddFile(e, chunks); err != nil {
			t.Fatal(err)
		}
	}
	add("second", Chunk{Size: 5000, Blob: 900, Digest: digest(2)}, Chunk{File: 5000, Size: 10, Blob: 1800, Digest: digest(3)})
	add("first", Chunk{Size: 10, Blob: 100, Digest: digest(9)})
	add("inner", Chunk{Size: 20, Blob: 100, Inner: 10, Digest: digest(1)}, Chunk{File: 20, Size: 4096, Hole: true})
	l, err := b.Layer(2000)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Frames.Verify(); err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	l.Frames.WriteTo(&buf)
	fr, err := ParseFrames(buf.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	if n, p, size := fr.Len(); n != 3 || p != 4 || size != 5*BlockSize {
		t.Errorf("%d frames, %d pieces, %d bytes", n, p, size)
	}
	if got, want := fr.Frame(0), (Frame{Offset: 100, Length: 800, Kind: Gzip}); got != want {
		t.Errorf("frame 0: %+v", got)
	}
	if ps := fr.FramePieces(0); len(ps) != 2 || ps[0].Data != 0 || ps[1].Data != BlockSize || ps[1].Inner != 10 {
		t.Errorf("pieces of frame 0: %+v", ps)
	}
	if p, ok := fr.Find(digest(3)); !ok || p.Data != 3*BlockSize+5000 {
		t.Errorf("found %+v, %v", p, ok)
	}
	if from, to := fr.PiecesIn(3*BlockSize, 5001); to-from != 2 {
		t.Errorf("pieces %d to %d", from, to)
	}
	if from, to := fr.PiecesIn(BlockSize+20, 100); to != from {
		t.Errorf("a hole has pieces %d to %d", from, to)
	}
	bad := bytes.Clone(buf.Bytes())
	bad[len(bad)-1] ^= 1
	if fr, err := ParseFrames(bad); err == nil && fr.Verify() == nil {
		t.Error("a changed table verifies")
	}
}

func TestTOCRoundTrip(t *testing.T) {
	in := []Entry{dir("a"), {Name: "b", Mode: unix.S_IFREG | 0o644, Mtime: -1, MtimeNs: 5, UID: 1<<32 - 1, Size: 9, Data: 4096, Xattrs: []Xattr{{"user.a", []byte("\x00v")}}}, link("l", "t"), hard("h", "b")}
	var buf bytes.Buffer
	if err := WriteTOC(&buf, in); err != nil {
		t.Fatal(err)
	}
	got, err := ReadTOC(buf.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(in, got); diff != "" {
		t.Error(diff)
	}
	for i := range buf.Len() {
		if _, err := ReadTOC(buf.Bytes()[:i]); err == nil {
			t.Fatalf("a file cut at %d is read", i)
		}
	}
}

func FuzzImage(f *testing.F) {
	tree, _ := Merge([][]Entry{{dir("a"), sized("a/b", 9, 0), link("c", "d"), {Name: "x", Mode: unix.S_IFREG, Xattrs: []Xattr{{"user.x", []byte("y")}}}}})
	var buf bytes.Buffer
	tree.WriteTo(&buf, []Device{{Size: 4096}})
	f.Add(buf.Bytes()[sbOffset:])
	f.Fuzz(func(t *testing.T, b []byte) {
		// What lies behind the superblock is damaged freely; its checksum is not
		// what keeps the reader from falling over.
		im := &Image{b: append(make([]byte, sbOffset), b...), root: 40, devices: []Device{{Size: 1 << 20}}}
		for nid := range uint64(len(im.b) / nidUnit) {
			in, err := im.Inode(nid)
			if err != nil {
				continue
			}
			im.Lookup(&in, "b")
			im.Readlink(&in)
			im.Extent(&in)
			im.Xattrs(&in, func(string, []byte, []byte) bool { return true })
			im.ReadDir(&in, 0, func(Dirent, uint64) bool { return true })
		}
		newImage(im.b)
	})
}

func FuzzTOC(f *testing.F) {
	var buf bytes.Buffer
	WriteTOC(&buf, []Entry{dir("a"), file("b")})
	f.Add(buf.Bytes())
	f.Fuzz(func(t *testing.T, b []byte) { ReadTOC(b) })
}

func FuzzMerge(f *testing.F) {
	f.Add("a/b\nl>a\nl/x\n.wh.a\nh=l/x\na/.wh..wh..opq")
	f.Fuzz(func(t *testing.T, s string) {
		var es []Entry
		for _, line := range strings.Split(s, "\n") {
			name, to, isLink := strings.Cut(line, ">")
			name, target, isHard := strings.Cut(name, "=")
			c, err := Clean(name)
			if err != nil {
				continue
			}
			e := dir(c)
			switch {
			case isLink && to != "" && len(to) < MaxLink && !strings.Contains(to, "\x00"):
				e = link(c, to)
			case isHard:
				if target, err = Clean(target); err != nil {
					continue
				}
				e = hard(c, target)
			}
			es = append(es, e)
		}
		half := len(es) / 2
		tree, err := Merge([][]Entry{es[:half], es[half:]})
		if err != nil {
			return
		}
		var buf bytes.Buffer
		if err := tree.WriteTo(&buf, make([]Device, 2)); err != nil {
			t.Fatal(err)
		}
		im, err := newImage(buf.Bytes())
		if err != nil {
			t.Fatal(err)
		}
		if n := len(list(t, im)); n != tree.nodes {
			t.Fatalf("%d names of %d", n, tree.nodes)
		}
	})
}

// A hard link to a later entry may take the place of another's target.
func TestLinkReplacesTarget(t *testing.T) {
	reg := func(name string) Entry { return Entry{Name: name, Mode: unix.S_IFREG | 0o644} }
	link := func(name, to string) Entry { return Entry{Name: name, Link: to, HardLink: true} }
	_, err := Merge([][]Entry{{link("p", "z"), link("y", "p/q"), reg("p/q"), reg("z")}})
	if !errors.Is(err, ErrMalformed) {
		t.Errorf("got %v", err)
	}
}
