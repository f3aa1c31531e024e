package test

import (
	"archive/tar"
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/varvefs/varve/bench/forms"
)

// listed gives the files of a directory with their contents, and its directories,
// in a line.
func listed(t *testing.T, dir string) string {
	t.Helper()
	var all []string
	must(t, filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		rel, _ := filepath.Rel(dir, p)
		switch {
		case err != nil || rel == ".":
		case d.IsDir():
			all = append(all, rel+"/")
		default:
			all = append(all, rel+"="+string(mustGet[[]byte](t)(os.ReadFile(p))))
		}
		return err
	}))
	slices.Sort(all)
	return strings.Join(all, " ")
}

// copyCases are those of docker's manual page: what is copied, to what, and what
// is there then; of a refusal, nothing but what was there before.
var copyCases = []struct {
	name, src, dst string
	want           string
	code           int
}{
	{"file to what is not there", "file", "new", "d/ d/old=old f=f new=file", 0},
	{"file to a directory that is not there", "file", "new/", "d/ d/old=old f=f", 3},
	{"file to a file", "file", "f", "d/ d/old=old f=file", 0},
	{"file to a directory", "file", "d", "d/ d/file=file d/old=old f=f", 0},
	{"file to a directory with a slash", "file", "d/", "d/ d/file=file d/old=old f=f", 0},
	{"file below what is not there", "file", "no/new", "d/ d/old=old f=f", 3},
	{"directory to what is not there", "dir", "new", "d/ d/old=old f=f new/ new/in=in new/sub/ new/sub/deep=deep", 0},
	{"contents to what is not there", "dir/.", "new", "d/ d/old=old f=f new/ new/in=in new/sub/ new/sub/deep=deep", 0},
	{"directory to a file", "dir", "f", "d/ d/old=old f=f", 1},
	{"directory to a directory", "dir", "d", "d/ d/dir/ d/dir/in=in d/dir/sub/ d/dir/sub/deep=deep d/old=old f=f", 0},
	{"contents to a directory", "dir/.", "d", "d/ d/in=in d/old=old d/sub/ d/sub/deep=deep f=f", 0},
	{"file as a directory", "file/", "d", "d/ d/old=old f=f", 1},
	{"what is not there", "none", "d", "d/ d/old=old f=f", 3},
}

// TestCopy copies in every case of docker's into a mount, out of one, and out of
// an image that is not mounted.
func TestCopy(t *testing.T) {
	withBoth(t, func(t *testing.T, overlay string) {
		l := newLayer(t)
		l.dir("src", "src/dir", "src/dir/sub")
		for _, name := range []string{"file", "dir/in", "dir/sub/deep"} {
			l.file("src/"+name, []byte(filepath.Base(name)))
		}
		_, ref := serve(t, forms.EStargz, l.bytes())
		h := newHost(t)
		dir := h.writable(overlay, "w", ref)
		// What is copied out is half the image's and half the mount's own.
		must(t, os.Remove(filepath.Join(dir, "src/dir/in")))
		put(t, filepath.Join(dir, "src/dir/in"), "in")
		local := filepath.Join(h.root, "src")
		must(t, os.CopyFS(local, os.DirFS(filepath.Join(dir, "src"))))

		plant := func(at string) {
			must(t, os.RemoveAll(at))
			must(t, os.MkdirAll(filepath.Join(at, "d"), 0o755))
			put(t, filepath.Join(at, "d/old"), "old")
			put(t, filepath.Join(at, "f"), "f")
		}
		ways := map[string]struct{ src, dst, at string }{
			"in":         {local + "/", "w:/dst/", filepath.Join(dir, "dst")},
			"in, by dir": {"src/", "w:dst/", filepath.Join(dir, "dst")},
			"out":        {"w:/src/", filepath.Join(h.root, "dst") + "/", filepath.Join(h.root, "dst")},
			"image":      {ref + ":/src/", "./dst/", filepath.Join(h.root, "dst")},
		}
		for way, w := range ways {
			for _, c := range copyCases {
				plant(w.at)
				res := h.run("cp", w.src+c.src, w.dst+c.dst)
				if got := listed(t, w.at); res.code != c.code || got != c.want || res.out != "" {
					t.Errorf("%s, %s: want exit %d and %q, got %q: %s", way, c.name, c.code, c.want, got, res)
				}
			}
		}
		h.ok("umount", "w")
		if line := h.fails(1, "cp", local+"/file", "w:/x"); !strings.Contains(line, "unmounted") {
			t.Errorf("into what is not mounted: %s", line)
		}
		plant(filepath.Join(h.root, "dst"))
		h.ok("cp", "w:/src/dir/in", filepath.Join(h.root, "dst/f")) // of what is not mounted
		holds(t, filepath.Join(h.root, "dst/f"), "in")
		h.ok("rm", "w")
	})
}

// TestCopyStream copies tars in and out.
func TestCopyStream(t *testing.T) {
	withBoth(t, func(t *testing.T, overlay string) {
		l, names := small(t, 2, 30_000)
		_, ref := serve(t, forms.EStargz, l)
		h := newHost(t)
		dir := h.writable(overlay, "w", ref)
		stream := func(in []byte, args ...string) result {
			cmd := h.command(args...)
			cmd.Stdin = bytes.NewReader(in)
			return finish(t, cmd, args)
		}
		out := stream(nil, "cp", "w:/files", "-")
		if out.code != 0 || string(tarOf(t, out.out)[names[1]].content) != string(content(names[1], 30_000)) || len(tarOf(t, out.out)) != 3 {
			t.Errorf("a directory: exit %d, %d bytes: %s", out.code, len(out.out), out.err)
		}
		if one := stream(nil, "cp", ref+":/etc/hostname", "-"); string(tarOf(t, one.out)["hostname"].content) != "varve\n" {
			t.Errorf("a file of an image: %s", one)
		}
		must(t, os.Mkdir(filepath.Join(dir, "copy"), 0o755))
		if r := stream([]byte(out.out), "cp", "-", "w:/copy"); r.code != 0 {
			t.Fatal(r)
		}
		holds(t, filepath.Join(dir, "copy", names[0]), string(content(names[0], 30_000)))
		if r := stream([]byte(out.out), "cp", "-", "w:/etc/hostname"); r.code == 0 {
			t.Errorf("a tar into a file: %s", r)
		}
		if r := stream([]byte(out.out)[:20_000], "cp", "-", "w:/copy"); r.code == 0 {
			t.Errorf("half a tar: %s", r)
		}
		// As much as a backup keeps.
		special := filepath.Join(dir, "special")
		put(t, special, "x")
		must(t, os.Lchown(special, 1234, 5678))
		must(t, os.Chmod(special, 0o4755|os.ModeSetuid))
		e := tarOf(t, stream(nil, "cp", "-a", "w:/special", "-").out)["special"].header
		if e.Uid != 1234 || e.Gid != 5678 || e.Mode != 0o4755 {
			t.Errorf("cp -a gives %+v", e)
		}
		h.ok("cp", "-a", "w:/special", filepath.Join(h.root, "special"))
		if n, _, err := readNode(filepath.Join(h.root, "special")); err != nil || n.uid != 1234 || n.mode&0o7777 != 0o4755 {
			t.Errorf("cp -a gives %+v %v", n, err)
		}
		h.ok("cp", "w:/special", filepath.Join(h.root, "plain"))
		if n, _, err := readNode(filepath.Join(h.root, "plain")); err != nil || n.uid != 0 || n.mode&0o7777 != 0o755 {
			t.Errorf("cp gives %+v %v", n, err)
		}
		h.ok("umount", "w")
	})
}

// TestCopyStaysInside copies to and from where links and names of an image, or of
// a tar, would lead elsewhere.
func TestCopyStaysInside(t *testing.T) {
	withBoth(t, func(t *testing.T, overlay string) {
		outside := newCanary(t)
		l := newLayer(t)
		l.dir("etc", "tmp")
		l.symlink("absolute", "/etc")
		l.symlink("outside", outside.dir)
		l.symlink("up", "../../../../../../../../.."+outside.dir)
		l.symlink("file", "/etc/passwd")
		l.file("etc/passwd", []byte("the image's"))
		_, ref := serve(t, forms.EStargz, l.bytes())
		h := newHost(t)
		dir := h.writable(overlay, "w", ref)
		src := filepath.Join(h.root, "payload")
		put(t, src, "payload")

		h.ok("cp", src, "w:/absolute")
		holds(t, filepath.Join(dir, "etc/payload"), "payload")
		h.ok("cp", src, "w:/absolute/named")
		holds(t, filepath.Join(dir, "etc/named"), "payload")
		for _, to := range []string{"w:/outside/x", "w:/up/x", "w:/outside/", "w:/up/."} {
			if r := h.run("cp", src, to); r.code == 0 {
				t.Errorf("to %s: %s", to, r)
			}
		}
		h.ok("cp", src, "w:/../../../tmp/../up-and-in")
		holds(t, filepath.Join(dir, "up-and-in"), "payload")
		outside.untouched(t)

		// Out: a link is followed in the mount, or copied as a link.
		h.ok("cp", "-L", "w:/file", filepath.Join(h.root, "passwd"))
		holds(t, filepath.Join(h.root, "passwd"), "the image's")
		h.ok("cp", "w:/file", filepath.Join(h.root, "link"))
		if to, err := os.Readlink(filepath.Join(h.root, "link")); err != nil || to != "/etc/passwd" {
			t.Errorf("a link became %q %v", to, err)
		}
		h.fails(3, "cp", "w:/outside/secret", filepath.Join(h.root, "stolen"))

		// In: what a tar tries.
		hostile := map[string][]tar.Header{
			"dots":             {{Typeflag: tar.TypeReg, Name: "../../../escaped"}},
			"absolute":         {{Typeflag: tar.TypeReg, Name: outside.dir + "/escaped"}},
			"through a link":   {{Typeflag: tar.TypeSymlink, Name: "door", Linkname: outside.dir}, {Typeflag: tar.TypeReg, Name: "door/escaped"}},
			"link upwards":     {{Typeflag: tar.TypeSymlink, Name: "stairs", Linkname: "../../../../../../.." + outside.dir}, {Typeflag: tar.TypeReg, Name: "stairs/escaped"}},
			"hard link":        {{Typeflag: tar.TypeLink, Name: "twin", Linkname: outside.dir + "/secret"}, {Typeflag: tar.TypeReg, Name: "twin"}},
			"hard link upward": {{Typeflag: tar.TypeLink, Name: "twin2", Linkname: "../../../../../../.." + outside.dir + "/secret"}, {Typeflag: tar.TypeReg, Name: "twin2"}},
		}
		for what, headers := range hostile {
			p := newLayer(t)
			for _, e := range headers {
				var body []byte
				if e.Typeflag == tar.TypeReg {
					body = []byte("escaped")
				}
				p.add(e, body)
			}
			cmd := h.command("cp", "-", "w:/tmp")
			cmd.Stdin = bytes.NewReader(p.bytes())
			r := finish(t, cmd, []string{"cp", "-", what})
			outside.untouched(t)
			if made := filepath.Join(filepath.Dir(h.root), "escaped"); exists(made) {
				t.Errorf("%s: %s was made: %s", what, made, r)
			}
		}
		// And what an image of theirs would do to us.
		at := filepath.Join(h.root, "dst")
		must(t, os.Mkdir(at, 0o755))
		must(t, os.Symlink(outside.dir, filepath.Join(at, "etc")))
		if r := h.run("cp", "w:/.", at); r.code == 0 && exists(filepath.Join(outside.dir, "passwd")) {
			t.Errorf("written through a link of ours: %s", r)
		}
		outside.untouched(t)

		// Names that are only odd.
		for _, name := range []string{"-rf", "new\nline", "a:b", "caf\xc3\xa9", "...", "*"} {
			put(t, filepath.Join(h.root, "dst", name), name)
			h.ok("cp", "--", "./dst/"+name, "w:/tmp/"+name)
			holds(t, filepath.Join(dir, "tmp", name), name)
			h.ok("cp", "--", "w:/tmp/"+name, "./back")
			holds(t, filepath.Join(h.root, "back"), name)
		}
		h.ok("umount", "w")
	})
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// TestCopyRefused asks for what cannot be.
func TestCopyRefused(t *testing.T) {
	needRoot(t)
	l, _ := small(t, 2, 100)
	_, ref := serve(t, forms.EStargz, l)
	h := newHost(t)
	dir := h.ok("mount", "--wait", "--name", "ro", ref)
	src := filepath.Join(h.root, "file")
	put(t, src, "x")
	if line := h.fails(2, "cp", src, "ro:/etc/x"); !strings.Contains(line, "read-only") || !strings.Contains(line, "--rw") {
		t.Errorf("into a mount that is not writable: %s", line)
	}
	for _, args := range [][]string{{}, {src}, {src, src}, {"ro:/etc", "ro:/x"}, {"", "ro:/x"}, {src, ""}, {src, "oci:" + h.root + "/l:/x"}, {"-", "-"}} {
		h.fails(2, append([]string{"cp"}, args...)...)
	}
	h.fails(3, "cp", src, "nothing-of-that-name:/x")
	h.fails(3, "cp", "ro:/no/such", h.root)
	h.ok("cp", "-q", "ro:/etc/hostname", filepath.Join(h.root, "hostname"))
	holds(t, filepath.Join(h.root, "hostname"), "varve\n")
	list(t, dir)
	h.ok("umount", "-a")
}
