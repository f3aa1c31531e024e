package commit

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/fs/upper"
)

// tarOf writes entries as the packer does.
func tarOf(t *testing.T, entries []Entry) []byte {
	t.Helper()
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for i := range entries {
		e := &entries[i]
		if err := tw.WriteHeader(e.Header); err != nil {
			t.Fatal(e.Header.Name, err)
		}
		r, err := e.Open()
		ok(t, err)
		if r == nil {
			continue
		}
		if _, err := io.Copy(tw, r); err != nil {
			t.Fatal(e.Header.Name, err)
		}
		r.Close()
	}
	ok(t, tw.Close())
	return buf.Bytes()
}

func run(t *testing.T, in []byte, name string, args ...string) []byte {
	t.Helper()
	var out, errs bytes.Buffer
	cmd := exec.Command(name, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(in), &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, errs.Bytes())
	}
	return out.Bytes()
}

// applyLayer is unpackLayer for a layer that deletes nothing but what is there.
func applyLayer(t *testing.T, layer []byte, root string) {
	t.Helper()
	unpackLayer(t, layer, root, false)
}

// unpackLayer unpacks a layer over a tree, as the image specification says and
// with a tar that is not ours: first what it deletes, then what it brings.
func unpackLayer(t *testing.T, layer []byte, root string, strays bool) {
	t.Helper()
	tr := tar.NewReader(bytes.NewReader(layer))
	for {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		ok(t, err)
		path := filepath.Join(root, h.Name)
		dir, base := filepath.Split(path)
		if name, is := strings.CutPrefix(base, ".wh."); is {
			if base == ".wh..wh..opq" {
				names, _ := os.ReadDir(dir)
				for _, n := range names {
					ok(t, os.RemoveAll(dir+n.Name()))
				}
				continue
			}
			if _, err := os.Lstat(dir + name); err != nil && !strays {
				t.Errorf("%s deletes what is not there", h.Name)
			}
			ok(t, os.RemoveAll(dir+name))
		} else if st, err := os.Lstat(path); err == nil && !(st.IsDir() && h.Typeflag == tar.TypeDir) {
			ok(t, os.RemoveAll(path))
		} else if err == nil { // whose attributes are the entry's, all of them
			for _, x := range listXattrs(t, path) {
				ok(t, unix.Lremovexattr(path, x.Name))
			}
		}
	}
	run(t, layer, "tar", "-x", "-p", "-C", root, "--numeric-owner", "--same-owner", "--xattrs", "--xattrs-include=*", "--exclude=.wh.*", "--warning=no-timestamp")
}

func copyTree(t *testing.T, from, to string) {
	t.Helper()
	run(t, nil, "cp", "-a", from, to)
}

func TestEntriesApplied(t *testing.T) {
	for _, form := range []upper.Form{upper.Trusted, upper.User} {
		for n := range uint64(2) {
			t.Run(fmt.Sprint(form, n), func(t *testing.T) {
				r := seed(t, 100+n)
				base := scratch(t)
				lower := filepath.Join(base, "lower")
				fill(t, lower, r, form == upper.User)
				im, _ := imageOf(t, lower)
				merged, up := overlay(t, form, lower)
				c := changer{t: t, root: merged, r: r, regular: form == upper.User}
				for range 60 {
					c.change()
				}
				got, err := Entries(context.Background(), up, im, EntryOptions{})
				ok(t, err)
				if len(got.Warnings) > 0 {
					t.Errorf("warnings %q", got.Warnings)
				}
				layer := tarOf(t, got.Entries)
				unpacked := filepath.Join(base, "unpacked")
				copyTree(t, lower, unpacked)
				applyLayer(t, layer, unpacked)
				sameTrees(t, "the mount, and its layer over the image", look(t, merged), look(t, unpacked))
				if !slices.IsSortedFunc(got.Entries, func(a, b Entry) int { return compareNames(a.Header.Name, b.Header.Name) }) {
					t.Error("the entries are not in order")
				}

				// The same upper somewhere else, with other inodes.
				ok(t, unix.Unmount(merged, 0))
				elsewhere := filepath.Join(base, "elsewhere")
				path := up.Path()
				ok(t, up.Close())
				copyTree(t, path, elsewhere)
				again, err := upper.Open(elsewhere)
				ok(t, err)
				defer again.Close()
				got, err = Entries(context.Background(), again, im, EntryOptions{})
				ok(t, err)
				if !bytes.Equal(layer, tarOf(t, got.Entries)) {
					t.Error("a copy of the upper gives another layer")
				}
			})
		}
	}
}

// handMade makes an upper without a mount.
func handMade(t *testing.T, form upper.Form) *upper.Dir {
	t.Helper()
	up, err := upper.Create(filepath.Join(scratch(t), "up"), upper.About{Form: form}, upper.Attr{Mode: unix.S_IFDIR | 0o755})
	ok(t, err)
	t.Cleanup(func() { up.Close() })
	return up
}

func headers(c *Contents) []string {
	var out []string
	for _, e := range c.Entries {
		h := e.Header
		s := fmt.Sprintf("%s %c %o %d:%d", h.Name, h.Typeflag, h.Mode, h.Uid, h.Gid)
		if h.Linkname != "" {
			s += " -> " + h.Linkname
		}
		if h.Typeflag == tar.TypeChar || h.Typeflag == tar.TypeBlock {
			s += fmt.Sprintf(" %d,%d", h.Devmajor, h.Devminor)
		}
		for _, k := range []string{"user.k", "security.capability", "system.posix_acl_access"} {
			if v, has := h.PAXRecords[paxXattr+k]; has {
				s += fmt.Sprintf(" %s=%q", k, v)
			}
		}
		out = append(out, s)
	}
	return out
}

// acl is what setfacl -m u:1000:r of a file of mode 0640 makes.
const acl = "\x02\x00\x00\x00" +
	"\x01\x00\x06\x00\xff\xff\xff\xff" + "\x02\x00\x04\x00\xe8\x03\x00\x00" + "\x04\x00\x04\x00\xff\xff\xff\xff" +
	"\x10\x00\x04\x00\xff\xff\xff\xff" + "\x20\x00\x00\x00\xff\xff\xff\xff"

func TestEntriesCases(t *testing.T) {
	needRoot(t)
	lower := filepath.Join(scratch(t), "lower")
	for _, dir := range []string{"a/b/c", "opaque/old", "d", "empty"} {
		ok(t, os.MkdirAll(filepath.Join(lower, dir), 0o755))
	}
	for _, file := range []string{"a/b/f", "a/b/g", "opaque/f", "d/sock", "zz"} {
		ok(t, os.WriteFile(filepath.Join(lower, file), []byte(file), 0o644))
	}
	im, _ := imageOf(t, lower)
	newUpper := func(t *testing.T) (up *upper.Dir, at func(string) string) {
		up = handMade(t, upper.Trusted)
		return up, func(name string) string { return filepath.Join(up.Tree(), name) }
	}
	whiteout := func(t *testing.T, path string) { ok(t, unix.Mknod(path, unix.S_IFCHR, 0)) }
	tests := []struct {
		name     string
		options  EntryOptions
		make     func(t *testing.T, at func(string) string)
		want     []string
		warnings int
		secrets  []string
	}{
		{name: "nothing", make: func(t *testing.T, at func(string) string) {}},
		{name: "copied-up directories alone", make: func(t *testing.T, at func(string) string) {
			run(t, nil, "cp", "-a", filepath.Join(lower, "empty"), at("empty"))
		}},
		{name: "a directory's time alone", make: func(t *testing.T, at func(string) string) {
			ok(t, os.Mkdir(at("empty"), 0o755))
			ok(t, os.Chtimes(at("empty"), time.Unix(5, 0), time.Unix(5, 0)))
		}},
		{name: "a directory's time beside a change", make: func(t *testing.T, at func(string) string) {
			ok(t, os.Mkdir(at("empty"), 0o755))
			ok(t, os.Chtimes(at("empty"), time.Unix(5, 0), time.Unix(5, 0)))
			ok(t, os.WriteFile(at("new"), nil, 0o600))
		}, want: []string{"empty/ 5 755 0:0", "new 0 600 0:0"}},
		{name: "the root", make: func(t *testing.T, at func(string) string) {
			ok(t, os.Chmod(at(""), 0o700))
		}, want: []string{"./ 5 700 0:0"}},
		{name: "whiteouts before their siblings, strays left out", make: func(t *testing.T, at func(string) string) {
			ok(t, os.MkdirAll(at("a/b"), 0o755))
			ok(t, os.WriteFile(at("a/b/a"), nil, 0o644))
			whiteout(t, at("a/b/f"))
			whiteout(t, at("a/b/never"))
			whiteout(t, at("zz"))
			whiteout(t, at("stray"))
		}, want: []string{".wh.zz 0 0 0:0", "a/ 5 755 0:0", "a/b/ 5 755 0:0", "a/b/.wh.f 0 0 0:0", "a/b/a 0 644 0:0"}},
		{name: "opaque", make: func(t *testing.T, at func(string) string) {
			for _, dir := range []string{"opaque", "new", "empty"} {
				ok(t, os.Mkdir(at(dir), 0o755))
				ok(t, unix.Setxattr(at(dir), "trusted.overlay.opaque", []byte("y"), 0))
			}
			ok(t, os.Chmod(at("empty"), 0o700))
			ok(t, os.Mkdir(at("opaque/old"), 0o755))
			whiteout(t, at("opaque/f")) // of nothing any more
		}, want: []string{"empty/ 5 700 0:0", "new/ 5 755 0:0", "opaque/ 5 755 0:0", "opaque/.wh..wh..opq 0 0 0:0", "opaque/old/ 5 755 0:0"}},
		{name: "a directory over a file, a file over a directory", make: func(t *testing.T, at func(string) string) {
			ok(t, os.Mkdir(at("zz"), 0o755))
			ok(t, unix.Setxattr(at("zz"), "trusted.overlay.opaque", []byte("y"), 0))
			ok(t, os.WriteFile(at("a"), nil, 0o644))
		}, want: []string{"a 0 644 0:0", "zz/ 5 755 0:0"}},
		{name: "a socket", make: func(t *testing.T, at func(string) string) {
			ok(t, os.Mkdir(at("d"), 0o755))
			for _, name := range []string{"d/sock", "d/other"} {
				l, err := net.ListenUnix("unix", &net.UnixAddr{Name: at(name), Net: "unix"})
				ok(t, err)
				l.SetUnlinkOnClose(false)
				l.Close()
			}
		}, want: []string{"d/ 5 755 0:0", "d/.wh.sock 0 0 0:0"}, warnings: 2},
		{name: "kinds, bits, owners, attributes", make: func(t *testing.T, at func(string) string) {
			ok(t, os.WriteFile(at("suid"), []byte("x"), 0o644))
			ok(t, os.Chown(at("suid"), 1000, 70000))
			ok(t, os.Chmod(at("suid"), 0o755|os.ModeSetuid|os.ModeSticky))
			ok(t, unix.Setxattr(at("suid"), "user.k", []byte("v\x00w"), 0))
			ok(t, unix.Setxattr(at("suid"), "user.e=f", []byte("v"), 0))
			ok(t, unix.Setxattr(at("suid"), "trusted.overlay.origin", []byte("v"), 0))
			ok(t, unix.Setxattr(at("suid"), "trusted.overlay.overlay.opaque", []byte("y"), 0))
			ok(t, unix.Setxattr(at("suid"), "security.selinux", []byte("host"), 0))
			ok(t, os.Link(at("suid"), at("b")))
			ok(t, unix.Mkfifo(at("fifo"), 0o600))
			ok(t, unix.Mknod(at("dev"), unix.S_IFBLK|0o600, int(unix.Mkdev(259, 70000))))
			ok(t, os.Symlink("/nowhere", at("link")))
			ok(t, os.WriteFile(at("acl"), nil, 0o640))
			ok(t, unix.Setxattr(at("acl"), "system.posix_acl_access", []byte(acl), 0))
		}, want: []string{
			fmt.Sprintf("acl 0 640 0:0 system.posix_acl_access=%q", acl),
			`b 0 5755 1000:70000 user.k="v\x00w"`, "dev 4 600 0:0 259,70000", "fifo 6 600 0:0",
			"link 2 777 0:0 -> /nowhere", `suid 1 5755 1000:70000 -> b user.k="v\x00w"`,
		}, warnings: 4},
		{name: "include brings parents", options: EntryOptions{Include: []string{"/a/b/*.txt", "zz"}}, make: func(t *testing.T, at func(string) string) {
			ok(t, os.MkdirAll(at("a/b"), 0o755))
			ok(t, os.WriteFile(at("a/b/1.txt"), nil, 0o644))
			ok(t, os.WriteFile(at("a/b/2.log"), nil, 0o644))
			whiteout(t, at("a/b/f"))
			whiteout(t, at("zz"))
		}, want: []string{".wh.zz 0 0 0:0", "a/ 5 755 0:0", "a/b/ 5 755 0:0", "a/b/1.txt 0 644 0:0"}},
		{name: "exclude", options: EntryOptions{Exclude: []string{"a", "!a/b/keep", "**/*.log"}}, make: func(t *testing.T, at func(string) string) {
			ok(t, os.MkdirAll(at("a/b"), 0o755))
			ok(t, os.WriteFile(at("a/b/keep"), nil, 0o644))
			ok(t, os.WriteFile(at("a/b/.wh.no"), nil, 0o644))
			ok(t, os.WriteFile(at("x.log"), nil, 0o644))
			ok(t, os.Link(at("a/b/.wh.no"), at("linked")))
		}, want: []string{"a/ 5 755 0:0", "a/b/ 5 755 0:0", "a/b/keep 0 644 0:0", "linked 0 644 0:0"}},
		{name: "secrets", make: func(t *testing.T, at func(string) string) {
			ok(t, os.MkdirAll(at("root/.ssh"), 0o700))
			for _, name := range []string{"id_ed25519", "id_ed25519.pub", "known_hosts"} {
				ok(t, os.WriteFile(at("root/.ssh/"+name), nil, 0o600))
			}
			ok(t, os.WriteFile(at("root/.bash_history"), nil, 0o600))
		}, want: []string{
			"root/ 5 700 0:0", "root/.bash_history 0 600 0:0", "root/.ssh/ 5 700 0:0",
			"root/.ssh/id_ed25519 0 600 0:0", "root/.ssh/id_ed25519.pub 0 600 0:0", "root/.ssh/known_hosts 0 600 0:0",
		}, secrets: []string{"/root/.bash_history", "/root/.ssh/id_ed25519"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			up, at := newUpper(t)
			tt.make(t, at)
			got, err := Entries(context.Background(), up, im, tt.options)
			ok(t, err)
			if d := cmp.Diff(tt.want, headers(got)); d != "" {
				t.Errorf("(-want +got):\n%s", d)
			}
			if len(got.Warnings) != tt.warnings {
				t.Errorf("warnings %q", got.Warnings)
			}
			if d := cmp.Diff(tt.secrets, got.Secrets); d != "" {
				t.Errorf("secrets (-want +got):\n%s", d)
			}
			tarOf(t, got.Entries)
		})
	}
	t.Run("clamp", func(t *testing.T) {
		up, at := newUpper(t)
		for name, sec := range map[string]int64{"old": 100, "young": 1e9, "ancient": -5} {
			ok(t, os.WriteFile(at(name), nil, 0o644))
			ok(t, os.Chtimes(at(name), time.Now(), time.Unix(sec, 7)))
		}
		clamp := time.Unix(5000, 9)
		got, err := Entries(context.Background(), up, im, EntryOptions{Clamp: &clamp})
		ok(t, err)
		var times []int64
		for _, e := range got.Entries {
			times = append(times, e.Header.ModTime.UnixNano())
		}
		if d := cmp.Diff([]int64{-5e9, 100e9, 5000e9}, times); d != "" {
			t.Errorf("(-want +got):\n%s", d)
		}
		tarOf(t, got.Entries)
	})
	t.Run("a name that means a deletion", func(t *testing.T) {
		up, at := newUpper(t)
		ok(t, os.WriteFile(at(".wh.zz"), nil, 0o644))
		if _, err := Entries(context.Background(), up, im, EntryOptions{}); err == nil || !strings.Contains(err.Error(), ".wh.zz") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a bad pattern", func(t *testing.T) {
		up, _ := newUpper(t)
		if _, err := Entries(context.Background(), up, im, EntryOptions{Exclude: []string{"[a"}}); err == nil {
			t.Error("it passed")
		}
	})
}
