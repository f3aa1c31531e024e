package test

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/bench/forms"
)

// made gives an image of the host's store, whose layers are there only if they
// were made there.
func (h *host) made(digest string) v1.Image {
	h.t.Helper()
	idx := mustGet[v1.ImageIndex](h.t)(layout.ImageIndexFromPath(filepath.Join(h.root, "state/images")))
	img, err := idx.Image(mustGet[v1.Hash](h.t)(v1.NewHash(digest)))
	if err != nil {
		h.t.Fatalf("%s is not in the image store: %v", digest, err)
	}
	return img
}

// topLayers gives the tars of an image's n topmost layers, the lowest first.
func topLayers(t *testing.T, img v1.Image, n int) (tars [][]byte) {
	t.Helper()
	all := mustGet[[]v1.Layer](t)(img.Layers())
	for _, l := range all[len(all)-n:] {
		r := mustGet[io.ReadCloser](t)(l.Uncompressed())
		tars = append(tars, mustGet[[]byte](t)(io.ReadAll(r)))
		must(t, r.Close())
	}
	return tars
}

// unpackedOn gives what containerd makes of an image's n topmost layers on others.
// What makes a layer of gzip lazy it takes for files. A layer says nothing of the
// root, unless that was changed itself.
func unpackedOn(t *testing.T, base [][]byte, img v1.Image, n int, root node) tree {
	t.Helper()
	got := applied(t, append(slices.Clip(base), topLayers(t, img, n)...)...).roundSeconds()
	delete(got, ".no.prefetch.landmark")
	delete(got, "stargz.index.json")
	got["."] = root
	return got
}

// sameAgain compares a mount with that of what was committed of it. The time of the
// root is no layer's.
func sameAgain(t *testing.T, mount, again string) {
	t.Helper()
	want, got := readTree(t, mount).wholeSeconds(), readTree(t, again)
	root := got["."]
	root.sec, root.nsec = want["."].sec, want["."].nsec
	got["."] = root
	sameTree(t, want, got)
}

// isDigest stops a test whose commit printed anything else.
func isDigest(t *testing.T, s string) string {
	t.Helper()
	if _, err := v1.NewHash(s); err != nil || strings.ContainsAny(s, " \n") {
		t.Fatalf("commit printed %q, want a digest and nothing else", s)
	}
	return s
}

// commit makes an image and gives its digest.
func (h *host) commit(args ...string) string {
	h.t.Helper()
	return isDigest(h.t, h.ok(append([]string{"commit"}, args...)...))
}

// committable is an image with something for every kind of edit.
func committable(t *testing.T) [][]byte {
	a := newLayer(t)
	a.dir(".", "etc", "data", "links", "gone", "gone/dir", "swap", "swap/dir", "opaque", "opaque/sub", "attrs", "still")
	a.file("etc/conf", []byte("old\n"))
	a.file("etc/removed", []byte("gone soon\n"))
	for _, n := range []string{"data/append", "data/truncate", "data/write", "data/move", "data/keep"} {
		a.file(n, content(n, 50_000))
	}
	a.file("links/one", []byte("two names"))
	a.hardlink("links/two", "links/one")
	a.file("links/alone", []byte("one name"))
	a.file("gone/file", nil)
	a.file("gone/dir/file", nil)
	a.file("swap/file", []byte("file"))
	a.file("swap/dir/old", []byte("old"))
	a.symlink("swap/link", "file")
	a.file("opaque/old", []byte("old"))
	a.file("opaque/sub/old", []byte("old"))
	a.file("attrs/mode", []byte("m"))
	a.file("attrs/owner", []byte("o"))
	a.file("attrs/xattr", []byte("x"))
	a.file("attrs/time", []byte("t"))
	b := newLayer(t)
	b.dir("still")
	b.file("still/second", content("second", 9000))
	return [][]byte{a.bytes(), b.bytes()}
}

// capability is cap_net_bind_service in the form of version 2.
const capability = "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

// editAll does every kind of edit in a mount of committable. Of a hard link of
// the image one name is changed only where the writer keeps both names one file:
// overlayfs without an index does not.
func editAll(t *testing.T, dir, overlay string) {
	t.Helper()
	at := func(name string) string { return filepath.Join(dir, name) }
	put(t, at("etc/conf"), "new\n")
	must(t, os.Remove(at("etc/removed")))
	appendTo(t, at("data/append"), "more")
	must(t, os.Truncate(at("data/truncate"), 7))
	f, err := os.OpenFile(at("data/write"), os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteAt([]byte("in the middle"), 20_000)
	must(t, errors.Join(err, f.Close()))
	must(t, os.Rename(at("data/move"), at("moved")))
	if overlay == "fuse" {
		appendTo(t, at("links/one"), ", one file")
	}
	must(t, os.Link(at("links/alone"), at("links/with")))
	must(t, os.RemoveAll(at("gone")))
	must(t, os.Remove(at("swap/file")))
	must(t, os.Mkdir(at("swap/file"), 0o711))
	put(t, at("swap/file/inside"), "a directory now")
	must(t, os.RemoveAll(at("swap/dir")))
	put(t, at("swap/dir"), "a file now")
	must(t, os.Remove(at("swap/link")))
	must(t, os.Symlink("../etc/conf", at("swap/link")))
	must(t, os.RemoveAll(at("opaque")))
	must(t, os.MkdirAll(at("opaque/sub"), 0o755))
	put(t, at("opaque/sub/new"), "new")
	must(t, os.Chmod(at("attrs/mode"), 0o4751|os.ModeSetuid))
	must(t, os.Lchown(at("attrs/owner"), 70_000, 3_000_000_000))
	must(t, unix.Setxattr(at("attrs/xattr"), "user.of", []byte("a\x00b\xff"), 0))
	must(t, os.Chtimes(at("attrs/time"), epoch, time.Unix(1_000_000_000, 0)))

	must(t, os.MkdirAll(at("new/empty"), 0o700))
	must(t, os.Chmod(at("new"), 0o1777|os.ModeSticky))
	put(t, at("new/zero"), "")
	put(t, at("new/large"), string(content("large", 3<<20)))
	put(t, at("new/"+strings.Repeat("n", 255)), "255")
	put(t, at("new/new\nline \xc3\xa9"), "names")
	must(t, os.Symlink(strings.Repeat("0123456789", 40), at("new/long")))
	must(t, os.Symlink("/etc/conf", at("new/absolute")))
	put(t, at("new/first"), "three names")
	must(t, os.Link(at("new/first"), at("new/second")))
	must(t, os.Link(at("new/first"), at("etc/third")))
	must(t, unix.Mkfifo(at("new/fifo"), 0o620))
	must(t, unix.Mknod(at("new/null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	must(t, unix.Mknod(at("new/disk"), unix.S_IFBLK|0o660, int(unix.Mkdev(300, 70_000))))
	put(t, at("new/capable"), "c")
	must(t, os.Lchown(at("new/capable"), 5, 6))
	must(t, unix.Setxattr(at("new/capable"), "security.capability", []byte(capability), 0))
	sparse, err := os.Create(at("new/sparse"))
	must(t, err)
	_, err = sparse.WriteAt([]byte("island"), 1<<20)
	must(t, errors.Join(err, sparse.Truncate(2<<20), sparse.Close()))
}

// TestCommitFetchesNothing commits new files and holds the registry's log against
// it.
func TestCommitFetchesNothing(t *testing.T) {
	withBoth(t, func(t *testing.T, overlay string) {
		l, names := small(t, 50, 100_000)
		r := newRegistry(t)
		img := build(t, forms.EStargz, l)
		ref := r.push("test/base:1", img)
		h := newHost(t)
		dir := h.writable(overlay, "w", ref)
		_, ranges := r.requests(img)
		for _, q := range ranges {
			if q.Range == "" {
				t.Errorf("the mount asked for a whole layer: %v", q)
			}
		}
		before := h.inspect("w")
		put(t, filepath.Join(dir, "files/new"), "new")
		put(t, filepath.Join(dir, "etc/conf"), string(content("conf", 1<<20)))
		must(t, os.Remove(filepath.Join(dir, names[7])))
		must(t, os.MkdirAll(filepath.Join(dir, "srv/app"), 0o755))
		must(t, os.Chmod(filepath.Join(dir, "files"), 0o700)) // a directory has no bytes
		h.commit("w", "app:1")
		h.ok("diff", "w")
		got, _ := r.requests(img)
		asked(t, "edits, commit and diff", got, nothing)
		if after := h.inspect("w"); after.Fetched != before.Fetched || after.Local != before.Local {
			t.Errorf("fetched %d bytes, %d before; here %d, before %d", after.Fetched, before.Fetched, after.Local, before.Local)
		}
		again := h.ok("mount", "--wait", "--name", "again", "app:1")
		sameAgain(t, dir, again)
		h.ok("umount", "-a")
	})
}

// TestCommitKinds commits every kind of edit, in every compression. The layers are
// unpacked by containerd, and the images mounted.
func TestCommitKinds(t *testing.T) {
	withBoth(t, func(t *testing.T, overlay string) {
		layers := committable(t)
		_, ref := serve(t, forms.EStargz, layers...)
		h := newHost(t)
		dir := h.writable(overlay, "w", ref)
		editAll(t, dir, overlay)
		// Until then overlayfs has two numbers for a file of the image that got a
		// second name.
		h.ok("umount", "w")
		h.ok("mount", "--name", "w")
		want := readTree(t, dir).wholeSeconds()
		for compression, format := range map[string]string{"estargz": "estargz", "gzip": "tar+gzip", "zstd": "tar+zstd", "zstd:chunked": "zstd:chunked"} {
			name := "app:" + strings.ReplaceAll(compression, ":", "-")
			digest := h.commit("--compression", compression, "w", name)
			sameTree(t, want, unpackedOn(t, layers, h.made(digest), 1, want["."]))

			again := h.ok("mount", "--wait", "--name", "again", name)
			sameAgain(t, dir, again)
			m := h.inspect("again")
			if top := m.Layers[len(m.Layers)-1]; top.Format != format || top.Fetched != 0 || len(m.Layers) != 3 || m.Target != digest {
				t.Errorf("%s: %+v of %d layers", compression, top, len(m.Layers))
			}
			h.ok("umount", "again")
		}
		// Nothing of it has changed the mount.
		sameTree(t, want, readTree(t, dir).wholeSeconds())
		h.ok("umount", dir)
	})
}

// TestCommitChain commits on top of commits, without the registry.
func TestCommitChain(t *testing.T) {
	withBoth(t, func(t *testing.T, overlay string) {
		l, _ := small(t, 5, 20_000)
		r, ref := serve(t, forms.EStargz, l)
		h := newHost(t)
		base := h.writable(overlay, "v0", ref)
		list(t, base)
		sameTree(t, readTree(t, base), readTree(t, base)) // all is here now
		r.close()
		parent := "v0"
		var digests []string
		for i, name := range []string{"v1", "v2", "v3", "v4"} {
			dir := filepath.Join(h.root, "run/mnt", parent)
			put(t, filepath.Join(dir, "etc", name), name)
			put(t, filepath.Join(dir, "etc/version"), name)
			if i == 2 {
				must(t, os.Remove(filepath.Join(dir, "etc/v1")))
			}
			digests = append(digests, h.commit(parent, "app:"+name))
			var again string
			if i%2 == 0 {
				again = h.writable(overlay, name, "app:"+name, "--offline")
			} else { // by the digest alone
				again = h.writable(overlay, name, digests[i][len("sha256:"):])
			}
			sameAgain(t, dir, again)
			holds(t, filepath.Join(again, "etc/version"), name)
			parent = name
		}
		missing(t, filepath.Join(h.root, "run/mnt/v4/etc/v1"))
		if n := len(h.inspect("v4").Layers); n != 5 {
			t.Errorf("four commits on one layer have %d", n)
		}
		h.stop()
		if dir := h.ok("mount", "--wait", "--name", "back", "app:v3"); !strings.HasSuffix(dir, "/back") {
			t.Error(dir)
		}
		holds(t, filepath.Join(h.root, "run/mnt/back/etc/version"), "v3")
		h.ok("umount", "-a")
	})
}

// TestCommitSquash makes one layer of a chain of commits.
func TestCommitSquash(t *testing.T) {
	withBoth(t, func(t *testing.T, overlay string) {
		layers := committable(t)
		_, ref := serve(t, forms.EStargz, layers...)
		h := newHost(t)
		dir := h.writable(overlay, "v0", ref)
		editAll(t, dir, overlay)
		first := h.commit("v0", "app:v1")
		dir = h.writable(overlay, "v1", "app:v1")
		must(t, os.RemoveAll(filepath.Join(dir, "new")))    // of the chain
		must(t, os.Remove(filepath.Join(dir, "data/keep"))) // of the base
		must(t, os.Remove(filepath.Join(dir, "swap/dir")))
		must(t, os.Mkdir(filepath.Join(dir, "swap/dir"), 0o700)) // old, a file, and new
		put(t, filepath.Join(dir, "swap/dir/third"), "third")
		appendTo(t, filepath.Join(dir, "etc/conf"), "again\n")
		h.commit("v1", "app:v2")
		dir = h.writable(overlay, "v2", "app:v2")
		must(t, os.Mkdir(filepath.Join(dir, "new"), 0o755))
		put(t, filepath.Join(dir, "new/again"), "back")
		put(t, filepath.Join(dir, "data/keep"), "back too")
		h.commit("v2", "app:v3")
		digest := h.commit("--squash", "-m", "as one", "v2", "app:one")

		want := readTree(t, dir).wholeSeconds()
		for _, name := range []string{"app:v3", "app:one"} {
			again := h.ok("mount", "--wait", "--name", "again", name)
			sameAgain(t, dir, again)
			h.ok("umount", "again")
		}
		img := h.made(digest)
		base, got := mustGet[*v1.Manifest](t)(h.made(first).Manifest()), mustGet[*v1.Manifest](t)(img.Manifest())
		if len(got.Layers) != 3 || got.Layers[0].Digest != base.Layers[0].Digest || got.Layers[1].Digest != base.Layers[1].Digest {
			t.Errorf("squashed layers %v on a base of %v", got.Layers, base.Layers[:2])
		}
		invariant(t, img)
		sameTree(t, want, unpackedOn(t, layers, img, 1, want["."]))

		// Without a chain it is a commit like any other.
		must(t, os.RemoveAll(filepath.Join(h.root, "run/mnt/v0/new")))
		if n := len(mustGet[[]v1.Layer](t)(h.made(h.commit("--squash", "v0")).Layers())); n != 3 {
			t.Errorf("squash on the base alone gives %d layers", n)
		}
		h.ok("umount", "-a")
	})
}

// TestCommitReproducible makes the same edits on two hosts that have nothing in
// common: not the processors, nor where the upper lies, nor who writes it, nor
// the time.
func TestCommitReproducible(t *testing.T) {
	needRoot(t)
	_, ref := serve(t, forms.EStargz, committable(t)...)
	compressions := []string{"estargz", "gzip", "zstd", "zstd:chunked"}
	digests := map[string]string{}
	for i, overlay := range overlays {
		h := newHost(t)
		h.env = append(h.env, "SOURCE_DATE_EPOCH=1500000000", "GOMAXPROCS="+itoa(i+1))
		args := []string{}
		if i == 1 {
			args = append(args, "--upper", filepath.Join(t.TempDir(), "elsewhere"))
		}
		dir := h.writable(overlay, "on"+overlay, ref, args...)
		editAll(t, dir, "kernel") // of hard links what both writers can do
		for _, compression := range compressions {
			digest := h.commit("--rewrite-timestamp", "--compression", compression, "-m", "same", dir, "app:1")
			if before := digests[compression]; i > 0 && before != digest {
				t.Errorf("the same edits with %s give %s and %s", compression, before, digest)
			}
			digests[compression] = digest
			config := mustGet[*v1.ConfigFile](t)(h.made(digest).ConfigFile())
			if at := time.Unix(1_500_000_000, 0); !config.Created.Time.Equal(at) || !config.History[len(config.History)-1].Created.Time.Equal(at) {
				t.Errorf("created %v, in the history %v", config.Created, config.History)
			}
		}
		again := readTree(t, h.ok("mount", "--wait", "--name", "again", "app:1"))
		for p, n := range again {
			if n.sec > 1_600_000_000 { // the youngest of the base
				t.Errorf("%s has time %d", p, n.sec)
			}
		}
		if got := again["etc/conf"].sec; got != 1_500_000_000 {
			t.Errorf("a file that was written has time %d", got)
		}
		if got := again["attrs/time"].sec; got != 1_000_000_000 {
			t.Errorf("an older time became %d", got)
		}
		h.ok("umount", "-a")
	}
}

// TestCommitWhere commits a mount by all that names it, up or not.
func TestCommitWhere(t *testing.T) {
	withBoth(t, func(t *testing.T, overlay string) {
		l, _ := small(t, 3, 10_000)
		_, ref := serve(t, forms.EStargz, l)
		h := newHost(t)
		h.env = append(h.env, "SOURCE_DATE_EPOCH=1700000000")
		dir := h.writable(overlay, "w", ref)
		put(t, filepath.Join(dir, "etc/new"), "new")
		want := h.commit("w")
		in := h.command("commit", ".")
		in.Dir = filepath.Join(dir, "etc")
		r := finish(t, in, []string{"commit", "."})
		if r.code != 0 || strings.TrimSpace(r.out) != want {
			t.Errorf("below the mount, want %s: %s", want, r)
		}
		for _, name := range []string{dir, dir + "/", h.inspect("w").ID, h.inspect("w").ID[:8]} {
			if got := h.commit(name); got != want {
				t.Errorf("commit of %s gives %s, want %s", name, got, want)
			}
		}
		h.ok("umount", "w")
		if got := h.commit("w", "app:down"); got != want {
			t.Errorf("commit of what is not mounted gives %s, want %s", got, want)
		}
		if out := h.ok("diff", "w"); out != "C /etc\nA /etc/new" {
			t.Errorf("diff of what is not mounted: %q", out)
		}
		holds(t, filepath.Join(h.ok("mount", "--wait", "app:down"), "etc/new"), "new")
		h.fails(3, "commit", "nothing-of-that-name")
		h.fails(3, "commit", h.root)
		// A mount that cannot be written has nothing but its history to commit.
		ro := h.made(h.commit("-m", "nothing", "app"))
		if config := mustGet[*v1.ConfigFile](t)(ro.ConfigFile()); !config.History[len(config.History)-1].EmptyLayer {
			t.Errorf("history %v", config.History)
		}
		h.ok("umount", "-a")
	})
}
