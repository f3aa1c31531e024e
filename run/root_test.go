package run

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"
)

func tmpTree(t *testing.T, files map[string]string) (*tree, string) {
	t.Helper()
	dir := t.TempDir()
	write(t, dir, files)
	tr, err := openTree(dir)
	must(t, err)
	t.Cleanup(func() { tr.Close() })
	return tr, dir
}

func TestLookup(t *testing.T) {
	files := map[string]string{
		"real/passwd": "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34:web:/var/www:/bin/sh\nnohome:x:5:5:::\n",
		"real/group":  "root:x:0:\nweb:x:34:\nextra:x:90:other,web\nlog:x:91:\n",
		"etc/passwd":  "->/real/passwd", // the root's own, not the host's
		"etc/group":   "->../../../real/group",
	}
	tr, _ := tmpTree(t, files)
	for _, c := range []struct {
		who    string
		groups []string
		want   specs.User
		home   string
		err    string
	}{
		{who: "", want: specs.User{AdditionalGids: []uint32{0}}, home: "/root"},
		{who: "root", want: specs.User{AdditionalGids: []uint32{0}}, home: "/root"},
		{who: "web", want: specs.User{UID: 33, GID: 34, AdditionalGids: []uint32{34, 90}}, home: "/var/www"},
		{who: "33", want: specs.User{UID: 33, GID: 34, AdditionalGids: []uint32{34, 90}}, home: "/var/www"},
		{who: "web:log", want: specs.User{UID: 33, GID: 91, AdditionalGids: []uint32{91}}, home: "/var/www"},
		{who: "web:7", want: specs.User{UID: 33, GID: 7, AdditionalGids: []uint32{7}}, home: "/var/www"},
		{who: "1234", want: specs.User{UID: 1234, AdditionalGids: []uint32{0}}, home: "/"},
		{who: "1234:5", want: specs.User{UID: 1234, GID: 5, AdditionalGids: []uint32{5}}, home: "/"},
		{who: "nohome", want: specs.User{UID: 5, GID: 5, AdditionalGids: []uint32{5}}, home: "/"},
		{who: "web", groups: []string{"log", "77"}, want: specs.User{UID: 33, GID: 34, AdditionalGids: []uint32{34, 90, 77, 91}}, home: "/var/www"},
		{who: "nobody", err: "unable to find user nobody: no matching entries in passwd file"},
		{who: "web:nobody", err: "unable to find group nobody: no matching entries in group file"},
		{who: "web", groups: []string{"nobody"}, err: "nobody"},
		{who: "-1", err: "uids and gids must be in range"},
		{who: "4294967296", err: "uids and gids must be in range"},
	} {
		got, home, err := lookup(tr, c.who, c.groups)
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%q %v: error %v, want %q", c.who, c.groups, err, c.err)
			}
			continue
		}
		if d := cmp.Diff(c.want, got); d != "" || err != nil || home != c.home {
			t.Errorf("%q %v: %v, home %s: %s", c.who, c.groups, err, home, d)
		}
	}

	bare, dir := tmpTree(t, map[string]string{"etc/passwd": "->/etc/../../../../nowhere"})
	if _, home, err := lookup(bare, "12:13", nil); err != nil || home != "/" {
		t.Errorf("a root without users: %s, %v", home, err)
	}
	if _, _, err := lookup(bare, "root", nil); err == nil {
		t.Error("a root without users has root by name")
	}
	must(t, os.Remove(filepath.Join(dir, "etc/passwd")))
	write(t, dir, map[string]string{"etc/passwd/": ""})
	if _, _, err := lookup(bare, "0", nil); err == nil || !strings.Contains(err.Error(), "etc/passwd of the image is not a regular file") {
		t.Errorf("a directory of users: %v", err)
	}
	must(t, os.Remove(filepath.Join(dir, "etc/passwd")))
	write(t, dir, map[string]string{"etc/passwd": ""})
	must(t, os.Truncate(filepath.Join(dir, "etc/passwd"), maxFile+1))
	if _, _, err := lookup(bare, "0", nil); err == nil || !strings.Contains(err.Error(), "the limit is") {
		t.Errorf("too many users: %v", err)
	}
}

// TestMountPoints makes what is missing, never outside, and takes it away again
// unless it is used.
func TestMountPoints(t *testing.T) {
	outside := t.TempDir()
	tr, dir := tmpTree(t, map[string]string{"etc/kept": "x", "var/run": "->/run", "run/": "", "out": "->" + outside, "up": "->../../..", "loose": "->nothing", "used/": "", "file": ""})
	before := time.Unix(1_000_000_000, 5)
	must(t, os.Chtimes(filepath.Join(dir, "etc"), before, before))
	file := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(file, nil, 0o600))
	// A link to a directory outside is one to a directory of that name inside.
	write(t, dir, map[string]string{outside + "/": ""})
	mounts := []specs.Mount{
		{Destination: "/proc", Type: "proc"},
		{Destination: "/dev", Type: "tmpfs"},
		{Destination: "/dev/pts", Type: "devpts"},
		{Destination: "/etc/hosts", Type: "bind", Source: file},
		{Destination: "/var/run/s/sock", Type: "bind", Source: file},
		{Destination: "/out/a", Type: "bind", Source: dir},
		{Destination: "/up/b", Type: "bind", Source: dir},
		{Destination: "/used/c", Type: "bind", Source: file},
		{Destination: "/used/d", Type: "bind", Source: dir},
	}
	c := Container{ID: "c", Root: dir, Dir: t.TempDir()}
	bundle := filepath.Join(c.Dir, bundleDir)
	must(t, os.Mkdir(bundle, 0o700))
	must(t, mountPoints(tr, bundle, mounts))
	names, err := MountPoints(c.Dir)
	must(t, err)
	want := []string{"b", "dev", "etc/hosts", "proc", "run/s", "run/s/sock", outside[1:] + "/a", "used/c", "used/d"}
	slices.Sort(want) // where the directory outside lies among them depends on its name
	if d := cmp.Diff(want, names); d != "" {
		t.Error(d)
	}
	for _, n := range names {
		if _, err := os.Lstat(filepath.Join(dir, n)); err != nil {
			t.Error(err)
		}
	}
	if left, _ := os.ReadDir(outside); len(left) > 0 {
		t.Errorf("made outside the root: %v", left)
	}
	if fi, err := os.Stat(filepath.Join(dir, "etc")); err != nil || !fi.ModTime().Equal(before) {
		t.Errorf("the directory's time changed to %v", fi.ModTime())
	}
	// A second start after an end that nobody tidied makes nothing new.
	must(t, mountPoints(tr, bundle, mounts))
	must(t, os.WriteFile(filepath.Join(dir, "used/c"), []byte("data"), 0o600))
	must(t, os.WriteFile(filepath.Join(dir, "used/d/in"), nil, 0o600))
	must(t, os.Remove(filepath.Join(dir, "proc")))
	must(t, os.Symlink(outside, filepath.Join(dir, "proc")))
	must(t, Tidy(c))
	for name, want := range map[string]bool{"b": false, "dev": false, "etc/hosts": false, "etc/kept": true, "run/s": false, "run": true, "used/c": true, "used/d": true, "proc": true} {
		if _, err := os.Lstat(filepath.Join(dir, name)); (err == nil) != want {
			t.Errorf("%s after tidying: %v", name, err)
		}
	}
	if names, err := MountPoints(c.Dir); err != nil || len(names) > 0 {
		t.Errorf("after tidying: %v, %v", names, err)
	}
	must(t, Tidy(c))
	must(t, Tidy(Container{Dir: t.TempDir()}))

	for dest, want := range map[string]string{"/loose": "a symbolic link to nothing is in the way", "/loose/x": "a symbolic link to nothing is in the way", "/file": "not a directory", "/file/x": "not a directory"} {
		err := mountPoints(tr, bundle, []specs.Mount{{Destination: dest, Type: "tmpfs"}})
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "make the mount point "+dest) {
			t.Errorf("%s: %v", dest, err)
		}
	}
	if err := mountPoints(tr, bundle, []specs.Mount{{Destination: "/etc", Type: "bind", Source: file}}); err == nil || !strings.Contains(err.Error(), "is a directory") {
		t.Errorf("a file over a directory: %v", err)
	}
}
