package test

import (
	"archive/tar"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/bench/forms"
)

// member is what a flat tar says of a name. Of hard links the first name is told,
// whichever of them it was that came with the content.
type member struct {
	header  string
	content string // its digest
	links   string
}

// members reads a tar, times in seconds, which is what a layer has of them. The root's own entry, which some write, is left out.
func members(t *testing.T, packed string) map[string]member {
	t.Helper()
	entries := tarOf(t, packed)
	delete(entries, ".")
	delete(entries, "")
	first := map[string]string{} // the least of the names, by the one with the content
	at := func(name string) string {
		if e := entries[name]; e.header.Typeflag == tar.TypeLink {
			return strings.TrimPrefix(e.header.Linkname, "./")
		}
		return name
	}
	for name := range entries {
		if f, ok := first[at(name)]; !ok || name < f {
			first[at(name)] = name
		}
	}
	out := map[string]member{}
	for name := range entries {
		e, ok := entries[at(name)]
		if !ok {
			t.Errorf("%q is a link to %q, which is not there", name, at(name))
			continue
		}
		h := e.header
		var xattrs []string
		for k, v := range h.PAXRecords {
			if strings.HasPrefix(k, "SCHILY.xattr.") {
				xattrs = append(xattrs, fmt.Sprintf("%s=%q", k, v))
			}
		}
		slices.Sort(xattrs)
		out[name] = member{
			fmt.Sprintf("%c %o %d:%d %d,%d %d %q %d %s", h.Typeflag, h.Mode&0o7777, h.Uid, h.Gid, h.Devmajor, h.Devminor, h.Size, h.Linkname, h.ModTime.Unix(), xattrs),
			sumOf(e.content), first[at(name)],
		}
	}
	return out
}

func sameMembers(t *testing.T, want, got map[string]member) {
	t.Helper()
	for name, w := range want {
		if g, ok := got[name]; !ok {
			t.Errorf("%q is missing", name)
		} else if g != w {
			t.Errorf("%q:\n\twant %+v\n\tgot  %+v", name, w, g)
		}
	}
	for name := range got {
		if _, ok := want[name]; !ok {
			t.Errorf("%q is too much", name)
		}
	}
}

// gnuTar packs a directory.
func gnuTar(t *testing.T, dir string) string {
	t.Helper()
	cmd := exec.Command("tar", "--xattrs", "--xattrs-include=*", "--numeric-owner", "--format=posix", "-C", dir, "-cf", "-", ".")
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("tar: %v\n%s", err, &errs)
	}
	return out.String()
}

// TestExport packs mounts, and has GNU tar pack them too.
func TestExport(t *testing.T) {
	withBoth(t, func(t *testing.T, overlay string) {
		_, ref := serve(t, forms.EStargz, committable(t)...)
		h := newHost(t)
		dir := h.writable(overlay, "w", ref)
		editAll(t, dir, overlay)
		h.ok("umount", "w") // see TestCommitKinds
		h.ok("mount", "--name", "w")
		want := members(t, gnuTar(t, dir))
		export := func(args ...string) string {
			t.Helper()
			r := h.run(append([]string{"export"}, args...)...)
			if r.code != 0 || r.err != "" {
				t.Fatalf("varve export %v: exit %d: %s", args, r.code, r.err)
			}
			return r.out
		}
		whole := export("w")
		sameMembers(t, want, members(t, whole))
		for name := range members(t, whole) {
			if strings.Contains(name, ".wh.") {
				t.Errorf("a deletion is a file: %s", name)
			}
		}
		// By its directory, into a file, and down.
		in := h.command("export", ".")
		in.Dir = filepath.Join(dir, "etc")
		if r := finish(t, in, []string{"export", "."}); r.code != 0 || r.out != whole {
			t.Errorf("from below the mount: exit %d, %d bytes, want %d: %s", r.code, len(r.out), len(whole), r.err)
		}
		file := filepath.Join(h.root, "flat.tar")
		if out := export("-o", file, dir); out != "" {
			t.Errorf("-o prints %d bytes", len(out))
		}
		holds(t, file, whole)
		h.ok("umount", "w")
		if down := export("w"); down != whole {
			t.Errorf("of what is not mounted it has %d bytes, want %d", len(down), len(whole))
		}

		// An image of the store's, mounted or not.
		h.commit("w", "app:1")
		again := h.ok("mount", "--wait", "--name", "again", "app:1")
		sameMembers(t, members(t, gnuTar(t, again)), members(t, export("app:1")))
		h.ok("umount", "again")

		// Parts.
		for path, names := range map[string]string{
			"/swap":          "swap swap/dir swap/file swap/file/inside swap/link",
			"opaque/sub/":    "sub sub/new",
			"/etc/conf":      "conf",
			"/swap/../moved": "moved",
			"/new/absolute":  "absolute", // the link itself
		} {
			var all []string
			for name := range members(t, export("--path", path, "w")) {
				all = append(all, name)
			}
			if got := sorted(all); got != names {
				t.Errorf("--path %s gives %q, want %q", path, got, names)
			}
		}
		h.fails(3, "export", "--path", "/etc/removed", "w")
		h.fails(3, "export", "-o", filepath.Join(h.root, "none"), "nothing-of-that-name", "--pull", "never")
		missing(t, filepath.Join(h.root, "none"))
		holds(t, file, whole)
	})
}

// TestExportImage packs images that are not mounted: what go-containerregistry
// flattens rightly, and what it does not.
func TestExportImage(t *testing.T) {
	needRoot(t)
	h := newHost(t)
	for name, c := range map[string]struct {
		layers [][]byte
		want   func([][]byte) tree
	}{
		"kinds":  {kinds(t), func(l [][]byte) tree { return extracted(t, build(t, forms.Tar, l...)) }},
		"layers": {layered(t), func(l [][]byte) tree { return applied(t, l...) }},
	} {
		want := c.want(c.layers)
		for _, form := range []forms.Form{forms.Gzip, forms.EStargz, forms.ZstdChunkedContainers} {
			t.Run(name+"/"+string(form), func(t *testing.T) {
				_, ref := serve(t, form, c.layers...)
				file := filepath.Join(t.TempDir(), "flat.tar")
				h.ok("export", "-o", file, ref)
				f, err := os.Open(file)
				must(t, err)
				defer f.Close()
				// The tar has times in seconds, and no entry for the root.
				got, want := untar(t, t.TempDir(), f), want
				if secondsOnly(form) {
					want = want.roundSeconds()
				}
				want = want.wholeSeconds()
				got["."] = want["."]
				sameTree(t, want, got)
			})
		}
	}
	for _, line := range h.mounts() {
		if strings.Contains(line, "/run/mnt/") {
			t.Errorf("an export left %s", line)
		}
	}
	var st unix.Stat_t
	out := filepath.Join(h.root, "x.tar")
	_, ref := serve(t, forms.Gzip, layered(t)...)
	h.ok("export", "-o", out, ref)
	must(t, unix.Stat(out, &st))
	if st.Mode != unix.S_IFREG|0o644 {
		t.Errorf("the file has mode %o", st.Mode)
	}
	if left, _ := filepath.Glob(filepath.Join(h.root, ".varve-*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}
