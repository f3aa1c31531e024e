package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/daemon"
)

// item is an entry of a tar.
type item struct {
	tar.Header
	data string
}

func dir(name string) item {
	return item{Header: tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: 0o755}}
}
func reg(name, data string) item {
	return item{tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644}, data}
}
func sym(name, to string) item {
	return item{Header: tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: to}}
}
func hard(name, to string) item {
	return item{Header: tar.Header{Name: name, Typeflag: tar.TypeLink, Linkname: to}}
}

// pour makes a tar.
func pour(t *testing.T, items ...item) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, i := range items {
		i.Format, i.ModTime, i.Size = tar.FormatPAX, old, int64(len(i.data))
		if err := w.WriteHeader(&i.Header); err != nil {
			t.Fatal(err)
		}
		io.WriteString(w, i.data)
	}
	w.Close()
	return b.Bytes()
}

// TestHostileTar copies out of mounts whose tars are meant to write elsewhere,
// and into a mount from such a tar. What lies beside stays as it is.
func TestHostileTar(t *testing.T) {
	for _, tt := range []struct {
		name  string
		items []item // below "d" on the way out
		out   string // what is wrong with it; "" if nothing
		in    string
	}{
		{"up", []item{reg("d/../../secret", "bad")}, "leads out", "leads out"},
		{"up, in one", []item{reg("..", "bad")}, "leads out", "leads out"},
		{"up and back", []item{reg("d/../../dst/secret", "bad")}, "leads out", "leads out"},
		{"absolute", []item{reg("/secret", "bad")}, `has the name "secret"`, ""},
		{"other base", []item{reg("dx/secret", "bad")}, `has the name "dx/secret"`, ""},
		{"through a symlink", []item{sym("d/l", ".."), reg("d/l/../../secret", "bad")}, `has the name "secret"`, ""},
		{"through an absolute symlink", []item{sym("d/l", "OUTSIDE"), reg("d/l/secret", "bad")}, "symlink on the way leads out", "symlink on the way leads nowhere"},
		{"through a relative symlink", []item{sym("d/l", "../../.."), reg("d/l/secret", "bad")}, "symlink on the way leads out", ""},
		{"through two", []item{sym("d/l", "m"), sym("d/m", "../../.."), reg("d/l/secret", "bad")}, "symlink on the way leads out", ""},
		{"through one made later", []item{dir("d/l"), reg("d/l/a", "a"), sym("d/l", "../.."), reg("d/l/secret", "bad")}, "cannot overwrite directory", "cannot overwrite directory"},
		{"through one exchanged", []item{dir("d/in"), sym("d/l", "in"), reg("d/l/a", "a"), sym("d/l", "../../.."), reg("d/l/secret", "bad")}, "symlink on the way leads out", ""},
		{"onto a symlink", []item{sym("d/l", "../../secret"), reg("d/l", "good")}, "", ""},
		{"onto a symlink, a directory", []item{sym("d/l", "../.."), dir("d/l")}, "cannot overwrite non-directory", "cannot overwrite non-directory"},
		{"hard link up", []item{hard("d/h", "../secret")}, "leads out", "leads out"},
		{"hard link to other base", []item{hard("d/h", "e/secret")}, `has the name "e/secret"`, "no such file"},
		{"hard link through a symlink", []item{sym("d/l", "../../.."), hard("d/h", "d/l/secret")}, "symlink on the way leads out", "no such file"},
		{"hard link to a symlink", []item{sym("d/l", "../../secret"), hard("d/h", "d/l"), reg("d/h", "good")}, "", ""},
		{"directory's mode through a symlink", []item{sym("d/l", "../.."), dir("d/l/.")}, "cannot overwrite non-directory", "cannot overwrite non-directory"},
		{"loop", []item{sym("d/l", "l"), reg("d/l/a", "bad")}, "too many levels", "too many levels"},
		{"file as directory", []item{reg("d/f", "f"), reg("d/f/a", "bad")}, "not a directory", "not a directory"},
		{"unknown type", []item{{Header: tar.Header{Name: "d/x", Typeflag: 'Z'}}}, "unknown type", "unknown type"},
	} {
		for _, way := range []string{"out", "in"} {
			t.Run(tt.name+", "+way, func(t *testing.T) {
				top := plant(t, t.TempDir(), "secret good", "dst/", "dst/d/")
				outside := t.TempDir()
				items := make([]item, len(tt.items))
				copy(items, tt.items)
				for i := range items {
					items[i].Linkname = strings.ReplaceAll(items[i].Linkname, "OUTSIDE", outside)
				}
				b := pour(t, items...)
				var err error
				want := tt.out
				if way == "out" {
					src := plant(t, t.TempDir(), "d/")
					s := &served{mount: daemon.Mount{Dir: src, Name: "m", State: "mounted"}, tar: b}
					_, err = s.cp(t.Context(), t, nil, "m:/d", top+"/dst")
				} else {
					want = tt.in
					err = into(t, &copier{}, bytes.NewReader(b), "-", top+"/dst", "/")
				}
				if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
					t.Errorf("%v, want %q", err, want)
				}
				os.RemoveAll(top + "/dst")
				if d := cmp.Diff(tree(t, plant(t, t.TempDir(), "secret good")), tree(t, top)); d != "" && !onlyTime(d) {
					t.Errorf("what lies beside: (-want +got)\n%s", d)
				}
				if es, _ := os.ReadDir(outside); len(es) != 0 {
					t.Errorf("outside has %v", es)
				}
			})
		}
	}
}

// onlyTime says whether a difference is no more than the time of the directory
// that the test itself took something out of.
func onlyTime(d string) bool {
	for line := range strings.Lines(d) {
		if (line[0] == '-' || line[0] == '+') && !strings.Contains(line, ". drwx") && !strings.Contains(line, "  \t") {
			return false
		}
	}
	return true
}

// TestCopyInSymlinks copies to paths of a mount with symlinks in them: they lead
// to the same places as if its root were the system's.
func TestCopyInSymlinks(t *testing.T) {
	src := plant(t, t.TempDir(), "f new")
	for _, tt := range []struct {
		link, to string // planted, and where it is copied to
		want     string // the file that has it
	}{
		{"l ->/a/b", "/l", "a/b/f"},
		{"l ->/a/b", "/l/", "a/b/f"},
		{"l ->/a/b", "/l/g", "a/b/g"},
		{"l ->/a/b/g", "/l", "a/b/g"},
		{"l ->../../../../../a/b", "/l", "a/b/f"},
		{"a/l ->../../../a/b/g", "/a/l", "a/b/g"},
		{"a/l ->b/../g", "a/l", "a/g"},
		{"l ->/", "/l", "f"},
		{"l ->a/b", "/l/../g", "g"}, // docker cleans the path before it looks
		{"x ->/y", "/x", "y"},
		{"x f", "/../../x", "x"},
	} {
		top := plant(t, t.TempDir(), "root/", "root/a/", "root/a/b/")
		plant(t, top+"/root", tt.link)
		if err := into(t, &copier{}, nil, src+"/f", top+"/root", tt.to); err != nil {
			t.Errorf("%s, to %s: %v", tt.link, tt.to, err)
			continue
		}
		if b, err := os.ReadFile(filepath.Join(top, "root", tt.want)); string(b) != "new" {
			t.Errorf("%s, to %s: %q %v in\n%s", tt.link, tt.to, b, err, tree(t, top))
		}
	}
	// A symlink that a tar runs through, and one that it brings.
	top := plant(t, t.TempDir(), "root/", "root/usr/", "root/opt/", "root/opt/lib/", "root/usr/lib ->/opt/lib")
	b := pour(t, reg("lib/x", "new"), sym("own", "/opt"), reg("own/y", "new"))
	if err := into(t, &copier{}, bytes.NewReader(b), "-", top+"/root", "/usr"); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"opt/lib/x", "opt/y"} {
		if b, err := os.ReadFile(filepath.Join(top, "root", name)); string(b) != "new" {
			t.Errorf("%s: %q %v", name, b, err)
		}
	}
}

// TestCopyPrivileges copies what gives privileges out of a mount, and in.
func TestCopyPrivileges(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can keep owners and make device files")
	}
	capability := "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00" // cap_net_bind_service+e
	b := pour(t, dir("d"),
		item{tar.Header{Name: "d/su", Typeflag: tar.TypeReg, Mode: 0o6755, Uid: 1234, Gid: 5678}, "su"},
		item{tar.Header{Name: "d/cap", Typeflag: tar.TypeReg, Mode: 0o755, Uid: 1234, Gid: 5678,
			PAXRecords: map[string]string{"SCHILY.xattr.security.capability": capability, "SCHILY.xattr.user.x": "y",
				"SCHILY.xattr.trusted.overlay.opaque": "y"}}, "cap"},
		item{Header: tar.Header{Name: "d/null", Typeflag: tar.TypeChar, Mode: 0o666, Devmajor: 1, Devminor: 3, Uid: 1234}},
		item{Header: tar.Header{Name: "d/fifo", Typeflag: tar.TypeFifo, Mode: 0o644}},
		item{Header: tar.Header{Name: "d/l", Typeflag: tar.TypeSymlink, Linkname: "su", Uid: 1234, Gid: 5678}},
	)
	type file struct {
		Mode     uint32
		UID, GID uint32
		Xattrs   string
	}
	look := func(top string) map[string]file {
		m := map[string]file{}
		for _, name := range []string{"su", "cap", "null", "fifo", "l"} {
			var st unix.Stat_t
			p := filepath.Join(top, "d", name)
			if unix.Lstat(p, &st) != nil {
				continue
			}
			names := make([]byte, 1000)
			n, _ := unix.Llistxattr(p, names)
			attrs := strings.Split(string(names[:max(n, 0)]), "\x00")
			slices.Sort(attrs)
			m[name] = file{st.Mode, st.Uid, st.Gid, strings.TrimSpace(strings.Join(attrs, " "))}
		}
		return m
	}
	const R, C, F, L = unix.S_IFREG, unix.S_IFCHR, unix.S_IFIFO, unix.S_IFLNK
	kept := map[string]file{
		"su": {R | 0o6755, 1234, 5678, ""}, "cap": {R | 0o755, 1234, 5678, "security.capability user.x"},
		"null": {C | 0o666, 1234, 0, ""}, "fifo": {F | 0o644, 0, 0, ""}, "l": {L | 0o777, 1234, 5678, ""},
	}
	for _, tt := range []struct {
		name string
		copy func(dst string) error
		want map[string]file
	}{
		{"out", func(dst string) error {
			s := &served{mount: daemon.Mount{Dir: plant(t, t.TempDir(), "d/"), State: "mounted"}, tar: b}
			_, err := s.cp(t.Context(), t, nil, "m:/d", dst)
			return err
		}, map[string]file{
			"su": {R | 0o755, 0, 0, ""}, "cap": {R | 0o755, 0, 0, "user.x"}, "fifo": {F | 0o644, 0, 0, ""}, "l": {L | 0o777, 0, 0, ""},
		}},
		{"out, archive", func(dst string) error {
			s := &served{mount: daemon.Mount{Dir: plant(t, t.TempDir(), "d/"), State: "mounted"}, tar: b}
			_, err := s.cp(t.Context(), t, nil, "-a", "m:/d", dst)
			return err
		}, kept},
		{"in", func(dst string) error { return into(t, &copier{}, bytes.NewReader(b), "-", dst, "/") }, map[string]file{
			"su": {R | 0o6755, 0, 0, ""}, "cap": {R | 0o755, 0, 0, "security.capability user.x"},
			"null": {C | 0o666, 0, 0, ""}, "fifo": {F | 0o644, 0, 0, ""}, "l": {L | 0o777, 0, 0, ""},
		}},
		{"in, archive", func(dst string) error {
			return into(t, &copier{archive: true}, bytes.NewReader(b), "-", dst, "/")
		}, kept},
		{"in, archive, from files", func(dst string) error {
			src := t.TempDir()
			if err := into(t, &copier{archive: true}, bytes.NewReader(b), "-", src, "/"); err != nil {
				return err
			}
			return into(t, &copier{archive: true}, nil, src+"/d", dst, "/")
		}, kept},
	} {
		top := t.TempDir()
		if err := tt.copy(top); err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
		if d := cmp.Diff(tt.want, look(top)); d != "" {
			t.Errorf("%s: (-want +got)\n%s", tt.name, d)
		}
	}
}

// TestUnpackAsUser unpacks without privileges what only its owner's rights at the
// time could hinder: directories that may not be written, or not be entered.
func TestUnpackAsUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can try what another user may do")
	}
	top := t.TempDir()
	if err := os.Chown(top, 1234, 1234); err != nil {
		t.Fatal(err)
	}
	root, err := unix.Open(top, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(root)
	items := []item{dir("ro"), reg("ro/f", "f"), dir("ro/closed"), reg("ro/closed/g", "g"), reg("implied/h", "h")}
	items[0].Mode, items[2].Mode, items[1].Uid = 0o555, 0, 99
	b := pour(t, items...)
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with us
		unix.Setfsgid(1234)
		unix.Setfsuid(1234) // takes the capabilities that concern files as well
		u := unpacker{root: root, dir: ".", resolve: unix.RESOLVE_BENEATH}
		err := u.unpack(bytes.NewReader(b))
		u = unpacker{root: root, dir: ".", resolve: unix.RESOLVE_BENEATH, owner: headerOwner}
		if cerr := u.unpack(bytes.NewReader(pour(t, item{tar.Header{Name: "foreign", Typeflag: tar.TypeReg, Uid: 99}, "x"}))); !errors.Is(cerr, unix.EPERM) {
			err = errors.Join(err, errors.New("the owner was kept"), cerr)
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(tree(t, top), "\n")
	for i := range lines {
		lines[i] = strings.TrimSuffix(lines[i], " 2020-02-03 04:05:06")
	}
	want := `. drwxr-xr-x 1234:1234
implied drwxr-xr-x 1234:1234
implied/h -rw-r--r-- 1234:1234 2020-02-03 04:05:06 "h"
ro dr-xr-xr-x 1234:1234
ro/closed d--------- 1234:1234
ro/closed/g -rw-r--r-- 1234:1234 2020-02-03 04:05:06 "g"
ro/f -rw-r--r-- 1234:1234 2020-02-03 04:05:06 "f"
`
	if d := cmp.Diff(want, strings.Join(lines, "\n")); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
}
